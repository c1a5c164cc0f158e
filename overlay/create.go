package overlay

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"path/filepath"
	"runtime"
)

// Launch is a captured launch VM: what Create compares with its parent.
type Launch struct {
	Parent *Image // the launch image it was resumed from
	// Below, if not nil, is what Memory and Disk are changes of, an image whose chain begins
	// with that of Parent: what the rest of its chain changes becomes part of the overlay.
	Below   *Image
	Machine json.RawMessage // machine configuration, opaque here
	State   []byte          // device state; nil: the overlay cannot be resumed
	Memory  Changes
	Disk    Changes
	Profile []Addr // order of first touches, may be nil; its pages come first, in small frames
}

// CreateOptions are the settings of Create; the zero value makes a "balanced" overlay with
// all cores.
type CreateOptions struct {
	Strategy Strategy // the zero value is "balanced"
	Workers  int      // 0: one for each core
	Progress Progress
	// Quick is for few pages that somebody waits for. It does not look whether they stand
	// elsewhere in the base or the parents, which takes reading all of these, and takes each
	// page of Memory as changed, which saves decoding the parent's.
	Quick bool
	// Without turns off classes of pages that are referred to instead of stored, to find out
	// what they save; the overlay's id is the same.
	Without Classes

	dedup int // 0: dedupEntries
}

// Classes are the ways in which a page need not be stored.
type Classes struct {
	Zero, Base, Parent, Self bool
}

// Created says what Create has made.
type Created struct {
	ID       Hash
	Digest   Hash
	Size     int64 // of the file, in bytes
	Manifest *Manifest
}

// dedupEntries bounds the tables of page hashes that find pages equal to one another, to
// about 100 bytes each; pages behind that many are stored as they are.
const dedupEntries = 1 << 20

// Create writes the overlay of l to path, by a temporary file in the same folder: on error
// nothing is left. The result depends on l and the strategy only. Memory: a few MiB a
// worker, the dedup tables, about 20 bytes for each page of the overlay, and up to 20 MiB
// while pages are ordered by similarity. Where the
// parent's chain has MaxDepth overlays the result contains them all and sits on the base.
func Create(ctx context.Context, path string, l Launch, o CreateOptions) (*Created, error) {
	made, err := createAt(ctx, path, l, o)
	if err != nil {
		return nil, fmt.Errorf("create overlay %s: %w", path, baseSpaceError(path, err))
	}
	return made, nil
}

func createAt(ctx context.Context, path string, l Launch, o CreateOptions) (*Created, error) {
	spool, err := newSpool(filepath.Dir(path)) // first: it shows whether the folder takes files
	if err != nil {
		return nil, err
	}
	defer spool.Close() // it has no name, and nobody reads it again
	c, err := newCreation(ctx, l, o)
	if err != nil {
		return nil, err
	}
	if err := c.scan(ctx); err != nil {
		return nil, err
	}
	return c.write(ctx, path, spool)
}

// creation is one run of Create.
type creation struct {
	l        Launch
	strategy Strategy
	tools    tools
	workers  int
	progress Progress
	dedup    int // entries in each of parent and self
	quick    bool
	without  Classes
	manifest Manifest
	prints   *Fingerprints
	identity hash.Hash

	stored []Addr // ascending
	refs   []ref
	parent map[Hash]Addr // pages that the overlays of the parent store
	self   map[Hash]Addr // pages of stored
}

