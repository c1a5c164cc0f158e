package guest

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"cloudlet/integration/need"
)

func TestCpioBytes(t *testing.T) {
	var b bytes.Buffer
	c := &cpioWriter{w: &b}
	c.folder("d")
	c.file("d/f", 0o755, []byte("hello"))
	c.device("null", 0o666, 1, 3)
	require.NoError(t, c.close())
	want := strings.Join([]string{
		"070701" + "00000001" + "000041ed" + "00000000" + "00000000" + "00000002" + "00000000" + "00000000" +
			"00000000" + "00000000" + "00000000" + "00000000" + "00000002" + "00000000" + "d\x00",
		"070701" + "00000002" + "000081ed" + "00000000" + "00000000" + "00000001" + "00000000" + "00000005" +
			"00000000" + "00000000" + "00000000" + "00000000" + "00000004" + "00000000" + "d/f\x00\x00\x00hello\x00\x00\x00",
		"070701" + "00000003" + "000021b6" + "00000000" + "00000000" + "00000001" + "00000000" + "00000000" +
			"00000000" + "00000000" + "00000001" + "00000003" + "00000005" + "00000000" + "null\x00\x00",
		"070701" + "00000004" + "00000000" + "00000000" + "00000000" + "00000001" + "00000000" + "00000000" +
			"00000000" + "00000000" + "00000000" + "00000000" + "0000000b" + "00000000" + "TRAILER!!!\x00\x00\x00\x00",
	}, "")
	require.Equal(t, want, b.String())
}

// TestCpioProgram has the archive read by the cpio program, where there is one.
func TestCpioProgram(t *testing.T) {
	cpio := need.Program(t, "cpio")
	var b bytes.Buffer
	c := &cpioWriter{w: &b}
	c.folder("d")
	contents := map[string]int{"d/0": 0, "d/1": 1, "d/3": 3, "d/4": 4, "d/5": 5, "d/large": 70001}
	for name, n := range contents {
		c.file(name, 0o640, bytes.Repeat([]byte{'x'}, n))
	}
	require.NoError(t, c.close())
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), cpio, "-i", "--quiet")
	cmd.Dir, cmd.Stdin = dir, &b
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	for name, n := range contents {
		p, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		require.Equal(t, bytes.Repeat([]byte{'x'}, n), append([]byte{}, p...), name)
	}
}

type brokenWriter struct{ left int }

var errBroken = errors.New("broken")

func (w *brokenWriter) Write(p []byte) (int, error) {
	if w.left--; w.left < 0 {
		return 0, errBroken
	}
	return len(p), nil
}

func TestCpioWriteError(t *testing.T) {
	for calls := range 5 {
		c := &cpioWriter{w: &brokenWriter{left: calls}}
		c.folder("d")
		c.file("d/f", 0o644, []byte("hello"))
		require.ErrorIs(t, c.close(), errBroken, "error of call %d", calls)
	}
}
