package rest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

// raw sends bytes over a connection of its own and reads the answer.
func (s *served) raw(request string) (net.Conn, *http.Response) {
	s.t.Helper()
	c, err := net.Dial("tcp", s.addr)
	require.NoError(s.t, err)
	s.t.Cleanup(func() { _ = c.Close() })
	require.NoError(s.t, c.SetDeadline(time.Now().Add(20*time.Second)))
	_, err = io.WriteString(c, request)
	require.NoError(s.t, err)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	require.NoError(s.t, err)
	return c, resp
}

func head(line string, fields ...string) string {
	return line + " HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + operateToken + "\r\n" + strings.Join(append(fields, ""), "\r\n") + "\r\n"
}

// TestStalledBodies: a body that does not come ends with 408 after its time, whether it is
// read or not, and with a refusal at once where it was never wanted.
func TestStalledBodies(t *testing.T) {
	limits := Limits{BodyTime: 50 * time.Millisecond, Stall: 50 * time.Millisecond}
	for _, row := range []struct {
		name    string
		request string
		status  int
	}{
		{"JSON", head("POST /v1/instances", "Content-Type: application/json", "Content-Length: 100") + `{"ref":`, 408},
		{"JSON in chunks", head("POST /v1/instances", "Content-Type: application/json", "Transfer-Encoding: chunked") + "1\r\n{\r\n", 408},
		{"package", head("POST /v1/bases", "Content-Type: application/zip", "Content-Length: 100") + "PK", 408},
		{"content", head("PUT /v1/overlays/upload-0000/content", "Content-Range: bytes 0-9/10", "Content-Length: 10") + "0123", 408},
		{"content in chunks", head("PUT /v1/overlays/upload-0000/content", "Content-Range: bytes 0-9/10", "Transfer-Encoding: chunked") + "4\r\n0123\r\n", 408},
		{"content that never ends", head("PUT /v1/overlays/upload-0000/content", "Content-Range: bytes 0-3/10", "Transfer-Encoding: chunked") + "8\r\n01234567\r\n", 400},
		{"unwanted", head("GET /v1/bases", "Content-Length: 100") + "x", 400},
		{"without a token", "POST /v1/instances HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", 401},
		{"to no route", head("POST /v1/nothing", "Transfer-Encoding: chunked") + "1\r\n{\r\n", 404},
		{"of the wrong type", head("POST /v1/instances", "Content-Type: text/plain", "Transfer-Encoding: chunked") + "1\r\n{\r\n", 415},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := serveRig(t, limits, nil)
			s.do(call{method: "POST", path: "/v1/overlays", body: `{"size":10}`})
			_, resp := s.raw(row.request)
			require.Equal(t, row.status, resp.StatusCode)
			p := as[problem](t, resp)
			require.NotEmpty(t, p.Detail)
			if strings.HasPrefix(row.name, "content") {
				require.NotEmpty(t, resp.Header.Get("Upload-Offset"))
			}
			require.Eventually(t, func() bool { return len(s.handler.(*server).slots) == 0 }, 5*time.Second, time.Millisecond)
		})
	}
}

// endless is a body that never ends.
type endless struct{ sent atomic.Int64 }

func (e *endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = ' '
	}
	e.sent.Add(int64(len(p)))
	return len(p), nil
}

