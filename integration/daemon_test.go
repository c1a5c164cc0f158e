package integration

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/integration/guest"

	"github.com/stretchr/testify/require"
)

// daemon is a `cloudlet serve` on a lab's store.
type daemon struct {
	l       *lab
	cmd     *exec.Cmd
	log     bytes.Buffer
	ended   chan error
	address string // of its API over TCP
}

// serve starts a daemon and waits until it is ready.
func (l *lab) serve(args ...string) *daemon {
	l.t.Helper()
	notify := filepath.Join(l.t.TempDir(), "n")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	require.NoError(l.t, err)
	defer c.Close()
	d := &daemon{l: l, ended: make(chan error, 1)}
	d.cmd = exec.Command(shared.bin, append([]string{"--state", l.state, "serve", "--listen", "127.0.0.1:0"}, args...)...)
	d.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify)
	r, w, err := os.Pipe()
	require.NoError(l.t, err)
	d.cmd.Stderr = w
	require.NoError(l.t, d.cmd.Start())
	require.NoError(l.t, w.Close())
	listening := make(chan string, 2)
	go func() { // until the daemon, and whoever has its standard error, has ended
		defer r.Close()
		lines := bufio.NewScanner(r)
		for lines.Scan() {
			fmt.Fprintln(&d.log, lines.Text())
			if m := regexp.MustCompile(`address=(127\.0\.0\.1:\d+)`).FindStringSubmatch(lines.Text()); m != nil {
				listening <- m[1]
			}
		}
		d.ended <- d.cmd.Wait()
	}()
	l.t.Cleanup(func() {
		if d.cmd.ProcessState == nil {
			_ = d.cmd.Process.Kill() // it may have ended since
			<-d.ended
		}
		if l.t.Failed() {
			l.t.Logf("the daemon said: %s", d.log.String())
		}
	})
	require.NoError(l.t, c.SetReadDeadline(time.Now().Add(20*time.Second)))
	_, err = c.Read(make([]byte, 256))
	require.NoError(l.t, err, "the daemon is not ready")
	d.address = "http://" + <-listening
	return d
}

// end ends the daemon by a signal.
func (d *daemon) end(sig syscall.Signal) {
	d.l.t.Helper()
	require.NoError(d.l.t, d.cmd.Process.Signal(sig))
	select {
	case <-d.ended:
	case <-time.After(commandBound):
		d.l.t.Fatalf("the daemon did not end: %s", d.log.String())
	}
	if sig == syscall.SIGTERM {
		require.Zero(d.l.t, d.cmd.ProcessState.ExitCode(), d.log.String())
	}
}

// remote adds to a command that it uses the daemon over TCP, as from another host.
func (d *daemon) remote(args ...string) []string {
	return append(args, "--server", d.address, "--token-file", filepath.Join(d.l.state, "tokens"))
}

// TestDaemon walks the main job through a daemon, which is killed, stopped and started anew
// under its instances.
func TestDaemon(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	d := l.serve()
	in := l.start(l.ok("overlay", "import", file), "--name", "one")
	first := ask(t, in, "GET", "/").Token

	d.end(syscall.SIGKILL)
	require.Equal(t, first, ask(t, in, "GET", "/").Token)
	require.Equal(t, api.Running, l.inspect(in.ID).State, "without a daemon the command looks itself")
	d = l.serve()
	require.Equal(t, in.PID, l.inspect(in.ID).PID)
	l.ok("pause", "one")
	l.ok("continue", "one")
	out := filepath.Join(t.TempDir(), "o")
	o := l.capture("one", "-o", out, "--name", "app")
	l.ok("overlay", "verify", out)

	var ops []api.Operation
	l.json(&ops, "op", "list")
	kinds := map[api.Kind]api.OperationState{}
	for _, op := range ops {
		kinds[op.Kind] = op.State
		require.Equal(t, op.ID, strings.Fields(l.ok("op", "wait", op.ID))[0])
	}
	require.Equal(t, map[api.Kind]api.OperationState{
		api.KindImportOverlay: api.OperationDone, api.KindRun: api.OperationDone,
		api.KindCreateOverlay: api.OperationDone, api.KindVerifyOverlay: api.OperationDone,
	}, kinds)
	l.fails(4, "ended", "op", "cancel", ops[0].ID)
	l.fails(3, "nothing", "op", "show", "nothing")

	d.end(syscall.SIGTERM)
	require.Equal(t, api.Running, l.inspect(in.ID).State, "instances outlive a stop")
	d = l.serve("--stop-instances")
	ask(t, l.start(o.ID), "GET", "/")
	d.end(syscall.SIGTERM)
	for _, in := range l.list() {
		require.Equal(t, api.Stopped, in.State)
	}
	l.clear("after the daemon ended its instances")
}

