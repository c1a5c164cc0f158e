package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"strings"

	"github.com/google/pprof/profile"

	"cloudlet/overlay"
)

// hot is where the processor time of a job went.
type hot struct {
	Job       string     `json:"job"`
	Seconds   float64    `json:"s"`
	Functions []function `json:"functions"` // the most expensive ones, descending
}

// function is what a function itself took, without those that it calls.
type function struct {
	Name  string  `json:"name"`
	Share float64 `json:"share"`
}

// profiled runs work, and where there is a path, under the CPU profiler; the profile goes there.
func profiled(path string, work func() error) (err error) {
	if path == "" {
		return work()
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := pprof.StartCPUProfile(f); err != nil {
		return err
	}
	defer pprof.StopCPUProfile()
	return work()
}

// profile measures where the time of the standard strategy goes, apart from the rounds. The
// profiles themselves stay beside the other results.
func (g *guest) profile(ctx context.Context, id overlay.Hash) (list []hot, err error) {
	defer func() {
		if e := os.Remove(g.made()); !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}()
	path := func(job string) string {
		return filepath.Join(g.dir, job+".pprof")
	}
	q := g.creation(variant{Strategy: standard})
	q.Profile = path("create")
	if _, err := q.make(ctx, id); err != nil {
		return nil, err
	}
	q = request{Base: g.base, Overlay: g.made(), Profile: path("decode")}
	if _, err := q.ask(ctx); err != nil {
		return nil, err
	}
	for _, job := range []string{"create", "decode"} {
		h, err := readProfile(path(job))
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", path(job), err)
		}
		h.Job = job
		list = append(list, h)
	}
	return list, nil
}

// most is how many functions are told.
const most = 8

// readProfile sums a CPU profile up by function.
func readProfile(path string) (h hot, err error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return h, err
	}
	p, err := profile.Parse(bytes.NewReader(b))
	if err != nil {
		return h, err
	}
	total, each := int64(0), map[string]int64{}
	for _, s := range p.Sample {
		at := len(s.Value) - 1 // nanoseconds
		total += s.Value[at]
		if len(s.Location) > 0 && len(s.Location[0].Line) > 0 {
			each[s.Location[0].Line[0].Function.Name] += s.Value[at]
		}
	}
	h.Seconds = float64(total) / 1e9
	for name, n := range each {
		h.Functions = append(h.Functions, function{name[strings.LastIndexByte(name, '/')+1:], float64(n) / float64(total)})
	}
	slices.SortFunc(h.Functions, func(a, b function) int {
		return cmp.Or(cmp.Compare(b.Share, a.Share), cmp.Compare(a.Name, b.Name))
	})
	h.Functions = h.Functions[:min(most, len(h.Functions))]
	return h, nil
}

// document writes the job's line.
func (h *hot) document(out io.Writer) {
	fmt.Fprintf(out, "- %s, %.1f s:", h.Job, h.Seconds)
	for i, f := range h.Functions {
		if i > 0 {
			fmt.Fprint(out, ",")
		}
		fmt.Fprintf(out, " `%s` %.0f %%", f.Name, 100*f.Share)
	}
	fmt.Fprintln(out)
}
