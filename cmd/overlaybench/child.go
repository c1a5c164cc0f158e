package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"cloudlet/overlay"
	"cloudlet/overlay/source"
)

// childArgument makes the program a child of itself: each measurement has a process of its
// own, so that its memory is its own.
const childArgument = "-measure"

// request is what a child is asked, on its stdin.
type request struct {
	Create    bool            `json:"create"` // else decode
	Base      string          `json:"base"`
	Overlay   string          `json:"overlay"`
	Memory    string          `json:"memory,omitempty"` // files with the overlay's pages, see guest.writeModified
	Disk      string          `json:"disk,omitempty"`
	Out       string          `json:"out,omitempty"`
	Strategy  string          `json:"strategy,omitempty"`
	ByAddress bool            `json:"by_address,omitempty"`
	Without   overlay.Classes `json:"without"`
	Profile   string          `json:"profile,omitempty"` // file for a CPU profile
}

// response is what it answers, on its stdout.
type response struct {
	Cost     cost              `json:"cost"`
	Peak     int64             `json:"peak_bytes"`
	ID       overlay.Hash      `json:"id"`
	Size     int64             `json:"size"`
	Manifest *overlay.Manifest `json:"manifest"`
	Pages    int64             `json:"page_bytes"` // decoded
	First    cost              `json:"first"`      // decoding with nothing known of the base yet
	Open     []float64         `json:"open_s"`
}

func childMain(ctx context.Context, in io.Reader, out io.Writer) int {
	var q request
	err := json.NewDecoder(in).Decode(&q)
	if err == nil {
		var r *response
		if r, err = q.do(ctx); err == nil {
			err = json.NewEncoder(out).Encode(r)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func (q *request) do(ctx context.Context) (*response, error) {
	if q.Create {
		return q.create(ctx)
	}
	return q.decode(ctx)
}

// ask runs a child.
func (q *request) ask(ctx context.Context) (*response, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(q)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, childArgument)
	cmd.Stdin = bytes.NewReader(b)
	cmd.Stderr = new(strings.Builder)
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("measure %s: %w: %.300s", q.Strategy, err, strings.TrimSpace(cmd.Stderr.(*strings.Builder).String()))
	}
	r := new(response)
	return r, json.Unmarshal(out, r)
}

// create makes the overlay anew, of its modified pages in files.
func (q *request) create(ctx context.Context) (_ *response, err error) {
	s, err := overlay.ParseStrategy(q.Strategy)
	if err != nil {
		return nil, err
	}
	im, err := openImage(ctx, q.Base, q.Overlay)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	l := overlay.Launch{Machine: im.reader.Manifest().Machine}
	if l.Parent, err = overlay.NewImage(im.Base(), nil, overlay.ImageOptions{}); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.Parent.Close()) }()
	if l.State, err = im.State(); err != nil {
		return nil, err
	}
	if !q.ByAddress {
		if l.Profile, err = im.reader.Profile(); err != nil {
			return nil, err
		}
	}
	for _, part := range []struct {
		space overlay.Space
		path  string
		into  *overlay.Changes
	}{{overlay.Memory, q.Memory, &l.Memory}, {overlay.Disk, q.Disk, &l.Disk}} {
		f, err := os.Open(part.path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		*part.into = overlay.Changes{Extents: im.Changes(ctx, part.space).Extents, Read: func(p []byte, off int64) error {
			_, err := f.ReadAt(p, off)
			return err
		}}
	}
	before, start := cpuTime(), time.Now()
	var made *overlay.Created
	if err := profiled(q.Profile, func() (err error) {
		made, err = overlay.Create(ctx, q.Out, l, overlay.CreateOptions{Strategy: s, Without: q.Without})
		return err
	}); err != nil {
		return nil, err
	}
	r := &response{Cost: cost{time.Since(start).Seconds(), cpuTime() - before}, ID: made.ID, Size: made.Size, Manifest: made.Manifest}
	r.Peak, err = peakMemory()
	return r, err
}

const opens = 9

func (q *request) decode(ctx context.Context) (_ *response, err error) {
	runtime.GOMAXPROCS(1)
	r := new(response)
	for range opens {
		src, err := source.OpenFile(q.Overlay)
		if err != nil {
			return nil, err
		}
		start := time.Now()
		o, err := overlay.Open(ctx, src)
		if err != nil {
			return nil, err
		}
		r.Open = append(r.Open, time.Since(start).Seconds())
		if err := o.Close(); err != nil {
			return nil, err
		}
	}
	im, err := openImage(ctx, q.Base, q.Overlay)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	for _, into := range []*cost{&r.First, &r.Cost} {
		before, start := cpuTime(), time.Now()
		if r.Pages, err = im.DecodeFrames(ctx); err != nil {
			return nil, err
		}
		*into = cost{time.Since(start).Seconds(), cpuTime() - before}
	}
	if q.Profile != "" {
		const enough = 10 // for samples of 10 ms
		if err := profiled(q.Profile, func() error {
			for range enough {
				if _, err := im.DecodeFrames(ctx); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			return nil, err
		}
	}
	r.Peak, err = peakMemory()
	return r, err
}

// cpuTime returns the seconds of processor time of this process and of the programs it ran.
func cpuTime() (s float64) {
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if err := syscall.Getrusage(who, &u); err != nil {
			panic(err) // its arguments are right
		}
		s += time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
	}
	return s
}

// peakMemory returns the most memory that this process had resident. A rusage would count
// what the parent had at the fork.
func peakMemory() (int64, error) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, after, _ := strings.Cut(string(b), "VmHWM:")
	text, _, ok := strings.Cut(after, "kB")
	if !ok {
		return 0, errors.New("/proc/self/status does not tell VmHWM")
	}
	n, err := strconv.ParseInt(strings.TrimSpace(text), 10, 64)
	return n << 10, err
}
