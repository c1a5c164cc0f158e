package vmm

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
)

// Forward makes a port of the guest reachable on this host, over TCP.
type Forward struct {
	Addr  string `json:"addr"`  // IPv4 address to listen on; "" means 127.0.0.1
	Host  int    `json:"host"`  // port to listen on; 0 means a free one
	Guest int    `json:"guest"` // port in the guest
}

// String returns for example "127.0.0.1:8080 -> 80".
func (f Forward) String() string { return fmt.Sprintf("%s:%d -> %d", f.Addr, f.Host, f.Guest) }

// maxForwards bounds the forwarded ports of a VM.
const maxForwards = 64

// checkForwards validates the forwards and returns them with defaults filled in.
func checkForwards(m Machine, fs []Forward) ([]Forward, error) {
	if len(fs) > 0 && !m.has(DeviceNet) {
		return nil, fmt.Errorf("forward port %d: the machine has no network device", fs[0].Guest)
	}
	if len(fs) > maxForwards {
		return nil, fmt.Errorf("forward ports: %d given, at most %d are allowed", len(fs), maxForwards)
	}
	out := make([]Forward, len(fs))
	for i, f := range fs {
		if f.Addr == "" {
			f.Addr = "127.0.0.1"
		}
		addr, err := netip.ParseAddr(f.Addr)
		if err != nil || !addr.Is4() {
			return nil, fmt.Errorf("forward port %d: %.60q is not an IPv4 address: use for example 127.0.0.1", f.Guest, f.Addr)
		}
		if f.Host < 0 || f.Host > 65535 || f.Guest < 1 || f.Guest > 65535 {
			return nil, fmt.Errorf("forward %s: ports are 1 to 65535, and 0 on the host for a free one", f)
		}
		for _, g := range out[:i] {
			if f.Host != 0 && g.Host == f.Host && g.Addr == f.Addr {
				return nil, fmt.Errorf("forward %s: the host port is given twice", f)
			}
		}
		out[i] = f
	}
	return out, nil
}

// line is what QEMU's command line is made from.
type line struct {
	machine    Machine
	memory     string // absolute path
	shared     bool
	disk       string // absolute path, or the name of a file in the VM's folder
	diskFormat string
	backing    string // raw image below the disk, "" if there is none
	kernel     string
	initrd     string
	forwards   []Forward
	incoming   bool
}

// Ids inside QEMU's command line, and so in the device state and the monitor.
const (
	ramID   = "mem"
	diskID  = "disk0"
	netID   = "net0"
	chardev = "serial0"

	balloonID = "balloon0" // libvirt's own name for it, too
)

// args returns QEMU's arguments. Sockets and logs are relative to the VM's folder, QEMU's
// working directory: a socket's path is limited to 107 bytes. The order is part of the
// machine: it decides the devices' addresses.
func (l line) args() []string {
	m := l.machine
	size := strconv.FormatInt(m.Memory/MemoryUnit, 10) + "M"
	a := []string{
		"-no-user-config", "-nodefaults", "-display", "none",
		"-accel", m.Accelerator,
		"-machine", m.Type + ",memory-backend=" + ramID,
		"-cpu", m.CPU,
		"-smp", strconv.Itoa(m.CPUs),
		"-m", size,
		"-object", "memory-backend-file,id=" + ramID + ",size=" + size + ",mem-path=" + quote(l.memory) + ",share=" + onOff(l.shared),
		"-qmp", "unix:" + qmpSocket + ",server=on,wait=off",
	}
	for _, d := range m.Devices {
		a = append(a, l.device(d)...)
	}
	if m.Kernel {
		a = append(a, "-kernel", l.kernel)
		if m.Initrd {
			a = append(a, "-initrd", l.initrd)
		}
		if m.Append != "" {
			a = append(a, "-append", m.Append)
		}
	}
	if l.incoming {
		// A captured state may say "running": with -S it is always we who let it run.
		a = append(a, "-S", "-incoming", "defer")
	}
	return a
}

// device returns the arguments of one device of the allowed list.
func (l line) device(name string) []string {
	switch name {
	case DeviceSerial:
		return []string{
			"-chardev", "socket,id=" + chardev + ",path=" + serialSocket + ",server=on,wait=off,logfile=" + serialLog + ",logappend=on",
			"-serial", "chardev:" + chardev,
		}
	case DeviceDisk:
		return []string{
			"-drive", "if=none,id=" + diskID + ",file=" + quote(l.disk) + ",format=" + l.diskFormat + ",cache=writeback,discard=unmap,detect-zeroes=off",
			"-device", DeviceDisk + ",drive=" + diskID + ",rerror=stop,werror=stop",
		}
	case DeviceNet:
		var fwd strings.Builder
		for _, f := range l.forwards {
			fmt.Fprintf(&fwd, ",hostfwd=tcp:%s:%d-:%d", f.Addr, f.Host, f.Guest)
		}
		return []string{
			"-netdev", "user,id=" + netID + fwd.String(),
			"-device", DeviceNet + ",netdev=" + netID + ",romfile=",
		}
	case DeviceRNG:
		return []string{
			"-object", "rng-random,id=rng0,filename=/dev/urandom",
			"-device", DeviceRNG + ",rng=rng0",
		}
	case DeviceBalloon:
		return []string{"-device", DeviceBalloon + ",id=" + balloonID + ",deflate-on-oom=on"}
	}
	panic("vmm: device " + name + " was not validated")
}

// quote doubles commas, QEMU's way to keep one inside a value.
func quote(s string) string { return strings.ReplaceAll(s, ",", ",,") }

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// absolute returns the absolute form of a path: QEMU runs in another folder, and reads a
// prefix like "nbd:" of a relative name as a protocol.
func absolute(what, path string) (string, error) {
	if path == "" {
		return "", fmt.Errorf("start VM: no %s is given", what)
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("find %s %s: %w", what, path, err)
	}
	return abs, nil
}
