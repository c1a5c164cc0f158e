package integration

import (
	"archive/zip"
	"bytes"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"cloudlet/overlay"

	"github.com/stretchr/testify/require"
)

func TestBadWords(t *testing.T) {
	l := newEmptyLab(t)
	for _, tt := range []struct {
		name, words string
		args        []string
	}{
		{"command", `unknown command "frobnicate"`, []string{"frobnicate"}},
		{"sub command", `unknown command "frobnicate"`, []string{"base", "frobnicate"}},
		{"flag", "unknown flag: --frobnicate", []string{"run", "x", "--frobnicate"}},
		{"no argument", "run REF", []string{"run"}},
		{"two arguments", "run REF", []string{"run", "a", "b"}},
		{"no instance", "cloudlet stop INSTANCE", []string{"stop"}},
		{"export without file", "-o FILE", []string{"base", "export", "x"}},
		{"port", "-p", []string{"run", "x", "-p", "eighty"}},
		{"port too large", "65536", []string{"run", "x", "-p", "65536:80"}},
		{"probe", "--probe", []string{"run", "x", "--probe", "nonsense"}},
		{"name", `"Not Allowed"`, []string{"run", "x", "--name", "Not Allowed"}},
		{"hexadecimal name", `"abcdef"`, []string{"run", "x", "--name", "abcdef"}},
		{"paused with probe", "--paused", []string{"run", "x", "--paused", "--probe", "80/"}},
		{"status without probe", "--probe", []string{"run", "x", "--probe-status", "200"}},
		{"memory", "--memory", []string{"base", "create", "x", "--memory", "much"}},
		{"accelerator", `"warp"`, []string{"base", "create", "doc.go", "--accel", "warp", "--settle", "1s"}},
		{"initrd without kernel", "--kernel", []string{"base", "create", "x", "--initrd", "y"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := l.run(tt.args...)
			require.Equal(t, 2, r.code, r.stderr)
			require.Contains(t, r.stderr, tt.words)
			require.Empty(t, l.leftovers())
		})
	}
}

func TestBadReferences(t *testing.T) {
	l := newEmptyLab(t)
	dir := t.TempDir()
	other := filepath.Join(dir, "text")
	require.NoError(t, os.WriteFile(other, bytes.Repeat([]byte("no overlay\n"), 1000), 0o600))
	for _, tt := range []struct {
		name, words string
		code        int
		args        []string
	}{
		{"run", `"nothing"`, 3, []string{"run", "nothing"}},
		{"run text", "not a valid overlay", 5, []string{"run", other}},
		{"run folder", dir, 3, []string{"run", dir}},
		{"stop", `"nothing"`, 3, []string{"stop", "nothing"}},
		{"logs", `"nothing"`, 3, []string{"logs", "nothing"}},
		{"overlay create", `"nothing"`, 3, []string{"overlay", "create", "nothing"}},
		{"overlay show", `"nothing"`, 3, []string{"overlay", "show", "nothing"}},
		{"overlay import", "nothing", 3, []string{"overlay", "import", dir + "/nothing"}},
		{"overlay import text", "not a valid overlay", 5, []string{"overlay", "import", other}},
		{"overlay rm", `"nothing"`, 3, []string{"overlay", "rm", "nothing"}},
		{"base show", `"nothing"`, 3, []string{"base", "show", "nothing"}},
		{"base import", "nothing", 3, []string{"base", "import", dir + "/nothing"}},
		{"base export", `"nothing"`, 3, []string{"base", "export", "nothing", "-o", dir + "/out"}},
		{"base rm", `"nothing"`, 3, []string{"base", "rm", "nothing"}},
		{"base create", "nothing", 3, []string{"base", "create", dir + "/nothing", "--settle", "1s"}},
		{"mount", `"nothing"`, 3, []string{"mount", "nothing", dir}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := l.run(tt.args...)
			require.Equal(t, tt.code, r.code, r.stderr)
			require.Contains(t, r.stderr, tt.words)
			require.Empty(t, l.leftovers())
			require.Equal(t, []string{"text"}, names(t, dir))
		})
	}
}

