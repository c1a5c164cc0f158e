package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"cloudlet/api"
	"cloudlet/api/service"
	"cloudlet/integration/figures"
)

// The targets.
const (
	aboveFloor   = 0.4 // seconds, for the first instance of an overlay without a profile
	aboveProfile = 0.1 // seconds, by its profile
	eagerLocal   = 8.0 // times sooner than eager, on this host
	eagerSlow    = 4.0 // the same over the slow link
	shareSlow    = 0.2 // of the overlay fetched before the first response
	secondReads  = 1.0 // MiB
	mountMost    = 128 // MiB of the mount's memory, beside its index
)

// results are the figures of a run.
type results struct {
	Host         string   `json:"host"`
	Overlay      string   `json:"overlay,omitempty"` // its id
	Rounds       int      `json:"rounds"`
	Strategies   []string `json:"strategies,omitempty"` // beside that of the demo
	Bound        float64  `json:"given_up_after_s"`
	OverlayBytes int64    `json:"overlay_bytes"` // packed by its profile
	PlainBytes   int64    `json:"overlay_without_profile_bytes"`
	EagerBytes   int64    `json:"eager_bytes"`
	IndexBytes   int64    `json:"index_bytes"` // of the overlay
	Cells        []*cell  `json:"cells"`
	Peer         []peer   `json:"disk_peer,omitempty"`
}

// ways are those that there may be results of.
func (r *results) ways() []way { return append(allWays(), strategyWays(r.Strategies)...) }

// cell is a way over a link.
type cell struct {
	Link    string   `json:"link"`
	Text    string   `json:"link_text,omitempty"`
	Way     string   `json:"way"`
	Samples []sample `json:"samples"`
	Cut     bool     `json:"given_up,omitempty"` // an attempt took longer than the bound, and was the last
}

// sample is one measurement.
type sample struct {
	Seconds float64 `json:"first_response_s"`
	// Bytes came before the first response: over the link with all headers; on this host what
	// the mount read of the overlay; to a second instance what the mount served more.
	Bytes    int64       `json:"bytes_before"`
	Fetched  int64       `json:"overlay_bytes_fetched,omitempty"` // by the mount's own count
	Pushed   int64       `json:"pushed_bytes,omitempty"`
	Served   int64       `json:"served_bytes,omitempty"` // to the kernel, on demand
	Waits    *waits      `json:"demand_waits,omitempty"`
	Complete *float64    `json:"complete_s,omitempty"` // until all frames were here
	Peak     int64       `json:"mount_peak_bytes,omitempty"`
	Timeline []api.Event `json:"timeline,omitempty"`
}

func (s sample) String() string {
	text := fmt.Sprintf("%7.2f s, %5.1f MiB", s.Seconds, figures.MiB(s.Bytes))
	if s.Waits != nil {
		text += ", " + s.Waits.String()
	}
	if s.Complete != nil {
		text += fmt.Sprintf(", complete after %.1f s", *s.Complete)
	}
	return text
}

// waits are the kernel's reads of the image before the first response.
type waits struct {
	Count uint64  `json:"count"`
	Long  uint64  `json:"over_10ms"` // longer than decoding takes
	P50   float64 `json:"p50_s"`     // upper bound of its bucket
	P99   float64 `json:"p99_s"`     // the same
	Sum   float64 `json:"sum_s"`
}

func newWaits(h service.Histogram) *waits {
	w := &waits{Count: h.Count, Long: h.Count, Sum: h.Sum}
	for _, b := range h.Buckets {
		if b.Upper <= 0.01 {
			w.Long = h.Count - b.Count
		}
	}
	w.P50, w.P99 = quantile(h, 0.5), quantile(h, 0.99)
	return w
}

// quantile returns the upper bound of the bucket that a share q of the observations does not
// exceed; beyond the last bucket its bound.
func quantile(h service.Histogram, q float64) float64 {
	if h.Count == 0 {
		return 0
	}
	for _, b := range h.Buckets {
		if float64(b.Count) >= q*float64(h.Count) {
			return b.Upper
		}
	}
	return h.Buckets[len(h.Buckets)-1].Upper
}

func (w *waits) String() string {
	return fmt.Sprintf("%d waits, p50 %s, p99 %s, %d over 10 ms", w.Count, milli(w.P50), milli(w.P99), w.Long)
}

func milli(s float64) string { return fmt.Sprintf("%.4g ms", 1000*s) }

