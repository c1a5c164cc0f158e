package service

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"cloudlet/handoff"

	"github.com/stretchr/testify/require"
)

// TestGivenUpMessage: what a destination has not read yet of a message that was given up never
// reaches it: the connection is reset.
func TestGivenUpMessage(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	p, err := newHandoffPeer(handoffMeta{To: "http://" + l.Addr().String()})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	sent := make(chan error, 1)
	go func() {
		_, err := p.Send(ctx, handoff.Message{Kind: handoff.KindGo})
		sent <- err
	}()
	conn, err := l.Accept()
	require.NoError(t, err)
	defer conn.Close()
	_, err = io.ReadFull(conn, make([]byte, 4)) // it is on its way
	require.NoError(t, err)
	cancel()
	require.ErrorIs(t, <-sent, context.Canceled)
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(10*time.Second)))
	_, err = io.Copy(io.Discard, conn)
	require.ErrorContains(t, err, "reset")
}

// TestAnsweredMessage: a reset at the end of a connection costs no answer.
func TestAnsweredMessage(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Connection", "close")
		_ = json.NewEncoder(w).Encode(handoff.Answer{Version: handoff.Version, Handoff: "00112233445566778899aabbccddeeff", Epoch: 1, State: handoff.Never})
	}))
	defer s.Close()
	p, err := newHandoffPeer(handoffMeta{To: s.URL})
	require.NoError(t, err)
	for range 20 {
		a, err := p.Send(t.Context(), handoff.Message{Kind: handoff.KindAbort})
		require.NoError(t, err)
		require.Equal(t, handoff.Never, a.State)
	}
}
