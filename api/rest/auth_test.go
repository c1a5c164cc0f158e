package rest

import (
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"cloudlet/api"
	"cloudlet/api/service"

	"log/slog"

	"github.com/stretchr/testify/require"
)

// TestRoles asks every route as every role.
func TestRoles(t *testing.T) {
	r := newRig(t, Limits{})
	for _, rt := range routes() {
		for _, row := range []struct {
			token string
			may   bool
		}{{"", true}, {operateToken, true}, {readToken, rt.public || !rt.operates}, {peerToken, rt.public || rt.peer}} {
			c := call{method: rt.method, path: strings.NewReplacer("{id}", "nothing", "{overlay}", "nothing").Replace(rt.path), token: row.token}
			if rt.path == "/v1/openapi.json" || rt.method == "PUT" {
				c.header = map[string]string{"Content-Range": "bytes */10"}
			}
			resp := r.do(c)
			if row.may {
				require.NotEqual(t, http.StatusForbidden, resp.StatusCode, "%s %s as %s", rt.method, rt.path, row.token)
			} else {
				require.Equal(t, http.StatusForbidden, resp.StatusCode, "%s %s as %s", rt.method, rt.path, row.token)
			}
			require.NotEqual(t, http.StatusUnauthorized, resp.StatusCode)
		}
	}
}

// TestWrongTokens: without a right token nothing is told but that.
func TestWrongTokens(t *testing.T) {
	for _, row := range []struct {
		name   string
		header []string
	}{
		{"none", nil},
		{"empty", []string{""}},
		{"only the scheme", []string{"Bearer"}},
		{"empty token", []string{"Bearer "}},
		{"another scheme", []string{"Basic " + operateToken}},
		{"wrong", []string{"Bearer nothing-0123456789abcdef"}},
		{"beginning of one", []string{"Bearer " + operateToken[:20]}},
		{"more than one", []string{"Bearer " + operateToken + "x"}},
		{"two headers", []string{"Bearer " + operateToken, "Bearer " + operateToken}},
		{"long", []string{"Bearer " + strings.Repeat("x", 60000)}},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := newRig(t, Limits{})
			for _, path := range []string{"/v1/bases", "/v1/nothing", "/metrics", "/"} {
				req, err := http.NewRequestWithContext(t.Context(), "GET", path, nil)
				require.NoError(t, err)
				req.Header["Authorization"] = row.header
				resp := r.serve(req)
				require.Equal(t, 401, resp.StatusCode)
				require.True(t, strings.HasPrefix(resp.Header.Get("WWW-Authenticate"), "Bearer realm="), resp.Header)
				require.Equal(t, "Authorization", as[problem](t, resp).Field)
			}
			for _, path := range []string{"/healthz", "/readyz", "/v1/openapi.json"} {
				req, err := http.NewRequestWithContext(t.Context(), "GET", path, nil)
				require.NoError(t, err)
				req.Header["Authorization"] = row.header
				require.Equal(t, 200, r.serve(req).StatusCode)
			}
		})
	}
}

// TestCallers: what a verb is told of the caller is what the token says.
func TestCallers(t *testing.T) {
	r := newRig(t, Limits{})
	key := map[string]string{"Idempotency-Key": "k1"}
	first := r.do(call{method: "POST", path: "/v1/instances", body: `{"ref":"app"}`, token: operateToken, header: key})
	again := r.do(call{method: "POST", path: "/v1/instances", body: `{"ref":"app"}`, token: operateToken, header: key})
	require.Equal(t, as[api.Operation](t, first).ID, as[api.Operation](t, again).ID)
	require.Equal(t, []service.Caller{{Name: "operator", Key: "k1"}}, r.fake.callers)
	other := r.do(call{method: "POST", path: "/v1/instances", body: `{"ref":"b"}`, token: operateToken, header: key})
	require.Equal(t, 409, other.StatusCode)
	require.Equal(t, "Idempotency-Key", as[problem](t, other).Field)
	require.Equal(t, 400, r.do(call{method: "GET", path: "/v1/overlays/%2Fetc%2Fpasswd", token: readToken}).StatusCode)
}

