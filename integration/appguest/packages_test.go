package appguest

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"cloudlet/integration/need"
)

func TestSourcesFrom(t *testing.T) {
	for _, test := range []struct {
		name, targets string
		want          []string
	}{
		{"nothing known", "", []string{"http://deb.debian.org/debian/ bookworm main", "http://deb.debian.org/debian-security/ bookworm-security main"}},
		{"a mirror", "Debian bookworm http://mirror/debian/\n", []string{"http://mirror/debian/ bookworm main", "http://deb.debian.org/debian/ bookworm-updates main"}},
		{"not Debian's, another release", "nginx bookworm http://other/\nDebian trixie http://mirror/\n", []string{"http://deb.debian.org/debian/ bookworm main"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			got := sourcesFrom(test.targets)
			require.Equal(t, 3, strings.Count(got, "\n"))
			for _, line := range test.want {
				require.Contains(t, got, line+"\n")
			}
			require.NotContains(t, got, "other")
			require.Equal(t, 3, strings.Count(got, "signed-by="))
		})
	}
}

func TestParseURIs(t *testing.T) {
	got := parseURIs("Reading...\n'http://m/a_1%3a2.deb' a_1%3a2_amd64.deb 12 SHA256:00\n'http://m/b.deb' ../b.deb 12 \n'x'\n'http://m/c.deb' c.deb 7 \n")
	require.Equal(t, []debian{{"a_1%3a2_amd64.deb", 12}, {"c.deb", 7}}, got)
}

func TestURLName(t *testing.T) {
	require.Equal(t, "a_1-3a2.0-b1-deb12_amd64.deb", urlName("a_1%3a2.0+b1~deb12_amd64.deb"))
}

// mirror is an apt repository that answers 503 for names in broken.
type mirror struct {
	files http.Handler

	mu     sync.Mutex
	broken string
	served map[string]int
}

func (m *mirror) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	bad := m.broken != "" && strings.Contains(r.URL.Path, m.broken)
	if !bad {
		m.served[filepath.Base(r.URL.Path)]++
	}
	m.mu.Unlock()
	if bad {
		http.Error(w, "out of order", http.StatusServiceUnavailable)
		return
	}
	m.files.ServeHTTP(w, r)
}

func (m *mirror) breakAt(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.broken = name
}

// TestDownloadGoesOn: a mirror that goes away half way is named with a remedy, and what was
// fetched before is not fetched again.
func TestDownloadGoesOn(t *testing.T) {
	need.Program(t, "apt-get")
	need.Program(t, "dpkg-deb")
	ctx, dir := t.Context(), t.TempDir()
	var packages []debian
	for _, name := range []string{"one", "two"} {
		control := filepath.Join(dir, name, "DEBIAN")
		require.NoError(t, os.MkdirAll(control, 0o755))
		text := fmt.Sprintf("Package: %s\nVersion: 1:2+b~1\nArchitecture: amd64\nMaintainer: nobody\nDescription: %s\n", name, name)
		require.NoError(t, os.WriteFile(filepath.Join(control, "control"), []byte(text), 0o644))
		file := name + "_1%3a2+b~1_amd64.deb"
		out, err := exec.CommandContext(ctx, "dpkg-deb", "-b", "--root-owner-group", filepath.Join(dir, name), filepath.Join(dir, file)).CombinedOutput()
		require.NoError(t, err, string(out))
		packages = append(packages, debian{file: file})
	}
	repo := filepath.Join(dir, "repo")
	list, err := writeRepository(ctx, repo, dir, packages, "base")
	require.NoError(t, err)
	require.Regexp(t, `^one 1:2\+b~1 amd64 [0-9a-f]{64} base\ntwo `, list)

	m := &mirror{files: http.FileServer(http.Dir(repo)), served: map[string]int{}}
	server := httptest.NewServer(m)
	defer server.Close()
	archives := filepath.Join(dir, "archives")
	a, err := newAPT(filepath.Join(dir, "apt"), archives, "deb [trusted=yes] "+server.URL+" ./\n")
	require.NoError(t, err)
	m.breakAt("Packages")
	require.ErrorContains(t, a.update(ctx), "check that the Debian mirror is reachable")
	m.breakAt("")
	require.NoError(t, a.update(ctx))
	resolved, err := a.resolve(ctx, []string{"one", "two"})
	require.NoError(t, err)
	require.Len(t, resolved, 2)

	m.breakAt("two_")
	err = a.download(ctx, []string{"one", "two"})
	require.ErrorContains(t, err, "503")
	require.ErrorContains(t, err, "what is downloaded is kept")
	require.FileExists(t, filepath.Join(archives, packages[0].file))
	m.breakAt("")
	require.NoError(t, a.download(ctx, []string{"one", "two"}))
	require.FileExists(t, filepath.Join(archives, packages[1].file))
	require.Equal(t, 1, m.served["one_1-3a2-b-1_amd64.deb"])
	require.Equal(t, 1, m.served["two_1-3a2-b-1_amd64.deb"])
	again, err := a.resolve(ctx, []string{"one", "two"})
	require.NoError(t, err)
	require.Equal(t, resolved, again)
}
