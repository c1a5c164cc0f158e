package vmm

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Account is the user and group that QEMU runs as.
type Account struct {
	UID int `json:"uid"`
	GID int `json:"gid"`
}

// Other reports whether it is another user than this process's.
func (a Account) Other() bool { return a.UID != os.Geteuid() }

// own is the account of this process.
func own() Account { return Account{UID: os.Geteuid(), GID: os.Getegid()} }

// parseAccount reads an owner as libvirt writes it: "+64055:+64055".
func parseAccount(s string) (Account, error) {
	uid, gid, _ := strings.Cut(s, ":")
	u, uerr := strconv.Atoi(strings.TrimPrefix(uid, "+"))
	g, gerr := strconv.Atoi(strings.TrimPrefix(gid, "+"))
	if uerr != nil || gerr != nil || u < 0 || g < 0 {
		return Account{}, fmt.Errorf("libvirt's owner of QEMU %.60q: want for example +107:+107", s)
	}
	return Account{u, g}, nil
}

// take makes a file, or finds it, and gives it to the account.
func (a Account) take(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("give a file to QEMU's user: %w", err)
	}
	return errors.Join(f.Chown(a.UID, a.GID), f.Close())
}

// open lets the account's group pass, and no more, through the folders from root down to dir,
// as far as they are this user's alone: one that others were let into stays as it is.
func (a Account) open(root, dir string) error {
	if !a.Other() || root == "" {
		return nil
	}
	rel, err := filepath.Rel(root, dir)
	if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
		return nil // nothing of ours: whether it can be passed is seen later
	}
	way := root
	for _, part := range append([]string{""}, strings.Split(rel, "/")...) {
		way = filepath.Join(way, part)
		if err := a.pass(way); err != nil {
			return fmt.Errorf("let QEMU's user pass: %w", err)
		}
	}
	return nil
}

func (a Account) pass(dir string) error {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	if int(st.Uid) != os.Geteuid() || st.Mode&0o001 != 0 || int(st.Gid) != a.GID && st.Mode&0o077 != 0 || int(st.Gid) == a.GID && st.Mode&0o010 != 0 {
		return nil
	}
	if err := os.Chown(dir, -1, a.GID); err != nil {
		return err
	}
	return os.Chmod(dir, os.FileMode(st.Mode&0o700)|0o010)
}

// The ways a file is opened to see whether it can be.
const (
	canRead  = "read"
	canWrite = "write"
	canRun   = "run"
)

// reach is a file that QEMU is going to open.
type reach struct{ how, path string }

// checkArg makes the emulator look whether files can be opened, instead of being QEMU.
const checkArg = "cloudlet-check"

// check sees, by a process of the account, that it can open the files. The error names the
// first place where it cannot pass.
func (a Account) check(emulator string, files []reach) error {
	if !a.Other() {
		return nil
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("libvirt runs QEMU as user %s, to whom this user may give no file: run as root, or use qemu:///session", a.name())
	}
	args := []string{checkArg}
	for _, f := range files {
		args = append(args, f.how, f.path)
	}
	cmd := exec.Command(emulator, args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(a.UID), Gid: uint32(a.GID), Groups: a.groups()}}
	out, err := cmd.CombinedOutput()
	switch said := strings.TrimSpace(string(out)); {
	case err == nil:
		return nil
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("user %s, whom libvirt runs QEMU as, cannot execute this program (%s): install it where everybody can, for example in /usr/local/bin", a.name(), realPath(emulator))
	case said != "":
		return fmt.Errorf("user %s, whom libvirt runs QEMU as, %s", a.name(), said)
	default:
		return fmt.Errorf("see what user %s can open: %w", a.name(), err)
	}
}

// name returns the user's name, or the number.
func (a Account) name() string {
	if u, err := user.LookupId(strconv.Itoa(a.UID)); err == nil {
		return u.Username
	}
	return strconv.Itoa(a.UID)
}

// groups returns the groups that libvirt gives the user besides, like that of /dev/kvm.
func (a Account) groups() []uint32 {
	u, err := user.LookupId(strconv.Itoa(a.UID))
	if err != nil {
		return nil
	}
	ids, err := u.GroupIds()
	if err != nil {
		return nil
	}
	var out []uint32
	for _, id := range ids {
		if n, err := strconv.ParseUint(id, 10, 32); err == nil {
			out = append(out, uint32(n))
		}
	}
	return out
}

func realPath(path string) string {
	if p, err := filepath.EvalSymlinks(path); err == nil {
		return p
	}
	return path
}

// checkFiles is what a process of the account does: args are pairs of how and path.
func checkFiles(args []string) error {
	for i := 0; i+1 < len(args); i += 2 {
		how, path := args[i], args[i+1]
		for dir := "/"; ; {
			if unix.Access(dir, unix.X_OK) != nil {
				return fmt.Errorf("cannot pass %s, on the way to %s: let that user's group pass (chgrp, chmod g+x), or choose another place with --state", dir, path)
			}
			rest, _ := filepath.Rel(dir, filepath.Dir(path))
			if rest == "." {
				break
			}
			next, _, _ := strings.Cut(rest, "/")
			dir = filepath.Join(dir, next)
		}
		var err error
		if how == canRun {
			err = unix.Access(path, unix.X_OK)
		} else {
			flags := os.O_RDONLY
			if how == canWrite {
				flags = os.O_RDWR
			}
			var f *os.File
			if f, err = os.OpenFile(path, flags, 0); err == nil {
				err = f.Close()
			}
		}
		if err != nil {
			return fmt.Errorf("cannot %s %s: %v: change its owner or mode, or of a mount, end the instances on it first, which were started without libvirt", how, path, err)
		}
	}
	return nil
}

// fileOwner returns the group and the user that own a file.
func fileOwner(fi os.FileInfo) (gid, uid int) {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return int(st.Gid), int(st.Uid)
	}
	return -1, -1
}
