package service

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"cloudlet/api"
	"cloudlet/handoff"
)

// arrival is a handoff of which this cloudlet is the destination.
type arrival struct {
	s    *Service
	id   string
	dest *handoff.Destination
	meta handoffMeta

	mu      sync.Mutex
	state   handoff.State // as last seen
	offer   handoff.Offer
	chain   []handoff.Overlay // all that is to be here in the end, as far as it is known
	fetches map[string]*fetch // by overlay id
	cancel  context.CancelFunc
	life    context.Context // of the fetches
	done    sync.WaitGroup
}

// tickPause is the time between two looks at arrivals that have not ended.
const tickPause = time.Second

// HandoffMessage handles a message of package handoff from the source of a handoff, whose
// address is from, and returns the answer.
func (s *Service) HandoffMessage(ctx context.Context, caller Caller, from netip.Addr, message []byte) ([]byte, error) {
	answer, err := s.handoffMessage(ctx, from, message)
	if err != nil {
		return nil, failAs(api.Unavailable, err)
	}
	return json.Marshal(answer)
}

func (s *Service) handoffMessage(ctx context.Context, from netip.Addr, message []byte) (a handoff.Answer, err error) {
	m, err := handoff.ParseMessage(message)
	if err != nil {
		return a, api.Errorf(api.Invalid, "%w", err)
	}
	s.mu.Lock()
	if s.closed || !s.cfg.Daemon {
		s.mu.Unlock()
		return a, errClosing()
	}
	s.joined.Add(1) // Close waits for it
	s.mu.Unlock()
	defer s.joined.Done()
	reply := handoff.Answer{Version: handoff.Version, Handoff: m.Handoff, Epoch: m.Epoch}
	meta, err := s.readHandoff(m.Handoff)
	switch {
	case err == nil && meta.Side == api.HandoffSource:
		reply.State, reply.Reasons = handoff.Refused, []handoff.Reason{{Field: "cloudlet", Text: "the instance is at this cloudlet already", Remedy: "give another one"}}
		return reply, nil
	case errors.Is(err, fs.ErrNotExist) && m.Kind != handoff.KindOffer:
		reply.State = handoff.Unknown
		return reply, nil
	case errors.Is(err, fs.ErrNotExist):
		meta = handoffMeta{Side: api.HandoffDestination, Instance: arrivedID(m.Handoff), Created: time.Now().UTC(), From: from.Unmap()}
		if err := s.newHandoffFolder(ctx, m.Handoff, meta); err != nil && !errors.Is(err, fs.ErrExist) {
			return a, err
		}
	case err != nil:
		return a, err
	}
	d, err := s.arrival(ctx, m.Handoff)
	if err != nil {
		return a, err
	}
	a, err = d.dest.Handle(ctx, m)
	if err != nil {
		s.log.Info("handoff message", "handoff", m.Handoff, "kind", m.Kind, "err", err)
		if errors.Is(err, handoff.ErrStale) || errors.Is(err, handoff.ErrWire) {
			err = api.Errorf(api.Conflict, "%w", err)
		}
		return a, err
	}
	if a.State == handoff.Refused {
		return a, s.forgetArrival(ctx, m.Handoff)
	}
	return a, d.settle(ctx)
}

// forgetArrival removes what a refused offer has left.
func (s *Service) forgetArrival(ctx context.Context, id string) error {
	s.mu.Lock()
	d := s.arrivals[id]
	delete(s.arrivals, id)
	s.mu.Unlock()
	if d != nil {
		d.stop()
	}
	return s.locked(ctx, func() error { return os.RemoveAll(s.handoffPath(id)) })
}

