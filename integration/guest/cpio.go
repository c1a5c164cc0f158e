package guest

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
)

// cpioWriter writes a cpio archive in the "newc" format that the kernel unpacks as an
// initial file system: every entry owned by root, with time zero and inode numbers in
// order of writing, so that the same files give the same bytes.
type cpioWriter struct {
	w     io.Writer
	inode int
	err   error
}

// File modes of the archive's entries, from stat(2).
const (
	cpioFolder = 0o040000
	cpioDevice = 0o020000
	cpioFile   = 0o100000
)

var errArchiveTooLarge = errors.New("larger than the archive format's 4 GiB")

// folder adds an empty folder; a parent must come before what is in it.
func (c *cpioWriter) folder(name string) { c.entry(name, cpioFolder|0o755, nil, 0, 0) }

// file adds a regular file.
func (c *cpioWriter) file(name string, perm fs.FileMode, data []byte) {
	c.entry(name, cpioFile|uint32(perm.Perm()), data, 0, 0)
}

// device adds a character device.
func (c *cpioWriter) device(name string, perm fs.FileMode, major, minor uint32) {
	c.entry(name, cpioDevice|uint32(perm.Perm()), nil, major, minor)
}

// close ends the archive and returns the first error of any call.
func (c *cpioWriter) close() error {
	c.entry("TRAILER!!!", 0, nil, 0, 0)
	return c.err
}

func (c *cpioWriter) entry(name string, mode uint32, data []byte, major, minor uint32) {
	if c.err != nil {
		return
	}
	if int64(len(data)) > 1<<32-1 {
		c.err = fmt.Errorf("add %s: %w", name, errArchiveTooLarge)
		return
	}
	c.inode++
	links := 1
	if mode&0o170000 == cpioFolder {
		links = 2
	}
	// ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
	header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		c.inode, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(name)+1, 0)
	c.padded([]byte(header + name + "\x00"))
	c.padded(data)
}

// padded writes p and zeros up to a multiple of four bytes.
func (c *cpioWriter) padded(p []byte) {
	if c.err == nil {
		_, c.err = c.w.Write(p)
	}
	if rest := len(p) % 4; c.err == nil && rest != 0 {
		_, c.err = c.w.Write(make([]byte, 4-rest))
	}
}
