package guest

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Append is the kernel command line of the guest: the console, a panic as a reboot, and
// nothing of what costs time in an emulated machine and means nothing in a test (self
// tests, mitigations, security modules, devices that are not there).
const Append = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check ipv6.disable=1 " +
	"nokaslr edd=off lsm= audit=0 init_on_alloc=0 cryptomgr.notests i8042.noaux i8042.nokbd rcupdate.rcu_expedited=1"

// MemoryMiB is the memory in MiB that the guest is made for.
const MemoryMiB = 256

// Port is the TCP port in the guest on which the application answers.
const Port = 8080

// Guest names the files of a built test guest by absolute paths.
type Guest struct {
	Kernel   string // the Debian kernel as packaged, for -kernel
	Initrd   string // an initial file system, for -initrd
	Disk     string // a raw ext4 image: a template, to be copied before use
	Packages string // name, version, architecture and SHA-256 of each Debian package in it
}

// source is all that the product is made from, apart from the Debian packages.
//
//go:embed *.go init.sh app/*.go table/*.go
var source embed.FS

// Build makes the guest below outDir, or finds it there. It writes what it does to log,
// which may be nil. It also sets links with the names of Guest's files in outDir itself,
// for people. It needs apt-get, dpkg-deb, mke2fs and go in PATH, the module of this
// package as current folder, and a reachable Debian mirror at the first call.
func Build(ctx context.Context, outDir string, log io.Writer) (Guest, error) {
	if log == nil {
		log = io.Discard
	}
	outDir, err := filepath.Abs(outDir)
	if err != nil {
		return Guest{}, fmt.Errorf("build test guest: %w", err)
	}
	key, err := sourceKey()
	if err != nil {
		return Guest{}, fmt.Errorf("build test guest: %w", err)
	}
	if g := at(filepath.Join(outDir, key)); g.exists() {
		return g, nil
	}
	g, err := buildLocked(ctx, outDir, key, log)
	if err != nil {
		return Guest{}, fmt.Errorf("build test guest in %s: %w", outDir, err)
	}
	return g, nil
}

func at(dir string) Guest {
	return Guest{
		Kernel:   filepath.Join(dir, "vmlinuz"),
		Initrd:   filepath.Join(dir, "initrd"),
		Disk:     filepath.Join(dir, "disk.raw"),
		Packages: filepath.Join(dir, "packages.txt"),
	}
}

func (g Guest) files() []string { return []string{g.Kernel, g.Initrd, g.Disk, g.Packages} }

func (g Guest) exists() bool {
	for _, name := range g.files() {
		if info, err := os.Stat(name); err != nil || !info.Mode().IsRegular() {
			return false
		}
	}
	return true
}

// sourceKey names a product by the hash of its sources and of the compiler's version.
func sourceKey() (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, runtime.Version())
	err := fs.WalkDir(source, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasSuffix(path, "_test.go") {
			return err
		}
		p, err := source.ReadFile(path)
		if err != nil {
			return err
		}
		fmt.Fprintf(h, "%s %d\n%s", path, len(p), p)
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("read embedded sources: %w", err)
	}
	return hex.EncodeToString(h.Sum(nil)[:8]), nil
}

// buildLocked builds the product unless another process does so first.
func buildLocked(ctx context.Context, outDir, key string, log io.Writer) (g Guest, err error) {
	if err := os.MkdirAll(outDir, 0o755); err != nil {
		return Guest{}, err
	}
	unlock, err := lock(ctx, filepath.Join(outDir, ".lock"), log)
	if err != nil {
		return Guest{}, err
	}
	defer func() { err = errors.Join(err, unlock()) }()

	g = at(filepath.Join(outDir, key))
	if g.exists() {
		return g, nil
	}
	if err := clean(outDir); err != nil {
		return Guest{}, err
	}
	start := time.Now()
	work, err := os.MkdirTemp(outDir, tempPrefix)
	if err != nil {
		return Guest{}, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	product := filepath.Join(work, "product")
	if err := os.Mkdir(product, 0o755); err != nil {
		return Guest{}, err
	}
	b := builder{outDir: outDir, work: work, product: at(product), log: log}
	if err := b.build(ctx); err != nil {
		return Guest{}, err
	}
	if err := publish(product, filepath.Join(outDir, key)); err != nil {
		return Guest{}, err
	}
	fmt.Fprintf(log, "test guest: built in %.1f s\n", time.Since(start).Seconds())
	return g, nil
}

const tempPrefix = ".building-"

// clean removes what interrupted builds left behind. The caller holds the lock.
func clean(outDir string) error {
	left, err := filepath.Glob(filepath.Join(outDir, tempPrefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range left {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return nil
}

// publish syncs the finished folder, moves it to its place, and points the links in the
// folder above it to its files.
func publish(from, to string) error {
	for _, name := range append(at(from).files(), from) {
		if err := syncPath(name); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(to); err != nil { // a product that somebody emptied in part
		return err
	}
	if err := os.Rename(from, to); err != nil {
		return err
	}
	outDir := filepath.Dir(to)
	for _, name := range at(to).files() {
		base := filepath.Base(name)
		temp := filepath.Join(filepath.Dir(from), base)
		if err := os.Symlink(filepath.Join(filepath.Base(to), base), temp); err != nil {
			return err
		}
		if err := os.Rename(temp, filepath.Join(outDir, base)); err != nil {
			return err
		}
	}
	return syncPath(outDir)
}

func syncPath(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// lock takes the exclusive lock of the file until the returned function is called. The
// kernel drops the lock of a process that dies.
func lock(ctx context.Context, name string, log io.Writer) (unlock func() error, err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for waiting := false; ; waiting = true {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f.Close, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", name, err), f.Close())
		}
		if !waiting {
			fmt.Fprintf(log, "test guest: waiting for another build in %s\n", filepath.Dir(name))
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("lock %s: %w", name, ctx.Err()), f.Close())
		case <-tick.C:
		}
	}
}
