package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"cloudlet/api"
	"cloudlet/overlay"
	"cloudlet/overlay/source"
)

func (s *Service) overlayFile(id string) string { return s.path("overlays", id, "overlay") }

// Overlays lists the overlays of the store, the oldest first.
func (s *Service) Overlays(ctx context.Context) ([]api.Overlay, error) {
	ids, err := s.list("overlays")
	if err != nil {
		return nil, fail(err)
	}
	out := []api.Overlay{}
	for _, id := range ids {
		o, err := s.describeOverlay(ctx, id)
		if os.IsNotExist(err) {
			continue // removed since
		}
		if err != nil {
			o = api.Overlay{ID: id, Name: s.nameOf("overlays", id), Problem: err.Error()}
		}
		out = append(out, o)
	}
	slices.SortFunc(out, func(a, b api.Overlay) int { return a.Created.Compare(b.Created) })
	return out, nil
}

// OverlayFor describes an overlay of the store, or at a URL; for a local caller also one in a
// file or at any URL.
func (s *Service) OverlayFor(ctx context.Context, caller Caller, ref string) (api.Overlay, error) {
	at, err := s.findOverlayFor(caller, "id", ref)
	if err != nil {
		return api.Overlay{}, fail(err)
	}
	if at.id == "" {
		src, err := openSource(ctx, at.source, at.allow, s.path("cache"))
		if err != nil {
			return api.Overlay{}, fail(err)
		}
		return describe(ctx, src)
	}
	o, err := s.describeOverlay(ctx, at.id)
	if err != nil {
		return o, fail(err)
	}
	o.UsedBy, err = s.overlayUsers(ctx, at.id)
	return o, fail(err)
}

// describeOverlay describes an overlay of the store. Content never changes, so what was read
// once is kept for as long as the file is the same.
func (s *Service) describeOverlay(ctx context.Context, id string) (api.Overlay, error) {
	info, err := os.Stat(s.overlayFile(id))
	if err != nil {
		return api.Overlay{}, err
	}
	s.mu.Lock()
	known := s.described[id]
	s.mu.Unlock()
	if known.info == nil || !os.SameFile(known.info, info) || known.info.Size() != info.Size() || !known.info.ModTime().Equal(info.ModTime()) {
		src, err := source.OpenFile(s.overlayFile(id))
		if err != nil {
			return api.Overlay{}, err
		}
		o, err := describe(ctx, src)
		if err != nil {
			return o, err
		}
		known = description{info, o}
		s.mu.Lock()
		if len(s.described) >= maxDescribed {
			clear(s.described) // rare, and cheap to make again
		}
		s.described[id] = known
		s.mu.Unlock()
	}
	out := known.overlay
	var l label
	if err := readJSON(s.path("overlays", id, "record.json"), &l); ignoreMissing(err) != nil {
		return out, err
	}
	out.Name, out.Created = l.Name, l.Created
	return out, nil
}

// description is what an overlay's file says of it.
type description struct {
	info    os.FileInfo
	overlay api.Overlay
}

const maxDescribed = 10_000

// describe opens an overlay, describes and closes it.
func describe(ctx context.Context, src overlay.Source) (out api.Overlay, err error) {
	r, err := overlay.Open(ctx, src)
	if err != nil {
		return out, fail(err)
	}
	m := r.Manifest()
	out = api.Overlay{
		ID: m.ID.String(), Digest: r.Digest().String(), Base: m.Base.String(), Parent: m.Parent.String(), Depth: m.Depth,
		Size: r.Size(), MemorySize: m.MemorySize, DiskSize: m.DiskSize, Resumable: m.State != nil, Machine: m.Machine,
	}
	out.Strategy, err = json.Marshal(m.Strategy)
	if err == nil {
		out.Stats, err = json.Marshal(m.Stats)
	}
	return out, fail(errors.Join(err, r.Close()))
}

// importOverlay copies an overlay from a file or URL into the store. Its frames are checked
// against their hashes, and, where its base and parents are here, every page against its id.
func (s *Service) importOverlay(ctx context.Context, at location, name string, p api.Progress) (out api.Overlay, err error) {
	src, err := openSource(ctx, at.source, at.allow, s.path("cache"))
	if err != nil {
		return out, fmt.Errorf("import overlay: %w", err)
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	if err := s.roomFor(src.Size()); err != nil {
		return out, err
	}
	st, err := s.newStage(ctx, "overlay")
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(s.spaceError(err), st.drop()) }()
	err = writeFile(filepath.Join(st.dir, "overlay"), func(f *os.File) error { return copySource(ctx, f, src, p) })
	if err != nil {
		return out, fmt.Errorf("import overlay %s: %w", src, err)
	}
	return s.verifyAndKeep(ctx, st.dir, shownRef(at.source), name, p)
}

// verifyAndKeep checks the file "overlay" in dir and moves it into the store.
func (s *Service) verifyAndKeep(ctx context.Context, dir, ref, name string, p api.Progress) (out api.Overlay, err error) {
	if _, err := s.verifyOverlay(ctx, location{source: filepath.Join(dir, "overlay")}, p); err != nil {
		return out, fmt.Errorf("import overlay %s: %w", ref, err)
	}
	return s.keepOverlay(ctx, dir, name)
}

