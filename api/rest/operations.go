package rest

import (
	"context"
	"math"
	"net/http"
	"reflect"
	"time"

	"cloudlet/api"
	"cloudlet/api/service"
)

func (s *server) operations(w *response, r *http.Request) error {
	list, err := s.service.Operations(r.Context())
	return writeList(w, list, err)
}

// newOperation is the body of a request for an operation that makes no resource: Ref alone
// for the verifying ones.
type newOperation struct {
	Kind     api.Kind      `json:"kind"`
	Ref      string        `json:"ref"`
	Probes   []api.Probe   `json:"probes,omitempty"`
	Timeout  time.Duration `json:"timeout,omitempty"`
	Fresh    bool          `json:"fresh,omitempty"`
	Repack   bool          `json:"repack,omitempty"`
	Strategy string        `json:"strategy,omitempty"`
}

func (s *server) addOperation(w *response, r *http.Request) error {
	var req newOperation
	if err := s.decode(w, r, &req); err != nil {
		return err
	}
	verify := api.Verify{Ref: req.Ref}
	profile := api.Profile{Ref: req.Ref, Probes: req.Probes, Timeout: req.Timeout, Fresh: req.Fresh, Repack: req.Repack, Strategy: req.Strategy}
	if req.Kind == api.KindProfile {
		return s.submit(w, r, profile)
	}
	if !reflect.DeepEqual(profile, api.Profile{Ref: req.Ref}) {
		return bad("kind", "an operation of kind %q has no fields beside ref", req.Kind)
	}
	switch req.Kind {
	case api.KindVerifyBase:
		return s.submit(w, r, service.VerifyBase{Verify: verify})
	case api.KindVerifyOverlay:
		return s.submit(w, r, service.VerifyOverlay{Verify: verify})
	}
	return bad("kind", "an operation of kind %q cannot be asked for here", req.Kind).fix("use %s, %s or %s", api.KindVerifyBase, api.KindVerifyOverlay, api.KindProfile)
}

// operation shows an operation: as it is, once it has changed or ended, or as it goes on.
func (s *server) operation(w *response, r *http.Request) error {
	query := r.URL.Query()
	after, err := int64(0), error(nil)
	if query.Has("after") {
		if after, err = number("after", query.Get("after"), math.MaxInt64); err != nil {
			return err
		}
	}
	if wantsEvents(r) {
		return s.events(w, r, after)
	}
	if !query.Has("wait") {
		if query.Has("after") {
			return bad("after", "after goes with wait, or with an event stream")
		}
		op, err := s.service.Operation(r.Context(), r.PathValue("id"))
		return writeOne(w, op, err)
	}
	seconds, err := number("wait", query.Get("wait"), int64(s.limits.Wait/time.Second))
	if err != nil {
		return err
	}
	if !query.Has("after") {
		after = math.MaxInt64 // only its end is waited for
	}
	ctx, cancel := context.WithTimeout(r.Context(), time.Duration(seconds)*time.Second)
	defer cancel()
	defer onStop(r.Context(), cancel)()
	op, err := s.service.WaitOperation(ctx, r.PathValue("id"), after)
	return writeOne(w, op, err)
}

// onStop calls cancel when the server begins to stop, until the function that it returns is
// called.
func onStop(ctx context.Context, cancel context.CancelFunc) (release func()) {
	stop := stopping(ctx)
	if stop == nil {
		return func() {}
	}
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-stop:
			cancel()
		case <-quit:
		}
	}()
	return func() {
		close(quit)
		<-done
	}
}

// cancel ends an operation. That goes on when the client has left.
func (s *server) cancel(w *response, r *http.Request) error {
	op, err := s.service.CancelOperation(context.WithoutCancel(r.Context()), r.PathValue("id"))
	return writeOne(w, op, err)
}
