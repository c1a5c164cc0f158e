package main

import (
	"bytes"
	"compress/flate"
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"cloudlet/integration/figures"
	"cloudlet/overlay"
)

// results are the figures of a run.
type results struct {
	Host   string         `json:"host"`
	Rounds int            `json:"rounds"`
	Guests []*guestResult `json:"guests"`
}

// guestResult are the figures of a guest.
type guestResult struct {
	Name   string        `json:"name"`
	ID     overlay.Hash  `json:"overlay"`
	Stats  overlay.Stats `json:"stats"` // of balanced: what the classes hold
	State  int64         `json:"state_bytes"`
	Touch  int64         `json:"profile_pages"`
	Noise  int64         `json:"noise_bytes"` // see noise
	Rows   []*row        `json:"strategies"`
	Rivals []rivalResult `json:"rivals,omitempty"`
	Hot    []hot         `json:"cpu_profiles,omitempty"` // of balanced

	Responses *responses `json:"first_responses,omitempty"`
}

// row are the figures of a variant.
type row struct {
	variant
	Bytes   int64     `json:"bytes"`  // of frames and index: without device state and profile
	File    int64     `json:"file"`   // of the whole overlay
	Index   int64     `json:"index"`  // of the index alone
	Stored  int64     `json:"stored"` // bytes of the pages in frames
	Saved   saved     `json:"saved"`
	Create  []cost    `json:"create"`
	Peak    int64     `json:"create_peak_bytes"`
	Decode  []cost    `json:"decode"`
	First   []cost    `json:"decode_first"` // pages of the base are hashed, too
	Open    []float64 `json:"open_s"`
	Encoder string    `json:"encoder"`
	change  int64     // bytes of modified pages
}

// saved is how many bytes each step makes the modified pages smaller by, in this order.
type saved struct {
	Zero   int64 `json:"zero"`
	Base   int64 `json:"base"`
	Parent int64 `json:"parent"`
	Self   int64 `json:"self"`
	Codec  int64 `json:"codec"`
	Delta  int64 `json:"delta"` // on top of the codec; where it is a loss it is negative
	// Together: Codec is what codec and delta save, since a second overlay, without delta, would
	// have taken too long.
	Together bool `json:"together,omitempty"`
}

// delta is Delta for a table, in MiB.
func (s saved) delta() string {
	if s.Together {
		return "-"
	}
	return fmt.Sprintf("%.2f", figures.MiB(s.Delta))
}

// apart is Delta for the CSV, in bytes, and empty where it is not known.
func (s saved) apart() any {
	if s.Together {
		return ""
	}
	return s.Delta
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05 ")+format+"\n", args...)
}

// results measures, or reads what was measured.
func (o *options) results(ctx context.Context) (*results, error) {
	lazy, err := readLazy(o.lazy)
	if err != nil {
		return nil, err
	}
	if o.from != "" {
		r, err := readResults(strings.Split(o.from, ","))
		if err == nil && lazy != nil && !slices.ContainsFunc(r.Guests, lazy.give) {
			err = fmt.Errorf("%s is of overlay %.12s, which none of the guests has", lazy.path, lazy.Overlay)
		}
		return r, err
	}
	if len(o.guests) == 0 {
		return nil, errors.New("name a guest with -guest (make demo and make guests prepare some), or results with -from")
	}
	variants, err := parseVariants(o.strategies)
	if err != nil {
		return nil, err
	}
	var names []string
	if o.rivals != "" {
		names = strings.Split(o.rivals, ",")
	}
	for _, n := range names {
		if !slices.Contains(rivalNames(), n) {
			return nil, fmt.Errorf("unknown rival %q: there are %s", n, strings.Join(rivalNames(), ", "))
		}
	}
	var guests []*guest
	for _, text := range o.guests {
		g, err := parseGuest(text, o.dir)
		if err != nil {
			return nil, err
		}
		guests = append(guests, g)
	}
	host, err := host()
	if err != nil {
		return nil, err
	}
	r := &results{Host: host, Rounds: o.rounds}
	for _, g := range guests {
		res, err := o.measure(ctx, g, variants, names)
		if err != nil {
			return nil, fmt.Errorf("guest %s: %w", g.name, err)
		}
		lazy.give(res)
		r.Guests = append(r.Guests, res)
		if err := figures.WriteJSON(o.json, r); err != nil { // what a later guest's failure does not lose
			return nil, err
		}
	}
	if lazy != nil && !slices.ContainsFunc(r.Guests, lazy.give) {
		say("no first responses: %s is of overlay %.12s, which none of the guests has", lazy.path, lazy.Overlay)
	}
	return r, nil
}