// copySource writes all of src to f.
func copySource(ctx context.Context, f *os.File, src source.Source, p api.Progress) error {
	buf := make([]byte, 1<<20)
	for off := int64(0); off < src.Size(); {
		n, err := src.ReadAt(ctx, buf[:min(int64(len(buf)), src.Size()-off)], off)
		if err != nil && err != io.EOF {
			return err
		}
		if _, err := f.Write(buf[:n]); err != nil {
			return err
		}
		off += int64(n)
		overlay.Progress(p).Report("copy", off, src.Size())
	}
	return nil
}

// keepOverlay moves dir, which holds the file "overlay", into the store.
func (s *Service) keepOverlay(ctx context.Context, dir, name string) (out api.Overlay, err error) {
	src, err := source.OpenFile(filepath.Join(dir, "overlay"))
	if err != nil {
		return out, err
	}
	if out, err = describe(ctx, src); err != nil {
		return out, err
	}
	err = s.locked(ctx, func() error {
		if err := s.checkNameFree(name, out.ID); err != nil {
			return err
		}
		if _, err := os.Stat(s.overlayFile(out.ID)); err == nil {
			if name == "" {
				return nil // here already, and so the same
			}
			return writeJSON(s.path("overlays", out.ID, "record.json"), label{name, time.Now().UTC()})
		}
		if err := writeJSON(filepath.Join(dir, "record.json"), label{name, time.Now().UTC()}); err != nil {
			return err
		}
		keep := s.path("overlays", out.ID)
		if err := os.Mkdir(keep, 0o700); err != nil && !os.IsExist(err) {
			return err
		}
		for _, f := range []string{"record.json", "overlay"} {
			if err := os.Rename(filepath.Join(dir, f), filepath.Join(keep, f)); err != nil {
				return err
			}
		}
		return errors.Join(syncDir(keep), syncDir(s.path("overlays")))
	})
	if err != nil {
		return out, fmt.Errorf("store overlay %.12s: %w", out.ID, err)
	}
	return s.describeOverlay(context.WithoutCancel(ctx), out.ID) // it is in the store now
}

// verifyOverlay checks an overlay in the store, in a file or at a URL.
func (s *Service) verifyOverlay(ctx context.Context, at location, p api.Progress) (v api.VerifiedOverlay, err error) {
	launch, err := s.openChain(ctx, at)
	if err == nil {
		defer launch.close()
		v.Pages = true
		err = launch.image.Verify(ctx, overlay.Progress(p))
	} else if api.CodeOf(err) == api.NotFound {
		var src source.Source
		if src, err = openSource(ctx, at.source, at.allow, s.path("cache")); err != nil {
			return v, err
		}
		r, oerr := overlay.Open(ctx, src)
		if oerr != nil {
			return v, oerr
		}
		err = errors.Join(r.Verify(ctx, overlay.Progress(p)), r.Close())
	}
	if err != nil {
		return v, err
	}
	src, err := openSource(ctx, at.source, at.allow, s.path("cache"))
	if err != nil {
		return v, err
	}
	v.Overlay, err = describe(ctx, src)
	return v, err
}

// DeleteOverlay removes an overlay that nothing uses from the store.
func (s *Service) DeleteOverlay(ctx context.Context, ref string) error {
	return fail(s.locked(ctx, func() error {
		at, err := s.findStored(ref)
		if err != nil && strings.ContainsRune(ref, '/') {
			return api.Errorf(api.Invalid, "%.200s is a file or URL, not an overlay in the store", ref).Fix("remove the file itself")
		}
		if err != nil {
			return err
		}
		users, err := s.overlayUsers(ctx, at.id)
		if err != nil {
			return err
		}
		if err := s.deleteUnused("overlay", s.path("overlays", at.id), "", users); err != nil {
			return err
		}
		return ignoreMissing(os.Remove(s.profilePath(at.id)))
	}))
}

// overlayUsers names what keeps an overlay in the store: overlays made on it and instances.
func (s *Service) overlayUsers(ctx context.Context, id string) ([]string, error) {
	overlays, err := s.Overlays(ctx)
	if err != nil {
		return nil, err
	}
	var users []string
	for _, o := range overlays {
		if o.Parent == id {
			users = append(users, fmt.Sprintf("overlay %.12s", o.ID))
		}
	}
	instances, err := s.imageUsers(id)
	return append(users, instances...), err
}

// writeFile makes path by write, in a temporary file beside it; on error nothing is left.
func writeFile(path string, write func(*os.File) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			f.Close() // may be closed already; the file goes anyway
			err = errors.Join(fmt.Errorf("write %s: %w", path, err), os.Remove(f.Name()))
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func filepathBase(path string) string { return filepath.Base(path) }

// joinSome joins the first few of a list of users.
func joinSome(users []string) string {
	if len(users) > 5 {
		users = append(slices.Clone(users[:5]), fmt.Sprintf("%d more", len(users)-5))
	}
	return strings.Join(users, ", ")
}
