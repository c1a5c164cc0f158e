package launches

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// psql stands for PostgreSQL's: it prints what the test wants for the query in its arguments.
const psql = `#!/bin/sh
case "$*" in
*verify.sql*) printf '1\t2\n'; exit ${VERIFY:-0} ;;
*"select token, counter"*) echo t0 7 ;;
*account=8*) ;;
*account=9*) exit 1 ;;
*answer.sql*) echo "{\"token\":\"t0\",\"counter\":1,\"args\":\"$*\"}" ;;
*) exit 1 ;;
esac
`

// TestFront runs the database's front with another psql.
func TestFront(t *testing.T) {
	bin := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(bin, "psql"), []byte(psql), 0o755))
	script, err := filepath.Abs("files/db/front.sh")
	require.NoError(t, err)
	sum := sha256.Sum256([]byte("1\t2\n"))
	for _, test := range []struct {
		name, request string
		env           string
		status        int
		contains      string
	}{
		{"first", "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "", 200, "account=1 -f answer.sql bench"},
		{"account", "GET /?account=42 HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\n", "", 200, "account=42 -f"},
		{"verify", "GET /verify HTTP/1.1\r\n\r\n", "", 200, hex.EncodeToString(sum[:])},
		{"half a verify", "GET /verify HTTP/1.1\r\n\r\n", "VERIFY=3", 500, "error"},
		{"no account", "GET /?account=8 HTTP/1.1\r\n\r\n", "", 404, "no such account"},
		{"database away", "GET /?account=9 HTTP/1.1\r\n\r\n", "", 500, "does not answer"},
		{"not a number", "GET /?account=1;drop HTTP/1.1\r\n\r\n", "", 400, "want a number"},
		{"too long a number", "GET /?account=1234567890 HTTP/1.1\r\n\r\n", "", 400, "want a number"},
		{"elsewhere", "GET /etc HTTP/1.1\r\n\r\n", "", 404, "want /"},
		{"method", "POST / HTTP/1.1\r\n\r\n", "", 405, "want GET"},
	} {
		t.Run(test.name, func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), "bash", script)
			cmd.Env = []string{"PATH=" + bin + ":" + os.Getenv("PATH"), test.env}
			cmd.Stdin = strings.NewReader(test.request)
			out, err := cmd.Output()
			require.NoError(t, err)
			resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(string(out))), nil)
			require.NoError(t, err)
			body, err := io.ReadAll(resp.Body)
			require.NoError(t, err)
			require.NoError(t, resp.Body.Close())
			require.Equal(t, test.status, resp.StatusCode)
			require.Contains(t, string(body), test.contains)
			require.EqualValues(t, len(body), resp.ContentLength)
			require.True(t, json.Valid(body), string(body))
		})
	}
}
