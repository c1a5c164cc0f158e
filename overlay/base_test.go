package overlay

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// baseFixture is a folder that can be sealed, and its images.
type baseFixture struct {
	dir    string
	images [2][]byte
}

// newBaseFixture makes images of the given pages: in every 8, two are zero, and one repeats
// an earlier one of the same image.
func newBaseFixture(t testing.TB, dir string, memory, disk int) *baseFixture {
	f := &baseFixture{dir: dir}
	rng := rand.New(rand.NewPCG(uint64(memory), uint64(disk)))
	for s, pages := range []int{memory, disk} {
		img := make([]byte, pages*PageSize)
		for i := range pages {
			p := img[i*PageSize:][:PageSize]
			switch {
			case i%8 == 2 || i%8 == 3:
			case i%8 == 7:
				copy(p, img[(i-7)*PageSize:])
			default:
				for j := 0; j < PageSize/4; j++ {
					p[j] = byte(rng.Uint32())
				}
				p[0] = 1
			}
		}
		f.images[s] = img
		f.write(t, Space(s).String(), img)
	}
	f.write(t, "state", []byte("device state"))
	f.write(t, "kernel", bytes.Repeat([]byte("kernel"), 1000))
	return f
}

func (f *baseFixture) write(t testing.TB, name string, p []byte) {
	require.NoError(t, os.WriteFile(filepath.Join(f.dir, name), p, 0o600))
}

func (f *baseFixture) seal(t testing.TB) *Base {
	b, err := SealBase(t.Context(), f.dir, json.RawMessage(`{ "b": 1, "a": [2] }`), nil)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, b.Close()) })
	return b
}

func flipByte(t testing.TB, path string, off int64) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	var p [1]byte
	_, err = f.ReadAt(p[:], off)
	require.NoError(t, err)
	p[0] ^= 1
	_, err = f.WriteAt(p[:], off)
	require.NoError(t, err)
	require.NoError(t, f.Close())
}

func TestSealAndRead(t *testing.T) {
	for _, c := range []struct {
		name         string
		memory, disk int
	}{
		{"one page", 1, 1},
		{"below a list block", 511, 255},
		{"a list block", 512, 256},
		{"over a list block", 513, 257},
		{"several", 1300, 2049},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newBaseFixture(t, t.TempDir(), c.memory, c.disk)
			b := f.seal(t)
			require.JSONEq(t, `{"a":[2],"b":1}`, string(b.Manifest().Machine))
			require.Equal(t, `{"a":[2],"b":1}`, string(b.Manifest().Machine))
			require.True(t, b.Resumable())
			require.Equal(t, f.dir, b.Dir())
			require.Equal(t, filepath.Join(f.dir, "kernel"), b.Path("kernel"))
			require.Empty(t, b.Path("initrd"))
			require.Empty(t, b.Path("../state"))
			state, err := b.State()
			require.NoError(t, err)
			require.Equal(t, "device state", string(state))
			for _, s := range Spaces {
				img := f.images[s]
				require.EqualValues(t, len(img), b.Size(s))
				got := make([]byte, len(img))
				require.NoError(t, b.ReadVerified(s, got, 0))
				require.True(t, bytes.Equal(img, got))
				clear(got)
				require.NoError(t, b.ReadRaw(s, got, 0))
				require.True(t, bytes.Equal(img, got))
				for page := range int64(len(img) / PageSize) {
					h, err := b.PageHash(MakeAddr(s, page))
					require.NoError(t, err)
					require.Equal(t, Sum(img[page*PageSize:][:PageSize]), h)
				}
				list, err := os.ReadFile(b.Path(baseListName(s)))
				require.NoError(t, err)
				require.Equal(t, Sum(list), b.Manifest().Image(s).HashList)
			}
			require.NoError(t, b.Verify(t.Context(), nil))
			data, err := os.ReadFile(b.Path(BaseManifestFile))
			require.NoError(t, err)
			require.Equal(t, Sum(data), b.ID())
		})
	}
}

func TestSealIsDeterministicAndPunches(t *testing.T) {
	one := newBaseFixture(t, t.TempDir(), 4096, 300)
	two := newBaseFixture(t, t.TempDir(), 4096, 300)
	zeros := make([]byte, 4<<20)
	copy(one.images[Memory][8<<20:], zeros) // one file says so with data, the other with a hole
	one.write(t, "memory", one.images[Memory])
	hole, err := os.OpenFile(filepath.Join(two.dir, "memory"), os.O_RDWR, 0)
	require.NoError(t, err)
	require.NoError(t, punchBaseHole(hole, 8<<20, 4<<20))
	require.NoError(t, hole.Close())
	require.Equal(t, one.seal(t).ID(), two.seal(t).ID())
	info, err := os.Stat(filepath.Join(one.dir, "memory"))
	require.NoError(t, err)
	if free := info.Size() - info.Sys().(*syscall.Stat_t).Blocks*512; free < 4<<20 {
		f, err := os.Create(filepath.Join(t.TempDir(), "probe"))
		require.NoError(t, err)
		defer f.Close()
		if unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, PageSize) == nil {
			require.Failf(t, "zero pages are not holes", "%d bytes free", free)
		}
	}
}

