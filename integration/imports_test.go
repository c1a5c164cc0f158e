package integration

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "cloudlet/"

// allowed says which packages of ours a package may import, directly. A name that ends in
// "/..." stands for itself and what is below it.
var allowed = map[string][]string{
	"overlay":                   {"overlay/vcdiff"},
	"overlay/vcdiff":            {},
	"overlay/source":            {},
	"overlay/source/sourcetest": {"overlay/source"},
	"fusefs":                    {},
	"vmm":                       {},
	"handoff":                   {"overlay"},
	"api":                       {},
	"api/service":               {"overlay", "overlay/source", "fusefs", "vmm", "handoff", "api"},
	"api/strict":                {"api"},
	"api/rest":                  {"api", "api/service", "api/strict"},
	"api/nova":                  {"api", "api/service", "api/strict"},
	"api/client":                {"api"},
	"cmd/cloudlet":              {"api/...", "overlay", "fusefs", "vmm"},
	"cmd/overlaybench":          {"overlay", "overlay/source", "overlay/vcdiff", "integration/figures"},
	"integration/...":           {"..."},
}

// outside names libraries that belong to one package of ours only.
var outside = map[string]string{
	"github.com/hanwen/go-fuse":     "fusefs",
	"libvirt.org/go":                "vmm",
	"github.com/elastic/go-seccomp": "vmm",
	"github.com/ulikunitz/xz":       "overlay",
	"github.com/klauspost/compress": "overlay",
	"github.com/spf13":              "cmd",
	"gonum.org/v1/plot":             "cmd/overlaybench",
	"github.com/google/pprof":       "cmd/overlaybench",
	"github.com/vbauerster/mpb":     "cmd",
	"github.com/prometheus":         "api/rest",
	"github.com/gophercloud":        "integration",
}

type listed struct {
	ImportPath string
	Imports    []string
}

// TestImports holds the packages to the star of ARCHITECTURE.md.
func TestImports(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports", "./...")
	cmd.Dir = ".."
	out, err := cmd.Output()
	require.NoError(t, err)
	dec := json.NewDecoder(strings.NewReader(string(out)))
	seen := 0
	for {
		var p listed
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		seen++
		name := strings.TrimPrefix(p.ImportPath, module)
		for _, bad := range violations(name, p.Imports) {
			t.Errorf("%s must not import %s", name, bad)
		}
	}
	require.Greater(t, seen, 6)
}

// TestImportsCanFail: the rules refuse what they are there to refuse.
func TestImportsCanFail(t *testing.T) {
	require.Empty(t, violations("overlay", []string{"fmt", "github.com/klauspost/compress/zstd"}))
	require.Len(t, violations("overlay", []string{module + "vmm", module + "overlay/source"}), 2)
	require.Len(t, violations("vmm", []string{"github.com/hanwen/go-fuse/v2/fs"}), 1)
	require.Len(t, violations("api/client", []string{module + "api/service"}), 1)
	require.Len(t, violations("cmd/cloudlet", []string{module + "integration"}), 1)
	require.Len(t, violations("helpers", nil), 1)
	require.Empty(t, violations("integration/guest", []string{module + "vmm"}))
}

func violations(name string, imports []string) []string {
	var may []string
	known := false
	for pattern, list := range allowed {
		if matches(pattern, name) {
			may, known = list, true
		}
	}
	if !known {
		return []string{"anything: it is not among the packages of the architecture"}
	}
	var bad []string
	for _, path := range imports {
		if ours, ok := strings.CutPrefix(path, module); ok {
			if !slices.ContainsFunc(may, func(pattern string) bool { return matches(pattern, ours) }) {
				bad = append(bad, path)
			}
			continue
		}
		for library, owner := range outside {
			if strings.HasPrefix(path, library) && name != owner && !strings.HasPrefix(name, owner+"/") && !strings.HasPrefix(name, "integration") {
				bad = append(bad, path)
			}
		}
	}
	return bad
}

func matches(pattern, name string) bool {
	if pattern == "..." {
		return true
	}
	if root, ok := strings.CutSuffix(pattern, "/..."); ok {
		return name == root || strings.HasPrefix(name, root+"/")
	}
	return pattern == name
}
