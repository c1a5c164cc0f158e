package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"cloudlet/api"
	"cloudlet/integration/figures"
)

// handoffSample is one handoff: times in seconds, sizes in bytes.
type handoffSample struct {
	Pause     float64            `json:"pause_s"`             // from the guest's stop until it runs at the other cloudlet
	Published float64            `json:"pause_published_s"`   // of it, until the last overlay was published: what the program reports
	Gap       float64            `json:"client_gap_s"`        // the longest silence
	Quiet     float64            `json:"client_gap_before_s"` // the longest of the seconds before
	Total     float64            `json:"total_s"`             // until all is there
	Bytes     int64              `json:"bytes"`               // of the overlays of the rounds
	Carried   int64              `json:"link_bytes"`          // between the cloudlets, headers included
	Rounds    []api.HandoffRound `json:"rounds"`              // the last is of the paused guest
	Split     split              `json:"split"`
	Residue   residue            `json:"residue"` // just before
	Answers   int64              `json:"acknowledged"`
}

func (h handoffSample) String() string {
	return fmt.Sprintf("pause %.3f s (%.3f s until published), client gap %.3f s (%.3f s before), total %.2f s, %.1f MiB in %d rounds, %.1f MiB on the link; "+
		"the residue is %.1f MiB, by zstd -3 %.1f MiB\n          %s",
		h.Pause, h.Published, h.Gap, h.Quiet, h.Total, figures.MiB(h.Bytes), len(h.Rounds), figures.MiB(h.Carried), figures.MiB(h.Residue.Plain), figures.MiB(h.Residue.Zstd), h.Split)
}

// handoff hands a new instance off from a to b, and removes it there.
func (s *session) handoff(ctx context.Context, c condition, seed string) (h handoffSample, err error) {
	in, err := s.a.Run(ctx, s.app)
	if err != nil {
		return h, err
	}
	defer func() { err = errors.Join(err, remove(ctx, s.a, in.ID)) }()
	address := s.a.Address(in)
	token, err := s.token(ctx, address)
	if err != nil {
		return h, err
	}
	if err := s.fill(ctx, address, c, seed); err != nil {
		return h, err
	}
	if in, err = s.a.Client.Instance(ctx, in.ID); err != nil {
		return h, err
	}
	if h.Residue, err = s.residue(ctx, in); err != nil {
		return h, fmt.Errorf("take the residue: %w", err)
	}
	trail, err := s.lab.Follow(s.a, in.ID)
	if err != nil {
		return h, err
	}
	defer trail.Close()
	client, quiet, err := s.work(ctx, trail.Find)
	if err != nil {
		return h, err
	}
	defer client.Stop() // once more, where this ends early
	h.Quiet = quiet.Seconds()
	logs, err := s.logs()
	if err != nil {
		return h, err
	}
	carried, err := s.lab.Carried()
	if err != nil {
		return h, err
	}
	begin := time.Now()
	moved, err := s.a.HandOff(ctx, in.ID, s.b, 0, nil)
	if err != nil {
		return h, err
	}
	defer func() { err = errors.Join(err, remove(ctx, s.b, moved.Instance)) }()
	h.Total = time.Since(begin).Seconds()
	now, err := s.lab.Carried()
	if err != nil {
		return h, err
	}
	if err := client.Await(ctx, time.Now()); err != nil {
		return h, err
	}
	h.Carried, h.Bytes, h.Rounds, h.Published = now-carried, moved.Bytes, moved.Rounds, moved.Pause
	gap := client.Gap(begin, time.Now())
	h.Gap = gap.Length().Seconds()
	if h.Split, err = logs.split(moved, gap); err != nil {
		return h, err
	}
	h.Pause = h.Split.Runs
	if address, err = trail.Find(ctx); err != nil {
		return h, err
	}
	h.Answers, err = s.verify(ctx, client, address, token)
	return h, err
}
