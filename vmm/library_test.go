package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"cloudlet/integration/need"
)

// fakeLibrary is a libvirt that is whatever a test wants it to be.
type fakeLibrary struct {
	library // what is not set is not called

	version uint32
	caps    string
	answer  func(text string) (string, error) // of command

	mu      sync.Mutex
	broken  bool
	closed  bool
	lost    func()
	domains []string
}

func (f *fakeLibrary) versions() (uint32, uint32, error) { return f.version, f.version, nil }

func (f *fakeLibrary) capabilities() (string, error) { return f.caps, nil }

func (f *fakeLibrary) command(_, text string, _ *os.File) (string, error) { return f.answer(text) }

func (f *fakeLibrary) active(string) (bool, error) { return false, nil }

func (f *fakeLibrary) destroy(uuid string, _ bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i := slices.Index(f.domains, uuid); i >= 0 {
		f.domains = slices.Delete(f.domains, i, i+1)
		return nil
	}
	return errNoDomain
}

func (f *fakeLibrary) watch(_ func(domainEvent), lost func()) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lost = lost
	return nil
}

func (f *fakeLibrary) alive() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return !f.broken
}

func (f *fakeLibrary) close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.closed = true
	return nil
}

func (f *fakeLibrary) fail() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.broken = true
	if f.lost != nil {
		f.lost()
	}
}

const fakeCaps = `<capabilities><host><secmodel><model>dac</model><doi>0</doi><baselabel type='kvm'>+0:+0</baselabel></secmodel></host></capabilities>`

// fakeLibvirt returns a Libvirt that connects to fakes, one after the other.
func fakeLibvirt(t *testing.T, fakes ...*fakeLibrary) *Libvirt {
	t.Helper()
	v := &Libvirt{QEMU: testQEMU(t, ""), URI: "qemu:///system", Dir: t.TempDir()}
	v.conns.dial = func(uri) (library, error) {
		if len(fakes) == 0 {
			return nil, fmt.Errorf("%w: nobody listens", ErrNoLibvirt)
		}
		f := fakes[0]
		fakes = fakes[1:]
		return f, nil
	}
	t.Cleanup(func() { require.NoError(t, v.Close()) })
	return v
}

func TestParseLibvirt(t *testing.T) {
	own := map[bool]string{true: "qemu:///system", false: "qemu:///session"}[os.Geteuid() == 0]
	for _, tt := range []struct {
		name, in, uri string
		is            bool
		err           string
	}{
		{"nothing", "", "", false, ""},
		{"qemu", "qemu", "", false, ""},
		{"libvirt", "libvirt", own, true, ""},
		{"session", "libvirt:qemu:///session", "qemu:///session", true, ""},
		{"socket", "libvirt:qemu:///system?socket=/s", "qemu:///system?socket=/s", true, ""},
		{"embed", "libvirt:qemu:///embed?root=/r", "qemu:///embed?root=/r", true, ""},
		{"embed nowhere", "libvirt:qemu:///embed", "", true, "?root=DIR"},
		{"another host", "libvirt:qemu+ssh://h/system", "", true, "on this host"},
		{"another hypervisor", "libvirt:xen:///system", "", true, "on this host"},
		{"fragment", "libvirt:qemu:///system#x", "", true, "on this host"},
		{"another path", "libvirt:qemu:///else", "", true, "qemu:///session"},
		{"another word", "xen", "", false, "use qemu, libvirt"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			uri, is, err := ParseLibvirt(tt.in)
			if tt.err != "" {
				require.ErrorContains(t, err, tt.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tt.uri, uri)
			require.Equal(t, tt.is, is)
		})
	}
}

func TestLibvirtTooOld(t *testing.T) {
	v := fakeLibvirt(t, &fakeLibrary{version: 8_001_000, caps: fakeCaps})
	_, err := v.Probe(t.Context())
	require.ErrorIs(t, err, ErrNoLibvirt)
	require.ErrorContains(t, err, "libvirt 8.1.0 is too old: install 8.2.0 or newer")
	f := v.Examine(t.Context())
	require.Len(t, f, 1)
	require.ErrorIs(t, f[0].Err, ErrNoLibvirt)
}

func TestLibvirtAccount(t *testing.T) {
	for _, tt := range []struct {
		name, caps string
		want       Account
		label      bool
		err        string
	}{
		{"root", fakeCaps, Account{}, true, ""},
		{"user", `<capabilities><host><secmodel><model>apparmor</model></secmodel><secmodel><model>dac</model><baselabel type='kvm'>+64055:+108</baselabel></secmodel></host></capabilities>`, Account{64055, 108}, true, ""},
		{"session", `<capabilities><host/></capabilities>`, own(), false, ""},
		{"nonsense", `<capabilities><host><secmodel><model>dac</model><baselabel type='kvm'>x</baselabel></secmodel></host></capabilities>`, Account{}, true, "owner of QEMU"},
		{"no XML", `<`, Account{}, false, "capabilities"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, label, err := accountOf(tt.caps)
			if tt.err != "" {
				require.ErrorContains(t, err, tt.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tt.want, a)
			require.Equal(t, tt.label, label)
		})
	}
}

