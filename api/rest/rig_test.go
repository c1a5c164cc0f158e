package rest

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"cloudlet/api"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	operateToken = "operate-0123456789abcdef"
	readToken    = "read-0123456789abcdef"
	peerToken    = "peer-0123456789abcdef"
)

// rig is a handler over a fake, with tokens.
type rig struct {
	t       *testing.T
	fake    *fake
	handler http.Handler
	tokens  string
	log     *logged
}

// logged is a log that tests can read.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func newRig(t *testing.T, limits Limits) *rig {
	r := &rig{t: t, fake: newFake(), tokens: filepath.Join(t.TempDir(), "tokens"), log: &logged{}}
	text := "# test\nread reader " + readToken + "\noperate operator " + operateToken + "\npeer edge " + peerToken + "\n"
	require.NoError(t, os.WriteFile(r.tokens, []byte(text), 0o600))
	log := slog.New(slog.NewTextHandler(r.log, nil))
	r.handler = New(Config{Service: r.fake, Log: log, Tokens: OpenTokens(r.tokens, log), Limits: limits})
	return r
}

// call is a request; without a token it comes from this process.
type call struct {
	method, path string
	body         string
	header       map[string]string // Content-Type is application/json where there is a body
	token        string
	length       int64 // -1: not said
}

// do sends a request and holds it and its answer against the document.
func (r *rig) do(c call) *http.Response {
	r.t.Helper()
	var body io.Reader
	if c.body != "" {
		body = strings.NewReader(c.body)
	}
	req := httptest.NewRequestWithContext(r.t.Context(), c.method, c.path, body)
	if c.body != "" {
		req.Header.Set("Content-Type", typeJSON)
	}
	if c.length != 0 {
		req.ContentLength = c.length
	}
	for k, v := range c.header {
		req.Header.Set(k, v)
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	} else {
		req = req.WithContext(Local(req.Context()))
	}
	rec := httptest.NewRecorder()
	r.handler.ServeHTTP(rec, req)
	req.Body = io.NopCloser(strings.NewReader(c.body))
	return r.check(req, rec.Result())
}

// serve sends a request as it is.
func (r *rig) serve(req *http.Request) *http.Response {
	r.t.Helper()
	rec := httptest.NewRecorder()
	r.handler.ServeHTTP(rec, req)
	return r.check(req, rec.Result())
}

// check holds an exchange against the document.
func (r *rig) check(req *http.Request, resp *http.Response) *http.Response {
	r.t.Helper()
	data, err := io.ReadAll(resp.Body)
	require.NoError(r.t, err)
	again := func() { resp.Body = io.NopCloser(bytes.NewReader(data)) }
	again()
	path := routeOf(req)
	if resp.StatusCode >= 400 {
		require.Equal(r.t, "application/problem+json", resp.Header.Get("Content-Type"), "%s %s: %s", req.Method, req.URL, data)
		var p problem
		require.NoError(r.t, json.Unmarshal(data, &p), string(data))
		require.Equal(r.t, resp.StatusCode, p.Status)
		require.NotEmpty(r.t, p.Detail)
		require.NotEmpty(r.t, p.Code)
	}
	if path == "" || resp.StatusCode == http.StatusMethodNotAllowed || req.Method == http.MethodHead {
		return resp
	}
	holdToDocument(r.t, req, resp, data)
	again()
	return resp
}

// routeOf is the path of the route that a request meets, "" for none.
func routeOf(req *http.Request) string {
	mux := http.NewServeMux()
	for _, rt := range routes() {
		mux.Handle(rt.method+" "+rt.path, &bound{route: rt})
	}
	h, _ := mux.Handler(req)
	if b, ok := h.(*bound); ok {
		return b.route.path
	}
	return ""
}

// text is the body of an answer.
func text(t *testing.T, resp *http.Response) string {
	t.Helper()
	data, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return string(data)
}

// as decodes the body of an answer.
func as[T any](t *testing.T, resp *http.Response) T {
	t.Helper()
	var v T
	s := text(t, resp)
	require.NoError(t, json.Unmarshal([]byte(s), &v), s)
	return v
}

// begin begins an operation.
func (r *rig) begin() api.Operation {
	r.t.Helper()
	resp := r.do(call{method: "POST", path: "/v1/instances", body: `{"ref":"app"}`})
	require.Equal(r.t, http.StatusAccepted, resp.StatusCode)
	return as[api.Operation](r.t, resp)
}
