package main

import (
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestQuantile(t *testing.T) {
	var hundred []float64
	for i := range 100 {
		hundred = append(hundred, float64(100-i))
	}
	require.Equal(t, 50.0, quantile(hundred, 0.5))
	require.Equal(t, 99.0, quantile(hundred, 0.99))
	require.Equal(t, 100.0, quantile(hundred, 1))
	require.Equal(t, 10.0, quantile(hundred[90:], 0.95))
	require.Equal(t, 7.0, quantile([]float64{7}, 0.5))
	require.Zero(t, quantile(nil, 0.5))
}

func TestFlatness(t *testing.T) {
	rss := slices.Repeat([]int64{1}, 60)                // on its way
	rss = append(rss, slices.Repeat([]int64{20}, 8)...) // a minute on
	rss = append(rss, slices.Repeat([]int64{90}, 200)...)
	rss = append(rss, slices.Repeat([]int64{30}, 15)...)
	early, late := flatness(rss)
	require.EqualValues(t, 20, early)
	require.EqualValues(t, 30, late)
	early, late = flatness([]int64{5})
	require.EqualValues(t, 5, early)
	require.EqualValues(t, 5, late)
	early, late = flatness([]int64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10})
	require.EqualValues(t, 4, early)
	require.EqualValues(t, 9, late)
}

// TestJudge: each target can be missed.
func TestJudge(t *testing.T) {
	good := func() *results {
		return &results{
			Pairs: &pairsResult{More: 0.009}, Burst: &burstResult{Mounts: 1, Most: 1},
			Crowd: &crowdResult{P99: 0.05, Early: 40 << 20, Late: 48 << 20}, Start: &startResult{Most: 1},
		}
	}
	require.False(t, good().judge())
	require.Len(t, good().targets(), 6)
	for name, spoil := range map[string]func(*results){
		"synthesis": func(r *results) { r.Pairs.More = 0.011 },
		"mounts":    func(r *results) { r.Burst.Mounts = 2 },
		"frames":    func(r *results) { r.Burst.Most = 1.004 },
		"gets":      func(r *results) { r.Crowd.P99 = 0.051 },
		"growth":    func(r *results) { r.Crowd.Late = 49 << 20 },
		"start":     func(r *results) { r.Start.Most = 1.1 },
	} {
		r := good()
		spoil(r)
		require.True(t, r.judge(), name)
	}
	large := good()
	large.Crowd.Early, large.Crowd.Late = 200<<20, 219<<20
	require.False(t, large.judge(), "a tenth of much is allowed")
}
