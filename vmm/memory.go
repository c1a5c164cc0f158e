package vmm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	copyBatch = 1 << 20 // bytes copied at once, the size of a worker's buffer
	copySpans = 512     // spans copied at once; the kernel takes 1024
)

// batch is what one call copies.
type batch []span

// batches cuts spans into batches.
func batches(spans []span) []batch {
	var out []batch
	var b batch
	var size int64
	for _, s := range spans {
		for s.n > 0 {
			if size == copyBatch || len(b) == copySpans {
				out, b, size = append(out, b), nil, 0
			}
			n := min(s.n, copyBatch-size)
			b = append(b, span{off: s.off, n: n, addr: s.addr})
			s = s.from(n)
			size += n
		}
	}
	if len(b) > 0 {
		out = append(out, b)
	}
	return out
}

// copier copies pages of a process's memory to a file, each at its own offset in the image.
// Zero pages stay holes.
type copier struct {
	pid     int
	to      *os.File
	workers int
	// sums, if not nil, says which pages are copied: those that differ from their sum.
	sums *sums
}

// copied is what was copied: where it is, and the sums of its pages, if they are asked for.
type copied struct {
	segs segments
	sums []uint64
}

// copy copies spans. The process may run: then each page is as it was at some moment, or a
// mixture of several.
func (c copier) copy(ctx context.Context, spans []span) (copied, error) {
	bs := batches(spans)
	parts := make([]copied, len(bs))
	var next atomic.Int64
	g, gctx := errgroup.WithContext(ctx)
	for range min(c.workers, len(bs)) {
		g.Go(func() error {
			buf := make([]byte, copyBatch)
			for {
				i := int(next.Add(1) - 1)
				if i >= len(bs) {
					return nil
				}
				if err := gctx.Err(); err != nil {
					return err
				}
				var err error
				if parts[i], err = c.some(bs[i], buf); err != nil {
					return err
				}
			}
		})
	}
	if err := errors.Join(g.Wait(), ctx.Err()); err != nil {
		return copied{}, fmt.Errorf("copy changed memory: %w", err)
	}
	var out copied
	for _, part := range parts {
		for _, s := range part.segs {
			out.segs = out.segs.add(s)
		}
		out.sums = append(out.sums, part.sums...)
	}
	return out, nil
}

// some copies one batch by way of a buffer.
func (c copier) some(b batch, buf []byte) (copied, error) {
	buf, err := readBatch(c.pid, b, buf)
	if err != nil {
		return copied{}, err
	}
	var out copied
	for _, s := range b {
		part := c.choose(buf[:s.n], s.off, &out.sums)
		for _, seg := range part {
			if !seg.Zero {
				i := seg.Off - s.off
				if _, err := c.to.WriteAt(buf[i:i+seg.Len], seg.Off); err != nil {
					return copied{}, err
				}
			}
			out.segs = out.segs.add(seg)
		}
		buf = buf[s.n:]
	}
	return out, nil
}

// readBatch reads a process's memory into the beginning of buf and returns that.
func readBatch(pid int, b batch, buf []byte) ([]byte, error) {
	var size int64
	remote := make([]unix.RemoteIovec, len(b))
	for i, s := range b {
		remote[i] = unix.RemoteIovec{Base: uintptr(s.addr), Len: int(s.n)}
		size += s.n
	}
	buf = buf[:size]
	local := unix.Iovec{Base: &buf[0]}
	local.SetLen(len(buf))
	n, err := unix.ProcessVMReadv(pid, []unix.Iovec{local}, remote, 0)
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("read memory of process %d: %w: run as root or set kernel.yama.ptrace_scope to 0", pid, err)
	}
	if err != nil {
		return nil, fmt.Errorf("read memory of process %d: %w", pid, err)
	}
	if n != len(buf) {
		return nil, fmt.Errorf("read memory of process %d: %d bytes of %d", pid, n, len(buf))
	}
	return buf, nil
}

// choose returns the pages of p, which stands at off, that are to be copied, zero pages told
// from the others, and appends their sums.
func (c copier) choose(p []byte, off int64, to *[]uint64) segments {
	var out segments
	for i := int64(0); i < int64(len(p)); i += pageSize {
		page := p[i : i+pageSize]
		if c.sums != nil {
			sum := c.sums.of(page)
			if sum == c.sums.at(off+i) {
				continue
			}
			*to = append(*to, sum)
		}
		out = out.add(segment{Extent: Extent{Off: off + i, Len: pageSize, Zero: isZero(page)}, at: off + i})
	}
	return out
}

// zeroPage is compared with; nothing writes to it.
var zeroPage [pageSize]byte

func isZero(page []byte) bool { return bytes.Equal(page, zeroPage[:]) }
