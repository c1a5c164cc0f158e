package main

import (
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	"cloudlet/api/service"
	"cloudlet/integration/figures"

	"github.com/stretchr/testify/require"
)

// fill makes a cell of these times and bytes.
func fill(r *results, link, way string, bytes int64, seconds ...float64) {
	c := r.cell(network{name: link}, way)
	for _, s := range seconds {
		c.Samples = append(c.Samples, sample{Seconds: s, Bytes: bytes, Peak: 100 << 20})
	}
}

func good() *results {
	r := &results{Bound: 120, OverlayBytes: 100 << 20, IndexBytes: 1 << 20}
	fill(r, local, floor, 0, 0.5, 0.4, 0.6)
	fill(r, local, push, 90<<20, 0.7, 0.8, 0.9)
	fill(r, local, profile, 6<<20, 0.55)
	fill(r, local, second, 1<<19, 0.6)
	fill(r, local, eager, 0, 9)
	fill(r, slow, profile, 10<<20, 4)
	fill(r, slow, eager, 100<<20, 25)
	return r
}

// TestTargets: a target that is missed is said to be, and only that one.
func TestTargets(t *testing.T) {
	require.Len(t, good().targets(), 8)
	require.False(t, judge(good().targets()))
	for name, c := range map[string]struct {
		change func(r *results)
		missed int
	}{
		"profile": {func(r *results) { r.find(local, profile).Samples[0].Seconds = 0.61 }, 1},
		"no profile": {func(r *results) {
			r.find(local, push).Samples[1].Seconds = 0.95
			r.find(local, eager).Samples[0].Seconds = 90
		}, 0},
		"eager":         {func(r *results) { r.find(local, eager).Samples[0].Seconds = 6 }, 1},
		"slow":          {func(r *results) { r.find(slow, profile).Samples[0].Seconds = 7 }, 1},
		"slow bytes":    {func(r *results) { r.find(slow, profile).Samples[0].Bytes = 21 << 20 }, 1},
		"second":        {func(r *results) { r.find(local, second).Samples[0].Seconds = 0.61 }, 1},
		"second reads":  {func(r *results) { r.find(local, second).Samples[0].Bytes = 2 << 20 }, 1},
		"memory":        {func(r *results) { r.find(slow, profile).Samples[0].Peak = 130 << 20 }, 1},
		"lazy given up": {func(r *results) { r.find(slow, profile).Cut = true }, 1},
		"eager given up": {func(r *results) {
			r.find(slow, eager).Cut, r.find(slow, eager).Samples = true, nil
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			r := good()
			c.change(r)
			missed := 0
			for _, x := range r.targets() {
				if !x.Met() {
					missed++
				}
			}
			require.Equal(t, c.missed, missed)
			r.explain(r.targets())
		})
	}
}

// TestWaits: quantiles are the bounds of the buckets in which they lie.
func TestWaits(t *testing.T) {
	h := service.Histogram{Count: 100, Sum: 3, Buckets: []service.Bucket{{Upper: 0.001, Count: 60}, {Upper: 0.01, Count: 90}, {Upper: 0.1, Count: 98}}}
	w := newWaits(h)
	require.Equal(t, waits{Count: 100, Long: 10, P50: 0.001, P99: 0.1, Sum: 3}, *w)
	require.Equal(t, waits{}, *newWaits(service.Histogram{}))
}

// TestPicture: it is well formed, names all that was measured, and shows what was given up.
func TestPicture(t *testing.T) {
	r := good()
	r.cell(network{name: "10m"}, eager).Cut = true
	svg := picture(r)
	dec := xml.NewDecoder(strings.NewReader(svg))
	for {
		_, err := dec.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
	}
	require.Contains(t, svg, "&gt; 120")
	require.Contains(t, svg, "10 Mbit/s, 50 ms")
	require.NotContains(t, svg, "1 Gbit/s")
	require.NotContains(t, svg, "NaN")
}

// TestChoose: names that do not exist are refused, with those that do.
func TestChoose(t *testing.T) {
	b := &bench{}
	require.NoError(t, b.choose("local,38m", "floor,profile"))
	require.Len(t, b.links, 2)
	require.Len(t, b.ways, 2)
	require.ErrorContains(t, (&bench{}).choose("2g", "floor"), "38m-loss")
	require.ErrorContains(t, (&bench{}).choose("local", "flor"), "own-eager")
}

// TestReadmeTable: the README's table is that of docs/bench-lazy.json.
func TestReadmeTable(t *testing.T) {
	table, err := figures.Table("../../../README.md", tableName)
	require.NoError(t, err)
	b, err := os.ReadFile("../../../docs/bench-lazy.json")
	require.NoError(t, err)
	var r results
	require.NoError(t, json.Unmarshal(b, &r))
	require.Equal(t, r.markdown(), table)
}
