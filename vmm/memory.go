package vmm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	copyBatch = 1 << 20 // bytes copied at once
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
			s = span{off: s.off + n, n: s.n - n, addr: s.addr + uint64(n)}
			size += n
		}
	}
	if len(b) > 0 {
		out = append(out, b)
	}
	return out
}

// copyMemory copies spans of a stopped process's memory to a file, each at its own offset
// in the image. Zero pages stay holes.
func copyMemory(ctx context.Context, pid int, spans []span, to *os.File) (segments, error) {
	bs := batches(spans)
	parts := make([]segments, len(bs))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(min(4, runtime.GOMAXPROCS(0)))
	for i, b := range bs {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if err := gctx.Err(); err != nil {
				return err
			}
			part, err := copySome(pid, b, to)
			parts[i] = part
			return err
		})
	}
	if err := errors.Join(g.Wait(), ctx.Err()); err != nil {
		return nil, fmt.Errorf("copy changed memory: %w", err)
	}
	var out segments
	for _, part := range parts {
		for _, s := range part {
			out = out.add(s)
		}
	}
	return out, nil
}

func copySome(pid int, b batch, to *os.File) (segments, error) {
	var size int64
	remote := make([]unix.RemoteIovec, len(b))
	for i, s := range b {
		remote[i] = unix.RemoteIovec{Base: uintptr(s.addr), Len: int(s.n)}
		size += s.n
	}
	buf := make([]byte, size)
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
	var out segments
	for _, s := range b {
		part := pagesOf(buf[:s.n], s.off)
		for _, seg := range part {
			if !seg.Zero {
				i := seg.Off - s.off
				if _, err := to.WriteAt(buf[i:i+seg.Len], seg.Off); err != nil {
					return nil, err
				}
			}
			out = out.add(seg)
		}
		buf = buf[s.n:]
	}
	return out, nil
}

// pagesOf tells the zero pages of p, which stands at off, from the others.
func pagesOf(p []byte, off int64) segments {
	var out segments
	for i := int64(0); i < int64(len(p)); i += pageSize {
		out = out.add(segment{Extent: Extent{Off: off + i, Len: pageSize, Zero: isZero(p[i : i+pageSize])}, at: off + i})
	}
	return out
}

// zeroPage is compared with; nothing writes to it.
var zeroPage [pageSize]byte

func isZero(page []byte) bool { return bytes.Equal(page, zeroPage[:]) }