func TestBadOverlays(t *testing.T) {
	file := launchFile(t)
	whole := read(t, file)
	l := newLab(t)
	dir := t.TempDir()
	flipped := func(at int) []byte {
		b := bytes.Clone(whole)
		b[at] ^= 0x20
		return b
	}
	newer := bytes.Replace(whole, []byte(fmt.Sprintf(`"version": %d`, overlay.FormatVersion)), []byte(`"version": 9`), 1)
	require.NotEqual(t, whole, newer)
	for _, tt := range []struct {
		name    string
		content []byte
	}{
		{"empty", nil},
		{"truncated head", whole[:1000]},
		{"truncated middle", whole[:len(whole)/2]},
		{"truncated end", whole[:len(whole)-1]},
		{"longer", append(bytes.Clone(whole), 0)},
		{"flipped head", flipped(200)},
		{"flipped middle", flipped(len(whole) / 2)},
		{"flipped directory", flipped(len(whole) - 60)},
		{"newer version", newer},
		{"zipped anew", rezip(t, whole)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(dir, "o")
			require.NoError(t, os.WriteFile(path, tt.content, 0o600))
			for _, verb := range []string{"import", "verify"} {
				r := l.run("overlay", verb, path)
				require.Equal(t, 5, r.code, r.stderr)
				require.NotEmpty(t, strings.TrimSpace(r.stderr))
				require.Empty(t, l.leftovers())
				require.Empty(t, l.overlays())
			}
			// Opening reads the head only: a frame is checked when it is read, and the zip's
			// directory, which repeats the head, by verify.
			if tt.name != "flipped middle" && tt.name != "flipped directory" {
				r := l.run("run", path)
				require.NotZero(t, r.code)
				require.Empty(t, l.leftovers(), r.stderr)
			}
		})
	}
	t.Run("base missing", func(t *testing.T) {
		empty := newEmptyLab(t)
		r := empty.fails(3, l.base, "run", file)
		require.Contains(t, r.stderr, "cloudlet base import")
		require.Empty(t, empty.leftovers())
		empty.fails(3, l.base, "mount", file, dir)
	})
}

// rezip writes the members of an overlay as an ordinary zip program would.
func rezip(t *testing.T, whole []byte) []byte {
	t.Helper()
	r, err := zip.NewReader(bytes.NewReader(whole), int64(len(whole)))
	require.NoError(t, err)
	var out bytes.Buffer
	w := zip.NewWriter(&out)
	for _, f := range r.File {
		src, err := f.Open()
		require.NoError(t, err)
		dst, err := w.Create(f.Name)
		require.NoError(t, err)
		_, err = io.Copy(dst, src)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return out.Bytes()
}

// smallBase makes a base zip of 16 pages each of memory and disk and returns its members.
func smallBase(t *testing.T) (path string, members map[string][]byte) {
	t.Helper()
	dir := t.TempDir()
	for i, name := range []string{"memory", "disk"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), bytes.Repeat([]byte{byte(i + 1)}, 16*overlay.PageSize), 0o600))
	}
	b, err := overlay.SealBase(t.Context(), dir, json.RawMessage(`{}`), nil)
	require.NoError(t, err)
	defer b.Close()
	path = filepath.Join(t.TempDir(), "base.zip")
	f, err := os.Create(path)
	require.NoError(t, err)
	require.NoError(t, b.Export(t.Context(), f, nil))
	require.NoError(t, f.Close())
	r, err := zip.OpenReader(path)
	require.NoError(t, err)
	defer r.Close()
	members = map[string][]byte{}
	for _, m := range r.File {
		src, err := m.Open()
		require.NoError(t, err)
		members[m.Name], err = io.ReadAll(src)
		require.NoError(t, err)
	}
	return path, members
}