// A connection that broke is replaced, and what was given up goes on until Close.
func TestConnections(t *testing.T) {
	gate := make(chan struct{})
	first := &fakeLibrary{version: 9_000_000, caps: fakeCaps}
	second := &fakeLibrary{version: 9_001_000, caps: fakeCaps}
	v := fakeLibvirt(t, first, second)
	f, err := v.facts(t.Context())
	require.NoError(t, err)
	require.Equal(t, uint32(9_000_000), f.daemon)
	first.fail()
	f, err = v.facts(t.Context())
	require.NoError(t, err)
	require.Equal(t, uint32(9_001_000), f.daemon)

	ctx, cancel := context.WithCancel(t.Context())
	done := false
	began := make(chan struct{})
	go func() { <-began; cancel() }()
	err = v.conns.do(ctx, uri(v.URI), func(library) error { close(began); <-gate; return nil }, func() { done = true })
	require.ErrorIs(t, err, context.Canceled)
	close(gate)
	require.NoError(t, v.Close())
	require.True(t, done)
	require.True(t, first.closed)
	require.True(t, second.closed)
	second.fail()
	_, err = v.facts(t.Context())
	require.ErrorIs(t, err, ErrNoLibvirt)
}

// A connection that broke is closed when nobody uses it any more: libvirt frees it.
func TestConnectionInUse(t *testing.T) {
	first, second := &fakeLibrary{}, &fakeLibrary{}
	v := fakeLibvirt(t, first, second)
	began, gate := make(chan struct{}), make(chan struct{})
	ended := make(chan error, 1)
	go func() {
		ended <- v.conns.do(t.Context(), uri(v.URI), func(lib library) error {
			close(began)
			<-gate
			first.mu.Lock()
			defer first.mu.Unlock()
			if first.closed {
				return errors.New("closed in the middle of a call")
			}
			return nil
		}, nil)
	}()
	<-began
	first.fail()
	require.NoError(t, v.conns.do(t.Context(), uri(v.URI), func(lib library) error {
		require.Same(t, second, lib)
		return nil
	}, nil))
	close(gate)
	require.NoError(t, <-ended)
	require.NoError(t, v.Close())
	require.True(t, first.closed)
}

// A daemon that takes connections and says nothing is named, and what was given up does not
// begin once it speaks.
func TestDaemonHangs(t *testing.T) {
	v := fakeLibvirt(t)
	v.conns.patience = 20 * time.Millisecond
	gate := make(chan struct{})
	v.conns.dial = func(uri) (library, error) { <-gate; return &fakeLibrary{}, nil }
	began := false
	for range 2 { // the second waits for the first's connection
		err := v.conns.do(t.Context(), uri(v.URI), func(library) error { began = true; return nil }, nil)
		require.ErrorIs(t, err, ErrNoLibvirt)
		require.ErrorContains(t, err, "qemu:///system has not answered within 20ms")
	}
	close(gate)
	require.NoError(t, v.Close())
	require.False(t, began)
}

// hungLibrary does not come back from its end.
type hungLibrary struct {
	fakeLibrary
	gate chan struct{}
}

func (h *hungLibrary) close() error {
	<-h.gate
	return nil
}

// A call that hangs, or an end that does, keeps nobody for ever.
func TestCloseHangs(t *testing.T) {
	for _, what := range []string{"call", "end"} {
		t.Run(what, func(t *testing.T) {
			gate := make(chan struct{})
			c := connections{grace: 20 * time.Millisecond, dial: func(uri) (library, error) {
				if what == "call" {
					return &fakeLibrary{}, nil
				}
				return &hungLibrary{gate: gate}, nil
			}}
			ctx, cancel := context.WithCancel(t.Context())
			_ = c.do(ctx, "qemu:///system", func(library) error { // it is given up
				cancel()
				if what == "call" {
					<-gate
				}
				return nil
			}, nil)
			require.ErrorContains(t, c.close(), "have not returned within 20ms")
			close(gate)
			require.NoError(t, c.close())
		})
	}
}

