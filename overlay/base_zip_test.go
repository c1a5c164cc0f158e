package overlay

import (
	"archive/zip"
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"cloudlet/integration/need"
)

func exportTestBase(t testing.TB, b *Base) []byte {
	var buf bytes.Buffer
	require.NoError(t, b.Export(t.Context(), &buf, nil))
	return buf.Bytes()
}

// importBytes imports a zip and demands that a refused one leaves nothing.
func importBytes(t testing.TB, data []byte) (*Base, error) {
	root := t.TempDir()
	path := filepath.Join(root, "base.zip")
	require.NoError(t, os.WriteFile(path, data, 0o600))
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	dir := filepath.Join(root, "new")
	b, err := ImportBase(t.Context(), dir, f, nil)
	if err != nil {
		require.NoDirExists(t, dir)
		return nil, err
	}
	t.Cleanup(func() { require.NoError(t, b.Close()) })
	return b, nil
}

func TestExportImport(t *testing.T) {
	f := newBaseFixture(t, t.TempDir(), 3000, 2111)
	copy(f.images[Disk][1<<20:], make([]byte, 6<<20)) // a hole of whole blocks
	f.write(t, "disk", f.images[Disk])
	b := f.seal(t)
	data := exportTestBase(t, b)
	require.True(t, bytes.Equal(data, exportTestBase(t, b)), "the same bytes each time")

	zr, err := zip.NewReader(bytes.NewReader(data), int64(len(data)))
	require.NoError(t, err)
	var names []string
	for _, m := range zr.File {
		names = append(names, m.Name)
	}
	require.Equal(t, []string{"manifest.json", "disk", "memory", "disk.sha256", "memory.sha256", "state", "kernel"}, names)

	got, err := importBytes(t, data)
	require.NoError(t, err)
	require.Equal(t, b.ID(), got.ID())
	require.NoError(t, got.Verify(t.Context(), nil))
	for _, s := range Spaces {
		p := make([]byte, len(f.images[s]))
		require.NoError(t, got.ReadVerified(s, p, 0))
		require.True(t, bytes.Equal(f.images[s], p))
		require.FileExists(t, filepath.Join(got.Dir(), baseSumsName(s)))
	}
	require.True(t, bytes.Equal(data, exportTestBase(t, got)))
	_, err = ImportBase(t.Context(), got.Dir(), nil, nil)
	require.ErrorIs(t, err, os.ErrExist)
}

func TestExportReadByUnzip(t *testing.T) {
	unzip := need.Program(t, "unzip")
	path := filepath.Join(t.TempDir(), "base.zip")
	require.NoError(t, os.WriteFile(path, exportTestBase(t, newBaseFixture(t, t.TempDir(), 700, 300).seal(t)), 0o600))
	out, err := exec.CommandContext(t.Context(), unzip, "-t", path).CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "No errors detected")
}

func TestExportRefusesDamage(t *testing.T) {
	b := newBaseFixture(t, t.TempDir(), 1000, 1000).seal(t)
	flipByte(t, b.Path("disk"), 4*PageSize)
	require.ErrorContains(t, b.Export(t.Context(), io.Discard, nil), "disk page 4 does not match")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, b.Export(ctx, io.Discard, nil), context.Canceled)
}

func TestImportWithoutState(t *testing.T) {
	f := newBaseFixture(t, t.TempDir(), 10, 10)
	require.NoError(t, os.Remove(filepath.Join(f.dir, "state")))
	b, err := importBytes(t, exportTestBase(t, f.seal(t)))
	require.NoError(t, err)
	require.False(t, b.Resumable())
	state, err := b.State()
	require.NoError(t, err)
	require.Nil(t, state)
}

func TestImportCancelled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "base.zip")
	require.NoError(t, os.WriteFile(path, exportTestBase(t, newBaseFixture(t, t.TempDir(), 1000, 1000).seal(t)), 0o600))
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	ctx, cancel := context.WithCancel(t.Context())
	dir := filepath.Join(t.TempDir(), "new")
	_, err = ImportBase(ctx, dir, f, func(_ string, done, _ int64) {
		if done > 1<<20 {
			cancel()
		}
	})
	require.ErrorIs(t, err, context.Canceled)
	require.NoDirExists(t, dir)
}

