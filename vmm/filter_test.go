package vmm

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// What the filter leaves of some calls, in a process of its own: for a VM that is booted, whose
// memory is its own, and for one that is resumed.
func TestFilter(t *testing.T) {
	const blocks = 32 * pageSize
	exe, err := os.Executable()
	require.NoError(t, err)
	for name, tt := range map[string]struct {
		argv []string
		want map[string]string
	}{
		"booted":  {[]string{"qemu"}, map[string]string{"huge": "", "will need": "ENOMEM", "page": "hole", "pages": "hole"}},
		"resumed": {[]string{"qemu", "-S", "-incoming", "defer"}, map[string]string{"huge": "", "will need": "", "page": "as before", "pages": "hole"}},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "file")
			require.NoError(t, os.WriteFile(path, bytes.Repeat([]byte{7}, 2*blocks), 0o600))
			out, err := exec.CommandContext(t.Context(), exe, append([]string{"filtered", path}, tt.argv...)...).CombinedOutput()
			require.NoError(t, err, "%s", out)
			var got map[string]string
			require.NoError(t, json.Unmarshal(out, &got), "%s", out)
			require.Equal(t, tt.want, got)
		})
	}
}

// filteredProcess installs the filter and says what became of calls.
func filteredProcess(path string, argv []string) int {
	result, err := callFiltered(path, argv)
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(result)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func callFiltered(path string, argv []string) (map[string]string, error) {
	const hole = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	mem, err := unix.Mmap(int(f.Fd()), 0, 8*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	if err := filterQEMU(argv); err != nil {
		return nil, err
	}
	out := map[string]string{}
	// Advice about what is not mapped is refused, if it is heard at all.
	if _, _, errno := unix.Syscall(unix.SYS_MUNMAP, uintptr(unsafe.Pointer(&mem[pageSize])), pageSize, 0); errno != 0 {
		return nil, errno
	}
	advise := func(name string, advice int) {
		if err := unix.Madvise(mem[pageSize:2*pageSize], advice); err != nil {
			out[name] = unix.ErrnoName(err.(unix.Errno))
		} else {
			out[name] = ""
		}
	}
	advise("huge", unix.MADV_HUGEPAGE)
	advise("will need", unix.MADV_WILLNEED)
	for name, at := range map[string][2]int64{"page": {0, pageSize}, "pages": {32 * pageSize, 16 * pageSize}} {
		if err := unix.Fallocate(int(f.Fd()), hole, at[0], at[1]); err != nil {
			return nil, err
		}
		p := make([]byte, at[1])
		if _, err := f.ReadAt(p, at[0]); err != nil {
			return nil, err
		}
		switch {
		case bytes.Equal(p, make([]byte, len(p))):
			out[name] = "hole"
		case bytes.Equal(p, bytes.Repeat([]byte{7}, len(p))):
			out[name] = "as before"
		default:
			out[name] = "else"
		}
	}
	return out, nil
}
