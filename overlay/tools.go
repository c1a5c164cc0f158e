package overlay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
)

// ErrNoProgram: a strategy needs a program that this host lacks.
var ErrNoProgram = errors.New("program is missing")

// tool is a program that encodes, once for each frame. Decoding needs none.
type tool struct {
	path    string
	version string // its name and its version
}

// tools are those that a strategy needs.
type tools struct{ xdelta3, xz, zstd tool }

// CheckPrograms returns [ErrNoProgram] where the strategy is encoded by a program that this
// host lacks. [Create] looks as well, but only once there is something to make an overlay of.
func (s *Strategy) CheckPrograms(ctx context.Context) error {
	_, err := s.tools(ctx)
	return err
}

// tools finds the programs that encode.
func (s *Strategy) tools(ctx context.Context) (t tools, err error) {
	if s.Delta == DeltaVCDIFF {
		if t.xdelta3, err = findTool(ctx, "xdelta3", "-V", "delta vcdiff is encoded by xdelta3: install the package xdelta3"); err != nil {
			return t, err
		}
	}
	switch {
	case s.Codec == CodecXZ:
		t.xz, err = findTool(ctx, "xz", "--version", "codec xz is encoded by xz: install the package xz-utils")
	case s.zstdProgram():
		t.zstd, err = findTool(ctx, "zstd", "--version", fmt.Sprintf("level %d is encoded by zstd: install the package zstd", s.Level))
	}
	return t, err
}

// encoder names the libraries and programs that encode by the strategy, with their versions.
func (s *Strategy) encoder(t tools) string {
	var names []string
	if s.Codec == CodecZstd && !s.zstdProgram() {
		names = append(names, zstdLibrary)
	}
	for _, p := range []tool{t.zstd, t.xz, t.xdelta3} {
		if p.version != "" {
			names = append(names, p.version)
		}
	}
	return strings.Join(names, ", ")
}

// versionNumber finds the first number in "Xdelta version 3.0.11, Copyright ...",
// "xz (XZ Utils) 5.4.1" or "*** Zstandard CLI (64-bit) v1.5.4, by Yann Collet ***".
var versionNumber = regexp.MustCompile(`\sv?([0-9][0-9A-Za-z.+~-]{0,30})`)

// findTool looks for a program and asks it for its version.
func findTool(ctx context.Context, name, ask, remedy string) (tool, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return tool{}, fmt.Errorf("%w: %s, or choose another strategy (%w)", ErrNoProgram, remedy, err)
	}
	cmd := exec.CommandContext(ctx, path, ask)
	cmd.Env = []string{}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return tool{}, fmt.Errorf("ask %s for its version: %w", path, err)
	}
	found := versionNumber.FindSubmatch(out)
	if found == nil {
		return tool{}, fmt.Errorf("ask %s for its version: it says %.80q", path, out)
	}
	return tool{path, name + " " + string(found[1])}, nil
}

// run sends in through the program into out, with nothing of this process's environment,
// since it could change what comes out.
func (t tool) run(ctx context.Context, out *bytes.Buffer, in []byte, files []*os.File, args ...string) error {
	cmd := exec.CommandContext(ctx, t.path, args...)
	cmd.Env = []string{}
	cmd.ExtraFiles = files
	var say bytes.Buffer
	out.Reset()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(in), out, &say
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("run %s: %w: %.200s", t.path, err, strings.TrimSpace(say.String()))
	}
	return nil
}
