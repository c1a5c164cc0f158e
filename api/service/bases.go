package service

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"cloudlet/api"
	"cloudlet/overlay"

	"golang.org/x/sys/unix"
)

// label is what the store knows of a base or overlay beyond its content.
type label struct {
	Name    string    `json:"name,omitempty"`
	Created time.Time `json:"created"`
}

func (s *Service) baseLabel(id string) string { return s.path("bases", id+".json") }

// Bases lists the bases of the store, the oldest first.
func (s *Service) Bases(ctx context.Context) ([]api.Base, error) {
	ids, err := s.list("bases")
	if err != nil {
		return nil, fail(err)
	}
	out := []api.Base{}
	for _, id := range ids {
		b, err := s.describeBase(id)
		if os.IsNotExist(err) {
			continue // removed since
		}
		if err != nil {
			b = api.Base{ID: id, Name: s.nameOf("bases", id), Problem: err.Error()}
		}
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b api.Base) int { return a.Created.Compare(b.Created) })
	return out, nil
}

// Base describes one base, with what uses it.
func (s *Service) Base(ctx context.Context, ref string) (api.Base, error) {
	id, err := s.findBase(ref)
	if err != nil {
		return api.Base{}, fail(err)
	}
	b, err := s.describeBase(id)
	if err != nil {
		return b, fail(err)
	}
	b.UsedBy, err = s.baseUsers(ctx, id)
	return b, fail(err)
}

func (s *Service) describeBase(id string) (out api.Base, err error) {
	b, err := overlay.OpenBase(s.path("bases", id))
	if err != nil {
		return out, err
	}
	defer b.Close()
	if b.ID().String() != id {
		return out, api.Errorf(api.Damaged, "base in %s has id %s: its manifest was changed", s.path("bases", id), b.ID()).Fix("remove it and import it again")
	}
	var l label
	if err := readJSON(s.baseLabel(id), &l); ignoreMissing(err) != nil {
		return out, err
	}
	m := b.Manifest()
	out = api.Base{
		ID: id, Name: l.Name, Created: l.Created, Machine: m.Machine, Resumable: b.Resumable(),
		MemorySize: b.Size(overlay.Memory), DiskSize: b.Size(overlay.Disk),
	}
	out.Stored, err = diskUsage(s.path("bases", id))
	return out, err
}

// diskUsage returns what the files of a folder take on disk, holes not counted.
func diskUsage(dir string) (n int64, err error) {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		var st unix.Stat_t
		if unix.Lstat(dir+"/"+e.Name(), &st) == nil {
			n += st.Blocks * 512
		}
	}
	return n, err
}

// importBase takes a base from a path, or from a URL that the rules allow.
func (s *Service) importBase(ctx context.Context, req api.ImportBase, rules []string, p api.Progress) (out api.Base, err error) {
	if !isRemote(req.Source) {
		return s.importBaseFile(ctx, strings.TrimPrefix(req.Source, "file://"), req.Name, p)
	}
	src, err := openSource(ctx, req.Source, rules, s.path("cache"))
	if err != nil {
		return out, fmt.Errorf("import base: %w", err)
	}
	defer func() { err = errors.Join(err, src.Close()) }()
	if err := s.roomFor(src.Size()); err != nil {
		return out, err
	}
	st, err := s.newStage(ctx, "package")
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(s.spaceError(err), st.drop()) }()
	file := filepath.Join(st.dir, "base.zip")
	err = writeFile(file, func(f *os.File) error { return copySource(ctx, f, src, p) })
	if err != nil {
		return out, fmt.Errorf("import base %s: %w", src, err)
	}
	return s.importBaseFile(ctx, file, req.Name, p)
}

// importBaseFile takes a base from a zip into the store, every hash checked.
func (s *Service) importBaseFile(ctx context.Context, path, name string, p api.Progress) (out api.Base, err error) {
	f, err := os.Open(path)
	if err != nil {
		return out, fmt.Errorf("import base: %w", err)
	}
	defer f.Close()
	st, err := s.newStage(ctx, "base")
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, st.drop()) }()
	b, err := overlay.ImportBase(ctx, st.dir+"/base", f, overlay.Progress(p))
	if err != nil {
		return out, failAs(api.Damaged, err)
	}
	return s.keepBase(ctx, b, name)
}

