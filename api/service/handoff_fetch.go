package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"cloudlet/api"
	"cloudlet/handoff"

	"golang.org/x/sys/unix"
)

const (
	fetchBuffer   = 64 << 10
	fetchPause    = 100 * time.Millisecond // after the first failure; then twice as long, up to
	fetchPauseMax = 5 * time.Second
	fetchSilence  = 5 * time.Second // without a byte; a new connection is tried then
)

// fetch is an overlay that arrives, in order, in a file from which an instance may run before
// it is whole.
type fetch struct {
	o   handoff.Overlay
	dir string // of the file "overlay", and "whole" once all of it is there and checked

	mu    sync.Mutex
	have  int64
	whole bool
	err   error // why it stands still
}

// fetch begins to fetch an overlay, unless that has been begun.
func (d *arrival) fetch(o handoff.Overlay) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if f := d.fetches[o.ID]; f != nil {
		return f.hopeless()
	}
	if d.life.Err() != nil {
		return errClosing()
	}
	f := &fetch{o: o, dir: d.s.handoffPath(d.id, o.ID)}
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(f.dir, "whole")); err == nil {
		f.have, f.whole = o.Bytes, true
		d.fetches[o.ID] = f
		return nil
	}
	sources, err := d.sources(o)
	if err != nil {
		return err
	}
	file, err := os.OpenFile(filepath.Join(f.dir, "overlay"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err != nil {
		return errors.Join(err, file.Close())
	}
	if f.have = info.Size(); f.have > o.Bytes {
		return errors.Join(fmt.Errorf("overlay %.12s has %d bytes here, and should have %d", o.ID, f.have, o.Bytes), file.Close())
	}
	d.fetches[o.ID] = f
	d.done.Go(func() {
		defer file.Close() // what counts was synced
		d.run(d.life, f, file, sources)
	})
	return nil
}

// fetchPlace is a URL that an overlay can be had from.
type fetchPlace struct {
	url    *url.URL
	client *http.Client
}

// sources returns where to fetch an overlay: its origin and its URL as far as the rules allow
// them, and in any case what the source publishes, at the very address that it calls from,
// whatever name the URL gives to that.
func (d *arrival) sources(o handoff.Overlay) (out []fetchPlace, err error) {
	allow, err := newAllowList(append([]string{}, d.s.cfg.AllowURLs...))
	if err != nil {
		return nil, err
	}
	for _, ref := range []string{o.Origin, o.URL} {
		u, uerr := url.Parse(ref)
		if uerr != nil {
			return nil, uerr
		}
		if err = allow.check(u); ref != "" && err == nil {
			out = append(out, fetchPlace{u, newFetcher(allow.connect)})
		}
	}
	u, _ := url.Parse(o.URL)
	path, perr := plainPath(u)
	if d.meta.From.IsValid() && perr == nil && u.User == nil && strings.HasPrefix(path, "/v1/handoffs/"+d.id+"/") {
		out = append(out, fetchPlace{u, newFetcher(d.dialSource)})
	}
	if len(out) == 0 {
		return nil, err
	}
	return out, nil
}

// dialSource dials the source of the handoff at the port of addr.
func (d *arrival) dialSource(ctx context.Context, network, addr string) (net.Conn, error) {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	return (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, network, net.JoinHostPort(d.meta.From.String(), port))
}

// run fetches until the overlay is whole, or ctx ends.
func (d *arrival) run(ctx context.Context, f *fetch, file *os.File, sources []fetchPlace) {
	pause := fetchPause
	for try := 0; ctx.Err() == nil; try++ {
		before := f.at()
		err := f.pull(ctx, file, sources[try%len(sources)])
		if err == nil {
			err = d.finish(ctx, f, file)
		}
		f.fail(err)
		if err == nil {
			return
		}
		if ctx.Err() == nil {
			d.s.log.Info("fetch overlay of a handoff", "handoff", d.id, "overlay", f.o.ID, "have", f.at(), "of", f.o.Bytes, "err", err)
		}
		if f.at() > before {
			pause = fetchPause
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, fetchPauseMax)
	}
}

func (f *fetch) at() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.have
}

func (f *fetch) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err = err
}

// hopeless returns an error that does not pass by itself: the disk is full.
func (f *fetch) hopeless() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if errors.Is(f.err, unix.ENOSPC) || errors.Is(f.err, unix.EDQUOT) {
		return f.err
	}
	return nil
}

// hopePause is the time between two looks whether a fetch can succeed.
const hopePause = 100 * time.Millisecond

// whileHopeful returns a context that ends, too, when a fetch cannot succeed: what is not
// there yet is not to be waited for then. Call end with the error of what the context was
// for; it returns the reason in its place.
func (d *arrival) whileHopeful(ctx context.Context) (_ context.Context, end func(error) error) {
	ctx, cancel := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	watching.Go(func() {
		tick := time.NewTicker(hopePause)
		defer tick.Stop()
		for ctx.Err() == nil {
			if err := d.hopeless(); err != nil {
				cancel(err)
			}
			select {
			case <-ctx.Done():
			case <-tick.C:
			}
		}
	})
	return ctx, func(err error) error {
		cancel(nil)
		watching.Wait()
		if cause := context.Cause(ctx); err != nil && (errors.Is(cause, unix.ENOSPC) || errors.Is(cause, unix.EDQUOT)) {
			return cause
		}
		return err
	}
}