func newCreation(ctx context.Context, l Launch, o CreateOptions) (*creation, error) {
	if o.dedup == 0 {
		o.dedup = dedupEntries
	}
	if o.Strategy == (Strategy{}) {
		o.Strategy, _ = ParseStrategy("")
	}
	if err := o.Strategy.Validate(); err != nil {
		return nil, err
	}
	programs, err := o.Strategy.tools(ctx)
	if err != nil {
		return nil, err
	}
	o.Strategy.Encoder = o.Strategy.encoder(programs)
	if len(l.State) > MaxStateSize {
		return nil, fmt.Errorf("device state has %d bytes, over the limit of %d", len(l.State), MaxStateSize)
	}
	machine, err := compactJSON(l.Machine)
	if err != nil {
		return nil, fmt.Errorf("machine configuration: %w", err)
	}
	if len(l.State) == 0 {
		l.State = nil
	}
	if l.Below != nil {
		if err := l.addBelow(ctx); err != nil {
			return nil, err
		}
	}
	if len(l.Parent.chain) == MaxDepth {
		l.Memory = l.Memory.over(imageChanges(ctx, l.Parent, Memory, 0))
		l.Disk = l.Disk.over(imageChanges(ctx, l.Parent, Disk, 0))
		flat, err := NewImage(l.Parent.base, nil, ImageOptions{})
		if err != nil {
			return nil, err
		}
		l.Parent = flat
	}
	p := l.Parent
	if err := errors.Join(l.Memory.check(Memory, p.Size(Memory)), l.Disk.check(Disk, p.Size(Disk))); err != nil {
		return nil, err
	}
	if !o.Quick {
		l.Memory = l.Memory.withoutHoles(ctx, p, Memory)
	}
	l.Disk = l.Disk.withoutHoles(ctx, p, Disk)
	holds := func(a Addr) bool { return a.Offset() < p.Size(a.Space()) }
	if err := checkProfile(l.Profile, holds); err != nil {
		return nil, err
	}
	c := &creation{l: l, without: o.Without, strategy: o.Strategy, tools: programs, workers: o.Workers, progress: o.Progress, dedup: o.dedup, identity: sha256.New(), self: make(map[Hash]Addr)}
	if c.workers <= 0 {
		c.workers = runtime.GOMAXPROCS(0)
	}
	c.manifest = Manifest{
		Format: manifestFormat, Version: FormatVersion, Parent: p.ID(), Base: p.base.ID(), Depth: len(p.chain) + 1,
		MemorySize: p.Size(Memory), DiskSize: p.Size(Disk), Machine: machine, Strategy: o.Strategy,
	}
	if l.State != nil {
		h := Sum(l.State)
		c.manifest.State = &h
	}
	c.manifest.newIdentity(c.identity)
	if c.quick = o.Quick; c.quick {
		return c, nil
	}
	if !c.without.Base {
		if c.prints, err = p.base.Fingerprints(ctx, o.Progress); err != nil {
			return nil, err
		}
	}
	if c.without.Parent {
		return c, nil
	}
	return c, c.learnParent(ctx)
}

// addBelow adds what Below changes on top of Parent.
func (l *Launch) addBelow(ctx context.Context) error {
	n := len(l.Parent.chain)
	if l.Below.base.ID() != l.Parent.base.ID() || len(l.Below.chain) < n || n > 0 && l.Below.chain[n-1].ID() != l.Parent.ID() {
		return fmt.Errorf("%w: the chain of image %.12s does not begin with that of %.12s", ErrParent, l.Below.ID(), l.Parent.ID())
	}
	l.Memory = l.Memory.over(imageChanges(ctx, l.Below, Memory, n))
	l.Disk = l.Disk.over(imageChanges(ctx, l.Below, Disk, n))
	return nil
}

// learnParent hashes the pages that the overlays of the parent store, so that a page that
// moved since is found again.
func (c *creation) learnParent(ctx context.Context) error {
	c.parent = make(map[Hash]Addr)
	im := c.l.Parent
	var pages []byte
	for level := len(im.chain) - 1; level >= 0; level-- {
		r := im.chain[level]
		for i := range r.index.frames {
			if len(c.parent) >= c.dedup {
				return nil
			}
			var err error
			if pages, err = r.decodeFrame(ctx, i, im.base, nil, pages); err != nil {
				return err
			}
			f := &r.index.frames[i]
			for k := range int(f.pages) {
				a := r.index.stored[f.first+k]
				if at := im.resolve(a, len(im.chain)); at.level != level || at.entry != f.first+k {
					continue // a later overlay changed it
				}
				h := Sum(pages[k*PageSize : (k+1)*PageSize])
				if _, ok := c.parent[h]; !ok {
					c.parent[h] = a
				}
			}
		}
	}
	return nil
}

