package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"cloudlet/api"
	"cloudlet/integration/guest/table"

	"golang.org/x/sync/errgroup"
)

const (
	pollers   = 100
	streams   = 100
	pollPause = 500 * time.Millisecond // of one poller between two requests
	askPause  = 200 * time.Millisecond // between two requests to the application of a guest
	linkRate  = 4 << 20                // bytes a second of the link that overlays are imported over
)

// crowdResult is about many clients while instances run.
type crowdResult struct {
	Pollers int     `json:"pollers"`
	Streams int     `json:"streams"`
	Minutes float64 `json:"minutes"`
	Gets    int     `json:"gets"`
	P50     float64 `json:"get_p50_s"`
	P99     float64 `json:"get_p99_s"`
	Max     float64 `json:"get_max_s"`
	// P99Of is the same for each kind of GET.
	P99Of     map[string]float64 `json:"get_p99_of_s"`
	Events    int64              `json:"events"` // states of operations that the streams brought
	Followed  int64              `json:"operations_followed_to_their_end"`
	Answers   int64              `json:"guest_answers"`
	Early     int64              `json:"rss_early_bytes"` // median around minute 1
	Late      int64              `json:"rss_late_bytes"`  // median at the end
	RSS       []int64            `json:"rss_bytes"`       // each second
	FilesLate int                `json:"descriptors"`     // at the end
	FilesLeft int                `json:"descriptors_after_the_crowd"`
}

// crowd lets clients poll and follow operations while two instances of the launch answer
// requests and overlays are imported, one after the other, over a slow link.
func (b *bench) crowd(ctx context.Context, d *daemon) (err error) {
	b.say("%d pollers and %d event streams for %s, while two instances run", pollers, streams, b.stay)
	var list []api.Instance
	defer func() {
		for _, in := range list {
			err = errors.Join(err, d.client.DeleteInstance(context.WithoutCancel(ctx), in.ID, true))
		}
	}()
	for range 2 {
		in, err := finish[api.Instance](ctx, d.client)(d.client.Run(ctx, b.launch))
		if err != nil {
			return err
		}
		list = append(list, in)
	}
	link, err := serveSlowly(b.path("state", "overlays", b.image, "overlay"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, link.Close()) }()
	url := "http://" + link.Addr + "/overlay"

	r := &crowdResult{Pollers: pollers, Streams: streams, Minutes: b.stay.Minutes()}
	c := &crowd{daemon: d, instances: list, next: make(chan struct{}), gets: map[string][]float64{}}
	stay, leave := context.WithCancel(ctx)
	defer leave()
	g, gctx := errgroup.WithContext(stay)
	g.Go(func() error { return c.importing(gctx, url) })
	for i := range pollers {
		g.Go(func() error { return c.poll(gctx, i) })
	}
	for range streams {
		g.Go(func() error { return c.follow(gctx) })
	}
	for _, in := range list {
		g.Go(func() error { return c.use(gctx, in) })
	}
	r.RSS, err = watch(gctx, d.pid, b.stay)
	files, ferr := descriptors(d.pid)
	leave()
	if err = errors.Join(g.Wait(), err, ferr, context.Cause(ctx)); err != nil {
		return err
	}
	if r.FilesLate, r.FilesLeft, err = files, 0, d.quiet(ctx); err != nil {
		return err
	}
	if r.FilesLeft, err = descriptors(d.pid); err != nil {
		return err
	}
	var all []float64
	r.P99Of = map[string]float64{}
	for kind, took := range c.gets {
		all = append(all, took...)
		r.P99Of[kind] = quantile(took, 0.99)
	}
	r.Gets, r.P50, r.P99, r.Max = len(all), quantile(all, 0.5), quantile(all, 0.99), quantile(all, 1)
	r.Events, r.Followed, r.Answers = c.events.Load(), c.followed.Load(), c.answers.Load()
	r.Early, r.Late = flatness(r.RSS)
	b.r.Crowd = r
	return nil
}

// crowd is what its clients share.
type crowd struct {
	daemon    *daemon
	instances []api.Instance

	events, followed, answers atomic.Int64

	mu   sync.Mutex
	op   api.Operation        // the present one
	next chan struct{}        // closed when there is another
	gets map[string][]float64 // how long requests took, in seconds, by what they were for
}

// present returns the operation that is to be followed, and a channel that is closed when
// there is another.
func (c *crowd) present() (api.Operation, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.op, c.next
}

