package service

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

// reopen opens another Service over the store of s, as another process does.
func reopen(t *testing.T, s *Service, change func(*Config)) *Service {
	t.Helper()
	c := s.cfg
	if change != nil {
		change(&c)
	}
	other, err := Open(t.Context(), c)
	require.NoError(t, err)
	t.Cleanup(func() { closeNow(t, other) })
	return other
}

// closeNow cancels what runs and closes.
func closeNow(t *testing.T, s *Service) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	require.NoError(t, s.Close(ctx))
}

// gated begins an operation that works until gate is closed or it is cancelled.
func gated(t *testing.T, s *Service, caller Caller, gate <-chan struct{}) api.Operation {
	t.Helper()
	op, fresh, err := s.begin(t.Context(), task{caller: caller, kind: api.KindVerifyBase, req: VerifyBase{}, work: func(ctx context.Context, op *operation) (any, error) {
		op.progress("gate", 1, 2)
		select {
		case <-gate:
			return api.Base{ID: "made"}, nil
		case <-ctx.Done():
			return nil, fmt.Errorf("at the gate: %w", context.Cause(ctx))
		}
	}})
	require.NoError(t, err)
	require.True(t, fresh)
	return op
}

// await waits for the end of an operation.
func awaitEnd(t *testing.T, s *Service, id string) (last api.Operation) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for op, err := range s.OperationEvents(ctx, id, 0) {
		require.NoError(t, err)
		require.Greater(t, op.Version, last.Version)
		last = op
	}
	require.True(t, last.State.Ended(), last)
	return last
}

func TestOperationLife(t *testing.T) {
	s := newService(t)
	b := addBase(t, s, "", 'a')
	o := addOverlay(t, s, b.ID, "", 'x')
	file := filepath.Join(t.TempDir(), "o")
	require.NoError(t, copyOut(s.overlayFile(o.ID), file, func() error { return nil }))
	require.NoError(t, s.DeleteOverlay(t.Context(), o.ID))

	op, err := s.Submit(t.Context(), Caller{Local: true}, api.ImportOverlay{Name: "app", Source: file})
	require.NoError(t, err)
	require.Equal(t, api.OperationRunning, op.State)
	require.JSONEq(t, fmt.Sprintf(`{"name":"app","source":%q}`, file), string(op.Request))
	end := awaitEnd(t, s, op.ID)
	require.Equal(t, api.OperationDone, end.State, end.Error)
	require.Equal(t, &api.Target{Type: "overlay", ID: o.ID}, end.Target)
	require.Contains(t, string(end.Result), o.ID)
	have, err := s.OverlayFor(t.Context(), Caller{}, "app")
	require.NoError(t, err)
	require.Equal(t, o.ID, have.ID)
	require.NoError(t, s.Close(t.Context()))

	_, err = s.Submit(t.Context(), Caller{Local: true}, VerifyOverlay{api.Verify{Ref: "app"}})
	require.Equal(t, api.Unavailable, api.CodeOf(err), "closed")
	again := reopen(t, s, nil)
	kept, err := again.Operation(t.Context(), op.ID[:6])
	require.NoError(t, err)
	require.Equal(t, end.State, kept.State)
	require.Equal(t, end.Version, kept.Version)
	list, err := again.Operations(t.Context())
	require.NoError(t, err)
	require.Len(t, list, 1)
	_, err = again.Operation(t.Context(), "000000000000")
	require.Equal(t, api.NotFound, api.CodeOf(err))
	_, err = again.CancelOperation(t.Context(), op.ID)
	require.Equal(t, api.Conflict, api.CodeOf(err), "it has ended")
	for _, dir := range []string{"active", "tmp"} {
		left, err := os.ReadDir(s.path(dir))
		require.NoError(t, err)
		require.Empty(t, left, dir)
	}
}

