package service

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"cloudlet/api"
)

// A name is given by a user to a base, overlay or instance. It must not look like an id, a
// path or an option.
var nameForm = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

var hexForm = regexp.MustCompile(`^[0-9a-f]{6,64}$`)

func (s *Service) checkName(name string) error {
	if name == "" || nameForm.MatchString(name) && !hexForm.MatchString(name) {
		return nil
	}
	err := api.Errorf(api.Invalid, "name %q is not allowed", name).
		Fix("use up to 63 lower-case letters, digits, dots, dashes and underscores, not only hexadecimal digits")
	err.Field = "name"
	return err
}

// checkNameFree refuses a name that another base or overlay has.
func (s *Service) checkNameFree(name, id string) error {
	if name == "" {
		return nil
	}
	for _, kind := range []string{"bases", "overlays"} {
		ids, err := s.list(kind)
		if err != nil {
			return err
		}
		for _, other := range ids {
			if other != id && s.nameOf(kind, other) == name {
				return api.Errorf(api.Conflict, "the name %q is taken by %.12s in %s", name, other, kind).Fix("choose another, or remove that first")
			}
		}
	}
	return nil
}

func (s *Service) nameOf(kind, id string) string {
	path := s.baseLabel(id)
	if kind == "overlays" {
		path = s.path("overlays", id, "record.json")
	}
	var l label
	if readJSON(path, &l) != nil {
		return "" // no label, no name
	}
	return l.Name
}

// find returns the id in the store's folder kind that ref names: an id, its beginning (6
// digits at least), or a name.
func (s *Service) find(kind, ref string) (string, error) {
	if len(ref) == 64 && hexForm.MatchString(ref) {
		if _, err := os.Stat(s.path(kind, ref)); err == nil {
			return ref, nil
		}
	}
	ids, err := s.list(kind)
	if err != nil {
		return "", err
	}
	named := nameForm.MatchString(ref) && !hexForm.MatchString(ref)
	var found []string
	for _, id := range ids {
		if id == ref || named && s.nameOf(kind, id) == ref {
			return id, nil
		}
		if hexForm.MatchString(ref) && strings.HasPrefix(id, ref) {
			found = append(found, id)
		}
	}
	switch len(found) {
	case 0:
		return "", errNotFound
	case 1:
		return found[0], nil
	}
	return "", api.Errorf(api.Invalid, "%q is the beginning of %d ids in %s", ref, len(found), kind).Fix("give more digits")
}

var errNotFound = errors.New("not found")

func (s *Service) findBase(ref string) (string, error) {
	id, err := s.find("bases", ref)
	if errors.Is(err, errNotFound) {
		return "", api.Errorf(api.NotFound, "no base %q in %s", ref, s.cfg.Dir).Fix("see `cloudlet base list`, or get one with `cloudlet base create` or `cloudlet base import`")
	}
	return id, err
}

// location is where an overlay is: in the store, then with its id, or in a file or at a URL.
type location struct {
	id, source string
	allow      []string // rules that a URL must pass; nil: none
	upload     int64    // size that the file of an upload grows to; 0: it is none
}

func isURL(ref string) bool {
	return strings.HasPrefix(ref, "http://") || strings.HasPrefix(ref, "https://") || strings.HasPrefix(ref, "file://")
}

// findOverlay finds an overlay by id, the beginning of one, name, file or URL. The store
// counts before a file of the same name; ./NAME means the file.
func (s *Service) findOverlay(ref string) (location, error) {
	if isURL(ref) {
		return location{source: ref}, nil
	}
	id, err := s.find("overlays", ref)
	if err == nil {
		return location{id: id, source: s.overlayFile(id)}, nil
	}
	if !errors.Is(err, errNotFound) {
		return location{}, err
	}
	if info, err := os.Stat(ref); err == nil && info.Mode().IsRegular() {
		abs, err := filepath.Abs(ref)
		return location{source: abs}, err
	} else if errors.Is(err, fs.ErrPermission) {
		return location{}, err
	}
	return location{}, api.Errorf(api.NotFound, "no overlay %q in %s, and no file of that name", ref, s.cfg.Dir).Fix("see `cloudlet overlay list`")
}

