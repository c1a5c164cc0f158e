package appguest

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"io"
	"path/filepath"

	"cloudlet/integration/product"
)

// Append is the kernel command line of the guest: where its root is, the console, a panic
// as a reboot, and nothing of what costs time in an emulated machine for no use here.
const Append = "root=/dev/vda rootfstype=ext4 rw console=ttyS0 quiet panic=-1 net.ifnames=0 systemd.show_status=0 " +
	"mitigations=off tsc=reliable no_timer_check nokaslr edd=off lsm= audit=0 init_on_alloc=0 cryptomgr.notests " +
	"i8042.noaux i8042.nokbd rcupdate.rcu_expedited=1"

// Ready is what the console shows when the guest has booted and is at rest.
const Ready = "guest: ready"

// What the guest is made for, and where its application answers once it is customised.
const (
	MemoryMiB = 1024
	DiskMiB   = 2048
	Port      = 80
)

// Guest names the parts of a built guest by absolute paths.
type Guest struct {
	Kernel   string // the Debian kernel as packaged, for -kernel
	Initrd   string // its initial file system as Debian makes it, for -initrd
	Disk     string // a raw, sparse ext4 image: a template, to be copied before use
	Packages string // name, version, architecture, SHA-256 and use (base, launch) of each Debian package
	Repo     string // a folder that is an apt repository of what Customise installs
}

// recipe is what the product is made from, apart from the Debian packages.
//
//go:embed rootfs build.go packages.go repository.go
var recipe embed.FS

var parts = []string{"vmlinuz", "initrd", "disk.raw", "packages.txt", "repo"}

// Build makes the guest below outDir, or finds it there. It writes what it does to log,
// which may be nil. It needs root, mmdebstrap, apt, unshare and mke2fs, and a reachable
// Debian mirror at the first call: the one of the host's apt sources, else deb.debian.org.
// What has been downloaded stays in outDir/packages for the next try.
func Build(ctx context.Context, outDir string, log io.Writer) (Guest, error) {
	if log == nil {
		log = io.Discard
	}
	g, err := build(ctx, outDir, log)
	if err != nil {
		return Guest{}, fmt.Errorf("build application guest in %s: %w", outDir, err)
	}
	return g, nil
}

func build(ctx context.Context, outDir string, log io.Writer) (Guest, error) {
	outDir, err := filepath.Abs(outDir)
	if err != nil {
		return Guest{}, err
	}
	key, err := product.Key(recipe, ".", "")
	if err != nil {
		return Guest{}, err
	}
	spec := product.Spec{Title: title, Dir: outDir, Key: key, Parts: parts, Log: log}
	spec.Make = func(ctx context.Context, work, made string) error {
		return builder{outDir: outDir, work: work, made: made, key: key, log: log}.build(ctx)
	}
	dir, err := spec.Build(ctx)
	if err != nil {
		return Guest{}, err
	}
	return at(dir), nil
}

const title = "application guest"

func at(dir string) Guest {
	in := func(name string) string { return filepath.Join(dir, name) }
	return Guest{Kernel: in("vmlinuz"), Initrd: in("initrd"), Disk: in("disk.raw"), Packages: in("packages.txt"), Repo: in("repo")}
}

func hashText(text string) string {
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:8])
}
