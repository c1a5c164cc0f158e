package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"cloudlet/api/client"
)

// serveBound is how long a daemon may take to begin and to end.
const serveBound = 30 * time.Second

// daemon is a `cloudlet serve` of its own process. It ends with this one, however that ends.
type daemon struct {
	pid    int
	socket string
	took   time.Duration // from before the program was executed until it was ready
	client *client.Client

	cmd   *exec.Cmd
	log   string
	ended chan error
}

// serving runs f with a daemon over a store.
func (b *bench) serving(ctx context.Context, dir string, f func(*daemon) error) error {
	d, err := b.serve(ctx, dir)
	if err != nil {
		return err
	}
	return errors.Join(f(d), d.end(syscall.SIGTERM))
}

// serve starts a daemon over a store and waits until it is ready. The caller ends it.
func (b *bench) serve(ctx context.Context, dir string) (_ *daemon, err error) {
	d := &daemon{socket: filepath.Join(dir, "cloudlet.sock"), log: b.path("serve.log"), ended: make(chan error, 1)}
	if d.client, err = d.dial(); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(d.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	d.cmd = exec.Command(b.program, "--state", dir, "serve")
	d.cmd.Stdout, d.cmd.Stderr = log, log
	// In a group of its own: Ctrl-C is for this process, which ends the daemon at last.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	begun := time.Now()
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the signal comes when the thread that started it ends
		err := d.cmd.Start()
		started <- err
		if err == nil {
			d.ended <- d.cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	d.pid = d.cmd.Process.Pid
	if err := d.awaitReady(ctx); err != nil {
		return nil, errors.Join(err, d.end(syscall.SIGTERM))
	}
	d.took = time.Since(begun)
	return d, nil
}

// dial returns a client with connections of its own.
func (d *daemon) dial() (*client.Client, error) {
	return client.New(client.Options{Server: "unix:" + d.socket})
}

// awaitReady asks /readyz until it says so.
func (d *daemon) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, serveBound)
	defer cancel()
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", d.socket)
	}}}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		err := ready(ctx, c)
		if err == nil {
			return nil
		}
		select {
		case werr := <-d.ended:
			d.ended <- nil // for end
			return fmt.Errorf("the daemon has ended: %w; its log: %s", werr, d.log)
		case <-ctx.Done():
			return fmt.Errorf("the daemon is not ready: %w; its log: %s", err, d.log)
		case <-tick.C:
		}
	}
}

func ready(ctx context.Context, c *http.Client) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://cloudlet/readyz", nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, err := io.ReadAll(resp.Body)
		return errors.Join(fmt.Errorf("%s: %s", resp.Status, b), err)
	}
	return nil
}

// end ends the daemon by a signal and waits for it.
func (d *daemon) end(sig syscall.Signal) error {
	d.client.Close()
	err := d.cmd.Process.Signal(sig)
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	select {
	case werr := <-d.ended:
		if sig == syscall.SIGKILL {
			werr = nil // it says that it was killed
		}
		return errors.Join(err, werr)
	case <-time.After(serveBound):
		return errors.Join(err, fmt.Errorf("the daemon does not end; its log: %s", d.log), d.cmd.Process.Kill())
	}
}
