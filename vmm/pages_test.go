package vmm

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// mapPrivately maps a new file of n pages and writes to some of them.
func mapPrivately(t *testing.T, n int64, write ...int64) (vmInfo, []byte) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "memory")
	require.NoError(t, os.WriteFile(path, bytes.Repeat([]byte{1}, int(n*pageSize)), 0o600))
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	mem, err := unix.Mmap(int(f.Fd()), 0, int(n*pageSize), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, unix.Munmap(mem)) })
	var sum byte
	for i := int64(0); i < n; i += 3 { // pages that are read are no changes
		sum += mem[i*pageSize]
	}
	require.NotZero(t, sum)
	for _, i := range write {
		mem[i*pageSize+17] = 2
	}
	st, err := regularFile("memory", path)
	require.NoError(t, err)
	return vmInfo{Memory: path, Dev: st.Dev, Inode: st.Ino, Machine: Machine{Memory: n * pageSize}}, mem
}

func TestChangedSpans(t *testing.T) {
	info, mem := mapPrivately(t, 1000, 0, 5, 6, 7, 500, 999)
	clear(mem[6*pageSize : 7*pageSize])
	// A protection of its own splits the mapping in three.
	require.NoError(t, unix.Mprotect(mem[6*pageSize:600*pageSize], unix.PROT_READ))
	regions, err := memoryRegions(os.Getpid(), info)
	require.NoError(t, err)
	require.Len(t, regions, 3)
	f, err := os.Open("/proc/self/pagemap")
	require.NoError(t, err)
	defer f.Close()
	var read []span
	for _, r := range regions {
		read, err = readRegion(f, r, read)
		require.NoError(t, err)
	}
	var got []int64
	for _, s := range read {
		for off := s.off; off < s.off+s.n; off += pageSize {
			got = append(got, off/pageSize)
		}
	}
	require.Equal(t, []int64{0, 5, 6, 7, 500, 999}, got)
	either, err := changedSpans(os.Getpid(), regions)
	require.NoError(t, err)
	require.Equal(t, read, either)

	out, err := os.OpenFile(filepath.Join(t.TempDir(), "out"), os.O_CREATE|os.O_RDWR, 0o600)
	require.NoError(t, err)
	defer out.Close()
	all, err := copier{pid: os.Getpid(), to: out, workers: 2}.copy(t.Context(), read)
	require.NoError(t, err)
	segs := all.segs
	require.Equal(t, []Extent{{0, 4096, false}, {5 * 4096, 4096, false}, {6 * 4096, 4096, true}, {7 * 4096, 4096, false}, {500 * 4096, 4096, false}, {999 * 4096, 4096, false}}, segs.extents())
	p := make([]byte, 3*pageSize)
	require.NoError(t, segs.read(out, p, 5*pageSize))
	require.True(t, bytes.Equal(mem[5*pageSize:8*pageSize], p))
	require.ErrorContains(t, segs.read(out, p, 4*pageSize), "have not changed")
	require.ErrorContains(t, segs.read(out, p, 6*pageSize), "have not changed")
	require.ErrorContains(t, segs.read(out, p[:4096], 998*pageSize), "have not changed")
	require.ErrorContains(t, segs.read(out, p[:4096], 1), "not aligned")
}

// TestChangedSpansMany: more pages than the kernel gathers in one go, fewer and more than one
// request returns, with a long rest in which nothing has changed.
func TestChangedSpansMany(t *testing.T) {
	for _, changed := range []int{511, 512, 513, 1000, scanRegions - 1, scanRegions, scanRegions + 1, 2*scanRegions + 300} {
		t.Run(strconv.Itoa(changed), func(t *testing.T) {
			info, mem := mapPrivately(t, 5*scanRegions)
			var want []int64
			for i := range changed {
				mem[2*i*pageSize] = 1
				want = append(want, int64(2*i*pageSize))
			}
			regions, err := memoryRegions(os.Getpid(), info)
			require.NoError(t, err)
			spans, err := changedSpans(os.Getpid(), regions)
			require.NoError(t, err)
			var got []int64
			for _, s := range spans {
				require.EqualValues(t, pageSize, s.n)
				got = append(got, s.off)
			}
			require.Equal(t, want, got)
		})
	}
}

