package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"cloudlet/overlay"
	"cloudlet/overlay/source"
)

// guest is a base and a launch of it.
type guest struct {
	name    string
	base    string // folder
	overlay string // file; made of memory and disk where it is empty
	memory  string
	disk    string
	dir     string // for what is made on the way
}

var guestName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,30}$`)

// parseGuest reads NAME=BASE:OVERLAY, NAME=BASE:MEMORY:DISK or NAME=DIR.
func parseGuest(text, dir string) (*guest, error) {
	name, where, ok := strings.Cut(text, "=")
	if !ok || !guestName.MatchString(name) {
		return nil, fmt.Errorf("guest %q: want NAME=BASE:OVERLAY, NAME=BASE:MEMORY:DISK or NAME=DIR, the name of lower-case letters, digits and dashes", text)
	}
	g := &guest{name: name, dir: filepath.Join(dir, name)}
	switch p := strings.Split(where, ":"); len(p) {
	case 1:
		return g, g.prepared(where)
	case 2:
		g.base, g.overlay = p[0], p[1]
	case 3:
		g.base, g.memory, g.disk = p[0], p[1], p[2]
	default:
		return nil, fmt.Errorf("guest %q: too many colons", text)
	}
	return g, nil
}

// prepared finds base and overlay in a folder of the demo's, or of another guest.
func (g *guest) prepared(dir string) error {
	var made struct{ Base, Overlay string }
	b, err := os.ReadFile(filepath.Join(dir, "prepared.json"))
	if err == nil {
		err = json.Unmarshal(b, &made)
	}
	if err != nil {
		return fmt.Errorf("guest %s: %w: prepare it with make demo or make guests", g.name, err)
	}
	if made.Base == "" || made.Overlay == "" {
		return fmt.Errorf("guest %s: %s has no overlay yet: prepare it with make demo or make guests", g.name, dir)
	}
	g.base = filepath.Join(dir, "state", "bases", made.Base)
	g.overlay = filepath.Join(dir, "state", "overlays", made.Overlay, "overlay")
	return nil
}

// plain is the overlay that everything is made from: its frames cost next to nothing to read.
func (g *guest) plain() string { return filepath.Join(g.dir, "plain.overlay") }

// image opens the launch image of an overlay on the guest's base.
func (g *guest) image(ctx context.Context, path string) (*opened, error) {
	return openImage(ctx, g.base, path)
}

// opened is a launch image with what lies under it.
type opened struct {
	*overlay.Image
	reader *overlay.Reader
}

func openImage(ctx context.Context, base, path string) (_ *opened, err error) {
	b, err := overlay.OpenBase(base)
	if err != nil {
		return nil, err
	}
	src, err := source.OpenFile(path)
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	r, err := overlay.Open(ctx, src)
	if err != nil {
		return nil, errors.Join(err, b.Close())
	}
	im, err := overlay.NewImage(b, []*overlay.Reader{r}, overlay.ImageOptions{})
	if errors.Is(err, overlay.ErrParent) && r.Manifest().Depth > 1 {
		err = fmt.Errorf("%w: overlays of overlays are not measured", err)
	}
	if err != nil {
		return nil, errors.Join(err, r.Close(), b.Close())
	}
	return &opened{im, r}, nil
}

// Close closes image, overlay and base.
func (o *opened) Close() error {
	return errors.Join(o.Image.Close(), o.reader.Close(), o.Base().Close())
}

// prepare makes the plain overlay.
func (g *guest) prepare(ctx context.Context) (id overlay.Hash, err error) {
	if err := os.MkdirAll(g.dir, 0o755); err != nil {
		return id, err
	}
	none, err := overlay.ParseStrategy("none")
	if err != nil {
		return id, err
	}
	if g.overlay == "" {
		return g.capture(ctx, overlay.CreateOptions{Strategy: none})
	}
	im, err := g.image(ctx, g.overlay)
	if err != nil {
		return id, err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	id = im.ID()
	if have, err := g.image(ctx, g.plain()); err == nil {
		known := have.ID()
		if err := have.Close(); err != nil || known == id {
			return id, err
		}
	}
	_, err = overlay.Repack(ctx, g.plain(), im.Image, nil, overlay.CreateOptions{Strategy: none})
	return id, err
}

// capture makes the plain overlay of the launch VM's files.
func (g *guest) capture(ctx context.Context, o overlay.CreateOptions) (id overlay.Hash, err error) {
	b, err := overlay.OpenBase(g.base)
	if err != nil {
		return id, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	parent, err := overlay.NewImage(b, nil, overlay.ImageOptions{})
	if err != nil {
		return id, err
	}
	defer func() { err = errors.Join(err, parent.Close()) }()
	l := overlay.Launch{Parent: parent, Machine: b.Manifest().Machine}
	for _, f := range []struct {
		path string
		into *overlay.Changes
	}{{g.memory, &l.Memory}, {g.disk, &l.Disk}} {
		file, err := os.Open(f.path)
		if err != nil {
			return id, err
		}
		defer file.Close()
		if *f.into, err = overlay.FileChanges(file); err != nil {
			return id, err
		}
	}
	made, err := overlay.Create(ctx, g.plain(), l, o)
	if err != nil {
		return id, err
	}
	return made.ID, nil
}

// modifiedFile is the path of a sparse file with the modified pages of an image of the launch
// VM, each at its own offset.
func (g *guest) modifiedFile(s overlay.Space) string {
	return filepath.Join(g.dir, "modified-"+s.String())
}

// writeModified writes these files, for create to read as it reads what was captured.
func (g *guest) writeModified(ctx context.Context) (err error) {
	im, err := g.image(ctx, g.plain())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	for _, s := range overlay.Spaces {
		changes := im.Changes(ctx, s)
		if err := copyExtents(g.modifiedFile(s), changes); err != nil {
			return err
		}
	}
	return nil
}

func copyExtents(path string, c overlay.Changes) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buf := make([]byte, 1<<20)
	for _, e := range c.Extents {
		for off, end := e.Off, e.Off+e.Len; off < end; off += int64(len(buf)) {
			p := buf[:min(int64(len(buf)), end-off)]
			if err := c.Read(p, off); err != nil {
				return err
			}
			if _, err := f.WriteAt(p, off); err != nil {
				return err
			}
		}
	}
	return f.Sync() // else the first measurement waits for it
}

// removeModified removes what writeModified made, whether it made all of it or not, and what a
// child that was killed has left.
func (g *guest) removeModified() (err error) {
	left := []string{g.modifiedFile(overlay.Memory), g.modifiedFile(overlay.Disk), g.made()}
	parts, err := filepath.Glob(filepath.Join(g.dir, "."+filepath.Base(g.made())+"-*"))
	for _, path := range append(left, parts...) {
		if e := os.Remove(path); !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}

// writeImages writes the launch image as raw files, for the rivals that take whole files.
func (g *guest) writeImages(ctx context.Context) (err error) {
	im, err := g.image(ctx, g.plain())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	for _, s := range overlay.Spaces {
		if err := g.writeImage(ctx, im.Image, s); err != nil {
			return err
		}
	}
	return nil
}

// launchFile is the raw file of an image of the launch VM.
func (g *guest) launchFile(s overlay.Space) string {
	return filepath.Join(g.dir, "launch-"+s.String())
}

func (g *guest) writeImage(ctx context.Context, im *overlay.Image, s overlay.Space) (err error) {
	f, err := os.Create(g.launchFile(s))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size := im.Size(s)
	if err := f.Truncate(size); err != nil {
		return err
	}
	buf, zero := make([]byte, 64<<10), make([]byte, 64<<10)
	for off := int64(0); off < size; off += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), size-off)]
		if err := im.ReadPages(ctx, s, p, off); err != nil {
			return err
		}
		if string(p) == string(zero[:len(p)]) {
			continue
		}
		if _, err := f.WriteAt(p, off); err != nil {
			return err
		}
	}
	return nil
}
