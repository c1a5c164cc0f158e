package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"
	"cloudlet/api/service"
	"cloudlet/integration/figures"
	"cloudlet/integration/guest"
)

// dirtyMiB is how much of its memory the launch VM has written before it is captured: with
// what the guest itself does, less than a mount's cache of decoded frames holds.
const dirtyMiB = 16

// bench is one run of the measurements.
type bench struct {
	program, guestDir, dir, out string
	only                        string
	pairs                       int
	stay                        time.Duration

	begin  time.Time
	launch api.Run // of the overlay, with a probe that only the launch VM's own answer satisfies
	image  string  // id of the overlay
	r      results
}

func (b *bench) run(ctx context.Context) (err error) {
	b.begin = time.Now()
	if b.pairs < 1 || b.stay <= 0 {
		return errors.New("-pairs and -minutes must be above 0")
	}
	for _, p := range []*string{&b.program, &b.guestDir, &b.dir, &b.out} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	if err := b.clear(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.clear(context.WithoutCancel(ctx)), b.leftovers()) }()
	if err := errors.Join(os.RemoveAll(b.path("serve.log")), os.MkdirAll(b.dir, 0o755)); err != nil {
		return err
	}
	if b.r.Busy, err = busy(ctx); err != nil {
		return err
	}
	if b.r.Busy > busyMost {
		b.say("other work takes %.0f %% of this host's processors: expect figures that are worse, and misses", 100*b.r.Busy)
	}
	if err := b.measure(ctx); err != nil {
		return err
	}
	return b.report()
}

// measure makes what is needed and takes all figures.
func (b *bench) measure(ctx context.Context) error {
	if b.wants("start") {
		if err := b.start(ctx); err != nil {
			return fmt.Errorf("start with many overlays: %w", err)
		}
	}
	if b.only == "start" {
		return nil
	}
	return b.serving(ctx, b.path("state"), func(d *daemon) error {
		if err := b.prepare(ctx, d); err != nil {
			return fmt.Errorf("prepare: %w", err)
		}
		for _, m := range []struct {
			name, title string
			do          func(context.Context, *daemon) error
		}{
			{"pairs", "synthesis through the API and in process", b.compare},
			{"burst", "ten instances at once", b.burst},
			{"crowd", "a crowd of clients", b.crowd},
		} {
			if !b.wants(m.name) {
				continue
			}
			if err := m.do(ctx, d); err != nil {
				return fmt.Errorf("%s: %w", m.title, err)
			}
		}
		return nil
	})
}

func (b *bench) wants(name string) bool { return b.only == "" || b.only == name }

// say prints a line with the time since the beginning.
func (b *bench) say(format string, args ...any) {
	fmt.Printf("%6.1f s  %s\n", time.Since(b.begin).Seconds(), fmt.Sprintf(format, args...))
}

func (b *bench) path(parts ...string) string {
	return filepath.Join(append([]string{b.dir}, parts...)...)
}

// prepare makes base and overlay of the test guest.
func (b *bench) prepare(ctx context.Context, d *daemon) error {
	g, err := guest.Build(ctx, b.guestDir, os.Stdout)
	if err != nil {
		return err
	}
	b.say("base: boot the test guest, capture it when it answers")
	probe := &api.Probe{Port: guest.Port, Path: "/healthz"}
	base, err := finish[api.Base](ctx, d.client)(d.client.CreateBase(ctx, api.CreateBase{
		Disk: g.Disk, Kernel: g.Kernel, Initrd: g.Initrd, Append: guest.Append, Memory: guest.MemoryMiB << 20, Probe: probe,
	}))
	if err != nil {
		return err
	}
	in, err := finish[api.Instance](ctx, d.client)(d.client.Run(ctx, api.Run{Ref: base.ID, Probe: probe}))
	if err != nil {
		return err
	}
	var said struct {
		Token string `json:"token"`
	}
	if err := errors.Join(ask(ctx, in, http.MethodPost, fmt.Sprintf("/dirty?mib=%d", dirtyMiB), nil), ask(ctx, in, http.MethodGet, "/", &said)); err != nil {
		return err
	}
	o, err := finish[api.CreatedOverlay](ctx, d.client)(d.client.CreateOverlay(ctx, api.CreateOverlay{Instance: in.ID}))
	if err != nil {
		return err
	}
	b.say("overlay: %.1f MiB", figures.MiB(o.Size))
	b.image = o.ID
	b.launch = api.Run{Ref: o.ID, Probe: &api.Probe{Port: guest.Port, Path: "/", Contains: said.Token}}
	return d.client.DeleteInstance(ctx, in.ID, true)
}

// finish follows an operation that a call has begun to its result.
func finish[T any](ctx context.Context, c *client.Client) func(api.Operation, error) (T, error) {
	return func(op api.Operation, err error) (out T, _ error) {
		if err != nil {
			return out, err
		}
		if op, err = c.Wait(ctx, op, nil); err != nil {
			return out, err
		}
		return client.Result[T](op)
	}
}

// askBound is how long the application of a guest may take to answer.
const askBound = 30 * time.Second

// ask makes a request to the application of an instance and decodes its answer into out,
// unless that is nil.
func ask(ctx context.Context, in api.Instance, method, path string, out any) error {
	ctx, cancel := context.WithTimeout(ctx, askBound)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+in.Endpoints[0].Address+path, nil)
	if err != nil {
		return err
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, body)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(body, out)
}

// stores are the names of the folders that hold a store.
var stores = []string{"state", "many"}

// clear ends what runs on the stores and removes them.
func (b *bench) clear(ctx context.Context) error {
	var errs []error
	for _, name := range stores {
		if _, err := os.Stat(b.path(name)); err == nil {
			if err := b.empty(ctx, b.path(name)); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		errs = append(errs, os.RemoveAll(b.path(name)))
	}
	return errors.Join(append(errs, os.RemoveAll(b.path("tmp")))...)
}

// empty removes all instances of a store, and their mounts with them.
func (b *bench) empty(ctx context.Context, dir string) (err error) {
	s, err := b.open(ctx, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close(ctx)) }()
	list, err := s.Instances(ctx, true)
	for _, in := range list {
		err = errors.Join(err, s.Delete(ctx, in.ID, true))
	}
	return err
}

// open opens a store in this process.
func (b *bench) open(ctx context.Context, dir string) (*service.Service, error) {
	return service.Open(ctx, service.Config{Dir: dir, Program: []string{b.program}})
}

// leftovers is an error that names mounts and processes of the stores.
func (b *bench) leftovers() error {
	var errs []error
	mounts, err := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, b.dir+"/") {
			errs = append(errs, fmt.Errorf("left behind: mount %s", strings.TrimSpace(line)))
		}
	}
	dirs, gerr := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		args, err := os.ReadFile(dir + "/cmdline")
		cwd, _ := os.Readlink(dir + "/cwd")
		if err != nil || len(args) == 0 {
			continue // ended since, or a kernel thread
		}
		for _, name := range stores {
			if strings.Contains(string(args)+cwd, b.path(name)) {
				errs = append(errs, fmt.Errorf("left behind: process %s: %s", filepath.Base(dir), strings.ReplaceAll(string(args), "\x00", " ")))
				break
			}
		}
	}
	return errors.Join(append(errs, err, gerr)...)
}
