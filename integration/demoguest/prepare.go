package demoguest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"cloudlet/api"
	"cloudlet/integration/appguest"
	"cloudlet/integration/figures"
	"cloudlet/overlay"
	"cloudlet/vmm"
)

// Prepared is what a run has made that the next one finds again.
type Prepared struct {
	Launch     string `json:"launch"` // key of guest and application; another key, all anew
	Base       string `json:"base"`
	Overlay    string `json:"overlay"`
	Token      string `json:"token"` // of the launch VM: every answer must carry it
	Size       int64  `json:"overlay_bytes"`
	Profiled   bool   `json:"profiled"` // the overlay in the store is packed by its profile
	Plain      bool   `json:"plain"`    // the launch image as plain files is complete
	EagerBytes int64  `json:"eager_bytes"`
}

func (l *Lab) save() error {
	b, err := json.MarshalIndent(l.Made, "", " ")
	if err != nil {
		return err
	}
	tmp := l.Path("prepared.json.new")
	if err := os.WriteFile(tmp, b, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, l.Path("prepared.json"))
}

// prepare makes base, overlay, and what the alternatives start from, or finds them made.
func (l *Lab) prepare(ctx context.Context) (err error) {
	l.Say("guest: Debian with systemd, from packages")
	if l.Guest, err = appguest.Build(ctx, l.GuestDir, os.Stdout); err != nil {
		return err
	}
	key, err := appguest.LaunchKey(l.Guest)
	if err != nil {
		return err
	}
	strategy, err := overlay.ParseStrategy("")
	if err != nil {
		return err
	}
	key += fmt.Sprintf(" %+v", strategy)
	if b, err := os.ReadFile(l.Path("prepared.json")); err == nil && json.Unmarshal(b, &l.Made) != nil {
		l.Made = Prepared{}
	}
	if l.Made.Launch != key {
		if l.Made.Launch != "" {
			l.Say("guest or application have changed: all is made anew")
		}
		l.Made = Prepared{Launch: key}
		if err := l.forget(); err != nil {
			return err
		}
	}
	for _, step := range []func(context.Context) error{l.makeBase, l.makeLaunch, l.makeProfile, l.makePlain, l.makeEager} {
		if err := step(ctx); err != nil {
			return err
		}
		if err := l.save(); err != nil {
			return err
		}
	}
	var base api.Base
	if err := l.Cloudlet(ctx, &base, "base", "show", l.Made.Base); err != nil {
		return err
	}
	l.Machine, err = vmm.ParseMachine(base.Machine)
	return err
}

func (l *Lab) forget() error {
	var err error
	for _, name := range []string{"state", "plain", "eager", "app.overlay", "prepared.json"} {
		err = errors.Join(err, os.RemoveAll(l.Path(name)))
	}
	return err
}

func (l *Lab) makeBase(ctx context.Context) error {
	if l.Made.Base != "" {
		l.Say("base: %.12s, made before", l.Made.Base)
		return nil
	}
	l.Say("base: boot the guest, capture it when it is at rest")
	var b api.Base
	err := l.Cloudlet(ctx, &b, "base", "create", l.Guest.Disk, "--kernel", l.Guest.Kernel, "--initrd", l.Guest.Initrd, "--append", appguest.Append,
		"--memory", fmt.Sprintf("%dM", appguest.MemoryMiB), "--console", appguest.Ready, "--timeout", "15m", "--name", "debian")
	l.Made.Base = b.ID
	return err
}

// makeLaunch customises an instance of the base as a user does, and captures it.
func (l *Lab) makeLaunch(ctx context.Context) error {
	if l.Made.Overlay != "" {
		l.Say("overlay: %.12s of %.1f MiB, made before", l.Made.Overlay, figures.MiB(l.Made.Size))
		return nil
	}
	l.Say("launch VM: resume the base, install flask, redis and nginx in it, start the application")
	o, err := l.MakeOverlay(ctx, Launch{
		Name: "app", Output: l.Path("app.overlay"), Port: appguest.Port,
		Customise: func(ctx context.Context, serialSocket string) error {
			return appguest.Customise(ctx, serialSocket, l.Guest, os.Stdout)
		},
		Check: func(ctx context.Context, address string) error {
			a, err := FirstAnswer(ctx, address, 0, "")
			if err != nil {
				return err
			}
			l.Made.Token = a.Token
			return Verify(ctx, address, a.Token)
		},
	})
	l.Made.Overlay, l.Made.Size = o.ID, o.Size
	return err
}

// ProfileWindow is the request of the profile; others are measured with those below it.
const ProfileWindow = appguest.Windows - 1

// makeProfile records a touch profile with a request that no round makes, and packs the
// overlay by it.
func (l *Lab) makeProfile(ctx context.Context) error {
	if l.Made.Profiled {
		return nil
	}
	o, err := l.Profile(ctx, l.Made.Overlay, fmt.Sprintf("%d/?window=%d", appguest.Port, ProfileWindow))
	if err != nil {
		return err
	}
	l.Made.Profiled, l.Made.Size = true, o.Size
	return nil
}

// makePlain writes the launch image as plain files: what the floor resumes from.
func (l *Lab) makePlain(ctx context.Context) error {
	if l.Made.Plain {
		return nil
	}
	l.Say("plain files of the launch image, for the floor")
	if err := os.MkdirAll(l.Path("plain"), 0o755); err != nil {
		return err
	}
	if err := l.Mounted(ctx, l.Made.Overlay, func(dir string) error { return CopyImages(ctx, dir, l.Path("plain")) }); err != nil {
		return err
	}
	if err := l.keepState(ctx); err != nil {
		return err
	}
	l.Made.Plain = true
	return nil
}

// keepState takes the device state that the program resumes the launch VM with.
func (l *Lab) keepState(ctx context.Context) error {
	var in api.Instance
	if err := l.Cloudlet(ctx, &in, "run", l.Made.Overlay, "--paused"); err != nil {
		return err
	}
	b, err := os.ReadFile(l.Path("state", "instances", in.ID, "vm", "resume.state"))
	if err == nil {
		err = os.WriteFile(l.Path("plain", "state"), b, 0o644)
	}
	return errors.Join(err, l.Cloudlet(ctx, nil, "rm", "--force", in.ID))
}

// makeEager makes the original way's overlay: the whole images by xdelta3 against the base,
// then xz.
func (l *Lab) makeEager(ctx context.Context) error {
	if l.Made.EagerBytes != 0 {
		return nil
	}
	l.Say("eager: xdelta3 -9 of memory and disk against the base, then xz -9e")
	if err := os.MkdirAll(l.Path("eager"), 0o755); err != nil {
		return err
	}
	var total int64
	for _, name := range Images {
		base, plain := l.Path("state", "bases", l.Made.Base, name), l.Path("plain", name)
		info, err := os.Stat(plain)
		if err != nil {
			return err
		}
		err = Piped(ctx, l.Path("eager", name),
			[]string{"xdelta3", "-e", "-9", "-S", "none", "-B", fmt.Sprint(info.Size()), "-c", "-s", base, plain},
			[]string{"xz", "-9e", "-c"})
		if err != nil {
			return err
		}
		made, err := os.Stat(l.Path("eager", name))
		if err != nil {
			return err
		}
		total += made.Size()
	}
	l.Made.EagerBytes = total
	return nil
}
