package handoff

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Step does the next thing: one verb, one message or one record. It returns how long to wait
// before the next, and whether the handoff has ended. It never fails: what it is stuck at is
// in the Status, and the next step tries again.
func (s *Source) Step(ctx context.Context) (wait time.Duration, done bool) {
	switch st := s.state(); st {
	case SourceOpen, SourcePausing:
		if reasons := s.given(); reasons != nil {
			return s.abort(ctx, reasons), false
		}
		sub, stop := s.interruptible(ctx)
		defer stop()
		if st == SourceOpen {
			return s.open(sub), false
		}
		return s.stop(ctx, sub), false
	case SourceGoing, SourceMoved:
		if next := s.chosen(); next != "" {
			return s.enter(ctx, next), false
		}
		if st == SourceGoing {
			return s.going(ctx), false
		}
		return s.moved(ctx), false
	case SourceAborting:
		return s.aborting(ctx), false
	case SourceDiscarding:
		return s.discarding(ctx), false
	case SourceResuming:
		return s.resuming(ctx), false
	case SourceSuperseding:
		return s.superseding(ctx), false
	}
	return 0, true
}

// given returns why the handoff is to be aborted, nil if it is not.
func (s *Source) given() []Reason {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cancelled
}

// chosen returns what the operator has decided, if the doubt still holds. The decision stands
// until it is on record, so that nothing else is sent once it may be.
func (s *Source) chosen() SourceState {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.choice == ResumeHere && (s.deciding || s.inDoubtLocked()):
		s.deciding = true
		return SourceResuming
	case s.choice == DiscardHere && (s.deciding || s.inDoubtLocked()):
		s.deciding = true
		return SourceDiscarding
	}
	s.choice = ""
	return ""
}

// open is the time while the guest runs: the offer, then rounds.
func (s *Source) open(ctx context.Context) time.Duration {
	switch s.phase {
	case offering:
		if _, ok := s.ask(ctx, KindOffer, Accepted, Prepared); !ok {
			return s.backoff()
		}
		s.phase, s.began = deciding, s.cfg.Clock.Now()
	case deciding:
		again, why := s.cfg.Limits.Another(s.rounds, s.cfg.Clock.Now().Sub(s.began), s.cfg.Rates)
		s.set(func() { s.why = why })
		if again {
			s.phase = rounding
			return 0
		}
		rec := s.record(SourcePausing)
		rec.Stopped = true
		rec.PausedAt = s.cfg.Clock.Now().UTC()
		if err := store(context.WithoutCancel(ctx), s.cfg.Journal, rec); err != nil {
			s.giveUp(Reason{Text: cut(err.Error())})
			return 0
		}
		s.set(func() { s.rec = rec })
		s.phase = pausing
	case rounding:
		p, err := s.cfg.VM.Round(ctx, s.round+1)
		if err != nil {
			s.giveUp(Reason{Text: cut(fmt.Sprintf("round %d: %v", s.round+1, err))})
			return 0
		}
		s.published(p)
		s.phase, s.sentAt = sending, s.cfg.Clock.Now()
	case sending:
		a, ok := s.ask(ctx, KindRound, Accepted)
		if !ok {
			return s.backoff()
		}
		now := s.cfg.Clock.Now()
		if a.Missing > 0 && now.Sub(s.began) < s.cfg.Limits.Time {
			return s.cfg.Limits.Poll
		}
		s.set(func() { s.rounds[len(s.rounds)-1].Sent = now.Sub(s.sentAt) })
		s.phase = deciding
	}
	return 0
}

func (s *Source) published(p Published) {
	s.round++
	s.chain, s.heard = p.Chain, s.cfg.Clock.Now() // nobody could answer meanwhile
	s.set(func() { s.rounds = append(s.rounds, p.Round) })
}

