package rest

import (
	"context"
	"errors"
	"io"
	"iter"
	"log/slog"
	"net/http"
	"net/netip"
	"time"

	"cloudlet/api"
	"cloudlet/api/service"

	"github.com/prometheus/client_golang/prometheus"
)

// Service is the verbs behind the routes, as *service.Service has them.
type Service interface {
	Bases(ctx context.Context) ([]api.Base, error)
	Base(ctx context.Context, ref string) (api.Base, error)
	ReceiveBase(ctx context.Context, caller service.Caller, name string, r io.Reader, size int64) (api.Base, error)
	BasePackage(ctx context.Context, ref string) (write func(context.Context, io.Writer) error, size int64, err error)
	DeleteBase(ctx context.Context, ref string) error

	Overlays(ctx context.Context) ([]api.Overlay, error)
	OverlayFor(ctx context.Context, caller service.Caller, ref string) (api.Overlay, error)
	OverlayContent(ctx context.Context, ref string) (io.ReadSeekCloser, api.Overlay, error)
	DeleteOverlay(ctx context.Context, ref string) error
	CreateUpload(ctx context.Context, caller service.Caller, req api.CreateUpload) (api.Upload, error)
	Upload(ctx context.Context, id string) (api.Upload, error)
	DeleteUpload(ctx context.Context, id string) error
	Append(ctx context.Context, id string, off int64, r io.Reader) (api.Upload, error)
	FinishUpload(ctx context.Context, caller service.Caller, id string) (api.Operation, error)

	Instances(ctx context.Context, all bool) ([]api.Instance, error)
	Instance(ctx context.Context, ref string) (api.Instance, error)
	Act(ctx context.Context, ref string, a api.Action) (api.Instance, error)
	Delete(ctx context.Context, ref string, force bool) error
	Log(ctx context.Context, ref string, w io.Writer) error

	Submit(ctx context.Context, caller service.Caller, req any) (api.Operation, error)
	Operations(ctx context.Context) ([]api.Operation, error)
	Operation(ctx context.Context, id string) (api.Operation, error)
	WaitOperation(ctx context.Context, id string, after int64) (api.Operation, error)
	OperationEvents(ctx context.Context, id string, after int64) iter.Seq2[api.Operation, error]
	CancelOperation(ctx context.Context, id string) (api.Operation, error)

	Handoff(ctx context.Context, id string) (api.Handoff, error)
	HandoffMessage(ctx context.Context, caller service.Caller, from netip.Addr, message []byte) (answer []byte, err error)
	HandoffContent(ctx context.Context, id, overlay, key string) (f io.ReadSeekCloser, digest string, err error)

	Collect(ctx context.Context) (service.Metrics, error)
}

var _ Service = (*service.Service)(nil)

// Config is what a handler needs.
type Config struct {
	Service Service
	// Log takes requests and failures; nil: nothing.
	Log *slog.Logger
	// Tokens are those of callers over TCP; nil: nobody has one.
	Tokens *Tokens
	// Others are answered beside /v1.
	Others []Other
	Limits Limits
}

// Limits bound what requests may take. A zero field means its default.
type Limits struct {
	Body     int64         // bytes of a JSON body; 1 MiB
	BodyTime time.Duration // in which a JSON body must arrive; 30 s
	Stall    time.Duration // without a byte of an upload coming in or of an answer going out; 60 s
	Requests int           // of callers with a token at once, event streams and long polls included; 512. As many again of callers with a key
	Wait     time.Duration // longest long poll; 5 minutes
	Keep     time.Duration // between two comments that keep an event stream alive; 15 s
}

func (l Limits) withDefaults() Limits {
	or := func(d *time.Duration, def time.Duration) {
		if *d == 0 {
			*d = def
		}
	}
	if l.Body == 0 {
		l.Body = 1 << 20
	}
	if l.Requests == 0 {
		l.Requests = 512
	}
	or(&l.BodyTime, 30*time.Second)
	or(&l.Stall, time.Minute)
	or(&l.Wait, 5*time.Minute)
	or(&l.Keep, 15*time.Second)
	return l
}

// server is the handler.
type server struct {
	service  Service
	log      *slog.Logger
	tokens   *Tokens
	limits   Limits
	mux      *http.ServeMux
	slots    chan struct{} // holds one element for each request under way
	fetches  chan struct{} // the same for requests that a key admits: they cannot shut out those with a token
	registry *prometheus.Registry
	duration *prometheus.HistogramVec
}