// cell returns the cell of a link and a way, made if missing.
func (r *results) cell(n network, way string) *cell {
	if c := r.find(n.name, way); c != nil {
		return c
	}
	c := &cell{Link: n.name, Text: n.text, Way: way}
	r.Cells = append(r.Cells, c)
	return c
}

// find returns the cell of a link and a way, nil if it was not measured.
func (r *results) find(link, way string) *cell {
	i := slices.IndexFunc(r.Cells, func(c *cell) bool { return c.Link == link && c.Way == way })
	if i < 0 {
		return nil
	}
	return r.Cells[i]
}

func (c *cell) seconds() (v []float64) {
	for _, s := range c.Samples {
		v = append(v, s.Seconds)
	}
	return v
}

func (c *cell) bytes() (v []float64) {
	for _, s := range c.Samples {
		v = append(v, float64(s.Bytes))
	}
	return v
}

// middle returns the sample whose time is the median, or the one above.
func (c *cell) middle() sample {
	s := slices.Clone(c.Samples)
	slices.SortFunc(s, func(a, b sample) int {
		switch {
		case a.Seconds < b.Seconds:
			return -1
		case a.Seconds > b.Seconds:
			return 1
		}
		return 0
	})
	return s[len(s)/2]
}

// completed returns the first time until all was there.
func (c *cell) completed() *float64 {
	for _, s := range c.Samples {
		if s.Complete != nil {
			return s.Complete
		}
	}
	return nil
}

// report prints table and targets and writes the files.
func (b *bench) report() error {
	b.r.print()
	list := b.r.targets()
	missed := judge(list)
	if missed {
		b.r.explain(list)
	}
	err := errors.Join(figures.WriteJSON(b.out, &b.r), os.WriteFile(b.picture, []byte(picture(&b.r)), 0o644))
	if err != nil {
		return err
	}
	fmt.Printf("figures: %s\npicture: %s\n", b.out, b.picture)
	if b.publish != "" {
		if err := b.r.put(b.publish); err != nil {
			return err
		}
	}
	if missed {
		return figures.ErrMissed
	}
	return nil
}

// print prints the table.
func (r *results) print() {
	fmt.Printf("\n%s\noverlay %.1f MiB (%.1f MiB before its profile), eager's files %.1f MiB\n", r.Host, figures.MiB(r.OverlayBytes), figures.MiB(r.PlainBytes), figures.MiB(r.EagerBytes))
	for _, n := range networks() {
		header := false
		for _, w := range r.ways() {
			c := r.find(n.name, w.name)
			if c == nil {
				continue
			}
			if !header {
				fmt.Printf("\n%-53s %18s %9s %9s  %s\n", n.text, "first response, s", "MiB", "complete", "demand waits: count, p50, p99, over 10 ms")
				header = true
			}
			fmt.Printf("  %-51s %s\n", w.text, r.row(c))
		}
	}
	for i, p := range r.Peer {
		if i == 0 {
			fmt.Printf("\n%d reads of the disk of 4 KiB, one after the other, until the last is answered\n", peerReads)
		}
		fmt.Printf("  %s\n", p)
	}
	fmt.Println()
}

// row is a line of the table.
func (r *results) row(c *cell) string {
	v := r.columns(c)
	return strings.TrimRight(fmt.Sprintf("%-18s %9s %9s  %s", v[0], v[1], v[2], v[3]), " ")
}

// columns are first response, MiB before it, seconds until complete, and waits; "" where there
// is none.
func (r *results) columns(c *cell) []string {
	if len(c.Samples) == 0 {
		return []string{fmt.Sprintf("> %.0f", r.Bound), "", "", ""}
	}
	v := c.seconds()
	cut := ""
	if c.Cut {
		cut = fmt.Sprintf(", > %.0f once", r.Bound)
	}
	text := fmt.Sprintf("%.2f (%.2f-%.2f%s)", figures.Median(v), slices.Min(v), slices.Max(v), cut)
	if len(v) == 1 {
		text = fmt.Sprintf("%.2f%s", v[0], cut)
	}
	list := []string{text, fmt.Sprintf("%.1f", figures.MiB(figures.Median(c.bytes()))), "", ""}
	if s := c.completed(); s != nil {
		list[2] = fmt.Sprintf("%.1f", *s)
	}
	if w := c.middle().Waits; w != nil {
		list[3] = fmt.Sprintf("%d, %s, %s, %d", w.Count, milli(w.P50), milli(w.P99), w.Long)
	}
	return list
}
