package nova

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"

	"cloudlet/api"
	"cloudlet/api/service"
	"cloudlet/api/strict"
)

// Service is the verbs behind the shapes, as *service.Service has them.
type Service interface {
	Bases(ctx context.Context) ([]api.Base, error)
	Overlays(ctx context.Context) ([]api.Overlay, error)
	DeleteOverlay(ctx context.Context, ref string) error

	Instances(ctx context.Context, all bool) ([]api.Instance, error)
	Instance(ctx context.Context, ref string) (api.Instance, error)
	Act(ctx context.Context, ref string, a api.Action) (api.Instance, error)
	Delete(ctx context.Context, ref string, force bool) error
	Log(ctx context.Context, ref string, w io.Writer) error

	Submit(ctx context.Context, caller service.Caller, req any) (api.Operation, error)
	Operations(ctx context.Context) ([]api.Operation, error)
	Operation(ctx context.Context, id string) (api.Operation, error)
	CancelOperation(ctx context.Context, id string) (api.Operation, error)
	ForgetOperation(ctx context.Context, id string) error

	Handoff(ctx context.Context, id string) (api.Handoff, error)
}

var _ Service = (*service.Service)(nil)

// Identity is who a token belongs to.
type Identity struct {
	Name  string // who asks, for idempotency and logs
	Write bool   // may change something, not only look
}

// Authenticator finds out who a token, the value of X-Auth-Token, belongs to. Its errors are
// ErrUnknownToken, ErrForbidden, or of the code api.Unavailable where it could not find out.
// Today it is the daemon's tokens file; a Keystone can stand in its place.
type Authenticator interface {
	Authenticate(ctx context.Context, token string) (Identity, error)
}

// ErrUnknownToken is the error of an Authenticator for a token that is nobody's.
var ErrUnknownToken = errors.New("the token is not known")

// ErrForbidden is the error of an Authenticator for a token whose owner may not use this API.
var ErrForbidden = errors.New("the token is not for this API")

// Config is what a handler needs.
type Config struct {
	Service Service
	Auth    Authenticator
	// Log takes failures; nil: nothing.
	Log *slog.Logger
}

// Handler answers in Nova's shapes. It is safe for concurrent use, and keeps no state.
type Handler struct {
	service Service
	auth    Authenticator
	log     *slog.Logger
	mux     *http.ServeMux
}

// New returns the handler of a service.
func New(c Config) *Handler {
	h := &Handler{service: c.Service, auth: c.Auth, log: c.Log, mux: http.NewServeMux()}
	if h.log == nil {
		h.log = slog.New(slog.DiscardHandler)
	}
	for _, rt := range routes() {
		h.mux.Handle(rt.method+" "+rt.path, &bound{rt, h})
	}
	return h
}

// route is a method and a path, and what is done there.
type route struct {
	method, path string
	public       bool // without a token
	writes       bool // not for those who may only look
	body         bool // takes one
	image        bool // of Glance's API: it has no microversions
	since        microversion
	query        []string // the parameters that it knows
	do           func(*Handler, *call) error
}

var (
	serverQuery = []string{"name", "status", "image", "flavor", "limit", "marker", "deleted", "all_tenants", "all_projects", "project_id", "user_id"}
	imageQuery  = []string{"name", "status", "limit", "marker", "visibility", "owner", "sort", "sort_key", "sort_dir", "os_hidden", "cloudlet_type", "is_cloudlet", "base_sha256_uuid"}
	flavorQuery = []string{"is_public", "limit", "marker", "minDisk", "minRam", "sort_key", "sort_dir"}
	movesQuery  = []string{"instance_uuid", "status", "migration_type", "host", "source_compute", "hidden", "limit", "marker"}
)