// readResults reads what runs have measured, each of other guests.
func readResults(paths []string) (*results, error) {
	all := new(results)
	var hosts []string
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		var r results
		if err := json.Unmarshal(b, &r); err != nil {
			return nil, fmt.Errorf("read %s: %w", path, err)
		}
		if len(all.Guests) > 0 && r.Rounds != all.Rounds {
			return nil, fmt.Errorf("read %s: it has %d rounds, those before %d", path, r.Rounds, all.Rounds)
		}
		for _, g := range r.Guests {
			if slices.ContainsFunc(all.Guests, func(have *guestResult) bool { return have.Name == g.Name }) {
				return nil, fmt.Errorf("read %s: guest %s is in the results before, too", path, g.Name)
			}
			g.derive()
		}
		all.Guests, all.Rounds = append(all.Guests, r.Guests...), r.Rounds
		if !slices.Contains(hosts, r.Host) {
			hosts = append(hosts, r.Host)
		}
	}
	all.Host = strings.Join(hosts, "; ")
	return all, nil
}

// measure measures a guest, each variant once in a round.
func (o *options) measure(ctx context.Context, g *guest, variants []variant, names []string) (_ *guestResult, err error) {
	id, err := g.prepare(ctx)
	if err != nil {
		return nil, err
	}
	res := &guestResult{Name: g.name, ID: id}
	if res.Rivals, err = g.measureRivals(ctx, names, id); err != nil {
		return nil, err
	}
	if len(variants) > 0 {
		defer func() { err = errors.Join(err, g.removeModified()) }()
		if err := g.writeModified(ctx); err != nil {
			return nil, err
		}
	}
	plain := map[string]int64{}
	for _, v := range variants {
		res.Rows = append(res.Rows, &row{variant: v})
	}
	for round := range o.rounds {
		for _, w := range res.Rows {
			if round > 0 && w.Create[0].Wall > o.patience.Seconds() {
				continue
			}
			if err := w.round(ctx, g, id, plain, o.patience); err != nil {
				return nil, err
			}
			say("%s: round %d: %s", g.name, round+1, w)
		}
	}
	if res.find(standard) != nil {
		if res.Hot, err = g.profile(ctx, id); err != nil {
			return nil, err
		}
	}
	im, err := g.image(ctx, g.plain())
	if err != nil {
		return nil, err
	}
	if res.Noise, err = noise(ctx, im.Image); err != nil {
		return nil, errors.Join(err, im.Close())
	}
	m := im.reader.Manifest()
	res.Stats, res.State, res.Touch = m.Stats, m.Members.State.Size, m.Members.Profile.Decoded/4
	res.derive()
	return res, im.Close()
}

// noise counts the bytes of the stored pages that DEFLATE makes no smaller, neither as they are
// nor as differences to the base's.
func noise(ctx context.Context, im *overlay.Image) (n int64, err error) {
	var small bytes.Buffer
	w, err := flate.NewWriter(&small, flate.BestSpeed)
	if err != nil {
		return 0, err
	}
	shrinks := func(p []byte) (bool, error) {
		small.Reset()
		w.Reset(&small)
		_, err := w.Write(p)
		err = errors.Join(err, w.Close())
		return small.Len() < len(p), err
	}
	diff := make([]byte, overlay.PageSize)
	err = im.StoredPages(ctx, func(_ overlay.Addr, page, base []byte) error {
		subtle.XORBytes(diff, page, base)
		for _, p := range [][]byte{page, diff} {
			if yes, err := shrinks(p); yes || err != nil {
				return err
			}
		}
		n += int64(len(page))
		return nil
	})
	return n, err
}

// derive sets what follows from the rest.
func (g *guestResult) derive() {
	for _, w := range g.Rows {
		w.change = (g.Stats.Memory.Modified + g.Stats.Disk.Modified) * overlay.PageSize
	}
}

