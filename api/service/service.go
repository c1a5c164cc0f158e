package service

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"cloudlet/api"
	"cloudlet/handoff"

	"golang.org/x/sys/unix"
)

// Config says where a Service keeps its store and how it starts processes.
type Config struct {
	// Dir is the store's folder; it is made if missing.
	Dir string
	// Program is the command line that runs this program again, to which "mount ..." and
	// "launcher ..." are added.
	Program []string
	// QEMU and QEMUImg are the programs; "" means those on PATH.
	QEMU, QEMUImg string
	// VMM is what runs new VMs: "" and "qemu" for QEMU itself, "libvirt" or "libvirt:URI" for
	// QEMU as domains of libvirt. Those that exist are run by what has started them.
	VMM string
	// MountMemory is how many bytes of memory the process of a mount should stay below, beside
	// its program and the indexes of base and overlays; 0 means [DefaultMountMemory].
	MountMemory int64
	// Daemon makes this the one long-lived process of the store: a second one is refused, and
	// operations that an earlier one had begun are taken up again where they can be.
	Daemon bool
	// AllowURLs are the URLs that callers who are not local may name: "https://host[:port]/path"
	// allows what is at and below that path, also as the target of a redirect, as long as the
	// host is not at a loopback, link-local, private or multicast address. Such an address
	// needs a rule with it as its host, or one that begins with "private+", like
	// "private+http://depot/". None: no URL.
	AllowURLs []string
	// MaxInstances bounds the living instances; 0: no bound.
	MaxInstances int
	// MaxMemory bounds the memory of all living guests together in bytes; 0: a new guest's
	// memory must be available on the host when it is asked for.
	MaxMemory int64
	// MinFree is how many bytes of the store's file system stay free.
	MinFree int64
	// MaxOperations bounds the operations that this process works on at once; 0: 16.
	MaxOperations int
	// CacheLimit bounds the bytes of overlays at URLs that are kept on the host's disk after
	// they were fetched; 0 means 10 GiB, less than 0 that nothing is kept.
	CacheLimit int64
	// Advertise is the URL at which other cloudlets reach this daemon, http://HOST:PORT or
	// https://HOST:PORT; "": instances cannot be handed off from here.
	Advertise string
	// Log takes what happens beside the results of calls; nil: nothing.
	Log *slog.Logger
}

// DefaultMountMemory leaves 57 MiB to decoded frames, which hold what a guest of 1 GiB touches
// before its first answer. With its program, about 25 MiB, a mount has 128 MiB resident.
const (
	DefaultMountMemory = 100 << 20
	DefaultCacheLimit  = 10 << 30
	leastMountMemory   = 16 << 20
)

// Service is the verbs over one store. Safe for concurrent use, also with Services of other
// processes over the same store.
type Service struct {
	cfg     Config
	vmm     hypervisor
	log     *slog.Logger
	daemon  *lock // of daemon.lock; nil: not the daemon
	flights flights
	turn    chan struct{}  // holds a value while one of this process has or awaits the store's lock
	joined  sync.WaitGroup // operations and the janitor
	stop    context.CancelFunc
	halting context.Context // ends when the operations must
	halt    context.CancelFunc

	mu      sync.Mutex
	live    map[string]*operation // that this process works on, and those of unsaved
	unsaved int                   // how many ends could not be written
	closed  bool

	sources  map[string]*handoff.Source // of handoffs from here, by id
	arrivals map[string]*arrival        // of handoffs to here

	described map[string]description // overlays of the store, by id
}

// Open opens the store, making it if it is new, and sweeps up what dead processes left.
func Open(ctx context.Context, c Config) (*Service, error) {
	s := &Service{
		cfg: c, log: c.Log, live: map[string]*operation{}, described: map[string]description{}, turn: make(chan struct{}, 1), stop: func() {},
		sources: map[string]*handoff.Source{}, arrivals: map[string]*arrival{},
		flights: flights{running: map[string]*flight{}, waiting: map[string]*flight{}},
	}
	s.halting, s.halt = context.WithCancel(context.Background())
	if s.log == nil {
		s.log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	switch {
	case s.cfg.MountMemory == 0:
		s.cfg.MountMemory = DefaultMountMemory
	case s.cfg.MountMemory < leastMountMemory:
		return nil, api.Errorf(api.Invalid, "%d bytes of memory for a mount are too few", s.cfg.MountMemory).Fix("give at least %d MiB", leastMountMemory>>20)
	}
	if _, err := newAllowList(c.AllowURLs); err != nil {
		return nil, err
	}
	if c.Advertise != "" {
		if err := checkServer("advertise", c.Advertise); err != nil {
			return nil, err
		}
	}
	if s.cfg.CacheLimit == 0 {
		s.cfg.CacheLimit = DefaultCacheLimit
	}
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return nil, fail(err)
	}
	s.cfg.Dir = dir
	if s.vmm, err = newHypervisor(s.cfg); err != nil {
		return nil, err
	}
	for _, sub := range []string{"bases", "overlays", "instances", "mounts", "profiles", "cache", "tmp", "operations", "active", "keys", "uploads", "counts", "handoffs"} {
		if err := os.MkdirAll(s.path(sub), 0o700); err != nil {
			return nil, noStore(err)
		}
	}
	f, err := os.OpenFile(s.path("lock"), os.O_CREATE, 0o600)
	if err != nil {
		return nil, noStore(err)
	}
	if err := f.Close(); err != nil {
		return nil, fail(err)
	}
	if err := s.begins(ctx); err != nil {
		at, once := context.WithCancel(ctx)
		once()
		return nil, fail(errors.Join(fmt.Errorf("open state folder %s: %w", dir, err), s.Close(at)))
	}
	return s, nil
}

