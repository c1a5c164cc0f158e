package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

// over makes clients of a handler in each way there is to reach one.
func over(t *testing.T, h http.Handler, test func(t *testing.T, c *Client)) {
	t.Helper()
	t.Run("tcp", func(t *testing.T) {
		srv := httptest.NewServer(h)
		defer srv.Close()
		c, err := New(Options{Server: srv.URL, Token: "secret"})
		require.NoError(t, err)
		defer c.Close()
		test(t, c)
	})
	t.Run("unix", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", path)
		require.NoError(t, err)
		srv := &httptest.Server{Listener: l, Config: &http.Server{Handler: h}}
		srv.Start()
		defer srv.Close()
		c, err := New(Options{Server: "unix:" + path, Token: "secret"})
		require.NoError(t, err)
		defer c.Close()
		test(t, c)
	})
	t.Run("local", func(t *testing.T) {
		l := NewLocal(h)
		defer l.Close()
		c, err := New(Options{Server: "http://here", Token: "secret", Transport: l})
		require.NoError(t, err)
		test(t, c)
	})
}

// answer writes a JSON document.
func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}

// refuse writes a problem.
func refuse(w http.ResponseWriter, status int, e api.Error) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(struct {
		Type   string `json:"type"`
		Title  string `json:"title"`
		Status int    `json:"status"`
		api.Error
	}{"about:blank", http.StatusText(status), status, e})
}

// echo answers every request with what it was, in the field that all things have.
func echo(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	text := fmt.Sprintf("%s %s %s %s", r.Method, r.URL.EscapedPath(), r.URL.RawQuery, body)
	switch {
	case r.Header.Get("Authorization") != "Bearer secret":
		refuse(w, 401, api.Error{Code: api.Unavailable, Detail: "no token"})
	case r.Method == "POST" && r.Header.Get("Idempotency-Key") == "":
		refuse(w, 400, api.Error{Code: api.Invalid, Detail: "no key"})
	case r.Method == "DELETE" && !strings.Contains(r.URL.Path, "operations"):
		w.WriteHeader(204)
	case r.Method == "GET" && strings.Count(r.URL.Path, "/") == 2:
		answer(w, 200, []any{map[string]any{"id": text}})
	case strings.HasSuffix(r.URL.Path, "/log"), strings.HasSuffix(r.URL.Path, "/package"), r.Method == "GET" && strings.HasSuffix(r.URL.Path, "/content"):
		io.WriteString(w, text)
	default:
		answer(w, 200, map[string]any{"id": text})
	}
}

