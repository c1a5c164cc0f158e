package overlay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNoProgram: a strategy needs a program that this host lacks.
var ErrNoProgram = errors.New("program is missing")

// findDiffer looks for xdelta3 and returns its path and its version.
func findDiffer(ctx context.Context) (path, version string, err error) {
	path, err = exec.LookPath("xdelta3")
	if err != nil {
		return "", "", fmt.Errorf("%w: delta vcdiff is encoded by xdelta3: install the package xdelta3, or choose another strategy (%w)", ErrNoProgram, err)
	}
	cmd := exec.CommandContext(ctx, path, "-V")
	cmd.Env = []string{}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", "", fmt.Errorf("ask %s for its version: %w", path, err)
	}
	_, after, _ := strings.Cut(string(out), "ersion ") // "Xdelta version 3.0.11, Copyright ..."
	version, _, _ = strings.Cut(after, ",")
	if version == "" || len(version) > 40 {
		return "", "", fmt.Errorf("ask %s for its version: it says %.80q", path, out)
	}
	return path, "xdelta3 " + version, nil
}

// differ makes VCDIFF deltas with the xdelta3 program, which takes its source from a file.
type differ struct {
	program string
	source  *os.File // in memory
	out     bytes.Buffer
	say     bytes.Buffer
}

func newDiffer(program string) (*differ, error) {
	fd, err := unix.MemfdCreate("vcdiff-source", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a file in memory: %w", err)
	}
	return &differ{program: program, source: os.NewFile(uintptr(fd), "vcdiff-source")}, nil
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
	const leastWindow = 512 << 10 // of the source, that xdelta3 takes; its default costs 64 MiB of clearing
	window := strconv.Itoa(max(leastWindow, len(source)))
	cmd := exec.CommandContext(ctx, d.program, "-e", "-9", "-S", "none", "-n", "-A=", "-D", "-q", "-B", window, "-c", "-s", "/proc/self/fd/3")
	cmd.Env = []string{}
	cmd.ExtraFiles = []*os.File{d.source}
	d.out.Reset()
	d.say.Reset()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(target), &d.out, &d.say
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, fmt.Errorf("run %s: %w: %.200s", d.program, err, strings.TrimSpace(d.say.String()))
	}
	return d.out.Bytes(), nil
}
