package handoff

import (
	"fmt"
	"time"
)

// MaxRounds is the most overlays a handoff publishes, the last one included.
const MaxRounds = 16

// Round is what one round was like.
type Round struct {
	Dirty int64         `json:"dirty"` // bytes that the guest had changed since the round before
	Bytes int64         `json:"bytes"` // of the overlay made of them
	Made  time.Duration `json:"made"`  // to copy them and make the overlay
	Sent  time.Duration `json:"sent"`  // then, until the destination had it
	Pause time.Duration `json:"pause"` // that the guest stood still for it
}

// Rates are what was measured of the link and the guest; 0 is not known.
type Rates struct {
	Bandwidth float64 // bytes of overlays a second
	Dirty     float64 // bytes that the guest changes a second, while it runs
}

// Limits bound a handoff. The zero value of a field means its default.
type Limits struct {
	Rounds int           // live rounds, at most MaxRounds-1; default 4; below 0: none
	Time   time.Duration // of all live rounds; default 5 minutes
	Bytes  int64         // of all live rounds' overlays; default 8 GiB
	// Pause is a pause that is short enough: no round is taken to shorten it. Default 0.2 s.
	Pause time.Duration
	// Shrink is how much smaller than the last one the next round must be expected to be, as
	// a factor; default 0.7.
	Shrink float64
	// Stopped is how long the guest may stand still before go: then it runs on here; default
	// 30 s.
	Stopped time.Duration
	// Patience is how long the destination may be silent before go; default 30 s.
	Patience time.Duration
	// Farewell is how long a destination is tried that must be told that an operator has let
	// the guest run here; default 24 h.
	Farewell time.Duration
	// Poll is the time between two questions, Backoff the longest after errors; defaults
	// 100 ms and 3 s.
	Poll, Backoff time.Duration
}

func (l Limits) withDefaults() Limits {
	if l.Rounds == 0 {
		l.Rounds = 4
	}
	l.Rounds = min(max(l.Rounds, -1), MaxRounds-1) // none stays below 0: this may be asked twice
	for _, d := range []struct {
		v *time.Duration
		d time.Duration
	}{
		{&l.Time, 5 * time.Minute}, {&l.Pause, 200 * time.Millisecond}, {&l.Stopped, 30 * time.Second},
		{&l.Patience, 30 * time.Second}, {&l.Farewell, 24 * time.Hour}, {&l.Poll, 100 * time.Millisecond}, {&l.Backoff, 3 * time.Second},
	} {
		if *d.v <= 0 {
			*d.v = d.d
		}
	}
	if l.Bytes <= 0 {
		l.Bytes = 8 << 30
	}
	if l.Shrink <= 0 || l.Shrink >= 1 {
		l.Shrink = 0.7
	}
	return l
}

// Measure returns the rates that the rounds so far show, where known does not say more.
func Measure(done []Round, known Rates) Rates {
	if len(done) == 0 {
		return known
	}
	last := done[len(done)-1]
	if known.Bandwidth <= 0 && last.Sent > 0 {
		known.Bandwidth = float64(last.Bytes) / last.Sent.Seconds()
	}
	if known.Dirty <= 0 && len(done) > 1 {
		// What the last round found was changed while the one before was made and sent.
		before := done[len(done)-2]
		if span := (before.Made + before.Sent).Seconds(); span > 0 {
			known.Dirty = float64(last.Dirty) / span
		}
	}
	return known
}

// Another decides whether another live round pays, and says why. spent is the time since the
// first began. A round is taken while none of the bounds in number, time and bytes is met,
// the pause without it would be longer than l.Pause, and it would be smaller than the last by
// l.Shrink. What is not known yet speaks for a round: the first two are how it becomes known.
func (l Limits) Another(done []Round, spent time.Duration, known Rates) (again bool, why string) {
	l = l.withDefaults()
	if len(done) >= l.Rounds {
		return false, fmt.Sprintf("the limit of %d rounds is met", max(l.Rounds, 0))
	}
	if spent >= l.Time {
		return false, fmt.Sprintf("the limit of %v is met", l.Time)
	}
	if len(done) == 0 {
		return true, "the first takes all that was changed"
	}
	var sum int64
	for _, r := range done {
		sum += r.Bytes
	}
	if sum >= l.Bytes {
		return false, fmt.Sprintf("the limit of %d bytes is met", l.Bytes)
	}
	last := done[len(done)-1]
	rates := Measure(done, known)
	if rates.Dirty <= 0 && len(done) == 1 && known.Dirty <= 0 {
		return true, "it is not known yet how fast the guest changes"
	}
	// Expected is what the guest has changed since the last round was copied.
	expected := min(rates.Dirty*(last.Made+last.Sent).Seconds(), float64(max(last.Dirty, 1))*1e3)
	took, size := (last.Made + last.Sent).Seconds(), expected
	if last.Dirty > 0 {
		took *= expected / float64(last.Dirty)
		size *= float64(last.Bytes) / float64(last.Dirty)
	}
	if rates.Bandwidth > 0 {
		took = max(took, size/rates.Bandwidth)
	}
	switch next := time.Duration(took * float64(time.Second)); {
	case next <= l.Pause:
		return false, fmt.Sprintf("about %.0f bytes are left, a pause of %v", expected, next.Round(time.Millisecond))
	case expected > l.Shrink*float64(last.Dirty):
		return false, fmt.Sprintf("another round would not shrink it: %d bytes in the last, about %.0f now", last.Dirty, expected)
	case spent+next > l.Time:
		return false, fmt.Sprintf("another round would not end within %v", l.Time)
	case sum+int64(size) > l.Bytes:
		return false, fmt.Sprintf("another round would exceed %d bytes", l.Bytes)
	}
	return true, fmt.Sprintf("about %.0f bytes, %d in the last", expected, last.Dirty)
}