// TestRoutes: each method makes the request of its route.
func TestRoutes(t *testing.T) {
	over(t, http.HandlerFunc(echo), func(t *testing.T, c *Client) {
		ctx := t.Context()
		var out bytes.Buffer
		written := func(err error) (string, error) { defer out.Reset(); return out.String(), err }
		one := func(v any, err error) (string, error) {
			b, _ := json.Marshal(v)
			var x struct{ ID string }
			json.Unmarshal(b, &x)
			return x.ID, err
		}
		many := func(v any, err error) (string, error) {
			b, _ := json.Marshal(v)
			var x []struct{ ID string }
			json.Unmarshal(b, &x)
			return x[0].ID, err
		}
		for _, tt := range []struct {
			want string
			do   func() (string, error)
		}{
			{"GET /v1/bases  ", func() (string, error) { return many(c.Bases(ctx)) }},
			{"GET /v1/bases/a%2Fb%20c  ", func() (string, error) { return one(c.Base(ctx, "a/b c")) }},
			{`POST /v1/bases  {"name":"n","source":"/x"}`, func() (string, error) {
				return one(c.ImportBase(ctx, api.ImportBase{Name: "n", Source: "/x"}))
			}},
			{`POST /v1/bases  {"disk":"/d","memory":7}`, func() (string, error) { return one(c.CreateBase(ctx, api.CreateBase{Disk: "/d", Memory: 7})) }},
			{"POST /v1/bases name=n zip", func() (string, error) { return one(c.SendBase(ctx, "n", strings.NewReader("zip"), 3, nil)) }},
			{"POST /v1/bases  zip", func() (string, error) { return one(c.SendBase(ctx, "", strings.NewReader("zip"), -1, nil)) }},
			{"POST /v1/bases  ", func() (string, error) { return one(c.SendBase(ctx, "", strings.NewReader(""), 0, nil)) }},
			{"GET /v1/bases/b/package  ", func() (string, error) { return written(c.BasePackage(ctx, "b", &out, nil)) }},
			{"GET /v1/overlays  ", func() (string, error) { return many(c.Overlays(ctx)) }},
			{"GET /v1/overlays/o  ", func() (string, error) { return one(c.Overlay(ctx, "o")) }},
			{"GET /v1/overlays/o/content  ", func() (string, error) { return written(c.OverlayContent(ctx, "o", &out, nil)) }},
			{`POST /v1/overlays  {"instance":"i"}`, func() (string, error) { return one(c.CreateOverlay(ctx, api.CreateOverlay{Instance: "i"})) }},
			{`POST /v1/overlays  {"source":"u"}`, func() (string, error) { return one(c.ImportOverlay(ctx, api.ImportOverlay{Source: "u"})) }},
			{`POST /v1/overlays  {"size":3}`, func() (string, error) { return one(c.CreateUpload(ctx, api.CreateUpload{Size: 3})) }},
			{"GET /v1/overlays/upload-1  ", func() (string, error) { return one(c.Upload(ctx, "upload-1")) }},
			{"GET /v1/instances  ", func() (string, error) { return many(c.Instances(ctx, false)) }},
			{"GET /v1/instances all=true ", func() (string, error) { return many(c.Instances(ctx, true)) }},
			{"GET /v1/instances/i  ", func() (string, error) { return one(c.Instance(ctx, "i")) }},
			{`POST /v1/instances  {"ref":"r"}`, func() (string, error) { return one(c.Run(ctx, api.Run{Ref: "r"})) }},
			{`POST /v1/instances/i/actions  {"action":"pause"}`, func() (string, error) { return one(c.Act(ctx, "i", api.ActionPause)) }},
			{"GET /v1/instances/i/log  ", func() (string, error) { return written(c.Log(ctx, "i", &out)) }},
			{`POST /v1/instances/a%2Fb/handoff  {"instance":"a/b","to":"http://x:1","token":"t","rounds":-1}`, func() (string, error) {
				return one(c.HandOff(ctx, api.HandOff{Instance: "a/b", To: "http://x:1", Token: "t", Rounds: -1}))
			}},
			{"GET /v1/handoffs/h  ", func() (string, error) { return one(c.Handoff(ctx, "h")) }},
			{"GET /v1/operations  ", func() (string, error) { return many(c.Operations(ctx)) }},
			{"GET /v1/operations/o  ", func() (string, error) { return one(c.Operation(ctx, "o")) }},
			{"GET /v1/operations/o after=4&wait=2 ", func() (string, error) { return one(c.PollOperation(ctx, "o", 4, 1500e6)) }},
			{"DELETE /v1/operations/o  ", func() (string, error) { return one(c.CancelOperation(ctx, "o")) }},
			{`POST /v1/operations  {"kind":"verify-base","ref":"b"}`, func() (string, error) { return one(c.Verify(ctx, api.KindVerifyBase, "b")) }},
		} {
			got, err := tt.do()
			require.NoError(t, err, tt.want)
			require.Equal(t, tt.want, got)
		}
		require.NoError(t, c.DeleteBase(ctx, "b"))
		require.NoError(t, c.DeleteOverlay(ctx, "o"))
		require.NoError(t, c.DeleteUpload(ctx, "upload-1"))
		require.NoError(t, c.DeleteInstance(ctx, "i", true))
		for _, ref := range []string{"", ".", ".."} {
			_, err := c.Base(ctx, ref)
			require.Equal(t, api.NotFound, api.CodeOf(err))
			_, err = c.HandOff(ctx, api.HandOff{Instance: ref})
			require.Equal(t, api.NotFound, api.CodeOf(err))
		}
	})
}