// begins puts the store in order and, as the daemon, goes on where an earlier one stopped.
func (s *Service) begins(ctx context.Context) error {
	if s.cfg.Daemon {
		if err := s.lockDaemon(); err != nil {
			return err
		}
		if err := errors.Join(s.adopt(ctx, false), s.takeUpArrivals(ctx), s.sweepHandoffs(ctx)); err != nil {
			return err
		}
	}
	if err := errors.Join(s.sweep(ctx), s.sweepUploads(ctx), s.sweepOperations(ctx)); err != nil {
		return err
	}
	if _, err := os.Stat(s.countsPath()); errors.Is(err, fs.ErrNotExist) {
		s.count(ctx, func(*counts) {}) // from here on
	}
	if s.cfg.Daemon {
		ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		s.stop = cancel
		s.joined.Go(func() { s.janitor(ctx) })
		s.joined.Go(func() { s.tickArrivals(ctx) })
		s.joined.Go(func() { s.watch(ctx) })
	}
	return nil
}

// Close takes no more work and waits for the operations; those that still run when ctx ends
// are cancelled, or left to the next daemon where that can go on with them, and Close returns
// when they have cleaned up. VMs and mounts live on.
func (s *Service) Close(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.stop()
	s.stopArrivals()
	done := make(chan struct{})
	go func() { // ends with the work
		defer close(done)
		s.joined.Wait()
	}()
	select {
	case <-done:
	case <-ctx.Done():
		s.halt()
		s.mu.Lock()
		for _, op := range s.live {
			op.work(errStopping)
		}
		s.mu.Unlock()
		<-done
	}
	s.halt()
	err := s.saveLate()
	if cerr := s.vmm.Close(); cerr != nil { // of what this process needs no more
		s.log.Warn("let go of the hypervisor", "err", cerr)
	}
	if s.daemon != nil {
		s.daemon.unlock()
		s.daemon = nil
	}
	return fail(err)
}

func noStore(err error) error {
	return api.Errorf(api.Unavailable, "open state folder: %w", err).Fix("choose a folder that can be written to, with --state")
}

// Dir returns the store's folder.
func (s *Service) Dir() string { return s.cfg.Dir }

func (s *Service) path(parts ...string) string {
	return filepath.Join(append([]string{s.cfg.Dir}, parts...)...)
}

// sweep removes what processes left that have died: stages, instances without a record, and
// mounts that nothing uses.
func (s *Service) sweep(ctx context.Context) error {
	var dead []*stage
	err := s.locked(ctx, func() error {
		for _, kind := range []string{"tmp", "instances"} {
			names, err := s.list(kind)
			if err != nil {
				return err
			}
			for _, name := range names {
				dir := s.path(kind, name)
				if _, err := os.Stat(filepath.Join(dir, "record.json")); err == nil && kind == "instances" {
					continue
				}
				l, err := tryLock(dir, unix.LOCK_EX)
				if err == nil {
					dead = append(dead, &stage{dir, l})
				} else if !errors.Is(err, errLocked) && !errors.Is(err, fs.ErrNotExist) {
					return err
				}
			}
		}
		return nil
	})
	for _, st := range dead {
		s.log.Info("remove what a process left that was killed", "dir", st.dir)
		err = errors.Join(err, s.destroyVM(ctx, filepath.Join(st.dir, "vm")), st.drop())
	}
	if err != nil {
		return err
	}
	keys, err := s.list("mounts")
	for _, key := range keys {
		if used, uerr := s.mountUsed(key); uerr != nil || used {
			err = errors.Join(err, uerr)
			continue
		}
		err = errors.Join(err, s.releaseMount(ctx, key))
	}
	return err
}

// destroyVM ends the VM of a folder, if there is one.
func (s *Service) destroyVM(ctx context.Context, dir string) error {
	if _, err := os.Stat(dir); err != nil {
		return ignoreMissing(err)
	}
	return s.vmm.DestroyIn(ctx, dir)
}
