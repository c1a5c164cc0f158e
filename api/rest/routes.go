package rest

import (
	"net/http"
	"net/url"
	"runtime/debug"
	"slices"
	"strings"

	"cloudlet/api"
)

// route is a method and a path, who may use it and what it does.
type route struct {
	method, path string
	public       bool     // without a token
	keyed        bool     // public and yet bounded: a key in the query is the right to it
	operates     bool     // not for the role read
	peer         bool     // also for the role peer
	body         bool     // takes one
	query        []string // the parameters that it knows
	do           func(*server, *response, *http.Request) error
}

// routes are all routes; the OpenAPI document lists the same ones. Beside the document itself
// /v1 has 25, which is all that it may have.
func routes() []*route {
	return []*route{
		{method: "GET", path: "/v1/bases", do: (*server).bases},
		{method: "POST", path: "/v1/bases", operates: true, body: true, query: []string{"name"}, do: (*server).addBase},
		{method: "GET", path: "/v1/bases/{id}", do: (*server).base},
		{method: "DELETE", path: "/v1/bases/{id}", operates: true, do: (*server).deleteBase},
		{method: "GET", path: "/v1/bases/{id}/package", do: (*server).basePackage},

		{method: "GET", path: "/v1/overlays", do: (*server).overlays},
		{method: "POST", path: "/v1/overlays", operates: true, body: true, do: (*server).addOverlay},
		{method: "GET", path: "/v1/overlays/{id}", do: (*server).overlay},
		{method: "DELETE", path: "/v1/overlays/{id}", operates: true, do: (*server).deleteOverlay},
		{method: "GET", path: "/v1/overlays/{id}/content", peer: true, do: (*server).content},
		{method: "PUT", path: "/v1/overlays/{id}/content", operates: true, body: true, do: (*server).putContent},

		{method: "GET", path: "/v1/instances", query: []string{"all"}, do: (*server).instances},
		{method: "POST", path: "/v1/instances", operates: true, body: true, do: (*server).addInstance},
		{method: "GET", path: "/v1/instances/{id}", do: (*server).instance},
		{method: "DELETE", path: "/v1/instances/{id}", operates: true, query: []string{"force"}, do: (*server).deleteInstance},
		{method: "POST", path: "/v1/instances/{id}/actions", operates: true, body: true, do: (*server).act},
		{method: "POST", path: "/v1/instances/{id}/handoff", operates: true, body: true, do: (*server).handOff},
		{method: "GET", path: "/v1/instances/{id}/log", do: (*server).instanceLog},

		{method: "GET", path: "/v1/operations", do: (*server).operations},
		{method: "POST", path: "/v1/operations", operates: true, body: true, do: (*server).addOperation},
		{method: "GET", path: "/v1/operations/{id}", query: []string{"wait", "after"}, do: (*server).operation},
		{method: "DELETE", path: "/v1/operations/{id}", operates: true, do: (*server).cancel},

		{method: "POST", path: "/v1/handoffs", operates: true, peer: true, body: true, do: (*server).handoffMessage},
		{method: "GET", path: "/v1/handoffs/{id}", do: (*server).handoff},
		{method: "GET", path: "/v1/handoffs/{id}/overlays/{overlay}", public: true, keyed: true, query: []string{"key"}, do: (*server).handoffContent},

		{method: "GET", path: "/v1/openapi.json", public: true, do: (*server).openAPI},
		{method: "GET", path: "/healthz", public: true, do: (*server).healthy},
		{method: "GET", path: "/readyz", public: true, do: (*server).ready},
		{method: "GET", path: "/metrics", query: anyQuery, do: (*server).exposeMetrics},
	}
}

// anyQuery is for a route whose parameters are not ours.
var anyQuery = []string{"*"}

// checkQuery refuses parameters that the route does not know, and any given twice.
func (rt *route) checkQuery(r *http.Request) error {
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return bad("", "the query of the URL cannot be read: %w", err)
	}
	if slices.Equal(rt.query, anyQuery) {
		return nil
	}
	for name, v := range values {
		if !slices.Contains(rt.query, name) {
			e := bad(name, "%s %s has no parameter %q", rt.method, rt.path, name)
			if len(rt.query) > 0 {
				return e.fix("it knows %s", strings.Join(rt.query, ", "))
			}
			return e
		}
		if len(v) > 1 {
			return bad(name, "the parameter %s is given %d times", name, len(v))
		}
	}
	return nil
}

// label names the route in metrics. Requests that wait on purpose have their own.
func (rt *route) label(r *http.Request) string {
	if slices.Contains(rt.query, "wait") {
		switch {
		case wantsEvents(r):
			return rt.path + " events"
		case r.URL.Query().Has("wait"):
			return rt.path + " wait"
		}
	}
	return rt.path
}

// noRoute says why ServeMux found no route of ours: h is its own handler for that.
func noRoute(h http.Handler, r *http.Request, pattern string) error {
	answer := &silent{header: http.Header{}}
	if pattern == "" {
		h.ServeHTTP(answer, r)
	}
	if answer.status == http.StatusMethodNotAllowed {
		allow := answer.header.Get("Allow")
		return refuse(http.StatusMethodNotAllowed, "%s is not possible on %s", r.Method, r.URL.Path).fix("use one of %s", allow).with("Allow", allow)
	}
	return refuse(http.StatusNotFound, "there is no %s", r.URL.Path).fix("see /v1/openapi.json for what there is")
}

// silent takes an answer of ServeMux to be read, not sent.
type silent struct {
	header http.Header
	status int
}

func (w *silent) Header() http.Header         { return w.header }
func (w *silent) Write(p []byte) (int, error) { return len(p), nil }
func (w *silent) WriteHeader(status int)      { w.status = status }

func stack() string { return string(debug.Stack()) }

// known says whether a string is one of the actions.
func known(a api.Action) bool {
	switch a {
	case api.ActionPause, api.ActionContinue, api.ActionReset, api.ActionStop, api.ActionAbort, api.ActionReady,
		api.ActionResumeHere, api.ActionDiscardHere:
		return true
	}
	return false
}
