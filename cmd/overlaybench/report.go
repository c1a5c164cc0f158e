package main

import (
	"cmp"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"

	"cloudlet/integration/figures"
)

// spread are the median and the ends of some measurements.
type spread struct{ Median, Least, Most float64 }

func newSpread(v []float64) spread {
	if len(v) == 0 {
		return spread{}
	}
	return spread{figures.Median(v), slices.Min(v), slices.Max(v)}
}

func (s spread) format(decimals int) string {
	if s.Least == s.Most {
		return fmt.Sprintf("%.*f", decimals, s.Median)
	}
	return fmt.Sprintf("%.*f (%.*f-%.*f)", decimals, s.Median, decimals, s.Least, decimals, s.Most)
}

func each(list []cost, f func(cost) float64) (v []float64) {
	for _, c := range list {
		v = append(v, f(c))
	}
	return v
}

// createWall is in seconds.
func (w *row) createWall() spread {
	return newSpread(each(w.Create, func(c cost) float64 { return c.Wall }))
}

// createSpeed is in MB of modified pages a second of one core.
func (w *row) createSpeed() spread {
	return newSpread(each(w.Create, func(c cost) float64 { return float64(w.change) / 1e6 / c.CPU }))
}

// decodeSpeed is in MB of pages a second of one core, the base's pages known.
func (w *row) decodeSpeed() spread {
	return newSpread(each(w.Decode, func(c cost) float64 { return float64(w.Stored) / 1e6 / c.CPU }))
}

// firstSpeed is the same where each page of the base that is needed is hashed first.
func (w *row) firstSpeed() spread {
	return newSpread(each(w.First, func(c cost) float64 { return float64(w.Stored) / 1e6 / c.CPU }))
}

func (w *row) openTime() spread { return newSpread(w.Open) }

// find returns the row of an unchanged strategy, nil if it was not measured.
func (g *guestResult) find(strategy string) *row {
	for _, w := range g.Rows {
		if w.Strategy == strategy && !w.ByAddress && w.Without == (variant{}).Without {
			return w
		}
	}
	return nil
}

// rival returns what a rival made, nil if it was not measured.
func (g *guestResult) rival(name string) *rivalResult {
	for i := range g.Rivals {
		if r := &g.Rivals[i]; r.Name == name && r.Error == "" {
			return r
		}
	}
	return nil
}

// rivalSpeed is in MB of the pages that were modified or are stored a second of one core.
func (g *guestResult) rivalSpeed(r *rivalResult) float64 {
	if r.Decode == nil || r.Decode.CPU <= 0 {
		return 0
	}
	n := (g.Stats.Memory.Modified + g.Stats.Disk.Modified) * 4096
	if r.Name == referenceName || r.Name == solidName {
		n = (g.Stats.Memory.Stored + g.Stats.Disk.Stored) * 4096
	}
	return float64(n) / 1e6 / r.Decode.CPU
}

// report prints table and targets and writes the files.
func (o *options) report(r *results) error {
	missed := false
	for _, g := range r.Guests {
		g.print(os.Stdout)
		for _, t := range g.targets() {
			fmt.Printf("  %s\n", t)
			missed = missed || !t.Met()
		}
		if text := g.withoutNoise(); text != "" {
			fmt.Println("\n" + text)
		}
		fmt.Println()
	}
	if err := writeCSV(o.csv, r); err != nil {
		return err
	}
	for _, g := range r.Guests {
		if err := g.draw(o.picture + "-" + g.Name); err != nil {
			return err
		}
	}
	fmt.Printf("figures: %s, %s; plots: %s-GUEST.svg and .png\n", cmp.Or(o.from, o.json), o.csv, o.picture)
	if o.publish != "" {
		if err := publish(o.publish, r); err != nil {
			return err
		}
	}
	if missed {
		return figures.ErrMissed
	}
	return nil
}

// print prints a guest's tables.
func (g *guestResult) print(out io.Writer) {
	m, d := g.Stats.Memory, g.Stats.Disk
	fmt.Fprintf(out, "\n%s: overlay %.12s, modified pages: %d of memory, %d of disk (%.1f MiB); zero %d, base %d, parent %d, self %d, stored %d (%.1f MiB); device state %.2f MiB; touch profile of %d pages\n\n",
		g.Name, g.ID, m.Modified, d.Modified, figures.MiB((m.Modified+d.Modified)*4096), m.Zero+d.Zero, m.Base+d.Base, m.Parent+d.Parent, m.Self+d.Self,
		m.Stored+d.Stored, figures.MiB((m.Stored+d.Stored)*4096), figures.MiB(g.State), g.Touch)
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "varied\tstrategy\tMiB\tvs ref\tcodec saves\tdelta saves\tcreate s\tcreate MB/s/core\tpeak MiB\tdecode MB/s/core\tfirst\topen ms\t")
	for _, w := range g.Rows {
		open := w.openTime()
		fmt.Fprintf(t, "%s\t%s\t%.2f\t%s\t%.1f\t%s\t%s\t%.0f\t%.0f\t%s\t%.0f\t%.1f\t\n", w.Factor, w.Label, figures.MiB(w.Bytes), g.ratio(w.Bytes), figures.MiB(w.Saved.Codec), w.Saved.delta(),
			w.createWall().format(1), w.createSpeed().Median, figures.MiB(w.Peak), w.decodeSpeed().format(0), w.firstSpeed().Median, 1000*open.Median)
	}
	t.Flush()
	if len(g.Rivals) > 0 {
		fmt.Fprintln(out)
		t = tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
		for i := range g.Rivals {
			r := &g.Rivals[i]
			if r.Error != "" {
				fmt.Fprintf(t, "%s\t%s\t%s\n", r.Name, r.Text, r.Error)
				continue
			}
			fmt.Fprintf(t, "%s\t%s\t%.2f MiB\t%s vs ref\tmade in %.0f s (%.0f s of CPU)\t", r.Name, r.Text, figures.MiB(r.Bytes), g.ratio(r.Bytes), r.Create.Wall, r.Create.CPU)
			if s := g.rivalSpeed(r); s > 0 {
				fmt.Fprintf(t, "decoded at %.0f MB/s/core", s)
			}
			fmt.Fprintln(t)
		}
		t.Flush()
	}
	g.printResponses(out)
	fmt.Fprintln(out)
	for i := range g.Hot {
		g.Hot[i].document(out)
	}
}

