package vmm

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// same replaces in what QEMU says of its devices what may differ: names, and what comes of them.
var same = []struct {
	what *regexp.Regexp
	by   string
}{
	{regexp.MustCompile(`id "[^"]*"`), `id`},
	{regexp.MustCompile(`(drive|netdev|chardev) = "[^"]*"`), `$1`},
	{regexp.MustCompile(`write-cache = "(on|auto)"`), `write-cache`}, // auto: as the disk's, which is on
	{regexp.MustCompile(`0x[0-9a-f]{8,}`), `N`},                      // addresses given by the firmware, sizes
	{regexp.MustCompile(`mmio [0-9a-f]+`), `mmio`},
	{regexp.MustCompile(`(?m)^\s+\d+ KiB .*$`), ``}, // libvirt's own memory, a block without a name, which is nobody's
	{regexp.MustCompile(`"(qom-path|id)": "[^"]*"`), `$1`},
}

// machineOf returns what QEMU says of a VM's machine, as sorted lines: libvirt gives the serial
// port after the devices of the board.
func machineOf(t *testing.T, vm *VM) []string {
	t.Helper()
	var text strings.Builder
	require.NoError(t, vm.monitor(t.Context(), func(c *qmp) error {
		for _, command := range []string{"info qtree", "info pci", "info ramblock", "info roms", "info hotpluggable-cpus", "info numa"} {
			said, err := c.human(t.Context(), command)
			if err != nil {
				return err
			}
			text.WriteString(strings.ReplaceAll(said, "\r", ""))
		}
		return nil
	}))
	s := text.String()
	for _, r := range same {
		s = r.what.ReplaceAllString(s, r.by)
	}
	lines := strings.Split(s, "\n")
	slices.Sort(lines)
	return slices.DeleteFunc(lines, func(l string) bool { return strings.TrimSpace(l) == "" })
}

// The guest sees the same machine, whoever has started QEMU: every device that there is, with
// several CPUs, at the same addresses.
func TestSameMachine(t *testing.T) {
	direct, disk := newRig(t)
	through, _ := newLibvirtRig(t)
	var machines [2][]string
	for i, r := range []rig{direct, through} {
		r.machine.CPUs, r.machine.Kernel, r.machine.Initrd, r.machine.Append = 2, false, false, ""
		r.machine.Devices = []string{DeviceNet, DeviceRNG, DeviceSerial, DeviceDisk}
		p := newPair(t)
		copyTo(t, p.disk, disk)
		vm, err := r.q.Boot(t.Context(), newDir(t, "boot"), BootSpec{Machine: r.machine, Memory: p.memory, Disk: p.disk, DiskFormat: "raw"})
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, vm.Destroy(context.Background())) })
		require.NoError(t, pollUntil(t.Context(), func() (bool, error) { // until the firmware is done
			var said string
			err := vm.Monitor(t.Context(), "human-monitor-command", map[string]any{"command-line": "info pci"}, &said)
			return !strings.Contains(said, "0xffffffffffffffff"), err
		}))
		require.NoError(t, vm.Pause(t.Context()))
		machines[i] = machineOf(t, vm)
	}
	require.Greater(t, len(machines[0]), 300)
	require.Equal(t, machines[0], machines[1])
}

// A base that one driver has made is resumed by the other, and what that captures by the first.
func TestExchange(t *testing.T) {
	direct, disk := newRig(t)
	through, _ := newLibvirtRig(t)
	for _, tt := range []struct {
		name       string
		from, over rig
	}{{"qemu to libvirt", direct, through}, {"libvirt to qemu", through, direct}} {
		t.Run(tt.name, func(t *testing.T) {
			base := newPair(t)
			copyTo(t, base.disk, disk)
			vm := tt.from.boot(t, base)
			booted := ask(t, vm, "GET", "/")
			require.NoError(t, vm.SaveBase(t.Context(), base.state))
			vm = tt.over.resume(t, base)
			again := ask(t, vm, "GET", "/")
			require.Equal(t, booted.Token, again.Token)
			require.Equal(t, booted.Counter+1, again.Counter)
			ask(t, vm, "POST", "/write?mib=4&seed=1")
			res, err := vm.Capture(t.Context(), newDir(t, "out"))
			require.NoError(t, err)
			merged := merge(t, base, res)
			require.NoError(t, res.Release(t.Context()))
			require.NoError(t, vm.Destroy(t.Context()))
			vm = tt.from.resume(t, merged)
			ask(t, vm, "GET", "/verify?seed=1")
			require.NoError(t, vm.Reset(t.Context()))
			ask(t, vm, "GET", "/verify?seed=1")
		})
	}
}