// scanned is a page that differs from its parent's.
type scanned struct {
	hash Hash
	ref  ref // kind refSelf: nothing found yet
}

// scan compares the launch VM with its parent and sorts what differs into references and
// pages to store, both ascending.
func (c *creation) scan(ctx context.Context) error {
	type chunk struct {
		s Space
		e Extent
	}
	type result struct {
		pages []scanned
		bytes int64
	}
	sources := [2]*Changes{Memory: &c.l.Memory, Disk: &c.l.Disk}
	total, done := sources[Memory].bytes()+sources[Disk].bytes(), int64(0)
	err := ordered(ctx, c.workers,
		func(yield func(chunk) error) error {
			for _, s := range Spaces {
				if err := sources[s].chunks(func(e Extent) error { return yield(chunk{s, e}) }); err != nil {
					return err
				}
			}
			return nil
		},
		func() (func(chunk) (result, error), error) {
			launch, parent := make([]byte, scanChunk), make([]byte, scanChunk)
			return func(k chunk) (result, error) {
				pages, err := c.scanChunk(ctx, k.s, k.e, sources[k.s], launch[:k.e.Len], parent[:k.e.Len])
				return result{pages, k.e.Len}, err
			}, nil
		},
		func(r result) error {
			for i := range r.pages {
				c.add(&r.pages[i])
			}
			done += r.bytes
			c.progress.Report("compare", done, total)
			return nil
		})
	c.parent, c.self = nil, nil // no longer needed, and large
	c.identity.Sum(c.manifest.ID[:0])
	return err
}

// scanChunk returns the pages of extent e that differ from the parent's. launch and parent
// are buffers of the extent's size.
func (c *creation) scanChunk(ctx context.Context, s Space, e Extent, from *Changes, launch, parent []byte) ([]scanned, error) {
	known := c.quick && s == Memory // that all of it has changed
	if !known {
		if err := c.l.Parent.readUnverified(ctx, s, parent, e.Off); err != nil {
			return nil, err
		}
	}
	if e.Zero {
		if !known && isZero(parent) {
			return nil, nil
		}
		clear(launch)
	} else if err := from.Read(launch, e.Off); err != nil {
		return nil, err
	}
	if !known && bytes.Equal(launch, parent) {
		return nil, nil
	}
	var out []scanned
	for off := 0; off < len(launch); off += PageSize {
		page := launch[off : off+PageSize]
		if !known && bytes.Equal(page, parent[off:off+PageSize]) {
			continue
		}
		p := scanned{ref: ref{addr: MakeAddr(s, (e.Off+int64(off))/PageSize), kind: refSelf}}
		if isZero(page) && !c.without.Zero {
			p.hash, p.ref.kind = zeroHash, refZero
			out = append(out, p)
			continue
		}
		p.hash = Sum(page)
		if c.prints == nil {
			// not looked for
		} else if a, ok := c.prints.Lookup(p.hash); ok {
			base := parent[off : off+PageSize] // its content is no longer needed
			if err := c.l.Parent.base.ReadVerified(a.Space(), base, a.Offset()); err != nil {
				return nil, err
			}
			if bytes.Equal(page, base) {
				p.ref.kind, p.ref.target = refBase, a
			}
		}
		out = append(out, p)
	}
	return out, nil
}

var zeroHash = Sum(zeroPage[:])

// add takes the next differing page in ascending order.
func (c *creation) add(p *scanned) {
	addIdentity(c.identity, p.ref.addr, p.hash)
	if p.ref.kind != refSelf {
		c.refs = append(c.refs, p.ref)
		return
	}
	if a, ok := c.parent[p.hash]; ok {
		c.refs = append(c.refs, ref{p.ref.addr, a, refParent})
		return
	}
	if a, ok := c.self[p.hash]; ok {
		c.refs = append(c.refs, ref{p.ref.addr, a, refSelf})
		return
	}
	c.stored = append(c.stored, p.ref.addr)
	if len(c.self) < c.dedup && !c.without.Self {
		c.self[p.hash] = p.ref.addr
	}
}
