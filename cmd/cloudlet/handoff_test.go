package main

import (
	"bytes"
	"context"
	"encoding/json"
	"iter"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/api/rest"
	"cloudlet/api/service"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"
)

// moving is a service with one instance and one operation, the handoff of it, that goes on
// only when a test says so. Its other verbs are not there.
type moving struct {
	rest.Service
	mu      sync.Mutex
	changed chan struct{} // closed and made anew at each change
	asked   []api.HandOff
	op      api.Operation
	late    bool // it cannot be cancelled any more
	slow    bool // to be cancelled takes until a test ends it
	in      api.Instance
	handoff api.Handoff
	acts    []api.Action
	fail    error // of Submit, Handoff and Act
}

func newMoving() *moving {
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	return &moving{
		changed: make(chan struct{}),
		op:      api.Operation{ID: "00000000000a", Kind: api.KindHandoff, State: api.OperationRunning, Version: 1, Phase: "offer", Created: created, Request: json.RawMessage(`{}`)},
		in:      api.Instance{ID: "0123456789ab", Name: "web", State: api.Running, Created: created, Lineage: "0123456789ab"},
	}
}

func (m *moving) Submit(_ context.Context, _ service.Caller, req any) (api.Operation, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.fail != nil {
		return api.Operation{}, m.fail
	}
	m.asked = append(m.asked, req.(api.HandOff))
	return m.op, nil
}

// becomes changes the operation and wakes who waits.
func (m *moving) becomes(change func(*api.Operation)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	change(&m.op)
	m.op.Version++
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *moving) phase(name string, late bool) {
	m.becomes(func(op *api.Operation) { op.Phase, m.late = name, late })
}

func (m *moving) end(state api.OperationState, result any, err *api.Error) {
	data, jerr := json.Marshal(result)
	if jerr != nil {
		panic(jerr)
	}
	m.becomes(func(op *api.Operation) {
		op.State, op.Ended, op.Error = state, op.Created, err
		if err == nil {
			op.Result = data
		}
	})
}

func (m *moving) Operation(context.Context, string) (api.Operation, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.op, nil
}

func (m *moving) WaitOperation(ctx context.Context, _ string, after int64) (api.Operation, error) {
	for {
		m.mu.Lock()
		op, changed := m.op, m.changed
		m.mu.Unlock()
		if op.Version > after || op.State.Ended() {
			return op, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return op, nil
		}
	}
}

func (m *moving) OperationEvents(ctx context.Context, id string, after int64) iter.Seq2[api.Operation, error] {
	return func(yield func(api.Operation, error) bool) {
		for {
			op, err := m.WaitOperation(ctx, id, after)
			if ctx.Err() != nil || op.Version <= after || !yield(op, err) || op.State.Ended() {
				return
			}
			after = op.Version
		}
	}
}

func (m *moving) CancelOperation(ctx context.Context, id string) (api.Operation, error) {
	m.mu.Lock()
	late := m.late || m.op.State.Ended()
	m.mu.Unlock()
	if m.slow {
		return m.WaitOperation(ctx, id, 1<<62)
	}
	if late {
		return api.Operation{}, api.Errorf(api.Conflict, "operation %s cannot be cancelled", id)
	}
	m.end(api.OperationCancelled, nil, api.Errorf(api.Cancelled, "cancelled"))
	return m.Operation(ctx, id)
}

func (m *moving) Instance(context.Context, string) (api.Instance, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.in, nil
}

func (m *moving) Instances(context.Context, bool) ([]api.Instance, error) {
	return []api.Instance{m.in}, nil
}

func (m *moving) Act(_ context.Context, _ string, a api.Action) (api.Instance, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.acts = append(m.acts, a)
	return m.in, m.fail
}

func (m *moving) Handoff(_ context.Context, id string) (api.Handoff, error) {
	if id != "web" {
		return api.Handoff{}, api.Errorf(api.NotFound, "no handoff of %s", id)
	}
	return m.handoff, nil
}

// serveMoving runs the service as the daemon of a state folder, until the test's end.
func serveMoving(t *testing.T, m *moving) (dir string) {
	t.Helper()
	dir = t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, socketName))
	require.NoError(t, err)
	ctx, stop := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() {
		ended <- (&rest.Server{Handler: rest.New(rest.Config{Service: m}), Drain: time.Millisecond}).Serve(ctx, l)
	}()
	t.Cleanup(func() {
		stop()
		require.NoError(t, <-ended)
	})
	return dir
}

