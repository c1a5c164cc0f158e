package service

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestMountProcessIsReaped: a daemon keeps no dead mount processes among its children.
func TestMountProcessIsReaped(t *testing.T) {
	dir := t.TempDir()
	hold, pid := filepath.Join(dir, "hold"), filepath.Join(dir, "pid")
	require.NoError(t, unix.Mkfifo(hold, 0o600))
	script := "echo $$ > " + pid + "; echo ready >&3; exec 3>&-; read line < " + hold
	s, err := Open(t.Context(), Config{Dir: filepath.Join(dir, "state"), Program: []string{"/bin/sh", "-c", script}})
	require.NoError(t, err)
	defer closeNow(t, s)
	lk, err := tryLock(dir, unix.LOCK_EX)
	require.NoError(t, err)
	require.NoError(t, s.startMountProcess(t.Context(), "spec", filepath.Join(dir, "log"), lk))
	lk.unlock()
	b, err := os.ReadFile(pid)
	require.NoError(t, err)
	proc := filepath.Join("/proc", strings.TrimSpace(string(b)))
	require.DirExists(t, proc)
	require.NoError(t, os.WriteFile(hold, []byte("\n"), 0)) // it goes on, and ends
	require.Eventually(t, func() bool {
		_, err := os.Stat(proc)
		return os.IsNotExist(err)
	}, 10*time.Second, time.Millisecond)
}
