package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"
	"cloudlet/api/service"
	"cloudlet/integration/figures"
)

// pairsResult compares a synthesis through the API with the same call in this process. The
// clock runs from the call until the operation is done, its probe answered.
type pairsResult struct {
	API       float64   `json:"api_s"`        // median
	InProcess float64   `json:"in_process_s"` // median
	More      float64   `json:"more_s"`       // median of the pairs' differences
	AllAPI    []float64 `json:"all_api_s"`
	AllInside []float64 `json:"all_in_process_s"`
	// Beside is the median time outside of the operation's own span: what QEMU and the guest
	// do, the largest and least steady part, is not in it.
	BesideAPI    float64 `json:"beside_api_s"`
	BesideInside float64 `json:"beside_in_process_s"`
	// Steps are the time lines, both ways: medians in seconds since the request was accepted.
	Steps []step `json:"steps"`
}

// step is an event of both time lines.
type step struct {
	Name   string  `json:"name"`
	API    float64 `json:"api_s"`
	Inside float64 `json:"in_process_s"`
}

// compare measures both ways in turn over one store, each first in every second pair.
func (b *bench) compare(ctx context.Context, d *daemon) (err error) {
	s, err := b.open(ctx, b.path("state"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close(ctx)) }()
	r := &pairsResult{}
	b.say("%d pairs of a synthesis through the API and one in process", b.pairs)
	var more []float64
	var beside [2][]float64
	var lines [2][][]api.Event
	for pair := -1; pair < b.pairs; pair++ { // the first is not counted
		var took [2]float64
		for i := range took {
			way := (i + pair + 1) % 2
			seconds, op, in, err := b.synthesise(ctx, d, s, way == 0)
			if err != nil {
				return err
			}
			took[way] = seconds
			if pair >= 0 {
				beside[way] = append(beside[way], seconds-op.Ended.Sub(op.Created).Seconds())
				lines[way] = append(lines[way], in.Timeline)
			}
		}
		if pair >= 0 {
			r.AllAPI, r.AllInside = append(r.AllAPI, took[0]), append(r.AllInside, took[1])
			more = append(more, took[0]-took[1])
		}
	}
	r.API, r.InProcess, r.More = figures.Median(r.AllAPI), figures.Median(r.AllInside), figures.Median(more)
	r.BesideAPI, r.BesideInside = figures.Median(beside[0]), figures.Median(beside[1])
	r.Steps = steps(lines)
	b.r.Pairs = r
	return nil
}

// synthesise makes an instance by the daemon or by s, and removes it the same way.
func (b *bench) synthesise(ctx context.Context, d *daemon, s *service.Service, remote bool) (seconds float64, op api.Operation, in api.Instance, err error) {
	begun := time.Now()
	if remote {
		if op, err = d.client.Run(ctx, b.launch); err == nil {
			op, err = d.client.Wait(ctx, op, nil)
		}
	} else {
		op, err = s.Submit(ctx, service.Caller{Name: "bench", Local: true}, b.launch)
		for err == nil && ctx.Err() == nil && !op.State.Ended() {
			op, err = s.WaitOperation(ctx, op.ID, op.Version)
		}
	}
	seconds = time.Since(begun).Seconds()
	if err = errors.Join(err, context.Cause(ctx)); err != nil {
		return seconds, op, in, err
	}
	in, err = client.Result[api.Instance](op)
	if err != nil {
		return seconds, op, in, err
	}
	if n := len(in.Timeline); n == 0 || in.Timeline[n-1].Name != "first answer" {
		err = fmt.Errorf("instance %s is said to be there, its probe has not answered: %v", in.ID, in.Timeline)
	}
	if remote {
		return seconds, op, in, errors.Join(err, d.client.DeleteInstance(ctx, in.ID, true))
	}
	return seconds, op, in, errors.Join(err, s.Delete(ctx, in.ID, true))
}

// steps returns the medians of time lines, which all have the same events.
func steps(lines [2][][]api.Event) (out []step) {
	for i, e := range lines[0][0] {
		var at [2][]float64
		for way, list := range lines {
			for _, line := range list {
				if i < len(line) && line[i].Name == e.Name {
					at[way] = append(at[way], line[i].Seconds)
				}
			}
		}
		if len(at[1]) > 0 {
			out = append(out, step{e.Name, figures.Median(at[0]), figures.Median(at[1])})
		}
	}
	return out
}