// begun runs a command line on dir in the background. interrupt is its Ctrl-C, wait its end.
func begun(t *testing.T, dir string, args ...string) (errs *said, interrupt func(), wait func() (int, string)) {
	t.Helper()
	return begunOn(t, false, dir, args...)
}

func begunOn(t *testing.T, terminal bool, dir string, args ...string) (errs *said, interrupt func(), wait func() (int, string)) {
	t.Helper()
	ctx, interrupt := context.WithCancel(t.Context())
	var out bytes.Buffer
	errs = &said{}
	env := &environment{
		args: args, stdin: &bytes.Buffer{}, stdout: &out, stderr: errs, terminal: terminal,
		getenv: func(name string) string {
			return map[string]string{"CLOUDLET_STATE": dir, "CLOUDLET_TO_TOKEN": "secret"}[name]
		},
	}
	ended := make(chan int, 1)
	go func() { ended <- run(ctx, env) }()
	return errs, interrupt, func() (int, string) { code := <-ended; return code, out.String() }
}

var aHandedOff = api.HandedOff{
	Handoff: "4a4a4a4a4a4a4a4a", To: "http://10.0.0.2:7300", Instance: "4a4a4a4a4a4a", Endpoints: []api.Endpoint{{Guest: 80, Address: "10.0.0.2:8080"}},
	Rounds: []api.HandoffRound{{Dirty: 128 << 20, Bytes: 40 << 20, Made: 1.25, Sent: 3.5, Pause: 0.004}, {Dirty: 2 << 20, Bytes: 1 << 20, Made: 0.05, Sent: 0.1, Pause: 0.12}},
	Bytes:  41 << 20, Pause: 0.124, Took: 5.5,
}

// TestHandoff: what is asked for is what the flags say, and what comes of it is printed.
func TestHandoff(t *testing.T) {
	token := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(token, []byte("# of edge-2\npeer edge-1 from-a-file\n"), 0o600))
	for _, row := range []struct {
		name string
		args []string
		want api.HandOff
	}{
		{"plain", nil, api.HandOff{Instance: "web", To: "http://10.0.0.2:7300", Token: "secret", Rounds: 4}},
		{"all flags", []string{"--rounds", "2", "--keep-ports", "--to-token-file", token}, api.HandOff{Instance: "web", To: "http://10.0.0.2:7300", Token: "from-a-file", Rounds: 2, KeepPorts: true}},
		{"no rounds", []string{"--rounds", "0"}, api.HandOff{Instance: "web", To: "http://10.0.0.2:7300", Token: "secret", Rounds: -1}},
		{"json", []string{"--json"}, api.HandOff{Instance: "web", To: "http://10.0.0.2:7300", Token: "secret", Rounds: 4}},
	} {
		t.Run(row.name, func(t *testing.T) {
			m := newMoving()
			m.end(api.OperationDone, aHandedOff, nil)
			errs, _, wait := begun(t, serveMoving(t, m), append([]string{"handoff", "web", "--to", "http://10.0.0.2:7300"}, row.args...)...)
			code, out := wait()
			require.Zero(t, code, errs)
			require.Equal(t, []api.HandOff{row.want}, m.asked)
			require.Empty(t, errs.String())
			require.NotContains(t, out, "secret")
			if row.name == "json" {
				var got api.HandedOff
				require.NoError(t, json.Unmarshal([]byte(out), &got))
				require.Equal(t, aHandedOff, got)
				return
			}
			require.Equal(t, `instance 4a4a4a4a4a4a at http://10.0.0.2:7300
guest port 80 is at 10.0.0.2:8080
ROUND  CHANGED  OVERLAY   MADE IN  SENT IN  PAUSE
1      128 MiB  40.0 MiB  1.25 s   3.50 s   4 ms
2      2.0 MiB  1.0 MiB   50 ms    100 ms   120 ms
41.0 MiB in 5.50 s, the guest stood still for 124 ms
`, out)
		})
	}
}

