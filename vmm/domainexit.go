package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// Libvirt keeps a file of the pid of each domain's QEMU, and a log of each domain, which tells
// how it ended also when nobody watched.

// runtimeDir and cacheDir are the folders of a user's own libvirt.
func runtimeDir() string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "libvirt/qemu/run")
	}
	return filepath.Join(cacheDir(), "libvirt/qemu/run")
}

func cacheDir() string {
	if dir, err := os.UserCacheDir(); err == nil {
		return dir
	}
	return "/"
}

func (u uri) pidFile(name string) string {
	switch {
	case u.root() != "":
		return filepath.Join(u.root(), "run/qemu", name+".pid")
	case u.session():
		return filepath.Join(runtimeDir(), name+".pid")
	}
	return filepath.Join("/run/libvirt/qemu", name+".pid")
}

func (u uri) logFile(name string) string {
	switch {
	case u.root() != "":
		return filepath.Join(u.root(), "log/qemu", name+".log")
	case u.session():
		return filepath.Join(cacheDir(), "libvirt/qemu/log", name+".log")
	}
	return filepath.Join("/var/log/libvirt/qemu", name+".log")
}

// exit asks libvirt's log how QEMU ended, once libvirt knows that it has, and keeps it.
func (d *domain) exit(ctx context.Context, vm *VM) (Exit, error) {
	if _, err := os.Lstat(filepath.Join(vm.dir, exitFile)); err == nil {
		d.conns.forget(d.UUID)
		return vm.exit()
	}
	var want ending
	if err := readJSON(vm.dir, endingFile, &want); err != nil && !errors.Is(err, os.ErrNotExist) {
		return Exit{}, err
	}
	limit, cancel := context.WithTimeout(ctx, recordGrace)
	defer cancel()
	var err error
	if want.Verb == "" { // else it is known
		err = pollUntil(limit, func() (bool, error) {
			active, err := d.active(limit)
			return !active, err
		})
	}
	if ctx.Err() != nil {
		return Exit{}, fmt.Errorf("wait for VM: %w", ctx.Err())
	}
	rec, found := readDomainLog(d.URI.logFile(d.Name), d.UUID)
	if !found && err != nil && want.Verb == "" {
		// Libvirt is not there now: it may tell later.
		e := exitOf(exitRecord{Code: -1, Reason: domainReason("", rec.Stderr, want)}, want)
		e.Reason += fmt.Sprintf(" (%v)", err)
		return e, nil
	}
	if rec.At.IsZero() {
		rec.At = time.Now()
	}
	rec.Reason = domainReason(rec.Reason, rec.Stderr, want)
	if err := writeJSON(vm.dir, exitFile, rec); err != nil {
		return Exit{}, err
	}
	return exitOf(rec, want), nil
}

// maxDomainLog bounds the end of a domain's log that is read, in bytes: the command line of a
// start with all of its options has some KiB.
const maxDomainLog = 64 << 10

// endLine is the line that libvirt writes at an end.
var endLine = regexp.MustCompile(`(?m)^(\S+ \S+): shutting down, reason=(\S+)$`)

// readDomainLog reads from a domain's log when it ended, libvirt's word for it as Reason, and
// what QEMU had written.
func readDomainLog(path, uuid string) (exitRecord, bool) {
	rec := exitRecord{Code: -1}
	f, err := os.Open(path)
	if err != nil {
		return rec, false
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Size() > maxDomainLog {
		if _, err := f.Seek(-maxDomainLog, io.SeekEnd); err != nil {
			return rec, false
		}
	}
	data, err := io.ReadAll(io.LimitReader(f, maxDomainLog))
	if err != nil {
		return rec, false
	}
	return parseDomainLog(string(data), uuid)
}

func parseDomainLog(text, uuid string) (exitRecord, bool) {
	rec := exitRecord{Code: -1}
	if i := strings.LastIndex(text, "-uuid "+uuid); i >= 0 {
		text = text[i:]
	}
	m := endLine.FindStringSubmatchIndex(text)
	if m != nil {
		rec.Reason = text[m[4]:m[5]]
		if at, err := time.Parse("2006-01-02 15:04:05.999-0700", text[m[2]:m[3]]); err == nil {
			rec.At = at
		}
		text = text[:m[0]]
	}
	// QEMU's own lines come after its command line, whose lines end in a backslash, and are told
	// from libvirt's by their form of time.
	var said []string
	for _, l := range strings.Split(text, "\n") {
		if _, rest, ok := strings.Cut(l, "Z "); ok && strings.HasPrefix(l, "20") {
			said = append(said, rest)
		}
	}
	rec.Stderr = tail(strings.Join(said, "\n"), maxStderr)
	return rec, m != nil
}

// domainReason puts libvirt's word for an end into a sentence.
func domainReason(why, stderr string, want ending) string {
	switch {
	case want.Verb == "destroy":
		return "QEMU was killed on request (destroy)"
	case want.Verb != "":
		return "QEMU ended on request (" + want.Verb + ")"
	}
	said := ""
	if last := stderr[strings.LastIndexByte(stderr, '\n')+1:]; last != "" {
		said = ": " + last
	}
	switch why {
	case "shutdown":
		return "the guest powered off"
	case "destroyed":
		return "the domain was destroyed through libvirt, by somebody else"
	case "saved":
		return "the domain was saved through libvirt, by somebody else"
	case "migrated":
		return "the domain was migrated through libvirt, by somebody else"
	case "":
		return "QEMU ended, and libvirt's log does not say how"
	default: // crashed, failed, daemon, unknown
		return "QEMU ended unexpectedly (libvirt says " + why + "): it was killed, for want of memory or since a page of its memory could not be read" + said
	}
}