// What goes wrong at a start through libvirt is named, and leaves nothing.
func TestLibvirtRefusals(t *testing.T) {
	r, disk := newLibvirtRig(t)
	base := newPair(t)
	copyTo(t, base.disk, disk)
	vm := r.boot(t, base)
	require.NoError(t, vm.SaveBase(t.Context(), base.state))
	spec := r.resumeSpec(t, base)
	spec.Name = "taken"
	vm, err := r.q.Resume(t.Context(), newDir(t, "resume"), spec, nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, vm.Destroy(context.Background())) })

	dir := newDir(t, "resume")
	_, err = r.q.Resume(t.Context(), dir, spec, nil)
	require.ErrorIs(t, err, ErrNameTaken)
	require.ErrorContains(t, err, "give another name")
	requireNothingLeft(t, r.q, dir)
	requireState(t, vm, Running)

	spec.Name = "a/b"
	_, err = r.q.Resume(t.Context(), newDir(t, "resume"), spec, nil)
	require.ErrorContains(t, err, "use letters")

	spec.Name, spec.Forwards = "", []Forward{vm.Forwards()[0]}
	dir = newDir(t, "resume")
	_, err = r.q.Resume(t.Context(), dir, spec, nil)
	require.ErrorContains(t, err, "is in use or not on this host: choose another with -p")
	requireNothingLeft(t, r.q, dir)

	spec.Forwards = nil
	n, err := statePrefix(base.state)
	require.NoError(t, err)
	spec.State = append(slices.Clone(spec.State[:n]), "\x04nonsense"...)
	dir = newDir(t, "resume")
	_, err = r.q.Resume(t.Context(), dir, spec, nil)
	require.ErrorContains(t, err, "start domain")
	requireNothingLeft(t, r.q, dir)
	ended, err := r.q.Adopt(t.Context(), dir)
	require.NoError(t, err)
	exit, err := ended.Wait(t.Context())
	require.NoError(t, err)
	require.Contains(t, exit.Reason, "QEMU was not started")

	// Memory that is not our file is seen.
	other := &VM{q: vm.q, dir: vm.dir, info: vm.info, procs: vm.procs}
	other.info.Memory, other.info.Inode = base.disk, 1
	require.ErrorContains(t, seeMemory(other, line{incoming: true}), "was not let run")
	require.ErrorContains(t, seeMemory(other, line{memory: base.disk}), "was not let run")
}

// How a domain ended is known afterwards, from libvirt's log.
func TestLibvirtEnds(t *testing.T) {
	r, disk := newLibvirtRig(t)
	base := newPair(t)
	copyTo(t, base.disk, disk)
	vm := r.boot(t, base)
	require.NoError(t, vm.SaveBase(t.Context(), base.state))

	vm = r.resume(t, base)
	requireNoHugePages(t, vm)
	require.NoError(t, vm.procs.QEMU.signal(unix.SIGBUS))
	exit, err := vm.Wait(t.Context())
	require.NoError(t, err)
	require.Contains(t, exit.Reason, "libvirt says crashed")
	require.False(t, exit.At.IsZero())
	status, err := vm.Status(t.Context())
	require.NoError(t, err)
	require.Equal(t, Status{State: Ended, Reason: exit.Reason}, status)

	vm = r.resume(t, base)
	d := vm.driver().(*domain)
	require.NoError(t, d.ask(t.Context(), func(lib library) error { return lib.destroy(d.UUID, false) }))
	exit, err = vm.Wait(t.Context())
	require.NoError(t, err)
	require.Equal(t, "the domain was destroyed through libvirt, by somebody else", exit.Reason)
	require.ErrorIs(t, vm.Pause(t.Context()), ErrEnded)

	vm = r.resume(t, base)
	require.NoError(t, vm.Quit(t.Context()))
	exit, err = vm.Wait(t.Context())
	require.NoError(t, err)
	require.Equal(t, "QEMU ended on request (quit)", exit.Reason)

	// The starter died before it had looked at the memory and written down the process: whoever
	// finds the domain ends it, and does not let it run.
	vm = r.resume(t, base)
	require.NoError(t, os.Remove(filepath.Join(vm.Dir(), processFile)))
	adopted, err := r.q.Adopt(t.Context(), vm.Dir())
	require.NoError(t, err)
	status, err = adopted.Status(t.Context())
	require.NoError(t, err)
	require.Equal(t, Status{State: Ended, Reason: "QEMU was not started: the process that was starting it was killed"}, status)
	require.NoError(t, vm.procs.QEMU.wait(t.Context()))
	require.NoError(t, adopted.Destroy(t.Context()))
}
