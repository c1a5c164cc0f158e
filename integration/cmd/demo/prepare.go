package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"cloudlet/api"
	"cloudlet/integration/appguest"
	"cloudlet/overlay"
	"cloudlet/vmm"

	"golang.org/x/sync/errgroup"
)

// prepared is what a run has made that the next one finds again.
type prepared struct {
	Launch     string `json:"launch"` // key of guest and application; another key, all anew
	Base       string `json:"base"`
	Overlay    string `json:"overlay"`
	Token      string `json:"token"` // of the launch VM: every answer must carry it
	Size       int64  `json:"overlay_bytes"`
	Profiled   bool   `json:"profiled"` // the overlay in the store is packed by its profile
	Plain      bool   `json:"plain"`    // the launch image as plain files is complete
	EagerBytes int64  `json:"eager_bytes"`
}

func (d *demo) save() error {
	b, err := json.MarshalIndent(d.made, "", " ")
	if err != nil {
		return err
	}
	tmp := d.path("prepared.json.new")
	if err := os.WriteFile(tmp, b, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, d.path("prepared.json"))
}

// prepare makes base, overlay, and what the alternatives start from, or finds them made.
func (d *demo) prepare(ctx context.Context) (err error) {
	d.say("guest: Debian with systemd, from packages")
	if d.guest, err = appguest.Build(ctx, d.guestDir, os.Stdout); err != nil {
		return err
	}
	key, err := appguest.LaunchKey(d.guest)
	if err != nil {
		return err
	}
	strategy, err := overlay.ParseStrategy("")
	if err != nil {
		return err
	}
	key += fmt.Sprintf(" %+v", strategy)
	if b, err := os.ReadFile(d.path("prepared.json")); err == nil && json.Unmarshal(b, &d.made) != nil {
		d.made = prepared{}
	}
	if d.made.Launch != key {
		if d.made.Launch != "" {
			d.say("guest or application have changed: all is made anew")
		}
		d.made = prepared{Launch: key}
		if err := d.forget(); err != nil {
			return err
		}
	}
	for _, step := range []func(context.Context) error{d.makeBase, d.makeLaunch, d.makeProfile, d.makePlain, d.makeEager} {
		if err := step(ctx); err != nil {
			return err
		}
		if err := d.save(); err != nil {
			return err
		}
	}
	if err := d.cloudlet(ctx, &d.base, "base", "show", d.made.Base); err != nil {
		return err
	}
	d.machine, err = vmm.ParseMachine(d.base.Machine)
	return err
}

func (d *demo) forget() error {
	var err error
	for _, name := range []string{"state", "plain", "eager", "app.overlay", "prepared.json"} {
		err = errors.Join(err, os.RemoveAll(d.path(name)))
	}
	return err
}

func (d *demo) makeBase(ctx context.Context) error {
	if d.made.Base != "" {
		d.say("base: %.12s, made before", d.made.Base)
		return nil
	}
	d.say("base: boot the guest, capture it when it is at rest")
	var b api.Base
	err := d.cloudlet(ctx, &b, "base", "create", d.guest.Disk, "--kernel", d.guest.Kernel, "--initrd", d.guest.Initrd, "--append", appguest.Append,
		"--memory", fmt.Sprintf("%dM", appguest.MemoryMiB), "--console", appguest.Ready, "--timeout", "15m", "--name", "debian")
	d.made.Base = b.ID
	return err
}

// makeLaunch customises an instance of the base as a user does, and captures it.
func (d *demo) makeLaunch(ctx context.Context) error {
	if d.made.Overlay != "" {
		d.say("overlay: %.12s of %.1f MiB, made before", d.made.Overlay, mib(d.made.Size))
		return nil
	}
	d.say("launch VM: resume the base, install flask, redis and nginx in it, start the application")
	var in api.Instance
	if err := d.cloudlet(ctx, &in, "run", d.made.Base, "-p", fmt.Sprint(appguest.Port)); err != nil {
		return err
	}
	if err := appguest.Customise(ctx, d.path("state", "instances", in.ID, "vm", "serial.sock"), d.guest, os.Stdout); err != nil {
		return err
	}
	a, err := firstAnswer(ctx, in.Endpoints[0].Address, 0, "")
	if err != nil {
		return err
	}
	if err := verify(ctx, in.Endpoints[0].Address, a.Token); err != nil {
		return err
	}
	d.say("overlay: capture what has changed")
	var o api.CreatedOverlay
	if err := d.cloudlet(ctx, &o, "overlay", "create", in.ID, "-o", d.path("app.overlay"), "--name", "app"); err != nil {
		return err
	}
	d.made.Overlay, d.made.Token, d.made.Size = o.ID, a.Token, o.Size
	d.say("overlay: %.1f MiB in %.1f s; the guest stood still for %.0f ms", mib(o.Size), o.Took, 1000*o.Pause)
	return d.cloudlet(ctx, nil, "rm", "--force", in.ID)
}

