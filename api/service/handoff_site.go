package service

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"strconv"
	"time"

	"cloudlet/api"
	"cloudlet/handoff"
	"cloudlet/overlay"
	"cloudlet/vmm"
)

// site is an arrival, as package handoff wants it.
type site arrival

// Admit implements handoff.Site.
func (t *site) Admit(ctx context.Context, epoch uint64, o handoff.Offer) (lacks []string, reasons []handoff.Reason, err error) {
	refuse := func(field string, err error) {
		r := handoff.Reason{Field: field, Text: err.Error()}
		var e *api.Error
		if errors.As(fail(err), &e) {
			r.Text, r.Remedy = e.Detail, e.Remedy
		}
		reasons = append(reasons, r)
	}
	s := t.s
	t.mu.Lock()
	t.offer = o
	t.mu.Unlock()
	t.meta.Epoch = epoch
	if err := s.writeHandoff(t.id, t.meta); err != nil {
		return nil, nil, err
	}
	if id, err := s.cloudletID(ctx); err != nil {
		return nil, nil, err
	} else if id == o.Cloudlet {
		refuse("cloudlet", api.Errorf(api.Conflict, "the instance is at this cloudlet already").Fix("give another one"))
	}
	if _, err := os.Stat(s.path("bases", o.Base)); err != nil {
		refuse("base", api.Errorf(api.NotFound, "base %s is not here", o.Base).Fix("take it there with `cloudlet base export` and `cloudlet base import`"))
	} else if err := t.checkMachine(ctx, o); err != nil {
		refuse("machine", err)
	}
	if err := t.checkLineage(epoch, o); err != nil {
		refuse("lineage", err)
	}
	if len(o.Chain) > overlay.MaxDepth-2 {
		refuse("chain", fmt.Errorf("the chain is %d deep", len(o.Chain)))
	}
	need := need{Memory: o.Memory, Instances: 1, Disk: o.Residue}
	for _, l := range o.Chain {
		if _, err := os.Stat(s.overlayFile(l.ID)); err != nil {
			lacks = append(lacks, l.ID)
			need.Disk += l.Bytes
		}
	}
	if forwards, err := checkForwards(t.forwards(o), nil); err != nil {
		refuse("port", err)
	} else if err := checkPorts(forwards); err != nil {
		refuse("port", err)
	}
	if err = t.reserve(ctx, need, nil); api.CodeOf(err) == api.Unavailable {
		if resident, rerr := s.residents(ctx); rerr == nil {
			err = t.reserve(ctx, need, resident)
		}
	}
	if onDisk := need; api.CodeOf(err) == api.Unavailable {
		onDisk.Memory, onDisk.Instances = 0, 0
		field := "memory"
		if derr := s.locked(ctx, func() error { return s.admit(onDisk, nil) }); derr != nil {
			field = "disk"
		}
		refuse(field, err)
		err = nil
	}
	return lacks, reasons, err
}

// reserve promises the instance what it needs, as long as the offer is not refused.
func (t *site) reserve(ctx context.Context, n need, resident map[string]int64) error {
	return t.s.locked(ctx, func() error {
		err := t.s.admit(n, resident)
		if err == nil {
			t.mu.Lock()
			t.state = handoff.Accepted
			t.mu.Unlock()
		}
		return err
	})
}

// forwards returns the forwards to ask for here.
func (t *site) forwards(o handoff.Offer) (out []api.Forward) {
	for _, f := range o.Forwards {
		a := api.Forward{Host: f.Host, Guest: f.Guest}
		if f.Open {
			a.Address = "0.0.0.0"
		}
		out = append(out, a)
	}
	return out
}

// checkMachine sees that the instance's machine is that of the base here, and can run.
func (t *site) checkMachine(ctx context.Context, o handoff.Offer) (err error) {
	m, err := vmm.ParseMachine(o.Machine)
	if err != nil {
		return err
	}
	base, release, err := t.s.openBase(o.Base)
	if err != nil {
		return err
	}
	defer release()
	ours, err := vmm.ParseMachine(base.Manifest().Machine)
	if err != nil {
		return err
	}
	if m.Fingerprint() != o.Fingerprint || ours.Fingerprint() != o.Fingerprint {
		return api.Errorf(api.Conflict, "the fingerprint %.12s of the instance's machine is not that of base %.12s", o.Fingerprint, o.Base)
	}
	if m.Memory != o.Memory || base.Size(overlay.Memory) != o.Memory || base.Size(overlay.Disk) != o.Disk {
		return api.Errorf(api.Conflict, "memory of %d and disk of %d bytes are not those of base %.12s", o.Memory, o.Disk, o.Base)
	}
	host, err := t.s.vmm.Probe(ctx)
	if err != nil {
		return err
	}
	return m.Runnable(host)
}