// stop is the time while the guest is paused, until go. ctx is the daemon's, sub ends with
// Cancel.
func (s *Source) stop(ctx, sub context.Context) time.Duration {
	if s.phase > pausing && s.phase < committing {
		left := s.cfg.Limits.Stopped - s.cfg.Clock.Now().Sub(s.stopped)
		if left <= 0 {
			s.giveUp(Reason{Text: fmt.Sprintf("the guest was paused for %v and the destination is not ready", s.cfg.Limits.Stopped)})
			return 0
		}
		bound, cancel := context.WithTimeout(sub, left) // a message may hang for longer
		defer cancel()
		sub = bound
	}
	switch s.phase {
	case pausing:
		s.stopped = s.cfg.Clock.Now()
		if err := s.cfg.VM.Pause(sub); err != nil {
			s.giveUp(Reason{Text: cut(fmt.Sprintf("pause: %v", err))})
			return 0
		}
		s.phase = publishing
	case publishing:
		p, err := s.cfg.VM.Final(sub, s.round+1)
		if err != nil {
			s.giveUp(Reason{Text: cut(fmt.Sprintf("last round: %v", err))})
			return 0
		}
		s.published(p)
		s.set(func() { s.pause = s.cfg.Clock.Now().Sub(s.stopped) })
		s.phase = preparing
	case preparing:
		if _, ok := s.ask(sub, KindPrepare, Prepared); !ok {
			return s.backoff()
		}
		s.phase = committing
	case committing:
		s.mu.Lock()
		s.committed = s.cancelled == nil
		late := !s.committed
		s.mu.Unlock()
		if late {
			return 0
		}
		rec := s.record(SourceGoing)
		err := store(context.WithoutCancel(ctx), s.cfg.Journal, rec)
		switch {
		case err == nil:
			now := s.cfg.Clock.Now()
			s.set(func() { s.rec, s.progress = rec, now })
			s.wait = 0
		case errors.Is(err, errUnsettled):
			// Go may be on record: neither to send it nor to run on would be right, until it is
			// known not to be, or the destination has said that it never will.
			s.phase = withdrawing
			return s.stuck(err)
		default:
			s.withdraw(err)
		}
	case withdrawing:
		if err := store(context.WithoutCancel(ctx), s.cfg.Journal, s.record(SourcePausing)); err != nil {
			if a, sent := s.send(ctx, KindAbort); sent != nil || a.State != Never {
				return s.stuck(err)
			}
		}
		s.withdraw(errUnsettled)
	}
	return 0
}

// withdraw takes the decision for go back: it was not sent and will not be.
func (s *Source) withdraw(err error) {
	s.set(func() { s.committed = false })
	s.giveUp(Reason{Text: cut("go could not be written down: " + err.Error())})
}

// ask sends a message before go and reports whether the answer's state is one of those that
// are hoped for. Otherwise it has the handoff aborted where waiting is of no use.
func (s *Source) ask(ctx context.Context, k Kind, hoped ...State) (Answer, bool) {
	a, err := s.send(ctx, k)
	if err != nil {
		quiet := s.cfg.Clock.Now().Sub(s.heard)
		if errors.Is(err, ErrForGood) || quiet > s.cfg.Limits.Patience {
			s.giveUp(Reason{Text: cut(fmt.Sprintf("%s: %v", k, err))})
		}
		return a, false
	}
	for _, st := range hoped {
		if a.State == st {
			return a, true
		}
	}
	if a.State != Accepted { // which is also what it is while it has trouble that may pass
		s.giveUp(append([]Reason{{Text: fmt.Sprintf("the destination answered %s with %s", k, a.State)}}, a.Reasons...)...)
	}
	return a, false
}

// going repeats go until it is known whether the guest runs there.
func (s *Source) going(ctx context.Context) time.Duration {
	a, err := s.send(ctx, KindGo)
	if err != nil {
		return s.stuck(err)
	}
	switch a.State {
	case Running, Complete, Closed:
		rec := s.record(SourceMoved)
		rec.Endpoints = a.Endpoints
		return s.write(ctx, rec)
	case Never:
		rec := s.record(SourceAborting)
		rec.Reasons = append([]Reason{{Text: "the guest did not run at the destination and will not"}}, a.Reasons...)
		return s.write(ctx, rec)
	}
	return s.stuck(fmt.Errorf("the destination is in state %s%s", a.State, firstReason(a)))
}