// TestSubmitRefuses: what is wrong is said at once, with the field, and leaves nothing.
func TestSubmitRefuses(t *testing.T) {
	s := newService(t)
	b := addBase(t, s, "base", 'a')
	addOverlay(t, s, b.ID, "app", 'x')
	local, remote := Caller{Local: true}, Caller{Name: "peer"}
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, []byte("x"), 0o600))
	for _, tt := range []struct {
		name   string
		caller Caller
		req    any
		code   api.Code
		field  string
	}{
		{"run of nothing", local, api.Run{Ref: "nothing"}, api.NotFound, ""},
		{"run of a path from elsewhere", remote, api.Run{Ref: file}, api.Invalid, "ref"},
		{"run of a file URL from elsewhere", remote, api.Run{Ref: "file://" + file}, api.Invalid, "ref"},
		{"run of a URL without a rule", remote, api.Run{Ref: "https://example.org/o"}, api.Invalid, "ref"},
		{"run with a wrong probe", local, api.Run{Ref: "app", Probe: &api.Probe{Port: 70000}}, api.Invalid, "probe.port"},
		{"run with a wrong probe path", local, api.Run{Ref: "app", Probe: &api.Probe{Port: 80, Path: "a\nb"}}, api.Invalid, "probe.path"},
		{"run with a wrong time", local, api.Run{Ref: "app", Timeout: -1}, api.Invalid, "timeout"},
		{"run with a wrong port", local, api.Run{Ref: "app", Forwards: []api.Forward{{Guest: -1}}}, api.Invalid, "forwards"},
		{"run with a name as address", local, api.Run{Ref: "app", Forwards: []api.Forward{{Address: "localhost", Guest: 80}}}, api.Invalid, "forwards"},
		{"run with too many ports", local, api.Run{Ref: "app", Forwards: make([]api.Forward, 65)}, api.Invalid, "forwards"},
		{"run with a wrong name", local, api.Run{Ref: "app", Name: "A b"}, api.Invalid, "name"},
		{"run without device state", local, api.Run{Ref: "app"}, api.Invalid, ""},
		{"import of a path from elsewhere", remote, api.ImportOverlay{Source: file}, api.Invalid, "source"},
		{"import of a relative path", local, api.ImportOverlay{Source: "file"}, api.Invalid, "source"},
		{"import of nothing", local, api.ImportBase{Source: "/no/such/file"}, api.NotFound, ""},
		{"import of a folder", local, api.ImportBase{Source: "/tmp"}, api.Invalid, "source"},
		{"base of a disk from elsewhere", remote, api.CreateBase{Disk: file, Memory: 1 << 28}, api.Invalid, "disk"},
		{"base of no disk", local, api.CreateBase{Memory: 1 << 28}, api.Invalid, "disk"},
		{"base with a taken name", local, api.CreateBase{Name: "app", Disk: file, Memory: 1 << 28}, api.Conflict, ""},
		{"overlay of nothing", local, api.CreateOverlay{Instance: "nothing"}, api.NotFound, ""},
		{"overlay with a wrong strategy", local, api.CreateOverlay{Strategy: "no"}, api.Invalid, "strategy"},
		{"overlay to a path from elsewhere", remote, api.CreateOverlay{Output: file}, api.Invalid, "output"},
		{"verify of a path from elsewhere", remote, VerifyOverlay{api.Verify{Ref: "../../etc/passwd"}}, api.Invalid, "ref"},
		{"verify of no base", local, VerifyBase{api.Verify{Ref: "app"}}, api.NotFound, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			op, err := s.Submit(t.Context(), tt.caller, tt.req)
			require.Error(t, err)
			var e *api.Error
			require.ErrorAs(t, err, &e)
			require.Equal(t, tt.code, e.Code, err)
			require.Equal(t, tt.field, e.Field, err)
			require.Empty(t, op.ID)
		})
	}
	for _, dir := range []string{"operations", "active", "keys", "tmp", "instances"} {
		left, err := os.ReadDir(s.path(dir))
		require.NoError(t, err)
		require.Empty(t, left, dir)
	}
}

// TestStrategyWithoutProgram: a guest does not stand still for an overlay that this host
// cannot encode.
func TestStrategyWithoutProgram(t *testing.T) {
	s := newService(t)
	b := addBase(t, s, "base", 'a')
	addOverlay(t, s, b.ID, "app", 'x')
	t.Setenv("PATH", t.TempDir())
	for strategy, remedy := range map[string]string{"small": "install the package xz-utils", "balanced,delta=vcdiff": "install the package xdelta3"} {
		for _, req := range []any{
			api.CreateOverlay{Instance: "none", Strategy: strategy},
			api.Profile{Ref: "app", Probes: []api.Probe{{Port: 80}}, Repack: true, Strategy: strategy},
		} {
			_, err := s.Submit(t.Context(), Caller{Local: true}, req)
			var e *api.Error
			require.ErrorAs(t, err, &e)
			require.Equal(t, api.Unavailable, e.Code)
			require.ErrorContains(t, err, remedy)
		}
	}
}