// TestHandoffTokens: a token that others can read is used, and said to be so; one that cannot
// be read ends it before anything is asked.
func TestHandoffTokens(t *testing.T) {
	m := newMoving()
	m.end(api.OperationDone, aHandedOff, nil)
	dir := serveMoving(t, m)
	open := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(open, []byte("abc"), 0o600))
	require.NoError(t, os.Chmod(open, 0o640))
	errs, _, wait := begun(t, dir, "handoff", "web", "--to", "http://x:1", "--to-token-file", open)
	code, _ := wait()
	require.Zero(t, code)
	require.Contains(t, errs.String(), "remedy: chmod 600 "+open)
	require.NotContains(t, errs.String(), "abc")
	errs, _, wait = begun(t, dir, "handoff", "web", "--to", "http://x:1", "--to-token-file", "/nowhere")
	code, _ = wait()
	require.Equal(t, exitNotFound, code, errs)
	require.Len(t, m.asked, 1)
}

// TestHandoffFails: a refusal is the service's, with its remedy and exit code.
func TestHandoffFails(t *testing.T) {
	for name, refuse := range map[string]func(*moving, *api.Error){
		"at once": func(m *moving, e *api.Error) { m.fail = e },
		"later":   func(m *moving, e *api.Error) { m.end(api.OperationFailed, nil, e) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMoving()
			refuse(m, api.Errorf(api.Conflict, "base: it is not there").Fix("import it there"))
			errs, _, wait := begun(t, serveMoving(t, m), "handoff", "web", "--to", "http://x:1")
			code, out := wait()
			require.Equal(t, exitConflict, code)
			require.Equal(t, "cloudlet: base: it is not there\n  remedy: import it there\n", errs.String())
			require.Empty(t, out)
		})
	}
}

// TestHandoffInterrupted: Ctrl-C before go cancels, and says where the guest is; after go it
// says that it is too late, and what goes on. Whatever it says, the exit code is that of Ctrl-C.
func TestHandoffInterrupted(t *testing.T) {
	for _, row := range []struct {
		name, phase string
		late        bool
		state       api.State
		want        []string
	}{
		{"in a round", "round 1", false, api.Running, []string{"the handoff of web was cancelled: the guest runs on here"}},
		{"paused before", "round 1", false, api.Paused, []string{"was cancelled: the guest is paused here"}},
		{"at go", "go", true, api.Paused, []string{"too late", "has been told to run at http://x:1; here it is paused", "cloudlet op wait 00000000000a", "cloudlet handoff web --status"}},
		{"in doubt", "in doubt", true, api.Paused, []string{"too late", "it is not known whether the guest runs at http://x:1; here it is paused"}},
		{"moved", "moved", true, api.Paused, []string{"too late", "the guest runs at http://x:1, and the rest of its pages is brought there"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			m := newMoving()
			m.in.State = row.state
			m.phase(row.phase, row.late)
			errs, interrupt, wait := begun(t, serveMoving(t, m), "handoff", "web", "--to", "http://x:1")
			require.Eventually(t, func() bool {
				m.mu.Lock()
				defer m.mu.Unlock()
				return len(m.asked) == 1
			}, 5*time.Second, time.Millisecond)
			interrupt()
			code, out := wait()
			require.Equal(t, exitInterrupted, code)
			require.Empty(t, out)
			for _, want := range row.want {
				require.Contains(t, errs.String(), want)
			}
			require.Equal(t, row.late, !m.op.State.Ended())
		})
	}
}

// TestHandoffEndsAsItIsCancelled: what has come to its end is told as that.
func TestHandoffEndsAsItIsCancelled(t *testing.T) {
	m := newMoving()
	m.end(api.OperationDone, aHandedOff, nil)
	o := &handoffCommand{env: &environment{}}
	s := dialed(t, serveMoving(t, m))
	op, err := o.cancel(t.Context(), s, m.op, time.Minute)
	require.NoError(t, err)
	require.Equal(t, api.OperationDone, op.State)
}

// TestHandoffSlowToCancel: the other side need not have heard of it for the guest to be here.
func TestHandoffSlowToCancel(t *testing.T) {
	m := newMoving()
	m.slow = true
	m.phase("aborting", false)
	o := &handoffCommand{env: &environment{}, req: api.HandOff{Instance: "web", To: "http://x:1"}}
	_, err := o.cancel(t.Context(), dialed(t, serveMoving(t, m)), m.op, 50*time.Millisecond)
	require.Equal(t, api.Cancelled, api.CodeOf(err))
	require.ErrorContains(t, err, "the handoff of web was cancelled: the guest stays here, and the other side is being told")
	m.end(api.OperationDone, aHandedOff, nil)
}

