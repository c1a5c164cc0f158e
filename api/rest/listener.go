package rest

import (
	"net"
	"net/http"
	"sync"
)

// room bounds the open connections of listeners. The connections themselves stay what they
// are: net/http and connContext look at their types.
type room struct {
	mu   sync.Mutex
	held map[net.Conn]chan struct{} // whose slot a connection has
}

// bounded returns l with at most so many connections open at a time.
func (rm *room) bounded(l net.Listener, most int) net.Listener {
	return &boundedListener{Listener: l, room: rm, slots: make(chan struct{}, most), done: make(chan struct{})}
}

// changed is for http.Server.ConnState: it frees the slot of a connection that has ended.
func (rm *room) changed(c net.Conn, state http.ConnState) {
	if state != http.StateClosed && state != http.StateHijacked {
		return
	}
	rm.mu.Lock()
	slots, ok := rm.held[c]
	delete(rm.held, c)
	rm.mu.Unlock()
	if ok {
		<-slots
	}
}

type boundedListener struct {
	net.Listener
	room  *room
	slots chan struct{}
	once  sync.Once
	done  chan struct{}
}

// Accept waits for a slot, then for a connection.
func (l *boundedListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.done:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	l.room.mu.Lock()
	l.room.held[c] = l.slots
	l.room.mu.Unlock()
	return c, nil
}

// Close ends Accept.
func (l *boundedListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return l.Listener.Close()
}
