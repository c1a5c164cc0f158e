package service

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"cloudlet/api"
	"cloudlet/handoff"
	"cloudlet/overlay"
	"cloudlet/vmm"
)

// handoffVM is the instance of a source, as package handoff wants it. What it publishes are
// overlays in the folder of the handoff: the first on the launch's own overlays, with what
// earlier handoffs brought and what the guest has changed since, each other on the one before.
type handoffVM struct {
	s      *Service
	id     string // of the handoff
	meta   handoffMeta
	status func() handoff.Status

	// Of the rounds, which one process takes.
	vm     *vmm.VM
	rounds *vmm.Rounds
	last   *vmm.Residue // of the paused guest, whose disk layers are merged when that hurries nobody
	image  *launchImage // what the instance runs on
	chain  []handoff.Overlay
	above  []*overlay.Reader // of the overlays published so far
	recent []overlay.Addr    // memory that the rounds after the first have found changed
}

const (
	roundStrategy = "balanced,level=3,frame=256K,stride=no" // comes as a whole, and at once
	finalStrategy = "fast"                                  // somebody waits for it

	// maxHot bounds the pages that the destination gives the guest before all others.
	maxHot = 16384
)

// Round implements handoff.VM.
func (v *handoffVM) Round(ctx context.Context, n int) (handoff.Published, error) {
	return v.publish(ctx, n, false)
}

// Final implements handoff.VM.
func (v *handoffVM) Final(ctx context.Context, n int) (handoff.Published, error) {
	return v.publish(ctx, n, true)
}

// begin opens what the rounds need.
func (v *handoffVM) begin(ctx context.Context) (err error) {
	if v.rounds != nil {
		return nil
	}
	r, err := v.s.readRecord(v.meta.Instance)
	if err != nil {
		return err
	}
	if v.vm, err = v.adopt(ctx); err != nil {
		return err
	}
	links := make([]link, len(r.Links))
	for i, l := range r.Links {
		links[i] = v.s.whereIs(l)
	}
	if v.image, err = v.s.openLinks(ctx, r.Base, links); err != nil {
		v.image = nil
		return err
	}
	for i, reader := range v.image.readers[:v.meta.Parents] {
		v.chain = append(v.chain, handoff.Overlay{
			ID: reader.ID().String(), Digest: reader.Digest().String(), Bytes: reader.Size(), URL: v.url(reader.ID().String()), Origin: originOf(r.Links[i]),
		})
	}
	v.rounds, err = v.vm.Rounds(ctx)
	return err
}

func originOf(l link) string {
	if isRemote(l.Source) {
		return l.Source
	}
	return ""
}

// publishedURL returns where the destination of a handoff finds an overlay.
func (s *Service) publishedURL(id, key, overlayID string) string {
	return fmt.Sprintf("%s/v1/handoffs/%s/overlays/%s?key=%s", s.cfg.Advertise, id, overlayID, key)
}

func (v *handoffVM) url(overlayID string) string {
	return v.s.publishedURL(v.id, v.meta.Key, overlayID)
}

func (v *handoffVM) adopt(ctx context.Context) (*vmm.VM, error) {
	if _, err := os.Stat(v.s.instancePath(v.meta.Instance, "vm")); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: instance %s was removed", handoff.ErrEnded, v.meta.Instance)
	}
	vm, err := v.s.vmm.Adopt(ctx, v.s.instancePath(v.meta.Instance, "vm"))
	return vm, ended(err)
}

// ended translates vmm's word for a VM that is gone.
func ended(err error) error {
	if errors.Is(err, vmm.ErrEnded) {
		return fmt.Errorf("%w: %w", handoff.ErrEnded, err)
	}
	return err
}

// publish takes a round and makes its overlay.
func (v *handoffVM) publish(ctx context.Context, n int, final bool) (p handoff.Published, err error) {
	start := time.Now()
	if err := v.begin(ctx); err != nil {
		return p, ended(err)
	}
	dir := v.s.handoffPath(v.id, "round")
	if err := os.RemoveAll(dir); err != nil {
		return p, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return p, err
	}
	take := v.rounds.Next
	if final {
		take = v.rounds.Last
	}
	residue, err := take(ctx, dir)
	if err != nil {
		return p, ended(err)
	}
	taken := time.Since(start)
	made, err := v.create(ctx, n, residue, dir, final)
	if final {
		v.last = residue
	} else {
		err = errors.Join(err, residue.Release(ctx))
	}
	if err != nil {
		return p, err
	}
	id := made.ID.String()
	v.chain = append(v.chain, handoff.Overlay{ID: id, Digest: made.Digest.String(), Bytes: made.Size, URL: v.url(id)})
	p.Chain = v.chain
	p.Round = handoff.Round{Bytes: made.Size, Made: time.Since(start), Pause: residue.Pause}
	for _, ext := range [][]vmm.Extent{residue.MemoryExtents(), residue.DiskExtents()} {
		for _, e := range ext {
			p.Round.Dirty += e.Len
		}
	}
	v.s.log.Info("handoff round", "handoff", v.id, "round", n, "final", final, "dirty", p.Round.Dirty, "bytes", made.Size,
		"taken_seconds", taken.Seconds(), "made_seconds", (p.Round.Made - taken).Seconds())
	return p, nil
}

