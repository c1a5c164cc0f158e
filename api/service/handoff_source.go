package service

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"cloudlet/api"
	"cloudlet/handoff"
	"cloudlet/overlay"
	"cloudlet/vmm"

	"golang.org/x/sys/unix"
)

// submitHandOff begins to hand an instance off. The token is kept apart from the request,
// which others may see.
func (s *Service) submitHandOff(ctx context.Context, caller Caller, req api.HandOff) (api.Operation, error) {
	token := req.Token
	req.Token = ""
	return s.submitOnce(ctx, caller, api.KindHandoff, req, func() (out api.Operation, err error) {
		if err := s.checkHandOff(caller, req, token); err != nil {
			return out, err
		}
		instance, err := s.findInstance(req.Instance)
		if err != nil {
			return out, err
		}
		id := newHandoffID()
		m := handoffMeta{
			Side: api.HandoffSource, Instance: instance, Created: time.Now().UTC(), To: strings.TrimSuffix(req.To, "/"), Token: token,
			Allow: s.rules(caller), Key: newHandoffID(),
		}
		out, _, err = s.begin(ctx, task{
			caller: caller, kind: api.KindHandoff, req: req, target: &api.Target{Type: "handoff", ID: id},
			work: func(ctx context.Context, op *operation) (any, error) {
				m.Operation = op.record.ID
				return s.handOff(ctx, op, id, m, req)
			},
		})
		return out, err
	})
}

func (s *Service) checkHandOff(caller Caller, req api.HandOff, token string) error {
	if !s.cfg.Daemon {
		return api.Errorf(api.Unavailable, "a handoff needs the daemon: the other cloudlet fetches from it").Fix("run `cloudlet serve --listen HOST:PORT` on this store, then ask again")
	}
	if s.cfg.Advertise == "" {
		return api.Errorf(api.Unavailable, "other cloudlets cannot reach this daemon: it listens on no TCP address of a host").Fix("start it with --listen HOST:PORT, or with --advertise URL")
	}
	if err := checkServer("to", strings.TrimSuffix(req.To, "/")); err != nil {
		return err
	}
	if err := s.checkURL(caller, "to", strings.TrimSuffix(req.To, "/")+"/v1/handoffs"); err != nil {
		return err
	}
	if strings.ContainsAny(token, "\r\n\x00") || len(token) > 4096 {
		return invalid("token", "the token is no token")
	}
	if err := s.checkName(req.Name); err != nil {
		return err
	}
	if req.Rounds > overlay.MaxDepth-2 {
		return invalid("rounds", "%d rounds, the limit is %d", req.Rounds, overlay.MaxDepth-2)
	}
	return nil
}

// roundRoom is how many levels of a chain the rounds of a handoff may take at least.
const roundRoom = 3

// handOff moves an instance. It holds the instance's lock until the instance is an ordinary
// one again.
func (s *Service) handOff(ctx context.Context, op *operation, id string, m handoffMeta, req api.HandOff) (out any, err error) {
	r, vm, lk, err := s.working(ctx, m.Instance)
	if err != nil {
		return nil, err
	}
	free := sync.OnceFunc(lk.unlock)
	defer free()
	if err := s.mayHandOn(ctx, r); err != nil {
		return nil, err
	}
	launch := len(r.Links) - r.Own
	m.Parents = min(launch, overlay.MaxDepth-roundRoom)
	o, err := s.offer(ctx, id, r, vm, m, req)
	if err != nil {
		return nil, err
	}
	m.Epoch = max(r.Epoch, r.Tried) + 1
	if err := s.newHandoffFolder(ctx, id, m); err != nil {
		return nil, err
	}
	limits := handoff.Limits{Rounds: req.Rounds}
	if room := overlay.MaxDepth - m.Parents - 1; limits.Rounds == 0 || limits.Rounds > room {
		limits.Rounds = min(room, 4)
	}
	src, err := s.newSource(ctx, id, m, o, limits)
	if err == nil {
		err = s.updateRecord(ctx, r.ID, func(r *record) { r.Handoff, r.Tried, r.Lineage = id, m.Epoch, o.Lineage })
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(s.handoffPath(id)))
	}
	return s.follow(ctx, op, id, m, src, free)
}

// How long the cloudlet that an instance came from is waited for, and from when on its silence
// no longer keeps the instance here.
const (
	endWait  = 5 * time.Second
	endBound = 24 * time.Hour
)

