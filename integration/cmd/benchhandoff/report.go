package main

import (
	"fmt"
	"slices"
	"strings"

	"cloudlet/integration/figures"
)

// The targets.
const (
	mostPause   = 0.3 // seconds
	mostGap     = 0.7
	mostSlowGap = 2.0 // over the slow link
	mostShare   = 1.1 // of what zstd -3 makes of the residue
)

// results are the figures of a run.
type results struct {
	Host    string  `json:"host"`
	Rounds  int     `json:"rounds"`
	Bound   float64 `json:"given_up_after_s"`
	Memory  int     `json:"guest_memory_mib"`
	Cells   []*cell `json:"cells"`
	Failure string  `json:"failure,omitempty"` // why it ended early
}

// cell is what was measured in a condition.
type cell struct {
	Name string `json:"name"`
	condition
	Handoffs   []handoffSample `json:"handoffs"`
	QEMU       []qemuSample    `json:"qemu_stop_and_copy"`
	HandoffCut bool            `json:"handoff_given_up,omitempty"` // one took longer than the bound, and was the last
	QEMUCut    bool            `json:"qemu_given_up,omitempty"`
}

// values takes a figure from each sample.
func values[S any](list []S, of func(S) float64) (v []float64) {
	for _, s := range list {
		v = append(v, of(s))
	}
	return v
}

// pause is from the guest's stop until its last overlay is published, still until it runs at
// the other cloudlet.
func (c *cell) pause() []float64 {
	return values(c.Handoffs, func(h handoffSample) float64 { return h.Published })
}
func (c *cell) still() []float64 {
	return values(c.Handoffs, func(h handoffSample) float64 { return h.Pause })
}
func (c *cell) gap() []float64 {
	return values(c.Handoffs, func(h handoffSample) float64 { return h.Gap })
}
func (c *cell) share() []float64 {
	return values(c.Handoffs, func(h handoffSample) float64 { return float64(h.Bytes) / float64(h.Residue.Zstd) })
}

// spread is a median and what it is the median of.
func spread(v []float64, decimals int) string {
	if len(v) == 0 {
		return "-"
	}
	return fmt.Sprintf("%.*f (%.*f-%.*f)", decimals, figures.Median(v), decimals, slices.Min(v), decimals, slices.Max(v))
}

// columns are those of the table.
func columns() []string {
	return []string{"pause, s", "stands still, s", "client gap, s", "total, s", "rounds", "MiB", "zstd -3, MiB", "QEMU: pause, s", "client gap, s", "MiB"}
}

// row is a line of the table.
func (r *results) row(c *cell) []string {
	h := func(decimals int, of func(handoffSample) float64) string {
		return spread(values(c.Handoffs, of), decimals)
	}
	q := func(decimals int, of func(qemuSample) float64) string { return spread(values(c.QEMU, of), decimals) }
	row := []string{
		spread(c.pause(), 2), spread(c.still(), 2), spread(c.gap(), 2),
		h(1, func(h handoffSample) float64 { return h.Total }),
		h(0, func(h handoffSample) float64 { return float64(len(h.Rounds)) }),
		h(1, func(h handoffSample) float64 { return figures.MiB(h.Bytes) }),
		h(1, func(h handoffSample) float64 { return figures.MiB(h.Residue.Zstd) }),
		q(2, func(q qemuSample) float64 { return q.Pause }),
		q(2, func(q qemuSample) float64 { return q.Gap }),
		q(1, func(q qemuSample) float64 { return figures.MiB(q.Bytes) }),
	}
	cut := fmt.Sprintf(", > %.0f s once", r.Bound)
	if c.HandoffCut {
		row[0] += cut
	}
	if c.QEMUCut {
		row[7] += cut
	}
	return row
}

// table prints the cells, and where the client's gaps went.
func (r *results) table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "\n%s, guest of %d MiB; medians of %d (least-most)\n\n%-38s", r.Host, r.Memory, r.Rounds, "")
	for _, c := range columns() {
		fmt.Fprintf(&b, " %18s", c)
	}
	for _, c := range r.Cells {
		fmt.Fprintf(&b, "\n  %-36s", c.text())
		for _, text := range r.row(c) {
			fmt.Fprintf(&b, " %18s", text)
		}
	}
	fmt.Fprintf(&b, "\n\n%-38s", "the client's gap, ms")
	for _, name := range partNames() {
		fmt.Fprintf(&b, " %22s", name)
	}
	fmt.Fprintf(&b, " %22s", "QEMU's first answer")
	for _, c := range r.Cells {
		fmt.Fprintf(&b, "\n  %-36s", c.text())
		for i := range partNames() {
			fmt.Fprintf(&b, " %22s", spread(values(c.Handoffs, func(h handoffSample) float64 { return 1000 * h.Split.parts()[i] }), 0))
		}
		fmt.Fprintf(&b, " %22s", spread(values(c.QEMU, func(q qemuSample) float64 { return 1000 * q.Answered }), 0))
	}
	b.WriteString("\n\n")
	return b.String()
}

// targets returns those of which all figures were measured. A measurement that was given up is
// a miss.
func (r *results) targets() (list []figures.Target) {
	for _, c := range r.Cells {
		median := func(v []float64) float64 {
			if c.HandoffCut || len(v) == 0 {
				return r.Bound // at least
			}
			return figures.Median(v)
		}
		switch c.Name {
		case "128-idle-" + fast:
			list = append(list,
				figures.Target{What: "pause, " + c.text(), Bound: mostPause, Value: median(c.pause()), Unit: "s", Decimals: 3},
				figures.Target{What: "client gap, " + c.text(), Bound: mostGap, Value: median(c.gap()), Unit: "s", Decimals: 3},
				figures.Target{What: "bytes, " + c.text(), Bound: mostShare, Value: median(c.share()), Unit: "of zstd -3", Decimals: 3})
		case "128-idle-" + slow:
			list = append(list, figures.Target{What: "client gap, " + c.text(), Bound: mostSlowGap, Value: median(c.gap()), Unit: "s", Decimals: 3})
		}
	}
	return list
}

// report prints table and targets and writes the files.
func (b *bench) report() error {
	fmt.Print(b.r.table())
	missed := false
	for _, t := range b.r.targets() {
		missed = missed || !t.Met()
		fmt.Printf("  %s\n", t)
	}
	if err := figures.WriteJSON(b.out, &b.r); err != nil {
		return err
	}
	fmt.Printf("figures: %s\n", b.out)
	if b.publish != "" {
		p := figures.Publication{Name: tableName, Results: &b.r, Table: b.r.markdown()}
		if err := p.Put(b.publish); err != nil {
			return err
		}
	}
	if missed {
		return figures.ErrMissed
	}
	return nil
}
