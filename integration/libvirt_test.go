package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/integration/cloudlets"
	"cloudlet/integration/guest"
	"cloudlet/integration/need"

	"github.com/stretchr/testify/require"
)

// onLibvirt are the tests that also run where libvirt runs the VMs, as another user.
const onLibvirt = `^(TestLibvirt|TestMainJob|TestSecondInstance|TestReset|TestDaemon|TestProfile|TestKillMount)$`

// TestLibvirt runs tests on a libvirt that is configured as on a new host: in a mount namespace,
// so that neither the machine's own libvirt nor its files are touched.
func TestLibvirt(t *testing.T) {
	needVMs(t)
	if onLibvirtHost() {
		testOnLibvirtHost(t)
		return
	}
	need.Root(t, "start a libvirt for the system")
	needLibvirt(t)
	bin, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "--propagation", "slave", bin,
		"-test.run", onLibvirt, "-test.v", "-test.timeout", "15m", "-guest", *guestDir)
	cmd.Env = append(os.Environ(), hostEnv+"=1", "CLOUDLET_VMM=libvirt")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	t.Logf("%s", out)
	require.Equal(t, strings.Count(onLibvirt, "|")+1, len(regexp.MustCompile(`(?m)^--- PASS`).FindAll(out, -1)))
}

// needLibvirt skips a test where libvirt is not installed, or the program is built without it.
func needLibvirt(t *testing.T) {
	t.Helper()
	for _, program := range []string{"libvirtd", "virtlogd", "virsh", "unshare"} {
		if _, err := exec.LookPath(program); err != nil {
			need.Skip(t, err.Error()+": run make deps")
		}
	}
	sharedOnce.Do(setUp)
	require.NoError(t, shared.err)
	out, _ := exec.Command(shared.bin, "--state", t.TempDir(), "--vmm", "libvirt:qemu:///embed?root="+t.TempDir(), "doctor").CombinedOutput()
	if strings.Contains(string(out), "built without libvirt") {
		need.Skip(t, "the program is built without libvirt: use make test, or GOFLAGS=-tags=libvirt_dlopen")
	}
}

func testOnLibvirtHost(t *testing.T) {
	for _, tt := range []struct {
		name string
		test func(*testing.T)
	}{
		{"virsh", libvirtSeen}, {"touches", libvirtTouches}, {"restart", libvirtRestart}, {"restart in a capture", libvirtRestartInCapture}, {"unreachable", libvirtUnreachable},
		{"disk error", libvirtDiskError}, {"absent", libvirtAbsent}, {"session", libvirtSession},
	} {
		t.Run(tt.name, tt.test)
	}
}

// virsh runs virsh and returns what it prints.
func virsh(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("virsh", append([]string{"-c", "qemu:///system"}, args...)...).CombinedOutput()
	require.NoError(t, err, "virsh %v: %s", args, out)
	return string(out)
}