// mayHandOn refuses to hand on an instance while an operator of the cloudlet that it came from
// may still let it run there: once it is gone from here, nobody could end one of the two.
func (s *Service) mayHandOn(ctx context.Context, r *record) error {
	if r.Arrived == "" {
		return nil
	}
	d, err := s.arrival(ctx, r.Arrived)
	if err != nil {
		return ignoreMissing(err)
	}
	bound, cancel := context.WithTimeout(ctx, endWait)
	defer cancel()
	tick := time.NewTicker(endWait / 50)
	defer tick.Stop()
	for {
		if err := d.settle(ctx); err != nil {
			return err
		}
		d.mu.Lock()
		state := d.state
		d.mu.Unlock()
		if info, err := os.Stat(s.journal(d.id).Path); err != nil || state != handoff.Complete || time.Since(info.ModTime()) > endBound {
			return err
		}
		select {
		case <-tick.C:
		case <-bound.Done():
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return api.Errorf(api.Conflict, "the cloudlet at %s, from which instance %s came, has not yet said that it gave its VM up, and may let it run again", d.meta.From, r.ID).
				Fix("ask again when the two can reach one another; after a day without a word it is handed on all the same")
		}
	}
}

// newSource makes the source of a new handoff.
func (s *Service) newSource(ctx context.Context, id string, m handoffMeta, o handoff.Offer, limits handoff.Limits) (*handoff.Source, error) {
	c, err := s.sourceConfig(id, m)
	if err != nil {
		return nil, err
	}
	c.Handoff, c.Epoch, c.Offer, c.Limits = id, m.Epoch, o, limits
	src, err := handoff.NewSource(ctx, c)
	if err != nil {
		return nil, err
	}
	c.VM.(*handoffVM).status = src.Status
	s.keepSource(id, src)
	return src, nil
}

func (s *Service) sourceConfig(id string, m handoffMeta) (c handoff.SourceConfig, err error) {
	peer, err := newHandoffPeer(m)
	return handoff.SourceConfig{
		VM: &handoffVM{s: s, id: id, meta: m}, Peer: peer, Journal: s.journal(id),
	}, err
}

func (s *Service) keepSource(id string, src *handoff.Source) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sources[id] = src
}

// sourceOf returns the source of a handoff, from its journal where nobody works on it.
func (s *Service) sourceOf(ctx context.Context, id string) (*handoff.Source, error) {
	s.mu.Lock()
	src := s.sources[id]
	s.mu.Unlock()
	if src != nil {
		return src, nil
	}
	return handoff.OpenSource(ctx, handoff.SourceConfig{Journal: s.journal(id)}) // only to look at
}

// offer describes an instance to the cloudlet that it may move to.
func (s *Service) offer(ctx context.Context, id string, r *record, vm *vmm.VM, m handoffMeta, req api.HandOff) (o handoff.Offer, err error) {
	machine, err := vmm.ParseMachine(r.Machine)
	if err != nil {
		return o, err
	}
	cloudlet, err := s.cloudletID(ctx)
	if err != nil {
		return o, err
	}
	status, err := vm.Status(ctx)
	if err != nil {
		return o, err
	}
	if status.State != vmm.Running && status.State != vmm.Paused {
		return o, api.Errorf(api.Conflict, "instance %s is %s: %s", r.ID, status.State, status.Reason).Fix("continue it first")
	}
	base, err := overlay.OpenBase(s.path("bases", r.Base))
	if err != nil {
		return o, err
	}
	disk := base.Size(overlay.Disk)
	if err := base.Close(); err != nil {
		return o, err
	}
	lineage := r.Lineage
	if lineage == "" { // of an older version
		lineage = newHandoffID()
	}
	o = handoff.Offer{
		Cloudlet: cloudlet, Lineage: lineage, Name: cmp.Or(req.Name, r.Name), Base: r.Base, Machine: r.Machine, Fingerprint: machine.Fingerprint(),
		Memory: machine.Memory, Disk: disk, Residue: s.residueOf(r, vm), Paused: status.State == vmm.Paused,
	}
	for _, f := range vm.Forwards() {
		out := handoff.Forward{Guest: f.Guest, Open: f.Addr != "" && !strings.HasPrefix(f.Addr, "127.")}
		if req.KeepPorts {
			out.Host = f.Host
		}
		o.Forwards = append(o.Forwards, out)
	}
	for _, l := range r.Links[:m.Parents] {
		c, digest, err := s.linkContent(ctx, l)
		if err != nil {
			return o, fmt.Errorf("overlay %.12s of instance %s: %w", l.ID, r.ID, err)
		}
		size := c.(*sourceReader).Size()
		if err := c.Close(); err != nil {
			return o, err
		}
		o.Chain = append(o.Chain, handoff.Overlay{ID: l.ID, Digest: digest, Bytes: size, URL: s.publishedURL(id, m.Key, l.ID), Origin: originOf(l)})
	}
	return o, nil
}