func TestSealRefuses(t *testing.T) {
	for _, c := range []struct {
		name, want string
		prepare    func(t *testing.T, f *baseFixture)
	}{
		{"no memory", "memory", func(t *testing.T, f *baseFixture) { require.NoError(t, os.Remove(filepath.Join(f.dir, "memory"))) }},
		{"odd size", "multiple of 4096", func(t *testing.T, f *baseFixture) { f.write(t, "disk", make([]byte, 4097)) }},
		{"empty disk", "multiple of 4096", func(t *testing.T, f *baseFixture) { f.write(t, "disk", nil) }},
		{"empty state", "state: size 0", func(t *testing.T, f *baseFixture) { f.write(t, "state", nil) }},
		{"sealed already", "sealed", func(t *testing.T, f *baseFixture) { f.write(t, BaseManifestFile, nil) }},
		{"link", "disk", func(t *testing.T, f *baseFixture) {
			path := filepath.Join(f.dir, "disk")
			require.NoError(t, os.Rename(path, path+".real"))
			require.NoError(t, os.Symlink(path+".real", path))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newBaseFixture(t, t.TempDir(), 20, 20)
			c.prepare(t, f)
			_, err := SealBase(t.Context(), f.dir, nil, nil)
			require.ErrorContains(t, err, c.want)
			left, err := filepath.Glob(filepath.Join(f.dir, "*s*"))
			require.NoError(t, err)
			for _, name := range left {
				require.NotContains(t, name, ".sha256")
				require.NotContains(t, name, ".sums")
				require.NotContains(t, name, ".tmp")
			}
		})
	}
	t.Run("machine", func(t *testing.T) {
		for _, machine := range []string{`[1]`, `null`, `{} {}`, `{`, `"x"`, `{"a":"` + strings.Repeat("x", MaxBaseMachine) + `"}`} {
			_, err := SealBase(t.Context(), newBaseFixture(t, t.TempDir(), 1, 1).dir, json.RawMessage(machine), nil)
			require.ErrorContains(t, err, "machine")
		}
	})
}

func TestSealCancelled(t *testing.T) {
	f := newBaseFixture(t, t.TempDir(), 2000, 2000)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := SealBase(ctx, f.dir, nil, func(phase string, done, total int64) {
		if phase == "hash disk" {
			cancel()
		}
	})
	require.ErrorIs(t, err, context.Canceled)
	_, err = OpenBase(f.dir)
	require.ErrorIs(t, err, os.ErrNotExist)
	f.seal(t) // and the folder is as good as before
}

func TestReadVerifiedFindsChanges(t *testing.T) {
	f := newBaseFixture(t, t.TempDir(), 1000, 1000)
	b := f.seal(t)
	p := make([]byte, 8*PageSize)
	require.NoError(t, b.ReadVerified(Disk, p[:PageSize], 600*PageSize))
	flipByte(t, b.Path("disk"), 605*PageSize+9)
	err := b.ReadVerified(Disk, p, 600*PageSize)
	var bad *BasePageError
	require.ErrorAs(t, err, &bad)
	require.Equal(t, MakeAddr(Disk, 605), bad.Addr)
	require.ErrorContains(t, err, "disk page 605 does not match its hash")
	require.Equal(t, make([]byte, len(p)), p, "nothing unproven is handed out")
	require.NoError(t, b.ReadVerified(Disk, p[:5*PageSize], 600*PageSize))
	require.NoError(t, b.ReadRaw(Disk, p, 600*PageSize))
}

func TestReadVerifiedFindsChangedList(t *testing.T) {
	for _, sums := range []string{"right", "missing", "changed"} {
		t.Run("sums "+sums, func(t *testing.T) {
			f := newBaseFixture(t, t.TempDir(), 2000, 1)
			b := f.seal(t)
			switch path := filepath.Join(f.dir, baseSumsName(Memory)); sums {
			case "missing":
				require.NoError(t, os.Remove(path))
			case "changed":
				flipByte(t, path, 3)
			}
			flipByte(t, b.Path("memory.sha256"), 600*32)
			flipByte(t, b.Path("memory"), 600*PageSize)
			var bad *BasePageError
			require.ErrorAs(t, b.ReadVerified(Memory, make([]byte, PageSize), 600*PageSize), &bad)
			require.True(t, bad.List)
			require.ErrorContains(t, bad, "memory.sha256")
			err := b.ReadVerified(Memory, make([]byte, PageSize), 0)
			if sums == "right" {
				require.NoError(t, err, "the other blocks of the list are proven")
			} else {
				require.Error(t, err)
			}
		})
	}
	t.Run("sums missing, list right", func(t *testing.T) {
		f := newBaseFixture(t, t.TempDir(), 2000, 1)
		b := f.seal(t)
		require.NoError(t, os.Remove(filepath.Join(f.dir, baseSumsName(Memory))))
		require.NoError(t, b.ReadVerified(Memory, make([]byte, PageSize), 600*PageSize))
	})
}

