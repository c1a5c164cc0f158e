package vmm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Limits of a Machine. MemoryUnit is the unit of Memory in bytes.
const (
	MemoryUnit    = 1 << 20
	MinMemory     = 16 << 20
	MaxMemory     = 1 << 40
	MaxCPUs       = 64
	MaxAppend     = 2047 // Linux on x86 takes 2048 bytes with the terminating zero
	maxMachineLen = 64 << 10
)

// The accelerators of a Machine, and the word that lets Host.Machine choose.
const (
	TCG  = "tcg"
	KVM  = "kvm"
	Auto = "auto"
)

// Machine is the configuration of a VM that must be equal when it is captured and when it
// is resumed: QEMU itself compares little of it, and a guest resumed on another machine
// dies or is subtly wrong. Its JSON form is canonical and is kept in a base's manifest.
type Machine struct {
	// Accelerator is "tcg" or "kvm".
	Accelerator string `json:"accelerator"`
	// Type is a versioned machine type, "pc-q35-7.2".
	Type string `json:"type"`
	// CPU is a named CPU model, the same on every host: not "host", not "max".
	CPU string `json:"cpu"`
	// CPUs is the number of virtual CPUs.
	CPUs int `json:"cpus"`
	// Memory is the size of RAM in bytes, a multiple of MemoryUnit.
	Memory int64 `json:"memory"`
	// Devices lists the devices in the order in which they are plugged; see Devices.
	Devices []string `json:"devices"`
	// Append is the kernel's command line; only with Kernel.
	Append string `json:"append,omitempty"`
	// Kernel and Initrd say that the VM was started from these files: they must be given
	// again on resume, or a reset of the guest hangs.
	Kernel bool `json:"kernel,omitempty"`
	Initrd bool `json:"initrd,omitempty"`
	// QEMU is the version that captured the VM, "7.2" or "7.2.22".
	QEMU string `json:"qemu"`
}

// The devices a Machine may have, each at most once.
const (
	DeviceSerial  = "isa-serial"
	DeviceDisk    = "virtio-blk-pci"
	DeviceNet     = "virtio-net-pci"
	DeviceRNG     = "virtio-rng-pci"
	DeviceBalloon = "virtio-balloon-pci"
)

