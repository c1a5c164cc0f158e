package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/integration/guest"
	"cloudlet/integration/guest/table"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// web serves one file and can go away and come back on the same port.
type web struct {
	t       *testing.T
	file    string
	address string
	server  *http.Server
	ended   chan error
	sent    atomic.Int64 // bytes of answers
	inOrder atomic.Bool  // ranges are not answered
}

func newWeb(t *testing.T, file string) *web {
	w := &web{t: t, file: file, address: "127.0.0.1:0"}
	w.up()
	t.Cleanup(w.down)
	return w
}

func (w *web) url() string { return "http://" + w.address + "/app.overlay" }

func (w *web) up() {
	w.t.Helper()
	ln, err := net.Listen("tcp", w.address)
	require.NoError(w.t, err)
	w.address = ln.Addr().String()
	w.server, w.ended = &http.Server{Handler: w, ReadHeaderTimeout: time.Minute}, make(chan error, 1)
	go func(s *http.Server, ended chan<- error) { ended <- s.Serve(ln) }(w.server, w.ended)
}

// down ends the server and cuts its connections.
func (w *web) down() {
	if w.server == nil {
		return
	}
	if err := w.server.Close(); err != nil {
		w.t.Errorf("end the server: %v", err)
	}
	if err := <-w.ended; !errors.Is(err, http.ErrServerClosed) {
		w.t.Errorf("serve: %v", err)
	}
	w.server = nil
}

func (w *web) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	f, err := os.Open(w.file)
	if err != nil {
		http.Error(rw, err.Error(), http.StatusNotFound)
		return
	}
	defer f.Close()
	rw.Header().Set("ETag", `"one"`)
	if w.inOrder.Load() {
		r.Header.Del("Range")
	}
	http.ServeContent(&counted{rw, &w.sent}, r, "", time.Time{}, f)
}

// counted counts what goes through it.
type counted struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.n.Add(int64(n))
	return n, err
}

// pending is a request to a guest that may be held up.
type pending chan error

// request makes a request in the background.
func request(t *testing.T, in api.Instance, method, path string) pending {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	req, err := http.NewRequestWithContext(ctx, method, "http://"+in.Endpoints[0].Address+path, nil)
	require.NoError(t, err)
	p := make(pending, 1)
	go func() {
		defer cancel()
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := client.Do(req)
		if err == nil {
			body, rerr := io.ReadAll(resp.Body)
			if err = errors.Join(rerr, resp.Body.Close()); err == nil && resp.StatusCode != http.StatusOK {
				err = fmt.Errorf("%s: %s", resp.Status, body)
			}
		}
		p <- err
	}()
	return p
}

// waiting polls ps until the instance is said to wait for pages of an image, and returns it.
func (l *lab) waiting(in api.Instance, image string) (now api.Instance) {
	l.t.Helper()
	eventually(l.t, "ps says that the instance waits for its "+image, func() bool {
		now = l.inspect(in.ID)
		if now.Mount == nil || !strings.Contains(now.Reason, "waits for ") || !strings.Contains(now.Reason, "connection refused") {
			return false // several may wait, one of which has not been told yet
		}
		for _, h := range now.Mount.Held {
			if h.Image == image && strings.Contains(h.Error, "connection refused") {
				return true
			}
		}
		return false
	})
	return now
}

