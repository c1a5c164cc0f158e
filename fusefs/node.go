package fusefs

import (
	"context"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// Inode numbers of the tree; they never change.
const (
	rootIno uint64 = iota + 1
	memoryIno
	diskIno
	infoIno
)

const statBlock = 512

// owner is what all nodes of a mount have in common in their attributes.
type owner struct {
	uid, gid uint32
	made     time.Time
}

func (o owner) fill(a *fuse.Attr, mode uint32, size int64) {
	a.Mode, a.Uid, a.Gid, a.Nlink = mode, o.uid, o.gid, 1
	a.Size, a.Blocks, a.Blksize = uint64(size), (uint64(size)+statBlock-1)/statBlock, 4096
	a.SetTimes(&o.made, &o.made, &o.made)
}

// frozen refuses changes of attributes, except that a change of the owner is accepted and
// forgotten: libvirt gives the files of a VM to QEMU's user and takes a refusal as fatal.
func frozen(in *fuse.SetAttrIn) syscall.Errno {
	const ownership = fuse.FATTR_UID | fuse.FATTR_GID | fuse.FATTR_FH | fuse.FATTR_LOCKOWNER | fuse.FATTR_CTIME | fuse.FATTR_KILL_SUIDGID
	if in.Valid&(fuse.FATTR_UID|fuse.FATTR_GID) == 0 || in.Valid&^uint32(ownership) != 0 {
		return syscall.EROFS
	}
	return 0
}

// rootNode is the directory. Its children are fixed when it is added.
type rootNode struct {
	fs.Inode
	owner owner
	files []*fileNode
}

var (
	_ = (fs.NodeOnAdder)((*rootNode)(nil))
	_ = (fs.NodeGetattrer)((*rootNode)(nil))
	_ = (fs.NodeSetattrer)((*rootNode)(nil))
	_ = (fs.NodeStatfser)((*rootNode)(nil))
	_ = (fs.NodeCreater)((*rootNode)(nil))
	_ = (fs.NodeTmpfiler)((*rootNode)(nil))
	_ = (fs.NodeUnlinker)((*rootNode)(nil))
	_ = (fs.NodeRmdirer)((*rootNode)(nil))
	_ = (fs.NodeRenamer)((*rootNode)(nil))
	_ = (fs.NodeMkdirer)((*rootNode)(nil))
	_ = (fs.NodeMknoder)((*rootNode)(nil))
	_ = (fs.NodeLinker)((*rootNode)(nil))
	_ = (fs.NodeSymlinker)((*rootNode)(nil))
)

func (r *rootNode) OnAdd(ctx context.Context) {
	for _, f := range r.files {
		r.AddChild(f.name, r.NewPersistentInode(ctx, f, fs.StableAttr{Mode: syscall.S_IFREG, Ino: f.ino}), false)
	}
}

func (r *rootNode) Getattr(ctx context.Context, fh fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	r.owner.fill(&out.Attr, 0o755, 0)
	return 0
}

func (r *rootNode) Setattr(ctx context.Context, fh fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if errno := frozen(in); errno != 0 {
		return errno
	}
	return r.Getattr(ctx, fh, out)
}

func (r *rootNode) Statfs(ctx context.Context, out *fuse.StatfsOut) syscall.Errno {
	const block = 4096
	for _, f := range r.files {
		out.Blocks += uint64(f.size()+block-1) / block
	}
	out.Files, out.Bsize, out.Frsize, out.NameLen = uint64(len(r.files)+1), block, block, 255
	return 0
}

func (r *rootNode) Create(context.Context, string, uint32, uint32, *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	return nil, nil, 0, syscall.EROFS
}

func (r *rootNode) Tmpfile(context.Context, uint32, uint32, *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	return nil, nil, 0, syscall.EROFS
}

func (r *rootNode) Unlink(context.Context, string) syscall.Errno { return syscall.EROFS }

func (r *rootNode) Rmdir(context.Context, string) syscall.Errno { return syscall.EROFS }

func (r *rootNode) Rename(context.Context, string, fs.InodeEmbedder, string, uint32) syscall.Errno {
	return syscall.EROFS
}

func (r *rootNode) Mkdir(context.Context, string, uint32, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EROFS
}

func (r *rootNode) Mknod(context.Context, string, uint32, uint32, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EROFS
}

func (r *rootNode) Link(context.Context, fs.InodeEmbedder, string, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EROFS
}

func (r *rootNode) Symlink(context.Context, string, string, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EROFS
}

// fileNode is one of the three files.
type fileNode struct {
	fs.Inode
	owner owner
	name  string
	ino   uint64
	mode  uint32
	// writable permits opens for reading and writing.
	writable bool
	reads    *reads
	// drops counts the invalidations in progress.
	drops sync.WaitGroup
}

var (
	_ = (fs.NodeGetattrer)((*fileNode)(nil))
	_ = (fs.NodeSetattrer)((*fileNode)(nil))
	_ = (fs.NodeOpener)((*fileNode)(nil))
	_ = (fs.NodeReader)((*fileNode)(nil))
	_ = (fs.NodeWriter)((*fileNode)(nil))
	_ = (fs.NodeAllocater)((*fileNode)(nil))
	_ = (fs.NodeLseeker)((*fileNode)(nil))
	_ = (fs.NodeFsyncer)((*fileNode)(nil))
	_ = (fs.NodeFlusher)((*fileNode)(nil))
)

func (f *fileNode) size() int64 { return f.reads.file.Size() }

func (f *fileNode) Getattr(ctx context.Context, fh fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	f.owner.fill(&out.Attr, f.mode, f.size())
	return 0
}

func (f *fileNode) Setattr(ctx context.Context, fh fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if errno := frozen(in); errno != 0 {
		return errno
	}
	return f.Getattr(ctx, fh, out)
}

func (f *fileNode) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	// Write-only and truncating opens are for writers only, so they fail early.
	mode := flags & syscall.O_ACCMODE
	if mode == syscall.O_WRONLY || mode == syscall.O_RDWR && !f.writable || flags&syscall.O_TRUNC != 0 {
		return nil, 0, syscall.EROFS
	}
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (f *fileNode) Read(ctx context.Context, fh fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, errno := f.reads.serve(ctx, dest, off)
	if errno != 0 {
		return nil, errno
	}
	return fuse.ReadResultData(dest[:n]), 0
}

// Write refuses, and drops the written range from the kernel's cache: the kernel copies the
// data there before it asks, and whoever has the page mapped would go on to see it. The
// pages are locked until the answer is there, hence the goroutine; run joins it.
func (f *fileNode) Write(ctx context.Context, fh fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	n := int64(len(data))
	f.drops.Go(func() {
		if errno := f.NotifyContent(off, n); errno != 0 && errno != syscall.ENOENT {
			f.reads.log.Warn("refused write may stay visible", "file", f.name, "offset", off, "length", n, "error", errno)
		}
	})
	return 0, syscall.EROFS
}

func (f *fileNode) Allocate(context.Context, fs.FileHandle, uint64, uint64, uint32) syscall.Errno {
	return syscall.EROFS
}

// Lseek answers SEEK_DATA and SEEK_HOLE as for a file without holes.
func (f *fileNode) Lseek(ctx context.Context, fh fs.FileHandle, off uint64, whence uint32) (uint64, syscall.Errno) {
	const seekData, seekHole = 3, 4
	size := uint64(f.size())
	switch {
	case whence != seekData && whence != seekHole:
		return 0, syscall.EINVAL
	case off >= size:
		return 0, syscall.ENXIO
	case whence == seekData:
		return off, 0
	}
	return size, 0
}

// Fsync has nothing to do, since nothing is ever written.
func (f *fileNode) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno { return 0 }

// Flush answers ENOSYS, which tells the kernel to close files without asking from now on.
func (f *fileNode) Flush(context.Context, fs.FileHandle) syscall.Errno { return syscall.ENOSYS }

// newRoot builds the tree over the reads of the three files.
func newRoot(memory, disk, info *reads, allowOther bool) *rootNode {
	own := owner{uint32(os.Geteuid()), uint32(os.Getegid()), time.Now()}
	mode := uint32(0o600)
	if allowOther {
		mode = 0o666
	}
	return &rootNode{owner: own, files: []*fileNode{
		{owner: own, name: MemoryName, ino: memoryIno, mode: mode, writable: true, reads: memory},
		{owner: own, name: DiskName, ino: diskIno, mode: mode, writable: true, reads: disk},
		{owner: own, name: InfoName, ino: infoIno, mode: 0o444, reads: info},
	}}
}
