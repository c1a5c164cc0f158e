package overlay

import (
	"archive/zip"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"

	"github.com/klauspost/compress/flate"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// maxBaseZipDirectory bounds what of a base zip is read to find its members.
const maxBaseZipDirectory = 1 << 20

const baseDamagedZip = "the zip is damaged or was changed: copy it again, or export the base again"

// baseImport is a base zip whose members are known to be those its manifest asks for, by
// name and announced size.
type baseImport struct {
	dir      string
	man      *BaseManifest
	manifest []byte
	members  map[string]*zip.File
}

// baseMemberError says which member of a base zip is wrong.
func baseMemberError(name string, err error) error {
	return fmt.Errorf("member %.80q: %w", name, err)
}

// openBaseZip reads directory and manifest, and checks every member's name, kind and size.
func openBaseZip(file *os.File) (*baseImport, error) {
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	r := &directoryReader{r: file}
	r.left.Store(maxBaseZipDirectory)
	zr, err := zip.NewReader(r, info.Size())
	if err != nil {
		return nil, fmt.Errorf("read zip: %w: this is not a base zip, or not a whole one: copy it again", err)
	}
	r.left.Store(1<<63 - 1)
	if err := checkBaseZipEnd(file, info.Size()); err != nil {
		return nil, err
	}
	zr.RegisterDecompressor(zip.Deflate, func(r io.Reader) io.ReadCloser {
		return flate.NewReader(bufio.NewReaderSize(r, 128<<10))
	})
	im := &baseImport{members: map[string]*zip.File{}}
	for _, f := range zr.File {
		if err := im.addMember(f); err != nil {
			return nil, baseMemberError(f.Name, err)
		}
	}
	if im.manifest, err = im.readManifest(); err != nil {
		return nil, baseMemberError(BaseManifestFile, err)
	}
	if im.man, err = parseBaseManifest(im.manifest); err != nil {
		return nil, baseMemberError(BaseManifestFile, err)
	}
	return im, im.checkMembers()
}

// addMember takes a member that can be one of a base.
func (im *baseImport) addMember(f *zip.File) error {
	known := []string{BaseManifestFile, baseListName(Disk), baseListName(Memory), Disk.String(), Memory.String()}
	switch {
	case !slices.Contains(append(known, baseParts[:]...), f.Name):
		return errors.New("a base has no member of that name: remove it from the zip, or export the base again")
	case im.members[f.Name] != nil:
		return errors.New("is there twice: " + baseDamagedZip)
	case !f.Mode().IsRegular():
		return fmt.Errorf("is a %s, not a regular file: export the base again", f.Mode().Type())
	case f.Flags&1 != 0:
		return errors.New("is encrypted: export the base again without a password")
	case f.Method != zip.Store && f.Method != zip.Deflate:
		return fmt.Errorf("compression method %d is not supported: export the base again (stored or deflated)", f.Method)
	}
	im.members[f.Name] = f
	return nil
}

func (im *baseImport) readManifest() ([]byte, error) {
	f := im.members[BaseManifestFile]
	if f == nil {
		return nil, errors.New("is missing: this is not a base zip")
	}
	if f.UncompressedSize64 > MaxBaseManifest {
		return nil, fmt.Errorf("has %d bytes, the limit is %d: %s", f.UncompressedSize64, MaxBaseManifest, baseDamagedZip)
	}
	var buf bytes.Buffer
	err := readBaseMember(f, int64(f.UncompressedSize64), func(r io.Reader) error {
		_, err := buf.ReadFrom(r)
		return err
	})
	return buf.Bytes(), err
}

// checkMembers compares the members with what the manifest says.
func (im *baseImport) checkMembers() error {
	want := map[string]bool{BaseManifestFile: true}
	for _, m := range im.man.members() {
		want[m.name] = true
		f := im.members[m.name]
		if f == nil {
			return baseMemberError(m.name, errors.New("is missing: "+baseDamagedZip))
		}
		if f.UncompressedSize64 != uint64(m.size) {
			return baseMemberError(m.name, fmt.Errorf("has %d bytes, the manifest says %d: %s", f.UncompressedSize64, m.size, baseDamagedZip))
		}
	}
	for name := range im.members {
		if !want[name] {
			return baseMemberError(name, errors.New("is not in the manifest: "+baseDamagedZip))
		}
	}
	return nil
}

// checkBaseZipEnd refuses bytes after the zip, a comment among them: archive/zip does not.
func checkBaseZipEnd(r io.ReaderAt, size int64) error {
	var end [22]byte
	if size < int64(len(end)) {
		return errors.New("read zip: too short")
	}
	if _, err := r.ReadAt(end[:], size-int64(len(end))); err != nil {
		return fmt.Errorf("read zip: %w", err)
	}
	if !bytes.HasPrefix(end[:], []byte("PK\x05\x06")) || end[20] != 0 || end[21] != 0 {
		return errors.New("read zip: bytes after the zip, or a comment: " + baseDamagedZip)
	}
	return nil
}

// readBaseMember gives fn the member's bytes; they are exactly size, with the right CRC, or
// it is an error. Not more than one byte over size is ever inflated.
func readBaseMember(f *zip.File, size int64, fn func(io.Reader) error) error {
	r, err := f.Open()
	if err != nil {
		return fmt.Errorf("%w: %s", err, baseDamagedZip)
	}
	defer r.Close()
	if err := fn(&memberReader{r: r, left: size}); err != nil {
		return err
	}
	var one [1]byte
	n, err := io.ReadFull(r, one[:])
	switch {
	case n > 0 || errors.Is(err, zip.ErrFormat): // archive/zip counts too
		return fmt.Errorf("holds more than its %d bytes: %s", size, baseDamagedZip)
	case err != io.EOF:
		return fmt.Errorf("%w: %s", err, baseDamagedZip)
	}
	return nil
}

// memberReader ends at the member's size and tells damage from the end.
type memberReader struct {
	r    io.Reader
	left int64
}

// Read implements io.Reader.
func (m *memberReader) Read(p []byte) (int, error) {
	if m.left == 0 {
		return 0, io.EOF
	}
	n, err := m.r.Read(p[:min(int64(len(p)), m.left)])
	if m.left -= int64(n); m.left == 0 {
		return n, nil // what comes behind, and the CRC, readBaseMember asks for
	}
	if err != nil {
		err = fmt.Errorf("%w: %s", baseNoEOF(err), baseDamagedZip)
	}
	return n, err
}

// extract writes all members but the manifest: the hash lists first, because they say how
// much of the images is not zero.
func (im *baseImport) extract(ctx context.Context, p Progress) error {
	var lists, parts int64
	track := &baseTracker{phase: "import base", p: p}
	for _, m := range im.man.members() {
		track.total += m.size
	}
	for _, s := range Spaces {
		lists += baseListSize(im.man.Image(s).Size)
	}
	for _, name := range baseParts {
		if part := im.man.part(name); part != nil {
			parts += part.Size
		}
	}
	if err := checkBaseSpace(im.dir, lists+parts); err != nil {
		return err
	}
	need := parts
	for _, s := range Spaces {
		n, err := im.extractList(ctx, s, track)
		if err != nil {
			return baseMemberError(baseListName(s), err)
		}
		need += n
	}
	if err := checkBaseSpace(im.dir, need); err != nil {
		return err
	}
	g, both := errgroup.WithContext(ctx)
	for _, s := range Spaces {
		g.Go(func() error {
			if err := im.extractImage(both, s, track); err != nil {
				return baseMemberError(s.String(), err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, name := range baseParts {
		if part := im.man.part(name); part != nil {
			if err := im.extractPart(ctx, name, part, track); err != nil {
				return baseMemberError(name, err)
			}
		}
	}
	return nil
}

// extractList writes a hash list and its sums, checks it, and returns how many bytes of the
// image are not zero.
func (im *baseImport) extractList(ctx context.Context, s Space, track *baseTracker) (data int64, err error) {
	meta := im.man.Image(s)
	size := baseListSize(meta.Size)
	name := baseListName(s)
	err = createBaseFile(filepath.Join(im.dir, name), func(list *os.File) error {
		err := readBaseMember(im.members[name], size, func(r io.Reader) error {
			return copyBaseChunks(ctx, r, size, track, func(p []byte, _ int64) error {
				for h := range slices.Chunk(p, int(baseHashLen)) {
					if !bytes.Equal(h, baseZeroHash[:]) {
						data += PageSize
					}
				}
				_, err := list.Write(p)
				return err
			})
		})
		if err != nil {
			return err
		}
		whole, root, err := sealBaseList(ctx, filepath.Join(im.dir, baseSumsName(s)), list, size)
		if err != nil {
			return err
		}
		if whole != meta.HashList || root != meta.HashRoot {
			return errors.New("does not match its hash in the manifest: " + baseDamagedZip)
		}
		return nil
	})
	return data, err
}

// extractImage writes an image whose pages match its list; zero pages become holes.
func (im *baseImport) extractImage(ctx context.Context, s Space, track *baseTracker) error {
	meta := im.man.Image(s)
	list, err := openBaseFile(filepath.Join(im.dir, baseListName(s)))
	if err != nil {
		return err
	}
	defer list.Close()
	want := make([]byte, baseChunkSize/PageSize*baseHashLen)
	return createBaseFile(filepath.Join(im.dir, s.String()), func(f *os.File) error {
		if err := f.Truncate(meta.Size); err != nil {
			return err
		}
		return readBaseMember(im.members[s.String()], meta.Size, func(r io.Reader) error {
			return copyBaseChunks(ctx, r, meta.Size, track, func(p []byte, off int64) error {
				hashes := want[:int64(len(p))/PageSize*baseHashLen]
				if _, err := list.ReadAt(hashes, off/PageSize*baseHashLen); err != nil {
					return baseNoEOF(err)
				}
				return writeBasePages(f, p, off, hashes)
			})
		})
	})
}

// writeBasePages writes the pages of p that are not zero, all checked against hashes.
func writeBasePages(f *os.File, p []byte, off int64, hashes []byte) error {
	return eachBaseRun(p, func(start, end int, zero bool) error {
		for at := start; at < end; at += PageSize {
			have := baseZeroHash
			if !zero {
				have = Sum(p[at : at+PageSize])
			}
			if i := int64(at) / PageSize; !bytes.Equal(have[:], hashes[i*baseHashLen:][:baseHashLen]) {
				return fmt.Errorf("page %d does not match its hash: %s", off/PageSize+i, baseDamagedZip)
			}
		}
		if zero {
			return nil
		}
		_, err := f.WriteAt(p[start:end], off+int64(start))
		return err
	})
}

func (im *baseImport) extractPart(ctx context.Context, name string, part *BasePart, track *baseTracker) error {
	return createBaseFile(filepath.Join(im.dir, name), func(f *os.File) error {
		err := readBaseMember(im.members[name], part.Size, func(r io.Reader) error {
			return copyBaseChunks(ctx, r, part.Size, track, func(p []byte, _ int64) error {
				_, err := f.Write(p)
				return err
			})
		})
		if err != nil {
			return err
		}
		h, err := baseFileHash(ctx, io.NewSectionReader(f, 0, part.Size))
		if err == nil && h != part.SHA256 {
			err = errors.New("does not match its hash in the manifest: " + baseDamagedZip)
		}
		return err
	})
}

// copyBaseChunks reads size bytes of r by chunks.
func copyBaseChunks(ctx context.Context, r io.Reader, size int64, track *baseTracker, fn func(p []byte, off int64) error) error {
	buf := make([]byte, baseChunkSize)
	for off := int64(0); off < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := buf[:min(int64(len(buf)), size-off)]
		if _, err := io.ReadFull(r, p); err != nil {
			return baseNoEOF(err)
		}
		if err := fn(p, off); err != nil {
			return err
		}
		off += int64(len(p))
		track.add(int64(len(p)))
	}
	return nil
}

// checkBaseSpace refuses what does not fit into dir's file system.
func checkBaseSpace(dir string, need int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("stat file system of %s: %w", dir, err)
	}
	free := int64(st.Bavail) * st.Bsize
	if need <= free {
		return nil
	}
	return &BaseSpaceError{Dir: dir, Need: need, Free: free}
}

// BaseSpaceError says that a base does not fit into the file system of Dir; sizes in bytes.
type BaseSpaceError struct {
	Dir        string
	Need, Free int64
}

// Error names the sizes and the remedy.
func (e *BaseSpaceError) Error() string {
	return fmt.Sprintf("no space: the base needs %s, %s has %s free: free some space there, or use another folder",
		baseGiB(e.Need), e.Dir, baseGiB(e.Free))
}

func baseGiB(n int64) string {
	if n < 1<<30 {
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
}

// directoryReader fails once more bytes were read than it has left.
type directoryReader struct {
	r    io.ReaderAt
	left atomic.Int64
}

// ReadAt implements io.ReaderAt.
func (d *directoryReader) ReadAt(p []byte, off int64) (int, error) {
	if d.left.Add(-int64(len(p))) < 0 {
		return 0, fmt.Errorf("its directory is larger than %d bytes", maxBaseZipDirectory)
	}
	return d.r.ReadAt(p, off)
}
