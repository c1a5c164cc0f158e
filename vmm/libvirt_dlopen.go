//go:build cgo && libvirt_dlopen

package vmm

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"libvirt.org/go/libvirt"
)

// eventLoop is libvirt's loop for events, of which a process has one, as libvirt knows no more.
// It runs while there are connections.
var eventLoop struct {
	mu         sync.Mutex
	registered bool
	users      int
	stopped    chan struct{} // closed when the loop has ended
	ending     chan struct{} // closed when it is to end
}

// joinLoop runs the loop, which must be there before the first connection.
func joinLoop() error {
	l := &eventLoop
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.registered {
		if err := libvirt.EventRegisterDefaultImpl(); err != nil {
			return libraryError(err)
		}
		l.registered = true
	}
	if l.users++; l.users == 1 {
		ending, stopped := make(chan struct{}), make(chan struct{})
		l.ending, l.stopped = ending, stopped
		go func() { // joined by leaveLoop
			defer close(stopped)
			for {
				select {
				case <-ending:
					return
				default:
				}
				if libvirt.EventRunDefaultImpl() != nil {
					return
				}
			}
		}()
	}
	return nil
}

// leaveLoop ends the loop with its last user.
func leaveLoop() {
	l := &eventLoop
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.users--; l.users > 0 {
		return
	}
	close(l.ending)
	// A timer that is due wakes the loop.
	timer, err := libvirt.EventAddTimeout(0, func(timer int) { libvirt.EventUpdateTimeout(timer, -1) })
	if err == nil {
		<-l.stopped
		_ = libvirt.EventRemoveTimeout(timer)
	}
}

// The variable by which libvirt's library is told what to log, and its value for errors only.
const (
	logVariable = "LIBVIRT_DEBUG"
	logErrors   = "4"
)

// connection is a library over the real one.
type connection struct {
	c        *libvirt.Connect
	watching []int
	broken   chan struct{}
	once     sync.Once
}

const (
	// keepAlive is after how many seconds of silence, and how often, the daemon is asked whether
	// it is there.
	keepAlive      = 5
	keepAliveTries = 3
)

func openLibvirt(u uri) (library, error) {
	if u.root() != "" && os.Getenv(logVariable) == "" {
		// The driver runs here, and would tell of each VM on this process's standard error.
		if err := os.Setenv(logVariable, logErrors); err != nil {
			return nil, err
		}
	}
	if err := joinLoop(); err != nil {
		return nil, fmt.Errorf("%w: its library cannot be used (%w): install libvirt0, or use --vmm qemu", ErrNoLibvirt, err)
	}
	c, err := libvirt.NewConnect(string(u))
	if err != nil {
		leaveLoop()
		if err = libraryError(err); !errors.Is(err, ErrNoLibvirt) {
			err = fmt.Errorf("%w: %w", ErrNoLibvirt, err)
		}
		return nil, fmt.Errorf("%w: see that its daemon runs and lets this user in, or use --vmm qemu", err)
	}
	l := &connection{c: c, broken: make(chan struct{})}
	if u.root() == "" { // an embedded driver is always there
		err := c.SetKeepAlive(keepAlive, keepAliveTries)
		if err == nil {
			err = c.RegisterCloseCallback(func(*libvirt.Connect, libvirt.ConnectCloseReason) { l.fail() })
		}
		if err != nil {
			return nil, errors.Join(libraryError(err), l.close())
		}
	}
	return l, nil
}

func (l *connection) fail() { l.once.Do(func() { close(l.broken) }) }

func (l *connection) alive() bool {
	select {
	case <-l.broken:
		return false
	default:
	}
	ok, err := l.c.IsAlive()
	return ok && err == nil
}

func (l *connection) close() error {
	for _, id := range l.watching {
		_ = l.c.DomainEventDeregister(id) // of a connection that may be broken
	}
	_ = l.c.UnregisterCloseCallback()
	l.fail()
	_, err := l.c.Close()
	leaveLoop()
	return libraryError(err)
}

func (l *connection) versions() (daemon, lib uint32, err error) {
	if daemon, err = l.c.GetLibVersion(); err == nil {
		lib, err = libvirt.GetVersion()
	}
	return daemon, lib, libraryError(err)
}

func (l *connection) create(xml string) error {
	d, err := l.c.DomainCreateXML(xml, libvirt.DOMAIN_START_PAUSED)
	if err != nil {
		return libraryError(err)
	}
	return libraryError(d.Free())
}

func (l *connection) restore(image string) error {
	return libraryError(l.c.DomainRestoreFlags(image, "", libvirt.DOMAIN_SAVE_PAUSED))
}

func (l *connection) domain(uuid string, f func(*libvirt.Domain) error) error {
	d, err := l.c.LookupDomainByUUIDString(uuid)
	if err != nil {
		return libraryError(err)
	}
	return libraryError(errors.Join(f(d), d.Free()))
}