// hopeless returns an error of a fetch that does not pass by itself.
func (d *arrival) hopeless() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, f := range d.fetches {
		if err := f.hopeless(); err != nil {
			return err
		}
	}
	return nil
}

// left returns how many bytes are not here, at least one until all were checked.
func (f *fetch) left() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.whole {
		return 0
	}
	return max(1, f.o.Bytes-f.have)
}

// pull appends what one answer brings.
func (f *fetch) pull(ctx context.Context, file *os.File, from fetchPlace) error {
	have := f.at()
	if have == f.o.Bytes {
		return nil
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from.url.String(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-", have))
	resp, err := from.client.Do(req)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err // without the URL, whose key is secret
		}
		return fmt.Errorf("fetch from %s: %w", from.url.Host, err)
	}
	defer resp.Body.Close()
	want := fmt.Sprintf("bytes %d-%d/%d", have, f.o.Bytes-1, f.o.Bytes)
	switch {
	case resp.StatusCode == http.StatusPartialContent && resp.Header.Get("Content-Range") == want:
	case resp.StatusCode == http.StatusOK && have == 0 && resp.ContentLength == f.o.Bytes:
	default:
		return fmt.Errorf("fetch from %s: it answered %s with %q, not %s", from.url.Host, resp.Status, resp.Header.Get("Content-Range"), want)
	}
	quiet := time.AfterFunc(fetchSilence, func() { cancel(fmt.Errorf("%s has sent nothing for %s", from.url.Host, fetchSilence)) })
	defer quiet.Stop()
	buf := make([]byte, fetchBuffer)
	for have < f.o.Bytes {
		n, err := resp.Body.Read(buf[:min(int64(len(buf)), f.o.Bytes-have)])
		if n > 0 {
			quiet.Reset(fetchSilence)
			if _, err := file.WriteAt(buf[:n], have); err != nil {
				return err
			}
			have += int64(n)
			f.mu.Lock()
			f.have = have
			f.mu.Unlock()
		}
		if have == f.o.Bytes {
			return nil
		}
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			if cause := context.Cause(ctx); cause != nil {
				err = cause
			}
			return fmt.Errorf("fetch from %s: %w", from.url.Host, err)
		}
	}
	return nil
}

// finish checks an overlay that has arrived and makes it durable. One of the launch goes into
// the store. What is damaged is fetched again, in place: a guest may run from it, which waits
// for the pages that do not match their hashes.
func (d *arrival) finish(ctx context.Context, f *fetch, file *os.File) error {
	if err := file.Sync(); err != nil {
		return err
	}
	if err := f.check(ctx); err != nil {
		if ctx.Err() == nil {
			f.mu.Lock()
			f.have = 0
			f.mu.Unlock()
		}
		return err
	}
	if d.ofLaunch(f.o.ID) {
		st, err := d.s.newStage(ctx, "handoff")
		if err != nil {
			return err
		}
		defer st.drop() // its content is linked elsewhere
		// A link: a mount may be opening the file here at this moment.
		if err := os.Link(filepath.Join(f.dir, "overlay"), filepath.Join(st.dir, "overlay")); err != nil {
			return err
		}
		if _, err := d.s.keepOverlay(ctx, st.dir, ""); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(f.dir, "whole"), nil, 0o600); err != nil {
		return err
	}
	if err := errors.Join(syncDir(f.dir), syncDir(filepath.Dir(f.dir))); err != nil {
		return err
	}
	f.mu.Lock()
	f.whole = true
	f.mu.Unlock()
	return nil
}

// check reads an overlay that has arrived and compares all of it with its hashes.
func (f *fetch) check(ctx context.Context) (err error) {
	r, err := link{Source: filepath.Join(f.dir, "overlay")}.read(ctx, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	if r.ID().String() != f.o.ID {
		return api.Errorf(api.Damaged, "what came as overlay %.12s is %.12s", f.o.ID, r.ID())
	}
	return r.Verify(ctx, nil)
}

// ofLaunch reports whether an overlay is one that the instance was resumed from, and not a
// round of the handoff.
func (d *arrival) ofLaunch(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, o := range d.offer.Chain {
		if o.ID == id {
			return true
		}
	}
	return false
}

// missing returns how many bytes of the chain are not here durably.
func (d *arrival) missing() (n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, o := range d.chain {
		if f := d.fetches[o.ID]; f != nil {
			n += f.left()
		} else if _, err := os.Stat(d.s.overlayFile(o.ID)); err != nil {
			n += o.Bytes
		}
	}
	return n
}

// trouble says what the fetches stand still at.
func (d *arrival) trouble() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var texts []string
	for _, f := range d.fetches {
		f.mu.Lock()
		if f.err != nil {
			texts = append(texts, f.err.Error())
		}
		f.mu.Unlock()
	}
	return strings.Join(texts, "; ")
}

// drop ends the fetches for good.
func (d *arrival) drop() {
	d.stop()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fetches = map[string]*fetch{}
	d.life, d.cancel = context.WithCancel(context.WithoutCancel(d.life)) // should it be prepared again
}