// testMember is a member as a test wants it written, right or wrong.
type testMember struct {
	h    zip.FileHeader
	data []byte
}

// unpackBaseZip returns the members of a zip, stored.
func unpackBaseZip(t testing.TB, data []byte) []testMember {
	zr, err := zip.NewReader(bytes.NewReader(data), int64(len(data)))
	require.NoError(t, err)
	var list []testMember
	for _, f := range zr.File {
		r, err := f.Open()
		require.NoError(t, err)
		p, err := io.ReadAll(r)
		require.NoError(t, err)
		h := zip.FileHeader{
			Name: f.Name, Method: zip.Store, CRC32: crc32.ChecksumIEEE(p),
			CompressedSize64: uint64(len(p)), UncompressedSize64: uint64(len(p)),
		}
		h.SetMode(0o644)
		list = append(list, testMember{h, p})
	}
	return list
}

func packBaseZip(t testing.TB, list []testMember) []byte {
	var buf bytes.Buffer
	zw := zip.NewWriter(&buf)
	for _, m := range list {
		h := m.h
		w, err := zw.CreateRaw(&h)
		require.NoError(t, err)
		_, err = w.Write(m.data)
		require.NoError(t, err)
	}
	require.NoError(t, zw.Close())
	return buf.Bytes()
}

func (m *testMember) set(data []byte) {
	m.data = data
	m.h.CRC32 = crc32.ChecksumIEEE(data)
	m.h.CompressedSize64, m.h.UncompressedSize64 = uint64(len(data)), uint64(len(data))
}

// member indices in unpackBaseZip of a fixture
const (
	zipManifest = iota
	zipDisk
	zipMemory
	zipDiskList
	zipMemoryList
	zipState
	zipKernel
)