// varying are the parts of virsh's output that differ from run to run.
var varying = []struct {
	what *regexp.Regexp
	by   string
}{
	{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f-]{27}`), "UUID"},
	{regexp.MustCompile(`(?m)^(Id:\s+|CPU time:\s+| )\d+(\.\d+s)?`), "${1}N"},
	{regexp.MustCompile(`/\S+/instances/`), "STATE/instances/"},
	{regexp.MustCompile(`-{5,}`), "---"},
	{regexp.MustCompile(`[ \t]+`), " "},
}

func normal(s string) string {
	for _, v := range varying {
		s = v.what.ReplaceAllString(s, v.by)
	}
	return strings.TrimSpace(strings.ReplaceAll(s, " \n", "\n"))
}

// libvirtSeen: virsh shows what the README says it shows.
func libvirtSeen(t *testing.T) {
	l := newLab(t)
	in := l.start(l.base, "--name", "web")
	text, err := os.ReadFile("../README.md")
	require.NoError(t, err)
	block := regexp.MustCompile("(?s)```console\n(\\$ virsh.*?)```").FindSubmatch(text)
	require.NotNil(t, block, "the README shows no virsh")
	shown := regexp.MustCompile(`cloudlet-([0-9a-f]{12})`).FindStringSubmatch(string(block[1]))
	require.NotNil(t, shown)
	said := strings.ReplaceAll(string(block[1]), shown[1], in.ID)
	commands := strings.Split(strings.TrimPrefix(said, "$ "), "\n$ ")
	require.GreaterOrEqual(t, len(commands), 4)
	for _, c := range commands {
		line, want, _ := strings.Cut(c, "\n")
		args := strings.Fields(line)
		require.Equal(t, "virsh", args[0])
		require.Equal(t, normal(want), normal(virsh(t, args[1:]...)), line)
	}
	// What is done through libvirt is seen here, and the other way round.
	name := "cloudlet-" + in.ID
	virsh(t, "suspend", name)
	require.Equal(t, api.Paused, l.inspect(in.ID).State)
	virsh(t, "resume", name)
	require.Equal(t, api.Running, l.inspect(in.ID).State)
	l.ok("pause", in.ID)
	require.Contains(t, virsh(t, "domstate", name), "paused")
	l.ok("continue", in.ID)
	require.Contains(t, virsh(t, "domstate", name), "running")
	ask(t, in, "GET", "/")
	// Saved images of libvirt's own, in the middle of rounds: nothing of ours is in its way.
	l.capture(in.ID)
	require.Contains(t, virsh(t, "domblklist", name), "disk.0.qcow2")
	virsh(t, "destroy", name)
	require.Equal(t, api.Stopped, l.inspect(in.ID).State)
	require.Equal(t, "the domain was destroyed through libvirt, by somebody else", l.inspect(in.ID).Reason)
}

// libvirtTouches: the filter against huge pages is there. Without it the kernel reads 4 MiB
// around each first touch, so that the guest's memory is read many times over.
func libvirtTouches(t *testing.T) {
	read := map[string]int64{}
	for _, vmm := range []string{"qemu", "libvirt"} {
		l := newLab(t)
		in := l.start(l.base, "--vmm", vmm, "--prefetch", "none")
		read[vmm] = l.inspect(in.ID).Mount.MemoryBytes
		smaps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps", in.PID))
		require.NoError(t, err)
		require.NotRegexp(t, `(?m)^VmFlags:.* hg\b`, string(smaps))
	}
	t.Logf("bytes of memory read before the first response: %v", read)
	require.Less(t, read["libvirt"], read["qemu"]*3/2+1<<20)
}

// libvirtRestart: libvirtd ends, in order and killed, under a daemon with an instance.
func libvirtRestart(t *testing.T) {
	l := newLab(t)
	d := l.serve()
	in := l.start(l.base)
	for _, sig := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		require.NoError(t, theLibvirt.stop(sig))
		ask(t, in, "GET", "/")
		now := l.inspect(in.ID)
		require.Equal(t, api.Running, now.State)
		require.Contains(t, now.Reason, "libvirt")
		l.fails(6, "libvirt", "run", l.base)
		require.NoError(t, theLibvirt.start())
		eventually(t, "the daemon attaches again", func() bool { return l.inspect(in.ID).Reason == "" })
		require.Equal(t, api.Running, l.inspect(in.ID).State)
		l.ok("pause", in.ID)
		l.ok("continue", in.ID)
		ask(t, in, "GET", "/")
		o := l.capture(in.ID)
		require.NotEmpty(t, o.ID)
	}
	// An end that nobody asks for is seen by its event.
	virsh(t, "destroy", "cloudlet-"+in.ID)
	record := filepath.Join(l.state, "instances", in.ID, "record.json")
	eventually(t, "the event is looked after", func() bool {
		var r struct{ State, Reason string }
		text, err := os.ReadFile(record)
		return err == nil && json.Unmarshal(text, &r) == nil && r.State == "stopped" && strings.Contains(r.Reason, "by somebody else")
	})
	// Crashed: QEMU is killed behind libvirt's back, without which it can be stopped, too.
	in = l.start(l.base)
	require.NoError(t, syscall.Kill(in.PID, syscall.SIGKILL))
	eventually(t, "the crash is seen", func() bool { return l.inspect(in.ID).State == api.Stopped })
	require.Contains(t, l.inspect(in.ID).Reason, "crashed")
	in = l.start(l.base)
	require.NoError(t, theLibvirt.stop(syscall.SIGKILL))
	l.ok("stop", in.ID)
	require.NoError(t, theLibvirt.start())
	eventually(t, "libvirt knows no domain of ours", func() bool { return !strings.Contains(virsh(t, "list", "--name"), "cloudlet-"+in.ID) })
	d.end(syscall.SIGTERM)
}

// libvirtRestartInCapture: libvirtd is killed while a capture has stopped the guest, which runs
// again once libvirtd is back.
func libvirtRestartInCapture(t *testing.T) {
	l := newLab(t)
	d := l.serve()
	in := l.start(l.base)
	ask(t, in, "POST", "/write?mib=48&seed=1")                                 // something to copy
	devices := filepath.Join(l.state, "instances", in.ID, "vm", "capture.xen") // written while it is stopped
	captured := make(chan result, 1)
	go func() { captured <- l.run("overlay", "create", in.ID) }()
	for stopped := false; !stopped; {
		select {
		case r := <-captured:
			require.Fail(t, "the capture ended before it was seen", "%s", r.stderr)
		default:
			time.Sleep(time.Millisecond) // there is no event of it
			_, err := os.Stat(devices)
			stopped = err == nil
		}
	}
	require.NoError(t, theLibvirt.stop(syscall.SIGKILL))
	r := <-captured
	require.NotZero(t, r.code)
	require.Contains(t, r.stderr, "libvirt")
	require.Contains(t, l.inspect(in.ID).Reason, "libvirt")
	require.NoError(t, theLibvirt.start())
	eventually(t, "the guest runs again", func() bool { return l.inspect(in.ID).State == api.Running })
	ask(t, in, "GET", "/verify?seed=1")
	require.NotEmpty(t, l.capture(in.ID).ID)
	ask(t, in, "GET", "/verify?seed=1")
	l.ok("stop", in.ID)
	d.end(syscall.SIGTERM)
}

// libvirtUnreachable: what libvirt's user cannot reach is named before anything is started.
func libvirtUnreachable(t *testing.T) {
	l := newLab(t)
	parent := filepath.Dir(l.state)
	require.NoError(t, os.Chmod(parent, 0o700))
	defer func() { require.NoError(t, os.Chmod(parent, 0o711)) }()
	r := l.run("run", l.base)
	require.NotZero(t, r.code)
	require.Contains(t, r.stderr, "libvirt-qemu")
	require.Empty(t, l.leftovers())
	require.NotContains(t, virsh(t, "list", "--all", "--name"), "cloudlet")
}

// libvirtDiskError: a VM whose disk has no room is paused, and the daemon is told.
func libvirtDiskError(t *testing.T) {
	l := newLab(t)
	instances := filepath.Join(l.state, "instances")
	require.NoError(t, os.MkdirAll(instances, 0o700))
	require.NoError(t, syscall.Mount("tmpfs", instances, "tmpfs", 0, "size=24m,mode=700"))
	unmounted := false
	t.Cleanup(func() {
		if !unmounted {
			_ = syscall.Unmount(instances, syscall.MNT_DETACH)
		}
	})
	d := l.serve("-v")
	in := l.start(l.base)
	ballast := filepath.Join(instances, "ballast")
	require.NoError(t, os.WriteFile(ballast, make([]byte, 20<<20), 0o600))
	done := make(chan struct{})
	go func() { // until the VM has ended
		defer close(done)
		if resp, err := http.Post("http://"+in.Endpoints[0].Address+"/write?mib=16&seed=1", "", nil); err == nil {
			resp.Body.Close()
		}
	}()
	eventually(t, "the guest is paused", func() bool { return l.inspect(in.ID).State == api.Stalled })
	require.Contains(t, l.inspect(in.ID).Reason, "continue it to try again")
	require.NoError(t, os.Remove(ballast))
	l.ok("stop", in.ID) // what it leaves goes with its file system
	<-done
	d.end(syscall.SIGTERM)
	require.Regexp(t, `event of an instance.*state=io-error`, d.log.String())
	require.NoError(t, syscall.Unmount(instances, 0))
	unmounted = true
}

// libvirtAbsent: without a daemon, or with a URI that is none, nothing is started and it is
// said why.
func libvirtAbsent(t *testing.T) {
	l := newLab(t)
	l.fails(6, "no libvirt", "--vmm", "libvirt:qemu:///system?socket=/nonexistent", "run", l.base)
	silent := filepath.Join(t.TempDir(), "silent")
	deaf, err := net.Listen("unix", silent) // which takes connections and says nothing
	require.NoError(t, err)
	defer deaf.Close()
	l.fails(6, "has not answered within", "--vmm", "libvirt:qemu:///system?socket="+silent, "run", l.base)
	l.fails(2, "want QEMU on this host", "--vmm", "libvirt:qemu+ssh://elsewhere/system", "run", l.base)
	l.fails(2, "use qemu, libvirt", "--vmm", "xen", "run", l.base)
	require.Empty(t, l.leftovers())
}

// nobody is the user and group of the session test.
const nobody = 65534

// libvirtSession: an ordinary user's own libvirt, without any configuration.
func libvirtSession(t *testing.T) {
	l := newLab(t)
	home, err := os.MkdirTemp("", "session-")
	require.NoError(t, err)
	state := filepath.Join(home, "state")
	for _, args := range [][]string{{"cp", "-a", l.state, state}, {"mkdir", filepath.Join(home, "run")}, {"chown", "-R", fmt.Sprintf("%d:%d", nobody, nobody), home}} {
		out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
		require.NoError(t, err, "%v: %s", args, out)
	}
	run := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir = "/"
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + home, "XDG_RUNTIME_DIR=" + filepath.Join(home, "run"), "XDG_CACHE_HOME=" + filepath.Join(home, "cache")}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, err := cmd.Output()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("%s %v: %v: %s", name, args, err, exit.Stderr)
		}
		require.NoError(t, err)
		return strings.TrimSpace(string(out))
	}
	cloudlet := func(args ...string) string {
		t.Helper()
		return run(shared.bin, append([]string{"--state", state, "--vmm", "libvirt"}, args...)...)
	}
	t.Cleanup(func() { // daemons that libvirt has started for the user
		for _, name := range []string{"libvirtd", "virtlogd"} {
			text, err := os.ReadFile(filepath.Join(home, "run/libvirt", name+".pid"))
			if err != nil {
				continue
			}
			if pid, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
				_ = syscall.Kill(pid, syscall.SIGTERM)
				eventually(t, name+" ends", func() bool { return syscall.Kill(pid, 0) != nil })
			}
		}
		require.NoError(t, os.RemoveAll(home))
	})
	var in api.Instance
	require.NoError(t, json.Unmarshal([]byte(cloudlet("run", l.base, "--probe", fmt.Sprintf("%d/healthz", guest.Port), "--timeout", "2m", "--json")), &in))
	ask(t, in, "GET", "/")
	require.Contains(t, run("virsh", "-c", "qemu:///session", "list", "--name"), "cloudlet-"+in.ID)
	require.Contains(t, cloudlet("overlay", "create", in.ID, "--json"), `"parent"`)
	run("virsh", "-c", "qemu:///session", "destroy", "cloudlet-"+in.ID)
	require.Contains(t, cloudlet("ps", "--all"), "destroyed through libvirt")
	cloudlet("rm", in.ID)
}

// TestHandoffLibvirt moves an application from a host with libvirt to one without, and back.
func TestHandoffLibvirt(t *testing.T) {
	need.Root(t, "let libvirt run QEMU as root")
	needLibvirt(t)
	handoffThereAndBack(t, cloudlets.Options{Count: 2, ServeEach: func(c *cloudlets.Cloudlet) ([]string, error) {
		if c.Name != "a" {
			return []string{"--vmm", "qemu"}, nil
		}
		root := filepath.Join(filepath.Dir(c.State), "libvirt")
		if err := os.MkdirAll(filepath.Join(root, "etc"), 0o755); err != nil {
			return nil, err
		}
		const conf = "user = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\nremember_owner = 0\nsecurity_driver = \"none\"\nnamespaces = []\ncgroup_controllers = []\nstdio_handler = \"file\"\n"
		if err := os.WriteFile(filepath.Join(root, "etc/qemu.conf"), []byte(conf), 0o600); err != nil {
			return nil, err
		}
		return []string{"--vmm", "libvirt:qemu:///embed?root=" + root}, nil
	}})
}
