package service

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"cloudlet/api"
	"cloudlet/fusefs"
	"cloudlet/overlay"
)

const (
	// lookUpPoll and lookUpMost bound the wait for somebody to look the files of a mount up.
	lookUpPoll = time.Millisecond
	lookUpMost = 10 * time.Second
	// prefetchShare is the part of the host's available memory that a prefetch may fill.
	prefetchShare = 4
	// restAfter is how long a guest has asked for nothing when it seems to have what it wants.
	restAfter = 250 * time.Millisecond
	// startMost is how long a guest may take to run: one that stays paused wants nothing.
	startMost = 20 * time.Second
	startPoll = 50 * time.Millisecond
)

// errFull ends a prefetch that has filled its share of the host's memory.
var errFull = errors.New("the host's memory is better kept for others")

// prefetch pushes what the guest is likely to touch into the page cache of a mount, until all
// is there or ctx ends: the pages of the touch profile, then, when the guest has what it wants,
// what overlays on this host hold of memory. A guest runs without it, only slower, so a
// failure is only logged.
func prefetch(ctx context.Context, spec MountSpec, im *overlay.Image, srv *fusefs.Server, log *slog.Logger) {
	profile, err := profileOf(spec, im)
	if err != nil {
		log.Warn("the touch profile cannot be used", "err", err)
	}
	room, err := procNumber("/proc/meminfo", "MemAvailable:")
	if err != nil {
		log.Warn("nothing is pushed", "err", err)
		return
	}
	p := &pusher{im: im, srv: srv, log: log, room: room / prefetchShare, begin: time.Now()}
	auto := spec.Prefetch == api.PrefetchAuto
	hot := profile != nil && (auto || spec.Prefetch == api.PrefetchProfile)
	if hot && !p.bring(ctx, "profile", profile) {
		return
	}
	// Without a profile nobody knows what of a source far away the guest wants first: it asks.
	p.patient = auto && (hot || !im.Local())
	if auto || spec.Prefetch == api.PrefetchOverlay {
		p.bring(ctx, "overlays", nil)
	}
}

// pusher pushes pages into the page cache of a mount.
type pusher struct {
	im      *overlay.Image
	srv     *fusefs.Server
	log     *slog.Logger
	room    int64 // bytes that may still be pushed
	begin   time.Time
	patient bool // waits for the guest to be at rest
}

// bring pushes the pages of profile, or without one what the overlays hold of memory, and
// fetches what of them is far away, or without a profile all of the overlays. It reports
// whether it came to the end.
func (p *pusher) bring(ctx context.Context, what string, profile []overlay.Addr) bool {
	if p.await(ctx) != nil {
		return false
	}
	fetched := make(chan error, 1)
	if p.im.Local() {
		fetched <- nil
	} else {
		go func() { fetched <- p.im.Fetch(ctx, profile, overlay.FetchOptions{ProfileOnly: profile != nil}) }()
	}
	begin, pushed := time.Now(), 0
	err := p.im.Prefetch(ctx, profile, func(ctx context.Context, s overlay.Space, b []byte, off int64) error {
		if p.room -= int64(len(b)); p.room < 0 {
			return errFull
		}
		if err := p.await(ctx); err != nil {
			return err
		}
		n, err := p.pushLookedUp(ctx, s, b, off)
		pushed += n
		return err
	})
	err = errors.Join(err, <-fetched)
	p.log.Info("pushed", "what", what, "bytes", pushed, "seconds", time.Since(begin).Seconds(), "ended", err)
	return err == nil
}

// await returns when the guest runs and has asked for nothing for a while.
func (p *pusher) await(ctx context.Context) error {
	for p.patient {
		idle, running := p.srv.Idle()
		wait := p.rest() - idle
		if !running {
			wait = min(startPoll, startMost-time.Since(p.begin))
		}
		if wait <= 0 {
			break
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
		}
	}
	return nil
}

// rest returns how long the guest must have asked for nothing: what comes over a network
// arrives with pauses, and a guest that was held up is silent for up to two seconds before
// what it has sent, or should have got, is sent again.
func (p *pusher) rest() time.Duration {
	if p.im.Local() {
		return restAfter
	}
	return 12 * restAfter
}

// profileOf returns the profile that the store keeps of an image, or the one that its last
// overlay brought, or nil.
func profileOf(spec MountSpec, im *overlay.Image) ([]overlay.Addr, error) {
	kept, err := readProfile(spec.Profile, im)
	if kept != nil {
		return kept, nil
	}
	if n := len(im.Chain()); n > 0 {
		own, oerr := im.Chain()[n-1].Profile()
		return own, errors.Join(err, oerr)
	}
	return nil, err
}

// pushLookedUp pushes once somebody has looked the file up, which whoever starts a mount for
// a VM does at once.
func (p *pusher) pushLookedUp(ctx context.Context, s overlay.Space, b []byte, off int64) (int, error) {
	for begin := time.Now(); ; {
		n, err := p.srv.Push(ctx, s.String(), b, off)
		if !errors.Is(err, fusefs.ErrNotLookedUp) || time.Since(begin) > lookUpMost {
			return n, err
		}
		select {
		case <-ctx.Done():
			return n, context.Cause(ctx)
		case <-time.After(lookUpPoll):
		}
	}
}