// TestEndlessBodies: a body that goes on and on is refused, and not read for long.
func TestEndlessBodies(t *testing.T) {
	s := serveRig(t, Limits{}, nil)
	s.do(call{method: "POST", path: "/v1/overlays", body: `{"size":10}`})
	for _, row := range []struct {
		method, path string
		header       []string
		status       int
	}{
		{"POST", "/v1/instances", []string{"Content-Type", typeJSON}, 413},
		{"POST", "/v1/bases", []string{"Content-Type", typeJSON}, 413},
		{"POST", "/v1/bases", []string{"Content-Type", typeZip}, 411},
		{"PUT", "/v1/overlays/upload-0000/content", []string{"Content-Range", "bytes 0-3/10"}, 400},
		{"PUT", "/v1/overlays/upload-0000/content", nil, 411},
		{"DELETE", "/v1/bases/debian", nil, 400},
	} {
		body := &endless{}
		req, err := http.NewRequestWithContext(t.Context(), row.method, s.url+row.path, io.NopCloser(body))
		require.NoError(t, err)
		req.Header.Set("Authorization", "Bearer "+operateToken)
		for i := 0; i < len(row.header); i += 2 {
			req.Header.Set(row.header[i], row.header[i+1])
		}
		resp, err := s.http.Do(req)
		if err == nil { // the client may meet the closed connection before it reads the answer
			require.Equal(t, row.status, resp.StatusCode, "%s %s", row.method, row.path)
			require.NoError(t, resp.Body.Close())
		}
		require.Less(t, body.sent.Load(), int64(64<<20))
	}
}

// TestVanishingClients: what came of an upload stays, and nothing else does.
func TestVanishingClients(t *testing.T) {
	s := serveRig(t, Limits{}, nil)
	s.do(call{method: "POST", path: "/v1/overlays", body: `{"size":10}`})
	c, err := net.Dial("tcp", s.addr)
	require.NoError(t, err)
	_, err = io.WriteString(c, head("PUT /v1/overlays/upload-0000/content", "Content-Range: bytes 0-9/10", "Content-Length: 10")+"0123")
	require.NoError(t, err)
	require.NoError(t, c.Close())
	require.Eventually(t, func() bool {
		u, err := s.fake.Upload(t.Context(), "upload-0000")
		return err == nil && u.Offset == 4 && len(s.handler.(*server).slots) == 0
	}, 5*time.Second, time.Millisecond)
}

// TestSlowReaders: a client that takes nothing of a long answer is given up.
func TestSlowReaders(t *testing.T) {
	s := serveRig(t, Limits{Stall: 50 * time.Millisecond}, nil)
	s.fake.content = make([]byte, 64<<20)
	c, err := net.Dial("tcp", s.addr)
	require.NoError(t, err)
	defer c.Close()
	_, err = io.WriteString(c, head("GET /v1/overlays/app/content"))
	require.NoError(t, err)
	one := make([]byte, 1)
	_, err = c.Read(one)
	require.NoError(t, err)
	require.Eventually(t, func() bool { return len(s.handler.(*server).slots) == 0 }, 10*time.Second, time.Millisecond)
}

// TestTooManyRequests: beyond the limit requests are refused at once, health is not.
func TestTooManyRequests(t *testing.T) {
	s := serveRig(t, Limits{Requests: 2}, nil)
	op := s.begin()
	ctx, cancel := context.WithCancel(t.Context())
	for range 2 {
		s.request(ctx, "GET", "/v1/operations/"+op.ID, nil, "Accept", typeEvents)
	}
	resp := s.request(t.Context(), "GET", "/v1/bases", nil)
	require.Equal(t, 503, resp.StatusCode)
	require.Equal(t, "1", resp.Header.Get("Retry-After"))
	require.Equal(t, api.Unavailable, as[problem](t, resp).Code)
	require.Equal(t, 200, s.request(t.Context(), "GET", "/healthz", nil).StatusCode)
	require.Equal(t, 200, s.do(call{method: "GET", path: "/v1/bases"}).StatusCode, "a caller on this host is not shut out by others")
	cancel()
	require.Eventually(t, func() bool { return s.request(t.Context(), "GET", "/v1/bases", nil).StatusCode == 200 }, 5*time.Second, time.Millisecond)
}

// TestLargeHeaders are refused by the server.
func TestLargeHeaders(t *testing.T) {
	s := serveRig(t, Limits{}, nil)
	_, resp := s.raw(head("GET /v1/bases", "X: "+strings.Repeat("x", mostHeader-1024)))
	require.Equal(t, 200, resp.StatusCode)
	_, resp = s.raw(head("GET /v1/bases", "X: "+strings.Repeat("x", mostHeader+1)))
	require.Equal(t, 431, resp.StatusCode)
}