// checkLineage refuses an instance that is here already, by a right that is as new.
func (t *site) checkLineage(epoch uint64, o handoff.Offer) error {
	ids, err := t.s.list("instances")
	for _, id := range ids {
		r, err := t.s.readRecord(id)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return api.Errorf(api.Conflict, "the record of instance %s cannot be read, so it may be the one that is offered: %v", id, err).Fix("remove it there with `cloudlet rm --force %s`", id)
		}
		if err == nil && r.Lineage == o.Lineage && r.Epoch >= epoch {
			return api.Errorf(api.Conflict, "the instance is here as %s, of epoch %d, and the offer is of epoch %d", id, r.Epoch, epoch)
		}
	}
	return err
}

// Fetch implements handoff.Site.
func (t *site) Fetch(ctx context.Context, chain []handoff.Overlay) error {
	d := (*arrival)(t)
	d.mu.Lock()
	d.chain = chain
	d.mu.Unlock()
	for _, o := range chain {
		if _, err := os.Stat(t.s.overlayFile(o.ID)); err == nil {
			continue
		}
		if err := d.fetch(o); err != nil {
			return err
		}
	}
	return nil
}

// prepareTime bounds Prepare, for which a guest stands still.
const prepareTime = 30 * time.Second

// Prepare implements handoff.Site.
func (t *site) Prepare(ctx context.Context, o handoff.Offer, chain []handoff.Overlay) (err error) {
	s := t.s
	if r, err := s.readRecord(t.meta.Instance); err == nil {
		if look, err := t.Look(ctx); err == nil && look.Alive && len(r.Links) == len(chain) && r.Links[len(chain)-1].ID == chain[len(chain)-1].ID {
			return nil
		}
		if err := s.undo(r); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := t.Fetch(ctx, chain); err != nil {
		return err
	}
	var links []link
	for _, c := range chain {
		l := link{ID: c.ID, Source: s.handoffPath(t.id, c.ID, "overlay"), Size: c.Bytes, Upload: c.Bytes}
		links = append(links, s.whereIs(l))
	}
	line := &timeline{start: time.Now()}
	ctx, cancel := context.WithTimeout(ctx, prepareTime)
	defer cancel()
	ctx, stop := (*arrival)(t).whileHopeful(ctx)
	defer func() { err = stop(err) }()
	l, err := s.openLinks(ctx, o.Base, links)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.close()) }()
	for i, r := range l.readers {
		if i >= len(o.Chain) && r.Digest().String() != chain[i].Digest {
			return api.Errorf(api.Damaged, "overlay %.12s has the digest %.12s, not %.12s", r.ID(), r.Digest(), chain[i].Digest)
		}
	}
	machine, raw, err := s.machineOf(ctx, l)
	if err != nil {
		return err
	}
	if machine.Fingerprint() != o.Fingerprint {
		return api.Errorf(api.Conflict, "the last overlay is of another machine than the offer")
	}
	forwards, err := checkForwards(t.forwards(o), nil)
	if err != nil {
		return err
	}
	image := l.image.ID().String()
	r := &record{
		ID: t.meta.Instance, Name: s.freeName(o.Name), Created: time.Now().UTC(), State: api.Starting, Image: image, Base: o.Base, Links: links,
		Mount: mountKey(image), Machine: raw, Handoff: t.id, Arrived: t.id, Lineage: o.Lineage, Epoch: t.meta.Epoch, Own: len(links) - len(o.Chain),
	}
	if err := s.placeRecord(ctx, r); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(s.spaceError(err), s.undo(r))
		}
	}()
	line.mark("opened")
	if _, err := s.resume(ctx, r, l, machine, forwards, api.PrefetchAuto, true, line); err != nil {
		return err
	}
	return s.updateRecord(ctx, r.ID, func(r *record) { r.Timeline = line.events })
}

