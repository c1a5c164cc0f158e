package handoff

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// SourceState is the state of a source, as its journal names it.
type SourceState string

// The states of a source.
const (
	SourceOpen       SourceState = "open"    // the guest runs; rounds
	SourcePausing    SourceState = "pausing" // the guest is paused, or about to be
	SourceGoing      SourceState = "going"   // go may have been sent
	SourceMoved      SourceState = "moved"   // the destination has said that it runs
	SourceDiscarding SourceState = "discarding"
	SourceDone       SourceState = "done"
	SourceAborting   SourceState = "aborting"
	SourceCancelled  SourceState = "cancelled"
	SourceResuming   SourceState = "resuming" // an operator has accepted the loss
	// SourceSuperseding: the instance is an ordinary one again, and the destination is told.
	SourceSuperseding SourceState = "superseding"
	SourceResumed     SourceState = "resumed"
)

// Ended reports whether nothing is left to do.
func (s SourceState) Ended() bool {
	return s == SourceDone || s == SourceCancelled || s == SourceResumed
}

func (s SourceState) beforeGo() bool { return s == SourceOpen || s == SourcePausing }

// Errors of a Source.
var (
	ErrTooLate  = errors.New("the destination may have run: it cannot be cancelled any more")
	ErrNoDoubt  = errors.New("the handoff is not in doubt")
	ErrNoRecord = errors.New("there is no record of the handoff")
)

// Choice is what an operator decides about a handoff in doubt.
type Choice string

// The choices. Each accepts a loss that Status.Loss describes.
const (
	ResumeHere  Choice = "resume"  // the guest runs on here, as it was when it was paused
	DiscardHere Choice = "discard" // the VM here is given up though the other is not complete
)

// SourceConfig is what a Source works with. VM, Peer and Journal are required.
type SourceConfig struct {
	Handoff string // new for every attempt
	Epoch   uint64 // higher than any that the instance has had
	Offer   Offer
	VM      VM
	Peer    Peer
	Journal Journal
	Clock   Clock // nil: SystemClock
	Limits  Limits
	Rates   Rates // what is known before it is measured; zero: nothing
}

type sourceRecord struct {
	Version   int         `json:"version"`
	Handoff   string      `json:"handoff"`
	Epoch     uint64      `json:"epoch"`
	State     SourceState `json:"state"`
	Offer     Offer       `json:"offer"`
	Stopped   bool        `json:"stopped"` // Pause may have been called
	PausedAt  time.Time   `json:"paused_at,omitzero"`
	Endpoints []Endpoint  `json:"endpoints,omitempty"`
	Reasons   []Reason    `json:"reasons,omitempty"`
}

// phase is where a source is within a state. It is not written down: what a crash makes of
// it is the first phase of the state.
type phase int

const (
	offering phase = iota // of SourceOpen
	rounding
	sending
	deciding
	pausing // of SourcePausing
	publishing
	preparing
	committing
	withdrawing
	continuing // of SourceAborting and SourceResuming
	settling
	releasing
	telling
	ending
	discarding // of SourceDiscarding
)

// Source is the side of a handoff where the instance runs at first. One goroutine calls Step
// or Run; the other methods are safe for concurrent use.
type Source struct {
	cfg SourceConfig

	// Of the goroutine that steps.
	phase  phase
	round  int // overlays published
	chain  []Overlay
	began  time.Time // of the first round, then of the phase
	heard  time.Time // of the last answer
	wait   time.Duration
	sentAt time.Time

	mu        sync.Mutex
	rec       sourceRecord
	cancelled []Reason // why it is to be aborted; nil: it is not
	committed bool     // too late for that
	choice    Choice
	deciding  bool // it is being written down, or may be
	interrupt context.CancelFunc
	poked     bool // interrupt was wanted while there was none
	rounds    []Round
	missing   int64
	why       string // of the last decision about rounds
	note      string // what the last step was stuck at
	sent      Kind   // the message that has no answer yet
	since     time.Time
	theirs    State // in the last answer
	progress  time.Time
	stopped   time.Time
	pause     time.Duration
}

