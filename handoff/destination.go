package handoff

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// ErrStale means that a message has another epoch than the handoff.
var ErrStale = errors.New("the message is of another epoch")

// DestinationConfig is what a Destination works with. Site and Journal are required.
type DestinationConfig struct {
	Handoff string
	Site    Site
	Journal Journal
	Clock   Clock         // nil: SystemClock
	Lease   time.Duration // how long a silent source is waited for before go; 0: 2 minutes
}

type destinationRecord struct {
	Version int       `json:"version"`
	Handoff string    `json:"handoff"`
	Epoch   uint64    `json:"epoch"`
	State   State     `json:"state"`
	Offer   Offer     `json:"offer"`
	Lacks   []string  `json:"lacks,omitempty"`
	Chain   []Overlay `json:"chain,omitempty"` // of Prepare
	By      uint64    `json:"by,omitempty"`    // the epoch that supersedes it
	Settled bool      `json:"settled"`         // of Never and Superseded: Destroy, Pause is done
	Reasons []Reason  `json:"reasons,omitempty"`
}

// Destination is the side of a handoff where the instance is to run. Its methods are safe for
// concurrent use; messages are handled one at a time.
type Destination struct {
	cfg  DestinationConfig
	turn chan struct{} // holds one token while nobody works

	rec   destinationRecord // State "" if there is none
	heard time.Time
	round int  // the newest that was handed to Fetch
	ran   bool // Run has succeeded, though that may not be on record
	held  bool // superseded, though that may not be on record
	note  string
	look  Look

	mu    sync.Mutex
	epoch uint64             // of a Prepare under way
	cut   context.CancelFunc // ends it; nil: there is none
}

// OpenDestination takes up a handoff from its record, or waits for an offer if there is none.
// Tick must be called soon afterwards.
func OpenDestination(ctx context.Context, cfg DestinationConfig) (*Destination, error) {
	if cfg.Clock == nil {
		cfg.Clock = SystemClock{}
	}
	if cfg.Lease <= 0 {
		cfg.Lease = 2 * time.Minute
	}
	d := &Destination{cfg: cfg, turn: make(chan struct{}, 1), heard: cfg.Clock.Now()}
	d.turn <- struct{}{}
	found, err := load(ctx, cfg.Journal, &d.rec)
	if err != nil {
		return nil, err
	}
	if found && d.rec.Version != Version {
		return nil, fmt.Errorf("read handoff record: version %d, this is %d", d.rec.Version, Version)
	}
	return d, nil
}

