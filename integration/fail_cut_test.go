package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/integration/guest"

	"github.com/stretchr/testify/require"
)

// The tests of this file cut commands off at many moments, by SIGKILL and by Ctrl-C. A
// command that was quick enough to end before its signal is no failure.

// moments returns n delays, evenly over d.
func moments(d time.Duration, n int) []time.Duration {
	out := make([]time.Duration, n)
	for i := range out {
		out[i] = d * time.Duration(i+1) / time.Duration(n)
	}
	return out
}

// measured returns how long a command takes here and now.
func (l *lab) measured(args ...string) time.Duration {
	l.t.Helper()
	start := time.Now()
	l.ok(args...)
	return time.Since(start)
}

// interrupted requires that a command that got Ctrl-C has either succeeded before or says so.
func interrupted(t *testing.T, r result) (cut bool) {
	t.Helper()
	if r.code == 0 {
		return false
	}
	if r.code == -1 && r.stderr == "" {
		return true // the signal came before the program's first line; a shell calls that 130, too
	}
	require.Equal(t, 130, r.code, r.stderr)
	require.Contains(t, r.stderr, "interrupted")
	return true
}

var baseBySettling = []string{"--append", guest.Append, "--memory", fmt.Sprintf("%dM", guest.MemoryMiB), "--settle", "300ms"}

// createBase is a base create that boots for a moment only.
func createBase(t *testing.T) []string {
	t.Helper()
	g, err := guest.Build(t.Context(), *guestDir, os.Stderr)
	require.NoError(t, err)
	return append([]string{"base", "create", g.Disk, "--kernel", g.Kernel, "--initrd", g.Initrd}, baseBySettling...)
}

func TestCutRun(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	run := []string{"run", file, "--probe", fmt.Sprintf("%d/healthz", guest.Port)}
	l.measured(run...) // warms the caches
	l.clear("after a whole run")
	whole := l.measured(run...)
	l.clear("after a second whole run")
	starting, running := 0, 0
	for _, after := range moments(whole*11/10, 24) {
		l.cut(syscall.SIGKILL, after, run...)
		for _, in := range l.list() {
			switch in.State {
			case api.Stopped:
				require.Equal(t, "the command that was starting it was killed", in.Reason)
				starting++
			case api.Running:
				running++
			default:
				t.Fatalf("run killed after %v: instance is %s: %s", after, in.State, in.Reason)
			}
		}
		l.clear(fmt.Sprintf("run killed after %v", after))
	}
	t.Logf("%d half-started, %d running", starting, running)
	require.NotZero(t, starting)
	l.start(file)
	cuts := 0
	l.clear("after a run among killed ones")
	for _, after := range moments(whole*11/10, 24) {
		if interrupted(t, l.cut(syscall.SIGINT, after, run...)) {
			cuts++
			require.Empty(t, l.leftovers(), "run interrupted after %v", after)
		}
		l.clear(fmt.Sprintf("run interrupted after %v", after))
	}
	require.NotZero(t, cuts)
	l.start(file)
}

func TestCutOverlayCreate(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	parent := l.ok("overlay", "import", file)
	in := l.start(parent)
	out := t.TempDir()
	target := filepath.Join(out, "o")
	create := []string{"overlay", "create", in.ID, "-o", target, "--strategy", "small"}
	whole := l.measured(create...)
	require.NoError(t, os.Remove(target))
	for i, after := range append(moments(whole*11/10, 15), moments(whole*11/10, 15)...) {
		sig := syscall.SIGKILL
		if i >= 15 {
			sig = syscall.SIGINT
		}
		what := fmt.Sprintf("overlay create after %v, %v", after, sig)
		for _, o := range l.overlays() {
			if o.ID != parent {
				l.ok("overlay", "rm", o.ID)
			}
		}
		r := l.cut(sig, after, create...)
		if sig == syscall.SIGINT && interrupted(t, r) {
			require.Empty(t, names(t, filepath.Join(l.state, "tmp")), what)
			require.Empty(t, names(t, out), what)
		}
		require.Equal(t, api.Running, l.inspect(in.ID).State, what)
		require.Empty(t, names(t, filepath.Join(l.state, "tmp")), what)
		if _, err := os.Stat(target); err == nil {
			l.ok("overlay", "verify", target)
			require.NoError(t, os.Remove(target))
		}
		for _, name := range names(t, out) { // what SIGKILL leaves beside the file is hidden
			require.Equal(t, syscall.SIGKILL, sig, name)
			require.Equal(t, byte('.'), name[0])
			require.NoError(t, os.Remove(filepath.Join(out, name)))
		}
	}
	before := ask(t, in, "GET", "/verify")
	o := l.capture(in.ID)
	again := ask(t, l.start(o.ID), "GET", "/verify")
	require.Equal(t, before.Table, again.Table)
	require.Equal(t, before.File, again.File)
}

