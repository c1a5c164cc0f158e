package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"cloudlet/integration/product"
)

const appPackage = "cloudlet/integration/guest/app"

// builder makes one product; work is its scratch folder, on the product's file system.
type builder struct {
	outDir, work string
	product      Guest
	log          io.Writer
}

func (b builder) build(ctx context.Context) error {
	packages, err := b.packages(ctx)
	if err != nil {
		return err
	}
	if err := writePackages(b.product.Packages, packages); err != nil {
		return err
	}
	root := filepath.Join(b.work, "root")
	for _, p := range packages {
		if p.file == "" {
			continue
		}
		fmt.Fprintf(b.log, "test guest: unpacking %s %s\n", p.name, p.version)
		if _, err := b.run(ctx, "apt-get install dpkg", "dpkg-deb", "-x", p.file, root); err != nil {
			return err
		}
	}
	fmt.Fprintf(b.log, "test guest: compiling %s\n", appPackage)
	app := filepath.Join(b.work, "app")
	if err := b.compile(ctx, app); err != nil {
		return err
	}
	if err := b.kernelAndInitrd(root, app); err != nil {
		return err
	}
	return b.disk(ctx)
}

// compile makes the static application; the same sources and compiler give the same bytes.
func (b builder) compile(ctx context.Context, out string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false",
		"-ldflags=-s -w -buildid=", "-o", out, appPackage)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	_, err := product.Run(ctx, cmd, "install Go, and run from within the module's folder")
	return err
}

// kernelAndInitrd takes the kernel from the unpacked packages and writes the initial file
// system. It is not compressed: a copy by the machine's loader costs less than
// decompression in an emulated CPU.
func (b builder) kernelAndInitrd(root, app string) error {
	kernel, err := one(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil {
		return err
	}
	if err := os.Rename(kernel, b.product.Kernel); err != nil {
		return err
	}
	dir, err := one(filepath.Join(root, "lib", "modules", "*"))
	if err != nil {
		return err
	}
	modules, err := openModules(dir)
	if err != nil {
		return err
	}
	order, err := modules.order(wanted)
	if err != nil {
		return err
	}
	var archive bytes.Buffer
	if err := writeInitrd(&archive, filepath.Join(root, "bin", "busybox"), app, order); err != nil {
		return fmt.Errorf("write initrd: %w", err)
	}
	return os.WriteFile(b.product.Initrd, archive.Bytes(), 0o644)
}

// one returns the only file that matches.
func one(pattern string) (string, error) {
	names, err := filepath.Glob(pattern)
	if err != nil {
		return "", err
	}
	if len(names) != 1 {
		return "", fmt.Errorf("find %s: %d files, want one", pattern, len(names))
	}
	return names[0], nil
}

// writeInitrd writes the initial file system: the embedded init, busybox, the application,
// and the modules with their order.
func writeInitrd(w io.Writer, busybox, app string, modules []string) error {
	c := &cpioWriter{w: w}
	for _, name := range []string{"dev", "proc", "sys", "data", "bin", "modules"} {
		c.folder(name)
	}
	// The kernel opens the console for init before init can mount devtmpfs.
	c.device("dev/console", 0o600, 5, 1)
	init, err := source.ReadFile("init.sh")
	if err != nil {
		return err
	}
	c.file("init", 0o755, init)
	var order strings.Builder
	for _, path := range modules {
		p, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		c.file("modules/"+filepath.Base(path), 0o644, p)
		fmt.Fprintln(&order, filepath.Base(path))
	}
	c.file("modules/order", 0o644, []byte(order.String()))
	for _, program := range [][2]string{{"bin/busybox", busybox}, {"bin/app", app}} {
		p, err := os.ReadFile(program[1])
		if err != nil {
			return err
		}
		c.file(program[0], 0o755, p)
	}
	return c.close()
}

// diskMiB is the size of the disk: the state file, the load's file and the largest file
// that a request may write fit twice.
const diskMiB = 128

// disk makes the empty file system. All that mke2fs would draw at random or leave for the
// guest's kernel to initialise later is fixed and done here.
func (b builder) disk(ctx context.Context) error {
	f, err := os.Create(b.product.Disk)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(diskMiB<<20), f.Close()); err != nil {
		return err
	}
	const id = "6b8d9f5e-3c0a-4e0e-9a4e-2f6c1d7b5a01"
	cmd := exec.CommandContext(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-N", "256",
		"-J", "size=4", "-U", id, "-L", "data",
		"-E", "hash_seed="+id+",lazy_itable_init=0,lazy_journal_init=0,discard,root_owner=0:0", b.product.Disk)
	cmd.Env = append(os.Environ(), "E2FSPROGS_FAKE_TIME=1700000000")
	_, err = product.Run(ctx, cmd, "apt-get install e2fsprogs")
	return err
}

// run runs a program of the system in the scratch folder and returns what it printed.
func (b builder) run(ctx context.Context, remedy string, argv ...string) (string, error) {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir = b.work
	return product.Run(ctx, cmd, remedy)
}
