package vmm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A start that was given up and succeeds after all leaves no domain.
func TestStartGivenUp(t *testing.T) {
	fake := &fakeLibrary{}
	v := fakeLibvirt(t, fake)
	d := &domain{domainInfo{URI: uri(v.URI), UUID: "u"}, &v.conns}
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan struct{})
	err := d.begin(ctx, func(library) error {
		cancel()
		<-left
		fake.mu.Lock()
		defer fake.mu.Unlock()
		fake.domains = append(fake.domains, "u")
		return nil
	})
	require.ErrorIs(t, err, context.Canceled)
	close(left)
	require.NoError(t, v.Close())
	require.Empty(t, fake.domains)
}

// Libvirt goes away while a capture holds the VM: it runs again when it is next looked at.
func TestLibvirtGoneWhileStopped(t *testing.T) {
	guest := Running
	answer := func(text string) (string, error) {
		switch text {
		case `{"execute":"stop"}`:
			guest = Paused
		case `{"execute":"cont"}`:
			guest = Running
		}
		return `{"return":{"status":"` + guest + `"}}`, nil
	}
	fake := &fakeLibrary{answer: answer}
	v := fakeLibvirt(t, fake)
	self, err := identify(os.Getpid())
	require.NoError(t, err)
	vm := &VM{q: v.QEMU, dir: t.TempDir(), procs: processes{QEMU: self}}
	vm.info.Domain = &domainInfo{URI: uri(v.URI), UUID: "u"}
	err = vm.monitor(t.Context(), func(c *qmp) error {
		_, err := vm.whileStopped(t.Context(), c, func() error {
			fake.fail()
			return errors.New("the capture fails")
		})
		return err
	})
	require.ErrorContains(t, err, "the capture fails")
	require.ErrorContains(t, err, "the VM is stopped until it is looked at again")
	require.Equal(t, Paused, guest)
	vm.info.Version, vm.info.Machine = 2, testMachine()
	require.NoError(t, errors.Join(writeJSON(vm.dir, vmFile, vm.info), writeJSON(vm.dir, processFile, vm.procs)))
	adopted, err := v.Adopt(t.Context(), vm.dir) // so that it can be listed, and ended
	require.NoError(t, err)
	v.conns.dial = func(uri) (library, error) { return &fakeLibrary{answer: answer}, nil }
	require.NoError(t, adopted.recoverCapture(t.Context()))
	require.Equal(t, Running, guest)
	require.NoFileExists(t, filepath.Join(vm.dir, stoppedFile))
}

// A booted VM's memory is its file by whichever path, not another's whose path begins so.
func TestSeeSharedMemory(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "ram")
	require.NoError(t, createMemory(file, pageSize))
	require.NoError(t, createMemory(file+"2", pageSize))
	self, err := identify(os.Getpid())
	require.NoError(t, err)
	vm := &VM{procs: processes{QEMU: self}}
	link := filepath.Join(t.TempDir(), "link")
	require.NoError(t, os.Symlink(dir, link))
	other, err := os.OpenFile(file+"2", os.O_RDWR, 0)
	require.NoError(t, err)
	defer other.Close()
	p, err := unix.Mmap(int(other.Fd()), 0, pageSize, unix.PROT_READ, unix.MAP_SHARED)
	require.NoError(t, err)
	defer unix.Munmap(p)
	require.ErrorContains(t, seeMemory(vm, line{memory: file}), "was not let run")
	require.NoError(t, seeMemory(vm, line{memory: file + "2"}))
	require.NoError(t, seeMemory(vm, line{memory: filepath.Join(link, "ram2")}))
}
