package demoguest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sync/errgroup"
)

// Images are the names of the two files of a launch image.
var Images = [...]string{"memory", "disk"}

// CopyImages copies both images, holes kept, at the same time.
func CopyImages(ctx context.Context, from, to string) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, name := range Images {
		g.Go(func() error {
			return Command(ctx, nil, nil, "cp", "--sparse=always", filepath.Join(from, name), filepath.Join(to, name))
		})
	}
	return g.Wait()
}

// Piped runs programs, each one's output the next one's input, into a file.
func Piped(ctx context.Context, out string, programs ...[]string) (err error) {
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	g, ctx := errgroup.WithContext(ctx)
	var in *os.File // of the next program
	for i, args := range programs {
		stdin, stdout := in, f
		if i < len(programs)-1 {
			if in, stdout, err = os.Pipe(); err != nil {
				return errors.Join(err, g.Wait())
			}
		}
		g.Go(func() error {
			err := Command(ctx, reader(stdin), stdout, args...)
			if stdin != nil {
				err = errors.Join(err, stdin.Close())
			}
			if stdout != f {
				err = errors.Join(err, stdout.Close())
			}
			return err
		})
	}
	return g.Wait()
}

// reader returns f as a reader, nil as nil.
func reader(f *os.File) io.Reader {
	if f == nil {
		return nil
	}
	return f
}

// Command runs a program; its error quotes what it said.
func Command(ctx context.Context, in io.Reader, out io.Writer, args ...string) error {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout = in, out
	var stderr limited
	cmd.Stderr = &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w: %s", args[0], err, stderr.b)
	}
	return nil
}

// limited keeps the beginning of what is written to it.
type limited struct{ b []byte }

func (l *limited) Write(p []byte) (int, error) {
	l.b = append(l.b, p[:min(len(p), 1000-min(len(l.b), 1000))]...)
	return len(p), nil
}