func TestOperationWatchAndCancel(t *testing.T) {
	s := newService(t)
	other := reopen(t, s, nil) // sees what s does through the store
	for _, who := range []struct {
		name string
		s    *Service
	}{{"own", s}, {"of another process", other}} {
		t.Run(who.name, func(t *testing.T) {
			op := gated(t, s, Caller{}, nil)
			now, err := who.s.WaitOperation(t.Context(), op.ID, op.Version)
			require.NoError(t, err)
			require.Equal(t, "gate", now.Phase)
			require.EqualValues(t, 2, now.Total)
			short, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
			defer cancel()
			same, err := who.s.WaitOperation(short, op.ID, now.Version)
			require.NoError(t, err)
			require.Equal(t, now.Version, same.Version)

			end, err := who.s.CancelOperation(t.Context(), op.ID)
			require.NoError(t, err)
			require.Equal(t, api.OperationCancelled, end.State)
			require.Equal(t, api.Cancelled, end.Error.Code)
			require.Greater(t, end.Version, now.Version)
			for range who.s.OperationEvents(t.Context(), op.ID, end.Version) {
				t.Fatal("nothing comes after the end")
			}
		})
	}
	require.NoError(t, s.Close(t.Context()))
}

// TestProgressIsBounded: watchers of a fast worker see few of its changes, and the last.
func TestProgressIsBounded(t *testing.T) {
	s := newService(t)
	op, _, err := s.begin(t.Context(), task{kind: api.KindVerifyBase, req: VerifyBase{}, work: func(ctx context.Context, op *operation) (any, error) {
		for start := time.Now(); time.Since(start) < 350*time.Millisecond; {
			op.progress("spin", 1, 1)
		}
		return api.Base{}, nil
	}})
	require.NoError(t, err)
	end := awaitEnd(t, s, op.ID)
	require.Equal(t, api.OperationDone, end.State)
	require.LessOrEqual(t, end.Version, int64(7))
	require.Greater(t, end.Version, int64(2))
}

func TestCloseCancelsOrWaits(t *testing.T) {
	s := newService(t)
	op := gated(t, s, Caller{}, nil)
	closeNow(t, s)
	r, err := s.readOperation(op.ID)
	require.NoError(t, err)
	require.Equal(t, api.OperationCancelled, r.State)
	require.Contains(t, r.Error.Detail, "the service was stopped")

	s = newService(t)
	gate := make(chan struct{})
	op = gated(t, s, Caller{}, gate)
	time.AfterFunc(50*time.Millisecond, func() { close(gate) })
	require.NoError(t, s.Close(t.Context()))
	r, err = s.readOperation(op.ID)
	require.NoError(t, err)
	require.Equal(t, api.OperationDone, r.State)
}

// TestPanic: a fault ends the operation alone.
func TestPanic(t *testing.T) {
	s := newService(t)
	op, _, err := s.begin(t.Context(), task{kind: api.KindVerifyBase, req: VerifyBase{}, work: func(context.Context, *operation) (any, error) {
		panic("ouch")
	}})
	require.NoError(t, err)
	end := awaitEnd(t, s, op.ID)
	require.Equal(t, api.OperationFailed, end.State)
	require.Contains(t, end.Error.Detail, "ouch")
	require.NoError(t, s.Close(t.Context()))
}

// TestStopLeavesImports: what the next daemon can begin again is not ended by a stop.
func TestStopLeavesImports(t *testing.T) {
	s := newService(t)
	id, content := overlayBytes(t, s)
	arrived, gate := make(chan struct{}), make(chan struct{})
	var once sync.Once
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		once.Do(func() { close(arrived) })
		select {
		case <-gate:
		case <-r.Context().Done():
		}
		w.Header().Set("ETag", `"1"`)
		http.ServeContent(w, r, "o", time.Time{}, bytes.NewReader(content))
	}))
	defer web.Close()
	daemon := reopen(t, s, func(c *Config) { c.Daemon = true })
	op, err := daemon.Submit(t.Context(), Caller{Local: true}, api.ImportOverlay{Source: web.URL})
	require.NoError(t, err)
	<-arrived
	closeNow(t, daemon)
	now, err := s.Operation(t.Context(), op.ID)
	require.NoError(t, err)
	require.Equal(t, api.OperationRunning, now.State)
	left, err := os.ReadDir(s.path("tmp"))
	require.NoError(t, err)
	require.Empty(t, left)
	close(gate)
	daemon = reopen(t, s, func(c *Config) { c.Daemon = true })
	require.Equal(t, api.OperationDone, awaitEnd(t, daemon, op.ID).State)
	_, err = s.OverlayFor(t.Context(), Caller{}, id)
	require.NoError(t, err)
}