// TestConnectionsAreBounded: beyond the bound a connection waits until another one ends.
func TestConnectionsAreBounded(t *testing.T) {
	s := serveRig(t, Limits{}, func(srv *Server) { srv.Connections = 1 })
	first, resp := s.raw(head("GET /healthz"))
	require.Equal(t, 200, resp.StatusCode)
	second, err := net.Dial("tcp", s.addr)
	require.NoError(t, err)
	defer second.Close()
	_, err = io.WriteString(second, head("GET /healthz"))
	require.NoError(t, err)
	require.NoError(t, second.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
	one := make([]byte, 1)
	_, err = second.Read(one)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.NoError(t, first.Close())
	require.NoError(t, second.SetReadDeadline(time.Now().Add(5*time.Second)))
	_, err = second.Read(one)
	require.NoError(t, err)
}

// TestUnixSocket: this user's processes need no token there, and may name files.
func TestUnixSocket(t *testing.T) {
	r := newRig(t, Limits{})
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- (&Server{Handler: r.handler}).Serve(ctx, l) }()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}
	req, err := http.NewRequestWithContext(ctx, "GET", "http://cloudlet/v1/overlays/%2Fabs%2Ffile", nil)
	require.NoError(t, err)
	resp, err := (&http.Client{Transport: transport}).Do(req)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, 200, resp.StatusCode)
	transport.CloseIdleConnections()
	stop()
	require.NoError(t, <-done)
	_, err = os.Stat(path)
	require.ErrorIs(t, err, os.ErrNotExist)
}

// TestOtherUsers: a process of another user is refused, token or not.
func TestOtherUsers(t *testing.T) {
	r := newRig(t, Limits{})
	for _, token := range []string{"", operateToken} {
		req, err := http.NewRequestWithContext(context.WithValue(t.Context(), peerKey, &peer{uid: 1234}), "GET", "/v1/bases", nil)
		require.NoError(t, err)
		if token != "" {
			req.Header.Set("Authorization", "Bearer "+token)
		}
		resp := r.serve(req)
		require.Equal(t, 403, resp.StatusCode)
		require.Contains(t, as[problem](t, resp).Detail, "1234")
	}
}

// TestConcurrentRequests mixes what clients do, with one idempotency key among them.
func TestConcurrentRequests(t *testing.T) {
	s := serveRig(t, Limits{}, nil)
	var ids sync.Map
	var wg sync.WaitGroup
	do := func(method, path, body string, header ...string) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), method, s.url+path, strings.NewReader(body))
		if err != nil {
			return 0, err.Error()
		}
		if body == "" {
			req.Body = http.NoBody
			req.ContentLength = 0
		}
		req.Header.Set("Authorization", "Bearer "+operateToken)
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := s.http.Do(req)
		if err != nil {
			return 0, err.Error()
		}
		defer resp.Body.Close()
		data, err := io.ReadAll(resp.Body)
		if err != nil {
			return 0, err.Error()
		}
		return resp.StatusCode, resp.Header.Get("Location") + string(data)
	}
	for i := range 40 {
		wg.Go(func() {
			status, said := do("POST", "/v1/instances", `{"ref":"app"}`, "Content-Type", typeJSON, "Idempotency-Key", "same")
			if status != 202 {
				t.Errorf("%d %s", status, said)
			}
			id, _, _ := strings.Cut(said, "{")
			ids.Store(id, true)
			if status, said := do("GET", id+fmt.Sprintf("?wait=0&after=%d", i), ""); status != 200 {
				t.Errorf("%d %s", status, said)
			}
			if status, said := do("POST", "/v1/operations", `{"kind":"x"}`, "Content-Type", typeJSON); status != 400 {
				t.Errorf("%d %s", status, said)
			}
			if status, said := do("GET", "/metrics", ""); status != 200 {
				t.Errorf("%d %s", status, said)
			}
		})
	}
	wg.Wait()
	n := 0
	ids.Range(func(any, any) bool { n++; return true })
	require.Equal(t, 1, n)
	require.Len(t, s.fake.calls, 1)
}