func (d *Destination) lock(ctx context.Context) error {
	select {
	case <-d.turn:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *Destination) unlock() { d.turn <- struct{}{} }

// Handle answers a message. What it does may outlast the connection that the message came
// over: ctx should not end with that, since before go a verb that is cut off ends the handoff.
// An abort cuts a Prepare off. An error means that the message was not acted upon as far as the
// answer would tell, and may be sent again; it is no answer of the protocol.
func (d *Destination) Handle(ctx context.Context, m Message) (Answer, error) {
	if err := m.Validate(); err != nil {
		return Answer{}, err
	}
	if m.Handoff != d.cfg.Handoff {
		return Answer{}, broken("it is about handoff %.12s, not %.12s", m.Handoff, d.cfg.Handoff)
	}
	if m.Kind == KindAbort {
		d.cutPrepare(m.Epoch)
	}
	if err := d.lock(ctx); err != nil {
		return Answer{}, err
	}
	defer d.unlock()
	d.note, d.look = "", Look{}
	if d.rec.State == "" && m.Kind != KindOffer {
		return d.answer(m, Unknown), nil
	}
	if err := d.checkEpoch(m); err != nil {
		return Answer{}, err
	}
	defer func() { d.heard = d.cfg.Clock.Now() }()
	switch m.Kind {
	case KindOffer:
		if d.rec.State == "" {
			return d.offered(ctx, m)
		}
	case KindRound:
		if err := d.fetch(ctx, m); err != nil {
			return Answer{}, err
		}
	case KindPrepare:
		if err := d.prepare(ctx, m); err != nil {
			return Answer{}, err
		}
	case KindGo:
		if err := d.goes(ctx); err != nil {
			return Answer{}, err
		}
	case KindAsk:
		d.advance(ctx)
	case KindAbort:
		if err := d.refuse(ctx, Reason{Text: "the source has aborted the handoff"}); err != nil {
			return Answer{}, err
		}
	case KindEnd:
		if err := d.end(ctx); err != nil {
			return Answer{}, err
		}
	case KindSupersede:
		if err := d.supersede(ctx, m.Epoch); err != nil {
			return Answer{}, err
		}
	}
	return d.answer(m, d.shown()), nil
}

// shown is the state as it is told: a guest that runs is said to run, whether or not that
// could be written down.
func (d *Destination) shown() State {
	if d.rec.State == Went && d.ran {
		return Running
	}
	return d.rec.State
}

// checkEpoch: a message must have the epoch of the handoff, one that supersedes it a higher.
func (d *Destination) checkEpoch(m Message) error {
	switch {
	case d.rec.State == "":
	case m.Kind == KindSupersede && m.Epoch > d.rec.Epoch:
	case m.Kind != KindSupersede && m.Epoch == d.rec.Epoch:
	default:
		return fmt.Errorf("%w: %s of epoch %d, the handoff has %d", ErrStale, m.Kind, m.Epoch, d.rec.Epoch)
	}
	return nil
}

func (d *Destination) answer(m Message, st State) Answer {
	a := Answer{Version: Version, Handoff: m.Handoff, Epoch: m.Epoch, State: st, Lacks: d.rec.Lacks,
		Missing: d.look.Missing, Endpoints: d.look.Endpoints, Reasons: slices.Clone(d.rec.Reasons)}
	if d.note != "" && len(a.Reasons) < MaxReasons {
		a.Reasons = append(a.Reasons, Reason{Text: cut(d.note)})
	}
	return a
}

func (d *Destination) offered(ctx context.Context, m Message) (Answer, error) {
	lacks, reasons, err := d.cfg.Site.Admit(ctx, m.Epoch, *m.Offer)
	if err != nil {
		return Answer{}, fmt.Errorf("admit: %w", err)
	}
	if len(reasons) > 0 {
		a := d.answer(m, Refused)
		for _, r := range reasons[:min(len(reasons), MaxReasons)] {
			r.Text = cut(r.Text)
			if r.Remedy != "" {
				r.Remedy = cut(r.Remedy)
			}
			a.Reasons = append(a.Reasons, r)
		}
		return a, nil
	}
	rec := destinationRecord{Version: Version, Handoff: m.Handoff, Epoch: m.Epoch, State: Accepted, Offer: *m.Offer, Lacks: lacks}
	if err := d.write(ctx, rec); err != nil {
		return Answer{}, err
	}
	if len(m.Offer.Chain) > 0 {
		if err := d.cfg.Site.Fetch(ctx, m.Offer.Chain); err != nil {
			if err := d.refuse(ctx, Reason{Text: cut("fetch: " + err.Error())}); err != nil {
				return Answer{}, err
			}
		}
	}
	return d.answer(m, d.rec.State), nil
}

// fetch begins to fetch what was published. Nothing of it is written down: Prepare names the
// whole chain again.
func (d *Destination) fetch(ctx context.Context, m Message) error {
	if d.rec.State != Accepted {
		return nil
	}
	if m.Round >= d.round { // also again: it may be known by now that it cannot succeed
		if err := d.cfg.Site.Fetch(ctx, m.Chain); err != nil {
			return d.refuse(ctx, Reason{Text: cut("fetch: " + err.Error())})
		}
		d.round = m.Round
	}
	d.see(ctx)
	return nil
}

// see looks at the VM and what is missing, and reports whether it could.
func (d *Destination) see(ctx context.Context) bool {
	look, err := d.cfg.Site.Look(ctx)
	if err != nil {
		d.look, d.note = Look{Missing: 1}, err.Error()
		return false
	}
	d.look = look
	if look.Reason != "" {
		d.note = look.Reason
	}
	return true
}

func (d *Destination) prepare(ctx context.Context, m Message) error {
	if d.rec.State != Accepted {
		return nil
	}
	sub, cancel := context.WithCancel(ctx)
	d.setCut(d.rec.Epoch, cancel)
	err := d.cfg.Site.Prepare(sub, d.rec.Offer, m.Chain)
	d.setCut(0, nil)
	cancel()
	if err != nil {
		return d.refuse(ctx, Reason{Text: cut("prepare: " + err.Error())})
	}
	rec := d.rec
	rec.State, rec.Chain = Prepared, m.Chain
	if err := d.write(ctx, rec); err != nil {
		d.note = err.Error() // it stays accepted, and prepare may come again
	}
	return nil
}

func (d *Destination) setCut(epoch uint64, cut context.CancelFunc) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.epoch, d.cut = epoch, cut
}