// findStored finds an overlay of the store.
func (s *Service) findStored(ref string) (location, error) {
	id, err := s.find("overlays", ref)
	if errors.Is(err, errNotFound) {
		return location{}, api.Errorf(api.NotFound, "no overlay %.80q in %s", ref, s.cfg.Dir).Fix("see `cloudlet overlay list`")
	}
	return location{id: id, source: s.overlayFile(id)}, err
}

// findOverlayFor is findOverlay for a caller, who may have to keep to the store and to URLs
// that the rules allow.
func (s *Service) findOverlayFor(c Caller, field, ref string) (location, error) {
	if c.Local {
		return s.findOverlay(ref)
	}
	if strings.Contains(ref, "://") {
		return location{source: ref, allow: s.rules(c)}, s.checkURL(c, field, ref)
	}
	if strings.ContainsRune(ref, '/') {
		return location{}, errPath(field, ref)
	}
	return s.findStored(ref)
}

// errPath refuses a path of this host in the request of a caller who is not on it.
func errPath(field, ref string) error {
	return invalid(field, "%.200q is a path; only callers on this host may name its files", ref).Fix("upload the file, or give its id, name or URL")
}

// findLaunchFor finds what an instance can be made of, for a caller.
func (s *Service) findLaunchFor(c Caller, ref string) (base string, at location, err error) {
	if uploadForm.MatchString(ref) {
		at, err = s.findUpload(ref)
		return "", at, err
	}
	if c.Local {
		return s.findLaunch(ref)
	}
	if !strings.ContainsRune(ref, '/') {
		if base, err = s.find("bases", ref); !errors.Is(err, errNotFound) {
			return base, at, err
		}
	}
	at, err = s.findOverlayFor(c, "ref", ref)
	if api.CodeOf(err) == api.NotFound {
		err = api.Errorf(api.NotFound, "%.80q is no base or overlay in %s", ref, s.cfg.Dir).Fix("see `cloudlet base list` and `cloudlet overlay list`")
	}
	return "", at, err
}

// findUpload finds an upload whose bytes are still arriving.
func (s *Service) findUpload(id string) (location, error) {
	u, err := s.readUpload(id)
	if err == nil && u.Operation != "" {
		err = api.Errorf(api.Conflict, "%s is whole, and taken into the store by operation %s", id, u.Operation).Fix("use the overlay that the operation names")
	}
	return location{source: s.uploadPath(id, "overlay"), upload: u.Size}, err
}

// findLaunch finds what an instance can be made of: a base, or an overlay.
func (s *Service) findLaunch(ref string) (base string, at location, err error) {
	if !isURL(ref) {
		if base, err = s.find("bases", ref); !errors.Is(err, errNotFound) {
			return base, at, err
		}
	}
	at, err = s.findOverlay(ref)
	if api.CodeOf(err) == api.NotFound {
		err = api.Errorf(api.NotFound, "%q is no base or overlay in %s, and no file", ref, s.cfg.Dir).
			Fix("see `cloudlet base list` and `cloudlet overlay list`")
	}
	return "", at, err
}

// findInstance returns the id of the instance that ref names. One that was handed off gives
// its name up to any other.
func (s *Service) findInstance(ref string) (string, error) {
	ids, err := s.list("instances")
	if err != nil {
		return "", err
	}
	var found []string
	var left string
	for _, id := range ids {
		r, err := s.readRecord(id)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed since, or being made
		}
		if err != nil {
			r = new(record) // damaged, it has its id
		}
		named := r.Name == ref && ref != ""
		if named && r.Moved != nil {
			left = id
			continue
		}
		if id == ref || named {
			return id, nil
		}
		if len(ref) >= 4 && strings.HasPrefix(id, ref) {
			found = append(found, id)
		}
	}
	if left != "" {
		return left, nil
	}
	switch len(found) {
	case 0:
		return "", api.Errorf(api.NotFound, "no instance %q in %s", ref, s.cfg.Dir).Fix("see `cloudlet ps --all`")
	case 1:
		return found[0], nil
	}
	return "", fmt.Errorf("instance: %w", api.Errorf(api.Invalid, "%q is the beginning of %d instance ids", ref, len(found)).Fix("give more digits"))
}
