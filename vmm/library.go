package vmm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"sync"
	"time"
)

// ErrNoLibvirt means that libvirt cannot be had: this program is built without it, its library
// or its daemon is missing or does not answer, or it is too old.
var ErrNoLibvirt = errors.New("no libvirt")

// ErrNameTaken means that libvirt has a domain of that name already.
var ErrNameTaken = errors.New("the name of the domain is taken")

var (
	errNoDomain   = errors.New("libvirt has no such domain")
	errNotRunning = errors.New("the domain does not run")
)

// library is what is used of libvirt's library, one connection. Its calls block, and are safe
// for concurrent use. Their errors wrap ErrNoLibvirt if the connection is of no more use, and
// the errors above.
type library interface {
	// versions returns those of the daemon that drives QEMU and of the library.
	versions() (daemon, library uint32, err error)
	// create and restore start a domain and leave it paused.
	create(xml string) error
	restore(image string) error
	// command runs a command of QEMU's monitor, in JSON, and returns the answer. A file goes
	// along with it if f is not nil.
	command(uuid, text string, f *os.File) (string, error)
	// destroy ends a domain, if graceful without force.
	destroy(uuid string, graceful bool) error
	// active reports whether a domain is there and runs or is paused.
	active(uuid string) (bool, error)
	// capabilities and domainCapabilities return libvirt's XML of these names.
	capabilities() (string, error)
	domainCapabilities(emulator, machine, virt string) (string, error)
	// watch calls changed for the events of all domains, until the connection is closed, and
	// lost once it is broken. Neither may block, nor use the connection.
	watch(changed func(domainEvent), lost func()) error
	// alive reports whether the connection still stands, as far as is known.
	alive() bool
	close() error
}

// domainEvent is something that happened to a domain.
type domainEvent struct {
	uuid  string
	ended bool   // else it was stopped by an error of its disk
	why   string // libvirt's word, as in the domain's log
}

// uri is where libvirt is: "qemu:///system", "qemu:///session" or "qemu:///embed?root=DIR".
type uri string

// parseURI checks that a URI is one of QEMU's on this host: memory and disk are files here.
func parseURI(s string) (uri, error) {
	u, err := url.Parse(s)
	if err != nil {
		return "", fmt.Errorf("libvirt's URI %.100q: %w", s, err)
	}
	if u.Scheme != "qemu" || u.Host != "" || u.User != nil || u.Fragment != "" {
		return "", fmt.Errorf("libvirt's URI %.100q: want QEMU on this host: qemu:///system, qemu:///session or qemu:///embed?root=DIR", s)
	}
	switch u.Path {
	case "/system", "/session":
	case "/embed":
		if root := u.Query().Get("root"); root == "" || root[0] != '/' {
			return "", fmt.Errorf("libvirt's URI %.100q: give the folder of its files as ?root=DIR, with an absolute path", s)
		}
	default:
		return "", fmt.Errorf("libvirt's URI %.100q: want qemu:///system, qemu:///session or qemu:///embed?root=DIR", s)
	}
	return uri(s), nil
}

// root returns the root of an embedded driver, "" of another.
func (u uri) root() string {
	if p, err := url.Parse(string(u)); err == nil && p.Path == "/embed" {
		return p.Query().Get("root")
	}
	return ""
}

func (u uri) session() bool {
	p, err := url.Parse(string(u))
	return err == nil && p.Path == "/session"
}

// connections are this process's connections to libvirt, by URI. The zero value is ready.
type connections struct {
	// dial opens a connection; nil: by libvirt's library.
	dial func(uri) (library, error)
	// patience is how long do waits for a connection; 0: openTimeout.
	patience time.Duration
	// grace is how long close waits; 0: closeGrace.
	grace time.Duration

	calls sync.WaitGroup // under way, also those that nobody waits for any more
	mu    sync.Mutex
	slots map[uri]*slot
	dirs  map[string]string // folders of VMs, by the UUID of the domain
	asked map[library]facts
}

// slot holds one connection.
type slot struct {
	gate  chan struct{} // holds a value while somebody opens or takes the connection
	lib   library       // nil: none
	users *sync.WaitGroup
}

// openTimeout bounds the wait for a connection: a daemon that hangs takes it, and says nothing.
const openTimeout = 15 * time.Second

