package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"cloudlet/api"
	"cloudlet/integration/guest"
	"cloudlet/integration/guest/table"
	"cloudlet/vmm"
)

// demo is one run of the demonstration.
type demo struct {
	program, guestDir, dir, out string
	rounds                      int

	base  api.Base
	over  api.CreatedOverlay
	token string // of the launch VM: every answer must carry it
	boot  guest.Guest
}

// results are the figures of a demo, in seconds and bytes; medians, with all values beside.
type results struct {
	FirstResponse  float64              `json:"first_response_s"`
	Floor          float64              `json:"floor_s"`
	SecondInstance float64              `json:"second_instance_s"`
	ColdBoot       float64              `json:"cold_boot_s"`
	OverlayBytes   int64                `json:"overlay_bytes"`
	MemoryRead     int64                `json:"memory_bytes_read"`
	DiskRead       int64                `json:"disk_bytes_read"`
	OverlayRead    int64                `json:"overlay_bytes_read"`
	SecondRead     int64                `json:"second_instance_bytes_read"`
	Rounds         int                  `json:"rounds"`
	All            map[string][]float64 `json:"all_s"`
}

func (d *demo) run(ctx context.Context) (err error) {
	for _, p := range []*string{&d.program, &d.guestDir, &d.dir, &d.out} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	if err := d.clear(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.clear(context.WithoutCancel(ctx))) }()
	if err := d.prepare(ctx); err != nil {
		return err
	}
	r, err := d.measure(ctx)
	if err != nil {
		return err
	}
	d.show(r)
	return d.write(r)
}

// clear ends what an earlier run left and empties the folder.
func (d *demo) clear(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(d.dir, "state")); err == nil {
		var list []api.Instance
		if err := d.cloudlet(ctx, &list, "ps", "--all"); err != nil {
			return err
		}
		for _, in := range list {
			if err := d.cloudlet(ctx, nil, "rm", "--force", in.ID); err != nil {
				return err
			}
		}
	}
	return errors.Join(os.RemoveAll(d.dir), os.MkdirAll(d.dir, 0o755))
}

// cloudlet runs the program and decodes what it prints.
func (d *demo) cloudlet(ctx context.Context, v any, args ...string) error {
	cmd := exec.CommandContext(ctx, d.program, append([]string{"--state", filepath.Join(d.dir, "state"), "--json"}, args...)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("cloudlet %v: %w: %s", args, err, stderr.Bytes())
	}
	if v == nil {
		return nil
	}
	return json.Unmarshal(out, v)
}

func (d *demo) prepare(ctx context.Context) error {
	g, err := guest.Build(ctx, d.guestDir, os.Stdout)
	if err != nil {
		return err
	}
	d.boot = g
	fmt.Println("base: boot the guest and capture it when it answers")
	err = d.cloudlet(ctx, &d.base, "base", "create", g.Disk, "--kernel", g.Kernel, "--initrd", g.Initrd, "--append", guest.Append,
		"--memory", fmt.Sprintf("%dM", guest.MemoryMiB), "--probe", fmt.Sprintf("%d/healthz", guest.Port))
	if err != nil {
		return err
	}
	fmt.Println("launch VM: resume the base, let the application write 8 MiB to its disk and change 16 MiB of memory")
	var in api.Instance
	if err := d.cloudlet(ctx, &in, "run", d.base.ID, "--probe", fmt.Sprintf("%d/healthz", guest.Port)); err != nil {
		return err
	}
	for _, path := range []string{"/write?mib=8&seed=demo", "/dirty?mib=16"} {
		if _, err := request(ctx, http.MethodPost, in.Endpoints[0].Address, path); err != nil {
			return err
		}
	}
	a, err := request(ctx, http.MethodGet, in.Endpoints[0].Address, "/?window=0")
	if err != nil {
		return err
	}
	d.token = a.Token
	fmt.Println("overlay: capture what has changed")
	if err := d.cloudlet(ctx, &d.over, "overlay", "create", in.ID, "-o", filepath.Join(d.dir, "app.overlay")); err != nil {
		return err
	}
	return d.cloudlet(ctx, nil, "rm", "--force", in.ID)
}

type answer struct {
	Token  string `json:"token"`
	SHA256 string `json:"sha256"`
}