// New returns the handler of the service.
func New(c Config) http.Handler {
	s := &server{service: c.Service, log: c.Log, limits: c.Limits.withDefaults(), mux: http.NewServeMux()}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.tokens = c.Tokens; s.tokens == nil {
		s.tokens = OpenTokens("", s.log)
	}
	s.slots, s.fetches = make(chan struct{}, s.limits.Requests), make(chan struct{}, s.limits.Requests)
	s.measure()
	for _, rt := range routes() {
		s.mux.Handle(rt.method+" "+rt.path, &bound{s, rt})
	}
	for _, o := range c.Others {
		for _, pattern := range o.Patterns() {
			s.mux.Handle(pattern, other{o})
		}
	}
	return s
}

// ServeHTTP answers one request.
func (s *server) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	began := time.Now()
	w := newResponse(rw, r, s.limits)
	label := "none"
	var who identity
	refusal := writeProblem
	defer func() {
		v := recover()
		if v != nil && v != http.ErrAbortHandler { //nolint:errorlint // net/http compares it so
			s.log.Error("panic", "method", r.Method, "route", label, "panic", v, "stack", stack())
			if w.status == 0 {
				refusal(w, api.Errorf(api.Internal, "the request met a defect").Fix("see the daemon's log, and report it"))
				v = nil
			} else {
				v = http.ErrAbortHandler
			}
		}
		w.last()
		s.observe(r, w, who, label, time.Since(began), v != nil)
		if v != nil {
			panic(v)
		}
	}()
	h, pattern := s.mux.Handler(r)
	b, ok := h.(*bound)
	if ok {
		label = b.route.label(r)
	}
	if o, beside := h.(other); beside {
		label = o.Label(r)
		refusal = func(w http.ResponseWriter, err error) { o.Refuse(w, r, err) }
		s.serveOther(o, w, r, &who)
		return
	}
	if err := s.admit(r, b, &who); err != nil {
		writeProblem(w, err)
		return
	}
	if !ok {
		writeProblem(w, noRoute(h, r, pattern))
		return
	}
	if slots := s.slotsOf(b.route); slots != nil {
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
		default:
			if who.local {
				break // the operator on this host can always look, and cancel
			}
			writeProblem(w, s.crowded())
			return
		}
	}
	r = r.WithContext(context.WithValue(r.Context(), whoKey, who))
	if w.body != nil {
		r.Body = w.body
	}
	s.mux.ServeHTTP(w, r) // it sets the path's values
}

// crowded refuses a request for which there is no room.
func (s *server) crowded() error {
	return refuse(http.StatusServiceUnavailable, "%d requests are under way, and no more are taken", s.limits.Requests).fix("ask again")
}

// slotsOf are what a route's requests share; nil: they are not bounded.
func (s *server) slotsOf(rt *route) chan struct{} {
	switch {
	case rt.keyed:
		return s.fetches
	case rt.public:
		return nil
	}
	return s.slots
}

// admit refuses what need not be looked at any further.
func (s *server) admit(r *http.Request, b *bound, who *identity) (err error) {
	if b == nil || !b.route.public {
		if *who, err = s.identify(r); err != nil {
			return err
		}
	}
	if b == nil {
		return nil
	}
	if !b.route.public {
		if err := who.permit(b.route); err != nil {
			return err
		}
	}
	if r.ContentLength != 0 && !b.route.body {
		return bad("", "%s %s takes no body", r.Method, b.route.path)
	}
	return b.route.checkQuery(r)
}

// bound is a route of a server.
type bound struct {
	server *server
	route  *route
}

// ServeHTTP runs the route's verb; ServeMux has set the path's values.
func (b *bound) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	w := rw.(*response)
	err := b.route.do(b.server, w, r)
	if err == nil {
		return
	}
	var known *api.Error
	if !errors.As(err, &known) || known.Code == api.Internal {
		b.server.log.Error("request failed", "method", r.Method, "path", r.URL.Path, "problem", err)
	}
	if w.status != 0 {
		b.server.log.Warn("answer broken off", "method", r.Method, "path", r.URL.Path, "problem", err)
		panic(http.ErrAbortHandler)
	}
	writeProblem(w, err)
}
