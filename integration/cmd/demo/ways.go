package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"
	"cloudlet/integration/appguest"
	"cloudlet/integration/demoguest"
	"cloudlet/vmm"
)

// way is one way to a running application. It is timed from the call until the first right
// answer; answered is called then, with the address.
type way struct {
	key, text string
	// from are the folders whose files are in the page cache when the clock starts; none:
	// nothing is.
	from []string
	run  func(ctx context.Context, answered func(address string) error) error
}

func (d *demo) ways() []way {
	state := []string{d.Path("state", "bases"), d.Path("state", "overlays")}
	plain := []string{d.Path("plain")}
	return []way{
		{"lazy", "lazy synthesis, the first of this overlay", append([]string{d.Path("app.overlay")}, state...), d.lazy(d.Path("app.overlay"))},
		{"profile", "lazy synthesis by its touch profile", state, d.lazy(d.Made.Overlay)},
		{"cold", "the same, nothing in the page cache", nil, d.lazy(d.Made.Overlay)},
		{"floor", "floor: resume from plain files", plain, d.floor},
		{"own eager", "own eager: decode the whole overlay, then resume", state, d.ownEager},
		{"eager", "eager: xz -d, xdelta3 -d, then resume", []string{d.Path("eager"), state[0]}, d.eager},
		{"cold boot", "cold boot of the launch VM's disk", plain, d.coldBoot},
	}
}

// measure runs every way once in each round, so that a busy moment of the host hits all. The
// first round is not counted: it verifies each way's VM wholly.
func (d *demo) measure(ctx context.Context) (*results, error) {
	r := newResults(d)
	for d.round = 0; d.round <= d.rounds; d.round++ {
		if d.round == 0 {
			d.Say("every way once, untimed: /verify of memory, redis and file")
		} else {
			d.Say("round %d of %d", d.round, d.rounds)
		}
		for _, w := range d.ways() {
			if err := d.once(ctx, w, r); err != nil {
				return nil, fmt.Errorf("%s: %w", w.text, err)
			}
		}
		if err := d.siblings(ctx, r); err != nil {
			return nil, fmt.Errorf("second and third instance: %w", err)
		}
	}
	return r, nil
}

func (d *demo) once(ctx context.Context, w way, r *results) error {
	if err := demoguest.SetCache(w.from); err != nil {
		return err
	}
	start := time.Now()
	return w.run(ctx, func(address string) error {
		window := d.round % demoguest.ProfileWindow
		token := d.Made.Token
		if w.key == "cold boot" {
			token = "" // the application starts anew and draws another
		}
		a, err := demoguest.FirstAnswer(ctx, address, window, token)
		if err != nil {
			return err
		}
		if d.round > 0 {
			r.add(w.key, time.Since(start))
			return nil
		}
		return demoguest.Verify(ctx, address, a.Token)
	})
}

// lazy is the program itself: the clock starts at the request to the daemon. The overlay in
// the store has a profile; the file is the one before that, and is used as if there were none.
func (d *demo) lazy(ref string) func(context.Context, func(string) error) error {
	return func(ctx context.Context, answered func(string) error) error {
		return d.instance(ctx, ref, answered, nil)
	}
}

// instance runs the overlay, hands the address to answered, then the instance to look, and
// removes it.
func (d *demo) instance(ctx context.Context, ref string, answered func(string) error, look func(api.Instance) error) (err error) {
	run := api.Run{Ref: ref, Forwards: []api.Forward{{Guest: appguest.Port}}}
	if ref != d.Made.Overlay {
		run.Prefetch = api.PrefetchOverlay
	}
	op, err := d.Daemon.Run(ctx, run)
	if err == nil {
		op, err = d.Daemon.Wait(ctx, op, nil)
	}
	if err != nil {
		return err
	}
	in, err := client.Result[api.Instance](op)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, d.Daemon.DeleteInstance(context.WithoutCancel(ctx), in.ID, true))
	}()
	if err := answered(in.Endpoints[0].Address); err != nil || look == nil {
		return err
	}
	return look(in)
}

// siblings measures a second and a third instance beside a first, and what each reads.
func (d *demo) siblings(ctx context.Context, r *results) error {
	read := func() (*api.Mount, error) {
		list, err := d.Daemon.Instances(ctx, false)
		if err != nil {
			return nil, err
		}
		return list[0].Mount, nil
	}
	if err := demoguest.SetCache(d.ways()[0].from); err != nil {
		return err
	}
	window := d.round % demoguest.ProfileWindow
	return d.instance(ctx, d.Made.Overlay, func(address string) error {
		_, err := demoguest.FirstAnswer(ctx, address, window, d.Made.Token)
		return err
	}, func(api.Instance) error {
		before, err := read()
		if err != nil {
			return err
		}
		r.MemoryRead, r.MemoryPushed, r.DiskRead, r.OverlayRead = before.MemoryBytes, before.MemoryPushed, before.DiskBytes, before.Fetched
		for _, key := range []string{"second", "third"} {
			start := time.Now()
			err := d.instance(ctx, d.Made.Overlay, func(address string) error {
				if _, err := demoguest.FirstAnswer(ctx, address, window, d.Made.Token); err != nil {
					return err
				}
				if d.round > 0 {
					r.add(key, time.Since(start))
				}
				return nil
			}, func(api.Instance) error {
				after, err := read()
				if err == nil && d.round > 0 {
					r.addRead(key, after.MemoryBytes+after.DiskBytes-before.MemoryBytes-before.DiskBytes)
					before = after
				}
				return err
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// floor resumes the same VM with the same command line from plain files: what no synthesis
// can beat.
func (d *demo) floor(ctx context.Context, answered func(string) error) error {
	return d.Resume(ctx, d.Path("plain"), answered)
}

func (d *demo) ownEager(ctx context.Context, answered func(string) error) error {
	return d.OwnEager(ctx, d.Made.Overlay, answered)
}

func (d *demo) eager(ctx context.Context, answered func(string) error) error {
	return d.Eager(ctx, func(name string) [][]string { return [][]string{{"xz", "-d", "-c", d.Path("eager", name)}} }, answered)
}

// coldBoot boots the launch VM's disk: the application is installed and starts anew.
func (d *demo) coldBoot(ctx context.Context, answered func(string) error) error {
	disk := d.Path("round", "boot.qcow2")
	if err := os.RemoveAll(disk); err != nil {
		return err
	}
	if err := demoguest.Command(ctx, nil, nil, "qemu-img", "create", "-q", "-f", "qcow2", "-b", d.Path("plain", "disk"), "-F", "raw", disk); err != nil {
		return err
	}
	return d.WithVM(ctx, answered, func(vmDir string) (*vmm.VM, error) {
		return d.QEMU().Boot(ctx, vmDir, vmm.BootSpec{
			Machine: d.Machine, Memory: filepath.Join(vmDir, "..", "round", "ram"), Disk: disk, DiskFormat: "qcow2",
			Kernel: d.Guest.Kernel, Initrd: d.Guest.Initrd, Forwards: demoguest.Forwards(),
		})
	})
}
