package overlay

import (
	"context"
	"sync"
	"time"
)

// gate tells background fetches whether a demand is under way. The zero value is open.
type gate struct {
	mu      sync.Mutex
	demands int
	opens   chan struct{} // while demands are under way: closed when the last has left
	left    time.Time     // when the last did
}

func (g *gate) enter() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.demands == 0 {
		g.opens = make(chan struct{})
	}
	g.demands++
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.demands--; g.demands == 0 {
		close(g.opens)
		g.opens, g.left = nil, time.Now()
	}
}

// closed returns nil if no demand is under way, else what is closed once none is.
func (g *gate) closed() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.opens
}

// since returns how long there has been no demand.
func (g *gate) since() time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	return time.Since(g.left)
}

// wait returns once no demand is under way, or ctx has ended.
func (g *gate) wait(ctx context.Context) error {
	for {
		opens := g.closed()
		if opens == nil {
			return context.Cause(ctx)
		}
		if err := waitFor(ctx, opens); err != nil {
			return err
		}
	}
}

// waitFor waits until c is closed or ctx ends, which is an error.
func waitFor(ctx context.Context, c <-chan struct{}) error {
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// rest waits for d, or until ctx ends, which is an error.
func rest(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