// arrival returns the destination of a handoff, taking it up from its journal.
func (s *Service) arrival(ctx context.Context, id string) (*arrival, error) {
	s.mu.Lock()
	d := s.arrivals[id]
	s.mu.Unlock()
	if d != nil {
		return d, nil
	}
	meta, err := s.readHandoff(id)
	if err != nil {
		return nil, err
	}
	d = &arrival{s: s, id: id, meta: meta, fetches: map[string]*fetch{}}
	d.life, d.cancel = context.WithCancel(context.WithoutCancel(ctx))
	d.dest, err = handoff.OpenDestination(ctx, handoff.DestinationConfig{Handoff: id, Site: (*site)(d), Journal: s.journal(id)})
	if err != nil {
		return nil, err
	}
	if !s.cfg.Daemon {
		return d, nil // only to look at
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if other := s.arrivals[id]; other != nil {
		d.cancel()
		return other, nil
	}
	s.arrivals[id] = d
	return d, nil
}

// takeUpArrivals goes on with the handoffs to this cloudlet that an earlier daemon had begun.
func (s *Service) takeUpArrivals(ctx context.Context) error {
	ids, err := s.list("handoffs")
	for _, id := range ids {
		m, merr := s.readHandoff(id)
		if merr != nil || m.Side != api.HandoffDestination {
			continue // of a source: its operation is taken up; without meta data: it is swept
		}
		d, derr := s.arrival(ctx, id)
		if derr != nil {
			err = errors.Join(err, derr)
			continue
		}
		st, derr := d.dest.Status(ctx)
		if derr == nil {
			err = errors.Join(err, d.settle(ctx))
		}
		if derr == nil && d.going() && len(st.Chain) > 0 {
			derr = (*site)(d).Fetch(ctx, st.Chain)
		} else if derr == nil && d.going() {
			derr = (*site)(d).Fetch(ctx, st.Offer.Chain)
		}
		err = errors.Join(err, derr)
	}
	return err
}

// tickArrivals does what is due without a message, until ctx ends.
func (s *Service) tickArrivals(ctx context.Context) {
	tick := time.NewTicker(tickPause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, d := range s.allArrivals() {
			if !d.unsettled() {
				continue
			}
			_, err := d.dest.Tick(ctx)
			if err = errors.Join(err, d.settle(ctx)); err != nil && ctx.Err() == nil {
				s.log.Info("handoff", "handoff", d.id, "err", err)
			}
		}
	}
}

// going reports whether the handoff goes on here, that is, is neither refused nor over.
func (d *arrival) going() bool {
	if d == nil {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	switch d.state {
	case handoff.Accepted, handoff.Prepared, handoff.Went, handoff.Running:
		return true
	}
	return false
}

// unsettled reports whether the handoff may have something to do without a message.
func (d *arrival) unsettled() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch d.state {
	case handoff.Complete, handoff.Closed, handoff.Lost, handoff.Unknown:
		return false
	}
	return true
}

// settle follows the state of the destination: an instance that is complete is an ordinary
// one, and one that is lost or superseded its operator's. After an error it is to be called
// again.
func (d *arrival) settle(ctx context.Context) error {
	st, err := d.dest.Status(ctx)
	if err != nil {
		return err
	}
	d.mu.Lock()
	before := d.state
	d.offer = st.Offer
	d.mu.Unlock()
	if before == st.State {
		return nil
	}
	switch st.State {
	case handoff.Complete, handoff.Closed, handoff.Lost, handoff.Superseded:
		err := d.s.updateRecord(ctx, d.meta.Instance, func(r *record) {
			if r.Handoff == d.id { // it may be handed on already
				r.Handoff = ""
			}
		})
		if err := ignoreMissing(err); err != nil {
			return err // a full disk
		}
	}
	d.mu.Lock()
	d.state = st.State
	d.mu.Unlock()
	d.s.log.Info("handoff to here", "handoff", d.id, "instance", d.meta.Instance, "state", st.State)
	return nil
}

// stopArrivals ends what is fetched; the next daemon goes on.
func (s *Service) stopArrivals() {
	for _, d := range s.allArrivals() {
		d.stop()
	}
}

func (s *Service) allArrivals() []*arrival {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Values(s.arrivals))
}

// removeArrived removes the overlays that a handoff has brought, once its instance is gone.
func (s *Service) removeArrived(id string) error {
	entries, err := os.ReadDir(s.handoffPath(id))
	for _, e := range entries {
		if e.IsDir() {
			err = errors.Join(err, os.RemoveAll(s.handoffPath(id, e.Name())))
		}
	}
	return ignoreMissing(err)
}

// stop ends the fetches and waits for them.
func (d *arrival) stop() {
	d.cancel()
	d.done.Wait()
}

// need returns what the host has promised to an instance that is to come, nothing once it is
// there.
func (d *arrival) need() need {
	if !d.going() {
		return need{}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n := need{Disk: d.offer.Residue}
	for _, f := range d.fetches {
		n.Disk += f.left()
	}
	if _, err := os.Stat(d.s.instancePath(d.meta.Instance, "record.json")); err != nil {
		n.Memory, n.Instances = d.offer.Memory, 1
	}
	return n
}
