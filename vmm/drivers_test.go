package vmm

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"cloudlet/integration/need"
)

// hypervisor is what the tests of real VMs use of both drivers.
type hypervisor interface {
	Probe(ctx context.Context) (Host, error)
	Boot(ctx context.Context, dir string, s BootSpec) (*VM, error)
	Resume(ctx context.Context, dir string, s ResumeSpec, on func(event string)) (*VM, error)
	Adopt(ctx context.Context, dir string) (*VM, error)
	DestroyIn(ctx context.Context, dir string) error
	createLayer(ctx context.Context, path, backing, format string, size int64) error
}

// onDrivers runs a test on a QEMU that we start and on one that libvirt starts.
func onDrivers(t *testing.T, test func(t *testing.T, newRig func(*testing.T) (rig, string))) {
	t.Run("qemu", func(t *testing.T) { test(t, newRig) })
	t.Run("libvirt", func(t *testing.T) {
		test(t, func(t *testing.T) (rig, string) { return newLibvirtRig(t) })
	})
}

// newLibvirtRig returns a rig whose VMs are domains of an embedded libvirt.
func newLibvirtRig(t *testing.T) (rig, string) {
	t.Helper()
	r, disk := newRig(t)
	v := embedded.open(t)
	_, err := v.Probe(t.Context())
	need.No(t, err, ErrNoLibvirt)
	r.q = v
	return r, disk
}

// embedded is libvirt's embedded driver, of which a process has one.
var embedded embeddedLibvirt

type embeddedLibvirt struct {
	mu   sync.Mutex
	root string
	v    *Libvirt
}

const embeddedConf = `user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
`

func (e *embeddedLibvirt) open(t *testing.T) *Libvirt {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.v != nil {
		return e.v
	}
	root, err := os.MkdirTemp("", "vmm") // short: there are sockets in it
	require.NoError(t, err)
	require.NoError(t, os.Chmod(root, 0o711))
	require.NoError(t, os.Mkdir(filepath.Join(root, "etc"), 0o755))
	require.NoError(t, os.WriteFile(filepath.Join(root, "etc/qemu.conf"), []byte(embeddedConf), 0o600))
	e.root, e.v = root, &Libvirt{QEMU: testQEMU(t, ""), URI: "qemu:///embed?root=" + root, Dir: filepath.Join(root, "cloudlet")}
	return e.v
}

func (e *embeddedLibvirt) close() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.v == nil {
		return nil
	}
	if err := e.v.Close(); err != nil {
		return err
	}
	return os.RemoveAll(e.root)
}
