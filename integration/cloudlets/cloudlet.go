package cloudlets

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"
	"cloudlet/integration/guest"
	"cloudlet/integration/link"

	"golang.org/x/sys/unix"
)

const (
	// port is where each daemon listens.
	port = 7300
	// serveBound is how long a daemon may take to begin and to end.
	serveBound = 30 * time.Second
	// runBound is how long a guest may take to answer.
	runBound = 2 * time.Minute
)

// Cloudlet is one of a lab's. Its fields stay as they are.
type Cloudlet struct {
	Name   string
	Host   string         // IP address
	URL    string         // of its API, as others reach it
	State  string         // folder of its store
	Token  string         // of the role operate
	Peer   string         // token of the role peer
	Client *client.Client // over its unix socket

	lab   *Lab
	index int
	net   *link.Namespace
	cmd   *exec.Cmd  // the daemon; nil: none runs
	ended chan error // of cmd
}

func (l *Lab) cloudlet(i int) (c *Cloudlet, err error) {
	c = &Cloudlet{Name: string(rune('a' + i)), Host: address(i), Token: rand.Text(), Peer: rand.Text(), lab: l, index: i}
	c.URL = fmt.Sprintf("http://%s:%d", c.Host, port)
	c.State = filepath.Join(l.Dir, c.Name)
	c.Client, err = client.New(client.Options{Server: "unix:" + filepath.Join(c.State, "cloudlet.sock")})
	return c, err
}

// prepare makes the store: tokens, and the bases of another store.
func (c *Cloudlet) prepare(ctx context.Context, store string) error {
	if err := os.MkdirAll(c.State, 0o700); err != nil {
		return err
	}
	if c.lab.Disk > 0 {
		if err := unix.Mount("cloudlet", c.State, "tmpfs", 0, fmt.Sprintf("mode=700,size=%d", c.lab.Disk)); err != nil {
			return fmt.Errorf("mount the disk of cloudlet %s: %w", c.Name, err)
		}
	}
	tokens := fmt.Sprintf("operate lab %s\npeer others %s\n", c.Token, c.Peer)
	if err := os.WriteFile(filepath.Join(c.State, "tokens"), []byte(tokens), 0o600); err != nil {
		return err
	}
	return CopyBases(ctx, store, c.State)
}

// Log is the file that the daemon's messages go to.
func (c *Cloudlet) Log() string { return filepath.Join(c.lab.Dir, c.Name+".log") }