func (l *connection) command(uuid, text string, f *os.File) (answer string, err error) {
	err = l.domain(uuid, func(d *libvirt.Domain) (err error) {
		if f == nil {
			answer, err = d.QemuMonitorCommand(text, libvirt.DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT)
			return err
		}
		answer, _, err = d.QemuMonitorCommandWithFiles(text, []os.File{*f}, libvirt.DOMAIN_QEMU_MONITOR_COMMAND_DEFAULT)
		return err
	})
	return answer, err
}

func (l *connection) destroy(uuid string, graceful bool) error {
	flags := libvirt.DOMAIN_DESTROY_DEFAULT
	if graceful {
		flags = libvirt.DOMAIN_DESTROY_GRACEFUL
	}
	return l.domain(uuid, func(d *libvirt.Domain) error { return d.DestroyFlags(flags) })
}

func (l *connection) active(uuid string) (active bool, err error) {
	err = l.domain(uuid, func(d *libvirt.Domain) (err error) {
		active, err = d.IsActive()
		return err
	})
	if errors.Is(err, errNoDomain) {
		return false, nil
	}
	return active, err
}

func (l *connection) capabilities() (string, error) {
	text, err := l.c.GetCapabilities()
	return text, libraryError(err)
}

func (l *connection) domainCapabilities(emulator, machine, virt string) (string, error) {
	text, err := l.c.GetDomainCapabilities(emulator, "x86_64", machine, virt, 0)
	return text, libraryError(err)
}

// stopWords are libvirt's words for the details of an end, as they stand in a domain's log.
var stopWords = map[libvirt.DomainEventStoppedDetailType]string{
	libvirt.DOMAIN_EVENT_STOPPED_SHUTDOWN:      "shutdown",
	libvirt.DOMAIN_EVENT_STOPPED_DESTROYED:     "destroyed",
	libvirt.DOMAIN_EVENT_STOPPED_CRASHED:       "crashed",
	libvirt.DOMAIN_EVENT_STOPPED_MIGRATED:      "migrated",
	libvirt.DOMAIN_EVENT_STOPPED_SAVED:         "saved",
	libvirt.DOMAIN_EVENT_STOPPED_FAILED:        "failed",
	libvirt.DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT: "from-snapshot",
}

func (l *connection) watch(changed func(domainEvent), lost func()) error {
	id, err := l.c.DomainEventLifecycleRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventLifecycle) {
		uuid, err := d.GetUUIDString()
		if err == nil && e.Event == libvirt.DOMAIN_EVENT_STOPPED {
			changed(domainEvent{uuid: uuid, ended: true, why: stopWords[libvirt.DomainEventStoppedDetailType(e.Detail)]})
		}
	})
	if err != nil {
		return libraryError(err)
	}
	l.watching = append(l.watching, id)
	id, err = l.c.DomainEventIOErrorReasonRegister(nil, func(_ *libvirt.Connect, d *libvirt.Domain, e *libvirt.DomainEventIOErrorReason) {
		if uuid, err := d.GetUUIDString(); err == nil && e.Action == libvirt.DOMAIN_EVENT_IO_ERROR_PAUSE {
			changed(domainEvent{uuid: uuid, why: e.Reason})
		}
	})
	if err != nil {
		return libraryError(err)
	}
	l.watching = append(l.watching, id)
	go func() { // joined by close, which breaks the connection
		<-l.broken
		lost()
	}()
	return nil
}

// libraryError translates an error of the library.
func libraryError(err error) error {
	var e libvirt.Error
	if !errors.As(err, &e) {
		return err
	}
	switch e.Code {
	case libvirt.ERR_NO_DOMAIN:
		return fmt.Errorf("%w: %s", errNoDomain, e.Message)
	case libvirt.ERR_DOM_EXIST:
		return fmt.Errorf("%w: %s", ErrNameTaken, e.Message)
	case libvirt.ERR_OPERATION_INVALID:
		if strings.Contains(e.Message, "not running") {
			return fmt.Errorf("%w: %s", errNotRunning, e.Message)
		}
	case libvirt.ERR_OPERATION_FAILED:
		if strings.Contains(e.Message, "already ") && strings.Contains(e.Message, "domain '") {
			return fmt.Errorf("%w: %s", ErrNameTaken, e.Message)
		}
	case libvirt.ERR_NO_CONNECT, libvirt.ERR_INVALID_CONN, libvirt.ERR_AUTH_FAILED, libvirt.ERR_AUTH_CANCELLED, libvirt.ERR_AUTH_UNAVAILABLE:
		return fmt.Errorf("%w: %s", ErrNoLibvirt, e.Message)
	}
	if e.Domain == libvirt.FROM_RPC || e.Code == libvirt.ERR_RPC {
		return fmt.Errorf("%w: %s", ErrNoLibvirt, e.Message)
	}
	return errors.New("libvirt: " + e.Message)
}
