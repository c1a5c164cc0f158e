package vmm

import (
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "write the golden files")

func TestDomainXML(t *testing.T) {
	spec := domainSpec{name: "cloudlet-a", uuid: "01020304-0506-4708-890a-0b0c0d0e0f10", emulator: "/s/emulator/k/cloudlet-emulator", log: "/s/vm/serial.log"}
	resumed := line{
		machine: testMachine(), memory: "/m/memory", disk: "/s/vm/disk.0.qcow2", diskFormat: "qcow2", backing: "/m/disk",
		kernel: "/b/kernel", initrd: "/b/initrd", incoming: true,
	}
	resumed.machine.Kernel, resumed.machine.Initrd, resumed.machine.Append = true, true, `console=ttyS0 a="<&>"`
	booted := line{machine: testMachine(), memory: `/m/a,share=on'"<x>`, shared: true, disk: "/d/disk & more", diskFormat: "raw"}
	booted.machine.Accelerator, booted.machine.CPU, booted.machine.CPUs = KVM, "Nehalem", 3
	booted.machine.Devices = []string{DeviceRNG, DeviceDisk, DeviceSerial, DeviceNet}
	old := booted
	old.machine.Type = "pc-q35-6.1"
	other := spec
	other.label, other.account, other.console, other.title = true, Account{UID: 107, GID: 108}, "/s/vm/serial.sock", "web"
	for _, tt := range []struct {
		name string
		line line
		spec domainSpec
	}{
		{"resumed", resumed, spec},
		{"resumed-label", resumed, other},
		{"booted", booted, spec},
		{"booted-sockets", old, spec},
	} {
		t.Run(tt.name, func(t *testing.T) {
			xml, err := domainXML(tt.line, tt.spec)
			require.NoError(t, err)
			path := filepath.Join("testdata", "domain-"+tt.name+".xml")
			if *update {
				require.NoError(t, os.WriteFile(path, []byte(xml+"\n"), 0o644))
			}
			want, err := os.ReadFile(path)
			require.NoError(t, err)
			require.Equal(t, string(want), xml+"\n")
		})
	}
}

func TestHostFwd(t *testing.T) {
	for _, tt := range []struct {
		name string
		f    Forward
		want string
	}{
		{"one address", Forward{Addr: "127.0.0.1", Host: 80, Guest: 8080}, "hostfwd_add hostua-net0 tcp:127.0.0.1:80-:8080"},
		{"all addresses", Forward{Addr: "0.0.0.0", Guest: 22}, "hostfwd_add hostua-net0 tcp::0-:22"},
	} {
		require.Equal(t, tt.want, hostfwd(tt.f), tt.name)
	}
}