// Commands through libvirt: one client at a time, also while one that was given up goes on.
func TestPassage(t *testing.T) {
	gate := make(chan struct{})
	said := make(chan string, 8)
	fake := &fakeLibrary{version: 9_000_000, caps: fakeCaps, answer: func(text string) (string, error) {
		said <- text
		switch text {
		case `{"execute":"stop"}`:
			<-gate
			return `{"return":{},"id":"libvirt-7"}`, nil
		case `{"execute":"query-status"}`:
			return `{"return":{"status":"paused"},"id":"libvirt-8"}`, nil
		case `{"execute":"cont"}`:
			return `{"error":{"class":"GenericError","desc":"no"},"id":"libvirt-9"}`, nil
		case `{"execute":"quit"}`:
			return "", fmt.Errorf("%w: gone", errNotRunning)
		}
		return `nonsense`, nil
	}}
	v := fakeLibvirt(t, fake)
	d := &domain{domainInfo{URI: uri(v.URI), UUID: "u"}, &v.conns}
	vm := &VM{q: v.QEMU, dir: t.TempDir()}
	c, err := d.connect(t.Context(), vm)
	require.NoError(t, err)
	state, err := c.runState(t.Context())
	require.NoError(t, err)
	require.Equal(t, "paused", state)
	var refused *QMPError
	require.ErrorAs(t, c.execute(t.Context(), "cont", nil, nil), &refused)
	require.Equal(t, "no", refused.Desc)
	require.ErrorIs(t, c.execute(t.Context(), "quit", nil, nil), errMonitor)
	require.ErrorContains(t, c.execute(t.Context(), "other", nil, nil), "parse answer")

	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for text := range said {
			if text == `{"execute":"stop"}` {
				cancel()
				return
			}
		}
	}()
	require.ErrorIs(t, c.execute(ctx, "stop", nil, nil), context.Canceled)
	require.NoError(t, c.close())
	require.NoError(t, c.close())
	short, end := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer end()
	_, err = d.connect(short, vm)
	require.ErrorIs(t, err, context.DeadlineExceeded, "the stop is still under way")
	close(gate)
	c, err = d.connect(t.Context(), vm)
	require.NoError(t, err)
	require.NoError(t, c.close())
}

// Events go on after the daemon was away.
func TestLibvirtWatch(t *testing.T) {
	first, second := &fakeLibrary{version: 9_000_000, caps: fakeCaps}, &fakeLibrary{version: 9_000_000, caps: fakeCaps}
	v := fakeLibvirt(t, first, second)
	ctx, cancel := context.WithCancel(t.Context())
	seen := make(chan Event)
	ended := make(chan error, 1)
	go func() { ended <- v.Watch(ctx, func(e Event) { seen <- e }) }()
	require.Equal(t, Event{}, <-seen)
	first.fail()
	require.Equal(t, Event{}, <-seen)
	cancel()
	require.NoError(t, <-ended)
}

func TestDomainLog(t *testing.T) {
	const start = "LC_ALL=C \\\n/e/cloudlet-emulator \\\n-uuid %s \\\n-msg timestamp=on\n"
	first := fmt.Sprintf(start, "u1") + "2026-01-02T03:04:05.000001Z qemu-system-x86_64: of the first\n2026-01-02 03:04:06.500+0000: shutting down, reason=crashed\n"
	log := first +
		fmt.Sprintf(start, "u2") + "2026-01-02 03:05:00.000+0000: Domain id=2 is tainted: custom-argv\n2026-01-02T03:05:05.000001Z qemu-system-x86_64: terminating on signal 15 from pid 9 (x)\n2026-01-02 03:05:06.250+0000: shutting down, reason=destroyed\n"
	for _, tt := range []struct {
		name, text, uuid string
		found            bool
		why, stderr      string
		sentence         string
	}{
		{"last", log, "u2", true, "destroyed", "qemu-system-x86_64: terminating on signal 15 from pid 9 (x)", "the domain was destroyed through libvirt, by somebody else"},
		{"still there", fmt.Sprintf(start, "u3"), "u3", false, "", "", "QEMU ended, and libvirt's log does not say how"},
		{"empty", "", "u", false, "", "", "QEMU ended, and libvirt's log does not say how"},
		{"crashed", first, "u1", true, "crashed", "qemu-system-x86_64: of the first", "QEMU ended unexpectedly (libvirt says crashed): it was killed, for want of memory or since a page of its memory could not be read: qemu-system-x86_64: of the first"},
		{"powered off", fmt.Sprintf(start, "u") + "2026-01-02 03:04:06.500+0000: shutting down, reason=shutdown\n", "u", true, "shutdown", "", "the guest powered off"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rec, found := parseDomainLog(tt.text, tt.uuid)
			require.Equal(t, tt.found, found)
			require.Equal(t, tt.why, rec.Reason)
			require.Equal(t, tt.stderr, rec.Stderr)
			require.Equal(t, tt.found, !rec.At.IsZero())
			require.Equal(t, tt.sentence, domainReason(rec.Reason, rec.Stderr, ending{}))
			require.Equal(t, "QEMU was killed on request (destroy)", domainReason(rec.Reason, rec.Stderr, ending{Verb: "destroy"}))
		})
	}
}