// member is one member of a zip to be made; size, if set, is what its header says.
type member struct {
	name string
	data []byte
	size uint64
}

func writeZip(t *testing.T, path string, members []member) {
	t.Helper()
	var out bytes.Buffer
	w := zip.NewWriter(&out)
	for _, m := range members {
		h := &zip.FileHeader{Name: m.name, CRC32: crc32.ChecksumIEEE(m.data), CompressedSize64: uint64(len(m.data)), UncompressedSize64: uint64(len(m.data))}
		if m.size != 0 {
			h.UncompressedSize64, h.CompressedSize64 = m.size, m.size
		}
		dst, err := w.CreateRaw(h)
		require.NoError(t, err)
		_, err = dst.Write(m.data)
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	require.NoError(t, os.WriteFile(path, out.Bytes(), 0o600))
}

func TestBadBaseZips(t *testing.T) {
	l := newEmptyLab(t)
	good, content := smallBase(t)
	var order []string
	r, err := zip.OpenReader(good)
	require.NoError(t, err)
	for _, f := range r.File {
		order = append(order, f.Name)
	}
	require.NoError(t, r.Close())
	change := func(f func(name string, m *member) (keep bool)) []member {
		var out []member
		for _, name := range order {
			m := member{name: name, data: bytes.Clone(content[name])}
			if f(name, &m) {
				out = append(out, m)
			}
		}
		return out
	}
	same := func(string, *member) bool { return true }
	type bad struct {
		name, words string
		members     []member
	}
	tests := []bad{
		{"nothing", "manifest.json", nil},
		{"duplicate", "memory", append(change(same), member{name: "memory", data: content["memory"]})},
		{"traversing", "../escaped", append(change(same), member{name: "../escaped", data: []byte("x")})},
		{"absolute", "/tmp/escaped", append(change(same), member{name: "/tmp/escaped", data: []byte("x")})},
		{"unknown", "other", append(change(same), member{name: "other", data: []byte("x")})},
		{"oversized manifest", "manifest.json", change(func(name string, m *member) bool {
			if name == "manifest.json" {
				m.data = append(m.data, bytes.Repeat([]byte(" "), overlay.MaxBaseManifest)...)
			}
			return true
		})},
		{"says more than it has", "disk", change(func(name string, m *member) bool {
			if name == "disk" {
				m.size = 1 << 40
			}
			return true
		})},
	}
	for _, name := range order {
		tests = append(tests,
			bad{"missing " + name, name, change(func(n string, _ *member) bool { return n != name })},
			bad{"corrupted " + name, name, change(func(n string, m *member) bool {
				if n == name {
					m.data[len(m.data)/2] ^= 1
				}
				return true
			})},
			bad{"longer " + name, name, change(func(n string, m *member) bool {
				if n == name {
					m.data = append(m.data, make([]byte, overlay.PageSize)...)
				}
				return true
			})})
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "bad.zip")
			writeZip(t, path, tt.members)
			r := l.run("base", "import", path)
			require.Equal(t, 5, r.code, r.stderr)
			require.Contains(t, r.stderr, tt.words)
			require.Empty(t, l.leftovers())
			require.Empty(t, names(t, filepath.Join(l.state, "bases")))
			require.NoFileExists(t, "/tmp/escaped")
		})
	}
	t.Run("bomb", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "bomb.zip")
		f, err := os.Create(path)
		require.NoError(t, err)
		w := zip.NewWriter(f)
		for _, name := range order {
			dst, err := w.Create(name) // deflated
			require.NoError(t, err)
			_, err = dst.Write(content[name])
			require.NoError(t, err)
			if name == "memory" {
				for range 512 {
					_, err := dst.Write(make([]byte, 1<<20))
					require.NoError(t, err)
				}
			}
		}
		require.NoError(t, w.Close())
		require.NoError(t, f.Close())
		within(t, 10*time.Second, "refusing a bomb", func() { l.fails(5, "memory", "base", "import", path) })
		require.Empty(t, l.leftovers())
	})
	t.Run("no state", func(t *testing.T) {
		id := l.ok("base", "import", good)
		l.fails(2, "no device state", "run", id)
		require.Empty(t, l.leftovers())
		l.ok("base", "verify", id)
	})
}

