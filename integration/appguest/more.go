package appguest

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"cloudlet/integration/product"
)

// More says what a guest is to be given besides what it was built with.
type More struct {
	Title    string   // what log lines begin with
	Dir      string   // absolute path of the folder to work in
	Packages []string // Debian packages, to be installed with what they depend on
}

// BuildMore makes, or finds in the folder, an apt repository of what an installation of the
// packages in g takes beyond what g's disk has. It returns the repository's folder, and a
// file that lists its packages as g.Packages does. It writes what it does to log, which may
// be nil, and needs apt, debugfs and, unless it was made before, a Debian mirror. Downloaded
// packages stay in Dir/packages for the next try.
func BuildMore(ctx context.Context, g Guest, m More, log io.Writer) (repo, list string, err error) {
	if log == nil {
		log = io.Discard
	}
	key, err := m.key(g)
	if err != nil {
		return "", "", fmt.Errorf("make package repository in %s: %w", m.Dir, err)
	}
	spec := product.Spec{Title: m.Title, Dir: m.Dir, Key: key, Parts: []string{"repo", "packages.txt"}, Log: log}
	spec.Make = func(ctx context.Context, work, made string) error { return m.build(ctx, g, work, made, log) }
	dir, err := spec.Build(ctx)
	if err != nil {
		return "", "", fmt.Errorf("make package repository in %s: %w", m.Dir, err)
	}
	return filepath.Join(dir, "repo"), filepath.Join(dir, "packages.txt"), nil
}

// key changes with the packages that are asked for, and with what is there already.
func (m More) key(g Guest) (string, error) {
	has, err := os.ReadFile(g.Packages)
	if err != nil {
		return "", fmt.Errorf("read package list: %w", err)
	}
	return hashText(fmt.Sprint(m.Packages, string(has))), nil
}

func (m More) build(ctx context.Context, g Guest, work, made string, log io.Writer) error {
	fmt.Fprintf(log, "%s: asking the Debian mirror for its lists\n", m.Title)
	sources, err := hostSources(ctx)
	if err != nil {
		return err
	}
	archives := filepath.Join(m.Dir, "packages")
	a, err := newAPT(filepath.Join(work, "apt"), archives, sources)
	if err != nil {
		return err
	}
	// The very state of the guest, so that nothing which it has is fetched again, and what
	// must be newer for a package's sake is.
	status, err := dpkgStatus(ctx, g)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(a.dir, "state", "status"), []byte(status), 0o644); err != nil {
		return err
	}
	if err := a.update(ctx); err != nil {
		return err
	}
	packages, err := a.resolve(ctx, m.Packages)
	if err != nil {
		return err
	}
	var total int64
	for _, p := range packages {
		total += p.size
	}
	fmt.Fprintf(log, "%s: %d packages, %d MiB, to %s\n", m.Title, len(packages), total>>20, archives)
	if err := a.download(ctx, m.Packages); err != nil {
		return err
	}
	list, err := writeRepository(ctx, filepath.Join(made, "repo"), archives, packages, "launch")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(made, "packages.txt"), []byte(list), 0o644)
}

// dpkgStatus reads from the guest's disk which packages are installed there.
func dpkgStatus(ctx context.Context, g Guest) (string, error) {
	const name = "/var/lib/dpkg/status"
	out, err := product.Run(ctx, exec.CommandContext(ctx, "debugfs", "-R", "cat "+name, g.Disk), "apt-get install e2fsprogs")
	if err == nil && !strings.Contains(out, "Status: install ok installed") { // debugfs prints errors and ends well
		err = fmt.Errorf("no package is installed (remedy: build the guest again)")
	}
	if err != nil {
		return "", fmt.Errorf("read %s of %s: %w", name, g.Disk, err)
	}
	return out, nil
}
