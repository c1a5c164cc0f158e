package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"cloudlet/integration/link"
)

const (
	mbit = 1_000_000
	// local names the absence of a network: the files are on this host.
	local = "local"
	// slow names the link of the target over a network.
	slow = "38m"
)

// network is one of the links that are measured.
type network struct {
	name, text string
	params     link.Params
}

func networks() []network {
	return []network{
		{local, "local", link.Params{}},
		{"1g", "1 Gbit/s, 1 ms", link.Params{Rate: 1000 * mbit, Delay: time.Millisecond}},
		{"100m", "100 Mbit/s, 5 ms", link.Params{Rate: 100 * mbit, Delay: 5 * time.Millisecond}},
		{slow, "38 Mbit/s, 20 ms", link.Params{Rate: 38 * mbit, Delay: 20 * time.Millisecond}},
		{"10m", "10 Mbit/s, 50 ms", link.Params{Rate: 10 * mbit, Delay: 50 * time.Millisecond}},
		{"38m-loss", "38 Mbit/s, 20 ms, 1 % loss", link.Params{Rate: 38 * mbit, Delay: 20 * time.Millisecond, Loss: 0.01}},
	}
}

func linkNames() (names []string) {
	for _, n := range networks() {
		names = append(names, n.name)
	}
	return names
}

// remote serves files over a link of its own.
type remote struct {
	link   *link.Link
	server *http.Server
	ended  chan error
}

// serveOver makes the link of a network and serves files behind it: the keys are their names.
func serveOver(n network, seed uint64, files map[string]string) (*remote, error) {
	n.params.Seed = seed
	l, err := link.Up(n.params)
	if err != nil {
		return nil, err
	}
	r := &remote{link: l, ended: make(chan error, 1)}
	r.server = &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		path, ok := files[filepath.Base(req.URL.Path)]
		if !ok {
			http.NotFound(w, req)
			return
		}
		serveFile(w, req, path)
	})}
	go func() { r.ended <- r.server.Serve(l.Listener()) }()
	return r, nil
}

func serveFile(w http.ResponseWriter, req *http.Request, path string) {
	f, err := os.Open(path)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer f.Close()
	w.Header().Set("ETag", `"one"`)
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, req, "", time.Time{}, f)
}

func (r *remote) url(name string) string { return "http://" + r.link.Address() + "/" + name }

// received returns how many bytes have come over the link, all headers included.
func (r *remote) received() int64 { return r.link.Stats().Down.Bytes }

func (r *remote) close() error {
	err := r.server.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	if serr := <-r.ended; !errors.Is(serr, http.ErrServerClosed) {
		err = errors.Join(err, serr)
	}
	return errors.Join(err, r.link.Close())
}

// errCut is the cause of a measurement that took too long.
var errCut = errors.New("given up")

// bounded returns a context that ends with errCut.
func bounded(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, d, errCut)
}
