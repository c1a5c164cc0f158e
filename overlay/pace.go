package overlay

import (
	"context"
	"sync"
	"time"
)

const (
	// paceFirst and paceLeast bound the bytes under way while little is known of a link.
	paceFirst = 256 << 10
	paceLeast = 128 << 10
	// paceShare is how many requests share the bytes under way.
	paceShare = 4
	// paceRequest is the most bytes of a request that are not worth a division.
	paceRequest = 64 << 10
	// paceQueue is for how long what is under way may keep the link busy.
	paceQueue = 100 * time.Millisecond
	// paceAfter is how soon after a demand another one is likely, at most.
	paceAfter = 50 * time.Millisecond
)

// pace bounds the bytes that background fetches have under way: enough to fill the link,
// and not so many that a demand waits long behind them on a slow one. The bound is the
// measured rate times twice the shortest time of a request: below what fills the link it
// doubles, so a wrong measure mends itself. While a demand is under way the bound is half of
// what fills the link, and for a moment after it just what fills it, for another demand is
// likely. With none at all a guest that waits for one page after the other would keep the link
// idle, and wait for each page of its profile.
type pace struct {
	most, large int64         // bytes under way, and of a request, at most
	wake        chan struct{} // holds a token when a request has ended

	mu        sync.Mutex
	underWay  int64
	delivered int64
	rate      float64       // bytes a second, the best of late
	beside    bool          // the last request began beside a demand: the rate is not the link's
	least     time.Duration // the shortest time of a request
}

// paced is a request under way.
type paced struct {
	begin     time.Time
	bytes     int64
	delivered int64 // when it began
}

func newPace(most, large int64) *pace {
	return &pace{most: most, large: large, wake: make(chan struct{}, 1)}
}

func (p *pace) windowLocked() int64 {
	n := int64(paceFirst)
	if p.rate > 0 {
		n = max(paceLeast, int64(p.rate*max(paceQueue, 2*p.least).Seconds()))
	}
	return min(n, p.most)
}

// besideLocked is the bound while a demand is under way; 0 before anything is known.
func (p *pace) besideLocked() int64 {
	return min(int64(p.rate*p.least.Seconds()/2), p.most)
}

// wait waits until there is room for a request and returns how many bytes it should have at
// most. One goroutine at a time calls it.
func (p *pace) wait(ctx context.Context, g *gate) (int64, error) {
	for {
		demand, quiet := g.closed(), g.since()
		p.mu.Lock()
		under, beside, window := p.underWay, p.besideLocked(), p.windowLocked()
		after := min(paceAfter, 2*p.least)
		p.beside = demand != nil || quiet < after
		if demand == nil {
			beside *= 2
		}
		p.mu.Unlock()
		switch {
		case (demand != nil || quiet < after) && under < beside:
			return min(p.large, paceRequest), context.Cause(ctx)
		case demand == nil && quiet >= after && (under == 0 || under < window):
			return min(p.large, max(paceRequest, window/paceShare)), context.Cause(ctx)
		}
		var over <-chan time.Time
		if demand == nil && quiet < after {
			over = time.After(after - quiet)
		}
		select {
		case <-p.wake:
		case <-demand: // nil while there is none
		case <-over:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

func (p *pace) begin(n int64) paced {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.underWay += n
	return paced{time.Now(), n, p.delivered}
}

func (p *pace) end(r paced, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.underWay -= r.bytes
	if took := time.Since(r.begin); ok && took > 0 {
		p.delivered += r.bytes
		old := p.rate * 0.98
		if p.beside {
			old = p.rate // what keeps to half of it would halve it again and again
		}
		p.rate = max(float64(p.delivered-r.delivered)/took.Seconds(), old)
		if p.least == 0 || took < p.least {
			p.least = took
		}
	}
	select {
	case p.wake <- struct{}{}:
	default:
	}
}