// routes are all shapes.
func routes() []*route {
	list := []*route{
		{method: "GET", path: "/{$}", public: true, do: (*Handler).versions},
		{method: "GET", path: "/v2.1", public: true, do: (*Handler).thisVersion},
		{method: "GET", path: "/v2.1/{$}", public: true, do: (*Handler).thisVersion},

		{method: "GET", path: "/v2.1/flavors", query: flavorQuery, do: (*Handler).flavors},
		{method: "GET", path: "/v2.1/flavors/detail", query: flavorQuery, do: (*Handler).flavors},
		{method: "GET", path: "/v2.1/flavors/{id}", do: (*Handler).flavor},
		{method: "GET", path: "/v2.1/flavors/{id}/os-extra_specs", do: (*Handler).extraSpecs},

		{method: "GET", path: "/v2.1/servers", query: serverQuery, do: (*Handler).servers},
		{method: "GET", path: "/v2.1/servers/detail", query: serverQuery, do: (*Handler).servers},
		{method: "POST", path: "/v2.1/servers", writes: true, body: true, do: (*Handler).createServer},
		{method: "GET", path: "/v2.1/servers/{id}", do: (*Handler).server},
		{method: "DELETE", path: "/v2.1/servers/{id}", writes: true, do: (*Handler).deleteServer},
		{method: "POST", path: "/v2.1/servers/{id}/action", body: true, do: (*Handler).action},
		{method: "GET", path: "/v2.1/servers/{id}/metadata", do: (*Handler).metadata},
		{method: "GET", path: "/v2.1/servers/{id}/metadata/{key}", do: (*Handler).metadatum},
		{method: "POST", path: "/v2.1/servers/{id}/metadata", writes: true, body: true, do: (*Handler).fixedMetadata},
		{method: "PUT", path: "/v2.1/servers/{id}/metadata", writes: true, body: true, do: (*Handler).fixedMetadata},
		{method: "PUT", path: "/v2.1/servers/{id}/metadata/{key}", writes: true, body: true, do: (*Handler).fixedMetadata},
		{method: "DELETE", path: "/v2.1/servers/{id}/metadata/{key}", writes: true, do: (*Handler).fixedMetadata},
		{method: "GET", path: "/v2.1/servers/{id}/ips", do: (*Handler).ips},
		{method: "GET", path: "/v2.1/servers/{id}/ips/{network}", do: (*Handler).ips},
		{method: "GET", path: "/v2.1/servers/{id}/migrations", since: withMigrations, do: (*Handler).migrations},
		{method: "GET", path: "/v2.1/servers/{id}/migrations/{migration}", since: withMigrations, do: (*Handler).migration},
		{method: "DELETE", path: "/v2.1/servers/{id}/migrations/{migration}", since: withAbort, writes: true, do: (*Handler).abortMigration},
		{method: "GET", path: "/v2.1/os-migrations", query: movesQuery, do: (*Handler).allMigrations},

		{method: "GET", path: "/v2", public: true, image: true, do: (*Handler).imageVersions},
		{method: "GET", path: "/v2/{$}", public: true, image: true, do: (*Handler).imageVersions},
	}
	for _, root := range []string{"/v2.1", "/v2"} {
		image := root == "/v2"
		list = append(list,
			&route{method: "GET", path: root + "/images", image: image, query: imageQuery, do: (*Handler).images},
			&route{method: "GET", path: root + "/images/{id}", image: image, do: (*Handler).image},
			&route{method: "DELETE", path: root + "/images/{id}", image: image, writes: true, do: (*Handler).deleteImage},
		)
	}
	return append(list, &route{method: "GET", path: "/v2.1/images/detail", query: imageQuery, do: (*Handler).images})
}

// Patterns are the paths that the handler answers, in the form of http.ServeMux.
func (h *Handler) Patterns() []string { return []string{"/{$}", "/v2.1", "/v2.1/", "/v2", "/v2/"} }

// Label names the route of a request.
func (h *Handler) Label(r *http.Request) string {
	found, _ := h.mux.Handler(r)
	if b, ok := found.(*bound); ok {
		return b.path
	}
	return "/v2.1"
}

// Refuse says in Nova's form that a request is not answered.
func (h *Handler) Refuse(w http.ResponseWriter, r *http.Request, err error) { writeFault(w, err) }

// call is one request, and where its answer goes.
type call struct {
	http.ResponseWriter
	r     *http.Request
	route *route
	micro microversion
	who   Identity
	err   error
}

// bound is a route of a handler.
type bound struct {
	*route
	h *Handler
}

// ServeHTTP answers a call; ServeMux has set the path's values.
func (b *bound) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c := w.(*call)
	c.r = r
	c.err = b.do(b.h, c)
}

// ServeHTTP answers one request.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	err := h.serve(w, r)
	if err == nil {
		return
	}
	if statusOf(err) == http.StatusInternalServerError {
		h.log.Error("request failed", "method", r.Method, "path", r.URL.Path, "problem", err)
	}
	writeFault(w, err)
}

func (h *Handler) serve(w http.ResponseWriter, r *http.Request) (err error) {
	found, _ := h.mux.Handler(r)
	b, ok := found.(*bound)
	c := &call{ResponseWriter: w, r: r, micro: lowest}
	if !ok || !b.public {
		if c.who, err = h.identify(r); err != nil {
			return err
		}
	}
	if !ok {
		return noRoute(found, r)
	}
	c.route = b.route
	if err := h.admit(c); err != nil {
		return err
	}
	h.mux.ServeHTTP(c, r)
	return c.err
}

// admit refuses what need not be looked at any further.
func (h *Handler) admit(c *call) (err error) {
	rt := c.route
	if !rt.image && !rt.public {
		if c.micro, err = versionOf(c.r); err != nil {
			return err
		}
		c.micro.announce(c)
	}
	if c.micro < rt.since {
		return missing("there is no %s before microversion %s", c.r.URL.Path, rt.since).fix("send the header %s: compute %s", versionHeader, rt.since)
	}
	if rt.writes {
		if err := c.mayWrite(); err != nil {
			return err
		}
	}
	if c.r.ContentLength != 0 && !rt.body {
		return bad("%s %s takes no body", c.r.Method, c.r.URL.Path)
	}
	return rt.checkQuery(c.r)
}