func TestErrors(t *testing.T) {
	want := api.Error{Code: api.Conflict, Detail: "base b is in use", Field: "base", Remedy: "stop x"}
	mux := http.NewServeMux()
	mux.HandleFunc("/v1/bases/problem", func(w http.ResponseWriter, _ *http.Request) { refuse(w, 409, want) })
	mux.HandleFunc("/v1/bases/plain", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "busy now", http.StatusServiceUnavailable) })
	mux.HandleFunc("/v1/bases/strange", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(418) })
	mux.HandleFunc("/v1/bases/moved", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://127.0.0.1:9/", http.StatusTemporaryRedirect)
	})
	mux.HandleFunc("/v1/bases/text", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") })
	mux.HandleFunc("/v1/bases/short", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100")
		io.WriteString(w, "{")
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	})
	over(t, mux, func(t *testing.T, c *Client) {
		_, err := c.Base(t.Context(), "problem")
		var e *api.Error
		require.ErrorAs(t, err, &e)
		require.Equal(t, want, *e)
		for ref, code := range map[string]api.Code{"plain": api.Unavailable, "strange": api.Internal, "moved": api.Internal, "text": api.Internal, "short": api.Unavailable, "none": api.NotFound} {
			_, err := c.Base(t.Context(), ref)
			require.Equal(t, code, api.CodeOf(err), "%s: %v", ref, err)
		}
		_, err = c.Base(t.Context(), "plain")
		require.ErrorContains(t, err, "busy now")
	})
}

func TestUnreachable(t *testing.T) {
	c, err := New(Options{Server: "unix:" + filepath.Join(t.TempDir(), "none")})
	require.NoError(t, err)
	_, err = c.Bases(t.Context())
	require.Equal(t, api.Unavailable, api.CodeOf(err))
	require.ErrorContains(t, err, "no such file")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = c.Bases(ctx)
	require.ErrorIs(t, err, context.Canceled)

	for _, server := range []string{"", "127.0.0.1:80", "ftp://host", "http://", "http://host/path", "http://user@host"} {
		_, err := New(Options{Server: server})
		require.Equal(t, api.Invalid, api.CodeOf(err), server)
	}
}

// flaky fails a number of requests before they are sent, and one after the answer.
type flaky struct {
	http.RoundTripper
	fails atomic.Int32
	keys  []string
}

func (f *flaky) RoundTrip(r *http.Request) (*http.Response, error) {
	f.keys = append(f.keys, r.Header.Get("Idempotency-Key"))
	if f.fails.Add(-1) >= 0 {
		return nil, errors.New("connection lost")
	}
	return f.RoundTripper.RoundTrip(r)
}

func TestRetries(t *testing.T) {
	l := NewLocal(http.HandlerFunc(echo))
	defer l.Close()
	f := &flaky{RoundTripper: l}
	c, err := New(Options{Server: "http://here", Token: "secret", Transport: f})
	require.NoError(t, err)
	f.fails.Store(tries - 1)
	op, err := c.Run(t.Context(), api.Run{Ref: "r"})
	require.NoError(t, err)
	require.Equal(t, `POST /v1/instances  {"ref":"r"}`, op.ID)
	require.Len(t, f.keys, tries)
	for _, key := range f.keys {
		require.Equal(t, f.keys[0], key, "all tries have one key")
	}
	f.fails.Store(tries)
	_, err = c.Bases(t.Context())
	require.Equal(t, api.Unavailable, api.CodeOf(err))
	f.fails.Store(1)
	_, err = c.SendBase(t.Context(), "", strings.NewReader("x"), 1, nil)
	require.Equal(t, api.Unavailable, api.CodeOf(err), "a stream is sent once")
}
