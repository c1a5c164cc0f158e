package vmm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"libvirt.org/go/libvirtxml"
)

// Libvirt runs VMs with the QEMU programs of this host as domains of libvirt: transient ones,
// which end with their VM. QEMU and Dir are required. It must not be copied after first use.
type Libvirt struct {
	// QEMU has the programs; VMs are adopted and destroyed by it, whoever made them.
	*QEMU
	// URI is qemu:///system, qemu:///session or qemu:///embed?root=DIR, which is libvirt
	// without a daemon; of the last, one process at a time can use a folder.
	URI string
	// Dir is a folder of the program's own, in which all files of VMs are. Where libvirt runs
	// QEMU as another user, folders in it let that user's group pass.
	Dir string
}

// LeastLibvirt is the oldest version of libvirt that is known to do.
const LeastLibvirt = "8.2.0"

const leastLibvirt = 8_002_000

// domainInfo is what is known of a VM's domain, in the VM's folder.
type domainInfo struct {
	URI      uri     `json:"uri"`
	Name     string  `json:"name"`
	Title    string  `json:"title,omitempty"`
	UUID     string  `json:"uuid"`
	Emulator string  `json:"emulator"`
	Dir      string  `json:"dir"`
	Account  Account `json:"account"`
	Label    bool    `json:"label,omitempty"` // libvirt knows of owners of files
}

// facts is what a libvirt daemon says of itself, asked once a connection.
type facts struct {
	daemon, library uint32
	account         Account
	label           bool
}

// facts returns what the daemon says.
func (v *Libvirt) facts(ctx context.Context) (f facts, err error) {
	u, err := parseURI(v.URI)
	if err != nil {
		return f, err
	}
	err = v.conns.do(ctx, u, func(lib library) (err error) {
		f, err = v.conns.facts(lib)
		return err
	}, nil)
	return f, err
}

func askFacts(lib library) (f facts, err error) {
	if f.daemon, f.library, err = lib.versions(); err != nil {
		return f, err
	}
	if old := min(f.daemon, f.library); old < leastLibvirt {
		return f, fmt.Errorf("%w: libvirt %s is too old: install %s or newer, or use --vmm qemu", ErrNoLibvirt, versionText(old), LeastLibvirt)
	}
	text, err := lib.capabilities()
	if err != nil {
		return f, err
	}
	f.account, f.label, err = accountOf(text)
	return f, err
}

// accountOf reads from libvirt's capabilities as whom QEMU runs; where they do not tell, it is
// the user of the daemon, which is ours.
func accountOf(capabilities string) (Account, bool, error) {
	var caps libvirtxml.Caps
	if err := caps.Unmarshal(capabilities); err != nil {
		return Account{}, false, fmt.Errorf("read libvirt's capabilities: %w", err)
	}
	for _, m := range caps.Host.SecModel {
		if m.Name != "dac" || len(m.Labels) == 0 {
			continue
		}
		a, err := parseAccount(m.Labels[0].Value)
		return a, true, err
	}
	return own(), false, nil
}

func versionText(v uint32) string {
	return fmt.Sprintf("%d.%d.%d", v/1_000_000, v/1000%1000, v%1000)
}

// Account returns whom QEMU runs as.
func (v *Libvirt) Account(ctx context.Context) (Account, error) {
	f, err := v.facts(ctx)
	return f.account, err
}

// Probe asks what this host offers, and libvirt whether it is there.
func (v *Libvirt) Probe(ctx context.Context) (Host, error) {
	if _, err := v.facts(ctx); err != nil {
		return Host{}, err
	}
	return v.QEMU.Probe(ctx)
}

// Boot is QEMU.Boot, as a domain. Its memory file and its disk become QEMU's user's, until
// SaveBase.
func (v *Libvirt) Boot(ctx context.Context, dir string, s BootSpec) (*VM, error) {
	d, err := v.newDomain(ctx, s.Name, s.Title)
	if err != nil {
		return nil, fmt.Errorf("boot VM: %w", err)
	}
	return v.boot(ctx, dir, s, d)
}

// Resume is QEMU.Resume, as a domain.
func (v *Libvirt) Resume(ctx context.Context, dir string, s ResumeSpec, on func(event string)) (*VM, error) {
	d, err := v.newDomain(ctx, s.Name, s.Title)
	if err != nil {
		return nil, fmt.Errorf("resume VM: %w", err)
	}
	return v.resume(ctx, dir, s, on, d)
}

