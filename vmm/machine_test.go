package vmm

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func testMachine() Machine {
	return Machine{Accelerator: TCG, Type: "pc-q35-7.2", CPU: "qemu64", CPUs: 1, Memory: 256 << 20,
		Devices: DefaultDevices(), Append: "console=ttyS0 quiet", Kernel: true, Initrd: true, QEMU: "7.2"}
}

func TestMachineJSON(t *testing.T) {
	const golden = `{"accelerator":"tcg","type":"pc-q35-7.2","cpu":"qemu64","cpus":1,"memory":268435456,` +
		`"devices":["isa-serial","virtio-blk-pci","virtio-net-pci","virtio-balloon-pci"],"append":"console=ttyS0 quiet","kernel":true,"initrd":true,"qemu":"7.2"}`
	data, err := json.Marshal(testMachine())
	require.NoError(t, err)
	require.Equal(t, golden, string(data))
	m, err := ParseMachine(data)
	require.NoError(t, err)
	require.Equal(t, testMachine(), m)
	for name, bad := range map[string]string{
		"unknown field":  strings.Replace(golden, `"cpus"`, `"numa":1,"cpus"`, 1),
		"trailing bytes": golden + "{}",
		"truncated":      golden[:len(golden)-1],
		"no object":      "[]",
		"too long":       strings.Repeat(" ", maxMachineLen) + golden,
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseMachine([]byte(bad))
			require.Error(t, err)
		})
	}
}

func TestFingerprint(t *testing.T) {
	m := testMachine()
	const golden = "e25b828afe6b2811348cbd9299b1869d3a23bcad5eee273650d2624549b5ab0a"
	require.Equal(t, golden, m.Fingerprint())
	m.QEMU = "7.9.1"
	require.Equal(t, golden, m.Fingerprint(), "the minor version does not matter")
	m.Devices = []string{DeviceSerial, DeviceDisk, DeviceNet}
	require.Equal(t, "4b15eab5f0612e3fa28a7998fe7914459c7c8f9208366a8b130da5fbc65eafa9", m.Fingerprint(), "bases from before there was a balloon")
	for name, change := range map[string]func(m *Machine){
		"accelerator": func(m *Machine) { m.Accelerator = KVM },
		"type":        func(m *Machine) { m.Type = "pc-q35-7.1" },
		"cpu":         func(m *Machine) { m.CPU = "Nehalem" },
		"cpus":        func(m *Machine) { m.CPUs = 2 },
		"memory":      func(m *Machine) { m.Memory += MemoryUnit },
		"order":       func(m *Machine) { m.Devices = []string{DeviceSerial, DeviceNet, DeviceDisk} },
		"append":      func(m *Machine) { m.Append = "" },
		"kernel":      func(m *Machine) { m.Kernel = false },
		"initrd":      func(m *Machine) { m.Initrd = false },
		"major":       func(m *Machine) { m.QEMU = "8.0" },
	} {
		t.Run(name, func(t *testing.T) {
			m := testMachine()
			change(&m)
			require.NotEqual(t, golden, m.Fingerprint())
		})
	}
}

