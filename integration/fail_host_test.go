package integration

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/integration/guest"
	"cloudlet/integration/need"

	"github.com/stretchr/testify/require"
)

// with runs the program with another environment or user.
func (l *lab) with(change func(*exec.Cmd), args ...string) result {
	l.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := l.command(args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	change(cmd)
	require.NoError(l.t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	_ = l.await(cmd, ended, args) // the exit code says it
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

func path(dirs string) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) { cmd.Env = append(os.Environ(), "PATH="+dirs) }
}

func TestNoQEMU(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	for _, args := range [][]string{{"run", file}, createBase(t)} {
		r := l.with(path("/nonexistent"), args...)
		require.Equal(t, 6, r.code, r.stderr)
		require.Contains(t, r.stderr, "no QEMU")
		require.Contains(t, r.stderr, "install qemu-system-x86")
		require.Empty(t, l.leftovers())
	}
}

// TestQEMUDies puts programs in QEMU's place that end, or hang, at different steps.
func TestQEMUDies(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	real, err := exec.LookPath("qemu-system-x86_64")
	require.NoError(t, err)
	question := `case "$1" in --version|-accel|-machine|-cpu) exec ` + real + ` "$@";; esac` + "\n"
	wrap := func(script string) func(*exec.Cmd) {
		dir := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(dir, "qemu-system-x86_64"), []byte("#!/bin/sh\n"+script), 0o755))
		return path(dir + ":" + os.Getenv("PATH"))
	}
	for _, tt := range []struct{ name, script, words string }{
		{"at its version", "echo broken library >&2; exit 127", "broken library"},
		{"at once", question + "echo no such luck >&2; exit 1", "no such luck"},
		{"by a signal", question + "kill -SEGV $$", "SIGSEGV"},
		{"after the greeting", question + real + ` "$@" & pid=$!
while [ ! -S qmp.sock ]; do sleep 0.01; done; kill -KILL $pid; wait $pid; echo gone after greeting >&2; exit 3`, ""},
	} {
		for _, args := range [][]string{{"run", file}, createBase(t)} {
			t.Run(tt.name+" of "+args[0], func(t *testing.T) {
				within(t, 15*time.Second, "the error", func() {
					r := l.with(wrap(tt.script), args...)
					require.NotZero(t, r.code)
					require.NotEqual(t, 130, r.code)
					require.Contains(t, r.stderr, tt.words)
					require.NotEmpty(t, r.stderr)
				})
				require.Empty(t, l.leftovers())
			})
		}
	}
	t.Run("hangs before its monitor", func(t *testing.T) {
		cmd := l.command("run", file)
		wrap(question + "exec sleep 1000")(cmd)
		var said bytes.Buffer
		cmd.Stderr = &said
		require.NoError(t, cmd.Start())
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		eventually(t, "QEMU is not started", func() bool {
			files, _ := filepath.Glob(filepath.Join(l.state, "instances/*/vm/qemu.pid.json"))
			return len(files) == 1 && strings.Contains(string(read(t, files[0])), `"qemu":{"pid":`)
		})
		require.Equal(t, api.Starting, l.list()[0].State)
		within(t, 15*time.Second, "Ctrl-C", func() {
			require.NoError(t, cmd.Process.Signal(os.Interrupt))
			require.Error(t, l.await(cmd, ended, []string{"run"}))
		})
		require.Equal(t, 130, cmd.ProcessState.ExitCode(), said.String())
		require.Empty(t, l.leftovers())
	})
}

// TestKVM asks for an accelerator that may not work: the base is made with it, or the error
// says what to use instead.
func TestKVM(t *testing.T) {
	l := newLab(t)
	g, err := guest.Build(t.Context(), *guestDir, os.Stderr)
	require.NoError(t, err)
	within(t, time.Minute, "the error", func() {
		r := l.run("base", "create", g.Disk, "--kernel", g.Kernel, "--initrd", g.Initrd, "--append", guest.Append,
			"--memory", fmt.Sprintf("%dM", guest.MemoryMiB), "--accel", "kvm", "--probe", fmt.Sprintf("%d/healthz", guest.Port), "--timeout", "50s")
		if r.code == 0 {
			require.Contains(t, l.ok("base", "list", "--json"), `"accelerator": "kvm"`)
			return
		}
		require.Contains(t, []int{1, 6, 7}, r.code, r.stderr)
		require.Contains(t, r.stderr, "--accel tcg")
	})
	require.Empty(t, l.leftovers())
}