// A VM of libvirt whose domain is gone is adopted by any process, whatever runs new VMs there.
func TestAdoptEndedDomain(t *testing.T) {
	v := fakeLibvirt(t, &fakeLibrary{version: 9_000_000, caps: fakeCaps})
	dir := newDir(t, "vm")
	info := vmInfo{Version: 2, Machine: testMachine(), Domain: &domainInfo{URI: uri(v.URI), Name: "n", UUID: "u"}}
	require.NoError(t, writeJSON(dir, vmFile, info))
	vm, err := v.QEMU.Adopt(t.Context(), dir)
	require.NoError(t, err)
	status, err := vm.Status(t.Context())
	require.NoError(t, err)
	require.Equal(t, Ended, status.State)
	require.NoError(t, vm.Destroy(t.Context()))
	require.NoError(t, v.DestroyIn(t.Context(), dir))
	info.Version = 1
	require.NoError(t, writeJSON(dir, vmFile, info))
	_, err = v.Adopt(t.Context(), dir)
	require.ErrorContains(t, err, "use a newer program")
}

// What QEMU's user cannot open is named, by a process of that user.
func TestAccountCheck(t *testing.T) {
	need.Root(t, "be another user")
	exe, err := os.Executable()
	require.NoError(t, err)
	root, err := os.MkdirTemp("", "vmm")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(root)) })
	state := filepath.Join(root, "state")
	vm := filepath.Join(state, "instances", "vm")
	require.NoError(t, os.MkdirAll(vm, 0o700))
	program := filepath.Join(root, "program")
	copyTo(t, program, exe)
	require.NoError(t, os.Chmod(program, 0o755))
	require.NoError(t, os.Chmod(root, 0o711))
	a := Account{UID: 65534, GID: 65534}
	emulator, err := makeEmulator(filepath.Join(state, "emulator"), program, "/bin/true")
	require.NoError(t, err)
	again, err := makeEmulator(filepath.Join(state, "emulator"), program, "/bin/true")
	require.NoError(t, err)
	require.Equal(t, emulator, again)
	file := filepath.Join(vm, "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))

	require.ErrorContains(t, a.check(emulator, []reach{{canRead, file}}), "install it where everybody can")
	require.NoError(t, a.open(state, filepath.Dir(emulator)))
	require.ErrorContains(t, a.check(emulator, []reach{{canRun, emulator}, {canRead, file}}), "cannot pass "+filepath.Join(state, "instances"))
	// A folder that others were let into is theirs, too.
	const others = 12345
	require.NoError(t, os.Chown(vm, -1, others))
	require.NoError(t, os.Chmod(vm, 0o750))
	require.NoError(t, a.open(state, vm))
	info, err := os.Stat(vm)
	require.NoError(t, err)
	gid, _ := fileOwner(info)
	require.Equal(t, others, gid)
	require.Equal(t, os.FileMode(0o750), info.Mode().Perm())
	require.ErrorContains(t, a.check(emulator, []reach{{canRead, file}}), "cannot pass "+vm)
	require.NoError(t, os.Chmod(vm, 0o700))
	require.NoError(t, a.open(state, vm))
	require.ErrorContains(t, a.check(emulator, []reach{{canRead, file}}), "cannot read "+file)
	require.NoError(t, a.take(file))
	require.NoError(t, a.check(emulator, []reach{{canRead, file}, {canWrite, file}}))
	require.NoError(t, own().take(file))
	require.Error(t, a.check(emulator, []reach{{canRead, file}}))
	fi, err := os.Stat(vm)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o710), fi.Mode().Perm())
	require.NoError(t, a.open(state, root), "what is not the program's stays")
	fi, err = os.Stat(root)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o711), fi.Mode().Perm())
}

func TestErrorsOfStart(t *testing.T) {
	d := &domain{domainInfo{Name: "n"}, nil}
	for _, tt := range []struct {
		name string
		err  error
		want string
	}{
		{"name", fmt.Errorf("%w: domain 'n' already exists", ErrNameTaken), "give another name"},
		{"no daemon", ErrNoLibvirt, "no libvirt"},
		{"permission", errors.New("Could not open '/m': Permission denied"), "check its owner and mode"},
		{"other", errors.New("what"), "start domain n: what"},
	} {
		require.ErrorContains(t, d.startError(tt.err), tt.want, tt.name)
	}
}
