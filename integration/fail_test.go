package integration

import (
	"bytes"
	"errors"
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
	"cloudlet/integration/cloudlets"

	"github.com/stretchr/testify/require"
)

// commandBound is how long any command of the failure tests may take: what takes longer hangs.
const commandBound = 90 * time.Second

var (
	launchOnce sync.Once
	launchErr  error
)

// launchFile returns the file of an overlay of the test guest's base, made once.
func launchFile(t *testing.T) string {
	t.Helper()
	l := newLab(t) // builds what is shared
	path := filepath.Join(filepath.Dir(shared.dir), "launch.overlay")
	launchOnce.Do(func() {
		in := l.start(l.base)
		ask(t, in, "GET", "/")
		r := l.run("overlay", "create", in.ID, "-o", path)
		if r.code != 0 {
			launchErr = fmt.Errorf("make the launch overlay: %s", r.stderr)
		}
	})
	require.NoError(t, launchErr)
	return path
}

// cut starts a command, sends it a signal after a delay and waits for its end. It fails the
// test if the command hangs.
func (l *lab) cut(sig syscall.Signal, after time.Duration, args ...string) result {
	l.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(shared.bin, append([]string{"--state", l.state}, args...)...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	require.NoError(l.t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	timer := time.NewTimer(after)
	defer timer.Stop()
	var err error
	select {
	case err = <-ended: // before the signal
	case <-timer.C:
		_ = cmd.Process.Signal(sig) // it may have ended in this moment
		err = l.await(cmd, ended, args)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		l.t.Fatalf("run cloudlet %v: %v", args, err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// await waits for a command's end for as long as a command may take.
func (l *lab) await(cmd *exec.Cmd, ended <-chan error, args []string) error {
	l.t.Helper()
	select {
	case err := <-ended:
		return err
	case <-time.After(commandBound):
		_ = cmd.Process.Kill()
		<-ended
		l.t.Fatalf("cloudlet %v did not end within %v", args, commandBound)
		return nil
	}
}

// list returns all instances, also those that have ended.
func (l *lab) list() []api.Instance {
	l.t.Helper()
	var list []api.Instance
	l.json(&list, "ps", "--all")
	return list
}

// clear removes all instances and requires that nothing is left of them.
func (l *lab) clear(after string) {
	l.t.Helper()
	for _, in := range l.list() {
		l.ok("rm", "--force", in.ID)
	}
	require.Empty(l.t, l.leftovers(), after)
}

// pidOf returns the process whose command line contains all words.
func pidOf(t *testing.T, words ...string) int {
	t.Helper()
	found := 0
	for pid, args := range cloudlets.Processes("") {
		all := true
		for _, w := range words {
			all = all && strings.Contains(args, w)
		}
		if all {
			require.Zero(t, found, "two processes have %q", words)
			found = pid
		}
	}
	require.NotZero(t, found, "no process has %q", words)
	return found
}

// kill ends a process by SIGKILL and waits until it has gone.
func kill(t *testing.T, pid int) {
	t.Helper()
	require.NoError(t, syscall.Kill(pid, syscall.SIGKILL))
	eventually(t, fmt.Sprintf("process %d does not go", pid), func() bool { return dead(pid) })
}

// dead reports whether nothing of a process runs any more: its first thread may be gone while
// others still hold its files.
func dead(pid int) bool {
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	return err != nil || state(pid) == 0 || state(pid) == 'Z' && len(threads) == 1
}

// state returns the state letter of a process, 0 if it is gone.
func state(pid int) byte {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	rest := b[bytes.LastIndexByte(b, ')')+1:]
	return bytes.TrimSpace(rest)[0]
}

// within runs f and requires that it takes less than most.
func within(t *testing.T, most time.Duration, what string, f func()) {
	t.Helper()
	start := time.Now()
	f()
	require.Less(t, time.Since(start), most, what)
}
