package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"cloudlet/api"
	"cloudlet/api/service"
)

var (
	epoch     = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	baseID    = strings.Repeat("ba", 32)
	overlayID = strings.Repeat("0e", 32)
	digest    = strings.Repeat("d1", 32)
)

const (
	instanceID = "0123456789ab"
	handoffID  = "4a4a4a4a4a4a4a4a"
	handoffKey = "key-0123456789abcdef"
)

// fake is a service in memory. Operations go on only when a test says so.
type fake struct {
	mu      sync.Mutex
	changed chan struct{}         // closed and made anew at each change
	fail    map[string]error      // by verb
	gate    map[string]chan empty // a verb waits for its gate to close
	calls   []any                 // what was submitted
	callers []service.Caller
	keys    map[string]api.Operation
	ops     []api.Operation
	uploads map[string]*upload
	content []byte
	pack    []byte
	breakAt int // BasePackage fails after so many bytes; 0: never
	acts    []api.Action
	watch   int // event streams open now

	messages  []handoffMessage
	delivered func(context.Context) // called with each message; nil: nothing is
}

// handoffMessage is a message as the service was given it.
type handoffMessage struct {
	caller service.Caller
	from   netip.Addr
	text   string
}

type empty struct{}

type upload struct {
	api.Upload
	data []byte
}

func newFake() *fake {
	return &fake{
		changed: make(chan struct{}), fail: map[string]error{}, gate: map[string]chan empty{},
		keys: map[string]api.Operation{}, uploads: map[string]*upload{},
		content: []byte("0123456789"), pack: []byte("PK package"),
	}
}

