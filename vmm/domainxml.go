package vmm

import (
	"fmt"
	"net/netip"
	"strconv"

	"libvirt.org/go/libvirtxml"
)

// domainSpec is what a domain's XML is made from, beside the line for QEMU.
type domainSpec struct {
	name     string
	uuid     string
	title    string
	emulator string
	log      string  // of the serial console
	console  string  // socket of the serial console, "" for a terminal
	account  Account // that QEMU runs as, if label
	label    bool    // libvirt knows of owners of files
}

const (
	// aliasPrefix begins the names of devices that libvirt takes from us.
	aliasPrefix = "ua-"
	// guestMAC is the address that QEMU itself gives to a first network device.
	guestMAC = "52:54:00:12:34:56"
)

// domainXML returns the description of a domain whose guest sees the machine that line.args
// describes: the same devices at the same addresses, and none that libvirt would add. Its
// memory is our file, which libvirt's own language can place only in a folder of its
// configuration: so that is said to QEMU directly.
func domainXML(l line, s domainSpec) (string, error) {
	m := l.machine
	size := strconv.FormatInt(m.Memory/MemoryUnit, 10) + "M"
	d := &libvirtxml.Domain{
		Type: map[string]string{TCG: "qemu", KVM: "kvm"}[m.Accelerator], Name: s.name, UUID: s.uuid, Title: s.title,
		Memory: &libvirtxml.DomainMemory{Value: uint(m.Memory / MemoryUnit), Unit: "MiB"},
		VCPU:   &libvirtxml.DomainVCPU{Placement: "static", Value: uint(m.CPUs)},
		OS:     &libvirtxml.DomainOS{Type: &libvirtxml.DomainOSType{Arch: "x86_64", Machine: m.Type, Type: "hvm"}},
		Features: &libvirtxml.DomainFeatureList{
			ACPI: &libvirtxml.DomainFeature{}, APIC: &libvirtxml.DomainFeatureAPIC{},
		},
		CPU: &libvirtxml.DomainCPU{
			Mode: "custom", Match: "exact", Check: "none",
			Model:    &libvirtxml.DomainCPUModel{Fallback: "forbid", Value: m.CPU},
			Topology: topology(m),
		},
		Clock:      &libvirtxml.DomainClock{Offset: "utc"},
		OnPoweroff: "destroy", OnReboot: "restart", OnCrash: "destroy",
		Devices: &libvirtxml.DomainDeviceList{
			Emulator: s.emulator,
			Controllers: []libvirtxml.DomainController{
				{Type: "usb", Index: ptr[uint](0), Model: "none"},
				{Type: "pci", Index: ptr[uint](0), Model: "pcie-root"},
			},
			MemBalloon: &libvirtxml.DomainMemBalloon{Model: "none"},
		},
		QEMUCommandline: &libvirtxml.DomainQEMUCommandline{Args: []libvirtxml.DomainQEMUCommandlineArg{
			{Value: "-object"},
			{Value: "memory-backend-file,id=" + ramID + ",size=" + size + ",mem-path=" + quote(l.memory) + ",share=" + onOff(l.shared)},
			{Value: "-machine"}, {Value: "memory-backend=" + ramID},
		}},
	}
	if s.label {
		// Owners stay as they are: nothing of libvirt's touches the mount, and no two owners of
		// an image that many VMs read compete.
		d.SecLabel = []libvirtxml.DomainSecLabel{{
			Type: "static", Model: "dac", Relabel: "no", Label: fmt.Sprintf("+%d:+%d", s.account.UID, s.account.GID),
		}}
	}
	if m.Kernel {
		d.OS.Kernel, d.OS.Initrd, d.OS.Cmdline = l.kernel, l.initrd, m.Append
	}
	var slot uint // the next on the root bus; QEMU gives them out in the order of devices
	for _, name := range m.Devices {
		if name == DeviceSerial {
			d.Devices.Serials = append(d.Devices.Serials, serialDevice(s))
			continue
		}
		slot++
		address := &libvirtxml.DomainAddress{PCI: &libvirtxml.DomainAddressPCI{
			Domain: ptr[uint](0), Bus: ptr[uint](0), Slot: ptr(slot), Function: ptr[uint](0),
		}}
		switch name {
		case DeviceDisk:
			d.Devices.Disks = append(d.Devices.Disks, diskDevice(l, address))
		case DeviceNet:
			d.Devices.Interfaces = append(d.Devices.Interfaces, libvirtxml.DomainInterface{
				MAC:    &libvirtxml.DomainInterfaceMAC{Address: guestMAC},
				Source: &libvirtxml.DomainInterfaceSource{User: &libvirtxml.DomainInterfaceSourceUser{}},
				Model:  &libvirtxml.DomainInterfaceModel{Type: "virtio"},
				Alias:  &libvirtxml.DomainAlias{Name: aliasPrefix + netID},
				ROM:    &libvirtxml.DomainROM{Enabled: "no"}, Address: address,
			})
		case DeviceRNG:
			d.Devices.RNGs = append(d.Devices.RNGs, libvirtxml.DomainRNG{
				Model:   "virtio",
				Backend: &libvirtxml.DomainRNGBackend{Random: &libvirtxml.DomainRNGBackendRandom{Device: "/dev/urandom"}},
				Address: address,
			})
		case DeviceBalloon:
			d.Devices.MemBalloon = &libvirtxml.DomainMemBalloon{Model: "virtio", AutoDeflate: "on", Address: address}
		default:
			panic("vmm: device " + name + " was not validated")
		}
	}
	text, err := d.Marshal()
	if err != nil {
		return "", fmt.Errorf("describe domain: %w", err)
	}
	return text, nil
}

