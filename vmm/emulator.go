package vmm

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// Libvirt is given our own program as the emulator: by a link whose name tells the program what
// it is to be, beside a link to QEMU. It installs the filter of its system calls and becomes
// QEMU, in the same process, as libvirt wants it.
const (
	emulatorName = "cloudlet-emulator"
	emulatorQEMU = "qemu"
)

// makeEmulator makes the links in a folder below dir and returns the emulator's path. Libvirt
// keeps what an emulator can do by its path: a QEMU that has changed gets another one.
func makeEmulator(dir, program, qemu string) (string, error) {
	program, err := filepath.EvalSymlinks(program)
	if err != nil {
		return "", fmt.Errorf("make emulator: %w", err)
	}
	fi, err := os.Stat(qemu)
	if err != nil {
		return "", fmt.Errorf("make emulator: %w", err)
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\n%s\n%d\n%d", program, qemu, fi.Size(), fi.ModTime().UnixNano()))
	folder := filepath.Join(dir, hex.EncodeToString(sum[:6]))
	if err := os.MkdirAll(folder, 0o755); err != nil {
		return "", fmt.Errorf("make emulator: %w", err)
	}
	for name, target := range map[string]string{emulatorName: program, emulatorQEMU: qemu} {
		if err := os.Symlink(target, filepath.Join(folder, name)); err != nil && !errors.Is(err, os.ErrExist) {
			return "", fmt.Errorf("make emulator: %w", err)
		}
	}
	return filepath.Join(folder, emulatorName), nil
}

// IsEmulator reports whether a program that was started by this name, its argument 0, is to be
// RunEmulator.
func IsEmulator(name string) bool { return filepath.Base(name) == emulatorName }

// RunEmulator becomes QEMU with the same arguments, in a process with the launcher's filter. It returns only an error's exit code. It changes the whole process.
func RunEmulator(args []string) int {
	if err := runEmulator(args); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func runEmulator(args []string) error {
	if len(args) > 1 && args[1] == checkArg {
		return checkFiles(args[2:])
	}
	qemu, err := os.Readlink(filepath.Join(filepath.Dir(args[0]), emulatorQEMU))
	if err != nil {
		return fmt.Errorf("find QEMU: %w", err)
	}
	if err := filterQEMU(args); err != nil {
		return err
	}
	return fmt.Errorf("execute %s: %w", qemu, syscall.Exec(qemu, append([]string{qemu}, args[1:]...), os.Environ()))
}