// know notes the folder of a domain's VM, for events.
func (c *connections) know(uuid, dir string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.dirs == nil {
		c.dirs = map[string]string{}
	}
	c.dirs[uuid] = dir
}

// forget forgets a domain that has ended.
func (c *connections) forget(uuid string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.dirs, uuid)
}

// known returns the folder of a domain's VM.
func (c *connections) known(uuid string) (dir string, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	dir, ok = c.dirs[uuid]
	return dir, ok
}

// facts asks a connection what it is to, once.
func (c *connections) facts(lib library) (facts, error) {
	c.mu.Lock()
	f, ok := c.asked[lib]
	c.mu.Unlock()
	if ok {
		return f, nil
	}
	f, err := askFacts(lib)
	if err != nil {
		return f, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked = map[library]facts{lib: f} // others are closed, or are asked again
	return f, nil
}

func (c *connections) slot(u uri) *slot {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.slots[u]
	if s == nil {
		if c.slots == nil {
			c.slots = map[uri]*slot{}
		}
		s = &slot{gate: make(chan struct{}, 1)}
		c.slots[u] = s
	}
	return s
}

// do runs f with a connection, one that stands as far as is known. Libvirt's calls cannot be
// interrupted: when ctx ends do returns, and f, if it has begun, goes on by itself; done is
// called after f.
func (c *connections) do(ctx context.Context, u uri, f func(library) error, done func()) error {
	if done == nil {
		done = func() {}
	}
	patience := c.patience
	if patience == 0 {
		patience = openTimeout
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	hangs := func() error {
		return fmt.Errorf("%w: %s has not answered within %v: see the log of its daemon, and restart that", ErrNoLibvirt, u, patience)
	}
	s := c.slot(u)
	select {
	case s.gate <- struct{}{}:
	case <-ctx.Done():
		done()
		return ctx.Err()
	case <-timer.C:
		done()
		return hangs()
	}
	result := make(chan error, 1)
	begin, left := make(chan struct{}), make(chan struct{})
	defer close(left)
	c.calls.Go(func() {
		lib, users, err := c.open(u, s)
		<-s.gate
		if err == nil {
			select {
			case begin <- struct{}{}:
				err = f(lib)
			case <-left: // what was given up does not begin
			}
			users.Done()
		}
		done()
		result <- err
	})
	select {
	case <-begin:
	case err := <-result:
		return err
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return hangs()
	}
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// open returns the slot's connection, made anew if it is broken, and counts its user; the
// caller holds the gate. A broken connection is closed once the last of its users has left:
// libvirt frees it.
func (c *connections) open(u uri, s *slot) (library, *sync.WaitGroup, error) {
	if s.lib != nil && !s.lib.alive() {
		lib, users := s.lib, s.users
		s.lib = nil
		c.calls.Go(func() {
			users.Wait()
			_ = lib.close() // of a daemon that is gone
		})
	}
	if s.lib == nil {
		dial := c.dial
		if dial == nil {
			dial = openLibvirt
		}
		lib, err := dial(u)
		if err != nil {
			return nil, nil, fmt.Errorf("connect to libvirt at %s: %w", u, err)
		}
		s.lib, s.users = lib, new(sync.WaitGroup)
	}
	s.users.Add(1)
	return s.lib, s.users, nil
}

// closeGrace is how long calls under way may take when the connections are closed. A daemon
// that hangs keeps them for ever; then they end with this process.
const closeGrace = 10 * time.Second

// close waits for all calls and closes the connections.
func (c *connections) close() error {
	done := make(chan error, 1)
	go func() { // ends with the calls, and with those that close
		c.calls.Wait()
		c.mu.Lock()
		defer c.mu.Unlock()
		var errs []error
		for _, s := range c.slots {
			if s.lib != nil {
				errs = append(errs, s.lib.close())
				s.lib = nil
			}
		}
		done <- errors.Join(errs...)
	}()
	select {
	case err := <-done:
		return err
	case <-time.After(cmp.Or(c.grace, closeGrace)):
		return fmt.Errorf("%w: calls have not returned within %v: see the log of libvirt's daemon", ErrNoLibvirt, cmp.Or(c.grace, closeGrace))
	}
}