// cutPrepare ends a Prepare under way that the source has given up: what it waits for may
// not come any more.
func (d *Destination) cutPrepare(epoch uint64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cut != nil && d.epoch == epoch {
		d.cut()
	}
}

// goes lets the guest run: only a VM that is there and has not run, and only once it is on
// record that it may have.
func (d *Destination) goes(ctx context.Context) error {
	switch d.rec.State {
	case Accepted:
		return d.refuse(ctx, Reason{Text: "it was not prepared"})
	case Prepared:
		if !d.see(ctx) {
			return nil
		}
		if !d.look.Alive { // the host was restarted; the guest has not run
			if err := d.cfg.Site.Prepare(ctx, d.rec.Offer, d.rec.Chain); err != nil {
				return d.refuse(ctx, Reason{Text: cut("prepare again: " + err.Error())})
			}
		}
		rec := d.rec
		rec.State = Went
		if err := d.write(ctx, rec); err != nil {
			d.note = err.Error()
			return nil
		}
	}
	d.advance(ctx)
	return nil
}

// advance does what is left after go.
func (d *Destination) advance(ctx context.Context) {
	if d.held {
		return
	}
	if d.rec.State == Went && !d.ran {
		err := d.cfg.Site.Run(ctx, d.rec.Offer)
		switch {
		case errors.Is(err, ErrEnded):
			d.move(ctx, Lost, Reason{Text: cut(err.Error())})
		case err != nil:
			d.note = err.Error()
		default:
			d.ran = true
		}
	}
	if d.rec.State == Went && d.ran {
		d.move(ctx, Running)
	}
	if (d.rec.State == Running || d.rec.State == Went && d.ran) && d.see(ctx) {
		switch {
		case !d.look.Alive:
			d.move(ctx, Lost, Reason{Text: cut(d.look.Reason)})
		case d.look.Missing == 0:
			d.move(ctx, Complete)
		}
	} else if d.rec.State == Complete || d.rec.State == Closed {
		d.see(ctx)
	}
}

// move goes into a state that nothing else depends on: if it cannot be written down, the
// next message or Tick tries again.
func (d *Destination) move(ctx context.Context, st State, reasons ...Reason) {
	rec := d.rec
	rec.State, rec.Reasons = st, reasons
	if err := d.write(ctx, rec); err != nil {
		d.note = err.Error()
	}
}

// refuse ends the handoff before go: first it is on record that the guest will never run,
// then all of it is removed. After go it does nothing.
func (d *Destination) refuse(ctx context.Context, why Reason) error {
	if d.rec.State == Accepted || d.rec.State == Prepared {
		rec := d.rec
		rec.State, rec.Reasons = Never, []Reason{why}
		if err := d.write(ctx, rec); err != nil {
			// The disk may be full, and of this. If go comes yet, it is prepared again.
			d.round = 0
			if gone := d.cfg.Site.Destroy(ctx); gone != nil {
				return errors.Join(err, gone)
			}
			if err := d.write(ctx, rec); err != nil {
				return err
			}
		}
	}
	d.settle(ctx)
	return nil
}

