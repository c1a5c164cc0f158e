package fusefs

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"cloudlet/integration/need"
)

// roleEnv makes the test binary another process: a client of a mount, since the process
// that serves a mount must not use it, or a server that can be killed.
const roleEnv = "CLOUDLET_FUSEFS_TEST_ROLE"

const patience = 10 * time.Second

// init keeps the first thread of another process free: the kernel gives it the signals of the
// process, which nobody takes while it waits for a page.
func init() {
	if os.Getenv(roleEnv) != "" {
		runtime.LockOSThread()
	}
}

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		done := make(chan string)
		go func() {
			out, err := roles[role](os.Args[1:])
			if err != nil {
				out = "error " + errnoName(err)
			}
			done <- out
		}()
		fmt.Println(<-done)
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func errnoName(err error) string {
	var e syscall.Errno
	if errors.As(err, &e) {
		return unix.ErrnoName(e)
	}
	return err.Error()
}

// roles are what the other processes do; each returns a line for stdout.
var roles = map[string]func(args []string) (string, error){
	"hash":   hashRole,
	"pread":  preadRole,
	"touch":  touchRole,
	"cow":    cowRole,
	"change": changeRole,
	"keep":   keepRole,
	"serve":  serveRole,
	"fault":  faultRole,
	"drain":  drainRole,

	"scribble": scribbleRole,
}

// hashRole: PATH read|private|shared.
func hashRole(args []string) (string, error) {
	f, err := os.Open(args[0])
	if err != nil {
		return "", err
	}
	h := sha256.New()
	if args[1] == "read" {
		_, err := io.CopyBuffer(h, struct{ io.Reader }{f}, make([]byte, 1<<20))
		return fmt.Sprintf("%x", h.Sum(nil)), err
	}
	flags := unix.MAP_PRIVATE
	if args[1] == "shared" {
		flags = unix.MAP_SHARED
	}
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	p, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, flags)
	if err != nil {
		return "", err
	}
	h.Write(p)
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}

// preadRole: PATH OFF N; prints what was read.
func preadRole(args []string) (string, error) {
	f, err := os.Open(args[0])
	if err != nil {
		return "", err
	}
	off, _ := strconv.ParseInt(args[1], 10, 64)
	n, _ := strconv.Atoi(args[2])
	p := make([]byte, n)
	n, err = unix.Pread(int(f.Fd()), p, off)
	return fmt.Sprintf("%x", p[:max(n, 0)]), err
}

// touchRole: PATH OFF normal|random [signals]; maps PATH privately, touches a byte and
// prints it, or "fault". With signals it says so when a handler is there.
func touchRole(args []string) (out string, err error) {
	f, err := os.OpenFile(args[0], os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	p, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		return "", err
	}
	if args[2] == "random" {
		if err := unix.Madvise(p, unix.MADV_RANDOM); err != nil {
			return "", err
		}
	}
	signal.Notify(make(chan os.Signal, 100), syscall.SIGUSR1)
	fmt.Println("ready")
	off, _ := strconv.Atoi(args[1])
	debug.SetPanicOnFault(true)
	defer func() {
		if recover() != nil {
			out = "fault"
		}
	}()
	return fmt.Sprintf("%02x", p[off]), nil
}

// cowRole: PATH; writes to every page of a private mapping and reads it back.
func cowRole(args []string) (string, error) {
	f, err := os.OpenFile(args[0], os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	p, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		return "", err
	}
	for i := 0; i < len(p); i += 4096 {
		p[i] ^= 0xff
	}
	return "ok", nil
}

