package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const (
	// immutable is how long the kernel may keep names and attributes.
	immutable = 24 * time.Hour
	// maxBackground bounds the kernel's reads ahead in flight. Held ones count too, so it is
	// far above the default of 12.
	maxBackground = 256
	// unmountWait bounds the wait for the end of the mount after its unmount.
	unmountWait = 10 * time.Second
	// busyTries and busyPause bound how long a file that is just being closed is waited for.
	busyTries = 10
	busyPause = 20 * time.Millisecond
)

// Server is a mount that is being served.
type Server struct {
	point, source string
	entry         mountEntry
	started       time.Time
	begun         atomic.Int64 // when a guest began to run, Unix time in ns; 0: none has
	readAheadErr  error
	status        func() any
	log           *slog.Logger

	root         *rootNode
	memory, disk *reads
	recorder     recorder
	fuse         *fuse.Server
	control      *control // nil without a socket

	abortOnce sync.Once
	aborted   chan struct{}

	// served is closed when the kernel's connection has ended, done when all is cleaned up
	// and err is set.
	served, done chan struct{}
	err          error
}

// Mount serves o on dir, which must be an empty directory and no mountpoint, until it is
// unmounted. The caller ends with Unmount or waits with Wait.
func Mount(dir string, o Options) (*Server, error) {
	if err := o.check(); err != nil {
		return nil, fmt.Errorf("mount %s: %w", dir, err)
	}
	point, err := checkPoint(dir)
	if err != nil {
		return nil, err
	}
	s := &Server{
		point: point, source: o.source(), started: time.Now(), status: o.Status, log: o.Log,
		aborted: make(chan struct{}), served: make(chan struct{}), done: make(chan struct{}),
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if o.Socket != "" {
		if s.control, err = listenControl(s, o.Socket); err != nil {
			return nil, err
		}
	}
	if err := s.start(o); err != nil {
		if s.control != nil {
			err = errors.Join(err, s.control.listener.Close())
		}
		return nil, err
	}
	return s, nil
}

// start mounts and begins to serve.
func (s *Server) start(o Options) error {
	fd, err := attach(s.point, s.source, o.AllowOther)
	if err != nil {
		return err
	}
	// Until a server owns it, giving up means to close the descriptor and to detach.
	giveUp := func(err error) error {
		unix.Close(fd)
		return errors.Join(fmt.Errorf("mount %s: %w", s.point, err), detach(s.point, true))
	}
	entry, found, err := findMount(s.point)
	if err == nil && !found {
		err = errors.New("is not in the mount table")
	}
	if err != nil {
		return giveUp(err)
	}
	s.entry = entry
	watchFD, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return giveUp(err)
	}
	dead := func() bool { return connectionDead(watchFD) }
	newReads := func(name string, f File, hold bool) *reads {
		return &reads{file: f, name: name, hold: hold, aborted: s.aborted, dead: dead, log: s.log, inFlight: map[*read]struct{}{}}
	}
	if o.Record {
		o.ReadAheadKiB = pushPage >> 10
	}
	s.memory, s.disk = newReads(MemoryName, o.Memory, true), newReads(DiskName, o.Disk, false)
	s.memory.record, s.disk.record = &s.recorder, &s.recorder
	s.root = newRoot(s.memory, s.disk, newReads(InfoName, bytesFile(o.Info), false), o.AllowOther)
	s.fuse, err = fuse.NewServer(newRawFS(s.root, s.log), fmt.Sprintf("/dev/fd/%d", fd), mountOptions(s.log))
	if err != nil {
		unix.Close(watchFD)
		return errors.Join(fmt.Errorf("mount %s: %w", s.point, err), detach(s.point, true))
	}
	if s.readAheadErr = setReadAhead(s.entry, o.ReadAheadKiB); s.readAheadErr != nil {
		s.log.Warn("read-ahead stays as it is", "error", s.readAheadErr)
	}
	if s.control != nil {
		s.control.start()
	}
	go s.run(watchFD) // ends with the mount; Wait and Unmount join it
	return nil
}

func newRawFS(root *rootNode, l *slog.Logger) fuse.RawFileSystem {
	timeout := immutable
	return fs.NewNodeFS(root, &fs.Options{
		EntryTimeout: &timeout, AttrTimeout: &timeout, NegativeTimeout: &timeout,
		RootStableAttr: &fs.StableAttr{Ino: rootIno},
		MountOptions:   *mountOptions(l),
		UID:            root.owner.uid, GID: root.owner.gid,
	})
}

