package fusefs

import (
	"context"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// flatFile costs next to nothing to read, so that the mount itself is measured.
type flatFile int64

func (f flatFile) Size() int64 { return int64(f) }

func (f flatFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	clear(p)
	return len(p), nil
}

// BenchmarkSequential reads a cold file of 1 GiB once per iteration.
func BenchmarkSequential(b *testing.B) {
	for _, kib := range []int{128, 1024, 4096} {
		b.Run(fmt.Sprintf("%dKiB", kib), func(b *testing.B) {
			const size = 1 << 30
			b.SetBytes(size)
			for b.Loop() {
				b.StopTimer()
				s, dir := mount(b, Options{Memory: flatFile(size), ReadAheadKiB: kib})
				p := start(b, "drain", filepath.Join(dir, MemoryName))
				require.Equal(b, "ready", p.line(b))
				b.StartTimer()
				require.NoError(b, p.stdin.Close())
				require.Equal(b, "ok", p.line(b))
				b.StopTimer()
				p.dies(b)
				require.NoError(b, s.Unmount(b.Context()))
				b.StartTimer()
			}
		})
	}
}

// BenchmarkFault takes cold page faults of 4 KiB in a mapping, as the guest's memory does.
func BenchmarkFault(b *testing.B) {
	const size, pages = 1 << 30, 20_000
	var total time.Duration
	for b.Loop() {
		s, dir := mount(b, Options{Memory: flatFile(size), ReadAheadKiB: 4})
		line := client(b, "fault", filepath.Join(dir, MemoryName), strconv.Itoa(pages))
		ns, err := strconv.Atoi(strings.Fields(line)[0])
		require.NoError(b, err, line)
		total += time.Duration(ns)
		require.NoError(b, s.Unmount(b.Context()))
	}
	b.ReportMetric(float64(total.Nanoseconds())/float64(b.N), "ns/fault")
}
