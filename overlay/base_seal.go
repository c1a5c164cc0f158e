package overlay

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// SealBase makes a base of a folder that holds memory and disk and, as the base has them,
// state, kernel and initrd: it hashes all of them, punches zero pages into holes, and
// writes hash lists and manifest.json, in this order and synced, so a folder with a manifest
// is whole. machine is a JSON object, kept in canonical form; none is {}. Nobody may write
// to the files meanwhile. After an error the folder is not a base and can be sealed again.
func SealBase(ctx context.Context, dir string, machine json.RawMessage, p Progress) (*Base, error) {
	if err := sealBase(ctx, dir, machine, p); err != nil {
		return nil, fmt.Errorf("seal base %s: %w", dir, baseSpaceError(dir, err))
	}
	return OpenBase(dir)
}

func sealBase(ctx context.Context, dir string, machine json.RawMessage, p Progress) (err error) {
	manifest := filepath.Join(dir, BaseManifestFile)
	if _, err := os.Lstat(manifest); !errors.Is(err, fs.ErrNotExist) {
		return errors.Join(fmt.Errorf("%s is there already: the folder is sealed", BaseManifestFile), err)
	}
	machine, err = canonicalMachine(machine)
	if err != nil {
		return err
	}
	man := &BaseManifest{Format: baseFormat, Version: baseVersion, Machine: machine}
	defer func() {
		if err != nil {
			for _, s := range Spaces {
				os.Remove(filepath.Join(dir, baseListName(s)))
				os.Remove(filepath.Join(dir, baseSumsName(s)))
			}
		}
	}()
	if man.Memory, err = sealBaseImage(ctx, dir, Memory, p); err != nil {
		return err
	}
	if man.Disk, err = sealBaseImage(ctx, dir, Disk, p); err != nil {
		return err
	}
	parts := []struct {
		name string
		part **BasePart
	}{{BaseStateFile, &man.State}, {BaseKernelFile, &man.Kernel}, {BaseInitrdFile, &man.Initrd}}
	for _, m := range parts {
		if *m.part, err = sealBasePart(ctx, filepath.Join(dir, m.name)); err != nil {
			return err
		}
	}
	data, err := encodeBaseManifest(man)
	if err != nil {
		return err
	}
	if err := man.check(); err != nil {
		return err
	}
	return writeBaseFile(manifest, data)
}

// sealBaseImage writes the hash list of one image and frees its zero pages.
func sealBaseImage(ctx context.Context, dir string, s Space, p Progress) (meta BaseImage, err error) {
	path := filepath.Join(dir, s.String())
	f, err := os.OpenFile(path, os.O_RDWR|openBaseFlags, 0)
	if err != nil {
		return meta, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return meta, err
	}
	if !info.Mode().IsRegular() {
		return meta, fmt.Errorf("%s is not a regular file", path)
	}
	if err := checkBaseImageSize(path, info.Size()); err != nil {
		return meta, err
	}
	meta.Size = info.Size()
	track := &baseTracker{phase: "hash " + s.String(), total: meta.Size, p: p}
	err = createBaseFile(filepath.Join(dir, baseListName(s)), func(list *os.File) error {
		err := scanBaseImage(ctx, f, meta.Size, func(c baseChunk, data []byte) error {
			hashes, err := sealBaseChunk(f, c, data)
			if err == nil {
				_, err = list.WriteAt(hashes, c.off/PageSize*baseHashLen)
			}
			track.add(c.n)
			return err
		})
		if err != nil {
			return err
		}
		meta.HashList, meta.HashRoot, err = sealBaseList(ctx, filepath.Join(dir, baseSumsName(s)), list, baseListSize(meta.Size))
		return err
	})
	if err != nil {
		return meta, err
	}
	return meta, f.Sync()
}

// sealBaseChunk returns the hashes of a chunk's pages and makes holes of its zero pages.
func sealBaseChunk(f *os.File, c baseChunk, data []byte) ([]byte, error) {
	if c.hole {
		return bytes.Repeat(baseZeroHash[:], int(c.n/PageSize)), nil
	}
	hashes := make([]byte, 0, c.n/PageSize*baseHashLen)
	err := eachBaseRun(data, func(start, end int, zero bool) error {
		if zero {
			hashes = append(hashes, bytes.Repeat(baseZeroHash[:], (end-start)/PageSize)...)
			return punchBaseHole(f, c.off+int64(start), int64(end-start))
		}
		for at := start; at < end; at += PageSize {
			h := Sum(data[at : at+PageSize])
			hashes = append(hashes, h[:]...)
		}
		return nil
	})
	return hashes, err
}

// sealBaseList hashes a hash list as a whole and by blocks, and writes the blocks' hashes.
func sealBaseList(ctx context.Context, sumsPath string, list io.ReaderAt, size int64) (whole, root Hash, err error) {
	if whole, err = baseFileHash(ctx, io.NewSectionReader(list, 0, size)); err != nil {
		return whole, root, err
	}
	sums, err := baseListSums(list, size)
	if err != nil {
		return whole, root, err
	}
	return whole, baseSumsRoot(sums), writeBaseFile(sumsPath, baseSumsBytes(sums))
}

// hashBaseList hashes a hash list as a whole and by blocks.
func hashBaseList(ctx context.Context, list io.ReaderAt, size int64) (whole, root Hash, err error) {
	if whole, err = baseFileHash(ctx, io.NewSectionReader(list, 0, size)); err != nil {
		return whole, root, err
	}
	sums, err := baseListSums(list, size)
	return whole, baseSumsRoot(sums), err
}

// sealBasePart hashes and syncs a plain member; nil if there is none.
func sealBasePart(ctx context.Context, path string) (part *BasePart, err error) {
	f, err := openBaseFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	h, err := baseFileHash(ctx, f)
	if err != nil {
		return nil, fmt.Errorf("hash %s: %w", path, err)
	}
	return &BasePart{Size: info.Size(), SHA256: h}, f.Sync()
}

// baseFileHash hashes r to its end.
func baseFileHash(ctx context.Context, r io.Reader) (h Hash, err error) {
	sum := sha256.New()
	buf := make([]byte, 256<<10)
	for {
		if err := ctx.Err(); err != nil {
			return h, err
		}
		n, err := r.Read(buf)
		sum.Write(buf[:n])
		if err == io.EOF {
			sum.Sum(h[:0])
			return h, nil
		}
		if err != nil {
			return h, err
		}
	}
}

// writeBaseFile makes a file of data, whole or not at all.
func writeBaseFile(path string, data []byte) error {
	return createBaseFile(path, func(f *os.File) error {
		_, err := f.Write(data)
		return err
	})
}

// createBaseFile lets fill write a temporary file, then syncs it and gives it its name.
func createBaseFile(path string, fill func(*os.File) error) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*.tmp")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close() // a second Close after a failed one only says so
			os.Remove(f.Name())
		}
	}()
	if err := fill(f); err != nil {
		return err
	}
	if err := errors.Join(f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncBaseDir(dir)
}

func syncBaseDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
