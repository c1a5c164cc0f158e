package integration

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/integration/appclient"
	"cloudlet/integration/cloudlets"
	"cloudlet/integration/link"
	"cloudlet/integration/need"

	"github.com/stretchr/testify/require"
)

// answerBound is how long an application may take to answer after a handoff.
const answerBound = time.Minute

// handoffLab is a lab of cloudlets with an application at the first, and a client at work.
type handoffLab struct {
	*cloudlets.Lab
	t      *testing.T
	in     api.Instance
	trail  *cloudlets.Trail
	client *appclient.Client
	token  string
}

// newHandoffLab makes one. At its end nothing may be left, and nothing that the client was
// told may be missing.
func newHandoffLab(t *testing.T, o cloudlets.Options) *handoffLab {
	t.Helper()
	needVMs(t)
	need.No(t, link.Probe(), link.ErrUnavailable)
	sharedOnce.Do(setUp)
	require.NoError(t, shared.err)
	o.Program, o.GuestDir, o.Store = shared.bin, *guestDir, shared.dir
	var err error
	o.Dir, err = os.MkdirTemp("", "handoff-")
	require.NoError(t, err)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the daemons' logs are in %s", o.Dir)
			return
		}
		require.NoError(t, os.RemoveAll(o.Dir))
	})
	l := &handoffLab{t: t}
	l.Lab, err = cloudlets.Open(t.Context(), o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, l.Close(context.WithoutCancel(t.Context()))) })
	return l
}

// begin runs the application's overlay at the first cloudlet and lets a client begin.
func (l *handoffLab) begin() {
	l.t.Helper()
	ctx, a := l.t.Context(), l.Cloudlets[0]
	app, err := l.Application(ctx, a, func(address string) error {
		return l.Ask(ctx, nil, http.MethodPost, address, "/write?mib=1&seed=app")
	})
	require.NoError(l.t, err)
	l.in, err = a.Run(ctx, app)
	require.NoError(l.t, err)
	var first struct{ Token string }
	require.NoError(l.t, l.Ask(ctx, &first, http.MethodGet, a.Address(l.in), "/"))
	l.token = first.Token
	l.trail, err = l.Follow(a, l.in.ID)
	require.NoError(l.t, err)
	l.t.Cleanup(l.trail.Close)
	l.client, err = appclient.Start(ctx, appclient.Config{Name: "c", Find: l.trail.Find, Dial: l.Dial, Rest: 2 * time.Millisecond})
	require.NoError(l.t, err)
	l.t.Cleanup(l.client.Stop)
}

// address returns where clients find the application now.
func (l *handoffLab) address() string {
	l.t.Helper()
	address, err := l.trail.Find(l.t.Context())
	require.NoError(l.t, err)
	return address
}

// requireAnswers waits until the client is answered again and looks for faults.
func (l *handoffLab) requireAnswers() {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), answerBound)
	defer cancel()
	require.NoError(l.t, l.client.Await(ctx, time.Now()))
	require.NoError(l.t, l.client.Err())
}

// requireNothingLost ends the client and compares all that it was told with what is there, and
// all that the application holds with what it must be.
func (l *handoffLab) requireNothingLost() {
	l.t.Helper()
	address := l.address()
	l.client.Stop()
	require.NoError(l.t, l.client.Verify(l.t.Context(), address))
	require.Positive(l.t, l.client.Report().Acknowledged)
	_, err := l.Verify(l.t.Context(), address, l.token)
	require.NoError(l.t, err)
}

// TestHandoff moves an application there and back while a client works with it and it rewrites
// its data. Afterwards it is an instance like any other.
func TestHandoff(t *testing.T) { handoffThereAndBack(t, cloudlets.Options{Count: 2}) }

func handoffThereAndBack(t *testing.T, options cloudlets.Options) {
	l := newHandoffLab(t, options)
	l.begin()
	a, b := l.Cloudlets[0], l.Cloudlets[1]
	id := l.in.ID
	for i, hop := range [][2]*cloudlets.Cloudlet{{a, b}, {b, a}} {
		for _, path := range []string{fmt.Sprintf("/fill?mib=16&seed=hop%d", i), "/churn?kib_per_s=256"} {
			require.NoError(t, l.Ask(t.Context(), nil, http.MethodPost, l.address(), path))
		}
		begin := time.Now()
		moved, err := hop[0].HandOff(t.Context(), id, hop[1], 0, nil)
		require.NoError(t, err)
		l.requireAnswers()
		t.Logf("%s to %s: client gap %v, pause %.3f s, %d bytes, %.2f s", hop[0].Name, hop[1].Name, l.client.Gap(begin, time.Now()).Length(), moved.Pause, moved.Bytes, moved.Took)
		require.NotEmpty(t, moved.Rounds)
		left, err := hop[0].Client.Instance(t.Context(), id)
		require.NoError(t, err)
		require.Equal(t, api.Stopped, left.State)
		require.Equal(t, &api.Moved{To: hop[1].URL, Instance: moved.Instance, Endpoints: moved.Endpoints}, left.Moved)
		there, err := hop[1].Client.Instance(t.Context(), moved.Instance)
		require.NoError(t, err)
		require.Equal(t, api.Running, there.State)
		require.Equal(t, l.in.Lineage, there.Lineage)
		require.Greater(t, there.Epoch, left.Epoch)
		require.NoError(t, hop[0].Client.DeleteInstance(t.Context(), id, false))
		id = moved.Instance
		if at, found := l.trail.Where(); at != hop[1] || found != id {
			t.Fatalf("the client was led to %s of %s", found, at.Name)
		}
	}
	l.requireNothingLost()

	var o api.CreatedOverlay
	require.NoError(t, a.CLI(t.Context(), &o, "overlay", "create", id))
	again, err := a.Run(t.Context(), o.ID)
	require.NoError(t, err)
	require.NoError(t, l.client.Verify(t.Context(), a.Address(again)))
	_, err = l.Verify(t.Context(), a.Address(again), l.token)
	require.NoError(t, err)
}