// Status is how a handoff is, at its source.
type Status struct {
	Handoff   string        `json:"handoff"`
	Epoch     uint64        `json:"epoch"`
	State     SourceState   `json:"state"`
	Theirs    State         `json:"theirs"` // the destination, as it last said
	Rounds    []Round       `json:"rounds"`
	Bytes     int64         `json:"bytes"`   // published
	Missing   int64         `json:"missing"` // of these, not there yet
	Pause     time.Duration `json:"pause"`   // until the last overlay was published
	Why       string        `json:"why"`     // the last decision about rounds
	Endpoints []Endpoint    `json:"endpoints"`
	Reasons   []Reason      `json:"reasons"` // of its end, if it was cancelled
	InDoubt   bool          `json:"in_doubt"`
	Loss      string        `json:"loss"` // what Resolve gives up, if it is in doubt
	Stuck     string        `json:"stuck"`
}

// NewSource begins a handoff: its record is written, nothing else is done yet.
func NewSource(ctx context.Context, cfg SourceConfig) (*Source, error) {
	s := newSource(cfg)
	s.rec = sourceRecord{Version: Version, Handoff: cfg.Handoff, Epoch: cfg.Epoch, State: SourceOpen, Offer: cfg.Offer}
	m := s.message(KindOffer)
	if err := m.Validate(); err != nil {
		return nil, fmt.Errorf("begin handoff %s: %w", cfg.Handoff, err)
	}
	if err := store(ctx, cfg.Journal, s.rec); err != nil {
		return nil, fmt.Errorf("begin handoff %s: %w", cfg.Handoff, err)
	}
	return s, nil
}

// OpenSource takes up a handoff from its record; Handoff, Epoch and Offer come from there.
// One that was before go is aborted. ErrNoRecord if there is none.
func OpenSource(ctx context.Context, cfg SourceConfig) (*Source, error) {
	s := newSource(cfg)
	found, err := load(ctx, cfg.Journal, &s.rec)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, ErrNoRecord
	}
	if s.rec.Version != Version {
		return nil, fmt.Errorf("read handoff record: version %d, this is %d", s.rec.Version, Version)
	}
	switch {
	case s.rec.State.beforeGo():
		s.cancelled = []Reason{{Text: "the source was restarted before go"}}
	case s.rec.State == SourceDiscarding:
		s.phase = discarding
	case s.rec.State == SourceSuperseding:
		s.phase, s.committed = telling, true
	default:
		s.phase, s.committed = continuing, true
	}
	return s, nil
}

func newSource(cfg SourceConfig) *Source {
	if cfg.Clock == nil {
		cfg.Clock = SystemClock{}
	}
	cfg.Limits = cfg.Limits.withDefaults()
	now := cfg.Clock.Now()
	return &Source{cfg: cfg, heard: now, progress: now, began: now}
}

// Run steps until the handoff has ended. If ctx ends before go, the guest runs on here before
// Run returns; after go it returns at once, and OpenSource goes on from the record.
func (s *Source) Run(ctx context.Context) error {
	for {
		wait, done := s.Step(ctx)
		if done {
			return nil
		}
		if ctx.Err() != nil {
			return s.leave(ctx)
		}
		if wait > 0 {
			sub, stop := s.interruptible(ctx)
			err := s.cfg.Clock.Wait(sub, wait)
			stop()
			if err != nil && ctx.Err() != nil {
				return s.leave(ctx)
			}
		}
	}
}

// leave aborts what is before go, as far as that concerns this side; the next OpenSource
// tells the destination.
func (s *Source) leave(ctx context.Context) error {
	cause := context.Cause(ctx)
	s.giveUp(Reason{Text: "the source was stopped before go"})
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.Limits.Stopped)
	defer cancel()
	for ctx.Err() == nil {
		st := s.state()
		if !st.beforeGo() && (st != SourceAborting || s.phase >= telling) {
			break
		}
		if wait, done := s.Step(ctx); done {
			break
		} else if err := s.cfg.Clock.Wait(ctx, wait); err != nil {
			break
		}
	}
	return cause
}