// profileWindow is the request of the profile; the rounds make those below it.
const profileWindow = appguest.Windows - 1

// makeProfile records a touch profile with a request that no round makes, and packs the
// overlay by it.
func (d *demo) makeProfile(ctx context.Context) error {
	if d.made.Profiled {
		return nil
	}
	request := fmt.Sprintf("%d/?window=%d", appguest.Port, profileWindow)
	d.say("profile: a trial run, then the overlay is packed by it")
	var o api.ProfiledOverlay
	if err := d.cloudlet(ctx, &o, "overlay", "profile", d.made.Overlay, "--probe", request, "--fresh", "--repack"); err != nil {
		return err
	}
	d.made.Profiled, d.made.Size = true, o.Size
	d.say("profile: %d pages of memory, %d of disk; the overlay has %.1f MiB", o.MemoryPages, o.DiskPages, mib(o.Size))
	return nil
}

// makePlain writes the launch image as plain files: what the floor resumes from.
func (d *demo) makePlain(ctx context.Context) error {
	if d.made.Plain {
		return nil
	}
	d.say("plain files of the launch image, for the floor")
	if err := os.MkdirAll(d.path("plain"), 0o755); err != nil {
		return err
	}
	if err := d.mounted(ctx, func(dir string) error { return copyImages(ctx, dir, d.path("plain")) }); err != nil {
		return err
	}
	if err := d.keepState(ctx); err != nil {
		return err
	}
	d.made.Plain = true
	return nil
}

// keepState takes the device state that the program resumes the launch VM with.
func (d *demo) keepState(ctx context.Context) error {
	var in api.Instance
	if err := d.cloudlet(ctx, &in, "run", d.made.Overlay, "--paused"); err != nil {
		return err
	}
	b, err := os.ReadFile(d.path("state", "instances", in.ID, "vm", "resume.state"))
	if err == nil {
		err = os.WriteFile(d.path("plain", "state"), b, 0o644)
	}
	return errors.Join(err, d.cloudlet(ctx, nil, "rm", "--force", in.ID))
}

var images = []string{"memory", "disk"}

// copyImages copies both images, holes kept, at the same time.
func copyImages(ctx context.Context, from, to string) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, name := range images {
		g.Go(func() error {
			return command(ctx, nil, nil, "cp", "--sparse=always", filepath.Join(from, name), filepath.Join(to, name))
		})
	}
	return g.Wait()
}

// makeEager makes the original way's overlay: the whole images by xdelta3 against the base,
// then xz.
func (d *demo) makeEager(ctx context.Context) error {
	if d.made.EagerBytes != 0 {
		return nil
	}
	d.say("eager: xdelta3 -9 of memory and disk against the base, then xz -9e")
	if err := os.MkdirAll(d.path("eager"), 0o755); err != nil {
		return err
	}
	var total int64
	for _, name := range images {
		base, plain := d.path("state", "bases", d.made.Base, name), d.path("plain", name)
		info, err := os.Stat(plain)
		if err != nil {
			return err
		}
		err = piped(ctx, d.path("eager", name),
			[]string{"xdelta3", "-e", "-9", "-S", "none", "-B", fmt.Sprint(info.Size()), "-c", "-s", base, plain},
			[]string{"xz", "-9e", "-c"})
		if err != nil {
			return err
		}
		made, err := os.Stat(d.path("eager", name))
		if err != nil {
			return err
		}
		total += made.Size()
	}
	d.made.EagerBytes = total
	return nil
}

// piped runs two programs, the first's output the second's input, into a file.
func piped(ctx context.Context, out string, first, second []string) (err error) {
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { defer w.Close(); return command(ctx, nil, w, first...) })
	g.Go(func() error { defer r.Close(); return command(ctx, r, f, second...) })
	return g.Wait()
}

// command runs a program; its error quotes what it said.
func command(ctx context.Context, in io.Reader, out io.Writer, args ...string) error {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout = in, out
	var stderr limited
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", args[0], err, stderr.b)
	}
	return nil
}

// limited keeps the beginning of what is written to it.
type limited struct{ b []byte }

func (l *limited) Write(p []byte) (int, error) {
	l.b = append(l.b, p[:min(len(p), 1000-min(len(l.b), 1000))]...)
	return len(p), nil
}
