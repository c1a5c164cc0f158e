package overlay

import (
	"container/list"
	"context"
	"fmt"
	"runtime/debug"
	"sync"
)

// frameKey names a decoded frame: the overlay's place in its chain, and the frame.
type frameKey struct{ level, frame int }

// frameCache holds decoded frames up to a number of bytes and lets each be loaded by one
// caller at a time; the others wait for it.
type frameCache struct {
	limit int
	wg    sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	used    int
	entries map[frameKey]*list.Element // of *cachedFrame
	order   list.List                  // most recently used first
	hits    int64
	loads   int64
}

type cachedFrame struct {
	key   frameKey
	ready chan struct{} // closed when pages and err are set
	pages []byte
	err   error
}

func newFrameCache(limit int) *frameCache {
	return &frameCache{limit: limit, entries: make(map[frameKey]*list.Element)}
}

// get returns the pages of a frame, from the cache or by load, which runs detached from ctx:
// a caller that goes away leaves the load to those who wait for it. life bounds the load. A
// failed load is not kept. Where a load is quick, here makes it run in the first caller's
// goroutine: another one costs two wake-ups, as long as decoding.
func (c *frameCache) get(ctx, life context.Context, key frameKey, here bool, load func(context.Context) ([]byte, error)) ([]byte, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, ErrClosed
	}
	el, ok := c.entries[key]
	if ok {
		c.hits++
		c.order.MoveToFront(el)
	} else {
		c.loads++
		el = c.order.PushFront(&cachedFrame{key: key, ready: make(chan struct{})})
		c.entries[key] = el
		c.wg.Add(1)
	}
	f := el.Value.(*cachedFrame)
	c.mu.Unlock()
	switch {
	case ok:
	case here:
		c.load(life, el, load)
	default:
		go c.load(life, el, load)
	}
	select {
	case <-f.ready:
		return f.pages, f.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// has reports whether a frame is decoded, or is being decoded.
func (c *frameCache) has(key frameKey) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, ok := c.entries[key]
	return ok
}

func (c *frameCache) load(ctx context.Context, el *list.Element, load func(context.Context) ([]byte, error)) {
	defer c.wg.Done()
	f := el.Value.(*cachedFrame)
	pages, err := survive(ctx, load)
	c.mu.Lock()
	defer c.mu.Unlock()
	f.pages, f.err = pages, err
	close(f.ready)
	if f.err != nil {
		c.removeLocked(el)
		return
	}
	c.used += len(f.pages)
	for old := c.order.Back(); old != nil && c.used > c.limit; {
		prev := old.Prev()
		if g := old.Value.(*cachedFrame); g.pages != nil {
			c.used -= len(g.pages)
			c.removeLocked(old)
		}
		old = prev
	}
}

// survive calls load and makes an error of a panic: decoders are given a stranger's bytes,
// and the process may serve the memory of running guests.
func survive(ctx context.Context, load func(context.Context) ([]byte, error)) (pages []byte, err error) {
	defer func() {
		if p := recover(); p != nil {
			pages, err = nil, fmt.Errorf("load frame: panic: %v\n%s", p, debug.Stack())
		}
	}()
	return load(ctx)
}

func (c *frameCache) removeLocked(el *list.Element) {
	c.order.Remove(el)
	delete(c.entries, el.Value.(*cachedFrame).key)
}

// begin counts a call that close waits for, until wg.Done, unless the cache is closed.
func (c *frameCache) begin() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.wg.Add(1)
	}
	return !c.closed
}

// close refuses further calls and waits for the loads under way, whose context the caller
// has ended.
func (c *frameCache) close() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.wg.Wait()
}
