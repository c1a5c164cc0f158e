package appclient

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// mostAnswer bounds the bytes of an answer.
	mostAnswer = 64 << 20
	// againAfter is the pause before a request that could not be sent is repeated.
	againAfter = 5 * time.Millisecond
	// looksMost bounds the questions where the application is that wait for an answer.
	looksMost = 3
	// verifyBound is how long the application may take for a journal.
	verifyBound = 2 * time.Minute
)

// Config says what a Client does.
type Config struct {
	Name    string // letters and digits; the journals of the workers are NAME0, NAME1 and so on
	Workers int    // that append at the same time; 0: one
	// Find returns host:port of the application. It is asked at the beginning and, again and
	// again, during a silence, also several times at once; an error means that it is not known
	// now.
	Find func(ctx context.Context) (string, error)
	// Dial makes connections; nil: from here.
	Dial    func(ctx context.Context, network, address string) (net.Conn, error)
	Silence time.Duration // after which Find is asked; 0: 50 ms
	Look    time.Duration // between two such questions; 0: 20 ms
	Timeout time.Duration // after which a request is sent again; 0: 5 s
	Rest    time.Duration // between an answer and the next request
}

// Client appends records until it is stopped.
type Client struct {
	Config
	http    *http.Client
	workers []*worker
	stop    context.CancelFunc
	joined  sync.WaitGroup
	again   atomic.Int64
}

// worker appends the records of one journal.
type worker struct {
	c       *Client
	address string // of the application, as last heard; only run uses it

	mu   sync.Mutex
	k    checker
	at   []time.Time   // the begin, and of each acknowledgement
	seen []time.Time   // when it saw that the application is elsewhere
	why  error         // the last request without an answer
	news chan struct{} // closed by the next acknowledgement, or the end
	done time.Time     // when it ended
}

// Start finds the application and begins. ctx bounds the whole. Stop the Client.
func Start(ctx context.Context, cfg Config) (*Client, error) {
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{{&cfg.Silence, 50 * time.Millisecond}, {&cfg.Look, 20 * time.Millisecond}, {&cfg.Timeout, 5 * time.Second}} {
		if *d.v == 0 {
			*d.v = d.def
		}
	}
	cfg.Workers = max(cfg.Workers, 1)
	address, err := cfg.Find(ctx)
	if err != nil {
		return nil, fmt.Errorf("find the application: %w", err)
	}
	c := &Client{Config: cfg, http: &http.Client{Transport: &http.Transport{DialContext: cfg.Dial, MaxIdleConnsPerHost: cfg.Workers}}}
	ctx, c.stop = context.WithCancel(ctx)
	for i := range cfg.Workers {
		w := &worker{c: c, address: address, k: checker{client: fmt.Sprintf("%s%d", cfg.Name, i)}, at: []time.Time{time.Now()}, news: make(chan struct{})}
		c.workers = append(c.workers, w)
		c.joined.Go(func() { w.run(ctx) })
	}
	return c, nil
}

// Stop ends the workers. A request that is on its way counts as not acknowledged.
func (c *Client) Stop() {
	c.stop()
	c.joined.Wait()
	c.http.CloseIdleConnections()
}

// run appends until ctx ends or a record is refused.
func (w *worker) run(ctx context.Context) {
	defer func() {
		w.mu.Lock()
		w.done = time.Now()
		close(w.news)
		w.mu.Unlock()
	}()
	for n := int64(1); ctx.Err() == nil; n++ {
		w.mu.Lock()
		w.k.sent = true
		w.mu.Unlock()
		a, refusal, err := w.acknowledge(ctx, n)
		if err != nil {
			return // ctx has ended
		}
		w.mu.Lock()
		if refusal != "" {
			w.k.refused(n, refusal)
			w.mu.Unlock()
			return
		}
		w.k.acknowledged(n, a)
		w.at = append(w.at, time.Now())
		close(w.news)
		w.news = make(chan struct{})
		w.mu.Unlock()
		pause(ctx, w.c.Rest)
	}
}

// acknowledge sends record n until it is answered. From the first silence on it looks for the
// application, and sends at once where that is found to have moved.
func (w *worker) acknowledge(ctx context.Context, n int64) (a answer, refusal string, err error) {
	path := "/append?" + url.Values{"client": {w.k.client}, "n": {fmt.Sprint(n)}}.Encode()
	moved, stop := w.watch(ctx)
	defer func() { stop() }()
	// What was asked before a move is of no interest after it.
	moveTo := func(address string) {
		stop()
		w.moveTo(address)
		moved, stop = w.watch(ctx)
	}
	for try := 0; ; try++ {
		if try > 0 {
			w.c.again.Add(1)
		}
		code, body, elsewhere, err := w.send(ctx, path, moved)
		switch {
		case ctx.Err() != nil:
			return a, "", context.Cause(ctx)
		case elsewhere != "":
			moveTo(elsewhere)
			continue
		case err == nil && code == http.StatusConflict:
			return a, string(body), nil
		case err == nil && code == http.StatusOK:
			if err = json.Unmarshal(body, &a); err == nil {
				return a, "", nil
			}
		case err == nil:
			err = fmt.Errorf("answered %d: %s", code, body)
		}
		w.mu.Lock()
		w.why = err
		w.mu.Unlock()
		if try == 0 {
			continue // perhaps only a connection that was kept
		}
		select {
		case <-time.After(againAfter):
		case elsewhere := <-moved:
			moveTo(elsewhere)
		case <-ctx.Done():
		}
	}
}

// moveTo goes on at another address.
func (w *worker) moveTo(address string) {
	w.address = address
	w.mu.Lock()
	w.seen = append(w.seen, time.Now())
	w.mu.Unlock()
}