// residueOf estimates what an instance has changed, in bytes.
func (s *Service) residueOf(r *record, vm *vmm.VM) (n int64) {
	for _, l := range r.Links[len(r.Links)-r.Own:] {
		n += l.Size
	}
	if anon, err := procNumber(fmt.Sprintf("/proc/%d/status", vm.PID()), "RssAnon:"); err == nil {
		n += anon
	}
	var st unix.Stat_t
	if err := unix.Stat(s.instancePath(r.ID, "vm", "disk.qcow2"), &st); err == nil {
		n += st.Blocks * 512
	}
	return n
}

// follow runs a source until the handoff has ended, and says how. It frees the instance as soon
// as that is an ordinary one again.
func (s *Service) follow(ctx context.Context, op *operation, id string, m handoffMeta, src *handoff.Source, free func()) (any, error) {
	freed := false
	life, stop := context.WithCancelCause(context.WithoutCancel(ctx))
	defer stop(nil)
	ended := make(chan error, 1)
	go func() { ended <- src.Run(life) }()
	tick := time.NewTicker(operationTick)
	defer tick.Stop()
	asked, halt := ctx.Done(), s.halting.Done()
	for {
		select {
		case err := <-ended:
			if err != nil && !src.Status().State.Ended() {
				return nil, err // the next daemon goes on with it
			}
			return s.handedOff(context.WithoutCancel(ctx), op, id, m, src.Status())
		case <-asked:
			asked = nil
			if errors.Is(context.Cause(ctx), errStopping) {
				stop(errStopping)
			} else if err := src.Cancel(); err != nil {
				s.log.Info("handoff cannot be cancelled", "handoff", id, "err", err)
			}
		case <-halt:
			halt = nil
			stop(errStopping)
		case <-tick.C:
			st := src.Status()
			reportHandoff(op, st)
			if st.State == handoff.SourceSuperseding && !freed {
				if err := s.letGo(ctx, id, m, st); err != nil {
					s.log.Warn("instance stays that of its handoff", "handoff", id, "err", err) // until the next tick
					continue
				}
				free()
				freed = true
			}
		}
	}
}

// reportHandoff shows how far a handoff has come.
func reportHandoff(op *operation, st handoff.Status) {
	phase := string(st.State)
	switch {
	case st.InDoubt:
		phase = "in doubt"
	case st.State == handoff.SourceOpen && st.Theirs == "":
		phase = "offer"
	case st.State == handoff.SourceOpen:
		phase = fmt.Sprintf("round %d", len(st.Rounds)+1)
	case st.State == handoff.SourcePausing && st.Pause == 0:
		phase = "pause"
	case st.State == handoff.SourcePausing:
		phase = "prepare"
	case st.State == handoff.SourceGoing:
		phase = "go"
	case st.State == handoff.SourceSuperseding:
		phase = "tell the destination"
	}
	op.progress(phase, max(0, st.Bytes-st.Missing), st.Bytes)
}

// handedOff records how a handoff has ended and makes its result.
func (s *Service) handedOff(ctx context.Context, op *operation, id string, m handoffMeta, st handoff.Status) (any, error) {
	if now, err := s.readHandoff(id); err == nil && now.Token != "" {
		now.Token = "" // of no use any more
		if err := s.writeHandoff(id, now); err != nil {
			return nil, err
		}
	}
	if err := s.letGo(ctx, id, m, st); err != nil {
		return nil, err
	}
	switch st.State {
	case handoff.SourceDone:
		out := api.HandedOff{
			Handoff: id, To: m.To, Instance: arrivedID(id), Endpoints: shownEndpoints(st.Endpoints), Rounds: shownRounds(st.Rounds),
			Bytes: st.Bytes, Pause: st.Pause.Seconds(), Took: time.Since(m.Created).Seconds(),
		}
		return out, nil
	case handoff.SourceResumed:
		return nil, api.Errorf(api.Conflict, "handoff %.12s: an operator has let instance %s run on here; %s", id, m.Instance, st.Loss)
	}
	op.mu.Lock()
	cancelled := op.cancelled
	op.mu.Unlock()
	if cancelled && st.Theirs != handoff.Refused {
		return nil, context.Canceled
	}
	return nil, refusal(m.Instance, st.Reasons)
}