var domainName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}$`)

// newDomain makes up the domain of a new VM.
func (v *Libvirt) newDomain(ctx context.Context, name, title string) (*domainInfo, error) {
	f, err := v.facts(ctx)
	if err != nil {
		return nil, err
	}
	emulator, err := v.emulator(f.account)
	if err != nil {
		return nil, err
	}
	id := newUUID()
	if name == "" {
		name = "cloudlet-" + id[:8]
	}
	if !domainName.MatchString(name) {
		return nil, fmt.Errorf("name of domain %.100q: use letters, digits and _.+-, at most 100", name)
	}
	return &domainInfo{
		URI: uri(v.URI), Name: name, Title: title, UUID: id, Emulator: emulator, Dir: v.Dir, Account: f.account, Label: f.label,
	}, nil
}

// emulator makes what libvirt is given in QEMU's place.
func (v *Libvirt) emulator(a Account) (string, error) {
	if len(v.Launcher) == 0 || v.Dir == "" {
		return "", errors.New("no launcher command or no folder is configured")
	}
	bin, err := v.binary()
	if err != nil {
		return "", err
	}
	path, err := makeEmulator(filepath.Join(v.Dir, "emulator"), v.Launcher[0], bin)
	if err != nil {
		return "", err
	}
	return path, a.open(v.Dir, filepath.Dir(path))
}

// newUUID returns a random UUID.
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // does not fail
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// Finding is what was found of one part of a host: Err says what is wrong with it.
type Finding struct {
	Name, Detail string
	Err          error
}

// slowProbe is how long libvirt may take to say what an emulator can do that it has asked
// before.
const slowProbe = 2 * time.Second

// Examine looks whether VMs can be run, beyond what Probe says.
func (v *Libvirt) Examine(ctx context.Context) []Finding {
	out := []Finding{{Name: "libvirt"}, {Name: "libvirt emulator"}}
	f, err := v.facts(ctx)
	if err != nil {
		out[0].Err = err
		return out[:1]
	}
	out[0].Detail = fmt.Sprintf("%s: daemon %s, library %s, QEMU runs as %s", v.URI, versionText(f.daemon), versionText(f.library), f.account.name())
	out[1].Detail, out[1].Err = v.examineEmulator(ctx, f.account)
	return out
}

// examineEmulator asks libvirt twice what our emulator can do: it must know the second time.
func (v *Libvirt) examineEmulator(ctx context.Context, a Account) (string, error) {
	emulator, err := v.emulator(a)
	if err != nil {
		return "", err
	}
	if err := a.check(emulator, []reach{{canRun, emulator}, {canRun, realPath(filepath.Join(filepath.Dir(emulator), emulatorQEMU))}}); err != nil {
		return "", err
	}
	var took [2]time.Duration
	for i := range took {
		start := time.Now()
		err := v.conns.do(ctx, uri(v.URI), func(lib library) error {
			_, err := lib.domainCapabilities(emulator, "q35", "qemu")
			return err
		}, nil)
		if err != nil {
			return "", fmt.Errorf("ask libvirt what %s can do: %w", emulator, err)
		}
		took[i] = time.Since(start)
	}
	detail := fmt.Sprintf("libvirt knows it, asked in %.1f s and again in %.1f s", took[0].Seconds(), took[1].Seconds())
	if took[1] < slowProbe {
		return detail, nil
	}
	if why := kvmTrap(a); why != "" {
		return "", fmt.Errorf("libvirt asks the emulator anew at each start, which took %.1f s: %s", took[1].Seconds(), why)
	}
	return "", fmt.Errorf("libvirt asks the emulator anew at each start, which took %.1f s: see the daemon's log", took[1].Seconds())
}

// kvmTrap says why libvirt does not keep what it knows of an emulator: as long as /dev/kvm is
// there and QEMU's user cannot open it, what it knows is never good enough for libvirt.
func kvmTrap(a Account) string {
	const kvm = "/dev/kvm"
	fi, err := os.Stat(kvm)
	if err != nil {
		return ""
	}
	gid, uid := fileOwner(fi)
	mode := fi.Mode().Perm()
	can := a.UID == 0 || mode&0o006 == 0o006 || uid == a.UID && mode&0o600 == 0o600 ||
		mode&0o060 == 0o060 && (gid == a.GID || slices.Contains(a.groups(), uint32(gid)))
	if can {
		return ""
	}
	return fmt.Sprintf("user %s cannot open %s, which is there (%v): put the user into its group, for example `chgrp kvm %s; chmod 660 %s; usermod -aG kvm %s`, and restart libvirtd",
		a.name(), kvm, fi.Mode(), kvm, kvm, a.name())
}

// Event is something that happened to a VM without our doing.
type Event struct {
	// Dir is the VM's folder, "" if any VM may have changed, as after a connection was lost.
	Dir string
	// Ended: the VM has ended; else it was stopped, by an error of its disk.
	Ended  bool
	Reason string
}

// retryPause is how long a daemon that is gone is left alone.
const retryPause = time.Second

// Watch tells of events of the VMs that this process knows until ctx ends, across restarts of
// libvirt's daemon. on is called by one goroutine.
func (v *Libvirt) Watch(ctx context.Context, on func(Event)) error {
	u, err := parseURI(v.URI)
	if err != nil {
		return err
	}
	events := make(chan Event, 64)
	tick := time.NewTicker(retryPause)
	defer tick.Stop()
	for ctx.Err() == nil {
		lost := make(chan struct{})
		err := v.conns.do(ctx, u, func(lib library) error {
			return lib.watch(func(e domainEvent) {
				dir, ours := v.conns.known(e.uuid)
				if !ours {
					return
				}
				select {
				case events <- Event{Dir: dir, Ended: e.ended, Reason: e.why}:
				default: // whoever is so late looks at everything soon
				}
			}, func() { close(lost) })
		}, nil)
		if err != nil {
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
			continue
		}
		on(Event{})
		for up := true; up; {
			select {
			case e := <-events:
				on(e)
			case <-lost:
				up = false
			case <-ctx.Done():
				return nil
			}
		}
	}
	return nil
}

// ParseLibvirt reads what a user says after --vmm: "qemu", "libvirt" (the URI is then
// qemu:///system for root and qemu:///session for others) or "libvirt:URI".
func ParseLibvirt(s string) (uri string, is bool, err error) {
	name, rest, has := strings.Cut(s, ":")
	switch {
	case s == "" || s == "qemu":
		return "", false, nil
	case name != "libvirt":
		return "", false, fmt.Errorf("%.60q runs no VMs: use qemu, libvirt or libvirt:URI", s)
	case has:
		u, err := parseURI(rest)
		return string(u), true, err
	case os.Geteuid() == 0:
		return "qemu:///system", true, nil
	default:
		return "qemu:///session", true, nil
	}
}
