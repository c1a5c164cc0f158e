package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"cloudlet/api"
)

const pageSize = 4096

// residue is what a guest has changed: pages of 4 KiB of its memory and its disk that differ
// from the launch image at the same place, zero pages left out, the memory's before the disk's
// and each in the order of addresses. It is found without the program: memory as the kernel
// has it in QEMU's process, the disk as qemu-img reads it, the launch image through a mount
// of its own. Zstd is what `zstd -3` makes of them as one stream.
type residue struct {
	Memory int64 `json:"memory_pages"`
	Disk   int64 `json:"disk_pages"`
	Zero   int64 `json:"zero_pages"` // left out
	Plain  int64 `json:"plain_bytes"`
	Zstd   int64 `json:"zstd_3_bytes"`
}

// residue pauses an instance of the application at a, and lets it run on.
func (s *session) residue(ctx context.Context, in api.Instance) (r residue, err error) {
	if err := os.MkdirAll(s.scratch(), 0o755); err != nil {
		return r, err
	}
	z, err := startZstd(ctx)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, z.end(&r)) }()
	if _, err := s.a.Client.Act(ctx, in.ID, api.ActionPause); err != nil {
		return r, err
	}
	defer func() {
		_, cerr := s.a.Client.Act(context.WithoutCancel(ctx), in.ID, api.ActionContinue)
		err = errors.Join(err, cerr)
	}()
	if r.Memory, err = changedMemory(in.PID, filepath.Join(s.mount(), "memory"), z); err != nil {
		return r, err
	}
	now := filepath.Join(s.scratch(), "disk.now")
	if err := s.presentDisk(ctx, in.ID, now); err != nil {
		return r, err
	}
	r.Disk, err = changedDisk(now, filepath.Join(s.mount(), "disk"), z)
	return r, errors.Join(err, os.Remove(now))
}

// presentDisk writes the disk of a paused instance to a file.
func (s *session) presentDisk(ctx context.Context, id, to string) error {
	ref, err := json.Marshal(map[string]any{
		"driver": "qcow2", "file": map[string]any{"driver": "file", "filename": s.a.Path("instances", id, "vm", "disk.0.qcow2")},
		"backing": map[string]any{"driver": "raw", "file": map[string]any{"driver": "file", "filename": filepath.Join(s.mount(), "disk")}},
	})
	if err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "qemu-img", "convert", "-U", "-O", "raw", "json:"+string(ref), to).CombinedOutput(); err != nil {
		return fmt.Errorf("qemu-img convert: %w: %s", err, out)
	}
	return nil
}

// changedDisk gives z the pages of a file that differ from another one.
func changedDisk(path, launch string, z *zstd) (n int64, err error) {
	now, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer now.Close()
	old, err := os.Open(launch)
	if err != nil {
		return 0, err
	}
	defer old.Close()
	info, err := now.Stat()
	if err != nil {
		return 0, err
	}
	for off := int64(0); off < info.Size(); off += batch {
		changed, err := z.changedAt(position{now, off}, position{old, off}, min(batch, info.Size()-off))
		n += changed
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// batch is how much is compared at once.
const batch = 1 << 20

func readAt(f *os.File, p []byte, off int64) error {
	_, err := f.ReadAt(p, off)
	return err
}

// mapping is a part of a process's address space that shows its memory file.
type mapping struct{ begin, end, off int64 }

// mappings lists those of QEMU's memory file, by address.
func mappings(pid int) (list []mapping, err error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		f := strings.Fields(line)
		if len(f) < 6 || filepath.Base(f[5]) != "memory" {
			continue
		}
		var m mapping
		if _, err := fmt.Sscanf(f[0]+" "+f[2], "%x-%x %x", &m.begin, &m.end, &m.off); err != nil {
			return nil, fmt.Errorf("parse %q: %w", line, err)
		}
		list = append(list, m)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("process %d maps no file memory", pid)
	}
	return list, nil
}

// changedMemory gives z the pages of a paused QEMU's memory that differ from the launch image,
// whose memory is in a file.
// Those that are not anonymous are the file's, and not read, so that nobody takes them for
// touched.
func changedMemory(pid int, path string, z *zstd) (n int64, err error) {
	list, err := mappings(pid)
	if err != nil {
		return 0, err
	}
	var files [3]*os.File
	for i, name := range []string{fmt.Sprintf("/proc/%d/pagemap", pid), fmt.Sprintf("/proc/%d/mem", pid), path} {
		if files[i], err = os.Open(name); err != nil {
			return 0, err
		}
		defer files[i].Close()
	}
	pagemap, mem, launch := files[0], files[1], files[2]
	bits := make([]byte, batch/pageSize*8)
	for _, m := range list {
		for at := m.begin; at < m.end; at += batch {
			pages := min(batch, m.end-at) / pageSize
			if err := readAt(pagemap, bits[:pages*8], at/pageSize*8); err != nil {
				return n, fmt.Errorf("read pagemap: %w", err)
			}
			for i := int64(0); i < pages; {
				first := i
				for i < pages && anonymous(bits[i*8:]) {
					i++
				}
				if i == first {
					i++
					continue
				}
				from := at + first*pageSize
				changed, err := z.changedAt(position{mem, from}, position{launch, m.off + from - m.begin}, (i-first)*pageSize)
				n += changed
				if err != nil {
					return n, err
				}
			}
		}
	}
	return n, nil
}

// anonymous reports whether a page by its pagemap entry is the process's own: present or
// swapped, and not of a file.
func anonymous(entry []byte) bool {
	e := binary.LittleEndian.Uint64(entry)
	return e>>62 != 0 && e>>61&1 == 0
}

// zstd is the program at work.
type zstd struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    counter
	stderr bytes.Buffer
	plain  int64
	zero   int64

	now, old [batch]byte // what is compared
}

type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}

func startZstd(ctx context.Context) (z *zstd, err error) {
	z = &zstd{cmd: exec.CommandContext(ctx, "zstd", "-3", "-q", "-c")}
	z.cmd.Stdout, z.cmd.Stderr = &z.out, &z.stderr
	if z.in, err = z.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	return z, z.cmd.Start()
}

// position is where in a file something stands.
type position struct {
	file *os.File
	off  int64
}

// changedAt reads size bytes, at most a batch, at both positions and does as changed does.
func (z *zstd) changedAt(now, old position, size int64) (int64, error) {
	a, b := z.now[:size], z.old[:size]
	if err := errors.Join(readAt(now.file, a, now.off), readAt(old.file, b, old.off)); err != nil {
		return 0, err
	}
	return z.changed(a, b)
}

// changed compresses the pages of now that differ from old, both of whole pages, apart from
// zero pages, and returns how many it took.
func (z *zstd) changed(now, old []byte) (n int64, err error) {
	for off := 0; off < len(now); off += pageSize {
		p := now[off:][:pageSize]
		if bytes.Equal(p, old[off:][:pageSize]) {
			continue
		}
		if bytes.Equal(p, zeroPage[:]) {
			z.zero++
			continue
		}
		if _, err := z.in.Write(p); err != nil {
			return n, err
		}
		n++
		z.plain += pageSize
	}
	return n, nil
}

var zeroPage [pageSize]byte

// end waits for the program and completes r.
func (z *zstd) end(r *residue) error {
	if err := errors.Join(z.in.Close(), z.cmd.Wait()); err != nil {
		return fmt.Errorf("zstd: %w: %s", err, z.stderr.Bytes())
	}
	r.Plain, r.Zero, r.Zstd = z.plain, z.zero, z.out.n
	return nil
}