// importing imports the overlay again and again.
func (c *crowd) importing(ctx context.Context, url string) error {
	cl := c.daemon.client
	for ctx.Err() == nil {
		op, err := cl.ImportOverlay(ctx, api.ImportOverlay{Source: url})
		if err != nil {
			return unless(ctx, err)
		}
		c.mu.Lock()
		c.op = op
		close(c.next)
		c.next = make(chan struct{})
		c.mu.Unlock()
		if op, err = cl.Wait(ctx, op, nil); err != nil {
			return unless(ctx, err)
		}
		if op.State != api.OperationDone {
			return fmt.Errorf("import the overlay: %w", op.Error)
		}
	}
	return nil
}

// unless returns nil instead of an error that the end of ctx has brought.
func unless(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// poll asks for an instance, the list of them, and the present operation in turn.
func (c *crowd) poll(ctx context.Context, i int) error {
	cl, err := c.daemon.dial()
	if err != nil {
		return err
	}
	defer cl.Close()
	if !pause(ctx, pollPause*time.Duration(i)/pollers) { // they do not come all at once
		return nil
	}
	took := map[string][]float64{}
	defer func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for kind, seconds := range took {
			c.gets[kind] = append(c.gets[kind], seconds...)
		}
	}()
	tick := time.NewTicker(pollPause)
	defer tick.Stop()
	for ; ; i++ {
		op, _ := c.present()
		begun, kind := time.Now(), ""
		switch {
		case i%3 == 0:
			kind = "instance"
			_, err = cl.Instance(ctx, c.instances[i%len(c.instances)].ID)
		case i%3 == 1 || op.ID == "":
			kind = "instances"
			_, err = cl.Instances(ctx, false)
		default:
			kind = "operation"
			_, err = cl.Operation(ctx, op.ID)
		}
		if err != nil {
			return unless(ctx, err)
		}
		took[kind] = append(took[kind], time.Since(begun).Seconds())
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// pause waits, and reports whether ctx goes on.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// follow follows each operation by its event stream, to its end.
func (c *crowd) follow(ctx context.Context) error {
	cl, err := c.daemon.dial()
	if err != nil {
		return err
	}
	defer cl.Close()
	for op, next := c.present(); ; op, next = c.present() {
		if op.ID != "" {
			last, err := cl.Follow(ctx, op, func(api.Operation) { c.events.Add(1) })
			if err != nil {
				return unless(ctx, err)
			}
			if !last.State.Ended() {
				return fmt.Errorf("the stream of operation %s ended while that is %s", op.ID, last.State)
			}
			c.followed.Add(1)
		}
		select {
		case <-next:
		case <-ctx.Done():
			return nil
		}
	}
}

// use asks the application of an instance for one window of its table after the other.
func (c *crowd) use(ctx context.Context, in api.Instance) error {
	for window := 0; pause(ctx, askPause); window = (window + 1) % table.Windows {
		if err := ask(ctx, in, http.MethodGet, fmt.Sprintf("/?window=%d", window), nil); err != nil {
			return unless(ctx, fmt.Errorf("ask the application of instance %s: %w", in.ID, err))
		}
		c.answers.Add(1)
	}
	return nil
}

// quiet waits until the daemon has no more than the connections that it has without clients.
func (d *daemon) quiet(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, serveBound)
	defer cancel()
	for {
		n, err := descriptors(d.pid)
		if err != nil || n < pollers/2 {
			return err
		}
		if !pause(ctx, 50*time.Millisecond) {
			return fmt.Errorf("the clients have left, and the daemon has %d descriptors open", n)
		}
	}
}

// slowLink is a web server with one file behind a slow link.
type slowLink struct {
	*http.Server
	ended chan error
}

func serveSlowly(path string) (*slowLink, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	link := &slowLink{&http.Server{
		Addr: l.Addr().String(), ReadHeaderTimeout: serveBound,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			f, err := os.Open(path)
			if err != nil {
				http.Error(w, err.Error(), http.StatusNotFound)
				return
			}
			defer f.Close()
			w.Header().Set("ETag", `"one"`)
			http.ServeContent(&slowWriter{w, r.Context()}, r, "", time.Time{}, f)
		}),
	}, make(chan error, 1)}
	go func() { link.ended <- link.Serve(l) }() // Close joins it
	return link, nil
}

// Close ends the server and all its connections.
func (l *slowLink) Close() error {
	err := l.Server.Close()
	if serr := <-l.ended; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return err
}

// slowWriter lets linkRate bytes pass a second.
type slowWriter struct {
	http.ResponseWriter
	ctx context.Context
}

// Write takes as long as the link does.
func (w *slowWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	if err == nil && !pause(w.ctx, time.Duration(n)*time.Second/linkRate) {
		err = context.Cause(w.ctx)
	}
	return n, err
}
