package main

import (
	"encoding/json"
	"os"
	"testing"

	"cloudlet/integration/demoguest"
	"cloudlet/integration/figures"

	"github.com/stretchr/testify/require"
)

// TestReadmeTable: the README's table and picture are those of docs/demo.json.
func TestReadmeTable(t *testing.T) {
	b, err := os.ReadFile("../../../docs/demo.json")
	require.NoError(t, err)
	var r results
	require.NoError(t, json.Unmarshal(b, &r))
	table, err := figures.Table("../../../README.md", tableName)
	require.NoError(t, err)
	rows := (&demo{Lab: &demoguest.Lab{}}).rows()
	require.Equal(t, markdown(rows, &r), table)
	svg, err := os.ReadFile("../../../docs/demo.svg")
	require.NoError(t, err)
	require.Equal(t, picture(rows, &r), string(svg))
}

func TestMedian(t *testing.T) {
	require.Equal(t, 2.0, figures.Median([]float64{3, 1, 2}))
	require.Equal(t, 2.5, figures.Median([]float64{4, 1, 2, 3}))
}

// TestJudge: a target that is missed is said to be.
func TestJudge(t *testing.T) {
	good := results{FirstResponse: 1, Floor: 0.9, Eager: 10, SecondInstance: 0.9, SecondRead: 1 << 19, OverlayBytes: 80, EagerBytes: 100,
		All: map[string][]float64{"floor": {0.8, 0.9, 1}}}
	require.False(t, good.judge())
	for name, change := range map[string]func(*results){
		"slow":    func(r *results) { r.FirstResponse = 1.5 },
		"eager":   func(r *results) { r.Eager = 7.9 },
		"second":  func(r *results) { r.SecondInstance = 1.1 },
		"reads":   func(r *results) { r.SecondRead = 2 << 20 },
		"overlay": func(r *results) { r.OverlayBytes = 91 },
	} {
		bad := good
		change(&bad)
		require.True(t, bad.judge(), name)
	}
}
