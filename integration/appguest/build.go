package appguest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"cloudlet/integration/product"
)

// builder makes one product in the folder made; work is its scratch folder.
type builder struct {
	outDir, work, made, key string
	log                     io.Writer
}

// freeBytes is what a build takes for the packages, the unpacked system and the disk.
const freeBytes = 3 << 30

func (b builder) build(ctx context.Context) error {
	if err := b.check(); err != nil {
		return err
	}
	archives := filepath.Join(b.outDir, "packages")
	base, launch, err := b.download(ctx, archives)
	if err != nil {
		return err
	}
	source := filepath.Join(b.work, "base")
	list, err := writeRepository(ctx, source, archives, base, "base")
	if err != nil {
		return err
	}
	more, err := writeRepository(ctx, filepath.Join(b.made, "repo"), archives, launch, "launch")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(b.made, "packages.txt"), []byte(list+more), 0o644); err != nil {
		return err
	}
	root := filepath.Join(b.work, "root")
	if err := b.install(ctx, source, root, base); err != nil {
		return err
	}
	if err := b.configure(root); err != nil {
		return err
	}
	if err := b.kernel(root); err != nil {
		return err
	}
	return b.disk(ctx, root)
}

// check says what is missing before anything is downloaded.
func (b builder) check() error {
	if os.Geteuid() != 0 {
		return errors.New("installing Debian into a folder needs root (remedy: run the same command with sudo once; the result is kept)")
	}
	for program, from := range map[string]string{"mmdebstrap": "mmdebstrap", "apt-get": "apt", "dpkg-deb": "dpkg", "unshare": "util-linux"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("find %s: %w (remedy: make deps, or apt-get install %s)", program, err, from)
		}
	}
	var st unix.Statfs_t
	if err := unix.Statfs(b.work, &st); err != nil {
		return fmt.Errorf("ask for free space of %s: %w", b.outDir, err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < freeBytes {
		return fmt.Errorf("%d MiB are free in %s, %d MiB are needed (remedy: make room, or choose another folder)", free>>20, b.outDir, int64(freeBytes)>>20)
	}
	return nil
}

// download fetches all packages into the folder archives and says which the base takes and
// which the launch VM takes beyond those.
func (b builder) download(ctx context.Context, archives string) (base, launch []debian, err error) {
	fmt.Fprintf(b.log, "%s: asking the Debian mirror for its lists\n", title)
	sources, err := hostSources(ctx)
	if err != nil {
		return nil, nil, err
	}
	a, err := newAPT(filepath.Join(b.work, "apt"), archives, sources)
	if err != nil {
		return nil, nil, err
	}
	if err := a.update(ctx); err != nil {
		return nil, nil, err
	}
	if base, err = a.resolve(ctx, basePackages); err != nil {
		return nil, nil, err
	}
	both := append(append([]string(nil), basePackages...), launchPackages...)
	all, err := a.resolve(ctx, both)
	if err != nil {
		return nil, nil, err
	}
	inBase := map[string]bool{}
	for _, p := range base {
		inBase[p.file] = true
	}
	var total, missing int64
	for _, p := range all {
		total += p.size
		if info, err := os.Stat(filepath.Join(archives, p.file)); err != nil || info.Size() != p.size {
			missing += p.size
		}
		if !inBase[p.file] {
			launch = append(launch, p)
		}
	}
	fmt.Fprintf(b.log, "%s: %d packages, %d MiB, of which %d MiB are to be downloaded to %s\n", title, len(all), total>>20, missing>>20, archives)
	return base, launch, a.download(ctx, both)
}

// install unpacks and configures the base's packages in the folder root.
func (b builder) install(ctx context.Context, source, root string, packages []debian) error {
	fmt.Fprintf(b.log, "%s: installing %d packages (about a minute)\n", title, len(packages))
	early := filepath.Join(b.work, "early")
	if err := unpackRecipe("rootfs/early", early); err != nil {
		return err
	}
	argv := []string{
		// Of their own: mounts, and processes that die with unshare.
		"--mount", "--pid", "--fork", "--kill-child", "--",
		"mmdebstrap", "--mode=root", "--format=directory", "--variant=apt", "--architectures=amd64",
		"--include=" + strings.Join(basePackages[1:], ","),
		"--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
		"--setup-hook=cp -r " + early + "/. \"$1\"",
		"--dpkgopt=force-unsafe-io",
		"--customize-hook=chroot \"$1\" systemctl --quiet enable systemd-networkd.service",
		"--customize-hook=chroot \"$1\" systemctl --quiet mask " + strings.Join(masked, " "),
	}
	for _, dir := range []string{"doc", "man", "info", "locale", "lintian", "bug"} {
		argv = append(argv, "--dpkgopt=path-exclude=/usr/share/"+dir+"/*")
	}
	for _, option := range []string{`Acquire::Languages "none"`, `APT::Install-Recommends "false"`, `Dpkg::Use-Pty "0"`} {
		argv = append(argv, "--aptopt="+option)
	}
	argv = append(argv, suite, root, "deb [trusted=yes] copy://"+source+" ./")
	cmd := exec.CommandContext(ctx, "unshare", argv...)
	cmd.Env = append(os.Environ(), "TMPDIR="+b.work, "LC_ALL=C")
	cmd.WaitDelay = 10 * time.Second
	_, err := product.Run(ctx, cmd, "read what mmdebstrap says; it needs version 1.3 or newer and a root that may mount")
	return err
}

// masked are units that would wake an idle guest, or need what the machine has not.
var masked = []string{
	"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "fstrim.timer",
	"systemd-tmpfiles-clean.timer", "systemd-networkd-wait-online.service", "getty@tty1.service", "systemd-pstore.service",
}

// configure writes the guest's own settings over what the packages have installed.
func (b builder) configure(root string) error {
	if err := unpackRecipe("rootfs/late", root); err != nil {
		return err
	}
	id := fmt.Sprintf("%.32s\n", b.key+b.key)
	if err := os.WriteFile(filepath.Join(root, "etc", "machine-id"), []byte(id), 0o444); err != nil {
		return err
	}
	for _, name := range []string{"etc/resolv.conf", "etc/apt/sources.list"} {
		if err := os.WriteFile(filepath.Join(root, name), nil, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// unpackRecipe copies a folder of the embedded recipe.
func unpackRecipe(from, to string) error {
	files, err := fs.Sub(recipe, from)
	if err != nil {
		return err
	}
	return fs.WalkDir(files, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := filepath.Join(to, path)
		if d.IsDir() {
			return os.MkdirAll(name, 0o755)
		}
		p, err := fs.ReadFile(files, path)
		if err != nil {
			return err
		}
		// go:embed leaves out names that begin with a dot.
		name = filepath.Join(filepath.Dir(name), strings.Replace(filepath.Base(name), "dot.", ".", 1))
		return os.WriteFile(name, p, 0o644)
	})
}

// wanted are the drivers without which the guest has no disk or no network.
var wanted = []string{"virtio_pci", "virtio_blk", "virtio_net", "ext4"}

// checkModules looks for the wanted drivers in the installed kernel and its modules.
func checkModules(root string) error {
	lists, err := filepath.Glob(filepath.Join(root, "lib", "modules", "*", "modules.dep"))
	if err != nil {
		return err
	}
	if len(lists) != 1 {
		return fmt.Errorf("find kernel modules in the installed system: %d kernels, want one", len(lists))
	}
	have := map[string]bool{}
	for _, name := range []string{lists[0], filepath.Join(filepath.Dir(lists[0]), "modules.builtin")} {
		p, err := os.ReadFile(name)
		if err != nil {
			return fmt.Errorf("read list of kernel modules: %w", err)
		}
		for line := range strings.Lines(string(p)) {
			path, _, _ := strings.Cut(strings.TrimSpace(line), ":")
			module, _, _ := strings.Cut(filepath.Base(path), ".ko")
			have[strings.ReplaceAll(module, "-", "_")] = true
		}
	}
	for _, module := range wanted {
		if !have[module] {
			return fmt.Errorf("find driver %s: %s has none (remedy: install a kernel package that has it)", module, filepath.Base(filepath.Dir(lists[0])))
		}
	}
	return nil
}

// kernel takes kernel and initial file system out of the installed system.
func (b builder) kernel(root string) error {
	if err := checkModules(root); err != nil {
		return err
	}
	for _, part := range [][2]string{{"vmlinuz-*", "vmlinuz"}, {"initrd.img-*", "initrd"}} {
		names, err := filepath.Glob(filepath.Join(root, "boot", part[0]))
		if err != nil {
			return err
		}
		if len(names) != 1 {
			return fmt.Errorf("find boot/%s in the installed system: %d files, want one", part[0], len(names))
		}
		if err := os.Rename(names[0], filepath.Join(b.made, part[1])); err != nil {
			return err
		}
	}
	return nil
}

// disk makes the ext4 image of the folder; nothing is left for the guest's kernel to
// initialise later.
func (b builder) disk(ctx context.Context, root string) error {
	fmt.Fprintf(b.log, "%s: writing the disk image\n", title)
	name := filepath.Join(b.made, "disk.raw")
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(DiskMiB<<20), f.Close()); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0", "-L", "root",
		"-E", "lazy_itable_init=0,lazy_journal_init=0,discard,root_owner=0:0", "-d", root, name)
	_, err = product.Run(ctx, cmd, "apt-get install e2fsprogs")
	return err
}
