package integration

import (
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"

	"cloudlet/api"
	"cloudlet/integration/cloudlets"

	"github.com/stretchr/testify/require"
)

// during begins a handoff and calls f once its phase begins with the word. It returns when both
// have ended: with the handoff's result.
func (l *handoffLab) during(from *cloudlets.Cloudlet, id string, to *cloudlets.Cloudlet, phase string, f func()) (api.HandedOff, error) {
	l.t.Helper()
	reached := make(chan struct{})
	var once sync.Once
	type outcome struct {
		out api.HandedOff
		err error
	}
	ended := make(chan outcome, 1)
	go func() {
		out, err := from.HandOff(l.t.Context(), id, to, 0, func(op api.Operation) {
			if strings.HasPrefix(op.Phase, phase) {
				once.Do(func() { close(reached) })
			}
		})
		ended <- outcome{out, err}
	}()
	select {
	case <-reached:
		f()
		o := <-ended
		return o.out, o.err
	case o := <-ended:
		require.Fail(l.t, "the handoff has ended before", "%s: %v", phase, o.err)
		return o.out, o.err
	}
}

// TestHandoffKilledDaemon kills the daemon of either side while rounds are taken: the guest runs
// on at the source, nothing is left at the destination, and the next handoff succeeds.
func TestHandoffKilledDaemon(t *testing.T) {
	l := newHandoffLab(t, cloudlets.Options{Count: 2})
	l.begin()
	a, b := l.Cloudlets[0], l.Cloudlets[1]
	for _, victim := range []*cloudlets.Cloudlet{a, b} {
		require.NoError(t, l.Ask(t.Context(), nil, http.MethodPost, l.address(), "/fill?mib=16&seed="+victim.Name))
		_, err := l.during(a, l.in.ID, b, "round", func() {
			require.NoError(t, victim.End(syscall.SIGKILL))
			require.NoError(t, victim.Start(t.Context()))
		})
		t.Logf("the daemon of %s was killed: %v", victim.Name, err)
		eventually(t, "the handoff has ended at "+a.Name, func() bool {
			in, err := a.Client.Instance(t.Context(), l.in.ID)
			require.NoError(t, err)
			return in.Handoff == ""
		})
		l.address() // follows the instance
		if at, _ := l.trail.Where(); victim == b && err == nil {
			require.Equal(t, b, at, "a destination that is back soon enough takes it")
			break
		}
		require.Error(t, err)
		l.requireAnswers()
		in, err := a.Client.Instance(t.Context(), l.in.ID)
		require.NoError(t, err)
		require.Equal(t, api.Running, in.State)
		eventually(t, "nothing is left at "+b.Name, func() bool {
			list, err := b.Client.Instances(t.Context(), true)
			require.NoError(t, err)
			return len(list) == 0
		})
	}
	if at, id := l.trail.Where(); at == a {
		_, err := a.HandOff(t.Context(), id, b, 0, nil)
		require.NoError(t, err)
	}
	l.requireAnswers()
	l.requireNothingLost()
}
