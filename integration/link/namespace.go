package link

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"

	"golang.org/x/sys/unix"
)

// Namespace is a network namespace. It has no name: it goes when it is closed and the last
// process in it has ended, however this one ends. Its methods are safe for concurrent use.
type Namespace struct{ f *os.File }

// NewNamespace makes a network namespace, whose loopback device is up.
func NewNamespace() (*Namespace, error) {
	n := &Namespace{}
	err := onThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("new network namespace: %w", err)
		}
		if err := ip("link", "set", "lo", "up"); err != nil {
			return err
		}
		n.f, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		return nil, err
	}
	return n, nil
}

// Close lets the namespace go once no process is in it.
func (n *Namespace) Close() error { return n.f.Close() }

// Do runs f on a thread that is in the namespace: the sockets that f makes and the programs
// that it starts are there. The thread ends with f, and what f started with Pdeathsig is told.
func (n *Namespace) Do(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(int(n.f.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

// IP runs the program ip(8) in the namespace.
func (n *Namespace) IP(args ...string) error { return n.Do(func() error { return ip(args...) }) }

// Path names the namespace for ip(8), as long as it is not closed.
func (n *Namespace) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.f.Fd()) }

// onThread runs f on a thread of its own, which may be spoilt.
func onThread(f func() error) error {
	ended := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends
		ended <- f()
	}()
	return <-ended
}

func ip(args ...string) error {
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ip %v: %w: %s", args, err, out)
	}
	return nil
}

// End is one end of a link that joins namespaces.
type End struct {
	Net     *Namespace
	Address string // IPv4, which a device of the namespace has already
}

// Join makes a link between two namespaces: what one sends to the other's address, from its
// own, crosses it. There is no listener. Stats calls the way to a down.
func Join(p Params, a, b End) (*Link, error) {
	if p.Congestion != "" {
		return nil, errors.New("make link: Params.Congestion is for the listener of Up")
	}
	l := &Link{}
	var err error
	if l.near, err = a.open(b, p.offload()); err == nil {
		l.far, err = b.open(a, p.offload())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make link: %w", err), l.closeFiles())
	}
	l.move(p)
	return l, nil
}

// open makes an end's device and the route to the other end.
func (e End) open(to End, offload bool) (f *os.File, err error) {
	err = e.Net.Do(func() error {
		var name string
		if f, name, err = openTun("link%d", offload); err != nil {
			return err
		}
		if err := bringUp(name); err != nil {
			return err
		}
		return ip("route", "replace", to.Address+"/32", "dev", name, "src", e.Address)
	})
	if err != nil && f != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, err
}
