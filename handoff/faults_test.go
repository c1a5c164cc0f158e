package handoff

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// explore runs every plan of up to depth faults, each later than the one before, and returns
// how many runs that were and the first few that went wrong. stride is 1, but the race
// detector makes a run ten times slower and looks for something else: there only every
// stride-th later fault is tried.
func explore(ctx context.Context, depth int, rules mutations, enough int) (runs int64, bad []string) {
	var count atomic.Int64
	var mu sync.Mutex
	var visit func(plan []planned, depth int)
	full := func() bool {
		mu.Lock()
		defer mu.Unlock()
		return len(bad) >= enough
	}
	one := func(plan []planned) []point {
		w := newWorld(plan, rules)
		w.run(ctx)
		count.Add(1)
		if len(w.bad) > 0 {
			mu.Lock()
			defer mu.Unlock()
			if len(bad) < enough {
				bad = append(bad, fmt.Sprintf("%s: %q\n  %s", describe(plan, w.trace), w.bad, journey(w.trace)))
			}
		}
		return w.trace
	}
	children := func(plan []planned, trace []point, yield func([]planned)) {
		n := 0
		from := 0
		if len(plan) > 0 {
			from = plan[len(plan)-1].at + 1
		}
		for at := from; at < len(trace); at++ {
			for _, f := range trace[at].kinds {
				if n++; len(plan) > 0 && n%stride != 0 {
					continue
				}
				yield(append(plan[:len(plan):len(plan)], planned{at: at, f: f}))
			}
		}
	}
	visit = func(plan []planned, depth int) {
		if full() {
			return
		}
		if trace := one(plan); depth > 0 {
			children(plan, trace, func(p []planned) { visit(p, depth-1) })
		}
	}
	trace := one(nil)
	if depth == 0 {
		return count.Load(), bad
	}
	work := make(chan []planned)
	var group sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		group.Go(func() {
			for plan := range work {
				visit(plan, depth-1)
			}
		})
	}
	children(nil, trace, func(p []planned) { work <- p })
	close(work)
	group.Wait()
	return count.Load(), bad
}

func TestNoFault(t *testing.T) {
	w := newWorld(nil, mutations{})
	w.run(t.Context())
	require.Empty(t, w.bad)
	require.Equal(t, "done", stateOf(w.disk["source"]))
	require.Equal(t, "closed", stateOf(w.disk["destination"]))
	require.Equal(t, w.acked, w.there.writes)
	t.Log(len(w.trace), "points:", journey(w.trace))
}

func TestEveryFault(t *testing.T) {
	for depth := 1; depth <= 2; depth++ {
		n, bad := explore(t.Context(), depth, mutations{}, 8)
		t.Logf("%d faults: %d runs", depth, n)
		for _, b := range bad {
			t.Error(b)
		}
		if t.Failed() {
			return
		}
	}
}

// TestManyFaults runs plans of three and four faults drawn at random.
func TestManyFaults(t *testing.T) {
	seed := uint64(1)
	if s := os.Getenv("CLOUDLET_SEED"); s != "" {
		var err error
		seed, err = strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
	}
	t.Log("seed", seed)
	r := rand.New(rand.NewPCG(seed, 6))
	for range 6000 / stride {
		var plan []planned
		for len(plan) < 3+r.IntN(2) {
			w := newWorld(plan, mutations{})
			w.run(t.Context())
			from := 0
			if len(plan) > 0 {
				from = plan[len(plan)-1].at + 1
			}
			at := from + r.IntN(12)
			if at >= len(w.trace) || len(w.trace[at].kinds) == 0 {
				break
			}
			plan = append(plan, planned{at: at, f: w.trace[at].kinds[r.IntN(len(w.trace[at].kinds))]})
		}
		w := newWorld(plan, mutations{})
		w.run(t.Context())
		require.Empty(t, w.bad, "%s\n%s", describe(plan, w.trace), journey(w.trace))
	}
}

// TestRareFaults runs plans of more than two faults that a machine once might have failed.
func TestRareFaults(t *testing.T) {
	for _, tc := range []struct {
		name string
		plan []planned
	}{
		{"go may be on record, and abort cannot be written", []planned{
			{name: "source store going", at: 1, f: unreadable}, {name: "source store aborting", at: 1, f: failBefore}, {name: "source continue", at: 1, f: crashAfter}}},
		{"go may be on record, abort cannot be written, the host restarts", []planned{
			{name: "source store going", at: 1, f: unreadable}, {name: "source store aborting", at: 1, f: failBefore}, {name: "send abort", at: 1, f: powerAfter}}},
		{"go is written in spite of errors, and abort cannot be", []planned{
			{name: "source store going", at: 1, f: failAfter}, {name: "source store going", at: 2, f: failBefore},
			{name: "source store aborting", at: 1, f: failBefore}, {name: "source continue", at: 1, f: crashAfter}}},
		{"go may be on record, and nothing else can be written", []planned{
			{name: "source store going", at: 1, f: unreadable}, {name: "source store pausing", at: 2, f: failBefore},
			{name: "source store aborting", at: 1, f: failBefore}, {name: "source continue", at: 1, f: crashAfter}}},
		{"superseded cannot be written, then a restart", []planned{
			{name: "send ask", at: 1, f: cutResolve}, {name: "destination store superseded", at: 1, f: failBefore}, {name: "destination pause", at: 1, f: crashAfter}}},
		{"superseded before running was written, then a restart", []planned{
			{name: "destination store running", at: 1, f: crashBefore}, {name: "send go", at: 2, f: cutResolve}, {name: "destination store superseded", at: 1, f: crashAfter}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(tc.plan, mutations{})
			w.run(t.Context())
			require.Empty(t, w.bad, journey(w.trace))
			require.Equal(t, len(tc.plan), w.fired, "not every fault came by: %s", journey(w.trace))
		})
	}
}
