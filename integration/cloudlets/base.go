package cloudlets

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"cloudlet/integration/guest"
)

// makeBase makes a store with one base of the test guest, or finds it made.
func (l *Lab) makeBase(ctx context.Context) (store string, err error) {
	g, err := guest.Build(ctx, l.GuestDir, l.Log)
	if err != nil {
		return "", err
	}
	store = filepath.Join(l.Dir, fmt.Sprintf("base-%s-%d", filepath.Base(filepath.Dir(g.Disk)), l.MemoryMiB))
	if l.Base, err = onlyBase(store); err == nil {
		return store, nil
	}
	l.Say("base: the test guest with %d MiB", l.MemoryMiB)
	made := store + ".new"
	defer func() { err = errors.Join(err, sweep(context.WithoutCancel(ctx), l.Program, made), os.RemoveAll(made)) }()
	if err := errors.Join(sweep(ctx, l.Program, made), os.RemoveAll(made), os.RemoveAll(store)); err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, l.Program, "--state", made, "base", "create", g.Disk, "--kernel", g.Kernel, "--initrd", g.Initrd,
		"--append", guest.Append, "--memory", fmt.Sprintf("%dM", l.MemoryMiB), "--probe", fmt.Sprintf("%d/healthz", guest.Port), "--name", "base")
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = serveBound
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("create the base: %w: %s", err, out)
	}
	if err := os.Rename(made, store); err != nil {
		return "", err
	}
	l.Base, err = onlyBase(store)
	return store, err
}

// onlyBase returns the id of the one base of a store.
func onlyBase(store string) (id string, err error) {
	labels, err := filepath.Glob(filepath.Join(store, "bases", "*.json"))
	if err != nil {
		return "", err
	}
	if len(labels) != 1 {
		return "", fmt.Errorf("the store in %s has %d bases, want one", store, len(labels))
	}
	return strings.TrimSuffix(filepath.Base(labels[0]), ".json"), nil
}

// CopyBases gives the bases of a store to another one: bases never change, so their files are
// hard links where the file system allows that, else copies.
func CopyBases(ctx context.Context, store, to string) error {
	from := filepath.Join(store, "bases")
	for _, pattern := range []string{"*.json", "*/*"} {
		files, err := filepath.Glob(filepath.Join(from, pattern))
		if err != nil {
			return err
		}
		for _, f := range files {
			rel, err := filepath.Rel(from, f)
			if err != nil {
				return err
			}
			target := filepath.Join(to, "bases", rel)
			if err := os.MkdirAll(filepath.Dir(target), 0o700); err != nil {
				return err
			}
			if os.Link(f, target) == nil {
				continue
			}
			if out, err := exec.CommandContext(ctx, "cp", "--sparse=always", f, target).CombinedOutput(); err != nil {
				return fmt.Errorf("copy %s: %w: %s", f, err, out)
			}
		}
	}
	return nil
}