// TestDaemonInterrupt cuts commands of a daemon off: what they began is undone.
func TestDaemonInterrupt(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	d := l.serve()
	for _, args := range [][]string{
		{"run", file, "--probe", "81/", "--timeout", "60s"}, createBase(t), {"overlay", "import", file}, {"overlay", "verify", file}, {"base", "verify", l.base},
	} {
		whole := 600 * time.Millisecond
		for _, after := range moments(whole, 4) {
			if interrupted(t, l.cut(syscall.SIGINT, after, args...)) {
				require.Empty(t, names(t, filepath.Join(l.state, "tmp")), "%v after %v", args, after)
				require.Empty(t, l.list(), "%v after %v", args, after)
			}
			for _, o := range l.overlays() {
				l.ok("overlay", "rm", o.ID)
			}
			l.removeBases(map[string]bool{l.base: true})
		}
	}
	var ops []api.Operation
	l.json(&ops, "op", "list")
	for _, op := range ops {
		require.True(t, op.State.Ended(), "%v", op)
	}
	l.start(file)
	l.ok("rm", "-f", l.list()[0].ID)
	d.end(syscall.SIGTERM)
	require.Empty(t, l.leftovers())
}

// TestDaemonRemote sends a base and an overlay to a daemon over TCP, as if it were on another
// host, runs them there and gets what it makes back.
func TestDaemonRemote(t *testing.T) {
	file := launchFile(t)
	zip := filepath.Join(t.TempDir(), "base.zip")
	newLab(t).ok("base", "export", shared.base, "-o", zip)

	l := newEmptyLab(t)
	d := l.serve()
	elsewhere := newEmptyLab(t)
	require.Equal(t, shared.base, elsewhere.ok(d.remote("base", "import", zip, "--name", "base")...))
	id := elsewhere.ok(d.remote("overlay", "import", file, "--name", "app")...)
	elsewhere.ok(d.remote("overlay", "verify", id)...)
	elsewhere.fails(2, "does not see", d.remote("run", file)...)
	elsewhere.fails(3, "no such file", d.remote("overlay", "import", "nothing")...)
	elsewhere.fails(5, "not a valid overlay", d.remote("overlay", "import", "daemon_test.go")...)
	var in api.Instance
	elsewhere.json(&in, d.remote("run", "app", "--probe", fmt.Sprintf("%d/healthz", guest.Port))...)
	ask(t, in, "POST", "/dirty?mib=1")
	back := filepath.Join(t.TempDir(), "back")
	var o api.CreatedOverlay
	elsewhere.json(&o, d.remote("overlay", "create", in.ID, "-o", back)...)
	require.Equal(t, back, o.Output)
	again := filepath.Join(t.TempDir(), "again.zip")
	elsewhere.ok(d.remote("base", "export", "base", "-o", again)...)
	require.Equal(t, read(t, zip), read(t, again))
	elsewhere.ok(d.remote("rm", "--force", in.ID)...)
	require.Empty(t, elsewhere.leftovers())
	require.NoDirExists(t, filepath.Join(elsewhere.state, "bases"), "nothing was done here")

	own := newLab(t)
	own.ok("overlay", "import", file)
	require.Equal(t, o.ID, own.ok("overlay", "import", back))
	d.end(syscall.SIGTERM)
	require.Empty(t, l.leftovers())
}

// TestPressEnter makes a base of a guest when a person presses Enter, and gives one up.
func TestPressEnter(t *testing.T) {
	l := newLab(t)
	create := createBase(t)
	create = create[:len(create)-2] // without --settle
	for _, served := range []bool{false, true} {
		if served {
			defer l.serve().end(syscall.SIGTERM)
		}
		for _, key := range []string{"\n", "\x03"} {
			// script(1) gives the command a terminal of its own.
			line := shared.bin + " --state " + l.state
			for _, word := range create {
				line += " '" + word + "'"
			}
			cmd := exec.Command("script", "-qec", line, "/dev/null")
			stdin, err := cmd.StdinPipe()
			require.NoError(t, err)
			stdout, err := cmd.StdoutPipe()
			require.NoError(t, err)
			require.NoError(t, cmd.Start())
			said := ""
			buf := make([]byte, 4096)
			for !strings.Contains(said, "Press Enter") {
				n, err := stdout.Read(buf)
				require.NoError(t, err, said)
				said += string(buf[:n])
			}
			_, err = io.WriteString(stdin, key)
			require.NoError(t, err)
			rest, err := io.ReadAll(stdout)
			require.NoError(t, err)
			err = cmd.Wait()
			if key == "\n" {
				require.NoError(t, err, "%s%s", said, rest)
				id := regexp.MustCompile(`[0-9a-f]{64}`).FindString(string(rest))
				l.ok("base", "rm", id)
			} else {
				require.Equal(t, 130, cmd.ProcessState.ExitCode(), "%s%s", said, rest)
			}
			require.Empty(t, names(t, filepath.Join(l.state, "tmp")))
		}
	}
}
