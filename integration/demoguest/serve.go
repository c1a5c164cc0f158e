package demoguest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"cloudlet/api/client"
)

// serveBound is how long the daemon may take to begin and to end.
const serveBound = 30 * time.Second

// serve runs the daemon over the store until stop is called. It ends with this process,
// however that ends.
func (l *Lab) serve(ctx context.Context) (stop func() error, err error) {
	log, err := os.Create(l.Path("serve.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(l.Program, "--state", l.Path("state"), "serve")
	cmd.Stdout, cmd.Stderr = log, log
	// In a group of its own: Ctrl-C is for this process, which ends the daemon at last.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	started, ended := make(chan error, 1), make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the signal comes when the thread that started it ends
		err := cmd.Start()
		started <- err
		if err == nil {
			ended <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	stop = func() error {
		err := cmd.Process.Signal(syscall.SIGTERM)
		select {
		case werr := <-ended:
			return errors.Join(err, werr)
		case <-time.After(serveBound):
			return errors.Join(err, fmt.Errorf("the daemon does not end; its log: %s", log.Name()), cmd.Process.Kill())
		}
	}
	if l.Daemon, err = client.New(client.Options{Server: "unix:" + l.Path("state", "cloudlet.sock")}); err != nil {
		return nil, errors.Join(err, stop())
	}
	ctx, cancel := context.WithTimeout(ctx, serveBound)
	defer cancel()
	for {
		if _, err = l.Daemon.Instances(ctx, false); err == nil {
			return stop, nil
		}
		select {
		case werr := <-ended:
			return nil, fmt.Errorf("the daemon has ended: %w; its log: %s", werr, log.Name())
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("the daemon does not answer: %w; its log: %s", err, log.Name()), stop())
		case <-time.After(10 * time.Millisecond):
		}
	}
}
