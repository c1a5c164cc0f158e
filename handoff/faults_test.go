package handoff

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// explore runs every plan of up to depth faults, each later than the one before, and returns
// how many runs that were and the first few that went wrong.
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
		from := 0
		if len(plan) > 0 {
			from = plan[len(plan)-1].at + 1
		}
		for at := from; at < len(trace); at++ {
			for _, f := range trace[at].kinds {
				yield(append(plan[:len(plan):len(plan)], planned{at, f}))
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