func TestBadPorts(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer listener.Close()
	port := listener.Addr().(*net.TCPAddr).Port
	r := l.run("run", file, "-p", fmt.Sprintf("%d:8080", port))
	require.Equal(t, 4, r.code, r.stderr)
	require.Contains(t, r.stderr, fmt.Sprintf("port 127.0.0.1:%d is in use", port))
	require.Contains(t, r.stderr, "-p")
	require.Empty(t, l.leftovers())

	in := l.start(file, "--name", "once")
	l.fails(4, in.ID, "run", file, "--name", "once")
	l.clear("after a name was taken")
}

func TestProbeUnanswered(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	r := l.fails(7, "did not answer", "run", file, "--probe", "81/", "--timeout", "2s")
	require.Contains(t, r.stderr, "last:")
	require.Empty(t, l.leftovers())
	l.fails(7, "status 404", "run", file, "--probe", "8080/nothing", "--timeout", "2s")
	require.Empty(t, l.leftovers())
	l.fails(7, "did not answer", "run", file, "--probe", "81/", "--timeout", "2s", "--keep", "--name", "kept")
	list := l.list()
	require.Len(t, list, 1)
	require.Equal(t, "running", string(list[0].State))
	l.ok("logs", "kept")
	l.clear("after a probe that was not answered")
}

func TestRemoveInUse(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	id := l.ok("overlay", "import", file)
	l.fails(4, "in use by overlay", "base", "rm", l.base)
	in := l.start(id)
	l.fails(4, "in use by instance", "overlay", "rm", id)
	l.fails(4, "stop it first", "rm", in.ID)
	child := l.capture(in.ID)
	l.ok("rm", "-f", in.ID)
	l.fails(4, "in use by overlay", "overlay", "rm", id)
	l.ok("overlay", "rm", child.ID)

	dir := t.TempDir()
	cmd, ended := l.mount(id, dir)
	l.fails(4, "being read", "overlay", "rm", id)
	t.Run("mountpoint in use", func(t *testing.T) {
		r := l.run("mount", id, dir)
		require.Equal(t, 4, r.code, r.stderr)
		require.Contains(t, r.stderr, dir)
	})
	require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
	require.NoError(t, l.await(cmd, ended, []string{"mount"}))
	l.ok("overlay", "rm", id)
	l.ok("base", "rm", l.base)
	require.Empty(t, names(t, filepath.Join(l.state, "bases")))
}

func TestBadMountpoints(t *testing.T) {
	l := newLab(t)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "file"), nil, 0o600))
	inside := filepath.Join(l.state, "bases", "here")
	require.NoError(t, os.Mkdir(inside, 0o700))
	for _, tt := range []struct {
		name, dir, words string
		code             int
	}{
		{"missing", filepath.Join(dir, "missing"), "mkdir", 3},
		{"file", filepath.Join(dir, "file"), "directory", 2},
		{"not empty", dir, "empty", 2},
		{"inside the state folder", inside, "state folder", 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := l.run("mount", l.base, tt.dir)
			require.Equal(t, tt.code, r.code, r.stderr)
			require.Contains(t, r.stderr, tt.words)
			require.Contains(t, r.stderr, tt.dir)
		})
	}
	require.NoError(t, os.Remove(inside))
}

// mount mounts ref on dir as a person does, and returns when it can be read.
func (l *lab) mount(ref, dir string) (*exec.Cmd, <-chan error) {
	l.t.Helper()
	cmd := l.command("mount", ref, dir)
	require.NoError(l.t, cmd.Start())
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	eventually(l.t, "no mount", func() bool {
		_, err := os.Stat(filepath.Join(dir, "info.json"))
		return err == nil
	})
	return cmd, ended
}
