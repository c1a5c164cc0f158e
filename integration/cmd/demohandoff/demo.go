package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"cloudlet/api"
	"cloudlet/integration/appclient"
	"cloudlet/integration/cloudlets"
	"cloudlet/integration/figures"
)

const (
	// settle is how long the client works before a handoff: its usual silences.
	settle = 2 * time.Second
	// answerBound is how long the application may take to answer after a handoff.
	answerBound = 2 * time.Minute
	// rest is the client's between an answer and its next request.
	rest = 2 * time.Millisecond
)

// demo is one run of the demonstration.
type demo struct {
	options                      cloudlets.Options
	out                          string
	fill, churn, workers, rounds int

	lab    *cloudlets.Lab
	client *appclient.Client
	trail  *cloudlets.Trail
	token  string // of the application
	r      results
}

func (d *demo) run(ctx context.Context) (err error) {
	if d.out, err = filepath.Abs(d.out); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(d.out), 0o755); err != nil {
		return err
	}
	host, err := figures.Host()
	if err != nil {
		return err
	}
	d.options.Count, d.options.Log = 3, os.Stdout
	if d.lab, err = cloudlets.Open(ctx, d.options); err != nil {
		return err
	}
	defer func() {
		if err != nil && !errors.Is(err, figures.ErrMissed) {
			d.r.Failure = err.Error()
			err = errors.Join(err, figures.WriteJSON(d.out, d.r))
		}
		err = errors.Join(err, d.lab.Close(context.WithoutCancel(ctx)))
	}()
	d.r = results{Network: d.options.Network.Name, Fill: d.fill, Churn: d.churn, Clients: d.workers, Host: host}
	if err := d.begin(ctx); err != nil {
		return err
	}
	defer d.trail.Close()
	defer d.client.Stop() // once more, where this ends early
	a, b, c := d.lab.Cloudlets[0], d.lab.Cloudlets[1], d.lab.Cloudlets[2]
	for i, to := range []*cloudlets.Cloudlet{b, a, c} {
		if err := d.hop(ctx, i, to); err != nil {
			return err
		}
	}
	if err := d.verify(ctx); err != nil {
		return err
	}
	if err := d.afterwards(ctx); err != nil {
		return err
	}
	return d.report()
}

// begin makes the application's overlay at the first cloudlet, runs it there and lets the
// client begin.
func (d *demo) begin(ctx context.Context) error {
	a := d.lab.Cloudlets[0]
	d.lab.Say("cloudlet %s: the application's overlay", a.Name)
	app, err := d.lab.Application(ctx, a, func(address string) error {
		return d.ask(ctx, address, "/write?mib=4&seed=app", "/append?client=launch&n=1")
	})
	if err != nil {
		return err
	}
	in, err := a.Run(ctx, app)
	if err != nil {
		return err
	}
	var first struct{ Token string }
	if err := d.lab.Ask(ctx, &first, http.MethodGet, a.Address(in), "/"); err != nil {
		return err
	}
	d.token = first.Token
	d.lab.Say("cloudlet %s: instance %s answers at %s; the client begins", a.Name, in.ID, a.Address(in))
	if d.trail, err = d.lab.Follow(a, in.ID); err != nil {
		return err
	}
	d.client, err = appclient.Start(ctx, appclient.Config{Name: "c", Workers: d.workers, Find: d.trail.Find, Dial: d.lab.Dial, Rest: rest})
	return err
}

func (d *demo) ask(ctx context.Context, address string, paths ...string) error {
	for _, path := range paths {
		if err := d.lab.Ask(ctx, nil, http.MethodPost, address, path); err != nil {
			return err
		}
	}
	return nil
}

