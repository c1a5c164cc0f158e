package service

import (
	"context"
	"sync"
	"time"
)

// sharedBound is how long an answer that many wait for may take.
const sharedBound = 30 * time.Second

// flights lets many callers of one question share one answer. An answer goes only to those
// who asked before its making began, so nobody gets a state from before the call.
type flights struct {
	mu      sync.Mutex
	running map[string]*flight
	waiting map[string]*flight // begins when the running one has ended
}

// flight is one making of an answer.
type flight struct {
	done  chan struct{}
	value any
	err   error
}

// shared returns what f makes, alone or together with others who ask for the same key, which
// stands for one T. f gets a context that does not end with that of the caller.
func shared[T any](ctx context.Context, s *Service, key string, f func(context.Context) (T, error)) (T, error) {
	g := &s.flights
	g.mu.Lock()
	fl := g.waiting[key]
	if fl == nil {
		fl = &flight{done: make(chan struct{})}
		before := g.running[key]
		if before == nil {
			g.running[key] = fl
		} else {
			g.waiting[key] = fl
		}
		g.mu.Unlock()
		fly(ctx, g, key, fl, before, f)
	} else {
		g.mu.Unlock()
	}
	select {
	case <-fl.done:
	case <-ctx.Done():
		var none T
		return none, context.Cause(ctx)
	}
	value, _ := fl.value.(T) // nil after an error
	return value, fl.err
}

func fly[T any](ctx context.Context, g *flights, key string, fl, before *flight, f func(context.Context) (T, error)) {
	if before != nil {
		<-before.done
		g.mu.Lock()
		delete(g.waiting, key)
		g.running[key] = fl
		g.mu.Unlock()
	}
	defer func() {
		g.mu.Lock()
		delete(g.running, key)
		g.mu.Unlock()
		close(fl.done)
	}()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), sharedBound)
	defer cancel()
	fl.err = context.DeadlineExceeded // should f panic
	fl.value, fl.err = f(ctx)
}
