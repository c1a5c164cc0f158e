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
	"time"

	"cloudlet/api"
	"cloudlet/api/client"
	"cloudlet/integration/appguest"
	"cloudlet/vmm"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
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
	state := []string{d.path("state", "bases"), d.path("state", "overlays")}
	plain := []string{d.path("plain")}
	return []way{
		{"lazy", "lazy synthesis, the first of this overlay", append([]string{d.path("app.overlay")}, state...), d.lazy(d.path("app.overlay"))},
		{"profile", "lazy synthesis by its touch profile", state, d.lazy(d.made.Overlay)},
		{"cold", "the same, nothing in the page cache", nil, d.lazy(d.made.Overlay)},
		{"floor", "floor: resume from plain files", plain, d.floor},
		{"own eager", "own eager: decode the whole overlay, then resume", state, d.ownEager},
		{"eager", "eager: xz -d, xdelta3 -d, then resume", []string{d.path("eager"), state[0]}, d.eager},
		{"cold boot", "cold boot of the launch VM's disk", plain, d.coldBoot},
	}
}

// measure runs every way once in each round, so that a busy moment of the host hits all. The
// first round is not counted: it verifies each way's VM wholly.
func (d *demo) measure(ctx context.Context) (*results, error) {
	r := newResults(d)
	for d.round = 0; d.round <= d.rounds; d.round++ {
		if d.round == 0 {
			d.say("every way once, untimed: /verify of memory, redis and file")
		} else {
			d.say("round %d of %d", d.round, d.rounds)
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
	if err := d.setCache(w.from); err != nil {
		return err
	}
	start := time.Now()
	return w.run(ctx, func(address string) error {
		window := d.round % profileWindow
		token := d.made.Token
		if w.key == "cold boot" {
			token = "" // the application starts anew and draws another
		}
		a, err := firstAnswer(ctx, address, window, token)
		if err != nil {
			return err
		}
		if d.round > 0 {
			r.add(w.key, time.Since(start))
			return nil
		}
		return verify(ctx, address, a.Token)
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
	if ref != d.made.Overlay {
		run.Prefetch = api.PrefetchOverlay
	}
	op, err := d.daemon.Run(ctx, run)
	if err == nil {
		op, err = d.daemon.Wait(ctx, op, nil)
	}
	if err != nil {
		return err
	}
	in, err := client.Result[api.Instance](op)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, d.daemon.DeleteInstance(context.WithoutCancel(ctx), in.ID, true))
	}()
	if err := answered(in.Endpoints[0].Address); err != nil || look == nil {
		return err
	}
	return look(in)
}

// siblings measures a second and a third instance beside a first, and what each reads.
func (d *demo) siblings(ctx context.Context, r *results) error {
	read := func() (*api.Mount, error) {
		list, err := d.daemon.Instances(ctx, false)
		if err != nil {
			return nil, err
		}
		return list[0].Mount, nil
	}
	if err := d.setCache(d.ways()[0].from); err != nil {
		return err
	}
	window := d.round % profileWindow
	return d.instance(ctx, d.made.Overlay, func(address string) error {
		_, err := firstAnswer(ctx, address, window, d.made.Token)
		return err
	}, func(api.Instance) error {
		before, err := read()
		if err != nil {
			return err
		}
		r.MemoryRead, r.MemoryPushed, r.DiskRead, r.OverlayRead = before.MemoryBytes, before.MemoryPushed, before.DiskBytes, before.Fetched
		for _, key := range []string{"second", "third"} {
			start := time.Now()
			err := d.instance(ctx, d.made.Overlay, func(address string) error {
				if _, err := firstAnswer(ctx, address, window, d.made.Token); err != nil {
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

// setCache brings the files of the folders into the page cache, or without folders makes
// the host forget all clean pages.
func (d *demo) setCache(folders []string) error {
	if folders == nil {
		unix.Sync()
		return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
	}
	for _, dir := range folders {
		err := filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			return touch(path)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// touch reads a file's data, its holes left out.
func touch(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for off := int64(0); ; {
		data, err := f.Seek(off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		n, err := f.ReadAt(buf, data)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		off = data + int64(n)
	}
}

// floor resumes the same VM with the same command line from plain files: what no synthesis
// can beat.
func (d *demo) floor(ctx context.Context, answered func(string) error) error {
	return d.resume(ctx, d.path("plain"), answered)
}

// ownEager decodes the whole overlay into plain files first.
func (d *demo) ownEager(ctx context.Context, answered func(string) error) error {
	if err := d.mounted(ctx, func(dir string) error { return copyImages(ctx, dir, d.path("round")) }); err != nil {
		return err
	}
	return d.resume(ctx, d.path("round"), answered)
}

// eager is the original way: decode memory and disk, at the same time, then resume.
func (d *demo) eager(ctx context.Context, answered func(string) error) error {
	g, gctx := errgroup.WithContext(ctx)
	for _, name := range images {
		g.Go(func() error {
			base := d.path("state", "bases", d.made.Base, name)
			return piped(gctx, d.path("round", name), []string{"xz", "-d", "-c", d.path("eager", name)},
				[]string{"xdelta3", "-d", "-c", "-B", "2147483648", "-s", base})
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return d.resume(ctx, d.path("round"), answered)
}

func (d *demo) forwards() []vmm.Forward { return []vmm.Forward{{Guest: appguest.Port}} }

func (d *demo) resume(ctx context.Context, dir string, answered func(string) error) error {
	state, err := os.ReadFile(d.path("plain", "state"))
	if err != nil {
		return err
	}
	return d.withVM(ctx, answered, func(vmDir string) (*vmm.VM, error) {
		return d.qemu().Resume(ctx, vmDir, vmm.ResumeSpec{
			Machine: d.machine, Memory: filepath.Join(dir, "memory"), Disk: filepath.Join(dir, "disk"), State: state,
			Kernel: d.guest.Kernel, Initrd: d.guest.Initrd, Forwards: d.forwards(),
		}, nil)
	})
}

// coldBoot boots the launch VM's disk: the application is installed and starts anew.
func (d *demo) coldBoot(ctx context.Context, answered func(string) error) error {
	disk := d.path("round", "boot.qcow2")
	if err := os.RemoveAll(disk); err != nil {
		return err
	}
	if err := command(ctx, nil, nil, "qemu-img", "create", "-q", "-f", "qcow2", "-b", d.path("plain", "disk"), "-F", "raw", disk); err != nil {
		return err
	}
	return d.withVM(ctx, answered, func(vmDir string) (*vmm.VM, error) {
		return d.qemu().Boot(ctx, vmDir, vmm.BootSpec{
			Machine: d.machine, Memory: filepath.Join(vmDir, "..", "round", "ram"), Disk: disk, DiskFormat: "qcow2",
			Kernel: d.guest.Kernel, Initrd: d.guest.Initrd, Forwards: d.forwards(),
		})
	})
}

// withVM starts a VM of our own, hands its address to answered and ends it.
func (d *demo) withVM(ctx context.Context, answered func(string) error, start func(dir string) (*vmm.VM, error)) (err error) {
	dir, err := os.MkdirTemp(d.dir, "vm-")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, os.RemoveAll(dir), os.RemoveAll(d.path("round")), os.Mkdir(d.path("round"), 0o755))
	}()
	vm, err := start(dir)
	if err != nil {
		return err
	}
	f := vm.Forwards()[0]
	return errors.Join(answered(fmt.Sprintf("%s:%d", f.Addr, f.Host)), vm.Destroy(context.WithoutCancel(ctx)))
}

// firstAnswer asks until the application answers and checks the answer, against token unless
// that is empty.
func firstAnswer(ctx context.Context, address string, window int, token string) (appguest.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	for {
		var a appguest.Answer
		err := request(ctx, address, fmt.Sprintf("/?window=%d", window), &a)
		if err == nil {
			return a, a.Check(token, window)
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return a, fmt.Errorf("no answer: %w", err)
		}
	}
}

// verify compares all that the application holds with what it must be.
func verify(ctx context.Context, address, token string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	var v appguest.Verification
	if err := request(ctx, address, "/verify", &v); err != nil {
		return err
	}
	return v.Check(token)
}

func request(ctx context.Context, address, path string, v any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+path, nil)
	if err != nil {
		return err
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", path, resp.Status)
	}
	return json.Unmarshal(body, v)
}