// hop moves the application to another cloudlet.
func (d *demo) hop(ctx context.Context, i int, to *cloudlets.Cloudlet) error {
	from, id := d.trail.Where()
	address, err := d.trail.Find(ctx)
	if err != nil {
		return err
	}
	if d.fill > 0 {
		d.lab.Say("%d MiB of new application data", d.fill)
		if err := d.ask(ctx, address, fmt.Sprintf("/fill?mib=%d&seed=hop%d", d.fill, i), fmt.Sprintf("/churn?kib_per_s=%d", d.churn)); err != nil {
			return err
		}
	}
	quiet := time.Now()
	select {
	case <-time.After(settle):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	h := hop{From: from.Name, To: to.Name, Quiet: d.client.Gap(quiet, time.Now()).Length().Seconds()}
	d.lab.Say("handoff from %s to %s", from.Name, to.Name)
	carried, err := d.lab.Carried()
	if err != nil {
		return err
	}
	begin := time.Now()
	phase := ""
	moved, err := from.HandOff(ctx, id, to, d.rounds, func(op api.Operation) {
		if op.Phase != phase {
			phase = op.Phase
			h.Phases = append(h.Phases, api.Event{Name: phase, Seconds: time.Since(begin).Seconds()})
		}
	})
	if err != nil {
		return err
	}
	h.Took = time.Since(begin).Seconds()
	now, err := d.lab.Carried()
	if err != nil {
		return err
	}
	h.Carried = now - carried
	bound, cancel := context.WithTimeout(ctx, answerBound)
	defer cancel()
	if err := d.client.Await(bound, time.Now()); err != nil {
		return err
	}
	gap := d.client.Gap(begin, time.Now())
	h.Gap, h.Silent, h.Found, h.Answered = gap.Length().Seconds(), gap.Begin.Sub(begin).Seconds(), gap.Found.Sub(begin).Seconds(), gap.End.Sub(begin).Seconds()
	h.Pause, h.Bytes, h.Rounds = moved.Pause, moved.Bytes, moved.Rounds
	d.r.Hops = append(d.r.Hops, h)
	fmt.Print(h)
	if at, there := d.trail.Where(); at != to || there != moved.Instance {
		return fmt.Errorf("the client is led to instance %s of %s, the handoff went to %s of %s", there, at.Name, moved.Instance, to.Name)
	}
	if address, err = d.trail.Find(ctx); err != nil {
		return err
	}
	if _, err := d.lab.Verify(ctx, address, d.token); err != nil {
		return err
	}
	return d.client.Err()
}

// verify ends the client and compares all that was acknowledged with what is there.
func (d *demo) verify(ctx context.Context) error {
	address, err := d.trail.Find(ctx)
	if err != nil {
		return err
	}
	d.client.Stop()
	err = d.client.Verify(ctx, address)
	d.r.Client = d.client.Report()
	if err != nil {
		return err
	}
	d.lab.Say("%d acknowledged appends are all there, in memory and in the file; %d requests were repeated", d.r.Client.Acknowledged, d.r.Client.Repeated)
	return nil
}

// afterwards captures, resets and deletes the instance: it is one like any other.
func (d *demo) afterwards(ctx context.Context) error {
	c, id := d.trail.Where()
	address, err := d.trail.Find(ctx)
	if err != nil {
		return err
	}
	d.lab.Say("cloudlet %s: capture the instance, reset its guest, run the capture, delete both", c.Name)
	var o api.CreatedOverlay
	if err := c.CLI(ctx, &o, "overlay", "create", id, "--name", "after"); err != nil {
		return err
	}
	again, err := c.Run(ctx, o.ID)
	if err != nil {
		return err
	}
	if _, err := d.lab.Verify(ctx, c.Address(again), d.token); err != nil {
		return fmt.Errorf("an instance of the capture: %w", err)
	}
	if err := d.client.Verify(ctx, c.Address(again)); err != nil {
		return fmt.Errorf("an instance of the capture: %w", err)
	}
	if _, err := c.Client.Act(ctx, id, api.ActionReset); err != nil {
		return err
	}
	if err := d.awaitReset(ctx, address); err != nil {
		return err
	}
	if err := d.client.Verify(ctx, address); err != nil {
		return fmt.Errorf("after a reset of the guest: %w", err)
	}
	for _, id := range []string{again.ID, id} {
		if err := c.Client.DeleteInstance(ctx, id, true); err != nil {
			return err
		}
	}
	d.r.Captured, d.r.Reset, d.r.Deleted = true, true, true
	return nil
}

// awaitReset waits until another application answers: the guest has booted again.
func (d *demo) awaitReset(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, answerBound)
	defer cancel()
	for {
		try, cancelTry := context.WithTimeout(ctx, 2*time.Second)
		var a struct{ Token string }
		err := d.lab.Ask(try, &a, http.MethodGet, address, "/")
		cancelTry()
		if err == nil && a.Token != d.token {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("the guest does not boot after a reset: %w (token %s)", errors.Join(context.Cause(ctx), err), a.Token)
		}
	}
}
