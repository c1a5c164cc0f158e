package service

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"cloudlet/api"
	"cloudlet/overlay"
	"cloudlet/overlay/source"
)

// link is one overlay of a chain: its id, and where its bytes are.
type link struct {
	ID     string `json:"id"`
	Source string `json:"source"` // path or URL
	Size   int64  `json:"size,omitempty"`
	// Upload is not 0 where Source is the file of an upload that grows to that many bytes.
	Upload int64 `json:"upload,omitempty"`
	// Allow are the rules that a URL must pass at every request; nil: none.
	Allow []string `json:"allow,omitzero"`
	// Beginning, in the spec of a mount, is what the service has found at a URL.
	Beginning *source.Beginning `json:"beginning,omitempty"`
	keep      bool              // what is read when it is opened, for that
}

// read opens the overlay of a link.
func (l link) read(ctx context.Context, spool string) (*overlay.Reader, error) {
	r, _, err := l.begin(ctx, spool)
	return r, err
}

// begin opens the overlay of a link and returns what was read of it, if it is at a URL.
func (l link) begin(ctx context.Context, spool string) (*overlay.Reader, *source.Beginning, error) {
	l.keep = true
	src, err := l.open(ctx, spool)
	if err != nil {
		return nil, nil, err
	}
	r, err := overlay.Open(ctx, src)
	if err != nil {
		return nil, nil, err
	}
	if h, ok := src.(*source.HTTP); ok {
		return r, h.Beginning(), nil
	}
	return r, nil, nil
}

// launchImage is a base and a chain of overlays, opened.
type launchImage struct {
	base    *overlay.Base
	release func() // of the base
	readers []*overlay.Reader
	links   []link              // the one on the base first
	begun   []*source.Beginning // of each link
	hold    []string            // folders of the store that it lives in
	image   *overlay.Image
}

func (l *launchImage) close() error {
	var err error
	if l.image != nil {
		err = l.image.Close()
	}
	for _, r := range l.readers {
		err = errors.Join(err, r.Close())
	}
	if l.release != nil {
		l.release()
	}
	return err
}

// launched returns the launch image without the last own overlays, which handoffs have brought:
// what the instance was made of at first. The caller closes it before l.
func (l *launchImage) launched(own int) (*overlay.Image, error) {
	return overlay.NewImage(l.base, l.readers[:len(l.readers)-own], overlay.ImageOptions{})
}

// openLaunch opens what ref names: a base, or an overlay with its parents and its base.
func (s *Service) openLaunch(ctx context.Context, ref string) (*launchImage, error) {
	base, at, err := s.findLaunch(ref)
	if err != nil {
		return nil, err
	}
	return s.openFound(ctx, base, at)
}

// openFound opens a base, or where that is "" an overlay.
func (s *Service) openFound(ctx context.Context, base string, at location) (*launchImage, error) {
	if base != "" {
		return s.openLinks(ctx, base, nil)
	}
	return s.openChain(ctx, at)
}

// openChain opens the overlay at a location, its parents from the store, and its base.
func (s *Service) openChain(ctx context.Context, at location) (l *launchImage, err error) {
	l = &launchImage{}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	for {
		r, begun, err := link{Source: at.source, Allow: at.allow, Upload: at.upload}.begin(ctx, s.path("cache"))
		if err != nil {
			return l, err
		}
		m := r.Manifest()
		l.readers = slices.Insert(l.readers, 0, r)
		l.begun = slices.Insert(l.begun, 0, begun)
		l.links = slices.Insert(l.links, 0, link{ID: m.ID.String(), Source: at.source, Size: r.Size(), Upload: at.upload, Allow: at.allow})
		s.holdOverlay(l, at.source)
		if m.Parent == m.Base {
			return l, s.finish(l, m.Base.String(), m.ID)
		}
		if len(l.links) == overlay.MaxDepth {
			return l, fmt.Errorf("%w: the chain of overlay %.12s is over %d deep", overlay.ErrParent, l.links[0].ID, overlay.MaxDepth)
		}
		at, err = s.findStored(m.Parent.String())
		if err != nil {
			return l, api.Errorf(api.NotFound, "overlay %.12s needs its parent, overlay %s, which is not in %s", m.ID, m.Parent, s.cfg.Dir).
				Fix("import it with `cloudlet overlay import FILE`")
		}
	}
}

// openLinks opens a chain whose places are known.
func (s *Service) openLinks(ctx context.Context, base string, links []link) (l *launchImage, err error) {
	l = &launchImage{links: links}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.close())
		}
	}()
	for i := range links {
		links[i] = s.whereIs(links[i])
		at := links[i]
		r, begun, err := at.begin(ctx, s.path("cache"))
		if err != nil {
			return l, err
		}
		l.readers, l.begun = append(l.readers, r), append(l.begun, begun)
		s.holdOverlay(l, at.Source)
		if r.ID().String() != at.ID {
			return l, api.Errorf(api.Conflict, "%s holds overlay %.12s now, not %.12s: it was replaced", shownRef(at.Source), r.ID(), at.ID).Fix("put the overlay back")
		}
	}
	return l, s.finish(l, base, overlay.Hash{})
}

// whereIs returns the link as it is now: what grew may be whole, and in the store.
func (s *Service) whereIs(l link) link {
	if _, err := os.Stat(l.Source); l.Upload > 0 && errors.Is(err, fs.ErrNotExist) {
		l.Source, l.Upload = s.overlayFile(l.ID), 0
	}
	return l
}

// finish opens the base and merges.
func (s *Service) finish(l *launchImage, base string, wanted overlay.Hash) (err error) {
	l.base, l.release, err = s.openBase(base)
	if api.CodeOf(err) == api.NotFound {
		if wanted.IsZero() {
			return err
		}
		return api.Errorf(api.NotFound, "overlay %.12s needs base %s, which is not in %s", wanted, base, s.cfg.Dir).
			Fix("import it with `cloudlet base import FILE`")
	}
	if err != nil {
		return err
	}
	l.hold = append(l.hold, l.base.Dir())
	l.image, err = overlay.NewImage(l.base, l.readers, overlay.ImageOptions{})
	return err
}

// holdOverlay notes the folder of an overlay that lies in the store.
func (s *Service) holdOverlay(l *launchImage, source string) {
	if dir := filepath.Dir(source); filepath.Dir(dir) == s.path("overlays") {
		l.hold = append(l.hold, dir)
	}
}
