package service

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"cloudlet/api"
	"cloudlet/fusefs"
	"cloudlet/overlay"
)

// recordingPrefix begins the keys of mounts that record: each has one instance, since pages
// that another has touched would not be asked for.
const recordingPrefix = "r-"

func recordingKey(instance string) string { return recordingPrefix + instance }

func isRecording(key string) bool { return strings.HasPrefix(key, recordingPrefix) }

func (s *Service) profilePath(image string) string { return s.path("profiles", image) }

// readProfile reads a profile of an image from a file; a missing file is no profile.
func readProfile(path string, im *overlay.Image) ([]overlay.Addr, error) {
	if path == "" {
		return nil, nil
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	p, err := overlay.ParseProfile(b, im.Size(overlay.Memory), im.Size(overlay.Disk))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return p, nil
}

// Over a slow link a guest answers after seconds, and by then has also done what a trial run
// does after its answer: its kernel's timers run, other programs have their turn.
const (
	afterAnswer = 3 * time.Second
	afterShare  = 4 // at most one such part of what was touched until the answer
)

// keepTouches adds what the mount of an instance has recorded, which has just answered, and
// what it records for a while, to the image's profile.
func (s *Service) keepTouches(ctx context.Context, r *record) (err error) {
	answered, err := s.touches(ctx, r)
	if err != nil {
		return err
	}
	select {
	case <-time.After(afterAnswer):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	found, err := s.touches(ctx, r)
	if err != nil { // the guest may have ended since
		s.log.Warn("the touch profile ends with the answer", "instance", r.ID, "err", err)
		found = answered
	}
	found = found[:min(len(found), len(answered)+len(answered)/afterShare)]
	l, err := s.openLinks(ctx, r.Base, r.Links)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	return s.locked(ctx, func() error {
		before, err := readProfile(s.profilePath(r.Image), l.image)
		if err != nil {
			s.log.Warn("the profile is replaced", "err", err)
		}
		if before == nil { // what the overlay brought counts as well
			if n := len(l.readers); n > 0 {
				before, err = l.readers[n-1].Profile()
				if err != nil {
					return err
				}
			}
		}
		return replaceFile(s.profilePath(r.Image), overlay.MarshalProfile(overlay.MergeProfiles(before, found)), true)
	})
}

// touches returns the pages that the mount of an instance was asked for, in their order.
func (s *Service) touches(ctx context.Context, r *record) (found []overlay.Addr, err error) {
	touches, err := fusefs.Dial(s.mountPath(r.Mount, "control")).Touches(ctx)
	if err != nil {
		return nil, err
	}
	for _, t := range touches {
		space := overlay.Memory
		if t.File == fusefs.DiskName {
			space = overlay.Disk
		}
		for n := range t.Count {
			found = append(found, overlay.MakeAddr(space, t.Page+n))
		}
	}
	return found, nil
}

// submitProfile looks a request for trial runs through.
func (s *Service) submitProfile(ctx context.Context, t *task, req api.Profile) error {
	if len(req.Probes) == 0 {
		return invalid("probes", "a touch profile needs at least one probe").Fix("give the requests that users begin with")
	}
	if req.Strategy != "" && !req.Repack {
		return invalid("strategy", "only a new encoding has a strategy, and none is asked for").Fix("set repack, too")
	}
	if _, err := usableStrategy(ctx, req.Strategy); err != nil {
		return err
	}
	at, err := s.findOverlayFor(t.caller, "ref", req.Ref)
	if err != nil {
		return err
	}
	if req.Repack && (at.id == "" || at.source != s.overlayFile(at.id)) {
		return invalid("repack", "overlay %.200q is not in the store", req.Ref).Fix("import it first")
	}
	trial := func(ctx context.Context, probe api.Probe) (*synthesis, error) {
		run := api.Run{Ref: at.source, Probe: &probe, Timeout: req.Timeout, Record: true}
		if at.id != "" {
			run.Ref = at.id
		}
		return s.newSynthesis(ctx, t.caller, run, &timeline{start: time.Now()})
	}
	for _, probe := range req.Probes {
		j, err := trial(ctx, probe)
		if err != nil {
			return err
		}
		t.need = need{Memory: j.machine.Memory, Instances: 1}
		if err := j.close(); err != nil {
			return err
		}
	}
	if at.id != "" {
		t.target = &api.Target{Type: "overlay", ID: at.id}
	}
	t.work = func(ctx context.Context, op *operation) (any, error) {
		if req.Fresh {
			if err := s.forgetProfile(ctx, at); err != nil {
				return nil, err
			}
		}
		for i, probe := range req.Probes {
			op.progress(fmt.Sprintf("trial run %d of %d", i+1, len(req.Probes)), 0, 0)
			j, err := trial(ctx, probe)
			if err != nil {
				return nil, err
			}
			in, err := s.run(ctx, j, func(string) {})
			if err != nil {
				return nil, err
			}
			if err := s.Delete(context.WithoutCancel(ctx), in.ID, true); err != nil {
				return nil, err
			}
		}
		return s.profiled(ctx, at, req, op.progress)
	}
	return nil
}

// forgetProfile removes the profile that the store keeps of an overlay.
func (s *Service) forgetProfile(ctx context.Context, at location) error {
	l, err := s.openChain(ctx, at)
	if err != nil {
		return err
	}
	path := s.profilePath(l.image.ID().String())
	return errors.Join(l.close(), s.locked(ctx, func() error { return ignoreMissing(os.Remove(path)) }))
}

// profiled repacks an overlay that has its profile now, if asked to, and describes it.
func (s *Service) profiled(ctx context.Context, at location, req api.Profile, p api.Progress) (out api.ProfiledOverlay, err error) {
	l, err := s.openChain(ctx, at)
	if err != nil {
		return out, err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	profile, err := readProfile(s.profilePath(l.image.ID().String()), l.image)
	if err != nil {
		return out, err
	}
	for _, a := range profile {
		if a.Space() == overlay.Memory {
			out.MemoryPages++
		} else {
			out.DiskPages++
		}
	}
	if req.Repack {
		strategy := l.readers[len(l.readers)-1].Manifest().Strategy
		if req.Strategy != "" {
			if strategy, err = usableStrategy(ctx, req.Strategy); err != nil {
				return out, err
			}
		}
		if err := s.repack(ctx, l, profile, overlay.CreateOptions{Strategy: strategy, Progress: overlay.Progress(p)}); err != nil {
			return out, err
		}
	}
	if at.id != "" && at.source == s.overlayFile(at.id) {
		out.Overlay, err = s.describeOverlay(ctx, at.id)
		return out, err
	}
	src, err := openSource(ctx, at.source, at.allow, s.path("cache"))
	if err != nil {
		return out, err
	}
	out.Overlay, err = describe(ctx, src)
	return out, err
}

// repack writes the overlay of the store that l ends with anew, in the order of profile. Who
// has the old file open reads on in that.
func (s *Service) repack(ctx context.Context, l *launchImage, profile []overlay.Addr, o overlay.CreateOptions) (err error) {
	st, err := s.newStage(ctx, "repack")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(s.spaceError(err), st.drop()) }()
	path := filepath.Join(st.dir, "overlay")
	if _, err := overlay.Repack(ctx, path, l.image, profile, o); err != nil {
		return err
	}
	keep := s.overlayFile(l.image.ID().String())
	return s.locked(ctx, func() error {
		if _, err := os.Stat(keep); err != nil {
			return err // it was removed meanwhile
		}
		return errors.Join(os.Rename(path, keep), syncDir(filepath.Dir(keep)))
	})
}