// changeRole: DIR NAME; tries every way to change it and prints "what=ERRNO" for each.
func changeRole(args []string) (string, error) {
	dir, path := args[0], filepath.Join(args[0], args[1])
	fd, err := unix.Open(path, unix.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	writeOnly := func(flags int) func() error {
		return func() error {
			fd, err := unix.Open(path, flags, 0)
			if err == nil {
				unix.Close(fd)
			}
			return err
		}
	}
	var out []string
	for _, try := range []struct {
		name string
		do   func() error
	}{
		{"write", func() error { _, err := unix.Pwrite(fd, []byte("x"), 5000); return err }},
		{"ftruncate", func() error { return unix.Ftruncate(fd, 1) }},
		{"fallocate", func() error { return unix.Fallocate(fd, 0, 0, 4096) }},
		{"punch", func() error {
			return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096)
		}},
		{"open-trunc", writeOnly(unix.O_RDWR | unix.O_TRUNC)},
		{"open-wronly", writeOnly(unix.O_WRONLY)},
		{"chmod", func() error { return unix.Chmod(path, 0o644) }},
		{"utimes", func() error { return unix.Utimes(path, make([]unix.Timeval, 2)) }},
		{"unlink", func() error { return unix.Unlink(path) }},
		{"rename", func() error { return unix.Rename(path, path+"2") }},
		{"link", func() error { return unix.Link(path, path+"2") }},
		{"symlink", func() error { return unix.Symlink("a", filepath.Join(dir, "l")) }},
		{"mkdir", func() error { return unix.Mkdir(filepath.Join(dir, "d"), 0o755) }},
		{"rmdir", func() error { return unix.Rmdir(filepath.Join(dir, "d")) }},
		{"mknod", func() error { return unix.Mknod(filepath.Join(dir, "n"), unix.S_IFIFO|0o600, 0) }},
		{"create", func() error {
			fd, err := unix.Open(filepath.Join(dir, "new"), unix.O_CREAT|unix.O_WRONLY, 0o600)
			if err == nil {
				unix.Close(fd)
			}
			return err
		}},
		{"setxattr", func() error { return unix.Setxattr(path, "user.a", []byte("b"), 0) }},
		{"getxattr", func() error { _, err := unix.Getxattr(path, "user.a", make([]byte, 9)); return err }},
		{"listxattr", func() error { _, err := unix.Listxattr(path, make([]byte, 9)); return err }},
		{"removexattr", func() error { return unix.Removexattr(path, "user.a") }},
		{"chown", func() error { return unix.Chown(path, 12, 34) }},
		{"fsync", func() error { return unix.Fsync(fd) }},
	} {
		name := "0"
		if err := try.do(); err != nil {
			name = errnoName(err)
		}
		out = append(out, try.name+"="+name)
	}
	return strings.Join(out, " "), unix.Close(fd)
}

// keepRole: PATH; keeps it open until stdin ends.
func keepRole(args []string) (string, error) {
	f, err := os.Open(args[0])
	if err != nil {
		return "", err
	}
	fmt.Println("ready")
	_, err = io.Copy(io.Discard, os.Stdin)
	return "ok", errors.Join(err, f.Close())
}