func request(ctx context.Context, method, address, path string) (a answer, err error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+address+path, nil)
	if err != nil {
		return a, err
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return a, err
	}
	if resp.StatusCode != http.StatusOK {
		return a, fmt.Errorf("%s %s: %s", method, path, resp.Status)
	}
	return a, json.Unmarshal(body, &a)
}

// first asks until the application answers, and sees that the answer is of the launch VM.
func (d *demo) first(ctx context.Context, address string, window int, token string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	path := fmt.Sprintf("/?window=%d", window)
	for {
		a, err := request(ctx, http.MethodGet, address, path)
		switch {
		case err == nil && token != "" && a.Token != token:
			return fmt.Errorf("the answer is of another VM: token %s, want %s", a.Token, token)
		case err == nil && a.SHA256 != table.WindowHash(a.Token, window):
			return fmt.Errorf("the answer is wrong: window %d has hash %s", window, a.SHA256)
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("no answer: %w", err)
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// measure runs every way once in each round, so that a busy moment hits all of them.
func (d *demo) measure(ctx context.Context) (*results, error) {
	r := &results{OverlayBytes: d.over.Size, Rounds: d.rounds, All: map[string][]float64{}}
	plain, err := d.plainFiles(ctx)
	if err != nil {
		return nil, err
	}
	for round := range d.rounds {
		fmt.Printf("round %d of %d\n", round+1, d.rounds)
		if err := d.lazy(ctx, r, round); err != nil {
			return nil, fmt.Errorf("lazy synthesis: %w", err)
		}
		if err := d.timed(r, "floor", func() error { return d.floor(ctx, plain, round) }); err != nil {
			return nil, fmt.Errorf("floor: %w", err)
		}
		if err := d.timed(r, "cold boot", func() error { return d.coldBoot(ctx, round) }); err != nil {
			return nil, fmt.Errorf("cold boot: %w", err)
		}
	}
	r.FirstResponse, r.SecondInstance = median(r.All["lazy"]), median(r.All["second"])
	r.Floor, r.ColdBoot = median(r.All["floor"]), median(r.All["cold boot"])
	return r, nil
}

func (d *demo) timed(r *results, name string, f func() error) error {
	start := time.Now()
	err := f()
	r.All[name] = append(r.All[name], time.Since(start).Seconds())
	return err
}

// lazy synthesises the overlay, and a second instance of the same launch. Both clocks start
// at the command.
func (d *demo) lazy(ctx context.Context, r *results, round int) error {
	var ids []string
	var read [2]int64
	for i, name := range []string{"lazy", "second"} {
		var in api.Instance
		err := d.timed(r, name, func() error {
			if err := d.cloudlet(ctx, &in, "run", d.over.ID, "-p", fmt.Sprint(guest.Port)); err != nil {
				return err
			}
			ids = append(ids, in.ID)
			return d.first(ctx, in.Endpoints[0].Address, round%table.Windows, d.token)
		})
		if err != nil {
			return err
		}
		var all []api.Instance
		if err := d.cloudlet(ctx, &all, "ps"); err != nil {
			return err
		}
		m := all[0].Mount
		read[i] = m.MemoryBytes + m.DiskBytes
		if i == 0 {
			r.MemoryRead, r.DiskRead, r.OverlayRead = m.MemoryBytes, m.DiskBytes, m.Fetched
		}
	}
	r.SecondRead = read[1] - read[0]
	for _, id := range ids {
		if err := d.cloudlet(ctx, nil, "rm", "--force", id); err != nil {
			return err
		}
	}
	return nil
}

// plainFiles copies the launch image out of the mount: what the floor resumes from.
func (d *demo) plainFiles(ctx context.Context) (plain string, err error) {
	mount := filepath.Join(d.dir, "mnt")
	plain = filepath.Join(d.dir, "plain")
	for _, dir := range []string{mount, plain} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return "", err
		}
	}
	if err := d.cloudlet(ctx, nil, "mount", "--detach", d.over.ID, mount); err != nil {
		return "", err
	}
	defer func() {
		if out, uerr := exec.Command("fusermount3", "-u", mount).CombinedOutput(); uerr != nil {
			err = errors.Join(err, fmt.Errorf("unmount %s: %w: %s", mount, uerr, out))
		}
	}()
	for _, name := range []string{"memory", "disk"} {
		src, err := os.Open(filepath.Join(mount, name))
		if err != nil {
			return "", err
		}
		dst, err := os.Create(filepath.Join(plain, name))
		if err == nil {
			_, err = io.Copy(dst, src)
			err = errors.Join(err, dst.Close())
		}
		if err = errors.Join(err, src.Close()); err != nil {
			return "", err
		}
	}
	return plain, d.launchState(ctx, filepath.Join(plain, "state"))
}

// launchState takes the device state that the program resumed an instance with.
func (d *demo) launchState(ctx context.Context, to string) error {
	var in api.Instance
	if err := d.cloudlet(ctx, &in, "run", d.over.ID, "--paused"); err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(d.dir, "state", "instances", in.ID, "vm", "resume.state"))
	if err == nil {
		err = os.WriteFile(to, b, 0o600)
	}
	return errors.Join(err, d.cloudlet(ctx, nil, "rm", "--force", in.ID))
}