// TestRemoteOverlay runs an overlay from a web server that goes away and comes back.
func TestRemoteOverlay(t *testing.T) {
	l := newLab(t)
	work := l.start(l.base)
	token := ask(t, work, "GET", "/").Token
	ask(t, work, "POST", "/dirty?mib=24")
	ask(t, work, "POST", "/write?mib=48&seed=cold")
	file := filepath.Join(t.TempDir(), "app.overlay")
	o := l.capture(work.ID, "-o", file, "--strategy", "fast")
	l.ok("rm", "--force", work.ID)
	l.ok("overlay", "rm", o.ID) // the file alone counts
	w := newWeb(t, file)

	// What a mount has decoded already, it serves without the overlay: little of it here.
	in := l.start(w.url(), "--mount-memory", "16M", "--prefetch", "none", "--cache-size", "0")
	require.Equal(t, w.url(), in.Source)
	require.Equal(t, table.WindowHash(token, 3), ask(t, in, "GET", "/?window=3").SHA256)
	sent := w.sent.Load()
	t.Logf("%d of %d bytes before the first answers", sent, o.Size)
	require.Less(t, sent, o.Size/4, "what the guest does not touch is not fetched")
	const head = 128 << 10 // was sent to the service, which handed it on, and counts as read by the mount
	fetched := l.inspect(in.ID).Mount.Fetched
	require.LessOrEqual(t, fetched, w.sent.Load()+head) // sent by now: a guest may touch pages at any time

	t.Run("memory comes back", func(t *testing.T) { l.outage(w, in, "memory", "POST", "/dirty?mib=8") })
	t.Run("disk comes back", func(t *testing.T) {
		defer pinMemory(t, in)()
		l.outage(w, in, "disk", "GET", "/verify?seed=cold")
	})
	require.Equal(t, table.ExtraHash("cold", 48), ask(t, in, "GET", "/verify?seed=cold").Extra)
	requireWhole(t, in, token)
	require.Empty(t, l.inspect(in.ID).Reason)

	l.ok("rm", "--force", in.ID) // and with it the mount and what it has read

	t.Run("abort of disk", func(t *testing.T) {
		in := l.start(w.url(), "--mount-memory", "16M", "--prefetch", "none", "--cache-size", "0")
		unpin := pinMemory(t, in)
		defer unpin()
		w.down()
		p := request(t, in, "GET", "/verify?seed=cold")
		l.waiting(in, "disk")
		l.ok("abort", in.ID)
		eventually(t, "QEMU stops the guest", func() bool { return l.inspect(in.ID).State == api.Stalled })
		w.up()
		l.ok("continue", in.ID)
		require.NoError(t, <-p)
		unpin()
		l.ok("rm", "--force", in.ID)
	})
	t.Run("stop", func(t *testing.T) {
		in := l.start(w.url(), "--prefetch", "none", "--cache-size", "0")
		w.down()
		p := request(t, in, "POST", "/dirty?mib=16")
		l.waiting(in, "memory")
		begin := time.Now()
		l.ok("rm", "--force", in.ID)
		require.Less(t, time.Since(begin), 20*time.Second)
		require.Error(t, <-p)
		w.up()
	})
	t.Run("abort", func(t *testing.T) {
		in := l.start(w.url(), "--prefetch", "none", "--cache-size", "0")
		w.down()
		p := request(t, in, "POST", "/dirty?mib=16")
		l.waiting(in, "memory")
		l.ok("abort", in.ID)
		require.Error(t, <-p)
		var now api.Instance
		eventually(t, "the instance has ended", func() bool {
			now = l.inspect(in.ID)
			return now.State == api.Stopped || now.State == api.Lost
		})
		t.Log(now.State, now.Reason)
		require.NotEmpty(t, now.Reason)
		require.NoFileExists(t, fmt.Sprintf("/proc/%d/stat", in.PID))
	})
}

// outage takes the server away during a request to the guest, which must wait, and gives it
// back.
func (l *lab) outage(w *web, in api.Instance, image, method, path string) {
	t := l.t
	t.Helper()
	w.down()
	p := request(t, in, method, path)
	l.waiting(in, image)
	select {
	case err := <-p:
		t.Fatalf("answered without the overlay: %v", err)
	default:
	}
	w.up()
	require.NoError(t, <-p)
	require.Equal(t, api.Running, l.inspect(in.ID).State)
}

// pinMemory keeps the memory file of an instance's mount in the page cache, so that only the
// disk has something to wait for: more than the mount's own cache of decoded frames. The
// function it returns ends that, once.
func pinMemory(t *testing.T, in api.Instance) (unpin func()) {
	t.Helper()
	f, err := os.Open(filepath.Join(in.Mount.Dir, "memory"))
	require.NoError(t, err)
	defer f.Close()
	p, err := unix.Mmap(int(f.Fd()), 0, guest.MemoryMiB<<20, unix.PROT_READ, unix.MAP_SHARED)
	require.NoError(t, err)
	unpin = sync.OnceFunc(func() {
		if err := unix.Munmap(p); err != nil {
			t.Errorf("unmap memory: %v", err)
		}
	})
	if err := unix.Mlock(p); err != nil {
		unpin()
		require.NoError(t, err, "lock the memory file in the page cache")
	}
	return unpin
}
