package fusefs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestErrno(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		want syscall.Errno
	}{
		{"none", nil, 0},
		{"killed", errKilled, syscall.EINTR},
		{"aborted", errAborted, syscall.EIO},
		{"aborted and cancelled", errors.Join(context.Canceled, errAborted), syscall.EIO},
		{"cancelled", context.Canceled, syscall.EINTR},
		{"deadline", context.DeadlineExceeded, syscall.ETIMEDOUT},
		{"short", io.ErrUnexpectedEOF, syscall.EIO},
		{"ENOSYS", syscall.ENOSYS, syscall.EIO},
		{"other errno", syscall.EACCES, syscall.EIO},
		{"panic", &panicError{value: "boom"}, syscall.EIO},
		{"unknown", errors.New("x"), syscall.EIO},
	} {
		t.Run(c.name, func(t *testing.T) {
			require.Equal(t, c.want, errno(c.err))
			if c.err != nil {
				require.Equal(t, c.want, errno(fmt.Errorf("read frame: %w", fmt.Errorf("deeper: %w", c.err))))
			}
		})
	}
}

func TestKillPending(t *testing.T) {
	for _, c := range []struct {
		name, status string
		want         bool
	}{
		{"empty", "", false},
		{"running", "Name:\tx\nState:\tR (running)\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000000\n", false},
		{"other signal", "State:\tD (disk sleep)\nSigPnd:\t0000000000000200\nShdPnd:\t0000000000004000\n", false},
		{"thread killed", "State:\tD (disk sleep)\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n", true},
		{"process killed", "State:\tD (disk sleep)\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000100\n", true},
		{"zombie", "State:\tZ (zombie)\n", true},
		{"name like a field", "Name:\tSigPnd: 100\nState:\tS (sleeping)\n", false},
	} {
		t.Run(c.name, func(t *testing.T) { require.Equal(t, c.want, killPending([]byte(c.status))) })
	}
	require.False(t, killed(uint32(os.Getpid())))
	require.False(t, killed(0))
	require.True(t, killed(1<<31-1))
}

func TestParseMountinfo(t *testing.T) {
	const text = `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue
40 35 0:52 / /a\040b\011\134c rw,nosuid,nodev - fuse.cloudlet x rw,user_id=0
`
	m, err := parseMountinfo(strings.NewReader(text))
	require.NoError(t, err)
	require.Equal(t, []mountEntry{
		{98, 0, "/mnt2", "ext3", "/dev/root"},
		{0, 52, "/a b\t\\c", "fuse.cloudlet", "x"},
	}, m)
	require.Equal(t, "0:52", m[1].bdi())
	require.Equal(t, "52", m[1].connection())
	require.True(t, m[1].isOurs())
	for _, bad := range []string{"x\n", "36 35 zz /mnt1 /mnt2 rw - ext3 x\n"} {
		_, err := parseMountinfo(strings.NewReader(bad))
		require.Error(t, err)
	}
}

func TestSource(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"default", "", "cloudlet"},
		{"plain", "cloudlet:ab12-c_d@x/y", "cloudlet:ab12-c_d@x/y"},
		{"options", `a,allow_other\,b`, "a_allow_other__b"},
		{"control characters", "a\nb\x00ü", "a_b__"},
		{"long", strings.Repeat("x", 999), strings.Repeat("x", maxSourceLen)},
	} {
		t.Run(c.name, func(t *testing.T) { require.Equal(t, c.want, (&Options{Name: c.in}).source()) })
	}
}

func TestAllowed(t *testing.T) {
	require.True(t, allowed(0, 1000))
	require.True(t, allowed(1000, 1000))
	require.False(t, allowed(1001, 1000))
	require.False(t, allowed(-1, 1000))
	require.False(t, allowed(1000, 0))
}