// mountOptions are go-fuse's settings. Without extended attributes callers see ENOTSUP,
// which libvirt needs.
func mountOptions(l *slog.Logger) *fuse.MountOptions {
	return &fuse.MountOptions{
		Name: fsSubtype, MaxWrite: maxRequest, MaxBackground: maxBackground,
		ExplicitDataCacheControl: true, DisableXAttrs: true, DisableSplice: true,
		Logger: log.New(slogWriter{l}, "", 0),
	}
}

// slogWriter passes go-fuse's messages on.
type slogWriter struct{ log *slog.Logger }

func (w slogWriter) Write(p []byte) (int, error) {
	w.log.Warn("go-fuse", "message", string(p))
	return len(p), nil
}

// bytesFile is a File in memory.
type bytesFile []byte

func (b bytesFile) Size() int64 { return int64(len(b)) }

func (b bytesFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	n := copy(p, b[min(off, int64(len(b))):])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// connectionDead reports whether the kernel has ended the connection of a FUSE descriptor.
func connectionDead(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd)}}
	n, err := unix.Poll(p, 0)
	return err == nil && n == 1 && p[0].Revents&(unix.POLLERR|unix.POLLNVAL) != 0
}

// run serves until the connection has ended, then cleans up.
func (s *Server) run(watchFD int) {
	s.fuse.Serve()
	for _, f := range s.root.files {
		f.drops.Wait()
	}
	close(s.served)
	unix.Close(watchFD)
	s.err = s.clear()
	if s.control != nil {
		s.err = errors.Join(s.err, s.control.stop())
	}
	close(s.done)
}

// clear removes the mount if its connection has ended but it is still there, which is so
// after an abort by fusectl.
func (s *Server) clear() error {
	mounted, err := s.mounted()
	if err != nil || !mounted {
		return err
	}
	err = fmt.Errorf("mount %s: its FUSE connection was aborted from outside", s.point)
	return errors.Join(err, detach(s.point, true))
}

// mounted reports whether this mount is the one at its mountpoint.
func (s *Server) mounted() (bool, error) {
	m, found, err := findMount(s.point)
	return found && m.bdi() == s.entry.bdi() && m.isOurs(), err
}

// Wait returns when the mount has ended, by Unmount or from outside. The error is nil
// after an ordinary unmount.
func (s *Server) Wait() error {
	<-s.done
	return s.err
}

// Abort gives up on reads that fail: held ones are answered EIO now, those in progress
// when they are a second old, and from now on a failing read is never held. Reads that
// succeed are still served. A guest whose memory read is aborted dies by SIGBUS.
func (s *Server) Abort() {
	s.abortOnce.Do(func() {
		s.log.Warn("reads aborted", "mountpoint", s.point)
		close(s.aborted)
	})
}

// Unmount ends the mount and waits for it, at most 10 s and as long as ctx allows. While
// files are open or mapped it changes nothing and returns ErrBusy. A mount that has ended
// already is no error.
func (s *Server) Unmount(ctx context.Context) error {
	return s.end(ctx, s.unmount)
}

// ForceUnmount ends the mount even while it is in use: reads are aborted, the directory is
// freed and the kernel's connection ended. Whoever has files mapped gets SIGBUS at the next
// missing page.
func (s *Server) ForceUnmount(ctx context.Context) error {
	return s.end(ctx, s.forceUnmount)
}

func (s *Server) end(ctx context.Context, how func(context.Context) error) error {
	select {
	case <-s.done:
		return nil
	default:
	}
	if err := how(ctx); err != nil {
		return err
	}
	return s.Wait()
}

func (s *Server) unmount(ctx context.Context) error {
	ticker := time.NewTicker(busyPause)
	defer ticker.Stop()
	for try := 1; ; try++ {
		mounted, err := s.mounted()
		if err != nil {
			return err
		}
		if !mounted {
			return s.waitServed(ctx)
		}
		err = detach(s.point, false)
		if err == nil {
			return s.waitServed(ctx)
		}
		if !errors.Is(err, ErrBusy) || try == busyTries {
			return err
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		case <-ticker.C:
		}
	}
}

func (s *Server) forceUnmount(ctx context.Context) error {
	s.Abort()
	mounted, err := s.mounted()
	if err != nil {
		return err
	}
	if mounted {
		if err := detach(s.point, true); err != nil {
			return err
		}
	}
	select {
	case <-s.served: // nobody held it
	default:
		if err := abortConnection(s.entry); err != nil {
			return err
		}
	}
	return s.waitServed(ctx)
}

// waitServed waits for the end of the connection.
func (s *Server) waitServed(ctx context.Context) error {
	timer := time.NewTimer(unmountWait)
	defer timer.Stop()
	select {
	case <-s.served:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for end of mount %s: %w", s.point, ctx.Err())
	case <-timer.C:
		return fmt.Errorf("wait for end of mount %s: %w: it is detached, and ends when its last user has ended", s.point, ErrBusy)
	}
}