func ptr[T any](v T) *T { return &v }

// coresFrom is the first machine type that makes cores of CPUs, where it made sockets before.
const coresFrom = "6.2"

// topology says what QEMU makes of a bare number of CPUs; libvirt would say otherwise.
func topology(m Machine) *libvirtxml.DomainCPUTopology {
	t := &libvirtxml.DomainCPUTopology{Sockets: m.CPUs, Dies: 1, Cores: 1, Threads: 1}
	if compareVersions(machineType.FindStringSubmatch(m.Type)[1], coresFrom) >= 0 {
		t.Sockets, t.Cores = t.Cores, t.Sockets
	}
	return t
}

func serialDevice(s domainSpec) libvirtxml.DomainSerial {
	source := &libvirtxml.DomainChardevSource{Pty: &libvirtxml.DomainChardevSourcePty{}}
	if s.console != "" {
		source = &libvirtxml.DomainChardevSource{UNIX: &libvirtxml.DomainChardevSourceUNIX{Mode: "bind", Path: s.console}}
	}
	return libvirtxml.DomainSerial{
		Source: source,
		Target: &libvirtxml.DomainSerialTarget{Type: "isa-serial", Port: ptr[uint](0), Model: &libvirtxml.DomainSerialTargetModel{Name: DeviceSerial}},
		Log:    &libvirtxml.DomainChardevLog{File: s.log, Append: "on"},
	}
}

// diskDevice describes the disk with all that is below it, so that libvirt need not look.
func diskDevice(l line, address *libvirtxml.DomainAddress) libvirtxml.DomainDisk {
	disk := libvirtxml.DomainDisk{
		Device: "disk",
		Driver: &libvirtxml.DomainDiskDriver{
			Name: "qemu", Type: l.diskFormat, Cache: "writeback", Discard: "unmap", DetectZeros: "off",
			ErrorPolicy: "stop", RErrorPolicy: "stop",
		},
		Source:  fileSource(l.disk),
		Target:  &libvirtxml.DomainDiskTarget{Dev: "vda", Bus: "virtio"},
		Alias:   &libvirtxml.DomainAlias{Name: aliasPrefix + diskID},
		Address: address,
	}
	if l.backing != "" {
		disk.BackingStore = &libvirtxml.DomainDiskBackingStore{
			Format: &libvirtxml.DomainDiskFormat{Type: "raw"}, Source: fileSource(l.backing),
			BackingStore: &libvirtxml.DomainDiskBackingStore{},
		}
	}
	return disk
}

func fileSource(path string) *libvirtxml.DomainDiskSource {
	return &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: path}}
}

// hostfwd returns the command of the human monitor that forwards a port.
func hostfwd(f Forward) string {
	addr := f.Addr
	if a, err := netip.ParseAddr(addr); err == nil && a.IsUnspecified() {
		addr = ""
	}
	return fmt.Sprintf("hostfwd_add host%s%s tcp:%s:%d-:%d", aliasPrefix, netID, addr, f.Host, f.Guest)
}
