package launches

import (
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestFind(t *testing.T) {
	all, err := Find(nil)
	require.NoError(t, err)
	require.Len(t, all, 2)
	some, err := Find([]string{"node"})
	require.NoError(t, err)
	require.Len(t, some, 1)
	require.Equal(t, "node", some[0].Name)
	_, err = Find([]string{"db", "jvm"})
	require.EqualError(t, err, `find application "jvm": there are db, node`)
}

// TestStepsFit: each line can be typed at a terminal, and names only files that there are.
func TestStepsFit(t *testing.T) {
	for _, a := range Applications() {
		t.Run(a.Name, func(t *testing.T) {
			there := map[string]bool{}
			for _, name := range a.fileNames() {
				there[path.Join(a.folder(), name)] = true
			}
			require.NotEmpty(t, there)
			named := regexp.MustCompile(regexp.QuoteMeta(a.folder()) + `/[^\s"]+`)
			for _, s := range a.allSteps("10.0.2.2:65535", time.Unix(1, 0)) {
				require.NotEmpty(t, s.Lines, s.Title)
				for _, line := range s.Lines {
					require.Less(t, len(line), 1000, line)
					require.False(t, strings.ContainsAny(line, "\n\r"), line)
					for _, file := range named.FindAllString(line, -1) {
						require.True(t, there[file], "%s in %s", file, line)
					}
				}
			}
		})
	}
}

func TestHandler(t *testing.T) {
	for _, a := range Applications() {
		h, err := a.handler()
		require.NoError(t, err)
		for _, name := range a.fileNames() {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest("GET", "/"+name, nil))
			require.Equal(t, 200, w.Code, name)
			want, err := os.ReadFile(filepath.Join("files", a.Name, name))
			require.NoError(t, err)
			require.Equal(t, string(want), w.Body.String())
		}
	}
}

func TestKey(t *testing.T) {
	list := filepath.Join(t.TempDir(), "packages.txt")
	require.NoError(t, os.WriteFile(list, []byte("a 1\n"), 0o644))
	key := func(a Application, base, strategy string) string {
		k, err := a.key(base, list, strategy)
		require.NoError(t, err)
		return k
	}
	db, other := database(), node()
	one := key(db, "base", "balanced")
	require.Equal(t, one, key(database(), "base", "balanced"))
	require.NotEqual(t, one, key(other, "base", "balanced"))
	require.NotEqual(t, one, key(db, "another", "balanced"))
	require.NotEqual(t, one, key(db, "base", "small"))
	db.packages = append(db.packages, "x")
	require.NotEqual(t, one, key(db, "base", "balanced"))
	require.NoError(t, os.WriteFile(list, []byte("a 2\n"), 0o644))
	require.NotEqual(t, one, key(database(), "base", "balanced"))
	_, err := db.key("base", "/none", "")
	require.ErrorIs(t, err, os.ErrNotExist)
}