func (d *demo) qemu() *vmm.QEMU { return &vmm.QEMU{Launcher: []string{d.program, "launcher"}} }

// floor resumes the same VM from plain files: what no synthesis can beat.
func (d *demo) floor(ctx context.Context, plain string, round int) error {
	m, err := vmm.ParseMachine(d.base.Machine)
	if err != nil {
		return err
	}
	state, err := os.ReadFile(filepath.Join(plain, "state"))
	if err != nil {
		return err
	}
	return d.withVM(ctx, fmt.Sprintf("floor%d", round), round, d.token, func(dir string) (*vmm.VM, error) {
		return d.qemu().Resume(ctx, dir, vmm.ResumeSpec{
			Machine: m, Memory: filepath.Join(plain, "memory"), Disk: filepath.Join(plain, "disk"), State: state,
			Kernel: d.boot.Kernel, Initrd: d.boot.Initrd, Forwards: []vmm.Forward{{Guest: guest.Port}},
		}, nil)
	})
}

// coldBoot boots the guest from its disk.
func (d *demo) coldBoot(ctx context.Context, round int) error {
	m, err := vmm.ParseMachine(d.base.Machine)
	if err != nil {
		return err
	}
	disk := filepath.Join(d.dir, "boot.raw")
	if err := d.qemu().ConvertDisk(ctx, d.boot.Disk, "raw", disk); err != nil {
		return err
	}
	defer os.Remove(disk)
	return d.withVM(ctx, fmt.Sprintf("boot%d", round), round, "", func(dir string) (*vmm.VM, error) {
		return d.qemu().Boot(ctx, dir, vmm.BootSpec{
			Machine: m, Memory: filepath.Join(dir, "..", fmt.Sprintf("ram%d", round)), Disk: disk, DiskFormat: "raw",
			Kernel: d.boot.Kernel, Initrd: d.boot.Initrd, Forwards: []vmm.Forward{{Guest: guest.Port}},
		})
	})
}

// withVM starts a VM, waits for its first right answer and ends it.
func (d *demo) withVM(ctx context.Context, name string, round int, token string, start func(dir string) (*vmm.VM, error)) error {
	dir := filepath.Join(d.dir, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	vm, err := start(dir)
	if err != nil {
		return err
	}
	f := vm.Forwards()[0]
	err = d.first(ctx, fmt.Sprintf("%s:%d", f.Addr, f.Host), round%table.Windows, token)
	return errors.Join(err, vm.Destroy(context.WithoutCancel(ctx)))
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

func (d *demo) show(r *results) {
	const mib = 1 << 20
	fmt.Printf("\nSeconds to the first right answer, from the command; median of %d rounds (least to most)\n", r.Rounds)
	for _, row := range []struct{ key, text string }{
		{"lazy", "lazy synthesis from the overlay"},
		{"second", "a second instance of it"},
		{"floor", "floor: resume from plain files"},
		{"cold boot", "cold boot (and the application starts anew)"},
	} {
		v := r.All[row.key]
		fmt.Printf("  %-45s %6.2f  (%.2f to %.2f)\n", row.text, median(v), slices.Min(v), slices.Max(v))
	}
	fmt.Printf("\noverlay %.1f MiB, of which %.1f MiB were read before the first answer;\n", float64(r.OverlayBytes)/mib, float64(r.OverlayRead)/mib)
	fmt.Printf("the mount served %.1f MiB of memory and %.1f MiB of disk, to the second instance %.2f MiB\n",
		float64(r.MemoryRead)/mib, float64(r.DiskRead)/mib, float64(r.SecondRead)/mib)
	fmt.Printf("figures: %s\n", d.out)
}
