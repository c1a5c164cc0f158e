package main

import (
	"archive/zip"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// describe returns results without measurements: the machine, the sizes.
func (b *bench) describe(ctx context.Context) (r results, err error) {
	r = results{Rounds: b.rounds, Bound: b.bound.Seconds(), EagerBytes: b.Made.EagerBytes}
	for path, size := range map[string]*int64{b.packed: &r.OverlayBytes, b.Path("app.overlay"): &r.PlainBytes} {
		info, err := os.Stat(path)
		if err != nil {
			return r, err
		}
		*size = info.Size()
	}
	if r.IndexBytes, err = indexSize(b.packed); err != nil {
		return r, err
	}
	h, err := b.QEMU().Probe(ctx)
	if err != nil {
		return r, err
	}
	var name unix.Utsname
	var info unix.Sysinfo_t
	if err := errors.Join(unix.Uname(&name), unix.Sysinfo(&info)); err != nil {
		return r, err
	}
	r.Host = fmt.Sprintf("Measured on %d cores (%s), %.1f GiB, Linux %s, QEMU %s with %s, %s",
		runtime.NumCPU(), processor(), float64(info.Totalram)*float64(info.Unit)/(1<<30), unix.ByteSliceToString(name.Release[:]), h.QEMU, b.Machine.Accelerator, runtime.Version())
	return r, nil
}

// processor returns the name that the kernel gives the processor.
func processor() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err == nil {
		if _, rest, ok := strings.Cut(string(b), "model name"); ok {
			line, _, _ := strings.Cut(rest, "\n")
			return strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), ":"))
		}
	}
	return runtime.GOARCH
}

// indexSize returns the bytes of an overlay's index.
func indexSize(path string) (size int64, err error) {
	z, err := zip.OpenReader(path)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, z.Close()) }()
	for _, f := range z.File {
		if f.Name == "index" {
			return int64(f.UncompressedSize64), nil
		}
	}
	return 0, fmt.Errorf("%s has no member index", path)
}
