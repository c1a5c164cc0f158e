package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"cloudlet/integration/cloudlets"
	"cloudlet/integration/figures"
	"cloudlet/vmm"
)

const (
	// settle is how long the client works before a measurement: its usual silences.
	settle = 2 * time.Second
	// rest is the client's between an answer and its next request.
	rest = 2 * time.Millisecond
)

// errCut is the cause of a measurement that took too long.
var errCut = errors.New("given up")

// bench is one run of the benchmark.
type bench struct {
	options      cloudlets.Options
	out, publish string
	rounds       int
	bound        time.Duration
	r            results
}

func (b *bench) run(ctx context.Context) (err error) {
	for _, p := range []*string{&b.out, &b.options.Dir} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	if b.publish != "" {
		if err := figures.HasTable(figures.Readme(b.publish), tableName); err != nil {
			return err
		}
	}
	for _, program := range []string{"zstd", "qemu-img", "fusermount3"} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("there is no program %s: run make deps", program)
		}
	}
	if err := os.MkdirAll(filepath.Dir(b.out), 0o755); err != nil {
		return err
	}
	b.options.Count, b.options.Log = 2, os.Stdout
	if err := b.describe(ctx); err != nil {
		return err
	}
	for _, link := range []string{fast, slow} {
		if err := b.link(ctx, link); err != nil {
			b.r.Failure = err.Error()
			return errors.Join(err, figures.WriteJSON(b.out, &b.r))
		}
	}
	return b.report()
}

// describe says what is measured on.
func (b *bench) describe(ctx context.Context) error {
	q := &vmm.QEMU{Launcher: []string{b.options.Program, "launcher"}}
	h, err := q.Probe(ctx)
	if err != nil {
		return err
	}
	host, err := figures.Host()
	if err != nil {
		return err
	}
	b.r.Host = fmt.Sprintf("%s, QEMU %s", host, h.QEMU)
	b.r.Rounds, b.r.Bound, b.r.Memory = b.rounds, b.bound.Seconds(), b.options.MemoryMiB
	return nil
}

// link measures the cells of a link, every one once in each round, so that a busy moment of
// the host hits all.
func (b *bench) link(ctx context.Context, link string) (err error) {
	var cells []*cell
	for _, c := range b.r.Cells {
		if c.Link == link {
			cells = append(cells, c)
		}
	}
	if len(cells) == 0 {
		return nil
	}
	var s *session
	defer func() {
		if s != nil {
			err = errors.Join(err, s.close(context.WithoutCancel(ctx)))
		}
	}()
	for round := range b.rounds {
		for _, c := range cells {
			if s == nil {
				if s, err = b.open(ctx, link); err != nil {
					return err
				}
			}
			s.lab.Say("round %d of %d: %s", round+1, b.rounds, c.text())
			if err := b.cell(ctx, s, c, round); errors.Is(err, errCut) {
				// What is under way is ended with all else.
				err = s.close(context.WithoutCancel(ctx))
				s = nil
				if err != nil {
					return err
				}
			} else if err != nil {
				return fmt.Errorf("cell %s, round %d: %w", c.Name, round+1, err)
			}
		}
	}
	return nil
}

// cell measures a cell once: ours, then QEMU's way. It returns errCut where one of them took
// longer than the bound.
func (b *bench) cell(ctx context.Context, s *session, c *cell, round int) error {
	seed := fmt.Sprintf("%sr%d", strings.ReplaceAll(c.Name, "-", ""), round)
	if !c.HandoffCut {
		h, err := within(ctx, b.bound, func(ctx context.Context) (handoffSample, error) { return s.handoff(ctx, c.condition, seed) })
		if errors.Is(err, errCut) {
			c.HandoffCut = true
			s.lab.Say("  handoff: > %v", b.bound)
		}
		if err != nil {
			return err
		}
		c.Handoffs = append(c.Handoffs, h)
		s.lab.Say("  handoff: %s", h)
	}
	if c.QEMUCut {
		return nil
	}
	q, err := within(ctx, b.bound, func(ctx context.Context) (qemuSample, error) { return s.migration(ctx, c.condition, seed) })
	if errors.Is(err, errCut) {
		c.QEMUCut = true
		s.lab.Say("  QEMU's stop and copy: > %v", b.bound)
	}
	if err != nil {
		return err
	}
	c.QEMU = append(c.QEMU, q)
	s.lab.Say("  QEMU's stop and copy: %s", q)
	return nil
}

// within runs f for a time at most; beyond that its error wraps errCut.
func within[T any](ctx context.Context, d time.Duration, f func(context.Context) (T, error)) (T, error) {
	bctx, cancel := context.WithTimeoutCause(ctx, d, errCut)
	defer cancel()
	v, err := f(bctx)
	if err != nil && context.Cause(bctx) == errCut {
		err = fmt.Errorf("%w after %v: %w", errCut, d, err)
	}
	return v, err
}