// identify finds out who sends a request.
func (h *Handler) identify(r *http.Request) (Identity, error) {
	values := r.Header.Values("X-Auth-Token")
	if len(values) != 1 || values[0] == "" {
		return Identity{}, refuse(http.StatusUnauthorized, api.Invalid, "the request has not one token").fix("send the header X-Auth-Token with a token of the daemon's tokens file")
	}
	who, err := h.auth.Authenticate(r.Context(), values[0])
	switch {
	case errors.Is(err, ErrUnknownToken):
		return who, refuse(http.StatusUnauthorized, api.Invalid, "the token is not known").fix("use one of the daemon's tokens file")
	case errors.Is(err, ErrForbidden):
		return who, refuse(http.StatusForbidden, api.Invalid, "the token is for other cloudlets only").fix("use one of the role read or operate")
	}
	return who, err
}

// mayWrite refuses those who may only look.
func (c *call) mayWrite() error {
	if c.who.Write {
		return nil
	}
	return refuse(http.StatusForbidden, api.Invalid, "%s may look, but not change anything", c.who.Name).fix("use a token of the role operate")
}

// checkQuery refuses parameters that the route does not know: a filter that is ignored gives a
// list that is wrong. The same goes for any given twice.
func (rt *route) checkQuery(r *http.Request) error {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return bad("the query of the URL cannot be read: %w", err)
	}
	for name, v := range values {
		if !slices.Contains(rt.query, name) {
			e := bad("%s %s has no parameter %.40q", rt.method, rt.path, name)
			if len(rt.query) > 0 {
				return e.fix("it knows %s", strings.Join(rt.query, ", "))
			}
			return e
		}
		if len(v) > 1 {
			return bad("the parameter %s is given %d times", name, len(v))
		}
	}
	return nil
}

// noRoute says why ServeMux found no route of ours: found is its own handler for that.
func noRoute(found http.Handler, r *http.Request) error {
	answer := &silent{header: http.Header{}}
	found.ServeHTTP(answer, r)
	if answer.status == http.StatusMethodNotAllowed {
		return refuse(http.StatusMethodNotAllowed, api.Invalid, "%s is not possible on %s", r.Method, r.URL.Path).fix("use one of %s", answer.header.Get("Allow"))
	}
	return missing("there is no %s", r.URL.Path).fix("what there is, the package api/nova says")
}

// silent takes an answer of ServeMux to be read, not sent.
type silent struct {
	header http.Header
	status int
}

func (w *silent) Header() http.Header         { return w.header }
func (w *silent) Write(p []byte) (int, error) { return len(p), nil }
func (w *silent) WriteHeader(status int)      { w.status = status }

// answer answers with a document.
func (c *call) answer(status int, v any) error {
	write(c, status, v)
	return nil
}

// done answers without one.
func (c *call) done(status int) error {
	c.WriteHeader(status)
	return nil
}

// url is where clients find a path.
func (c *call) url(path string) string {
	scheme := "http"
	if c.r.TLS != nil {
		scheme = "https"
	}
	return scheme + "://" + c.r.Host + path
}

// caller is on whose behalf a verb works.
func (c *call) caller() service.Caller { return service.Caller{Name: c.who.Name} }

// mostBody bounds a body, whoever serves the handler.
const mostBody = 1 << 20

// read reads a body that is one JSON object.
func (c *call) read() ([]byte, error) {
	kind, params, err := mime.ParseMediaType(c.r.Header.Get("Content-Type"))
	if cs, ok := params["charset"]; err != nil || kind != "application/json" || ok && !strings.EqualFold(cs, "utf-8") {
		return nil, refuse(http.StatusUnsupportedMediaType, api.Invalid, "unsupported content type %.60q", c.r.Header.Get("Content-Type")).fix("send application/json")
	}
	data, err := io.ReadAll(http.MaxBytesReader(c.ResponseWriter, c.r.Body, mostBody))
	if err != nil {
		if statusOf(err) == http.StatusInternalServerError {
			return nil, bad("the body broke off: %w", err)
		}
		return nil, &refusal{cause: api.Errorf(api.Invalid, "the body was not taken: %w", err), status: statusOf(err)}
	}
	data = bytes.TrimSpace(data)
	if len(data) == 0 || data[0] != '{' || !utf8.Valid(data) {
		return nil, bad("the body is not a JSON object")
	}
	return data, nil
}

// decode reads a body into v, a pointer to a struct. Nothing may be in it that v lacks.
func (c *call) decode(v any) error {
	data, err := c.read()
	if err != nil {
		return err
	}
	return strict.Decode(data, v)
}