// watch looks for the application from the first silence on, several times at once where an
// answer takes long, until stop is called. It tells where that is found to be elsewhere.
func (w *worker) watch(ctx context.Context) (moved <-chan string, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	from, found := w.address, make(chan string, 1)
	var joined sync.WaitGroup
	joined.Go(func() {
		pause(ctx, w.c.Silence)
		tick := time.NewTicker(w.c.Look)
		defer tick.Stop()
		room := make(chan struct{}, looksMost)
		for ctx.Err() == nil {
			select {
			case room <- struct{}{}:
				joined.Go(func() {
					defer func() { <-room }()
					bound, cancel := context.WithTimeout(ctx, w.c.Timeout)
					defer cancel()
					address, err := w.c.Find(bound)
					if err != nil || address == from {
						return // another one is on its way
					}
					select {
					case found <- address:
					default:
					}
				})
			default:
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	})
	return found, func() {
		cancel()
		joined.Wait()
	}
}

// send sends a request once. It gives it up if the application is elsewhere.
func (w *worker) send(ctx context.Context, path string, moved <-chan string) (code int, body []byte, elsewhere string, err error) {
	ctx, cancel := context.WithTimeout(ctx, w.c.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+w.address+path, nil)
	if err != nil {
		return 0, nil, "", err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		code, body, err = do(w.c.http, req)
	}()
	select {
	case <-done:
	case elsewhere = <-moved:
		cancel()
		<-done
	}
	return code, body, elsewhere, err
}

func do(c *http.Client, req *http.Request) (code int, body []byte, err error) {
	resp, err := c.Do(req)
	if err != nil {
		return 0, nil, err
	}
	body, err = io.ReadAll(io.LimitReader(resp.Body, mostAnswer))
	return resp.StatusCode, body, errors.Join(err, resp.Body.Close())
}

func pause(ctx context.Context, d time.Duration) {
	if d == 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// Await waits until each worker has had an answer to a request sent after a time.
func (c *Client) Await(ctx context.Context, after time.Time) error {
	for _, w := range c.workers {
		for {
			w.mu.Lock()
			// The answer before the last may be to a request from before.
			n, news := len(w.at), w.news
			ready, ended := n > 1 && w.at[n-2].After(after), !w.done.IsZero()
			w.mu.Unlock()
			if ready {
				break
			}
			if ended {
				return errors.Join(errors.New("the client has ended"), c.Err())
			}
			select {
			case <-news:
			case <-ctx.Done():
				w.mu.Lock()
				defer w.mu.Unlock()
				return fmt.Errorf("no answer: %w; the last request: %v", context.Cause(ctx), w.why)
			}
		}
	}
	return nil
}

// Silence is a time without an answer.
type Silence struct {
	Begin, End time.Time
	Found      time.Time // when the worker saw that the application is elsewhere; zero: it did not
}

// Length returns how long it was.
func (s Silence) Length() time.Duration { return s.End.Sub(s.Begin) }

// Gap returns the longest silence of a worker, of those that overlap the time between from and
// to.
func (c *Client) Gap(from, to time.Time) (longest Silence) {
	for _, w := range c.workers {
		w.mu.Lock()
		for i, begin := range w.at {
			end := w.done
			if end.IsZero() {
				end = time.Now()
			}
			if i+1 < len(w.at) {
				end = w.at[i+1]
			}
			if end.After(from) && begin.Before(to) && end.Sub(begin) > longest.Length() {
				longest = Silence{Begin: begin, End: end}
				for _, seen := range w.seen {
					if seen.After(begin) && seen.Before(end) {
						longest.Found = seen
					}
				}
			}
		}
		w.mu.Unlock()
	}
	return longest
}

// Report is what a Client has done and found.
type Report struct {
	Acknowledged int64    `json:"acknowledged"`
	Repeated     int64    `json:"repeated"` // requests that were sent once more
	Moves        int64    `json:"moves"`    // of all workers
	Faults       []string `json:"faults"`
}

// Report returns what there is until now.
func (c *Client) Report() Report {
	r := Report{Repeated: c.again.Load(), Faults: []string{}}
	for _, w := range c.workers {
		w.mu.Lock()
		r.Acknowledged += w.k.last.Count
		r.Moves += int64(len(w.seen))
		r.Faults = append(r.Faults, w.k.faults...)
		if w.k.overflow > 0 {
			r.Faults = append(r.Faults, fmt.Sprintf("client %s: %d more", w.k.client, w.k.overflow))
		}
		w.mu.Unlock()
	}
	return r
}

// Err returns the faults as an error, nil if there are none.
func (c *Client) Err() error {
	var errs []error
	for _, f := range c.Report().Faults {
		errs = append(errs, errors.New(f))
	}
	return errors.Join(errs...)
}

// Verify compares the journals of the application at an address with what was acknowledged,
// after Stop, and returns Err. It may be asked of several applications, such as one that was
// started anew.
func (c *Client) Verify(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, verifyBound)
	defer cancel()
	for _, w := range c.workers {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/journal?client="+w.k.client, nil)
		if err != nil {
			return err
		}
		code, body, err := do(c.http, req)
		if err != nil {
			return fmt.Errorf("ask for the journal of %s: %w", w.k.client, err)
		}
		var j journal
		w.mu.Lock()
		if code != http.StatusOK {
			w.k.fault("its journal was answered with %d: %s", code, body)
		} else if err := json.Unmarshal(body, &j); err != nil {
			w.k.fault("its journal cannot be read: %v", err)
		} else {
			w.k.journal(j)
		}
		w.mu.Unlock()
	}
	c.http.CloseIdleConnections()
	return c.Err()
}