// TestTokensReload: a change counts within a second, one that is broken does not.
func TestTokensReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "tokens")
		write := func(text string, mode os.FileMode) {
			require.NoError(t, os.WriteFile(path+".new", []byte(text), mode))
			require.NoError(t, os.Chmod(path+".new", mode))
			require.NoError(t, os.Rename(path+".new", path))
			time.Sleep(tokensCheckEvery)
		}
		log := &logged{}
		list := OpenTokens(path, slog.New(slog.NewTextHandler(log, nil)))
		knows := func(token string) bool {
			_, ok := list.find(token)
			return ok
		}
		require.False(t, knows(operateToken))
		require.Contains(t, log.String(), "no such file")

		write("operate a "+operateToken+"\n", 0o600)
		require.True(t, knows(operateToken))
		who, _ := list.find(operateToken)
		require.Equal(t, identity{name: "a", role: roleOperate}, who)

		write("read b "+readToken+"\n", 0o600)
		require.True(t, knows(readToken))
		require.False(t, knows(operateToken), "a token that was taken out still counts")

		for _, broken := range []string{
			"read b", "root b " + readToken, "read b short", "read b " + readToken + " x", "read local " + readToken,
			"read b " + readToken + "\nread b " + peerToken, "read b " + readToken + "\nread c " + readToken,
		} {
			write(broken, 0o600)
			require.True(t, knows(readToken), broken)
			require.False(t, knows(peerToken))
		}
		write("operate a "+operateToken+"\n", 0o644)
		require.False(t, knows(operateToken), "a file that others can read counts")
		require.Contains(t, log.String(), "chmod 600")
		require.NoError(t, os.Chmod(path, 0o600))
		time.Sleep(tokensCheckEvery)
		require.True(t, knows(operateToken), "the remedy helps")
		require.False(t, knows(readToken))
		require.NoError(t, os.Remove(path))
		time.Sleep(tokensCheckEvery)
		require.True(t, knows(operateToken))

		write("# nobody\n", 0o600)
		require.False(t, knows(operateToken))
		for _, secret := range []string{readToken, operateToken, peerToken} {
			require.NotContains(t, log.String(), secret)
		}
	})
}

func TestEnsureTokens(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens")
	made, err := EnsureTokens(path)
	require.NoError(t, err)
	require.True(t, made)
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode())
	data, err := os.ReadFile(path)
	require.NoError(t, err)
	fields := strings.Fields(string(data))
	_, ok := OpenTokens(path, slog.New(slog.DiscardHandler)).find(fields[len(fields)-1])
	require.True(t, ok)

	made, err = EnsureTokens(path)
	require.NoError(t, err)
	require.False(t, made)
	again, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, data, again)
	left, err := os.ReadDir(filepath.Dir(path))
	require.NoError(t, err)
	require.Len(t, left, 1)

	require.NoError(t, os.WriteFile(path, []byte("operator x y\n"), 0o600))
	_, err = EnsureTokens(path)
	require.Equal(t, api.Invalid, api.CodeOf(err))
	require.ErrorContains(t, err, path, "whoever is to put it right must find it")
	require.NoError(t, os.Chmod(path, 0o640))
	_, err = EnsureTokens(path)
	require.Equal(t, api.Invalid, api.CodeOf(err))
	require.NoError(t, os.Remove(path))
	require.NoError(t, os.Mkdir(path, 0o700))
	_, err = EnsureTokens(path)
	require.Equal(t, api.Invalid, api.CodeOf(err))
	_, err = EnsureTokens(filepath.Join(path, "missing", "tokens"))
	require.Equal(t, api.Unavailable, api.CodeOf(err))
}
