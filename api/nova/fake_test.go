package nova

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/api/service"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	operateToken = "operate-0123456789abcdef"
	readToken    = "read-0123456789abcdef"
	peerToken    = "peer-0123456789abcdef"
	brokenToken  = "broken-0123456789abcdef"
)

var (
	baseID    = strings.Repeat("ab", 32)
	overlayID = strings.Repeat("cd", 32)
	otherID   = strings.Repeat("ef", 32)
	then      = time.Date(2026, 5, 4, 3, 2, 1, 0, time.UTC)
)

// fake is a service in memory.
type fake struct {
	mu        sync.Mutex
	bases     []api.Base
	overlays  []api.Overlay
	instances []api.Instance
	ops       []api.Operation
	handoffs  map[string]api.Handoff
	did       []string // verbs that change something
	err       error    // of Submit and Act
	last      any      // submitted
	caller    service.Caller
}

func newFake() *fake {
	machine := json.RawMessage(`{"accelerator":"tcg","type":"pc-q35-7.2","cpus":1,"memory":268435456}`)
	big := json.RawMessage(`{"accelerator":"tcg","type":"pc-q35-7.2","cpus":2,"memory":1073741824}`)
	return &fake{
		bases: []api.Base{
			{ID: baseID, Name: "debian", Created: then, MemorySize: 256 << 20, DiskSize: 3 << 30, Resumable: true, Machine: machine},
			{ID: otherID, Created: then, MemorySize: 1 << 30, DiskSize: 8 << 30, Resumable: true, Machine: big},
			{ID: strings.Repeat("00", 32), Problem: "cannot be read"},
		},
		overlays: []api.Overlay{{
			ID: overlayID, Name: "app", Created: then, Base: baseID, Parent: baseID, Size: 1234, MemorySize: 256 << 20, DiskSize: 3 << 30,
		}},
		instances: []api.Instance{
			{ID: "000000000001", Name: "run", State: api.Running, Image: overlayID, Base: baseID, Overlays: []string{overlayID}, Created: then,
				Endpoints: []api.Endpoint{{Guest: 8080, Address: "127.0.0.1:4000"}, {Guest: 22, Address: "127.0.0.1:4001"}}},
			{ID: "000000000002", Name: "paused", State: api.Paused, Image: baseID, Base: baseID, Created: then.Add(time.Second)},
			{ID: "000000000003", Name: "off", State: api.Paused, Reset: true, Image: baseID, Base: baseID, Created: then.Add(2 * time.Second)},
			{ID: "000000000004", Name: "ended", State: api.Stopped, Reason: "stopped by request", Image: baseID, Base: baseID, Created: then.Add(3 * time.Second), Ended: then.Add(time.Hour)},
			{ID: "000000000005", Name: "lost", State: api.Lost, Reason: "the mount has died", Image: baseID, Base: baseID, Created: then.Add(4 * time.Second), Ended: then.Add(time.Hour)},
			{ID: "000000000006", Name: "moved", State: api.Stopped, Image: baseID, Base: baseID, Created: then.Add(5 * time.Second), Ended: then.Add(time.Hour),
				Moved: &api.Moved{To: "http://edge-2:7300", Instance: "999999999999", Endpoints: []api.Endpoint{{Guest: 8080, Address: "10.0.0.2:4000"}}}},
			{ID: "000000000007", Name: "leaving", State: api.Running, Handoff: strings.Repeat("77", 16), Image: overlayID, Base: baseID, Source: "https://depot/app?...", Created: then.Add(6 * time.Second)},
			{ID: "000000000008", Name: "stalled", State: api.Stalled, Reason: "a disk request failed", Image: baseID, Base: baseID, Created: then.Add(7 * time.Second)},
			{ID: "000000000009", Name: "probed", State: api.Running, Image: baseID, Base: baseID, Created: then.Add(8 * time.Second)},
		},
		ops: []api.Operation{
			{ID: "000000000009", Kind: api.KindRun, State: api.OperationRunning, Created: then, Request: json.RawMessage(`{"ref":"x","name":"probed"}`)},
			{ID: "00000000000a", Kind: api.KindRun, State: api.OperationRunning, Created: then.Add(9 * time.Second), Request: json.RawMessage(`{"ref":"https://depot/app","base":"` + baseID + `","name":"coming"}`)},
			{ID: "00000000000b", Kind: api.KindRun, State: api.OperationFailed, Created: then.Add(10 * time.Second), Ended: then.Add(time.Minute), Request: json.RawMessage(`{"ref":"https://depot/app","base":"` + baseID + `"}`),
				Error: api.Errorf(api.Unavailable, "the depot is away").Fix("ask again")},
			{ID: "00000000000c", Kind: api.KindRun, State: api.OperationCancelled, Created: then, Request: json.RawMessage(`{}`)},
			{ID: "00000000001a", Kind: api.KindCreateOverlay, State: api.OperationRunning, Created: then, Phase: "encode", Done: 3, Total: 9, Request: json.RawMessage(`{"instance":"000000000001","name":"next"}`)},
			{ID: "00000000001b", Kind: api.KindCreateOverlay, State: api.OperationDone, Created: then, Target: &api.Target{Type: "overlay", ID: overlayID}},
			{ID: "00000000001c", Kind: api.KindCreateOverlay, State: api.OperationFailed, Created: then, Request: json.RawMessage(`{"name":"bad"}`), Error: api.Errorf(api.Damaged, "broken")},
			{ID: "00000000001d", Kind: api.KindCreateBase, State: api.OperationDone, Created: then, Target: &api.Target{Type: "base", ID: baseID}},
			{ID: "00000000001e", Kind: api.KindCreateOverlay, State: api.OperationDone, Created: then, Target: &api.Target{Type: "overlay", ID: strings.Repeat("12", 32)}},
			{ID: "00000000002a", Kind: api.KindHandoff, State: api.OperationRunning, Created: then, Target: &api.Target{Type: "handoff", ID: strings.Repeat("77", 16)}, Request: json.RawMessage(`{"instance":"000000000007"}`)},
			{ID: "00000000002b", Kind: api.KindHandoff, State: api.OperationFailed, Created: then, Ended: then.Add(time.Second), Target: &api.Target{Type: "handoff", ID: strings.Repeat("78", 16)}, Request: json.RawMessage(`{"instance":"000000000001"}`)},
		},
		handoffs: map[string]api.Handoff{strings.Repeat("77", 16): {
			ID: strings.Repeat("77", 16), Side: api.HandoffSource, Instance: "000000000007", Peer: "http://edge-2:7300", Bytes: 1000, Missing: 400, Rounds: []api.HandoffRound{{Dirty: 5, Bytes: 1000}},
		}},
	}
}