func (f *fake) enter(ctx context.Context, verb string) error {
	f.mu.Lock()
	err, gate := f.fail[verb], f.gate[verb]
	f.mu.Unlock()
	if gate != nil {
		select {
		case <-gate:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return err
}

func missing(what, ref string) error { return api.Errorf(api.NotFound, "no %s %s", what, ref) }

func aBase() api.Base {
	return api.Base{ID: baseID, Name: "debian", Created: epoch, MemorySize: 1 << 20, DiskSize: 1 << 20, Stored: 1 << 20, Resumable: true, Machine: json.RawMessage(`{"cpus":1}`)}
}

func anOverlay() api.Overlay {
	return api.Overlay{ID: overlayID, Name: "app", Created: epoch, Digest: digest, Base: baseID, Parent: baseID, Depth: 1, Size: 10, Strategy: json.RawMessage(`{}`), Stats: json.RawMessage(`{}`), Machine: json.RawMessage(`{}`)}
}

func anInstance() api.Instance {
	return api.Instance{
		ID: instanceID, State: api.Running, Image: overlayID, Base: baseID, Overlays: []string{overlayID}, Created: epoch, PID: 7,
		Endpoints: []api.Endpoint{{Guest: 80, Address: "127.0.0.1:8080"}}, Timeline: []api.Event{{Name: "accepted"}, {Name: "running", Seconds: 0.1}},
		Mount:   &api.Mount{Dir: "d", PID: 8, Held: []api.Held{{Image: "memory", Since: epoch}}},
		Lineage: instanceID, Epoch: 3, Handoff: handoffID,
	}
}

func aHandoff() api.Handoff {
	return api.Handoff{
		ID: handoffID, Side: api.HandoffSource, Instance: instanceID, Operation: "000000000001", Peer: "http://10.0.0.2:7300", Lineage: instanceID, Epoch: 4,
		State: "going", Theirs: "prepared", Rounds: []api.HandoffRound{{Dirty: 5000, Bytes: 900, Made: 0.1, Sent: 0.2, Pause: 0.01}}, Bytes: 900, Missing: 10,
		Pause: 0.03, Why: "enough", Endpoints: []api.Endpoint{{Guest: 80, Address: "10.0.0.2:8080"}}, InDoubt: true, Loss: "all since then", Stuck: "no route",
		Reasons: []api.HandoffReason{{Field: "port", Text: "8080 is taken", Remedy: "free it"}}, Created: epoch,
	}
}

func (f *fake) Bases(ctx context.Context) ([]api.Base, error) {
	return []api.Base{aBase(), {ID: baseID, Problem: "unreadable"}}, f.enter(ctx, "Bases")
}

func (f *fake) Base(ctx context.Context, ref string) (api.Base, error) {
	if ref != "debian" && !strings.HasPrefix(baseID, ref) {
		return api.Base{}, missing("base", ref)
	}
	return aBase(), f.enter(ctx, "Base")
}

func (f *fake) ReceiveBase(ctx context.Context, caller service.Caller, name string, r io.Reader, size int64) (api.Base, error) {
	if err := f.enter(ctx, "ReceiveBase"); err != nil {
		return api.Base{}, err
	}
	data, err := io.ReadAll(r)
	if err != nil {
		return api.Base{}, fmt.Errorf("read package: %v", err) // loses the cause
	}
	if int64(len(data)) != size {
		return api.Base{}, api.Errorf(api.Invalid, "%d bytes, not %d", len(data), size)
	}
	b := aBase()
	b.Name = name
	return b, nil
}

func (f *fake) BasePackage(ctx context.Context, ref string) (func(context.Context, io.Writer) error, int64, error) {
	if _, err := f.Base(ctx, ref); err != nil {
		return nil, 0, err
	}
	return func(ctx context.Context, w io.Writer) error {
		if err := f.enter(ctx, "BasePackage"); err != nil {
			return err
		}
		if f.breakAt > 0 {
			_, _ = w.Write(f.pack[:f.breakAt])
			return api.Errorf(api.Damaged, "page 3 of the base is damaged")
		}
		_, err := w.Write(f.pack)
		return err
	}, int64(len(f.pack)), nil
}

func (f *fake) DeleteBase(ctx context.Context, ref string) error {
	if _, err := f.Base(ctx, ref); err != nil {
		return err
	}
	return f.enter(ctx, "DeleteBase")
}

func (f *fake) Overlays(ctx context.Context) ([]api.Overlay, error) {
	return nil, f.enter(ctx, "Overlays")
}

func (f *fake) OverlayFor(ctx context.Context, caller service.Caller, ref string) (api.Overlay, error) {
	if strings.HasPrefix(ref, "/") && !caller.Local {
		return api.Overlay{}, &api.Error{Code: api.Invalid, Detail: "a path", Field: "ref"}
	}
	if ref != "app" && !strings.HasPrefix(overlayID, ref) && !strings.HasPrefix(ref, "/") {
		return api.Overlay{}, missing("overlay", ref)
	}
	return anOverlay(), f.enter(ctx, "OverlayFor")
}

type closer struct{ *bytes.Reader }

func (closer) Close() error { return nil }

func (f *fake) OverlayContent(ctx context.Context, ref string) (io.ReadSeekCloser, api.Overlay, error) {
	o, err := f.OverlayFor(ctx, service.Caller{}, ref)
	return closer{bytes.NewReader(f.content)}, o, err
}

func (f *fake) DeleteOverlay(ctx context.Context, ref string) error {
	if _, err := f.OverlayFor(ctx, service.Caller{}, ref); err != nil {
		return err
	}
	return f.enter(ctx, "DeleteOverlay")
}

func (f *fake) CreateUpload(ctx context.Context, caller service.Caller, req api.CreateUpload) (api.Upload, error) {
	if req.Size <= 0 {
		return api.Upload{}, &api.Error{Code: api.Invalid, Detail: "size must be above 0", Field: "size"}
	}
	if err := f.enter(ctx, "CreateUpload"); err != nil {
		return api.Upload{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	u := &upload{Upload: api.Upload{ID: fmt.Sprintf("upload-%04d", len(f.uploads)), Name: req.Name, Size: req.Size, Created: epoch}}
	f.uploads[u.ID] = u
	return u.Upload, nil
}

func (f *fake) Upload(ctx context.Context, id string) (api.Upload, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if u, ok := f.uploads[id]; ok {
		return u.Upload, nil
	}
	return api.Upload{}, missing("upload", id)
}

func (f *fake) DeleteUpload(ctx context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.uploads[id]; !ok {
		return missing("upload", id)
	}
	delete(f.uploads, id)
	return nil
}

func (f *fake) Append(ctx context.Context, id string, off int64, r io.Reader) (api.Upload, error) {
	if err := f.enter(ctx, "Append"); err != nil {
		return api.Upload{}, err
	}
	data, err := io.ReadAll(r)
	f.mu.Lock()
	defer f.mu.Unlock()
	u := f.uploads[id]
	if u.Offset != off {
		return u.Upload, api.Errorf(api.Conflict, "%s goes on at %d", id, u.Offset)
	}
	u.data = append(u.data, data...)
	u.Offset = int64(len(u.data))
	return u.Upload, err
}

func (f *fake) FinishUpload(ctx context.Context, caller service.Caller, id string) (api.Operation, error) {
	return f.Submit(ctx, caller, api.ImportOverlay{Source: id})
}

func (f *fake) Instances(ctx context.Context, all bool) ([]api.Instance, error) {
	list := []api.Instance{anInstance()}
	if all {
		ended := anInstance()
		ended.State, ended.Ended, ended.Mount, ended.Handoff = api.Stopped, epoch, nil, ""
		ended.Moved = &api.Moved{To: "http://10.0.0.2:7300", Instance: handoffID[:12], Endpoints: []api.Endpoint{{Guest: 80, Address: "10.0.0.2:8080"}}}
		list = append(list, ended)
	}
	return list, f.enter(ctx, "Instances")
}

func (f *fake) Instance(ctx context.Context, ref string) (api.Instance, error) {
	if !strings.HasPrefix(instanceID, ref) {
		return api.Instance{}, missing("instance", ref)
	}
	return anInstance(), f.enter(ctx, "Instance")
}

func (f *fake) Act(ctx context.Context, ref string, a api.Action) (api.Instance, error) {
	f.mu.Lock()
	f.acts = append(f.acts, a)
	f.mu.Unlock()
	if err := f.enter(ctx, "Act"); err != nil {
		return api.Instance{}, err
	}
	return f.Instance(ctx, ref)
}

func (f *fake) Delete(ctx context.Context, ref string, force bool) error {
	if _, err := f.Instance(ctx, ref); err != nil {
		return err
	}
	if !force {
		return api.Errorf(api.Conflict, "instance %s is running", ref).Fix("stop it first")
	}
	return f.enter(ctx, "Delete")
}

func (f *fake) Log(ctx context.Context, ref string, w io.Writer) error {
	if _, err := f.Instance(ctx, ref); err != nil {
		return err
	}
	if err := f.enter(ctx, "Log"); err != nil {
		return err
	}
	_, err := io.WriteString(w, "login: ")
	return err
}

func (f *fake) Submit(ctx context.Context, caller service.Caller, req any) (api.Operation, error) {
	if err := f.enter(ctx, "Submit"); err != nil {
		return api.Operation{}, err
	}
	text, err := json.Marshal(req)
	if err != nil {
		return api.Operation{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	key := caller.Name + " " + caller.Key
	if op, ok := f.keys[key]; ok && caller.Key != "" {
		if string(op.Request) != string(text) {
			return api.Operation{}, &api.Error{Code: api.Conflict, Detail: "the key was used for another request", Field: "Idempotency-Key"}
		}
		return op, nil
	}
	op := api.Operation{ID: fmt.Sprintf("%012x", len(f.ops)+1), Kind: api.KindRun, State: api.OperationRunning, Version: 1, Created: epoch, Request: text}
	f.ops = append(f.ops, op)
	f.keys[key] = op
	f.calls = append(f.calls, req)
	f.callers = append(f.callers, caller)
	return op, nil
}

// update changes an operation and wakes who waits.
func (f *fake) update(id string, change func(*api.Operation)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.IndexFunc(f.ops, func(op api.Operation) bool { return op.ID == id })
	change(&f.ops[i])
	f.ops[i].Version++
	close(f.changed)
	f.changed = make(chan struct{})
}

func (f *fake) finish(id string) {
	f.update(id, func(op *api.Operation) {
		op.State, op.Ended, op.Result = api.OperationDone, epoch, json.RawMessage(`{"id":"x"}`)
		op.Target = &api.Target{Type: "instance", ID: instanceID}
	})
}

func (f *fake) find(id string) (api.Operation, <-chan struct{}, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, op := range f.ops {
		if strings.HasPrefix(op.ID, id) && len(id) >= 4 {
			return op, f.changed, nil
		}
	}
	return api.Operation{}, nil, missing("operation", id)
}

func (f *fake) Operations(ctx context.Context) ([]api.Operation, error) {
	f.mu.Lock()
	list := slices.Clone(f.ops)
	f.mu.Unlock()
	return list, f.enter(ctx, "Operations")
}

func (f *fake) Operation(ctx context.Context, id string) (api.Operation, error) {
	op, _, err := f.find(id)
	return op, err
}

func (f *fake) WaitOperation(ctx context.Context, id string, after int64) (api.Operation, error) {
	for {
		op, changed, err := f.find(id)
		if err != nil || op.Version > after || op.State.Ended() {
			return op, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return op, nil
		}
	}
}

func (f *fake) OperationEvents(ctx context.Context, id string, after int64) iter.Seq2[api.Operation, error] {
	return func(yield func(api.Operation, error) bool) {
		f.mu.Lock()
		f.watch++
		f.mu.Unlock()
		defer func() {
			f.mu.Lock()
			f.watch--
			f.mu.Unlock()
		}()
		if err := f.enter(ctx, "OperationEvents"); err != nil {
			yield(api.Operation{}, err)
			return
		}
		for {
			op, err := f.WaitOperation(ctx, id, after)
			if err != nil || ctx.Err() != nil || op.Version <= after || !yield(op, nil) || op.State.Ended() {
				return
			}
			after = op.Version
		}
	}
}

func (f *fake) CancelOperation(ctx context.Context, id string) (api.Operation, error) {
	op, _, err := f.find(id)
	if err != nil {
		return op, err
	}
	if op.State.Ended() {
		return op, api.Errorf(api.Conflict, "operation %s has ended", id)
	}
	if err := f.enter(ctx, "CancelOperation"); err != nil {
		return op, err
	}
	f.update(op.ID, func(op *api.Operation) {
		op.State, op.Ended, op.Error = api.OperationCancelled, epoch, &api.Error{Code: api.Cancelled, Detail: "cancelled"}
	})
	return f.Operation(ctx, id)
}

func (f *fake) Handoff(ctx context.Context, id string) (api.Handoff, error) {
	if id != handoffID && !strings.HasPrefix(instanceID, id) {
		return api.Handoff{}, missing("handoff", id)
	}
	return aHandoff(), f.enter(ctx, "Handoff")
}

func (f *fake) HandoffMessage(ctx context.Context, caller service.Caller, from netip.Addr, message []byte) ([]byte, error) {
	if f.delivered != nil {
		f.delivered(ctx)
	}
	if err := f.enter(ctx, "HandoffMessage"); err != nil {
		return nil, err
	}
	if !json.Valid(message) {
		return nil, api.Errorf(api.Invalid, "not a message of the handoff protocol")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.messages = append(f.messages, handoffMessage{caller, from, string(message)})
	return []byte(`{"version":1,"state":"accepted"}`), nil
}

func (f *fake) HandoffContent(ctx context.Context, id, overlay, key string) (io.ReadSeekCloser, string, error) {
	switch {
	case id != handoffID || overlay != overlayID:
		return nil, "", missing("overlay of handoff "+id, overlay)
	case key != handoffKey:
		return nil, "", api.Errorf(api.NotFound, "the key %q is wrong", key)
	}
	return closer{bytes.NewReader(f.content)}, digest, f.enter(ctx, "HandoffContent")
}

func (f *fake) Collect(ctx context.Context) (service.Metrics, error) {
	return service.Metrics{
		Since: epoch, Instances: map[api.State]int{api.Running: 2, api.Lost: 1},
		Operations: []service.OperationCount{{Kind: api.KindRun, State: api.OperationDone, Count: 3}},
		Bases:      1, Overlays: 4, StoreBytes: 5000, Mounts: 1,
		Mount:         service.MountCount{Fetched: 100, Saved: 900, FramesDecoded: 7, FramesVerified: 8, FramesRefused: 1, CacheHits: 11, MemoryReads: 5, Held: 1},
		FirstResponse: service.Histogram{Buckets: []service.Bucket{{Upper: 0.1, Count: 1}, {Upper: 1, Count: 3}}, Count: 4, Sum: 12.5},
		DemandWait:    service.Histogram{Buckets: []service.Bucket{{Upper: 0.01, Count: 9}}, Count: 9, Sum: 0.05},
	}, f.enter(ctx, "Collect")
}