// dialed is a session with the daemon of a folder.
func dialed(t *testing.T, dir string) *session {
	t.Helper()
	s, err := (&environment{state: dir, flags: new(pflag.FlagSet)}).dial(t.Context())
	require.NoError(t, err)
	t.Cleanup(s.Close)
	return s
}

// TestHandoffInDoubt: whoever waits is told of a doubt once, and of its end by the result.
func TestHandoffInDoubt(t *testing.T) {
	t.Run("file", func(t *testing.T) { testInDoubt(t, false) })
	t.Run("terminal", func(t *testing.T) { testInDoubt(t, true) }) // bars are drawn before and after
}

func testInDoubt(t *testing.T, terminal bool) {
	m := newMoving()
	errs, _, wait := begunOn(t, terminal, serveMoving(t, m), "handoff", "web", "--to", "http://x:1")
	m.becomes(func(op *api.Operation) { op.Phase, op.Done, op.Total = "round 1", 10, 20 })
	m.phase("go", true)
	m.phase("in doubt", true)
	require.Eventually(t, func() bool {
		return strings.Contains(errs.String(), "in doubt: it is not known whether the guest runs at http://x:1; here it is paused\n")
	}, 5*time.Second, time.Millisecond)
	require.Contains(t, errs.String(), "cloudlet handoff web --status")
	m.becomes(func(op *api.Operation) { op.Done++ })
	m.phase("moved", true)
	m.end(api.OperationDone, aHandedOff, nil)
	code, out := wait()
	require.Zero(t, code)
	require.Contains(t, out, "instance 4a4a4a4a4a4a at http://10.0.0.2:7300")
	require.Equal(t, 1, strings.Count(errs.String(), "in doubt: "))
}

// TestHandoffDetached prints the operation, and leaves it alone.
func TestHandoffDetached(t *testing.T) {
	m := newMoving()
	errs, _, wait := begun(t, serveMoving(t, m), "handoff", "web", "--to", "http://x:1", "--detach")
	code, out := wait()
	require.Zero(t, code, errs)
	require.Equal(t, "00000000000a\n", out)
	require.False(t, m.op.State.Ended())
}

// TestHandoffStatus prints what is known, and what can be done about a doubt.
func TestHandoffStatus(t *testing.T) {
	m := newMoving()
	m.handoff = api.Handoff{
		ID: "4a4a4a4a4a4a4a4a", Side: api.HandoffSource, Instance: "0123456789ab", Operation: "00000000000a", Peer: "http://x:1", Lineage: "0123456789ab", Epoch: 2,
		State: "moved", Theirs: "running", Bytes: 41 << 20, Missing: 1 << 20, Pause: 0.124, Why: "the next would not be smaller", Rounds: aHandedOff.Rounds,
		InDoubt: true, Loss: "all since 03:04", Stuck: "no route to host", Created: m.in.Created,
	}
	dir := serveMoving(t, m)
	code, out, errs := cli(t, dir, "handoff", "web", "--status")
	require.Zero(t, code, errs)
	for _, want := range []string{
		"state     moved\n", "theirs    running\n", "missing   1.0 MiB of it", "loss      all since 03:04\n", "stuck     no route to host\n",
		"in doubt  it is not known", "--resolve resume-here or discard-here\n", "2      2.0 MiB",
	} {
		require.Contains(t, out, want)
	}
	m.handoff = api.Handoff{ID: "4a", Side: api.HandoffSource, Instance: "0123456789ab", State: "going", InDoubt: true, Loss: "x", Created: m.in.Created}
	_, out, _ = cli(t, dir, "handoff", "web", "--status")
	require.Contains(t, out, "--resolve resume-here\n", "what has not run there cannot be given up here")
	m.handoff = api.Handoff{ID: "4a", Side: api.HandoffDestination, State: "never", Reasons: []api.HandoffReason{{Field: "port", Text: "8080 is taken", Remedy: "free it"}, {Text: "no space"}}, Created: m.in.Created}
	_, out, _ = cli(t, dir, "handoff", "web", "--status")
	require.Contains(t, out, "reason    port: 8080 is taken\nremedy    free it\nreason    no space\n")
	require.NotContains(t, out, "loss")
	code, out, _ = cli(t, dir, "handoff", "web", "--status", "--json")
	require.Zero(t, code)
	var got api.Handoff
	require.NoError(t, json.Unmarshal([]byte(out), &got))
	require.Equal(t, m.handoff, got)
	code, _, errs = cli(t, dir, "handoff", "other", "--status")
	require.Equal(t, exitNotFound, code, errs)
}