func (w *row) String() string {
	last := len(w.Create) - 1
	return fmt.Sprintf("%s (%s): %.2f MiB, created in %.1f s, decoded at %.0f MB/s", w.Label, w.Factor, figures.MiB(w.Bytes), w.Create[last].Wall, float64(w.Stored)/1e6/w.Decode[last].CPU)
}

// round creates and decodes the overlay once. The first time it also finds out what the delta
// saves, from plain or by an overlay without, unless this one took longer than patience.
func (w *row) round(ctx context.Context, g *guest, id overlay.Hash, plain map[string]int64, patience time.Duration) (err error) {
	made, err := g.create(ctx, w.variant, id)
	if err != nil {
		return err
	}
	q := request{Base: g.base, Overlay: g.made()}
	decoded, err := q.ask(ctx)
	if err := errors.Join(err, os.Remove(g.made())); err != nil {
		return err
	}
	w.fill(made)
	w.Create, w.Peak = append(w.Create, made.Cost), max(w.Peak, made.Peak)
	w.Decode, w.First, w.Open = append(w.Decode, decoded.Cost), append(w.First, decoded.First), append(w.Open, decoded.Open...)
	if len(w.Create) > 1 {
		return nil
	}
	w.Saved.Codec = w.Stored - made.Manifest.Members.Frames.Size
	v, ok := w.plain()
	if !ok {
		plain[w.key()] = made.Manifest.Members.Frames.Size
		return nil
	}
	n, ok := plain[v.key()]
	if !ok && made.Cost.Wall > patience.Seconds() {
		w.Saved.Together = true
		return nil
	}
	if !ok {
		without, err := g.create(ctx, v, id)
		if err := errors.Join(err, os.Remove(g.made())); err != nil {
			return err
		}
		n = without.Manifest.Members.Frames.Size
		plain[v.key()] = n
	}
	w.Saved.Codec, w.Saved.Delta = w.Stored-n, n-made.Manifest.Members.Frames.Size
	return nil
}

// fill takes what is the same in every round.
func (w *row) fill(r *response) {
	m := r.Manifest
	w.Bytes, w.File, w.Index, w.Encoder = m.Members.Frames.Size+m.Members.Index.Size, r.Size, m.Members.Index.Size, m.Strategy.Encoder
	w.Saved = saved{Codec: w.Saved.Codec, Delta: w.Saved.Delta, Together: w.Saved.Together}
	w.Stored = 0
	for _, p := range []overlay.PageStats{m.Stats.Memory, m.Stats.Disk} {
		w.Saved.Zero += p.Zero * overlay.PageSize
		w.Saved.Base += p.Base * overlay.PageSize
		w.Saved.Parent += p.Parent * overlay.PageSize
		w.Saved.Self += p.Self * overlay.PageSize
		w.Stored += p.Stored * overlay.PageSize
	}
}

// made is the overlay under measurement.
func (g *guest) made() string { return filepath.Join(g.dir, "made.overlay") }

func (g *guest) create(ctx context.Context, v variant, id overlay.Hash) (*response, error) {
	q := g.creation(v)
	return q.make(ctx, id)
}

// creation asks for the overlay under measurement.
func (g *guest) creation(v variant) request {
	return request{
		Create: true, Base: g.base, Overlay: g.plain(), Memory: g.modifiedFile(overlay.Memory), Disk: g.modifiedFile(overlay.Disk),
		Out: g.made(), Strategy: v.Strategy, ByAddress: v.ByAddress, Without: v.Without,
	}
}

// make makes an overlay, which must have the id.
func (q *request) make(ctx context.Context, id overlay.Hash) (*response, error) {
	r, err := q.ask(ctx)
	if err == nil && r.ID != id {
		err = fmt.Errorf("strategy %s made overlay %.12s of %.12s", q.Strategy, r.ID, id)
	}
	return r, err
}

// host says what the figures were measured on.
func host() (string, error) {
	text, err := figures.Machine()
	if err != nil {
		return "", err
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "", err
	}
	one, _, _ := strings.Cut(string(load), " ")
	return text + ", load " + one + " at the start", nil
}
