package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"time"

	"cloudlet/api"
	"cloudlet/integration/appclient"
	"cloudlet/integration/cloudlets"
	"cloudlet/integration/guest"
	"cloudlet/vmm"
)

// session is two cloudlets on a link, with the application's overlay at the first.
type session struct {
	lab     *cloudlets.Lab
	a, b    *cloudlets.Cloudlet
	app     string // id of the overlay
	guest   guest.Guest
	machine vmm.Machine
}

// open makes a session. Close it.
func (b *bench) open(ctx context.Context, link string) (s *session, err error) {
	o := b.options
	if o.Network, err = cloudlets.FindNetwork(link); err != nil {
		return nil, err
	}
	s = &session{}
	if s.lab, err = cloudlets.Open(ctx, o); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close(context.WithoutCancel(ctx)))
			s = nil
		}
	}()
	s.a, s.b = s.lab.Cloudlets[0], s.lab.Cloudlets[1]
	s.lab.Say("%s: the application's overlay, and a first handoff that brings it to the other cloudlet", o.Network.Text)
	if s.guest, err = guest.Build(ctx, o.GuestDir, s.lab.Log); err != nil {
		return s, err
	}
	bases, err := s.a.Client.Bases(ctx)
	if err != nil {
		return s, err
	}
	if s.machine, err = vmm.ParseMachine(bases[0].Machine); err != nil {
		return s, err
	}
	s.app, err = s.lab.Application(ctx, s.a, func(address string) error { return s.launch(ctx, address) })
	if err != nil {
		return s, err
	}
	if err := os.MkdirAll(s.mount(), 0o755); err != nil {
		return s, err
	}
	if err := s.a.CLI(ctx, nil, "mount", "--detach", s.app, s.mount()); err != nil {
		return s, err
	}
	_, err = within(ctx, b.bound, func(ctx context.Context) (handoffSample, error) {
		return s.handoff(ctx, condition{Fill: 1, Link: link}, "first")
	})
	if err != nil {
		return s, fmt.Errorf("the first handoff: %w", err)
	}
	return s, nil
}

// mount is where the launch image is mounted, to compare residues with.
func (s *session) mount() string { return filepath.Join(s.lab.Dir, "launch") }

func (s *session) close(ctx context.Context) error {
	var err error
	if out, uerr := exec.Command("fusermount3", "-u", s.mount()).CombinedOutput(); uerr != nil {
		if _, serr := os.Stat(filepath.Join(s.mount(), "memory")); serr == nil {
			err = fmt.Errorf("unmount %s: %w: %s", s.mount(), uerr, out)
		}
	}
	if rerr := os.Remove(s.mount()); err == nil && !errors.Is(rerr, fs.ErrNotExist) {
		err = rerr
	}
	return errors.Join(err, s.lab.Close(ctx), os.RemoveAll(s.scratch()))
}

// scratch is the folder for files of a single measurement.
func (s *session) scratch() string { return filepath.Join(s.lab.Dir, "scratch") }

// ask makes requests to the application.
func (s *session) ask(ctx context.Context, address string, paths ...string) error {
	for _, path := range paths {
		if err := s.lab.Ask(ctx, nil, http.MethodPost, address, path); err != nil {
			return err
		}
	}
	return nil
}

// launch is what the application has done when its overlay is made.
func (s *session) launch(ctx context.Context, address string) error {
	return s.ask(ctx, address, "/write?mib=4&seed=app", "/append?client=launch&n=1")
}

// fill brings the application into the condition of a cell.
func (s *session) fill(ctx context.Context, address string, c condition, seed string) error {
	return s.ask(ctx, address, fmt.Sprintf("/fill?mib=%d&seed=%s", c.Fill, seed), fmt.Sprintf("/churn?kib_per_s=%d", c.Churn))
}

// work lets a client begin, and waits for its usual silences, the longest of which it returns.
func (s *session) work(ctx context.Context, find func(context.Context) (string, error)) (c *appclient.Client, quiet time.Duration, err error) {
	c, err = appclient.Start(ctx, appclient.Config{Name: "c", Find: find, Dial: s.lab.Dial, Rest: rest})
	if err != nil {
		return nil, 0, err
	}
	begin := time.Now()
	select {
	case <-time.After(settle):
	case <-ctx.Done():
		c.Stop()
		return nil, 0, context.Cause(ctx)
	}
	return c, c.Gap(begin, time.Now()).Length(), nil
}

// verify ends the client and sees that nothing that was acknowledged is lost, and that the
// application at an address holds what it must.
func (s *session) verify(ctx context.Context, c *appclient.Client, address, token string) (int64, error) {
	c.Stop()
	if err := c.Verify(ctx, address); err != nil {
		return 0, err
	}
	_, err := s.lab.Verify(ctx, address, token)
	return c.Report().Acknowledged, err
}

// token asks an application who it is.
func (s *session) token(ctx context.Context, address string) (string, error) {
	var a struct{ Token string }
	return a.Token, s.lab.Ask(ctx, &a, http.MethodGet, address, "/")
}

// place is an address that changes.
type place struct{ atomic.Pointer[string] }

func (p *place) find(context.Context) (string, error) { return *p.Load(), nil }

func (p *place) set(address string) { p.Store(&address) }

// remove removes an instance, also when ctx has ended.
func remove(ctx context.Context, c *cloudlets.Cloudlet, id string) error {
	err := c.Client.DeleteInstance(context.WithoutCancel(ctx), id, true)
	if api.CodeOf(err) == api.NotFound {
		return nil
	}
	return err
}
