package fusefs

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
)

// Names of the files in a mount.
const (
	MemoryName = "memory"
	DiskName   = "disk"
	InfoName   = "info.json"
)

// fsSubtype makes the mount's type fuse.cloudlet; defaultSource is its source unless named.
const (
	fsSubtype     = "cloudlet"
	defaultSource = "cloudlet"
	maxSourceLen  = 128
)

// File is what a mounted file serves. Size is in bytes and constant. ReadAt is safe for
// concurrent use, obeys ctx, and fills p wholly or returns an error (io.EOF only at the end).
type File interface {
	Size() int64
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
}

// Options says what Mount serves and how. Memory and Disk are required.
type Options struct {
	Memory, Disk File
	// Info is the content of info.json.
	Info []byte
	// Name is the source shown in /proc/mounts ("cloudlet" if empty); characters that mount
	// options cannot hold are replaced.
	Name string
	// AllowOther lets users other than the mounting one use the files.
	AllowOther bool
	// ReadAheadKiB is the kernel's read-ahead for this mount; 0 leaves its default. That it
	// could not be set is told by Stats and is no error.
	ReadAheadKiB int
	// Record makes Server.Touches exact: the kernel then reads single pages, not what is around
	// them, so reads take longer.
	Record bool
	// Socket is the path of the control socket, "" for none.
	Socket string
	// Status returns what the control socket shows under "image"; it may be nil.
	Status func() any
	// Log takes messages; nil discards them.
	Log *slog.Logger
}

func (o *Options) check() error {
	for _, f := range []struct {
		name string
		file File
	}{{MemoryName, o.Memory}, {DiskName, o.Disk}} {
		if f.file == nil {
			return fmt.Errorf("no %s file given", f.name)
		}
		if n := f.file.Size(); n < 0 {
			return fmt.Errorf("%s file has size %d", f.name, n)
		}
	}
	if o.ReadAheadKiB < 0 {
		return fmt.Errorf("read-ahead of %d KiB: want 0 or more", o.ReadAheadKiB)
	}
	if len(o.Socket) > maxSocketLen {
		return fmt.Errorf("control socket %s: path has %d bytes, the system allows %d: use a shorter folder", o.Socket, len(o.Socket), maxSocketLen)
	}
	return nil
}

// source returns the mount's source name, fit for mount options and /proc/mounts.
func (o *Options) source() string {
	name := strings.Map(func(c rune) rune {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.ContainsRune("._-+:/@", c):
			return c
		}
		return '_'
	}, o.Name)
	if name == "" {
		return defaultSource
	}
	return name[:min(len(name), maxSourceLen)]
}