// TestHandoffResolve says what is given up, before it is.
func TestHandoffResolve(t *testing.T) {
	m := newMoving()
	m.handoff.Loss = "all since 03:04"
	dir := serveMoving(t, m)
	code, out, errs := cli(t, dir, "handoff", "web", "--resolve", "resume-here")
	require.Zero(t, code, errs)
	require.Equal(t, "0123456789ab running\n", out)
	require.Equal(t, "accepted: all since 03:04\n", errs)
	code, out, errs = cli(t, dir, "handoff", "web", "--resolve", "discard-here", "--json")
	require.Zero(t, code, errs)
	require.Empty(t, errs)
	var got struct{ Loss, ID string }
	require.NoError(t, json.Unmarshal([]byte(out), &got))
	require.Equal(t, []string{"all since 03:04", "0123456789ab"}, []string{got.Loss, got.ID})
	m.fail = api.Errorf(api.Conflict, "it is not in doubt")
	code, out, errs = cli(t, dir, "handoff", "web", "--resolve", "resume-here")
	require.Equal(t, exitConflict, code)
	require.Empty(t, out)
	require.Contains(t, errs, "it is not in doubt")
	require.Equal(t, []api.Action{api.ActionResumeHere, api.ActionDiscardHere, api.ActionResumeHere}, m.acts)
}

// TestHandoffWrongWords: what cannot be meant is refused before anything is asked.
func TestHandoffWrongWords(t *testing.T) {
	m := newMoving()
	dir := serveMoving(t, m)
	for _, row := range []struct {
		want string
		args []string
	}{
		{"the form is: cloudlet handoff INSTANCE", []string{"--to", "http://x:1"}},
		{"one of --to, --status and --resolve", []string{"web"}},
		{"exclude one another", []string{"web", "--status", "--resolve", "resume-here"}},
		{"want resume-here or discard-here", []string{"web", "--resolve", "both"}},
		{"cannot be negative", []string{"web", "--to", "http://x:1", "--rounds", "-1"}},
		{"--to begins a handoff", []string{"web", "--status", "--to", "http://x:1"}},
		{"--detach begins a handoff", []string{"web", "--resolve", "resume-here", "--detach"}},
		{"unknown flag: --to-token", []string{"web", "--to", "http://x:1", "--to-token", "secret"}},
	} {
		code, out, errs := cli(t, dir, append([]string{"handoff"}, row.args...)...)
		require.Equal(t, exitUsage, code, row.args)
		require.Contains(t, errs, row.want)
		require.Empty(t, out)
	}
	require.Empty(t, m.asked)
	require.Empty(t, m.acts)
}

// TestHandoffWithoutDaemon: this process would be gone when the guest needs its pages.
func TestHandoffWithoutDaemon(t *testing.T) {
	for _, args := range [][]string{{"--to", "http://x:1"}, {"--status"}, {"--resolve", "resume-here"}} {
		code, _, errs := cli(t, t.TempDir(), append([]string{"handoff", "web"}, args...)...)
		require.Equal(t, exitUnavailable, code, errs)
		require.Contains(t, errs, "remedy: start `cloudlet serve --listen HOST:PORT`")
	}
}

// TestHandoffInPS: an instance that is about to go, and one that has gone, say where.
func TestHandoffInPS(t *testing.T) {
	m := newMoving()
	dir := serveMoving(t, m)
	m.in.Handoff, m.in.Reason = "4a4a4a4a4a4a4a4a", "handoff 4a4a4a4a4a4a: open"
	_, out, _ := cli(t, dir, "ps")
	require.Contains(t, out, "  handoff 4a4a4a4a4a4a: open\n")
	m.in.Handoff, m.in.State, m.in.Reason = "", api.Stopped, "it was handed off to http://x:1"
	m.in.Moved = &api.Moved{To: "http://x:1", Instance: "4a4a4a4a4a4a"}
	_, out, _ = cli(t, dir, "ps", "--all")
	require.Contains(t, out, "  it was handed off to http://x:1, where it is 4a4a4a4a4a4a\n")
	code, out, errs := cli(t, dir, "__complete", "handoff", "")
	require.Zero(t, code, errs)
	require.Contains(t, out, "web\n")
	code, out, errs = cli(t, dir, "__complete", "handoff", "web", "--resolve", "")
	require.Zero(t, code, errs)
	require.Contains(t, out, "resume-here\ndiscard-here\n")
}