// TestOtherUser runs as a user who may not open the state folder, then
// in a store of their own.
func TestOtherUser(t *testing.T) {
	need.Root(t, "become another user")
	file := launchFile(t)
	l := newLab(t)
	nobody := func(cmd *exec.Cmd) {
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	tmp := filepath.Dir(shared.dir)
	require.NoError(t, os.Chmod(tmp, 0o755)) // the program lies there
	require.NoError(t, os.Chmod(l.state, 0o700))
	r := l.with(nobody, "ps")
	require.Equal(t, 6, r.code, r.stderr)
	require.Contains(t, r.stderr, l.state)

	own := newEmptyLab(t)
	out, err := exec.Command("cp", "-a", filepath.Join(shared.dir, "bases"), own.state).CombinedOutput()
	require.NoError(t, err, string(out))
	for _, args := range [][]string{{"-R", "65534:65534", own.state}} {
		out, err := exec.Command("chown", args...).CombinedOutput()
		require.NoError(t, err, string(out))
	}
	require.NoError(t, os.Chmod(file, 0o644))
	r = own.with(nobody, "run", file, "--probe", fmt.Sprintf("%d/healthz", guest.Port), "--json")
	if r.code != 0 { // where fusermount3 or /dev/fuse are closed to the user
		require.Equal(t, 6, r.code, r.stderr)
		require.Contains(t, strings.ToLower(r.stderr), "fuse")
		require.Contains(t, r.stderr, "run as root")
		require.Empty(t, own.leftovers())
		return
	}
	require.Equal(t, api.Running, own.list()[0].State, "the main job needs no root")
}

func TestDiskFull(t *testing.T) {
	need.Root(t, "mount a small file system")
	file := launchFile(t)
	zip := filepath.Join(t.TempDir(), "base.zip")
	newLab(t).ok("base", "export", shared.base, "-o", zip)
	g, err := guest.Build(t.Context(), *guestDir, os.Stderr)
	require.NoError(t, err)

	small := func(size string) *lab {
		l := newEmptyLab(t)
		require.NoError(t, syscall.Mount("tmpfs", l.state, "tmpfs", 0, "size="+size))
		t.Cleanup(func() { require.NoError(t, syscall.Unmount(l.state, 0)) }) // before the lab's end
		return l
	}
	full := func(l *lab, args ...string) {
		t.Helper()
		r := l.run(args...)
		require.Equal(t, 6, r.code, "%v: %s", args, r.stderr)
		require.Contains(t, strings.ToLower(r.stderr), "space")
		for _, left := range l.leftovers() {
			require.True(t, strings.HasPrefix(left, "mount tmpfs"), "%v left %s", args, left)
		}
	}
	l := small("24m")
	full(l, "base", "import", zip)
	full(l, append([]string{"base", "create", g.Disk, "--kernel", g.Kernel, "--initrd", g.Initrd}, baseBySettling...)...)
	require.Empty(t, names(t, filepath.Join(l.state, "bases")))

	l = small("400m")
	l.ok("base", "import", zip)
	in := l.start(file)
	var st syscall.Statfs_t
	require.NoError(t, syscall.Statfs(l.state, &st))
	ballast := filepath.Join(l.state, "ballast")
	require.NoError(t, os.WriteFile(ballast, make([]byte, (int64(st.Bavail)-100)*st.Bsize), 0o600))
	r := l.run("overlay", "create", in.ID)
	require.Equal(t, 6, r.code, r.stderr)
	require.Contains(t, strings.ToLower(r.stderr), "space")
	require.Empty(t, names(t, filepath.Join(l.state, "tmp")))
	require.Equal(t, api.Running, l.inspect(in.ID).State)
	ask(t, in, "GET", "/")
	l.ok("rm", "-f", in.ID)
	require.NoError(t, syscall.Statfs(l.state, &st))
	require.NoError(t, os.WriteFile(ballast+"2", make([]byte, int64(st.Bavail)*st.Bsize), 0o600))
	full(l, "run", file)
	require.NoError(t, os.Remove(ballast))
	l.start(file)
	l.ok("rm", "-f", l.list()[0].ID)
}

// TestTogether runs commands on one overlay and one instance at the same time.
func TestTogether(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	probe := fmt.Sprintf("%d/healthz", guest.Port)

	stop := make(chan struct{})
	var looking, working sync.WaitGroup
	looks := 0
	looking.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if out, err := exec.Command(shared.bin, "--state", l.state, "ps", "--all", "--json").CombinedOutput(); err != nil {
				t.Errorf("ps: %v: %s", err, out)
			}
			looks++
		}
	})
	defer func() { close(stop); looking.Wait(); t.Logf("%d times ps", looks) }()

	together := func(commands ...[]string) []result {
		out := make([]result, len(commands))
		for i, args := range commands {
			working.Go(func() {
				var stderr bytes.Buffer
				cmd := exec.Command(shared.bin, append([]string{"--state", l.state}, args...)...)
				cmd.Stderr = &stderr
				_ = cmd.Run() // the exit code says it
				out[i] = result{stderr: stderr.String(), code: cmd.ProcessState.ExitCode()}
			})
		}
		working.Wait()
		return out
	}
	for _, r := range together([]string{"run", file, "--name", "one", "--probe", probe}, []string{"run", file, "--name", "two", "--probe", probe}) {
		require.Zero(t, r.code, r.stderr)
	}
	list := l.list()
	require.Len(t, list, 2)
	require.Equal(t, list[0].Mount.PID, list[1].Mount.PID, "instances of one image share its mount")
	require.Len(t, names(t, filepath.Join(l.state, "mounts")), 1)

	l.ok("stop", "two")
	for i := range 5 {
		for _, r := range together([]string{"stop", "one"}, []string{"run", file, "--name", fmt.Sprint("next", i), "--probe", probe}) {
			require.Zero(t, r.code, r.stderr)
		}
		l.ok("rm", "one")
		l.ok("rm", "-f", fmt.Sprint("next", i))
		l.start(file, "--name", "one")
	}

	done := together([]string{"overlay", "create", "one", "--strategy", "small"}, []string{"overlay", "create", "one", "--strategy", "small"}, []string{"pause", "one"})
	codes := map[int]int{}
	for _, r := range done {
		codes[r.code]++
		if r.code == 4 {
			require.Contains(t, r.stderr, "busy")
		}
	}
	require.Equal(t, 3, codes[0]+codes[4], "%v", done)
	require.NotZero(t, codes[4], "one works on an instance at a time")

	for _, r := range together([]string{"run", file, "--name", "same"}, []string{"run", file, "--name", "same"}) {
		codes[r.code+100]++
	}
	require.Equal(t, 1, codes[100], "one gets the name")
	require.Equal(t, 1, codes[104], "the other does not")
}