// Cancel asks for the guest to run on here; ErrTooLate after go, which changes nothing.
func (s *Source) Cancel() error {
	s.giveUp(Reason{Text: "it was cancelled"})
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cancelled != nil || s.rec.State == SourceAborting || s.rec.State == SourceCancelled {
		return nil
	}
	return ErrTooLate
}

// giveUp has the next step abort, unless it is too late.
func (s *Source) giveUp(reasons ...Reason) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.committed {
		return
	}
	if s.cancelled == nil {
		s.cancelled = reasons
	}
	s.pokeLocked()
}

// pokeLocked ends what Cancel and Resolve may end, now or as soon as it begins.
func (s *Source) pokeLocked() {
	if s.poked = s.interrupt == nil; !s.poked {
		s.interrupt()
	}
}

// Resolve tells an operator's decision about a handoff in doubt, who thereby accepts what
// Status.Loss says. The next step carries it out, unless the doubt has gone by then.
// DiscardHere is possible only once the destination has said that it runs. ErrNoDoubt if
// the handoff is not in doubt.
func (s *Source) Resolve(c Choice) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.inDoubtLocked() {
		return ErrNoDoubt
	}
	switch {
	case c == ResumeHere:
	case c == DiscardHere && s.rec.State == SourceMoved:
	case c == DiscardHere:
		return errors.New("the destination has not said that it runs: the VM here may be the only one, and can only be let run on here")
	default:
		return fmt.Errorf("choice %.40q is not known: use %q or %q", c, ResumeHere, DiscardHere)
	}
	s.choice = c
	s.pokeLocked()
	return nil
}

// inDoubtLocked: after go, and the destination has said nothing good for as long as patience
// goes, or something bad.
func (s *Source) inDoubtLocked() bool {
	if s.rec.State != SourceGoing && s.rec.State != SourceMoved {
		return false
	}
	return s.theirs == Lost || s.theirs == Unknown || s.cfg.Clock.Now().Sub(s.progress) >= s.cfg.Limits.Patience
}

// hangs is how long an answer may take before the status tells of it.
const hangs = 2 * time.Second

// Status says how it is.
func (s *Source) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Status{
		Handoff: s.rec.Handoff, Epoch: s.rec.Epoch, State: s.rec.State, Theirs: s.theirs, Rounds: slices.Clone(s.rounds),
		Missing: s.missing, Why: s.why, Pause: s.pause, Endpoints: slices.Clone(s.rec.Endpoints),
		Reasons: slices.Clone(s.rec.Reasons), Stuck: s.note,
	}
	if quiet := s.cfg.Clock.Now().Sub(s.since); st.Stuck == "" && s.sent != "" && quiet >= hangs {
		st.Stuck = fmt.Sprintf("no answer to %s for %v", s.sent, quiet.Round(time.Second))
	}
	for _, r := range s.rounds {
		st.Bytes += r.Bytes
	}
	if s.inDoubtLocked() {
		st.InDoubt = true
		at := s.rec.PausedAt.UTC().Format(time.RFC3339)
		switch {
		case s.theirs == Lost:
			st.Loss = fmt.Sprintf("the destination has lost the VM: what it did there is lost; here it would run on as of %s", at)
		case s.rec.State == SourceMoved:
			st.Loss = fmt.Sprintf("the VM ran at the destination, which may be running still: all that it has done since %s would be given up", at)
		default:
			st.Loss = fmt.Sprintf("the VM may have run at the destination, and may be running still: all that it has done since %s would be given up", at)
		}
	}
	return st
}

func (s *Source) state() SourceState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rec.State
}

// interruptible returns a context that Cancel and Resolve end.
func (s *Source) interruptible(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.interrupt = cancel
	if s.poked {
		s.poked = false
		cancel()
	}
	return ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.interrupt = nil
		cancel()
	}
}
