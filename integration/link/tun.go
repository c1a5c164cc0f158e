package link

import (
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

const (
	tunPath = "/dev/net/tun"
	// vnetHeader is the virtio_net_hdr before each packet: with offload the kernel's ends
	// exchange large packets whose checksums are not computed.
	vnetHeader = 10
	packetMost = vnetHeader + 64<<10

	offloadCsum = 1 // TUN_F_CSUM
	offloadTSO4 = 2 // TUN_F_TSO4
)

// openTun makes a TUN device in the calling thread's network namespace; it goes when the file
// is closed.
func openTun(pattern string, offload bool) (f *os.File, name string, err error) {
	fd, err := unix.Open(tunPath, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, "", fmt.Errorf("open %s: %w", tunPath, err)
	}
	req, err := unix.NewIfreq(pattern)
	if err == nil {
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err == nil && offload {
		err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloadCsum|offloadTSO4)
	}
	if err != nil {
		return nil, "", errors.Join(fmt.Errorf("make TUN device: %w", err), unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), tunPath), req.Name(), nil
}

// setUp gives a device of the calling thread's namespace its address and brings it up.
func setUp(name, address string) error {
	if err := ip("addr", "add", address, "dev", name); err != nil {
		return err
	}
	return bringUp(name)
}

func bringUp(name string) error {
	return ip("link", "set", "dev", name, "mtu", fmt.Sprint(mtu), "txqueuelen", "10000", "up")
}

// isIPv4 reports whether what was read from a TUN device is an IPv4 packet: the kernel sends
// some IPv6 of its own accord.
func isIPv4(b []byte) bool { return len(b) > vnetHeader && b[vnetHeader]>>4 == 4 }

// ErrUnavailable: no link can be made on this host.
var ErrUnavailable = errors.New("no link can be made on this host")

// Probe returns [ErrUnavailable] with the reason where no link can be made, or nil.
func Probe() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: it needs root, for network devices", ErrUnavailable)
	}
	f, err := os.OpenFile(tunPath, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w: it needs the kernel's TUN devices (modprobe tun): %w", ErrUnavailable, err)
	}
	if err != nil {
		return err
	}
	if _, err := exec.LookPath("ip"); err != nil {
		return errors.Join(fmt.Errorf("%w: it needs the program ip: install iproute2", ErrUnavailable), f.Close())
	}
	return f.Close()
}

// congestion sets the congestion control of a socket.
func congestion(fd uintptr, name string) error {
	if err := unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, name); err != nil {
		return fmt.Errorf("congestion control %q: %w", name, err)
	}
	return nil
}
