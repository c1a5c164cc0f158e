package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"cloudlet/integration/guest/table"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	waitBound = 20 * time.Second
	waitTick  = 5 * time.Millisecond
)

// reply holds the fields of every answer.
type reply struct {
	Token, SHA256, Table, File, Extra string
	Counter, Rounds                   int64
	Window                            int
	On                                bool
}

// send sends a request to the handler and returns its answer.
func send(t *testing.T, s *server, method, target string, wantStatus int) *httptest.ResponseRecorder {
	t.Helper()
	w := httptest.NewRecorder()
	s.handler().ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, target, nil))
	require.Equal(t, wantStatus, w.Code, "%s %s: %s", method, target, w.Body)
	return w
}

// call sends a request and decodes an answer of 200.
func call(t *testing.T, s *server, method, target string, wantStatus int) (reply, string) {
	t.Helper()
	w := send(t, s, method, target, wantStatus)
	var r reply
	if wantStatus == http.StatusOK && strings.HasPrefix(w.Header().Get("Content-Type"), "application/json") {
		require.NoError(t, json.Unmarshal(w.Body.Bytes(), &r))
	}
	return r, w.Body.String()
}

func TestAnswers(t *testing.T) {
	s, err := newServer(t.TempDir())
	require.NoError(t, err)
	_, body := call(t, s, "GET", "/healthz", 200)
	require.Equal(t, "ok\n", body)

	for i, target := range []string{"/", "/?window=0", "/?window=63"} {
		r, _ := call(t, s, "GET", target, 200)
		require.Equal(t, s.token, r.Token)
		require.EqualValues(t, i+1, r.Counter)
		require.Equal(t, table.WindowHash(s.token, r.Window), r.SHA256)
	}
	r, _ := call(t, s, "POST", "/write?mib=2&seed=a1", 200)
	require.Empty(t, r.Token)
	r, _ = call(t, s, "GET", "/verify?seed=a1", 200)
	require.Equal(t, reply{Token: s.token, Counter: 3, Table: table.Hash(s.token),
		File: table.FileHash(s.token), Extra: table.ExtraHash("a1", 2)}, r)

	// What /verify says is what is there, not what should be.
	s.table[12345] ^= 1
	require.NoError(t, os.Truncate(s.stateFile(), table.FileSize-1))
	r, _ = call(t, s, "GET", "/verify", 200)
	require.NotEqual(t, table.Hash(s.token), r.Table)
	require.NotEqual(t, table.FileHash(s.token), r.File)
}

func TestRefusals(t *testing.T) {
	s, err := newServer(t.TempDir())
	require.NoError(t, err)
	for _, test := range []struct {
		name, method, target string
		status               int
		says                 string
	}{
		{"window above", "GET", "/?window=64", 400, "window"},
		{"window below", "GET", "/?window=-1", 400, "window"},
		{"window text", "GET", "/?window=x", 400, "window"},
		{"write without size", "POST", "/write?seed=a", 400, "mib"},
		{"write too much", "POST", "/write?mib=49&seed=a", 400, "mib"},
		{"write without seed", "POST", "/write?mib=1", 400, "seed"},
		{"write elsewhere", "POST", "/write?mib=1&seed=../a", 400, "seed"},
		{"delete what is not there", "POST", "/delete?seed=a", 404, "extra-a.bin"},
		{"verify what is not there", "GET", "/verify?seed=a", 404, "extra-a.bin"},
		{"dirty too much", "POST", "/dirty?mib=65", 400, "mib"},
		{"load neither", "POST", "/load?on=2", 400, "on"},
		{"load by GET", "GET", "/load?on=1", 405, ""},
		{"append without client", "POST", "/append?n=1", 400, "client"},
		{"append elsewhere", "POST", "/append?client=../a&n=1", 400, "client"},
		{"append nothing", "POST", "/append?client=a&n=0", 400, "n is"},
		{"append after a gap", "POST", "/append?client=a&n=2", 409, "there are 0"},
		{"fill too much", "POST", "/fill?seed=a&mib=4097", 400, "mib"},
		{"fill without seed", "POST", "/fill?mib=1", 400, "seed"},
		{"churn without rate", "POST", "/churn", 400, "kib_per_s"},
		{"unknown path", "GET", "/x", 404, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, body := call(t, s, test.method, test.target, test.status)
			require.Contains(t, body, test.says)
		})
	}
	require.Zero(t, s.counter.Load())
}

func TestDirty(t *testing.T) {
	s, err := newServer(t.TempDir())
	require.NoError(t, err)
	call(t, s, "POST", "/dirty?mib=2", 200)
	first := string(s.dirty[:3<<20])
	call(t, s, "POST", "/dirty?mib=1", 200)
	require.NotEqual(t, first[:1<<20], string(s.dirty[:1<<20]), "rewritten")
	require.Equal(t, first[1<<20:], string(s.dirty[1<<20:3<<20]), "left alone")
}

func TestLoad(t *testing.T) {
	s, err := newServer(t.TempDir())
	require.NoError(t, err)
	for range 2 { // it can start again
		r, _ := call(t, s, "POST", "/load?on=1", 200)
		require.True(t, r.On)
		before := r.Rounds
		require.Eventually(t, func() bool { return s.load.progress().Rounds > before+2 }, waitBound, waitTick)
		call(t, s, "POST", "/load?on=1", 200)
		r, _ = call(t, s, "POST", "/load?on=0", 200)
		require.False(t, r.On)
		after, _ := call(t, s, "POST", "/load?on=0", 200)
		require.Equal(t, r.Rounds, after.Rounds, "it rests")
	}
}

func TestTokensDiffer(t *testing.T) {
	a, err := newToken()
	require.NoError(t, err)
	b, err := newToken()
	require.NoError(t, err)
	require.Regexp(t, "^[0-9a-f]{32}$", a)
	require.NotEqual(t, a, b)
}
