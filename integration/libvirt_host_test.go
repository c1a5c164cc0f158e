package integration

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hostEnv says to the test binary that it is alone in a mount namespace, in which it starts a
// libvirt of its own with the configuration of a new host: QEMU runs as libvirt-qemu.
const hostEnv = "CLOUDLET_TEST_LIBVIRT"

// onLibvirtHost reports whether this process is such a one.
func onLibvirtHost() bool { return os.Getenv(hostEnv) != "" }

// libvirtHost is a libvirt that was started by hand.
type libvirtHost struct {
	dir          string
	logd, daemon *exec.Cmd
}

// theLibvirt is the one of this process, where onLibvirtHost.
var theLibvirt *libvirtHost

// startLibvirtHost hides the machine's own libvirt, and starts another.
func startLibvirtHost() (*libvirtHost, error) {
	dir, err := os.MkdirTemp("", "cloudlet-libvirt-")
	if err != nil {
		return nil, err
	}
	h := &libvirtHost{dir: dir}
	for _, hidden := range []string{"/run/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt", "/etc/libvirt"} {
		if err := os.MkdirAll(hidden, 0o755); err != nil {
			return h, err
		}
		if err := unix.Mount("none", hidden, "tmpfs", 0, "mode=755"); err != nil {
			return h, fmt.Errorf("hide %s: %w", hidden, err)
		}
	}
	// Devices that everybody may open, as on a host that is in order.
	for path, minor := range map[string]uint32{"/dev/kvm": 232, "/dev/fuse": 229} {
		if _, err := os.Stat(path); err != nil {
			continue
		}
		node := filepath.Join(dir, filepath.Base(path))
		if err := unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(10, minor))); err != nil {
			return h, fmt.Errorf("make %s: %w", path, err)
		}
		if err := os.Chmod(node, 0o666); err != nil {
			return h, err
		}
		if err := unix.Mount(node, path, "", unix.MS_BIND, ""); err != nil {
			return h, fmt.Errorf("show %s: %w", path, err)
		}
	}
	conf := "auth_unix_rw = \"none\"\nunix_sock_group = \"root\"\n"
	if err := os.WriteFile(filepath.Join(dir, "libvirtd.conf"), []byte(conf), 0o600); err != nil {
		return h, err
	}
	if h.logd, err = h.run("virtlogd", "-p", filepath.Join(dir, "virtlogd.pid")); err != nil {
		return h, err
	}
	if err := h.await("virtlogd", func() bool { _, err := os.Stat("/run/libvirt/virtlogd-sock"); return err == nil }); err != nil {
		return h, err
	}
	return h, h.start()
}

// await waits until a daemon is of use.
func (h *libvirtHost) await(name string, up func() bool) error {
	for end := time.Now().Add(30 * time.Second); !up(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			log, _ := os.ReadFile(filepath.Join(h.dir, name+".log"))
			return fmt.Errorf("%s does not answer: %s", name, log)
		}
	}
	return nil
}

// run starts a daemon, whose log goes to the host's folder.
func (h *libvirtHost) run(name string, args ...string) (*exec.Cmd, error) {
	log, err := os.OpenFile(filepath.Join(h.dir, name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = log, log
	return cmd, cmd.Start()
}

// start starts libvirtd and waits until it listens.
func (h *libvirtHost) start() (err error) {
	if h.daemon, err = h.run("libvirtd", "-f", filepath.Join(h.dir, "libvirtd.conf"), "-p", filepath.Join(h.dir, "libvirtd.pid")); err != nil {
		return err
	}
	return h.await("libvirtd", func() bool { return exec.Command("virsh", "-c", "qemu:///system", "version").Run() == nil })
}

// stop ends libvirtd as a restart of its service does, or by force.
func (h *libvirtHost) stop(sig os.Signal) error {
	if h.daemon == nil {
		return nil
	}
	err := h.daemon.Process.Signal(sig)
	_ = h.daemon.Wait() // by the signal
	h.daemon = nil
	return errors.Join(err, endProbes())
}

// endProbes ends the QEMUs that libvirtd asked what they can do when it ended: nobody else does.
func endProbes() error {
	files, err := filepath.Glob("/var/lib/libvirt/qemu/qmp-*/qmp.pid")
	for _, file := range files {
		text, rerr := os.ReadFile(file)
		pid, perr := strconv.Atoi(strings.TrimSpace(string(text)))
		if rerr != nil || perr != nil || pid <= 1 {
			continue // it has only begun, or ended
		}
		if kerr := unix.Kill(pid, unix.SIGKILL); !errors.Is(kerr, unix.ESRCH) {
			err = errors.Join(err, kerr)
		}
	}
	return err
}

// end ends all of it.
func (h *libvirtHost) end() {
	_ = h.stop(unix.SIGTERM)
	if h.logd != nil {
		_ = h.logd.Process.Kill()
		_ = h.logd.Wait()
	}
	for _, hidden := range []string{"/dev/kvm", "/dev/fuse", "/run/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt", "/etc/libvirt"} {
		_ = unix.Unmount(hidden, unix.MNT_DETACH)
	}
	if os.Getenv("CLOUDLET_TEST_KEEP") == "" {
		_ = os.RemoveAll(h.dir)
	}
}

// runTests runs the tests, on a libvirt of their own if that is asked for.
func runTests(m *testing.M) int {
	if !onLibvirtHost() {
		return m.Run()
	}
	h, err := startLibvirtHost()
	defer h.end()
	if err != nil {
		fmt.Fprintln(os.Stderr, "start libvirt:", err)
		return 1
	}
	theLibvirt = h
	return m.Run()
}
