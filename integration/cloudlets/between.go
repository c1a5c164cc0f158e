package cloudlets

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"cloudlet/handoff"
)

const (
	// betweenBound is how long a message may be held and take.
	betweenBound = 10 * time.Minute
	// tail is how much of an overlay is held back by HoldTails, in bytes: the end of the zip's
	// directory, which no guest waits for.
	tail = 16
)

// Between stands between the source of handoffs and their destination, in the source's
// namespace: it sees each message and its answer, and can hold and lose them. The destination
// is to be named by To; the source is to advertise Back. It is safe for concurrent use.
type Between struct {
	To, Back string // URLs

	lab      *Lab
	from, to *Cloudlet
	out      *http.Client
	servers  []func() error
	life     context.Context
	end      context.CancelFunc

	mu        sync.Mutex
	stops     []*Stop
	published []string
	held      chan struct{} // closed when tails are let go; nil: they are not held
}

// Passing is a message on its way, with its answer once there is one.
type Passing struct {
	Message handoff.Message
	Answer  *handoff.Answer
}

// String names it for a log.
func (p Passing) String() string {
	if p.Answer == nil {
		return fmt.Sprintf("%.8s %s", p.Message.Handoff, p.Message.Kind)
	}
	return fmt.Sprintf("%.8s %s answered %s", p.Message.Handoff, p.Message.Kind, p.Answer.State)
}

// Stop holds the first message or answer that it is about.
type Stop struct {
	at      func(Passing) bool
	reached chan Passing
	release chan bool // true: it is lost
	once    sync.Once
}

// Between makes one for handoffs from a cloudlet to another. Close it.
func (l *Lab) Between(from, to *Cloudlet) (b *Between, err error) {
	b = &Between{lab: l, from: from, to: to}
	b.life, b.end = context.WithCancel(context.Background())
	b.out = &http.Client{Transport: &http.Transport{DisableCompression: true, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		return dialFrom(ctx, from.net, network, address)
	}}}
	for _, s := range []struct {
		url    *string
		handle http.HandlerFunc
	}{{&b.To, b.message}, {&b.Back, b.fetch}} {
		url, end, err := from.Serve(s.handle)
		if err != nil {
			return nil, errors.Join(err, b.Close())
		}
		*s.url = url
		b.servers = append(b.servers, end)
	}
	return b, nil
}

// Serve serves HTTP in a cloudlet's namespace, until end is called.
func (c *Cloudlet) Serve(h http.Handler) (url string, end func() error, err error) {
	var ln net.Listener
	err = c.net.Do(func() (err error) {
		ln, err = net.Listen("tcp", net.JoinHostPort(c.Host, "0"))
		return err
	})
	if err != nil {
		return "", nil, err
	}
	server := &http.Server{Handler: h}
	go func() { _ = server.Serve(ln) }() // until end
	return "http://" + ln.Addr().String(), server.Close, nil
}

// Close ends it: what is held is lost.
func (b *Between) Close() error {
	b.end()
	var err error
	for _, end := range b.servers {
		err = errors.Join(err, end())
	}
	b.out.CloseIdleConnections()
	return err
}

// Stop holds the first message that at is true of, or its answer, from now on.
func (b *Between) Stop(at func(Passing) bool) *Stop {
	s := &Stop{at: at, reached: make(chan Passing, 1), release: make(chan bool, 1)}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.stops = append(b.stops, s)
	return s
}

// Await waits until something is held.
func (s *Stop) Await(ctx context.Context) (Passing, error) {
	select {
	case p := <-s.reached:
		return p, nil
	case <-ctx.Done():
		return Passing{}, context.Cause(ctx)
	}
}

// Release lets go what is held, or will be. What is lost looks like a connection that broke.
func (s *Stop) Release(lose bool) { s.once.Do(func() { s.release <- lose }) }

// HoldTails holds back the end of every overlay that is fetched, or lets all go.
func (b *Between) HoldTails(hold bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case hold && b.held == nil:
		b.held = make(chan struct{})
	case !hold && b.held != nil:
		close(b.held)
		b.held = nil
	}
}

// Published returns the URLs of overlays that messages have named, at the source itself.
func (b *Between) Published() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]string(nil), b.published...)
}

// pass holds what a Stop is about and reports whether it goes on.
func (b *Between) pass(p Passing) bool {
	b.mu.Lock()
	var stop *Stop
	for i, s := range b.stops {
		if s.at(p) {
			stop = s
			b.stops = append(b.stops[:i:i], b.stops[i+1:]...)
			break
		}
	}
	b.mu.Unlock()
	if stop == nil {
		return true
	}
	b.lab.Say("held: %s", p)
	stop.reached <- p
	select {
	case lose := <-stop.release:
		return !lose
	case <-b.life.Done():
		return false
	}
}

// message carries a message and its answer. It goes on if its sender has gone: it is late then.
func (b *Between) message(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	var p Passing
	if err == nil {
		err = json.Unmarshal(body, &p.Message)
	}
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	b.note(p.Message)
	if !b.pass(p) {
		b.lab.Say("lost: %s", p)
		panic(http.ErrAbortHandler)
	}
	ctx, cancel := context.WithTimeout(b.life, betweenBound)
	defer cancel()
	resp, err := b.forward(ctx, r, b.to, bytes.NewReader(body))
	if err != nil {
		b.lab.Say("%s: %v", p, err)
		panic(http.ErrAbortHandler) // the sender hears nothing, as without anybody between
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	var a handoff.Answer
	if resp.StatusCode == http.StatusOK && json.Unmarshal(content, &a) == nil {
		if p.Answer = &a; !b.pass(p) {
			b.lab.Say("lost: %s", p)
			panic(http.ErrAbortHandler)
		}
	}
	b.lab.Say("%s: %s", p, resp.Status)
	w.Header().Set("Content-Type", resp.Header.Get("Content-Type"))
	w.WriteHeader(resp.StatusCode)
	_, _ = w.Write(content) // nobody may be there any more
}

// note keeps the URLs of a message.
func (b *Between) note(m handoff.Message) {
	chain := m.Chain
	if m.Offer != nil {
		chain = m.Offer.Chain
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, o := range chain {
		b.published = append(b.published, strings.Replace(o.URL, b.Back, b.from.URL, 1))
	}
}

// forward sends a request on to a cloudlet.
func (b *Between) forward(ctx context.Context, r *http.Request, to *Cloudlet, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, r.Method, to.URL+r.URL.RequestURI(), body)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{"Authorization", "Content-Type", "Range"} {
		if v := r.Header.Get(name); v != "" {
			req.Header.Set(name, v)
		}
	}
	return b.out.Do(req)
}

// fetch carries an overlay to the destination.
func (b *Between) fetch(w http.ResponseWriter, r *http.Request) {
	resp, err := b.forward(r.Context(), r, b.from, nil)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	defer resp.Body.Close()
	for _, name := range []string{"Content-Length", "Content-Range", "Content-Type", "Etag"} {
		if v := resp.Header.Get(name); v != "" {
			w.Header().Set(name, v)
		}
	}
	w.WriteHeader(resp.StatusCode)
	b.mu.Lock()
	held := b.held
	b.mu.Unlock()
	if head := resp.ContentLength - tail; held != nil {
		if head > 0 {
			_, err = io.CopyN(w, resp.Body, head)
		}
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
		select {
		case <-held:
		case <-r.Context().Done():
			err = r.Context().Err()
		}
	}
	if err == nil {
		_, err = io.Copy(w, resp.Body)
	}
	if err != nil {
		panic(http.ErrAbortHandler)
	}
}
