package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/integration/appclient"
	"cloudlet/integration/figures"

	"github.com/stretchr/testify/require"
)

// good is a run in which all targets are met, just.
func good() *results {
	r := &results{Bound: 300, Rounds: 3, Host: "Measured here"}
	for _, c := range conditions() {
		made := &cell{Name: c.name(), condition: c}
		for _, more := range []float64{0, -0.1, 1} {
			made.Handoffs = append(made.Handoffs, handoffSample{Pause: mostPause + more, Published: mostPause + more, Gap: mostGap + more, Bytes: 110, Residue: residue{Zstd: 100}})
			made.QEMU = append(made.QEMU, qemuSample{Pause: 2, Bytes: 1 << 20})
		}
		r.Cells = append(r.Cells, made)
	}
	return r
}

func find(r *results, name string) *cell {
	for _, c := range r.Cells {
		if c.Name == name {
			return c
		}
	}
	return nil
}

func missed(r *results) (list []string) {
	for _, t := range r.targets() {
		if !t.Met() {
			list = append(list, t.What)
		}
	}
	return list
}

// TestTargets: a target that is missed is said to be, and only that one.
func TestTargets(t *testing.T) {
	require.Len(t, good().targets(), 4)
	require.Empty(t, missed(good()))
	for _, test := range []struct {
		name   string
		change func(r *results)
		want   []string
	}{
		{"pause", func(r *results) { find(r, "128-idle-1g").Handoffs[0].Published = 0.31 }, []string{"pause, 128 MiB, idle, 1 Gbit/s"}},
		{"gap", func(r *results) { find(r, "128-idle-1g").Handoffs[0].Gap = 0.71 }, []string{"client gap, 128 MiB, idle, 1 Gbit/s"}},
		{"bytes", func(r *results) {
			c := find(r, "128-idle-1g")
			c.Handoffs[0].Bytes, c.Handoffs[1].Bytes = 111, 111
		}, []string{"bytes, 128 MiB, idle, 1 Gbit/s"}},
		{"slow gap", func(r *results) {
			for i := range 2 {
				find(r, "128-idle-38m").Handoffs[i].Gap = 2.1
			}
		}, []string{"client gap, 128 MiB, idle, 38 Mbit/s, 20 ms"}},
		{"another cell", func(r *results) { find(r, "16-idle-1g").Handoffs[0].Published = 9 }, nil},
		{"given up", func(r *results) { find(r, "128-idle-38m").HandoffCut = true }, []string{"client gap, 128 MiB, idle, 38 Mbit/s, 20 ms"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := good()
			test.change(r)
			require.Equal(t, test.want, missed(r))
		})
	}
}

// TestTable: each cell has a line, also one that was given up at once.
func TestTable(t *testing.T) {
	r := good()
	c := find(r, "128-churn-38m")
	c.Handoffs, c.QEMU, c.HandoffCut, c.QEMUCut = nil, nil, true, true
	for _, table := range []string{r.table(), r.markdown()} {
		for _, c := range r.Cells {
			require.Contains(t, table, c.text())
		}
		require.Equal(t, 2, strings.Count(table, "> 300 s once"))
	}
}

// TestReadmeTable: the README's table is that of docs/bench-handoff.json.
func TestReadmeTable(t *testing.T) {
	table, err := figures.Table("../../../README.md", tableName)
	require.NoError(t, err)
	b, err := os.ReadFile("../../../docs/bench-handoff.json")
	if os.IsNotExist(err) {
		require.Empty(t, table, "nothing was published")
		return
	}
	require.NoError(t, err)
	var r results
	require.NoError(t, json.Unmarshal(b, &r))
	require.Equal(t, r.markdown(), table)
}

func TestChoose(t *testing.T) {
	b := bench{rounds: 1}
	require.NoError(t, b.choose("128-idle-38m,16-churn-1g"))
	require.Len(t, b.r.Cells, 2)
	require.Equal(t, condition{Fill: 16, Churn: churnKiB, Link: fast}, b.r.Cells[0].condition)
	require.ErrorContains(t, b.choose("16-idle-5g"), "128-churn-38m")
	require.Len(t, cellNames(), 8)
}

const sourceLog = `time=2026-11-23T06:12:54.500Z level=INFO msg="handoff round" handoff=abc round=1 final=false dirty=1
time=2026-11-23T06:12:54.700Z level=INFO msg="handoff round" handoff=other round=2 final=true dirty=1
time=2026-11-23T06:12:54.900Z level=INFO msg="handoff round" handoff=abc round=2 final=true dirty=1
`

const destinationLog = `time=2026-11-23T06:12:54.000Z level=INFO msg="handoff to here" handoff=abc instance=i state=accepted
time=2026-11-23T06:12:55.000Z level=INFO msg="handoff to here" handoff=abc instance=i state=prepared
time=2026-11-23T06:12:55.050Z level=INFO msg="handoff to here" handoff=abc instance=i state=complete
`

// TestSplit: the moments come from the logs, and the parts add up to the gap.
func TestSplit(t *testing.T) {
	at := func(ms int) time.Time {
		return time.Date(2026, 11, 23, 6, 12, 54, 0, time.UTC).Add(time.Duration(ms) * time.Millisecond)
	}
	moved := api.HandedOff{Handoff: "abc", Pause: 0.2}
	gap := appclient.Silence{Begin: at(690), Found: at(1080), End: at(1300)}
	s, err := newSplit(sourceLog, destinationLog, moved, gap)
	require.NoError(t, err)
	require.InDeltaSlice(t, []float64{0.01, 0.2, 0.1, 0.05, 0.03, 0.22}, s.parts(), 1e-6)
	require.InDelta(t, 0.35, s.Runs, 1e-6)
	sum := 0.0
	for _, d := range s.parts() {
		sum += d
	}
	require.InDelta(t, gap.Length().Seconds(), sum, 1e-6)
	require.Len(t, partNames(), len(s.parts()))

	_, err = newSplit(strings.ReplaceAll(sourceLog, "final=true", "final=false"), destinationLog, moved, gap)
	require.ErrorContains(t, err, "final=true")
	_, err = newSplit(sourceLog, strings.ReplaceAll(destinationLog, "complete", "lost"), moved, gap)
	require.ErrorContains(t, err, "state=complete")
	_, err = newSplit(sourceLog, destinationLog, moved, appclient.Silence{Begin: at(0), End: at(1)})
	require.ErrorContains(t, err, "longest silence")
}

// TestPublish: the documents are what was measured, and a miss is an error all the same.
func TestPublish(t *testing.T) {
	root := t.TempDir()
	b := bench{r: *good(), out: filepath.Join(root, "out.json"), publish: root}
	require.Error(t, figures.HasTable(figures.Readme(root), tableName))
	require.NoError(t, os.WriteFile(figures.Readme(root), []byte("a\n<!-- bench-handoff: begin -->\n<!-- bench-handoff: end -->\nb\n"), 0o644))
	require.NoError(t, figures.HasTable(figures.Readme(root), tableName))
	require.NoError(t, b.report())
	text, err := os.ReadFile(figures.Readme(root))
	require.NoError(t, err)
	require.Contains(t, string(text), b.r.markdown())
	published, err := os.ReadFile(filepath.Join(root, "docs", "bench-handoff.json"))
	require.NoError(t, err)
	measured, err := os.ReadFile(b.out)
	require.NoError(t, err)
	require.Equal(t, measured, published)
	find(&b.r, "128-idle-38m").HandoffCut = true
	require.ErrorIs(t, b.report(), figures.ErrMissed)
}