// settle carries out Never and Superseded. What fails is tried again by the next Tick.
func (d *Destination) settle(ctx context.Context) {
	if d.rec.Settled {
		return
	}
	var err error
	switch d.rec.State {
	case Never:
		err = d.cfg.Site.Destroy(ctx)
	case Superseded:
		err = d.cfg.Site.Pause(ctx)
		if errors.Is(err, ErrEnded) {
			err = nil
		}
	default:
		return
	}
	if err == nil {
		rec := d.rec
		rec.Settled = true
		err = d.write(ctx, rec)
	}
	if err != nil {
		d.note = err.Error()
	}
}

// end: the source has discarded its VM.
func (d *Destination) end(ctx context.Context) error {
	switch d.rec.State {
	case Running, Complete, Lost:
		rec := d.rec
		rec.State = Closed
		return d.write(ctx, rec)
	}
	return nil
}

// supersede: an operator has let the guest run at the source. It is paused here and kept; the
// operator of this cloudlet decides about it.
func (d *Destination) supersede(ctx context.Context, epoch uint64) error {
	switch d.rec.State {
	case Accepted, Prepared:
		return d.refuse(ctx, Reason{Text: "the guest was let run at the source"})
	case Went, Running, Complete, Lost:
		rec := d.rec
		d.held = true
		rec.State, rec.By = Superseded, epoch
		rec.Reasons = append(slices.Clone(rec.Reasons), Reason{Text: fmt.Sprintf("an operator let the guest run at the source, as epoch %d", epoch),
			Remedy: "look at what is in the paused VM, then delete it"})
		if err := d.write(ctx, rec); err != nil {
			if stop := d.cfg.Site.Pause(ctx); !errors.Is(stop, ErrEnded) {
				err = errors.Join(err, stop)
			}
			return err
		}
	}
	d.settle(ctx)
	if d.rec.State == Superseded && !d.rec.Settled {
		return fmt.Errorf("pause: %s", d.note)
	}
	return nil
}

// write replaces the record.
func (d *Destination) write(ctx context.Context, rec destinationRecord) error {
	if err := store(ctx, d.cfg.Journal, rec); err != nil {
		return err
	}
	d.rec = rec
	return nil
}

// Tick does what is due without a message: a lease that has run out, what a crash
// interrupted, what failed before. It is called at the start and then about every second
// until it reports that nothing is left.
func (d *Destination) Tick(ctx context.Context) (settled bool, err error) {
	if err := d.lock(ctx); err != nil {
		return false, err
	}
	defer d.unlock()
	d.note, d.look = "", Look{}
	switch d.rec.State {
	case Accepted, Prepared:
		if d.cfg.Clock.Now().Sub(d.heard) > d.cfg.Lease {
			err = d.refuse(ctx, Reason{Text: fmt.Sprintf("the source was silent for %v", d.cfg.Lease)})
		}
	case Went, Running:
		d.advance(ctx)
	default:
		d.settle(ctx)
	}
	if err == nil && d.note != "" {
		err = errors.New(d.note)
	}
	return d.settledState(), err
}

func (d *Destination) settledState() bool {
	switch d.rec.State {
	case "", Complete, Closed, Lost:
		return true
	case Never, Superseded:
		return d.rec.Settled
	}
	return false
}

// DestinationStatus is how a handoff is, at its destination.
type DestinationStatus struct {
	Handoff string    `json:"handoff"`
	Epoch   uint64    `json:"epoch"`
	State   State     `json:"state"` // Unknown: there is no record
	Offer   Offer     `json:"offer"`
	Chain   []Overlay `json:"chain"` // of Prepare
	Reasons []Reason  `json:"reasons"`
	Stuck   string    `json:"stuck"`
}

// Status says how it is. It waits for a message that is being handled.
func (d *Destination) Status(ctx context.Context) (DestinationStatus, error) {
	if err := d.lock(ctx); err != nil {
		return DestinationStatus{}, err
	}
	defer d.unlock()
	st := DestinationStatus{Handoff: d.cfg.Handoff, Epoch: d.rec.Epoch, State: d.rec.State, Offer: d.rec.Offer,
		Chain: d.rec.Chain, Reasons: slices.Clone(d.rec.Reasons), Stuck: d.note}
	if st.State == "" {
		st.State = Unknown
	}
	return st, nil
}