// Start starts the daemon and waits until it answers. It ends with this process, however that
// ends.
func (c *Cloudlet) Start(ctx context.Context, args ...string) error {
	log, err := os.OpenFile(c.Log(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	all := append([]string{"--state", c.State, "serve", "--listen", fmt.Sprintf("%s:%d", c.Host, port), "--insecure", "--advertise", c.URL, "--drain", "2s"}, c.lab.Serve...)
	if c.lab.ServeEach != nil {
		own, err := c.lab.ServeEach(c)
		if err != nil {
			return err
		}
		all = append(all, own...)
	}
	cmd := exec.Command(c.lab.Program, append(all, args...)...)
	cmd.Stdout, cmd.Stderr = log, log
	// In a group of its own: Ctrl-C is for this process, which ends the daemon at last.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	started, ended := make(chan error, 1), make(chan error, 1)
	go func() {
		running := false
		err := c.net.Do(func() error { // whose thread is the daemon's parent, and stays
			err := cmd.Start()
			running = err == nil
			started <- err
			if running {
				return cmd.Wait()
			}
			return nil
		})
		if !running {
			started <- err
		}
		ended <- err
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start cloudlet %s: %w", c.Name, err)
	}
	c.cmd, c.ended = cmd, ended
	if err := c.awaitReady(ctx); err != nil {
		return errors.Join(err, c.End(syscall.SIGTERM))
	}
	return nil
}

func (c *Cloudlet) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, serveBound)
	defer cancel()
	for {
		_, err := c.Client.Instances(ctx, false)
		if err == nil {
			return nil
		}
		select {
		case werr := <-c.ended:
			c.ended <- nil // for End
			return fmt.Errorf("cloudlet %s has ended: %w; its log: %s", c.Name, werr, c.Log())
		case <-ctx.Done():
			return fmt.Errorf("cloudlet %s does not answer: %w; its log: %s", c.Name, err, c.Log())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// PID returns the daemon's process.
func (c *Cloudlet) PID() int { return c.cmd.Process.Pid }

// End ends the daemon by a signal and waits for it; without one it does nothing. Instances go
// on.
func (c *Cloudlet) End(sig syscall.Signal) error {
	if c.cmd == nil {
		return nil
	}
	c.Client.Close()
	err := c.cmd.Process.Signal(sig)
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	select {
	case werr := <-c.ended:
		if sig == syscall.SIGKILL {
			werr = nil // it says that it was killed
		}
		err = errors.Join(err, werr)
	case <-time.After(serveBound):
		err = errors.Join(err, fmt.Errorf("cloudlet %s does not end; its log: %s", c.Name, c.Log()), c.cmd.Process.Kill(), <-c.ended)
	}
	c.cmd = nil
	return err
}

// CLI runs the program over the store, in the cloudlet's namespace, and decodes what it prints
// into v, if not nil.
func (c *Cloudlet) CLI(ctx context.Context, v any, args ...string) error {
	cmd := exec.CommandContext(ctx, c.lab.Program, append([]string{"--state", c.State, "--json"}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = time.Minute
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := c.net.Do(cmd.Run)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return fmt.Errorf("cloudlet %s: %v: %w: %s%s", c.Name, args, err, stdout.Bytes(), stderr.Bytes())
	}
	if v == nil {
		return nil
	}
	return json.Unmarshal(stdout.Bytes(), v)
}

// Run runs an instance whose application can be reached from the clients' namespace, and waits
// until it answers.
func (c *Cloudlet) Run(ctx context.Context, ref string) (in api.Instance, err error) {
	op, err := c.Client.Run(ctx, api.Run{
		Ref: ref, Forwards: []api.Forward{{Address: "0.0.0.0", Guest: guest.Port}},
		Probe: &api.Probe{Port: guest.Port, Path: "/healthz"}, Timeout: runBound,
	})
	if err == nil {
		op, err = c.Client.Wait(ctx, op, nil)
	}
	if err != nil {
		return in, err
	}
	return client.Result[api.Instance](op)
}

// Address returns host:port of the application in an instance of this cloudlet, for clients.
func (c *Cloudlet) Address(in api.Instance) string {
	for _, e := range in.Endpoints {
		if e.Guest == guest.Port {
			return c.reach(e.Address)
		}
	}
	return ""
}

// reach puts the cloudlet's host in the place of an unspecified one.
func (c *Cloudlet) reach(address string) string {
	host, port, err := net.SplitHostPort(address)
	if ip := net.ParseIP(host); err != nil || ip != nil && !ip.IsUnspecified() {
		return address
	}
	return net.JoinHostPort(c.Host, port)
}

// Do runs f on a thread in the cloudlet's network namespace, as link.Namespace.Do does.
func (c *Cloudlet) Do(f func() error) error { return c.net.Do(f) }

// Path returns a path in the store.
func (c *Cloudlet) Path(parts ...string) string {
	return filepath.Join(append([]string{c.State}, parts...)...)
}

// close removes the instances, ends the daemon and says what is left.
func (c *Cloudlet) close(ctx context.Context) error {
	if _, err := os.Stat(c.State); err != nil || c.net == nil {
		return nil // it never was
	}
	var err error
	var list []api.Instance
	if lerr := c.CLI(ctx, &list, "ps", "--all"); lerr != nil {
		err = lerr
	}
	for _, in := range list {
		err = errors.Join(err, c.CLI(ctx, nil, "rm", "--force", in.ID))
	}
	err = errors.Join(err, c.End(syscall.SIGTERM))
	if left := Leftovers(c.State); len(left) > 0 {
		err = errors.Join(err, fmt.Errorf("cloudlet %s left behind: %s", c.Name, strings.Join(left, "; ")))
	}
	return err
}
