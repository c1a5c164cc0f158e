package overlay

import (
	"context"
	"encoding/binary"
	"hash/crc32"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// requireFingerprints looks up every page and some that are not there.
func requireFingerprints(t *testing.T, f *baseFixture, b *Base) {
	prints, err := b.Fingerprints(t.Context(), nil)
	require.NoError(t, err)
	want := map[Hash]Addr{}
	for _, s := range Spaces {
		for page := range int64(len(f.images[s]) / PageSize) {
			h := Sum(f.images[s][page*PageSize:][:PageSize])
			if _, ok := want[h]; !ok && h != baseZeroHash {
				want[h] = MakeAddr(s, page)
			}
		}
	}
	require.EqualValues(t, len(want), prints.Len())
	for h, addr := range want {
		got, ok := prints.Lookup(h)
		require.True(t, ok, "%s", addr)
		require.Equal(t, addr, got)
		h[31]++ // the same print, another page
		_, ok = prints.Lookup(h)
		require.False(t, ok)
		h[0]++
		_, ok = prints.Lookup(h)
		require.False(t, ok)
	}
	for _, h := range []Hash{baseZeroHash, {}, Sum(nil)} {
		_, ok := prints.Lookup(h)
		require.False(t, ok)
	}
	high := Hash{}
	for i := range high {
		high[i] = 0xff
	}
	_, ok := prints.Lookup(high)
	require.False(t, ok)
}

func TestFingerprints(t *testing.T) {
	for _, c := range []struct {
		name         string
		memory, disk int
	}{{"two pages", 1, 1}, {"one block", 300, 100}, {"several blocks", 2100, 1777}} {
		t.Run(c.name, func(t *testing.T) {
			f := newBaseFixture(t, t.TempDir(), c.memory, c.disk)
			b := f.seal(t)
			requireFingerprints(t, f, b)
			info, err := os.Stat(filepath.Join(f.dir, printsFile))
			require.NoError(t, err)
			b2, err := OpenBase(f.dir)
			require.NoError(t, err)
			requireFingerprints(t, f, b2)
			require.NoError(t, b2.Close())
			again, err := os.Stat(filepath.Join(f.dir, printsFile))
			require.NoError(t, err)
			require.True(t, os.SameFile(info, again), "made once")
			left, err := filepath.Glob(filepath.Join(f.dir, "*.tmp"))
			require.NoError(t, err)
			require.Empty(t, left)
		})
	}
}

func TestFingerprintsOfZeros(t *testing.T) {
	f := &baseFixture{dir: t.TempDir()}
	f.images = [2][]byte{make([]byte, 3*PageSize), make([]byte, PageSize)}
	f.write(t, "memory", f.images[Memory])
	f.write(t, "disk", f.images[Disk])
	requireFingerprints(t, f, f.seal(t))
}

func TestFingerprintsAreMadeAnew(t *testing.T) {
	f := newBaseFixture(t, t.TempDir(), 700, 100)
	b := f.seal(t)
	path := filepath.Join(f.dir, printsFile)
	requireFingerprints(t, f, b)
	good, err := os.ReadFile(path)
	require.NoError(t, err)
	foreign := newBaseFixture(t, t.TempDir(), 700, 101)
	requireFingerprints(t, foreign, foreign.seal(t))
	other, err := os.ReadFile(filepath.Join(foreign.dir, printsFile))
	require.NoError(t, err)
	changed := func(at int) []byte {
		p := append([]byte{}, good...)
		p[at] ^= 1
		return p
	}
	for _, c := range []struct {
		name string
		data []byte
	}{
		{"empty", nil},
		{"magic", changed(0)},
		{"version", changed(8)},
		{"checksum", changed(12)},
		{"base", changed(20)},
		{"count", changed(48)},
		{"reserved", changed(60)},
		{"first print", changed(64)},
		{"last address", changed(len(good) - 1)},
		{"cut header", good[:40]},
		{"no entries", good[:64]},
		{"cut entry", good[:len(good)-1]},
		{"cut by an entry", good[:len(good)-12]},
		{"longer", append(append([]byte{}, good...), 0)},
		{"another base's", other},
	} {
		t.Run(c.name, func(t *testing.T) {
			f.write(t, printsFile, c.data)
			b, err := OpenBase(f.dir)
			require.NoError(t, err)
			defer b.Close()
			requireFingerprints(t, f, b)
			data, err := os.ReadFile(path)
			require.NoError(t, err)
			require.Equal(t, good, data)
		})
	}
}

func TestFingerprintsConcurrently(t *testing.T) {
	b := newBaseFixture(t, t.TempDir(), 700, 100).seal(t)
	var wg sync.WaitGroup
	var got [6]*Fingerprints
	for i := range got {
		wg.Go(func() {
			if f, err := b.Fingerprints(t.Context(), nil); err == nil {
				got[i] = f
			}
		})
	}
	wg.Wait()
	for _, f := range got {
		require.NotNil(t, f)
		require.Same(t, got[0], f)
	}
}

func TestFingerprintsCancelled(t *testing.T) {
	f := newBaseFixture(t, t.TempDir(), 700, 100)
	b := f.seal(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := b.Fingerprints(ctx, nil)
	require.ErrorIs(t, err, context.Canceled)
	require.NoFileExists(t, filepath.Join(f.dir, printsFile))
	requireFingerprints(t, f, b)
}

// FuzzFingerprints feeds entries with a right header and checksum: whatever they say, a
// page found is the right one.
func FuzzFingerprints(f *testing.F) {
	fixture := newBaseFixture(f, f.TempDir(), 20, 20)
	b := fixture.seal(f)
	_, err := b.Fingerprints(f.Context(), nil)
	require.NoError(f, err)
	good, err := os.ReadFile(filepath.Join(fixture.dir, printsFile))
	require.NoError(f, err)
	f.Add(good[printsHeader:])
	f.Add(appendPrint(nil, pagePrint{printOf(Sum(fixture.images[0][:PageSize])), 1<<32 - 1}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		prints := &Fingerprints{base: b, count: int64(len(data) / printSize)}
		crc := crc32.Checksum(data, crc32.MakeTable(crc32.Castagnoli))
		head := prints.header(crc)
		require.EqualValues(t, prints.count, binary.LittleEndian.Uint64(head[48:]))
		path := filepath.Join(t.TempDir(), printsFile)
		require.NoError(t, os.WriteFile(path, append(head[:], data...), 0o600))
		file, err := os.Open(path)
		require.NoError(t, err)
		defer file.Close()
		prints.file = file
		ok, err := prints.load(t.Context())
		require.NoError(t, err)
		require.Equal(t, len(data)%printSize == 0, ok)
		if !ok {
			return
		}
		h := Sum(fixture.images[0][:PageSize])
		if a, ok := prints.Lookup(h); ok {
			have, err := b.PageHash(a)
			require.NoError(t, err)
			require.Equal(t, h, have)
		}
	})
}