func TestReadRefusesRanges(t *testing.T) {
	b := newBaseFixture(t, t.TempDir(), 10, 10).seal(t)
	for _, c := range []struct {
		name   string
		n      int
		off    int64
		reason string
	}{
		{"odd offset", PageSize, 1, "whole pages"},
		{"odd length", 100, 0, "whole pages"},
		{"negative", PageSize, -PageSize, "whole pages"},
		{"over the end", 2 * PageSize, 9 * PageSize, "whole pages"},
		{"far", PageSize, 1 << 62, "whole pages"},
	} {
		t.Run(c.name, func(t *testing.T) {
			require.ErrorContains(t, b.ReadRaw(Memory, make([]byte, c.n), c.off), c.reason)
			require.ErrorContains(t, b.ReadVerified(Disk, make([]byte, c.n), c.off), c.reason)
		})
	}
	_, err := b.PageHash(MakeAddr(Memory, 10))
	require.Error(t, err)
}

func TestReadShortenedFile(t *testing.T) {
	b := newBaseFixture(t, t.TempDir(), 10, 10).seal(t)
	require.NoError(t, os.Truncate(b.Path("disk"), PageSize))
	require.ErrorContains(t, b.ReadVerified(Disk, make([]byte, PageSize), 5*PageSize), "shorter than it was")
	_, err := OpenBase(b.Dir())
	require.ErrorContains(t, err, "disk has 4096 bytes")
}

func TestConcurrentReads(t *testing.T) {
	f := newBaseFixture(t, t.TempDir(), 2000, 1500)
	b := f.seal(t)
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 1))
			for range 300 {
				s := Spaces[rng.IntN(2)]
				n := 1 + rng.IntN(100)
				off := rng.IntN(len(f.images[s])/PageSize-n) * PageSize
				p := make([]byte, n*PageSize)
				if err := b.ReadVerified(s, p, int64(off)); err != nil {
					errs[i] = err
				} else if !bytes.Equal(p, f.images[s][off:off+len(p)]) {
					errs[i] = errors.New("wrong bytes")
				}
			}
		})
	}
	wg.Wait()
	require.NoError(t, errors.Join(errs...))
}

func TestVerifyNamesEverything(t *testing.T) {
	f := newBaseFixture(t, t.TempDir(), 1000, 1000)
	b := f.seal(t)
	for page := range int64(20) {
		flipByte(t, b.Path("memory"), (page*8+4)*PageSize)
	}
	flipByte(t, b.Path("memory"), 2*PageSize) // was a hole
	flipByte(t, b.Path("disk.sha256"), 32*900)
	flipByte(t, b.Path("kernel"), 5)
	require.NoError(t, os.Remove(b.Path("state")))
	var damage *BaseDamage
	require.ErrorAs(t, b.Verify(t.Context(), nil), &damage)
	require.Equal(t, 25, damage.Total)
	require.Len(t, damage.Problems, maxBaseProblems)
	require.ErrorContains(t, damage.Problems[0], "memory page 2 ")
	require.ErrorContains(t, damage.Problems[1], "memory page 4 ")
	require.ErrorContains(t, damage, "and 9 more")

	f = newBaseFixture(t, t.TempDir(), 10, 1000)
	b = f.seal(t)
	flipByte(t, b.Path("disk.sha256"), 32*900)
	flipByte(t, b.Path("kernel"), 5)
	flipByte(t, b.Path("state"), 5)
	flipByte(t, b.Path(BaseManifestFile), 5)
	err := b.Verify(t.Context(), nil)
	for _, want := range []string{"disk.sha256 does not match", "disk page 900", "kernel does not", "state does not", "manifest.json has id", "re-import"} {
		require.ErrorContains(t, err, want)
	}
	_, err = b.State()
	require.ErrorContains(t, err, "state does not match")

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, b.Verify(ctx, nil), context.Canceled)
}

func TestBitmap(t *testing.T) {
	for _, c := range [][2]int64{{0, 1}, {63, 1}, {63, 2}, {0, 64}, {1, 64}, {5, 200}, {128, 64}, {299, 1}} {
		m := newBaseBitmap(300)
		require.False(t, m.all(c[0], c[1]))
		m.add(c[0], c[1])
		require.True(t, m.all(c[0], c[1]))
		for i := range int64(300) {
			require.Equal(t, i >= c[0] && i < c[0]+c[1], m.has(i), "%v %d", c, i)
		}
	}
}