// moved asks until the destination has everything.
func (s *Source) moved(ctx context.Context) time.Duration {
	a, err := s.send(ctx, KindAsk)
	if err != nil {
		return s.stuck(err)
	}
	switch a.State {
	case Complete, Closed:
		return s.enter(ctx, SourceDiscarding)
	case Running:
		s.wait = 0
		return s.cfg.Limits.Poll
	}
	return s.stuck(fmt.Errorf("the destination is in state %s%s", a.State, firstReason(a)))
}

func firstReason(a Answer) string {
	if len(a.Reasons) == 0 {
		return ""
	}
	return ": " + a.Reasons[0].Text
}

// abort ends the handoff before go. The guest runs on even if that cannot be written down:
// every record before go means the same.
func (s *Source) abort(ctx context.Context, reasons []Reason) time.Duration {
	rec := s.record(SourceAborting)
	rec.Reasons = reasons[:min(len(reasons), MaxReasons)]
	err := store(ctx, s.cfg.Journal, rec)
	s.set(func() {
		s.rec = rec
		if err != nil {
			s.note = err.Error()
		}
	})
	s.phase, s.wait, s.began = continuing, 0, s.cfg.Clock.Now()
	return 0
}

func (s *Source) aborting(ctx context.Context) time.Duration {
	switch s.phase {
	default:
		if s.rec.Stopped && !s.rec.Offer.Paused {
			if err := s.cfg.VM.Continue(ctx); err != nil && !errors.Is(err, ErrEnded) {
				return s.stuck(err)
			}
		}
		s.phase = settling
	case settling, releasing, telling, ending:
		return s.farewell(ctx, KindAbort, SourceCancelled)
	}
	return 0
}

func (s *Source) discarding(ctx context.Context) time.Duration {
	switch s.phase {
	default:
		if err := s.cfg.VM.Discard(ctx); err != nil {
			return s.stuck(err)
		}
		s.phase = settling
	case settling, releasing, telling, ending:
		return s.farewell(ctx, KindEnd, SourceDone)
	}
	return 0
}

// farewell releases what was published, tells the destination by k, and ends in state last.
func (s *Source) farewell(ctx context.Context, k Kind, last SourceState) time.Duration {
	switch s.phase {
	case settling:
		if err := s.settle(ctx); err != nil {
			return s.stuck(err)
		}
		s.phase = releasing
	case releasing:
		if err := s.cfg.VM.Release(ctx); err != nil {
			return s.stuck(err)
		}
		s.phase, s.wait, s.began = telling, 0, s.cfg.Clock.Now()
	case telling:
		return s.tell(ctx, k, s.cfg.Limits.Patience)
	case ending:
		return s.enter(ctx, last)
	}
	return 0
}

// settle leaves nothing of the rounds in a VM, if there is one.
func (s *Source) settle(ctx context.Context) error {
	if err := s.cfg.VM.Settle(ctx); err != nil && !errors.Is(err, ErrEnded) {
		return err
	}
	return nil
}

// resuming runs the guest here though it may have run there.
func (s *Source) resuming(ctx context.Context) time.Duration {
	switch s.phase {
	default:
		if !s.rec.Offer.Paused {
			if err := s.cfg.VM.Continue(ctx); err != nil && !errors.Is(err, ErrEnded) {
				return s.stuck(err)
			}
		}
		s.phase = settling
	case settling:
		if err := s.settle(ctx); err != nil {
			return s.stuck(err)
		}
		s.phase = ending
	case ending: // the VM is not touched again, even if the record is said not to be written
		return s.enter(ctx, SourceSuperseding)
	}
	return 0
}

