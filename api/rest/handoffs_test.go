package rest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/api/service"
	"cloudlet/handoff"

	"github.com/stretchr/testify/require"
)

var handoffContentPath = "/v1/handoffs/" + handoffID + "/overlays/" + overlayID

// TestMessages: what a source sends arrives byte by byte, with who it is and from where, and
// so does the answer. A key of a client's makes no difference.
func TestMessages(t *testing.T) {
	require.Equal(t, handoff.MaxMessage, mostMessage)
	largest := `"` + strings.Repeat("a", mostMessage-2) + `"`
	for _, row := range []struct {
		name, remote string
		token        string
		body         string
		want         handoffMessage
	}{
		{"peer", "10.0.0.1:999", peerToken, `{"unknown":{"a":1},"unknown":2}`, handoffMessage{service.Caller{Name: "edge"}, netip.MustParseAddr("10.0.0.1"), `{"unknown":{"a":1},"unknown":2}`}},
		{"operator", "[2001:db8::1]:999", operateToken, " [] \n", handoffMessage{service.Caller{Name: "operator"}, netip.MustParseAddr("2001:db8::1"), " [] \n"}},
		{"mapped address", "[::ffff:10.0.0.1]:999", peerToken, "{}", handoffMessage{service.Caller{Name: "edge"}, netip.MustParseAddr("10.0.0.1"), "{}"}},
		{"unix socket", "@", "", "{}", handoffMessage{service.Caller{Name: localName, Local: true}, netip.Addr{}, "{}"}},
		{"the largest", "10.0.0.1:999", peerToken, largest, handoffMessage{service.Caller{Name: "edge"}, netip.MustParseAddr("10.0.0.1"), largest}},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := newRig(t, Limits{})
			req := httptest.NewRequestWithContext(t.Context(), "POST", "/v1/handoffs", strings.NewReader(row.body))
			req.RemoteAddr = row.remote
			req.Header.Set("Content-Type", typeJSON)
			req.Header.Set("Idempotency-Key", "a\tkey that elsewhere would be refused")
			if row.token != "" {
				req.Header.Set("Authorization", "Bearer "+row.token)
			} else {
				req = req.WithContext(Local(req.Context()))
			}
			rec := httptest.NewRecorder()
			r.handler.ServeHTTP(rec, req)
			require.Equal(t, 200, rec.Code, rec.Body)
			require.Equal(t, typeJSON, rec.Header().Get("Content-Type"))
			require.Equal(t, `{"version":1,"state":"accepted"}`, rec.Body.String())
			require.Equal(t, []handoffMessage{row.want}, r.fake.messages)
		})
	}
}

// TestMessageErrors: what the service refuses is a problem, which no source takes for an answer.
func TestMessageErrors(t *testing.T) {
	for code, status := range map[api.Code]int{api.Invalid: 400, api.Conflict: 409, api.Unavailable: 503, api.Internal: 500} {
		r := newRig(t, Limits{})
		r.fake.fail["HandoffMessage"] = api.Errorf(code, "no")
		require.Equal(t, status, r.do(call{method: "POST", path: "/v1/handoffs", body: "{}", token: peerToken}).StatusCode)
	}
}

// TestSourceHangsUp: what a message asks for is done whether its sender waits or not.
func TestSourceHangsUp(t *testing.T) {
	r := newRig(t, Limits{})
	ctx, hangUp := context.WithCancel(Local(t.Context()))
	var given error
	r.fake.delivered = func(ctx context.Context) {
		hangUp()
		given = ctx.Err()
	}
	req := httptest.NewRequestWithContext(ctx, "POST", "/v1/handoffs", strings.NewReader("{}"))
	req.Header.Set("Content-Type", typeJSON)
	r.handler.ServeHTTP(httptest.NewRecorder(), req)
	require.Error(t, ctx.Err())
	require.NoError(t, given)
	require.Len(t, r.fake.messages, 1)
}