func TestCutBaseCreate(t *testing.T) {
	l := newLab(t)
	create := createBase(t)
	known := map[string]bool{l.base: true}
	whole := l.measured(create...)
	l.removeBases(known)
	for i, after := range append(moments(whole*11/10, 12), moments(whole*11/10, 12)...) {
		sig := syscall.SIGKILL
		if i >= 12 {
			sig = syscall.SIGINT
		}
		what := fmt.Sprintf("base create after %v, %v", after, sig)
		r := l.cut(sig, after, create...)
		if sig == syscall.SIGINT && interrupted(t, r) {
			require.Empty(t, l.leftovers(), what)
		}
		l.clear(what)
		l.removeBases(known)
	}
}

func TestCutBaseTransfer(t *testing.T) {
	l := newLab(t)
	out := t.TempDir()
	file := filepath.Join(out, "base.zip")
	export := []string{"base", "export", l.base, "-o", file}
	whole := l.measured(export...)
	for _, after := range moments(whole*11/10, 6) {
		require.NoError(t, os.Remove(file))
		if interrupted(t, l.cut(syscall.SIGINT, after, export...)) {
			require.Empty(t, names(t, out), "export interrupted after %v", after)
		}
		require.NoError(t, os.WriteFile(file, nil, 0o600))
	}
	l.ok(export...)

	to := newEmptyLab(t)
	imp := []string{"base", "import", file}
	whole = to.measured(imp...)
	to.ok("base", "verify", l.base)
	to.removeBases(nil)
	for i, after := range append(moments(whole*11/10, 6), moments(whole*11/10, 6)...) {
		sig := syscall.SIGKILL
		if i >= 6 {
			sig = syscall.SIGINT
		}
		what := fmt.Sprintf("base import after %v, %v", after, sig)
		r := to.cut(sig, after, imp...)
		if sig == syscall.SIGINT && interrupted(t, r) {
			require.Empty(t, to.leftovers(), what)
			require.Empty(t, names(t, filepath.Join(to.state, "bases")), what)
		}
		to.clear(what)
		to.removeBases(nil)
	}
}

func TestCutOverlayImport(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	for _, verb := range []string{"import", "verify"} {
		args := []string{"overlay", verb, file}
		whole := l.measured(args...)
		for i, after := range append(moments(whole*11/10, 6), moments(whole*11/10, 6)...) {
			sig := syscall.SIGKILL
			if i >= 6 {
				sig = syscall.SIGINT
			}
			what := fmt.Sprintf("overlay %s after %v, %v", verb, after, sig)
			for _, o := range l.overlays() {
				l.ok("overlay", "rm", o.ID)
			}
			r := l.cut(sig, after, args...)
			if sig == syscall.SIGINT && interrupted(t, r) {
				require.Empty(t, l.leftovers(), what)
				require.Empty(t, names(t, filepath.Join(l.state, "overlays")), what)
			}
			l.clear(what)
		}
	}
}

// removeBases removes all bases but those kept, and requires that nothing is left of them.
func (l *lab) removeBases(keep map[string]bool) {
	l.t.Helper()
	var list []api.Base
	l.json(&list, "base", "list")
	for _, b := range list {
		if !keep[b.ID] {
			l.ok("base", "rm", b.ID)
		}
	}
	for _, name := range names(l.t, filepath.Join(l.state, "bases")) {
		require.True(l.t, keep[name[:min(64, len(name))]], "left in bases: %s", name)
	}
}

func (l *lab) overlays() []api.Overlay {
	l.t.Helper()
	var list []api.Overlay
	l.json(&list, "overlay", "list")
	return list
}

// names lists a folder.
func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// TestHalfMade lays down what a command leaves that is killed between two steps of a moment
// too short to be hit by a signal.
func TestHalfMade(t *testing.T) {
	l := newLab(t)
	id := "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for _, dir := range []string{"instances/0123456789ab", "tmp/base-1", "mounts/0123456789abcdef", "overlays/" + id} {
		require.NoError(t, os.MkdirAll(filepath.Join(l.state, dir), 0o700))
	}
	require.NoError(t, os.WriteFile(filepath.Join(l.state, "overlays", id, "record.json"), []byte("{}"), 0o600))
	require.Empty(t, l.list())
	require.Empty(t, l.overlays())
	require.Empty(t, l.leftovers())
	l.start(l.base)
}
