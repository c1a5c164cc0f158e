package rest

import (
	"bufio"
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

// TestHTTP2: over TLS clients speak HTTP/2, where streams have the deadlines.
func TestHTTP2(t *testing.T) {
	lender := httptest.NewTLSServer(http.NotFoundHandler()) // of a certificate
	pair, roots := lender.TLS.Certificates, lender.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs
	lender.Close()
	r := newRig(t, Limits{Stall: 100 * time.Millisecond})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- (&Server{Handler: r.handler}).Serve(ctx, tls.NewListener(l, &tls.Config{Certificates: pair, NextProtos: []string{"h2", "http/1.1"}}))
	}()
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
	ask := func(method, path string, body io.Reader, header ...string) *http.Response {
		req, err := http.NewRequestWithContext(t.Context(), method, "https://"+l.Addr().String()+path, body)
		require.NoError(t, err)
		req.Header.Set("Authorization", "Bearer "+operateToken)
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := (&http.Client{Transport: transport}).Do(req)
		require.NoError(t, err)
		require.Equal(t, 2, resp.ProtoMajor)
		t.Cleanup(func() { _ = resp.Body.Close() })
		return resp
	}

	op := r.begin()
	events := bufio.NewReader(ask("GET", "/v1/operations/"+op.ID, nil, "Accept", typeEvents).Body)
	e, err := nextEvent(t, events)
	require.NoError(t, err)
	require.Equal(t, "1", e.id)

	// An upload that stalls ends by itself; the events go on meanwhile and after.
	r.do(call{method: "POST", path: "/v1/overlays", body: `{"size":10}`})
	stalled, hold := io.Pipe()
	go func() { _, _ = hold.Write([]byte("0123")) }()
	resp := ask("PUT", "/v1/overlays/upload-0000/content", stalled, "Content-Range", "bytes 0-9/10")
	require.Equal(t, 408, resp.StatusCode)
	require.Equal(t, "4", resp.Header.Get("Upload-Offset"))
	require.Equal(t, api.TimedOut, as[problem](t, resp).Code)
	require.NoError(t, hold.Close())

	r.fake.finish(op.ID)
	e, err = nextEvent(t, events)
	require.NoError(t, err)
	require.Equal(t, api.OperationDone, e.op.State)
	stop()
	transport.CloseIdleConnections()
	require.NoError(t, <-done)
}