// TestHalfAMessage: one that breaks off is not delivered.
func TestHalfAMessage(t *testing.T) {
	s := serveRig(t, Limits{BodyTime: 50 * time.Millisecond}, nil)
	_, resp := s.raw(head("POST /v1/handoffs", "Content-Type: application/json", "Content-Length: 9") + "{}")
	require.Equal(t, 408, resp.StatusCode)
	c, err := net.Dial("tcp", s.addr)
	require.NoError(t, err)
	_, err = io.WriteString(c, head("POST /v1/handoffs", "Content-Type: application/json", "Content-Length: 9")+"{}")
	require.NoError(t, err)
	require.NoError(t, c.Close())
	require.Eventually(t, func() bool { return len(s.handler.(*server).slots) == 0 }, 5*time.Second, time.Millisecond)
	require.Empty(t, s.fake.messages)
}

// TestWrongKeys: without a token and with the right key there is an overlay; whatever else is
// brought, the answer is the same to the byte, and says nothing of what there is.
func TestWrongKeys(t *testing.T) {
	r := newRig(t, Limits{})
	get := func(path, token string) *http.Response {
		req := httptest.NewRequestWithContext(t.Context(), "GET", path, nil)
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		return r.serve(req)
	}
	for _, token := range []string{"", peerToken, "nothing-0123456789abcdef"} {
		resp := get(handoffContentPath+"?key="+handoffKey, token)
		require.Equal(t, 200, resp.StatusCode)
		require.Equal(t, "0123456789", text(t, resp))
	}
	said := map[string]bool{}
	for _, path := range []string{
		handoffContentPath, handoffContentPath + "?key=", handoffContentPath + "?key=" + handoffKey[1:], handoffContentPath + "?key=" + handoffKey + "x",
		"/v1/handoffs/4b4b4b4b4b4b4b4b/overlays/" + overlayID + "?key=" + handoffKey, "/v1/handoffs/" + handoffID + "/overlays/" + baseID + "?key=" + handoffKey,
		"/v1/handoffs/x/overlays/y?key=z", "/v1/handoffs/%2F..%2F/overlays/%00?key=%00",
	} {
		for _, token := range []string{"", operateToken} {
			resp := get(path, token)
			require.Equal(t, 404, resp.StatusCode, path)
			said[fmt.Sprint(resp.Header, text(t, resp))] = true
		}
	}
	for _, code := range []api.Code{api.NotFound, api.Invalid, api.Conflict} { // as for the beginning of two ids
		r.fake.fail["HandoffContent"] = api.Errorf(code, "secret")
		resp := get(handoffContentPath+"?key="+handoffKey, "")
		said[fmt.Sprint(resp.Header, text(t, resp))] = true
	}
	require.Len(t, said, 1, "%v", said)
	// A failure that is not the client's is told as what it is.
	r.fake.fail["HandoffContent"] = api.Errorf(api.Unavailable, "no descriptors are left")
	require.Equal(t, 503, get(handoffContentPath+"?key="+handoffKey, "").StatusCode)
	r.fake.fail["HandoffContent"] = io.ErrUnexpectedEOF
	require.Equal(t, 500, get(handoffContentPath+"?key="+handoffKey, "").StatusCode)
}