// placeRecord makes the folder of an instance with its record.
func (s *Service) placeRecord(ctx context.Context, r *record) error {
	return s.locked(ctx, func() error {
		if err := os.Mkdir(s.instancePath(r.ID), 0o700); err != nil {
			return err
		}
		if err := s.writeRecord(r); err != nil {
			return errors.Join(err, os.RemoveAll(s.instancePath(r.ID)))
		}
		return nil
	})
}

// freeName returns a name if no instance has it yet, else "".
func (s *Service) freeName(name string) string {
	if s.checkName(name) != nil || s.checkInstanceName(name) != nil {
		return ""
	}
	return name
}

// vm finds the VM, ErrEnded where there is none, or none that can run on.
func (t *site) vm(ctx context.Context) (*record, *vmm.VM, error) {
	r, err := t.s.readRecord(t.meta.Instance)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("%w: there is no instance %s", handoff.ErrEnded, t.meta.Instance)
	}
	if err != nil {
		return nil, nil, err
	}
	if !r.alive() {
		return r, nil, fmt.Errorf("%w: %s", handoff.ErrEnded, r.Reason)
	}
	if !t.s.mountLives(r.Mount) {
		return r, nil, fmt.Errorf("%w: the mount process that served its memory and disk has died", handoff.ErrEnded)
	}
	vm, err := t.s.vmm.Adopt(ctx, t.s.instancePath(r.ID, "vm"))
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil, fmt.Errorf("%w: it was not resumed", handoff.ErrEnded)
	}
	return r, vm, ended(err)
}

// Run implements handoff.Site.
func (t *site) Run(ctx context.Context, o handoff.Offer) error {
	r, vm, err := t.vm(ctx)
	if err != nil {
		return err
	}
	if !o.Paused {
		if err := vm.Continue(ctx); err != nil {
			return ended(err)
		}
		t.s.guestRuns(ctx, r)
	}
	return t.s.updateRecord(ctx, r.ID, func(r *record) { r.State = api.Running })
}

// seeTime bounds the question how a VM is: one that waits for a page of its memory may not
// answer, and lives.
const seeTime = time.Second

// Look implements handoff.Site.
func (t *site) Look(ctx context.Context) (handoff.Look, error) {
	look := handoff.Look{Missing: (*arrival)(t).missing()}
	_, vm, err := t.vm(ctx)
	if errors.Is(err, handoff.ErrEnded) {
		look.Reason = err.Error()
		return look, nil
	}
	if err != nil {
		return look, err
	}
	bound, cancel := context.WithTimeout(ctx, seeTime)
	defer cancel()
	status, err := vm.Status(bound)
	switch {
	case ctx.Err() != nil:
		return look, ctx.Err()
	case err != nil:
		look.Reason = err.Error()
	case status.State == vmm.Ended:
		look.Reason = status.Reason
		return look, nil
	default:
		look.Reason = status.Reason
	}
	look.Alive = true
	look.Reason = joinReasons(look.Reason, (*arrival)(t).trouble())
	for _, f := range vm.Forwards() {
		look.Endpoints = append(look.Endpoints, handoff.Endpoint{Guest: f.Guest, Address: t.s.reachable(f)})
	}
	return look, nil
}

func joinReasons(a, b string) string {
	if b == "" {
		return a
	}
	return joinReason(a, b)
}

// reachable returns where a forwarded port can be reached from other hosts, or from this one
// where it listens on loopback.
func (s *Service) reachable(f vmm.Forward) string {
	host := f.Addr
	if host == "0.0.0.0" {
		if u, err := url.Parse(s.cfg.Advertise); err == nil && u.Hostname() != "" {
			host = u.Hostname()
		}
	}
	return net.JoinHostPort(host, strconv.Itoa(f.Host))
}

// Pause implements handoff.Site.
func (t *site) Pause(ctx context.Context) error {
	_, vm, err := t.vm(ctx)
	if err != nil {
		return err
	}
	return ended(vm.Pause(ctx))
}

// Destroy implements handoff.Site.
func (t *site) Destroy(ctx context.Context) error {
	d := (*arrival)(t)
	d.drop()
	if r, err := t.s.readRecord(t.meta.Instance); err == nil {
		if err := t.s.undo(r); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return t.s.removeArrived(t.id)
}