// scribbleRole: PATH; maps it, writes to it, and says whether the mapping shows what it
// showed before.
func scribbleRole(args []string) (string, error) {
	fd, err := unix.Open(args[0], unix.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	p, err := unix.Mmap(fd, 0, 1<<16, unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return "", err
	}
	before := bytes.Clone(p)
	_, err = unix.Pwrite(fd, bytes.Repeat([]byte("scribble"), 1000), 5000)
	out := "write " + errnoName(err)
	for range 100 {
		if bytes.Equal(before, p) {
			return out + ", content restored", nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return out + ", content changed", nil
}

// drainRole: PATH; waits for the end of stdin, then reads all of it.
func drainRole(args []string) (string, error) {
	f, err := os.Open(args[0])
	if err != nil {
		return "", err
	}
	p := make([]byte, 1<<20)
	fmt.Println("ready")
	if _, err := io.Copy(io.Discard, os.Stdin); err != nil {
		return "", err
	}
	for {
		if _, err := f.Read(p); err == io.EOF {
			return "ok", f.Close()
		} else if err != nil {
			return "", err
		}
	}
}

// serveRole: DIR; serves memory that never answers beyond its first MiB, until killed.
func serveRole(args []string) (string, error) {
	memory := newTestFile(2 << 20)
	memory.block.Store(1 << 20)
	s, err := Mount(args[0], Options{Memory: memory, Disk: newTestFile(1 << 20)})
	if err != nil {
		return "", err
	}
	fmt.Println("ready")
	return "ok", s.Wait()
}

// faultRole: PATH COUNT; maps PATH and touches COUNT pages far apart.
func faultRole(args []string) (string, error) {
	f, err := os.Open(args[0])
	if err != nil {
		return "", err
	}
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	p, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return "", err
	}
	if err := unix.Madvise(p, unix.MADV_RANDOM); err != nil {
		return "", err
	}
	count, _ := strconv.Atoi(args[1])
	sum, start := byte(0), time.Now()
	for i := range count {
		sum += p[i*(len(p)/count)&^4095]
	}
	return fmt.Sprintf("%d %d", time.Since(start).Nanoseconds()/int64(count), sum), nil
}

// testFile is a File with made-up content that misbehaves on demand.
type testFile struct {
	content []byte
	calls   atomic.Int64
	// block is the offset from which reads wait until their ctx ends or release is closed.
	block   atomic.Int64
	release chan struct{}

	mu   sync.Mutex
	fail func(off int64) error
}

func newTestFile(size int) *testFile {
	f := &testFile{content: make([]byte, size), release: make(chan struct{})}
	x := uint32(size) + 1
	for i := range f.content {
		x = x*1664525 + 1013904223
		f.content[i] = byte(x >> 24)
	}
	f.block.Store(1 << 62)
	return f
}

func (f *testFile) failWith(fail func(off int64) error) {
	f.mu.Lock()
	f.fail = fail
	f.mu.Unlock()
}

func (f *testFile) Size() int64 { return int64(len(f.content)) }

func (f *testFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	f.calls.Add(1)
	if off+int64(len(p)) > f.block.Load() {
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("fetch frame: %w", ctx.Err())
		case <-f.release:
		}
	}
	f.mu.Lock()
	fail := f.fail
	f.mu.Unlock()
	if fail != nil {
		if err := fail(off); err != nil {
			return 0, err
		}
	}
	n := copy(p, f.content[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *testFile) hash() string { return fmt.Sprintf("%x", sha256.Sum256(f.content)) }

// needFUSE skips the test where FUSE cannot be mounted.
func needFUSE(t testing.TB) {
	t.Helper()
	s, err := Mount(t.TempDir(), Options{Memory: bytesFile("m"), Disk: bytesFile("d")})
	need.No(t, err, ErrUnavailable)
	require.NoError(t, s.Unmount(t.Context()))
}

// mount mounts o for the time of the test.
func mount(t testing.TB, o Options) (*Server, string) {
	t.Helper()
	needFUSE(t)
	dir := t.TempDir()
	if o.Memory == nil {
		o.Memory = newTestFile(1 << 20)
	}
	if o.Disk == nil {
		o.Disk = newTestFile(1 << 20)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	s, err := Mount(dir, o)
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := s.ForceUnmount(ctx); err != nil {
			t.Error(err)
		}
		if _, found, err := findMount(dir); err != nil || found {
			t.Errorf("mount table still has %s: %v", dir, err)
		}
	})
	return s, dir
}

// process is the test binary in another role.
type process struct {
	*exec.Cmd
	stdin  io.WriteCloser
	lines  *bufio.Reader
	stderr bytes.Buffer
	exited chan struct{}
}

func start(t testing.TB, role string, args ...string) *process {
	t.Helper()
	exe, err := os.Executable()
	require.NoError(t, err)
	p := &process{Cmd: exec.Command(exe, args...), exited: make(chan struct{})}
	// Without the option the race detector would sleep for a second at each exit.
	p.Env = append(os.Environ(), roleEnv+"="+role, "GORACE=atexit_sleep_ms=0")
	p.Cmd.Stderr = &p.stderr
	p.stdin, err = p.StdinPipe()
	require.NoError(t, err)
	r, w, err := os.Pipe()
	require.NoError(t, err)
	p.Stdout = w
	p.lines = bufio.NewReader(r)
	require.NoError(t, p.Start())
	require.NoError(t, w.Close())
	go func() {
		_ = p.Wait()
		close(p.exited)
	}()
	t.Cleanup(func() {
		_ = p.Process.Kill()
		<-p.exited
		r.Close()
	})
	return p
}

func (p *process) line(t testing.TB) string {
	t.Helper()
	s, err := p.lines.ReadString('\n')
	require.NoError(t, err, "%s", &p.stderr)
	return strings.TrimSpace(s)
}

// dies requires that p ends soon.
func (p *process) dies(t testing.TB) {
	t.Helper()
	select {
	case <-p.exited:
	case <-time.After(patience):
		status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
		require.Fail(t, "process does not end", "%s", status)
	}
}

// client runs a role to its end and returns its line.
func client(t testing.TB, role string, args ...string) string {
	t.Helper()
	p := start(t, role, args...)
	line := p.line(t)
	if line == "ready" {
		line = p.line(t)
	}
	p.dies(t)
	return line
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	require.Eventually(t, ok, patience, 5*time.Millisecond, what)
}