func TestImportRefuses(t *testing.T) {
	good := unpackBaseZip(t, exportTestBase(t, newBaseFixture(t, t.TempDir(), 20, 12).seal(t)))
	_, err := importBytes(t, packBaseZip(t, good))
	require.NoError(t, err, "stored members are right too")
	rename := func(i int, name string) func([]testMember) []testMember {
		return func(l []testMember) []testMember { l[i].h.Name = name; return l }
	}
	extra := func(name string) func([]testMember) []testMember {
		return func(l []testMember) []testMember {
			m := testMember{h: zip.FileHeader{Name: name}}
			m.set([]byte("x"))
			return append(l, m)
		}
	}
	deflated := func(n int) []byte {
		var out bytes.Buffer
		d := newBaseDeflater(&out)
		_, err := d.Write(make([]byte, n))
		require.NoError(t, err)
		require.NoError(t, d.Close())
		return out.Bytes()
	}
	cases := []struct {
		name, want string
		change     func([]testMember) []testMember
	}{
		{"duplicate", `member "state": is there twice`, func(l []testMember) []testMember { return append(l, l[zipState]) }},
		{"traversing", `member "../evil": a base has no member`, extra("../evil")},
		{"absolute", `member "/etc/passwd": a base has no member`, extra("/etc/passwd")},
		{"folder", `member "disk/": a base has no member`, func(l []testMember) []testMember {
			return append(l, testMember{h: zip.FileHeader{Name: "disk/"}})
		}},
		{"dot", `member "./disk": a base has no member`, rename(zipDisk, "./disk")},
		{"derived", `member "fingerprints": a base has no member`, extra("fingerprints")},
		{"not in the manifest", `member "initrd": is not in the manifest`, extra("initrd")},
		{"symlink", `member "disk": is a L`, func(l []testMember) []testMember { l[zipDisk].h.SetMode(os.ModeSymlink | 0o777); return l }},
		{"encrypted", `member "disk": is encrypted`, func(l []testMember) []testMember { l[zipDisk].h.Flags |= 1; return l }},
		{"bzip2", `member "disk": compression method 12`, func(l []testMember) []testMember { l[zipDisk].h.Method = 12; return l }},
		{"crc", `member "disk": zip: checksum error`, func(l []testMember) []testMember { l[zipDisk].h.CRC32++; return l }},
		{"oversize", `member "disk": has 53248 bytes, the manifest says 49152`, func(l []testMember) []testMember {
			l[zipDisk].set(append(bytes.Clone(l[zipDisk].data), make([]byte, PageSize)...))
			return l
		}},
		{"undersize", `member "memory": has 77824 bytes, the manifest says 81920`, func(l []testMember) []testMember {
			l[zipMemory].set(l[zipMemory].data[PageSize:])
			return l
		}},
		{"bomb", `member "kernel": holds more than its 6000 bytes`, func(l []testMember) []testMember {
			l[zipKernel].data = deflated(64 << 20)
			l[zipKernel].h.Method, l[zipKernel].h.CompressedSize64 = zip.Deflate, uint64(len(l[zipKernel].data))
			return l
		}},
		{"large manifest", `member "manifest.json": has 1048577 bytes`, func(l []testMember) []testMember {
			l[zipManifest].set(make([]byte, MaxBaseManifest+1))
			return l
		}},
		{"manifest bomb", `member "manifest.json": holds more than`, func(l []testMember) []testMember {
			n := l[zipManifest].h.UncompressedSize64
			l[zipManifest].data = deflated(64 << 20)
			l[zipManifest].h.Method, l[zipManifest].h.CompressedSize64 = zip.Deflate, uint64(len(l[zipManifest].data))
			l[zipManifest].h.UncompressedSize64 = n
			return l
		}},
		{"version", "version is 2", func(l []testMember) []testMember {
			l[zipManifest].set(bytes.Replace(l[zipManifest].data, []byte(`"version":1`), []byte(`"version":2`), 1))
			return l
		}},
		{"manifest of another base", `member "disk.sha256": has`, func(l []testMember) []testMember {
			other := unpackBaseZip(t, exportTestBase(t, newBaseFixture(t, t.TempDir(), 20, 13).seal(t)))
			other[zipDisk].h.UncompressedSize64 = 13 * PageSize
			l[zipManifest], l[zipDisk] = other[zipManifest], other[zipDisk]
			return l
		}},
	}
	for i, m := range good {
		cases = append(cases, struct {
			name, want string
			change     func([]testMember) []testMember
		}{"missing " + m.h.Name, fmt.Sprintf("member %q: is missing", m.h.Name), func(l []testMember) []testMember {
			return append(l[:i:i], l[i+1:]...)
		}})
		if i == zipManifest {
			continue
		}
		// right for the zip, wrong for the manifest
		cases = append(cases, struct {
			name, want string
			change     func([]testMember) []testMember
		}{"changed " + m.h.Name, fmt.Sprintf("member %q: ", m.h.Name), func(l []testMember) []testMember {
			p := bytes.Clone(m.data)
			p[len(p)/2] ^= 4
			l[i].set(p)
			return l
		}})
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := importBytes(t, packBaseZip(t, c.change(append([]testMember{}, good...))))
			require.ErrorContains(t, err, c.want)
		})
	}
}

func TestImportTruncatedAnywhere(t *testing.T) {
	data := exportTestBase(t, newBaseFixture(t, t.TempDir(), 2, 1).seal(t))
	path := filepath.Join(t.TempDir(), "base.zip")
	require.NoError(t, os.WriteFile(path, data, 0o600))
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	defer f.Close()
	dir := filepath.Join(t.TempDir(), "new")
	for n := len(data) - 1; n >= 0; n-- {
		require.NoError(t, f.Truncate(int64(n)))
		_, err := ImportBase(t.Context(), dir, f, nil)
		require.Error(t, err, "cut to %d of %d bytes", n, len(data))
		require.NoDirExists(t, dir)
	}
}