func TestMemoryRegionsRefuses(t *testing.T) {
	info, _ := mapPrivately(t, 4)
	info.Machine.Memory += pageSize
	_, err := memoryRegions(os.Getpid(), info)
	require.ErrorContains(t, err, "are mapped, want")
	info.Memory, info.Inode = "/nonexistent", 1
	_, err = memoryRegions(os.Getpid(), info)
	require.Error(t, err)
	info = vmInfo{Memory: "/a b", Dev: unix.Mkdev(0xfd, 1), Inode: 7}
	for name, tt := range map[string]struct {
		line string
		want int
	}{
		"by inode":  {"1000-3000 rw-p 00001000 fd:01 7                          /x", 1},
		"by path":   {"1000-3000 rw-p 00000000 00:99 9                          /a b", 1},
		"another":   {"1000-3000 rw-p 00000000 fd:02 7                          /x", 0},
		"anonymous": {"1000-3000 rw-p 00000000 00:00 0 ", 0},
	} {
		t.Run(name, func(t *testing.T) {
			rs, err := parseMaps(strings.NewReader(tt.line+"\n"), info)
			require.NoError(t, err)
			require.Len(t, rs, tt.want)
		})
	}
	for _, bad := range []string{"1000-3000 rw-s 0 fd:01 7 /x", "3000-1000 rw-p 0 fd:01 7 /x", "x-1000 rw-p 0 fd:01 7 /x", "1000 rw-p 0 fd:01 7 /x"} {
		_, err := parseMaps(strings.NewReader(bad+"\n"), info)
		require.Error(t, err, bad)
	}
}

func TestBatches(t *testing.T) {
	spans := []span{{0, 3 * copyBatch, 1 << 30}, {5 << 30, pageSize, 7 << 30}}
	for i := range int64(2 * copySpans) {
		spans = append(spans, span{off: 6<<30 + 2*i*pageSize, n: pageSize, addr: 8<<30 + 2*uint64(i)*pageSize})
	}
	var got []span
	for _, b := range batches(spans) {
		var n int64
		require.LessOrEqual(t, len(b), copySpans)
		for _, s := range b {
			n += s.n
			got = append(got, s)
		}
		require.LessOrEqual(t, n, int64(copyBatch))
	}
	var joined []span
	for _, s := range got {
		joined = join(joined, s)
	}
	require.Equal(t, spans, joined)
	require.Empty(t, batches(nil))
}

func TestParseMap(t *testing.T) {
	const size = 1 << 20
	entry := func(start, length int64, rest string) string {
		return fmt.Sprintf(`{"start":%d,"length":%d,"depth":0,%s}`, start, length, rest)
	}
	const absent, zero = `"present":false,"zero":true,"data":false`, `"present":true,"zero":true,"data":false`
	data := func(at int64) string {
		return fmt.Sprintf(`"present":true,"zero":false,"data":true,"offset":%d`, at)
	}
	list := func(e ...string) []byte { return []byte("[" + strings.Join(e, ",") + "]") }
	got, err := parseMap(list(entry(0, 65536, absent), entry(65536, 65536, data(327680)), entry(131072, 65536, zero),
		entry(196608, 65536, zero), entry(262144, size-262144, absent)), size)
	require.NoError(t, err)
	require.Equal(t, segments{{Extent{65536, 65536, false}, 327680}, {Extent{131072, 131072, true}, 0}}, got)
	for name, bad := range map[string][]byte{
		"not json":      []byte("{"),
		"ends early":    list(entry(0, 65536, absent)),
		"too long":      list(entry(0, size+4096, absent)),
		"gap":           list(entry(4096, size-4096, absent)),
		"unaligned":     list(entry(0, 512, absent), entry(512, size-512, absent)),
		"negative":      list(entry(0, -4096, absent)),
		"compressed":    list(entry(0, size, `"present":true,"zero":false,"data":true`)),
		"bad offset":    list(entry(0, size, data(-1))),
		"overflow":      list(entry(0, 4096, absent), entry(4096, 1<<63-4096, absent)),
		"empty extents": list(entry(0, 0, absent), entry(0, size, absent)),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseMap(bad, size)
			require.Error(t, err)
		})
	}
}

func FuzzParseMap(f *testing.F) {
	f.Add([]byte(`[{"start":0,"length":4096,"depth":0,"present":true,"zero":false,"data":true,"offset":65536}]`), int64(4096))
	f.Add([]byte(`[]`), int64(0))
	f.Fuzz(func(t *testing.T, b []byte, size int64) {
		ss, err := parseMap(b, size)
		if err != nil {
			return
		}
		var next int64
		for _, s := range ss {
			require.True(t, s.Off >= next && s.Len > 0 && s.Len <= size-s.Off && s.at >= 0)
			next = s.Off + s.Len
		}
	})
}
