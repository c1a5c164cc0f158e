package figures

import (
	"math"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestMedian(t *testing.T) {
	v := []float64{3, 1, 2}
	require.Equal(t, 2.0, Median(v))
	require.Equal(t, []float64{3, 1, 2}, v)
	require.Equal(t, 2.5, Median([]float64{4, 1, 2, 3}))
}

func TestTarget(t *testing.T) {
	most := Target{What: "first answer", Bound: 0.5, Value: 0.5, Unit: "s", Decimals: 2}
	require.True(t, most.Met())
	require.Contains(t, most.String(), "target at most 0.50, measured 0.50 s: pass")
	most.Value = 0.51
	require.Contains(t, most.String(), ": MISS")
	least := Target{Bound: 8, Value: 7, Least: true}
	require.Contains(t, least.String(), "target at least 8, measured 7 : MISS")
	least.Value = 8
	require.True(t, least.Met())
	for _, least := range []bool{false, true} {
		require.False(t, Target{Value: math.NaN(), Least: least}.Met(), "what could not be measured is a miss")
	}
}

// TestTable: a table changes, and nothing around it.
func TestTable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "README.md")
	require.NoError(t, os.WriteFile(path, []byte("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n"), 0o644))
	require.NoError(t, PutTable(path, "x", "new\nlines\n"))
	table, err := Table(path, "x")
	require.NoError(t, err)
	require.Equal(t, "new\nlines\n", table)
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "a\n<!-- x: begin -->\nnew\nlines\n<!-- x: end -->\nb\n", string(text))
	require.ErrorContains(t, PutTable(path, "y", ""), "<!-- y: begin -->")
}

func TestPublication(t *testing.T) {
	root := t.TempDir()
	p := Publication{Name: "bench", Results: map[string]int{"n": 1}, Picture: "<svg/>", Table: "| n | 1 |\n"}
	require.ErrorIs(t, p.Put(root), os.ErrNotExist, "no README")
	require.ErrorIs(t, HasTable(Readme(root), "bench"), os.ErrNotExist)
	require.NoError(t, os.WriteFile(Readme(root), []byte("a\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nb\n"), 0o644))
	require.NoError(t, HasTable(Readme(root), "bench"))
	require.Error(t, HasTable(Readme(root), "other"))
	require.NoError(t, p.Put(root))
	for name, want := range map[string]string{
		"README.md":       "a\n<!-- bench: begin -->\n| n | 1 |\n<!-- bench: end -->\nb\n",
		"docs/bench.json": "{\n \"n\": 1\n}\n",
		"docs/bench.svg":  "<svg/>",
	} {
		b, err := os.ReadFile(filepath.Join(root, name))
		require.NoError(t, err)
		require.Equal(t, want, string(b), name)
	}
	p.Name, p.Picture = "other", ""
	require.ErrorContains(t, p.Put(root), "has no lines")
	require.NoFileExists(t, filepath.Join(root, "docs", "other.svg"))
}

func TestHost(t *testing.T) {
	host, err := Host()
	require.NoError(t, err)
	require.Contains(t, host, "cores")
}