func TestImportFlippedMembers(t *testing.T) {
	b := newBaseFixture(t, t.TempDir(), 2, 1).seal(t)
	data, id, unused := exportTestBase(t, b), b.ID(), 0
	zr, err := zip.NewReader(bytes.NewReader(data), int64(len(data)))
	require.NoError(t, err)
	for _, m := range zr.File {
		off, err := m.DataOffset()
		require.NoError(t, err)
		for at := off; at < off+int64(m.CompressedSize64); at += 1 + int64(m.CompressedSize64)/60 {
			bad := bytes.Clone(data)
			bad[at] ^= 0x10
			b, err := importBytes(t, bad)
			if err == nil { // the bits that deflate leaves unused at the end of a block
				require.Equal(t, id, b.ID())
				unused++
				continue
			}
			require.ErrorContains(t, err, m.Name, "byte %d", at)
		}
	}
	require.LessOrEqual(t, unused, 2*len(zr.File))
}

func TestImportRefusesOtherFiles(t *testing.T) {
	for _, c := range []struct {
		name, want string
		data       []byte
	}{
		{"empty", "not a base zip", nil},
		{"text", "not a base zip", []byte(strings.Repeat("hello", 100))},
		{"trailing", "bytes after the zip", append(exportTestBase(t, newBaseFixture(t, t.TempDir(), 1, 1).seal(t)), 0)},
		{"huge directory", "directory is larger", hugeDirectory()},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := importBytes(t, c.data)
			require.ErrorContains(t, err, c.want)
		})
	}
}

// hugeDirectory is a zip that lists 60,000 members.
func hugeDirectory() []byte {
	var buf bytes.Buffer
	zw := zip.NewWriter(&buf)
	for i := range 60000 {
		zw.CreateRaw(&zip.FileHeader{Name: fmt.Sprintf("member-%d", i)}) // to memory
	}
	zw.Close()
	return buf.Bytes()
}

func TestImportSpace(t *testing.T) {
	err := checkBaseSpace(t.TempDir(), 1<<60)
	var space *BaseSpaceError
	require.ErrorAs(t, err, &space)
	require.ErrorContains(t, err, "needs 1073741824.0 GiB")
	require.NoError(t, checkBaseSpace(t.TempDir(), 0))
}

// TestFullDisk seals and imports on a file system that is too small.
func TestFullDisk(t *testing.T) {
	data := exportTestBase(t, newBaseFixture(t, t.TempDir(), 400, 400).seal(t))
	dir := t.TempDir()
	need.No(t, os.NewSyscallError("mount a tmpfs", unix.Mount("cloudlet-test", dir, "tmpfs", 0, "size=1m")), unix.EPERM)
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, 0)) })
	path := filepath.Join(t.TempDir(), "base.zip")
	require.NoError(t, os.WriteFile(path, data, 0o600))
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	_, err = ImportBase(t.Context(), filepath.Join(dir, "new"), f, nil)
	require.ErrorContains(t, err, "needs 2.3 MiB")
	require.ErrorContains(t, err, "free some space")
	require.NoDirExists(t, filepath.Join(dir, "new"))

	fixture := newBaseFixture(t, dir, 80, 80)
	for _, s := range Spaces { // no zero pages, which sealing would free
		fixture.write(t, s.String(), bytes.Repeat([]byte{1}, 80*PageSize))
	}
	filler := filepath.Join(dir, "filler")
	require.Error(t, os.WriteFile(filler, bytes.Repeat([]byte{1}, 1<<20), 0o600))
	_, err = SealBase(t.Context(), dir, nil, nil)
	require.ErrorIs(t, err, unix.ENOSPC)
	require.ErrorContains(t, err, "free some space")
	require.NoError(t, os.Remove(filler))
	fixture.seal(t)
}

func FuzzImportBase(f *testing.F) {
	good := exportTestBase(f, newBaseFixture(f, f.TempDir(), 2, 1).seal(f))
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add(packBaseZip(f, unpackBaseZip(f, good)[:3]))
	f.Add(binary.LittleEndian.AppendUint32(nil, 0x06054b50))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := importBytes(t, data)
		if err == nil {
			require.NoError(t, b.Verify(t.Context(), nil))
		}
	})
}
