package overlay

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// differ makes VCDIFF deltas with the xdelta3 program, which takes its source from a file.
type differ struct {
	tool
	source *os.File // in memory
	out    bytes.Buffer
}

func newDiffer(t tool) (*differ, error) {
	fd, err := unix.MemfdCreate("vcdiff-source", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a file in memory: %w", err)
	}
	return &differ{tool: t, source: os.NewFile(uintptr(fd), "vcdiff-source")}, nil
}

// Close frees the file in memory.
func (d *differ) Close() error { return d.source.Close() }

// diff returns the delta that makes target of source, valid until the next call. It has
// neither sum nor application header, and no content is taken for a compressed file.
func (d *differ) diff(ctx context.Context, source, target []byte) ([]byte, error) {
	if err := d.source.Truncate(int64(len(source))); err != nil {
		return nil, fmt.Errorf("write source of delta: %w", err)
	}
	if _, err := d.source.WriteAt(source, 0); err != nil {
		return nil, fmt.Errorf("write source of delta: %w", err)
	}
	const leastSource, leastTarget = 512 << 10, 16 << 10 // windows that xdelta3 takes; its defaults cost 72 MiB of clearing
	window := func(least, n int) string { return strconv.Itoa(max(least, n)) }
	err := d.run(ctx, &d.out, target, []*os.File{d.source}, "-e", "-9", "-S", "none", "-n", "-A=", "-D", "-q",
		"-B", window(leastSource, len(source)), "-W", window(leastTarget, len(target)), "-c", "-s", "/proc/self/fd/3")
	return d.out.Bytes(), err
}