// ratio tells bytes as a share of the reference.
func (g *guestResult) ratio(n int64) string {
	ref := g.rival(referenceName)
	if ref == nil {
		return "-"
	}
	return fmt.Sprintf("%.3f", float64(n)/float64(ref.Bytes))
}

// targets returns those of which all figures were measured.
func (g *guestResult) targets() (list []figures.Target) {
	ref, eager := g.rival(referenceName), g.rival(eagerName)
	b, s := g.find("balanced"), g.find("small")
	if b != nil && ref != nil {
		list = append(list, figures.Target{What: "balanced: size", Bound: 1.10, Value: float64(b.Bytes) / float64(ref.Bytes), Unit: "of the reference", Decimals: 3})
	}
	if b != nil {
		list = append(list,
			figures.Target{What: "balanced: create, modified data", Bound: 100, Value: b.createSpeed().Median, Least: true, Unit: "MB/s a core", Decimals: 0},
			figures.Target{What: "balanced: decode", Bound: 500, Value: b.decodeSpeed().Median, Least: true, Unit: "MB/s a core", Decimals: 0})
	}
	if s != nil && ref != nil {
		list = append(list, figures.Target{What: "small: size", Bound: 0.85, Value: float64(s.Bytes) / float64(ref.Bytes), Unit: "of the reference", Decimals: 3})
	}
	if b != nil && eager != nil {
		list = append(list, figures.Target{What: "balanced: whole overlay", Bound: 0.90, Value: float64(b.File) / float64(eager.Bytes), Unit: "of eager's bytes", Decimals: 3})
	}
	if b != nil {
		entries := g.Stats.Memory.Modified + g.Stats.Disk.Modified
		bound := 20 * max(1, float64(entries)/100000) // the target is that of 100,000
		list = append(list, figures.Target{What: fmt.Sprintf("balanced: open, %d entries", entries), Bound: bound, Value: 1000 * b.openTime().Median, Unit: "ms", Decimals: 1})
	}
	return list
}

// writeCSV writes the figures as they are, a line for each variant and rival of each guest.
func writeCSV(path string, r *results) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := csv.NewWriter(f)
	line := func(fields ...any) {
		text := make([]string, len(fields))
		for i, v := range fields {
			switch v := v.(type) {
			case float64:
				if v != 0 {
					text[i] = strconv.FormatFloat(v, 'g', 6, 64)
				}
			default:
				text[i] = fmt.Sprint(v)
			}
		}
		w.Write(text) // Error tells
	}
	line(anys(strings.Split("guest,kind,factor,label,strategy,bytes,file_bytes,index_bytes,stored_bytes,saved_zero,saved_base,saved_parent,saved_self,saved_codec,saved_delta,"+
		"create_s,create_s_least,create_s_most,create_mb_s_core,create_peak_bytes,decode_mb_s_core,decode_least,decode_most,decode_first,open_s,open_least,open_most", ","))...)
	for _, g := range r.Guests {
		for _, v := range g.Rows {
			c, d, o := v.createWall(), v.decodeSpeed(), v.openTime()
			line(g.Name, "strategy", v.Factor, v.Label, v.Strategy, v.Bytes, v.File, v.Index, v.Stored, v.Saved.Zero, v.Saved.Base, v.Saved.Parent, v.Saved.Self, v.Saved.Codec, v.Saved.apart(),
				c.Median, c.Least, c.Most, v.createSpeed().Median, v.Peak, d.Median, d.Least, d.Most, v.firstSpeed().Median, o.Median, o.Least, o.Most)
		}
		for i := range g.Rivals {
			v := &g.Rivals[i]
			if v.Error == "" {
				s := g.rivalSpeed(v)
				line(g.Name, "rival", "", v.Name, v.Text, v.Bytes, v.Bytes, "", "", "", "", "", "", "", "", v.Create.Wall, v.Create.Wall, v.Create.Wall, "", "", s, s, s, "", "", "", "")
			}
		}
	}
	w.Flush()
	return errors.Join(w.Error(), f.Close())
}

func anys(list []string) (out []any) {
	for _, s := range list {
		out = append(out, s)
	}
	return out
}
