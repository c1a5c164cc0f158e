package vmm

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestArgsGolden(t *testing.T) {
	l := line{machine: testMachine(), memory: "/m/memory", shared: true, disk: "/m/disk", diskFormat: "raw",
		kernel: "/m/k", initrd: "/m/i", forwards: []Forward{{"127.0.0.1", 8080, 80}, {"0.0.0.0", 0, 22}}}
	common := []string{
		"-no-user-config -nodefaults -display none -accel tcg -machine pc-q35-7.2,memory-backend=mem -cpu qemu64 -smp 1 -m 256M",
		"-object memory-backend-file,id=mem,size=256M,mem-path=/m/memory,share=on",
		"-qmp unix:qmp.sock,server=on,wait=off",
		"-chardev socket,id=serial0,path=serial.sock,server=on,wait=off,logfile=serial.log,logappend=on -serial chardev:serial0",
		"-drive if=none,id=disk0,file=/m/disk,format=raw,cache=writeback,discard=unmap,detect-zeroes=off",
		"-device virtio-blk-pci,drive=disk0,rerror=stop,werror=stop",
		"-netdev user,id=net0,hostfwd=tcp:127.0.0.1:8080-:80,hostfwd=tcp:0.0.0.0:0-:22 -device virtio-net-pci,netdev=net0,romfile=",
		"-device virtio-balloon-pci,id=balloon0,deflate-on-oom=on",
		"-kernel /m/k -initrd /m/i -append console=ttyS0 quiet",
	}
	golden := strings.Join(common, " ")
	require.Equal(t, golden, strings.Join(l.args(), " "))
	l.shared, l.incoming = false, true
	golden = strings.Replace(golden, "share=on", "share=off", 1) + " -S -incoming defer"
	require.Equal(t, golden, strings.Join(l.args(), " "))
}

// A value that looks like options stays one value.
func TestArgsInjection(t *testing.T) {
	l := line{machine: testMachine(), memory: "/m/a,share=on,x=", disk: "/m/d,format=raw", diskFormat: "qcow2",
		kernel: "/m/-monitor", initrd: "/m/i,x"}
	l.machine.Append = "a,b -monitor stdio"
	args := l.args()
	require.Contains(t, args, "memory-backend-file,id=mem,size=256M,mem-path=/m/a,,share=on,,x=,share=off")
	require.Contains(t, args, "if=none,id=disk0,file=/m/d,,format=raw,format=qcow2,cache=writeback,discard=unmap,detect-zeroes=off")
	require.Contains(t, args, "a,b -monitor stdio")
	require.NotContains(t, args, "-monitor")
}

func TestCheckForwards(t *testing.T) {
	got, err := checkForwards(testMachine(), []Forward{{Guest: 80}, {Guest: 81}, {Addr: "0.0.0.0", Host: 99, Guest: 80}})
	require.NoError(t, err)
	require.Equal(t, []Forward{{"127.0.0.1", 0, 80}, {"127.0.0.1", 0, 81}, {"0.0.0.0", 99, 80}}, got)
	for name, bad := range map[string][]Forward{
		"name":      {{Addr: "localhost", Guest: 80}},
		"injection": {{Addr: "127.0.0.1:1-:2,restrict=off", Guest: 80}},
		"ipv6":      {{Addr: "::1", Guest: 80}},
		"no guest":  {{Host: 80}},
		"high":      {{Host: 65536, Guest: 1}},
		"negative":  {{Host: -1, Guest: 1}},
		"twice":     {{Host: 80, Guest: 1}, {Host: 80, Guest: 2}},
		"many":      make([]Forward, maxForwards+1),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := checkForwards(testMachine(), bad)
			require.ErrorContains(t, err, "forward")
		})
	}
	m := testMachine()
	m.Devices = []string{DeviceDisk}
	_, err = checkForwards(m, []Forward{{Guest: 80}})
	require.ErrorContains(t, err, "no network device")
}

func TestBindPorts(t *testing.T) {
	const text = "Hub -1 (net0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n" +
		"  TCP[HOST_FORWARD]  14       127.0.0.1 35334       10.0.2.15    80     0     0\r\n" +
		"  TCP[HOST_FORWARD]  13       127.0.0.1 35333       10.0.2.15    80     0     0\r\n" +
		"  TCP[HOST_FORWARD]  12               * 35335       10.0.2.15    22     0     0\r\n"
	fs := []Forward{{"127.0.0.1", 0, 80}, {"127.0.0.1", 0, 80}, {"0.0.0.0", 0, 22}, {"127.0.0.1", 8080, 1}}
	require.NoError(t, bindPorts(fs, text))
	require.Equal(t, []Forward{{"127.0.0.1", 35333, 80}, {"127.0.0.1", 35334, 80}, {"0.0.0.0", 35335, 22}, {"127.0.0.1", 8080, 1}}, fs)
	require.ErrorContains(t, bindPorts([]Forward{{"127.0.0.1", 0, 81}}, text), "forwarded to 81")
}
