package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// softTracker finds changes by the kernel's soft-dirty bits: the process is stopped while
// they are read and cleared, so that no write falls in between. A new mapping counts as
// dirty, so before the first clearing all anonymous pages are marked. Nobody else may clear
// the process's bits meanwhile.
type softTracker struct {
	pid     int
	regions []region
	cleared bool
	seen    []span // all pages that were ever marked
	pending []span // marked and not yet kept
}

func (t *softTracker) stops() bool { return true }

func (t *softTracker) mark(last bool) error {
	spans, err := changedSpans(t.pid, t.regions)
	if err != nil {
		return err
	}
	// Changes that were copied and then discarded: the pages are those of the file again.
	gone := without(t.seen, spans)
	if t.cleared {
		if spans, err = dirtySpans(t.pid, spans); err != nil {
			return err
		}
	}
	// From here on the pages are not lost, even if their bits are.
	t.pending = union(t.pending, union(spans, gone))
	t.seen = union(t.seen, t.pending)
	if last {
		return nil
	}
	t.cleared = true
	return clearSoftDirty(t.pid)
}

func (t *softTracker) copy(ctx context.Context, to *os.File, workers int) (segments, error) {
	c, err := copier{pid: t.pid, to: to, workers: workers}.copy(ctx, t.pending)
	return c.segs, err
}

func (t *softTracker) keep() { t.pending = nil }

// dirtySpans returns the pages of spans whose soft-dirty bit is set.
func dirtySpans(pid int, spans []span) ([]span, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return nil, fmt.Errorf("find changed pages: %w", err)
	}
	defer f.Close()
	var out []span
	for _, s := range spans {
		out, err = readSpan(f, s, out, func(e uint64) bool { return e&entrySoftDirty != 0 })
		if err != nil {
			return nil, fmt.Errorf("find changed pages: %w", err)
		}
	}
	return out, nil
}

// clearSoftDirty clears the soft-dirty bits of a process.
func clearSoftDirty(pid int) error {
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/clear_refs", pid), os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("clear soft-dirty bits: %w", err)
	}
	_, err = f.WriteString("4")
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("clear soft-dirty bits: %w", err)
	}
	return nil
}

// hasSoftDirty tries on two pages of our own whether the kernel keeps soft-dirty bits.
func hasSoftDirty() (bool, error) {
	p, err := unix.Mmap(-1, 0, 2*pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return false, fmt.Errorf("probe soft-dirty bits: %w", err)
	}
	defer func() { _ = unix.Munmap(p) }()
	// One bit for both pages would say nothing. A kernel without huge pages refuses.
	_ = unix.Madvise(p, unix.MADV_NOHUGEPAGE)
	p[0], p[pageSize] = 1, 1
	pid := os.Getpid()
	if err := clearSoftDirty(pid); err != nil {
		return false, nil // as on a kernel without
	}
	p[0] = 2
	own := span{n: 2 * pageSize, addr: uint64(uintptr(unsafe.Pointer(&p[0])))}
	dirty, err := dirtySpans(pid, []span{own})
	if err != nil {
		return false, err
	}
	return len(dirty) == 1 && dirty[0] == span{n: pageSize, addr: own.addr}, nil
}
