package guest

import (
	"context"
	"embed"
	"fmt"
	"io"
	"path/filepath"
	"runtime"

	"cloudlet/integration/product"
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
	spec := product.Spec{Title: "test guest", Dir: outDir, Key: key, Parts: at("").files(), Log: log}
	spec.Make = func(ctx context.Context, work, made string) error {
		return builder{outDir: outDir, work: work, product: at(made), log: log}.build(ctx)
	}
	dir, err := spec.Build(ctx)
	if err != nil {
		return Guest{}, fmt.Errorf("build test guest in %s: %w", outDir, err)
	}
	return at(dir), nil
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

// sourceKey names a product by the hash of its sources and of the compiler's version.
func sourceKey() (string, error) {
	return product.Key(source, ".", runtime.Version()+"\n")
}