// keepBase moves a finished base into the store and closes it.
func (s *Service) keepBase(ctx context.Context, b *overlay.Base, name string) (api.Base, error) {
	id := b.ID().String()
	if err := b.Close(); err != nil {
		return api.Base{}, err
	}
	err := s.locked(ctx, func() error {
		if err := s.checkNameFree(name, id); err != nil {
			return err
		}
		if _, err := os.Stat(s.path("bases", id)); err == nil {
			if name == "" {
				return nil // here already, and so the same
			}
		} else if err := os.Rename(b.Dir(), s.path("bases", id)); err != nil {
			return err
		}
		return errors.Join(writeJSON(s.baseLabel(id), label{name, time.Now().UTC()}), syncDir(s.path("bases")))
	})
	if err != nil {
		return api.Base{}, fmt.Errorf("store base %.12s: %w", id, err)
	}
	return s.describeBase(id)
}

// verifyBase reads a whole base and checks every page against its hash.
func (s *Service) verifyBase(ctx context.Context, ref string, p api.Progress) (api.Base, error) {
	b, release, err := s.openBase(ref)
	if err != nil {
		return api.Base{}, fail(err)
	}
	defer release()
	if err := b.Verify(ctx, overlay.Progress(p)); err != nil {
		return api.Base{}, failAs(api.Damaged, err)
	}
	out, err := s.describeBase(b.ID().String())
	return out, fail(err)
}

// openBase opens a base of the store and keeps it from being removed until release.
func (s *Service) openBase(ref string) (b *overlay.Base, release func(), err error) {
	id, err := s.findBase(ref)
	if err != nil {
		return nil, nil, err
	}
	l, err := tryLock(s.path("bases", id), unix.LOCK_SH)
	if err != nil {
		return nil, nil, err
	}
	if b, err = overlay.OpenBase(s.path("bases", id)); err != nil {
		l.unlock()
		return nil, nil, err
	}
	return b, func() { b.Close(); l.unlock() }, nil
}

// DeleteBase removes a base that nothing uses.
func (s *Service) DeleteBase(ctx context.Context, ref string) error {
	return fail(s.locked(ctx, func() error {
		id, err := s.findBase(ref)
		if err != nil {
			return err
		}
		users, err := s.baseUsers(ctx, id)
		if err != nil {
			return err
		}
		return s.deleteUnused("base", s.path("bases", id), s.baseLabel(id), users)
	}))
}

// deleteUnused removes a folder of the store, and its label, if there are no users.
func (s *Service) deleteUnused(what, dir, label string, users []string) error {
	if len(users) > 0 {
		return api.Errorf(api.Conflict, "%s %.12s is in use by %s", what, filepathBase(dir), joinSome(users)).Fix("remove these first")
	}
	l, err := tryLock(dir, unix.LOCK_EX)
	if errors.Is(err, errLocked) {
		return api.Errorf(api.Conflict, "%s %.12s is being read, by a mount or a command", what, filepathBase(dir)).Fix("end that first")
	}
	if err != nil {
		return err
	}
	defer l.unlock()
	// Out of the store at once, then piece by piece: a crash between leaves only waste in tmp.
	gone, err := os.MkdirTemp(s.path("tmp"), "removed-*")
	if err != nil {
		return err
	}
	if err := os.Rename(dir, gone+"/it"); err != nil {
		return errors.Join(err, os.Remove(gone))
	}
	if label != "" {
		err = ignoreMissing(os.Remove(label))
	}
	return errors.Join(err, os.RemoveAll(gone))
}

// baseUsers names what keeps a base in the store: overlays made on it and instances.
func (s *Service) baseUsers(ctx context.Context, id string) ([]string, error) {
	overlays, err := s.Overlays(ctx)
	if err != nil {
		return nil, err
	}
	var users []string
	for _, o := range overlays {
		if o.Base == id {
			users = append(users, fmt.Sprintf("overlay %.12s", o.ID))
		}
	}
	instances, err := s.imageUsers(id)
	return append(users, instances...), err
}