// create makes the overlay of a round and puts it where its URL leads.
func (v *handoffVM) create(ctx context.Context, n int, residue *vmm.Residue, dir string, final bool) (*overlay.Created, error) {
	r, err := v.s.readRecord(v.meta.Instance)
	if err != nil {
		return nil, err
	}
	parent, err := overlay.NewImage(v.image.base, append(v.image.readers[:v.meta.Parents:v.meta.Parents], v.above...), overlay.ImageOptions{})
	if err != nil {
		return nil, err
	}
	defer parent.Close()
	launch := overlay.Launch{
		Parent: parent, Machine: r.Machine,
		Memory: overlay.Changes{Extents: extents(residue.MemoryExtents()), Read: residue.ReadMemory},
		Disk:   overlay.Changes{Extents: extents(residue.DiskExtents()), Read: residue.ReadDisk},
	}
	o := overlay.CreateOptions{Quick: n > 1 || final || !v.image.image.Local()}
	if n > 1 {
		v.recent = overlay.MergeProfiles(pagesOf(residue.MemoryExtents()), v.recent)
	}
	text := roundStrategy
	if n == 1 {
		launch.Below = v.image.image
	}
	if final {
		text = finalStrategy
		if launch.Profile, err = v.hot(ctx, r); err != nil {
			return nil, err
		}
		if launch.State, err = os.ReadFile(residue.State); err != nil {
			return nil, err
		}
	}
	if o.Strategy, err = overlay.ParseStrategy(text); err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "overlay")
	made, err := overlay.Create(ctx, path, launch, o)
	if err != nil {
		return nil, v.s.spaceError(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "digest"), []byte(made.Digest.String()), 0o600); err != nil {
		return nil, err
	}
	// From here on its URL leads to it. One of the same content may be there, of a round that
	// was cut off.
	to := v.s.handoffPath(v.id, made.ID.String())
	if err := os.RemoveAll(to); err != nil {
		return nil, err
	}
	if err := os.Mkdir(to, 0o700); err != nil {
		return nil, err
	}
	for _, name := range []string{"digest", "overlay"} {
		if err := os.Rename(filepath.Join(dir, name), filepath.Join(to, name)); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(syncDir(to), syncDir(v.s.handoffPath(v.id))); err != nil {
		return nil, err
	}
	if final {
		return made, nil
	}
	reader, err := link{Source: filepath.Join(to, "overlay")}.read(ctx, "")
	if err != nil {
		return nil, err
	}
	v.above = append(v.above, reader)
	return made, nil
}

// hot returns the pages that the guest is likely to touch first where it goes: those that it
// has written last, those of the touch profile of what it runs on, and those that it has
// touched first here.
func (v *handoffVM) hot(ctx context.Context, r *record) ([]overlay.Addr, error) {
	profile, err := profileOf(MountSpec{Profile: v.s.profilePath(r.Image)}, v.image.image)
	if err != nil {
		return nil, err
	}
	touched, err := v.s.touches(ctx, r)
	if err != nil {
		return nil, err
	}
	hot := overlay.MergeProfiles(v.recent, profile, touched)
	return hot[:min(len(hot), maxHot)], nil
}

func pagesOf(extents []vmm.Extent) (out []overlay.Addr) {
	for _, e := range extents {
		for off := e.Off; off < e.Off+e.Len && len(out) < maxHot; off += overlay.PageSize {
			out = append(out, overlay.MakeAddr(overlay.Memory, off/overlay.PageSize))
		}
	}
	return out
}

// Pause implements handoff.VM.
func (v *handoffVM) Pause(ctx context.Context) error {
	vm, err := v.adopt(ctx)
	if err != nil {
		return err
	}
	return ended(vm.Pause(ctx))
}

// Continue implements handoff.VM.
func (v *handoffVM) Continue(ctx context.Context) error {
	vm, err := v.adopt(ctx)
	if err != nil {
		return err
	}
	return ended(vm.Continue(ctx))
}

// Discard implements handoff.VM.
func (v *handoffVM) Discard(ctx context.Context) error {
	st := v.status()
	moved := &api.Moved{To: v.meta.To, Instance: arrivedID(v.id), Endpoints: shownEndpoints(st.Endpoints)}
	var r *record
	err := v.s.updateRecord(ctx, v.meta.Instance, func(now *record) {
		now.Moved = moved
		r = now
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it was removed
	}
	if err != nil {
		return err
	}
	_, err = v.s.end(ctx, r, api.Stopped, fmt.Sprintf("it was handed off to %s", v.meta.To))
	return err
}

// Release implements handoff.VM.
func (v *handoffVM) Release(context.Context) error {
	m := v.meta
	m.Key = "" // the URLs lead nowhere any more
	if err := v.s.writeHandoff(v.id, m); err != nil {
		return err
	}
	entries, err := os.ReadDir(v.s.handoffPath(v.id))
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, os.RemoveAll(v.s.handoffPath(v.id, e.Name())))
		}
	}
	return err
}

// Settle implements handoff.VM. It closes what the rounds needed; layers of the disk that the
// rounds of a process that died have left are merged.
func (v *handoffVM) Settle(ctx context.Context) error {
	for _, r := range v.above {
		if err := r.Close(); err != nil {
			return err
		}
	}
	v.above = nil
	if v.image != nil {
		if err := v.image.close(); err != nil {
			return err
		}
		v.image = nil
	}
	if v.rounds == nil {
		vm, err := v.adopt(ctx)
		if err != nil {
			return err
		}
		return ended(vm.Merge(ctx))
	}
	if v.last != nil {
		if err := v.last.Release(ctx); err != nil {
			return ended(err)
		}
		v.last = nil
	}
	return ended(v.rounds.Close(ctx))
}