// TestSecretsAreNotLogged: neither keys nor tokens get into the log or the metrics, however a
// request ends.
func TestSecretsAreNotLogged(t *testing.T) {
	r := newRig(t, Limits{})
	var log bytes.Buffer
	r.handler = New(Config{Service: r.fake, Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})), Tokens: OpenTokens(r.tokens, nil)})
	path := handoffContentPath + "?key=" + handoffKey
	handOff := `{"to":"http://x:1","token":"` + handoffKey + `"`
	r.do(call{method: "GET", path: path})
	r.do(call{method: "GET", path: path + "x"})
	r.do(call{method: "GET", path: path + "&x=1"})
	r.do(call{method: "GET", path: path + "%zz"})
	r.do(call{method: "POST", path: path})
	r.do(call{method: "GET", path: "/v1/nothing?key=" + handoffKey})
	r.do(call{method: "POST", path: "/v1/instances/0123/handoff", body: handOff + "}"})
	r.do(call{method: "POST", path: "/v1/instances/0123/handoff", body: handOff + `,"x":1}`})
	r.do(call{method: "POST", path: "/v1/handoffs", body: `{"url":"http://x` + path + `"}`})
	r.fake.fail["HandoffContent"], r.fake.fail["Submit"], r.fake.fail["HandoffMessage"] = io.ErrUnexpectedEOF, io.ErrUnexpectedEOF, io.ErrUnexpectedEOF
	r.do(call{method: "GET", path: path})
	r.do(call{method: "POST", path: "/v1/instances/0123/handoff", body: handOff + "}"})
	r.do(call{method: "POST", path: "/v1/handoffs", body: `{"url":"http://x` + path + `"}`})
	require.Contains(t, log.String(), "unexpected EOF")
	require.Contains(t, log.String(), handoffContentPath)
	require.NotContains(t, log.String(), "0123456789abcdef")
	require.NotContains(t, text(t, r.do(call{method: "GET", path: "/metrics"})), "0123456789abcdef")
}

// TestTooManyFetches: callers with a key are bounded in number, and cannot shut out those with
// a token, nor these them.
func TestTooManyFetches(t *testing.T) {
	s := serveRig(t, Limits{Requests: 2}, nil)
	gate := make(chan empty)
	s.fake.mu.Lock()
	s.fake.gate["HandoffContent"] = gate
	s.fake.mu.Unlock()
	get := func() *http.Response {
		resp, err := s.http.Get(s.url + handoffContentPath + "?key=" + handoffKey)
		require.NoError(t, err)
		t.Cleanup(func() { _ = resp.Body.Close() })
		return resp
	}
	done := make(chan error, 2)
	for range 2 {
		go func() {
			resp, err := s.http.Get(s.url + handoffContentPath + "?key=" + handoffKey)
			if err == nil {
				err = resp.Body.Close()
			}
			done <- err
		}()
	}
	fetches := s.handler.(*server).fetches
	require.Eventually(t, func() bool { return len(fetches) == 2 }, 5*time.Second, time.Millisecond)
	resp := get()
	require.Equal(t, 503, resp.StatusCode)
	require.Equal(t, "1", resp.Header.Get("Retry-After"))
	require.Equal(t, 200, s.request(t.Context(), "GET", "/v1/bases", nil).StatusCode)
	require.Equal(t, 200, s.request(t.Context(), "GET", "/healthz", nil).StatusCode)
	close(gate)
	require.NoError(t, <-done)
	require.NoError(t, <-done)
	require.Eventually(t, func() bool { return len(fetches) == 0 }, 5*time.Second, time.Millisecond)

	op := s.begin()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range 2 {
		s.request(ctx, "GET", "/v1/operations/"+op.ID, nil, "Accept", typeEvents)
	}
	require.Equal(t, 503, s.request(t.Context(), "GET", "/v1/bases", nil).StatusCode)
	require.Equal(t, 200, get().StatusCode)
}

// TestSlowFetchers: one that takes nothing of an overlay is given up.
func TestSlowFetchers(t *testing.T) {
	s := serveRig(t, Limits{Stall: 50 * time.Millisecond}, nil)
	s.fake.content = make([]byte, 64<<20)
	c, err := net.Dial("tcp", s.addr)
	require.NoError(t, err)
	defer c.Close()
	_, err = io.WriteString(c, "GET "+handoffContentPath+"?key="+handoffKey+" HTTP/1.1\r\nHost: x\r\n\r\n")
	require.NoError(t, err)
	one := make([]byte, 1)
	_, err = c.Read(one)
	require.NoError(t, err)
	require.Eventually(t, func() bool { return len(s.handler.(*server).fetches) == 0 }, 10*time.Second, time.Millisecond)
}