func TestOperationsAtOnce(t *testing.T) {
	s := reopen(t, newService(t), func(c *Config) { c.MaxOperations = 2 })
	gate := make(chan struct{})
	gated(t, s, Caller{}, gate)
	op := gated(t, s, Caller{}, gate)
	b := addBase(t, s, "", 'a')
	_, err := s.Submit(t.Context(), Caller{}, VerifyBase{api.Verify{Ref: b.ID}})
	require.Equal(t, api.Unavailable, api.CodeOf(err))
	require.ErrorContains(t, err, "2 operations are under way")
	close(gate)
	awaitEnd(t, s, op.ID)
	require.Eventually(t, func() bool {
		_, err := s.Submit(t.Context(), Caller{}, VerifyBase{api.Verify{Ref: b.ID}})
		return err == nil
	}, 5*time.Second, time.Millisecond)
}

// TestIdempotency: one key makes one operation, also at the same time from two processes.
func TestIdempotency(t *testing.T) {
	s := newService(t)
	b, c := addBase(t, s, "", 'a'), addBase(t, s, "", 'b')
	other := reopen(t, s, nil)
	caller := Caller{Name: "token", Key: "k1"}
	ids := make([]string, 12)
	errs := make([]error, len(ids))
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			on := s
			if i%2 == 1 {
				on = other
			}
			op, err := on.Submit(t.Context(), caller, VerifyBase{api.Verify{Ref: b.ID}})
			ids[i], errs[i] = op.ID, err
		})
	}
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
	for _, id := range ids {
		require.Equal(t, ids[0], id)
	}
	list, err := s.Operations(t.Context())
	require.NoError(t, err)
	require.Len(t, list, 1)
	awaitEnd(t, s, ids[0])

	_, err = other.Submit(t.Context(), caller, VerifyBase{api.Verify{Ref: c.ID}})
	require.Equal(t, api.Conflict, api.CodeOf(err))
	require.ErrorContains(t, err, ids[0])
	op, err := s.Submit(t.Context(), Caller{Name: "another", Key: "k1"}, VerifyBase{api.Verify{Ref: c.ID}})
	require.NoError(t, err)
	require.NotEqual(t, ids[0], op.ID, "keys belong to their callers")
	_, err = s.Submit(t.Context(), Caller{Key: string(make([]byte, 256))}, VerifyBase{api.Verify{Ref: c.ID}})
	require.Equal(t, api.Invalid, api.CodeOf(err))

	var k keyRecord
	require.NoError(t, readJSON(s.keyPath(caller), &k))
	k.Created = time.Now().Add(-keyLife - time.Minute)
	require.NoError(t, writeJSON(s.keyPath(caller), k))
	op, err = s.Submit(t.Context(), caller, VerifyBase{api.Verify{Ref: c.ID}})
	require.NoError(t, err, "an old key is forgotten")
	require.NotEqual(t, ids[0], op.ID)
	require.NoError(t, s.Close(t.Context()))
}

// left lays an operation down as a process leaves it that is killed.
func left(t *testing.T, s *Service, r operationRecord) string {
	t.Helper()
	r.ID = fmt.Sprintf("%012x", time.Now().UnixNano()&(1<<48-1))
	r.State, r.Version, r.Created = api.OperationRunning, 3, time.Now().UTC()
	op, _ := newOperation(t.Context(), r)
	op.work(nil)
	require.NoError(t, s.layDown(op, Caller{}))
	op.lock.unlock() // as the death of its process does
	return r.ID
}

