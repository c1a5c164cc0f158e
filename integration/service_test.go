package integration

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/api/service"
	"cloudlet/integration/guest"

	"github.com/stretchr/testify/require"
)

// daemon opens the lab's store as a daemon does, in this process.
func (l *lab) daemon() *service.Service {
	l.t.Helper()
	log := slog.New(slog.NewTextHandler(testWriter{l.t}, nil))
	s, err := service.Open(l.t.Context(), service.Config{Dir: l.state, Program: []string{shared.bin}, Daemon: true, Log: log})
	require.NoError(l.t, err)
	l.t.Cleanup(func() { closeNow(l.t, s) })
	return s
}

func closeNow(t *testing.T, s *service.Service) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	require.NoError(t, s.Close(ctx))
}

// testWriter writes to a test's log.
type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}

// follow waits for the end of an operation.
func follow(t *testing.T, s *service.Service, id string) (last api.Operation) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	for op, err := range s.OperationEvents(ctx, id, 0) {
		require.NoError(t, err)
		last = op
	}
	require.True(t, last.State.Ended(), "%+v", last)
	return last
}

// TestServiceRuns synthesises through operations: together, cancelled at many moments, and
// across the restart of the daemon.
func TestServiceRuns(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	s := l.daemon()
	local := service.Caller{Name: "test", Local: true}
	probe := &api.Probe{Port: guest.Port, Path: "/healthz"}

	op, err := s.Submit(t.Context(), local, api.Run{Ref: file, Probe: probe})
	require.NoError(t, err)
	end := follow(t, s, op.ID)
	require.Equal(t, api.OperationDone, end.State, end.Error)
	var in api.Instance
	require.NoError(t, json.Unmarshal(end.Result, &in))
	require.Equal(t, &api.Target{Type: "instance", ID: in.ID}, end.Target)
	require.Equal(t, "accepted", in.Timeline[0].Name)
	require.Less(t, in.Timeline[0].Seconds, 0.001)
	require.Equal(t, "first answer", in.Timeline[len(in.Timeline)-1].Name)
	ask(t, in, "GET", "/")
	t.Logf("%v, the operation %v", in.Timeline, end.Ended.Sub(end.Created))

	var wg sync.WaitGroup
	ids := make([]string, 4)
	for i := range ids {
		wg.Go(func() {
			if op, err := s.Submit(t.Context(), local, api.Run{Ref: file, Probe: probe}); err != nil {
				t.Error(err)
			} else {
				ids[i] = op.ID
			}
		})
	}
	wg.Wait()
	for _, id := range ids {
		require.Equal(t, api.OperationDone, follow(t, s, id).State)
	}
	var m service.Metrics
	eventually(t, "five first answers are counted", func() bool { // just after the operation's end
		m, err = s.Collect(t.Context())
		return err != nil || m.FirstResponse.Count == 5
	})
	require.NoError(t, err)
	require.Equal(t, 5, m.Instances[api.Running])
	require.Equal(t, 1, m.Mounts, "one mount for all")
	require.Positive(t, m.DemandWait.Count)
	require.Positive(t, m.Mount.FramesVerified)
	require.EqualValues(t, 5*guest.MemoryMiB<<20, m.Guests)
	for _, other := range l.list() {
		if other.ID != in.ID {
			require.NoError(t, s.Delete(t.Context(), other.ID, true))
		}
	}

	cancelled := 0
	for i := range 8 {
		op, err := s.Submit(t.Context(), local, api.Run{Ref: file, Probe: &api.Probe{Port: 9, Path: "/"}})
		require.NoError(t, err)
		time.Sleep(time.Duration(i) * 40 * time.Millisecond) // a moment of its life
		now, err := s.CancelOperation(t.Context(), op.ID)
		require.NoError(t, err)
		require.Equal(t, api.OperationCancelled, now.State)
		require.Nil(t, now.Target)
		cancelled++
		require.Len(t, l.list(), 1, "nothing is left of it")
	}
	require.Equal(t, 8, cancelled)

	// A stop leaves VMs running, also one whose first answer is awaited; the next start goes on.
	op, err = s.Submit(t.Context(), local, api.Run{Ref: file, Probe: &api.Probe{Port: 9, Path: "/"}})
	require.NoError(t, err)
	eventually(t, "it runs", func() bool {
		list := l.list()
		return len(list) == 2 && list[1].State == api.Running
	})
	closeNow(t, s)
	require.Len(t, l.list(), 2)
	s = l.daemon()
	still, err := s.Operation(t.Context(), op.ID)
	require.NoError(t, err)
	require.Equal(t, api.OperationRunning, still.State)
	still, err = s.CancelOperation(t.Context(), op.ID)
	require.NoError(t, err)
	require.Equal(t, api.OperationCancelled, still.State)
	require.Len(t, l.list(), 1)
	closeNow(t, s)
	// A daemon that was killed while it waited for the first answer left this behind.
	left := api.Operation{
		ID: "0123456789ab", Kind: api.KindRun, State: api.OperationRunning, Version: 4, Created: time.Now().UTC(),
		Target: &api.Target{Type: "instance", ID: in.ID},
	}
	left.Request, err = json.Marshal(api.Run{Ref: file, Probe: probe})
	require.NoError(t, err)
	b, err := json.Marshal(struct {
		api.Operation
		Daemon bool `json:"daemon"`
	}{left, true})
	require.NoError(t, err)
	require.NoError(t, os.Mkdir(filepath.Join(l.state, "operations", left.ID), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(l.state, "operations", left.ID, "record.json"), b, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(l.state, "active", left.ID), nil, 0o600))
	ask(t, in, "GET", "/") // it runs without a daemon
	s = l.daemon()
	end = follow(t, s, left.ID)
	require.Equal(t, api.OperationDone, end.State, end.Error)
	require.Contains(t, string(end.Result), in.ID)
	require.Greater(t, end.Version, int64(100))
	now, err := s.Instance(t.Context(), in.ID)
	require.NoError(t, err)
	require.Equal(t, api.Running, now.State)
	eventually(t, "counts survive, and grow", func() bool {
		m, err = s.Collect(t.Context())
		return err != nil || m.FirstResponse.Count == 6
	})
	require.NoError(t, err)
}
