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
)

// errFull ends a prefetch that has filled its share of the host's memory.
var errFull = errors.New("the host's memory is better kept for others")

// prefetch pushes what the guest is likely to touch into the page cache of a mount, until all
// is there or ctx ends: the pages of the touch profile, or without one what overlays on this
// host hold. A guest runs without it, only slower, so a failure is only logged.
func prefetch(ctx context.Context, spec MountSpec, im *overlay.Image, srv *fusefs.Server, log *slog.Logger) {
	begin, pushed := time.Now(), int64(0)
	profile, err := profileOf(spec, im)
	if err != nil {
		log.Warn("the touch profile cannot be used", "err", err)
	}
	switch {
	case spec.Prefetch == api.PrefetchNone, spec.Prefetch == api.PrefetchProfile && profile == nil:
		return
	case spec.Prefetch == api.PrefetchOverlay:
		profile = nil
	case profile == nil && !im.Local():
		return // what is far away is fetched when it is asked for
	}
	room, err := procNumber("/proc/meminfo", "MemAvailable:")
	if err == nil {
		room /= prefetchShare
		err = im.Prefetch(ctx, profile, func(ctx context.Context, s overlay.Space, p []byte, off int64) error {
			if pushed+int64(len(p)) > room {
				return errFull
			}
			n, err := pushLookedUp(ctx, srv, s, p, off)
			pushed += int64(n)
			return err
		})
	}
	log.Info("prefetched", "profile", len(profile), "bytes", pushed, "seconds", time.Since(begin).Seconds(), "ended", err)
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
func pushLookedUp(ctx context.Context, srv *fusefs.Server, s overlay.Space, p []byte, off int64) (int, error) {
	for begin := time.Now(); ; {
		n, err := srv.Push(ctx, s.String(), p, off)
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