func (f *fake) note(format string, args ...any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.did = append(f.did, fmt.Sprintf(format, args...))
	return f.err
}

func (f *fake) Bases(context.Context) ([]api.Base, error)       { return slices.Clone(f.bases), nil }
func (f *fake) Overlays(context.Context) ([]api.Overlay, error) { return slices.Clone(f.overlays), nil }
func (f *fake) DeleteOverlay(_ context.Context, ref string) error {
	return f.note("delete overlay %.4s", ref)
}
func (f *fake) Instances(_ context.Context, all bool) ([]api.Instance, error) {
	return slices.Clone(f.instances), nil
}

func (f *fake) Instance(_ context.Context, ref string) (api.Instance, error) {
	i := slices.IndexFunc(f.instances, func(in api.Instance) bool { return in.ID == ref })
	if i < 0 {
		return api.Instance{}, api.Errorf(api.NotFound, "no instance %q", ref)
	}
	return f.instances[i], nil
}

func (f *fake) Act(ctx context.Context, ref string, a api.Action) (api.Instance, error) {
	if err := f.note("%s %s", a, ref); err != nil {
		return api.Instance{}, err
	}
	return f.Instance(ctx, ref)
}

func (f *fake) Delete(ctx context.Context, ref string, force bool) error {
	if _, err := f.Instance(ctx, ref); err != nil {
		return err
	}
	return f.note("delete %s", ref)
}