var (
	machineType = regexp.MustCompile(`^pc-q35-([0-9]{1,2}\.[0-9]{1,2})$`)
	cpuModel    = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$`)
	qemuVersion = regexp.MustCompile(`^[0-9]{1,3}\.[0-9]{1,3}(\.[0-9]{1,3})?$`)
)

// DefaultDevices returns the device model of a new VM: serial console, disk, network, and the
// balloon by which its free memory is found.
func DefaultDevices() []string {
	return []string{DeviceSerial, DeviceDisk, DeviceNet, DeviceBalloon}
}

// ParseMachine parses the JSON form of a Machine strictly (unknown fields and trailing
// bytes are refused) and validates it.
func ParseMachine(data []byte) (Machine, error) {
	var m Machine
	if len(data) > maxMachineLen {
		return m, fmt.Errorf("parse machine: %d bytes, at most %d are allowed", len(data), maxMachineLen)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return Machine{}, fmt.Errorf("parse machine: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Machine{}, errors.New("parse machine: bytes after the end of the JSON value")
	}
	if err := m.Validate(); err != nil {
		return Machine{}, err
	}
	return m, nil
}

// Validate checks every field against its limits and the lists of known names. A valid
// Machine cannot put an option of its own into QEMU's command line.
func (m Machine) Validate() error {
	switch {
	case m.Accelerator != TCG && m.Accelerator != KVM:
		return fmt.Errorf("machine: accelerator %.40q is unknown: use tcg or kvm", m.Accelerator)
	case !machineType.MatchString(m.Type):
		return fmt.Errorf("machine: type %.40q is unknown: use a versioned pc-q35 type, for example pc-q35-7.2", m.Type)
	case m.CPU == "host" || m.CPU == "max":
		return fmt.Errorf("machine: cpu %q differs from host to host, so the VM could not be resumed elsewhere: use a named model, for example qemu64", m.CPU)
	case !cpuModel.MatchString(m.CPU):
		return fmt.Errorf("machine: cpu %.40q is not the name of a model", m.CPU)
	case m.CPUs < 1 || m.CPUs > MaxCPUs:
		return fmt.Errorf("machine: cpus %d: use 1 to %d", m.CPUs, MaxCPUs)
	case m.Memory < MinMemory || m.Memory > MaxMemory || m.Memory%MemoryUnit != 0:
		return fmt.Errorf("machine: memory %d bytes: use a multiple of 1 MiB from 16 MiB to 1 TiB", m.Memory)
	case !qemuVersion.MatchString(m.QEMU):
		return fmt.Errorf("machine: qemu version %.40q: want for example 7.2", m.QEMU)
	case !m.Kernel && m.Initrd:
		return errors.New("machine: an initrd needs a kernel")
	case !m.Kernel && m.Append != "":
		return errors.New("machine: a kernel command line needs a kernel")
	}
	if err := validateDevices(m.Devices); err != nil {
		return err
	}
	return validateAppend(m.Append)
}

func validateDevices(devices []string) error {
	seen := make(map[string]bool)
	for _, d := range devices {
		switch d {
		case DeviceSerial, DeviceDisk, DeviceNet, DeviceRNG, DeviceBalloon:
		default:
			return fmt.Errorf("machine: device %.40q is unknown", d)
		}
		if seen[d] {
			return fmt.Errorf("machine: device %q is listed twice", d)
		}
		seen[d] = true
	}
	if !seen[DeviceDisk] {
		return fmt.Errorf("machine: devices lack %s: a VM has one disk", DeviceDisk)
	}
	return nil
}

func validateAppend(s string) error {
	if len(s) > MaxAppend {
		return fmt.Errorf("machine: kernel command line of %d bytes: at most %d are taken by the kernel", len(s), MaxAppend)
	}
	if !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) {
		return errors.New("machine: kernel command line holds a control character or invalid UTF-8")
	}
	return nil
}

// has reports whether the machine has the device.
func (m Machine) has(device string) bool { return slices.Contains(m.Devices, device) }

// Fingerprint returns 64 hexadecimal digits: the SHA-256 of the machine's JSON form with
// only the major version of QEMU. Two machines with equal fingerprints can exchange device
// states.
func (m Machine) Fingerprint() string {
	m.QEMU, _, _ = strings.Cut(m.QEMU, ".")
	data, err := json.Marshal(m)
	if err != nil { // strings, integers and booleans only
		panic(err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// MismatchError says which field of a Machine a host cannot satisfy.
type MismatchError struct {
	Field  string // "accelerator", "type", "cpu", "qemu"
	Need   string // what the machine needs
	Have   string // what the host has
	Remedy string
}

// Error names the field, both values and the remedy.
func (e *MismatchError) Error() string {
	return fmt.Sprintf("machine %s: the VM needs %s, this host has %s: %s", e.Field, e.Need, e.Have, e.Remedy)
}

// Runnable reports whether the host can run the machine, before any process is started. It
// returns a *MismatchError for the first field that the host cannot satisfy.
func (m Machine) Runnable(h Host) error {
	if err := m.Validate(); err != nil {
		return err
	}
	if !slices.Contains(h.Accelerators, m.Accelerator) {
		e := &MismatchError{Field: "accelerator", Need: m.Accelerator, Have: strings.Join(h.Accelerators, ", "),
			Remedy: "use a base captured with an accelerator that both hosts have"}
		if m.Accelerator == KVM && h.KVM != "" {
			e.Remedy = h.KVM
		}
		return e
	}
	upgrade := "install a newer QEMU"
	if compareVersions(h.QEMU, m.QEMU) < 0 {
		return &MismatchError{Field: "qemu", Need: "QEMU " + m.QEMU + " or newer", Have: h.QEMU, Remedy: upgrade}
	}
	if v := machineType.FindStringSubmatch(m.Type)[1]; compareVersions(h.QEMU, v) < 0 {
		return &MismatchError{Field: "type", Need: m.Type, Have: "QEMU " + h.QEMU, Remedy: upgrade}
	}
	if len(h.Types) > 0 && !slices.Contains(h.Types, m.Type) {
		return &MismatchError{Field: "type", Need: m.Type, Have: "QEMU " + h.QEMU + " without it", Remedy: "install a QEMU that has this machine type"}
	}
	if len(h.CPUs) > 0 && !slices.Contains(h.CPUs, m.CPU) {
		return &MismatchError{Field: "cpu", Need: m.CPU, Have: "QEMU " + h.QEMU + " without it", Remedy: "install a QEMU that has this CPU model"}
	}
	return nil
}

// compareVersions compares major and minor numbers of two dotted versions; what follows
// them does not change the format of the state.
func compareVersions(a, b string) int {
	am, an := versionNumbers(a)
	bm, bn := versionNumbers(b)
	if am != bm {
		return am - bm
	}
	return an - bn
}

func versionNumbers(v string) (major, minor int) {
	parts := strings.SplitN(v, ".", 3)
	major, _ = strconv.Atoi(parts[0])
	if len(parts) > 1 {
		minor, _ = strconv.Atoi(parts[1])
	}
	return major, minor
}