func TestDeadOperations(t *testing.T) {
	s := newService(t)
	b := addBase(t, s, "", 'a')
	o := addOverlay(t, s, b.ID, "", 'x')
	served := filepath.Join(t.TempDir(), "o")
	require.NoError(t, copyOut(s.overlayFile(o.ID), served, func() error { return nil }))
	require.NoError(t, s.DeleteOverlay(t.Context(), o.ID))
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, served) }))
	defer web.Close()

	l, err := s.openLaunch(t.Context(), b.ID)
	require.NoError(t, err)
	in, lk, err := s.newRecord(t.Context(), newID(), api.Run{}, l, nil)
	require.NoError(t, err)
	require.NoError(t, l.close())
	lk.unlock()

	importing := operationRecord{Operation: api.Operation{Kind: api.KindImportOverlay, Phase: "copy", Request: []byte(`{"source":"` + web.URL + `/o"}`)}, Daemon: true, Local: true}
	byDaemon := left(t, s, importing)
	importing.Daemon = false
	byCommand := left(t, s, importing)
	run := left(t, s, operationRecord{Operation: api.Operation{Kind: api.KindRun, Phase: "mounted", Request: []byte(`{"ref":"x"}`), Target: &api.Target{Type: "instance", ID: in.ID}}, Daemon: true})
	half := left(t, s, operationRecord{})
	require.NoError(t, os.Remove(s.operationPath(half, "record.json")))
	torn := left(t, s, operationRecord{}) // by a power failure
	require.NoError(t, os.Truncate(s.operationPath(torn, "record.json"), 0))
	_, err = s.Operations(t.Context())
	require.NoError(t, err)

	now, err := s.Operation(t.Context(), byCommand) // whoever asks first ends it
	require.NoError(t, err)
	require.Equal(t, api.OperationFailed, now.State)
	require.Contains(t, now.Error.Detail, `was killed or crashed, in phase "copy"`)
	require.Greater(t, now.Version, int64(versionGap))

	reopen(t, s, nil)
	require.NoDirExists(t, s.operationPath(half))
	require.NoDirExists(t, s.operationPath(torn))
	now, err = s.Operation(t.Context(), byDaemon)
	require.NoError(t, err)
	require.Equal(t, api.OperationRunning, now.State, "waits for the next daemon")
	now, err = s.Operation(t.Context(), run)
	require.NoError(t, err)
	require.Equal(t, api.OperationFailed, now.State)
	require.Contains(t, now.Error.Detail, in.ID)
	ended, err := s.Instance(t.Context(), in.ID)
	require.NoError(t, err)
	require.Equal(t, api.Stopped, ended.State)

	importing.Daemon = true
	unwanted := left(t, s, importing)
	now, err = s.CancelOperation(t.Context(), unwanted)
	require.NoError(t, err, "cancelled while nobody works on it")
	require.Equal(t, api.OperationCancelled, now.State)

	daemon := reopen(t, s, func(c *Config) { c.Daemon = true })
	end := awaitEnd(t, daemon, byDaemon)
	require.Equal(t, api.OperationDone, end.State, end.Error)
	_, err = s.OverlayFor(t.Context(), Caller{}, o.ID)
	require.NoError(t, err)
	active, err := os.ReadDir(s.path("active"))
	require.NoError(t, err)
	require.Empty(t, active)

	_, err = Open(t.Context(), daemon.cfg)
	require.Equal(t, api.Conflict, api.CodeOf(err), "one daemon only")
	require.ErrorContains(t, err, fmt.Sprintf("process %d", os.Getpid()))
	closeNow(t, daemon)
	again := reopen(t, s, func(c *Config) { c.Daemon = true })
	closeNow(t, again)
}

func TestReady(t *testing.T) {
	s := newService(t)
	op, _, err := s.begin(t.Context(), task{kind: api.KindCreateBase, req: api.CreateBase{}, work: func(ctx context.Context, op *operation) (any, error) {
		return api.Base{ID: "b"}, op.awaitReady(ctx, api.Instance{State: api.Running, Endpoints: []api.Endpoint{{Guest: 80, Address: "127.0.0.1:8080"}}})
	}})
	require.NoError(t, err)
	for now, err := range s.OperationEvents(t.Context(), op.ID, 0) {
		require.NoError(t, err)
		if now.State != api.OperationWaiting {
			continue
		}
		require.Equal(t, op.ID, now.Target.ID)
		in, err := s.Instance(t.Context(), now.Target.ID)
		require.NoError(t, err)
		require.Equal(t, "127.0.0.1:8080", in.Endpoints[0].Address)
		_, err = s.Act(t.Context(), now.Target.ID, api.ActionReady)
		require.NoError(t, err)
		break
	}
	require.Equal(t, &api.Target{Type: "base", ID: "b"}, awaitEnd(t, s, op.ID).Target)
	_, err = s.Act(t.Context(), op.ID, api.ActionReady)
	require.Equal(t, api.NotFound, api.CodeOf(err))
	_, err = s.Act(t.Context(), op.ID, "dance")
	require.Equal(t, api.Invalid, api.CodeOf(err))
	require.NoError(t, s.Close(t.Context()))
}

// TestShared: an answer is shared, and never one from before the question.
func TestShared(t *testing.T) {
	s := newService(t)
	var mu sync.Mutex
	calls, value := 0, 0
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			for range 20 {
				mu.Lock()
				value++
				least := value
				mu.Unlock()
				got, err := shared(t.Context(), s, "k", func(context.Context) (int, error) {
					mu.Lock()
					defer mu.Unlock()
					calls++
					return value, nil
				})
				if err != nil || got < least {
					t.Errorf("asked at %d, answer of %d: %v", least, got, err)
				}
			}
		})
	}
	wg.Wait()
	require.LessOrEqual(t, calls, 1000)
	require.Empty(t, s.flights.running)
	require.Empty(t, s.flights.waiting)
}