func (f *fake) Log(_ context.Context, ref string, w io.Writer) error {
	_, err := io.WriteString(w, "one\ntwo\nthree\n")
	return err
}

func (f *fake) Submit(_ context.Context, caller service.Caller, req any) (api.Operation, error) {
	if err := f.note("%T", req); err != nil {
		return api.Operation{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.last, f.caller = req, caller
	return api.Operation{ID: "0123456789ab", Target: &api.Target{Type: "handoff", ID: strings.Repeat("42", 16)}}, nil
}

func (f *fake) Operations(context.Context) ([]api.Operation, error) { return slices.Clone(f.ops), nil }

func (f *fake) Operation(_ context.Context, id string) (api.Operation, error) {
	i := slices.IndexFunc(f.ops, func(op api.Operation) bool { return op.ID == id })
	if i < 0 {
		return api.Operation{}, api.Errorf(api.NotFound, "no operation %q", id)
	}
	return f.ops[i], nil
}

func (f *fake) CancelOperation(_ context.Context, id string) (api.Operation, error) {
	return api.Operation{}, f.note("cancel %s", id)
}
func (f *fake) ForgetOperation(_ context.Context, id string) error { return f.note("forget %s", id) }

func (f *fake) Handoff(_ context.Context, id string) (api.Handoff, error) {
	h, ok := f.handoffs[id]
	if !ok {
		return h, api.Errorf(api.NotFound, "no handoff %q", id)
	}
	return h, nil
}

// Authenticate knows three tokens, and one for which it is broken.
func (f *fake) Authenticate(_ context.Context, token string) (Identity, error) {
	switch token {
	case operateToken:
		return Identity{Name: "operator", Write: true}, nil
	case readToken:
		return Identity{Name: "reader"}, nil
	case peerToken:
		return Identity{}, ErrForbidden
	case brokenToken:
		return Identity{}, api.Errorf(api.Unavailable, "Keystone is away")
	}
	return Identity{}, ErrUnknownToken
}

// rig is a handler over a fake.
type rig struct {
	t *testing.T
	*fake
	*Handler
}

func newRig(t *testing.T) *rig {
	f := newFake()
	return &rig{t, f, New(Config{Service: f, Auth: f})}
}

// send sends a request and returns status, header and body.
func (r *rig) send(method, path, body string, header ...string) (int, http.Header, string) {
	r.t.Helper()
	var reader io.Reader
	if body != "" {
		reader = strings.NewReader(body)
	}
	req := httptest.NewRequestWithContext(r.t.Context(), method, "http://edge:7300"+path, reader)
	req.Header.Set("X-Auth-Token", operateToken)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Del(header[i])
		if header[i+1] != "" {
			req.Header.Set(header[i], header[i+1])
		}
	}
	rec := httptest.NewRecorder()
	r.ServeHTTP(rec, req)
	return rec.Code, rec.Header(), rec.Body.String()
}

// requireFault holds an answer to Nova's form of an error.
func requireFault(t *testing.T, status int, name, body string, words ...string) {
	t.Helper()
	var f map[string]fault
	require.NoError(t, json.Unmarshal([]byte(body), &f), body)
	require.Len(t, f, 1, body)
	require.Contains(t, f, name, body)
	require.Equal(t, status, f[name].Code)
	require.NotEmpty(t, f[name].Message)
	for _, w := range words {
		require.Contains(t, f[name].Message, w)
	}
}

func server(n string) string { return serverID(strings.Repeat("0", 12-len(n)) + n) }
