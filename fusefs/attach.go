package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxRequest is the largest read in bytes that the kernel may ask for.
const maxRequest = 1 << 20

// attach mounts a new FUSE connection on point and returns its descriptor: by mount(2), or
// where that is not permitted through the setuid program fusermount3. The connection is
// made here and not by go-fuse for the kernel's own errors and to know when it ends.
func attach(point, source string, allowOther bool) (int, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return -1, fmt.Errorf("open /dev/fuse: %w: %w: load the kernel module with `modprobe fuse`, or give the container the device", err, ErrUnavailable)
	case err != nil: // fusermount3 opens it with the user's rights too
		return -1, fmt.Errorf("open /dev/fuse: %w: %w: allow this user to read and write the device, or run as root", err, ErrUnavailable)
	}
	data := fmt.Sprintf("fd=%d,rootmode=%o,user_id=%d,group_id=%d,max_read=%d", fd, unix.S_IFDIR, os.Geteuid(), os.Getegid(), maxRequest)
	if allowOther {
		data += ",allow_other"
	}
	err = unix.Mount(source, point, "fuse."+fsSubtype, unix.MS_NOSUID|unix.MS_NODEV, data)
	if err == nil {
		return fd, nil
	}
	unix.Close(fd)
	if !errors.Is(err, unix.EPERM) {
		return -1, fmt.Errorf("mount %s: %w", point, err)
	}
	return attachHelper(point, source, allowOther)
}

func attachHelper(point, source string, allowOther bool) (int, error) {
	bin, err := fusermount()
	if err != nil {
		return -1, fmt.Errorf("mount %s: %w: %w: install the package fuse3, or run as root", point, err, ErrUnavailable)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("make socket pair: %w", err)
	}
	local, remote := os.NewFile(uintptr(pair[0]), "local"), os.NewFile(uintptr(pair[1]), "remote")
	defer local.Close()
	opts := []string{"fsname=" + source, "subtype=" + fsSubtype, fmt.Sprintf("max_read=%d", maxRequest)}
	if allowOther {
		opts = append(opts, "allow_other")
	}
	var stderr bytes.Buffer
	cmd := exec.Command(bin, "-o", strings.Join(opts, ","), "--", point)
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	cmd.ExtraFiles = []*os.File{remote}
	cmd.Stderr = &stderr
	err = cmd.Run()
	remote.Close()
	if err != nil {
		hint := ""
		if allowOther {
			hint = ": other users need user_allow_other in /etc/fuse.conf"
		}
		return -1, fmt.Errorf("mount %s: fusermount3: %s: %w: %w%s", point, strings.TrimSpace(stderr.String()), err, ErrUnavailable, hint)
	}
	return receiveFD(pair[0])
}

// receiveFD takes the one descriptor that fusermount3 sends.
func receiveFD(socket int) (int, error) {
	p, oob := make([]byte, 8), make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, p, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("receive FUSE descriptor: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return -1, fmt.Errorf("receive FUSE descriptor: %d messages: %w", len(messages), errors.Join(err, syscall.EPROTO))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("receive FUSE descriptor: have %d: %w", len(fds), errors.Join(err, syscall.EPROTO))
	}
	return fds[0], nil
}

// detach unmounts what is mounted at point; lazily even while it is in use. ErrBusy says
// that it is in use.
func detach(point string, lazy bool) error {
	flags := unix.UMOUNT_NOFOLLOW
	if lazy {
		flags |= unix.MNT_DETACH
	}
	err := unix.Unmount(point, flags)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("unmount %s: %w: stop the instances that use it first", point, ErrBusy)
	case !errors.Is(err, unix.EPERM):
		return fmt.Errorf("unmount %s: %w", point, err)
	}
	bin, err := fusermount()
	if err != nil {
		return fmt.Errorf("unmount %s: %w: install the package fuse3, or run as root", point, err)
	}
	args := []string{"-u", "--", point}
	if lazy {
		args[0] = "-uz"
	}
	cmd := exec.Command(bin, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil && bytes.Contains(bytes.ToLower(out), []byte("busy")) {
		return fmt.Errorf("unmount %s: %w: stop the instances that use it first", point, ErrBusy)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: fusermount3: %s: %w", point, bytes.TrimSpace(out), err)
	}
	return nil
}

func fusermount() (string, error) {
	bin, err := exec.LookPath("fusermount3")
	if err != nil {
		bin, err = exec.LookPath("/bin/fusermount3")
	}
	return bin, err
}