// letGo makes an instance an ordinary one again. By the time it is called it may be so already,
// and even be handed off again.
func (s *Service) letGo(ctx context.Context, id string, m handoffMeta, st handoff.Status) error {
	return ignoreMissing(s.updateRecord(ctx, m.Instance, func(r *record) {
		if r.Handoff != id {
			return
		}
		r.Handoff = ""
		if st.State == handoff.SourceSuperseding || st.State == handoff.SourceResumed {
			r.Epoch, r.Tried = st.Epoch+1, st.Epoch+1
		}
	}))
}

// refusal is the error of a handoff that did not come to be.
func refusal(instance string, reasons []handoff.Reason) error {
	var texts, remedies []string
	for _, r := range reasons {
		text := r.Text
		if r.Field != "" {
			text = r.Field + ": " + text
		}
		texts = append(texts, text)
		if r.Remedy != "" && !slices.Contains(remedies, r.Remedy) {
			remedies = append(remedies, r.Remedy)
		}
	}
	return api.Errorf(api.Conflict, "instance %s runs on here: %s", instance, strings.Join(texts, "; ")).Fix("%s", strings.Join(remedies, "; "))
}

// handOffAgain goes on with a handoff that an earlier daemon had begun.
func (s *Service) handOffAgain(ctx context.Context, op *operation, target *api.Target) (any, error) {
	m, err := s.readHandoff(target.ID)
	if err != nil {
		return nil, err
	}
	c, err := s.sourceConfig(target.ID, m)
	if err != nil {
		return nil, err
	}
	src, err := handoff.OpenSource(ctx, c)
	if err != nil {
		return nil, err
	}
	c.VM.(*handoffVM).status = src.Status
	s.keepSource(target.ID, src)
	free := func() {}
	if r, err := s.readRecord(m.Instance); err == nil && r.Handoff == target.ID {
		held, err := waitLock(ctx, s.instancePath(m.Instance), unix.LOCK_EX)
		if err == nil {
			free = sync.OnceFunc(held.unlock)
			defer free()
		} else if ignoreMissing(err) != nil {
			return nil, err
		}
	} else if ignoreMissing(err) != nil {
		return nil, err
	}
	return s.follow(ctx, op, target.ID, m, src, free)
}

// resolve carries out what an operator decides about an instance whose handoff is in doubt.
func (s *Service) resolve(ctx context.Context, ref string, c handoff.Choice) (api.Instance, error) {
	id, err := s.findInstance(ref)
	if err != nil {
		return api.Instance{}, fail(err)
	}
	r, err := s.readRecord(id)
	if err != nil {
		return api.Instance{}, fail(err)
	}
	s.mu.Lock()
	src := s.sources[r.Handoff]
	s.mu.Unlock()
	if src == nil {
		return api.Instance{}, api.Errorf(api.Conflict, "instance %s is not the source of a handoff that this daemon works on", id).Fix("see `cloudlet handoff %s --status`", id)
	}
	if err := src.Resolve(c); err != nil {
		return api.Instance{}, api.Errorf(api.Conflict, "instance %s: %w", id, err).Fix("see `cloudlet handoff %s --status`", id)
	}
	in, err := s.Instance(ctx, id)
	return in, fail(err)
}

// cancelHandoff refuses to cancel a handoff for which it is too late.
func (s *Service) cancelHandoff(op api.Operation) error {
	if op.Kind != api.KindHandoff || op.Target == nil {
		return nil
	}
	s.mu.Lock()
	src := s.sources[op.Target.ID]
	s.mu.Unlock()
	if src == nil {
		return nil // it has not begun
	}
	if err := src.Cancel(); err != nil {
		return api.Errorf(api.Conflict, "operation %s: %w", op.ID, err).Fix("wait for it; if the other cloudlet is gone for good, decide with `cloudlet handoff INSTANCE --resolve`")
	}
	return nil
}