func TestValidateRefuses(t *testing.T) {
	for name, change := range map[string]func(m *Machine){
		"accelerator option": func(m *Machine) { m.Accelerator = "tcg,thread=single" },
		"type option":        func(m *Machine) { m.Type = "pc-q35-7.2,firmware=/etc/passwd" },
		"unversioned type":   func(m *Machine) { m.Type = "q35" },
		"cpu option":         func(m *Machine) { m.CPU = "qemu64,+avx" },
		"host cpu":           func(m *Machine) { m.CPU = "host" },
		"empty cpu":          func(m *Machine) { m.CPU = "" },
		"cpu as flag":        func(m *Machine) { m.CPU = "-help" },
		"no cpus":            func(m *Machine) { m.CPUs = 0 },
		"many cpus":          func(m *Machine) { m.CPUs = MaxCPUs + 1 },
		"odd memory":         func(m *Machine) { m.Memory++ },
		"negative memory":    func(m *Machine) { m.Memory = -MemoryUnit },
		"huge memory":        func(m *Machine) { m.Memory = MaxMemory + MemoryUnit },
		"device option":      func(m *Machine) { m.Devices[2] = "virtio-net-pci,mac=1" },
		"unknown device":     func(m *Machine) { m.Devices[2] = "ivshmem" },
		"device twice":       func(m *Machine) { m.Devices[2] = DeviceSerial },
		"no disk":            func(m *Machine) { m.Devices = []string{DeviceSerial} },
		"append newline":     func(m *Machine) { m.Append = "a\nb" },
		"append zero":        func(m *Machine) { m.Append = "a\x00b" },
		"append invalid":     func(m *Machine) { m.Append = "\xff" },
		"append long":        func(m *Machine) { m.Append = strings.Repeat("a", MaxAppend+1) },
		"append alone":       func(m *Machine) { m.Kernel, m.Initrd = false, false },
		"initrd alone":       func(m *Machine) { m.Kernel, m.Append = false, "" },
		"no qemu version":    func(m *Machine) { m.QEMU = "" },
	} {
		t.Run(name, func(t *testing.T) {
			m := testMachine()
			change(&m)
			require.ErrorContains(t, m.Validate(), "machine: ")
		})
	}
	require.NoError(t, testMachine().Validate())
}

func TestRunnable(t *testing.T) {
	host := Host{QEMU: "7.2.22", Accelerators: []string{TCG}, KVM: "use --accel tcg", Types: []string{"pc-q35-7.2"}, CPUs: []string{"qemu64"}}
	require.NoError(t, testMachine().Runnable(host))
	for _, tt := range []struct {
		field  string
		change func(m *Machine, h *Host)
		says   []string
	}{
		{"accelerator", func(m *Machine, h *Host) { m.Accelerator = KVM }, []string{"needs kvm", "has tcg", "--accel tcg"}},
		{"qemu", func(m *Machine, h *Host) { m.QEMU = "10.0" }, []string{"10.0 or newer", "7.2.22"}},
		{"type", func(m *Machine, h *Host) { m.Type = "pc-q35-9.1" }, []string{"pc-q35-9.1", "7.2.22"}},
		{"type", func(m *Machine, h *Host) { h.Types = []string{"pc-q35-7.1"} }, []string{"pc-q35-7.2"}},
		{"cpu", func(m *Machine, h *Host) { m.CPU = "Nehalem" }, []string{"Nehalem"}},
	} {
		t.Run(tt.field, func(t *testing.T) {
			m, h := testMachine(), host
			tt.change(&m, &h)
			err := m.Runnable(h)
			var mismatch *MismatchError
			require.True(t, errors.As(err, &mismatch), "%v", err)
			require.Equal(t, tt.field, mismatch.Field)
			for _, s := range tt.says {
				require.ErrorContains(t, err, s)
			}
		})
	}
}

func TestHostMachine(t *testing.T) {
	built := Host{QEMU: "10.0.2", Accelerators: []string{TCG, KVM}}
	for name, tt := range map[string]struct {
		state   kvmState
		byauto  string
		offered []string
	}{
		"vendor module":    {kvmState{vendor: true}, KVM, []string{TCG, KVM}},
		"other kvm":        {kvmState{}, TCG, []string{TCG, KVM}},
		"no permission":    {kvmState{open: errors.New("permission denied"), vendor: true}, TCG, []string{TCG}},
		"no module at all": {kvmState{open: errors.New("no such file")}, TCG, []string{TCG}},
	} {
		t.Run(name, func(t *testing.T) {
			h := withKVM(built, tt.state)
			require.Equal(t, tt.offered, h.Accelerators)
			m, err := h.Machine(Auto, 512<<20, 2)
			require.NoError(t, err)
			require.Equal(t, tt.byauto, m.Accelerator)
			require.Equal(t, "pc-q35-10.0", m.Type)
			require.Equal(t, tt.byauto == KVM, h.KVM == "")
		})
	}
	require.Equal(t, []string{TCG, KVM}, built.Accelerators, "not changed")
	_, err := withKVM(built, kvmState{open: errors.New("no")}).Machine(KVM, 512<<20, 1)
	require.ErrorContains(t, err, "--accel tcg")
}
