package overlay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// maxBaseProblems is how many problems a BaseDamage names.
const maxBaseProblems = 16

// BaseDamage is what Verify found wrong: the first problems by address, and how many
// there are.
type BaseDamage struct {
	Base     Hash
	Problems []error
	Total    int
}

// Error lists the problems, one a line.
func (e *BaseDamage) Error() string {
	var out strings.Builder
	fmt.Fprintf(&out, "base %.12s is damaged in %d places; re-import it:", e.Base, e.Total)
	for _, p := range e.Problems {
		fmt.Fprintf(&out, "\n  %v", p)
	}
	if more := e.Total - len(e.Problems); more > 0 {
		fmt.Fprintf(&out, "\n  and %d more", more)
	}
	return out.String()
}

// Unwrap returns the problems; pages among them are *BasePageError.
func (e *BaseDamage) Unwrap() []error { return e.Problems }

// Verify checks everything the base's id stands for, whatever was checked before: every
// page, the hash lists, state, kernel, initrd and the manifest itself. It returns a
// *BaseDamage, or another error if it could not finish.
func (b *Base) Verify(ctx context.Context, p Progress) error {
	v := &baseVerifier{b: b}
	data, err := readBaseManifest(b.dir)
	switch {
	case err != nil:
		v.add(0, err)
	case Sum(data) != b.id:
		v.add(0, fmt.Errorf("%s has id %.12s", BaseManifestFile, Sum(data)))
	}
	for _, s := range Spaces {
		if err := v.image(ctx, s, p); err != nil {
			return fmt.Errorf("verify base %.12s: %w", b.id, err)
		}
	}
	for _, name := range baseParts {
		if err := v.part(ctx, name); err != nil {
			return fmt.Errorf("verify base %.12s: %w", b.id, err)
		}
	}
	return v.result()
}

type baseVerifier struct {
	b *Base

	mu       sync.Mutex
	problems []baseProblem
	total    int
}

// baseProblem sorts by place: the manifest, then memory, disk and the plain members.
type baseProblem struct {
	place uint64
	err   error
}

func (v *baseVerifier) add(place uint64, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.total++
	v.problems = append(v.problems, baseProblem{place, err})
	if len(v.problems) == 4*maxBaseProblems {
		v.trimLocked()
	}
}

func (v *baseVerifier) trimLocked() {
	slices.SortStableFunc(v.problems, func(a, b baseProblem) int {
		return int(int64(a.place) - int64(b.place))
	})
	v.problems = v.problems[:min(len(v.problems), maxBaseProblems)]
}

func (v *baseVerifier) result() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.total == 0 {
		return nil
	}
	v.trimLocked()
	damage := &BaseDamage{Base: v.b.id, Total: v.total}
	for _, p := range v.problems {
		damage.Problems = append(damage.Problems, p.err)
	}
	return damage
}

// image checks the list of an image against the manifest, then the pages against the list.
func (v *baseVerifier) image(ctx context.Context, s Space, p Progress) error {
	im := &v.b.images[s]
	place := func(page int64) uint64 { return 1 + uint64(MakeAddr(s, page)) }
	whole, root, err := hashBaseList(ctx, im.list, baseListSize(im.meta.Size))
	if err != nil {
		return fmt.Errorf("read %s: %w", baseListName(s), baseNoEOF(err))
	}
	if whole != im.meta.HashList || root != im.meta.HashRoot {
		v.add(place(0), fmt.Errorf("%s does not match its hash", baseListName(s)))
	}
	track := &baseTracker{phase: "verify " + s.String(), total: im.meta.Size, p: p}
	return scanBaseImage(ctx, im.file, im.meta.Size, func(c baseChunk, data []byte) error {
		list := make([]byte, c.n/PageSize*baseHashLen)
		first := c.off / PageSize
		if _, err := im.list.ReadAt(list, first*baseHashLen); err != nil {
			return fmt.Errorf("read %s: %w", baseListName(s), baseNoEOF(err))
		}
		for i := range c.n / PageSize {
			want := list[i*baseHashLen:][:baseHashLen]
			have := baseZeroHash
			if !c.hole {
				have = basePageHash(data[i*PageSize:][:PageSize])
			}
			if !bytes.Equal(have[:], want) {
				v.add(place(first+i), &BasePageError{Base: v.b.id, Addr: MakeAddr(s, first+i)})
			}
		}
		track.add(c.n)
		return nil
	})
}

func (v *baseVerifier) part(ctx context.Context, name string) error {
	part := v.b.man.part(name)
	if part == nil {
		return nil
	}
	f, err := openBaseFile(filepath.Join(v.b.dir, name))
	if errors.Is(err, os.ErrNotExist) {
		v.add(1<<33, err)
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	h, err := baseFileHash(ctx, f)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	if h != part.SHA256 {
		v.add(1<<33, fmt.Errorf("%s does not match its hash", name))
	}
	return nil
}