// superseding tells the destination that the guest runs here. What was published stays until
// then, so that the VM there can be paused and looked at.
func (s *Source) superseding(ctx context.Context) time.Duration {
	switch s.phase {
	case telling:
		return s.tell(ctx, KindSupersede, s.cfg.Limits.Farewell)
	case ending:
		if err := s.cfg.VM.Release(ctx); err != nil {
			return s.stuck(err)
		}
		return s.enter(ctx, SourceResumed)
	}
	return 0
}

// tell sends a message that needs no particular answer, until there is one or the time is
// up. To supersede matters more than to be told that it is of no use.
func (s *Source) tell(ctx context.Context, k Kind, bound time.Duration) time.Duration {
	_, err := s.send(ctx, k)
	if err != nil && (k == KindSupersede || !errors.Is(err, ErrForGood)) && s.cfg.Clock.Now().Sub(s.began) < bound {
		return s.stuck(err)
	}
	s.phase, s.wait = ending, 0
	return 0
}

// enter goes into a state once that is on record.
func (s *Source) enter(ctx context.Context, st SourceState) time.Duration {
	return s.write(ctx, s.record(st))
}

func (s *Source) write(ctx context.Context, rec sourceRecord) time.Duration {
	if err := store(ctx, s.cfg.Journal, rec); err != nil {
		return s.stuck(err)
	}
	now := s.cfg.Clock.Now()
	s.set(func() {
		s.rec = rec
		s.note = ""
	})
	s.wait, s.began = 0, now
	switch rec.State {
	case SourceDiscarding:
		s.phase = discarding
	case SourceAborting, SourceResuming:
		s.phase = continuing
	case SourceSuperseding:
		s.phase = telling
	}
	return 0
}

// record returns a copy of the record in another state.
func (s *Source) record(st SourceState) sourceRecord {
	s.mu.Lock()
	defer s.mu.Unlock()
	rec := s.rec
	rec.State = st
	return rec
}

func (s *Source) set(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
}

// stuck notes an error and returns how long to wait.
func (s *Source) stuck(err error) time.Duration {
	s.set(func() { s.note = err.Error() })
	return s.backoff()
}

func (s *Source) backoff() time.Duration {
	s.wait = min(max(2*s.wait, s.cfg.Limits.Poll), s.cfg.Limits.Backoff)
	return s.wait
}

func (s *Source) message(k Kind) Message {
	m := Message{Version: Version, Handoff: s.rec.Handoff, Epoch: s.rec.Epoch, Kind: k}
	switch k {
	case KindOffer:
		m.Offer = &s.rec.Offer
	case KindRound, KindPrepare:
		m.Round, m.Chain = s.round, s.chain
	case KindSupersede:
		m.Epoch++
	}
	return m
}

// send sends a message and checks that the answer is one to it.
func (s *Source) send(ctx context.Context, k Kind) (Answer, error) {
	m := s.message(k)
	now := s.cfg.Clock.Now()
	s.set(func() { s.sent, s.since = k, now })
	a, err := s.cfg.Peer.Send(ctx, m)
	s.set(func() { s.sent = "" })
	if err == nil {
		err = a.Validate()
	}
	if err == nil && (a.Handoff != m.Handoff || a.Epoch != m.Epoch) {
		err = broken("an answer about handoff %.12s, epoch %d", a.Handoff, a.Epoch)
	}
	if err != nil {
		s.set(func() { s.note = err.Error() })
		return Answer{}, fmt.Errorf("send %s: %w", k, err)
	}
	s.heard = s.cfg.Clock.Now()
	s.set(func() {
		s.theirs, s.missing, s.note = a.State, a.Missing, ""
		if a.State == Running || a.State == Complete || a.State == Closed {
			s.progress = s.heard
		}
		if len(a.Reasons) > 0 {
			s.note = a.Reasons[0].Text
		}
	})
	return a, nil
}
