package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"cloudlet/integration/figures"
	"cloudlet/overlay"
)

// publish writes docs/strategies.md with its plots and the figures behind them.
func publish(root string, r *results) error {
	docs := filepath.Join(root, "docs")
	if err := os.MkdirAll(docs, 0o755); err != nil {
		return err
	}
	var b strings.Builder
	b.WriteString(introduction)
	fmt.Fprintf(&b, "Measured on %s; %d rounds, medians, in brackets least and most. Sizes are exact.\n", r.Host, r.Rounds)
	for _, g := range r.Guests {
		g.document(&b)
		if err := g.draw(filepath.Join(docs, "strategies-"+g.Name)); err != nil {
			return err
		}
	}
	if err := figures.WriteJSON(filepath.Join(docs, "bench-strategies.json"), r); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(docs, "strategies.md"), []byte(b.String()), 0o644)
}

const introduction = `# Overlay strategies

Written by ` + "`make bench-strategies`" + `; changes belong into cmd/overlaybench.

A strategy says how the pages that an overlay stores become frames: what is subtracted (the
delta), how they are compressed (codec and level), how many stand together (frame size, for
pages of the touch profile and for the others), and which ones (order): pages of the touch
profile in its order, all others beside those that they resemble, or, where they are arrays of
records of one size, in frames of their own, as differences from record to record (stride). It
changes the file, never the overlay's id.

How to choose: **balanced** is the default, and what a guest waits for is decoded at its speed.
With level=19 the zstd program encodes it, which takes a minute or more: it becomes smaller and
is read nearly as fast. **fast** where somebody waits for the overlay to be made, as in a
handoff. **small** where the whole overlay must come over a slow link, and creating may take
minutes; it is read slowly. Larger cold frames make every strategy smaller (frame=1M, frame=4M),
but a page that no profile foresaw then costs the transfer and decoding of that much, and over
a network the first response comes later (` + "`benchlazy -strategies`, `overlaybench -lazy`" + `).
**elijah** is what the seeds of this field did, to compare with. Parameters change one thing:
` + "`balanced,delta=dict,level=4`" + `.

Size is frames and index, without device state and touch profile. *vs ref* is a share of the
reference: each stored page through xdelta3 -9, then all through one xz -9e, which cannot be
read lazily. *codec saves* and *delta saves* are MiB; a delta that costs more than it saves is
negative, and where making one more overlay would have taken long it is not told apart from
the codec. Speeds are MB of pages a second of processor time, hashes included: *create* of
modified pages, which lie in files (copying them out of the guest is not in it), *decode* of
stored ones; *first* also hashes the pages of the base that a delta needs, as a fresh mount
does. *peak* is the creating process, without the programs that it runs.

What frames cannot reach: repetition further apart than a frame, which the reference and solid
xz find in windows of 64 MiB, and noise, which no codec makes smaller. The demo's application,
flask, holds 24 MiB of it (its table and its file, made so that every answer can be checked), about
half of every overlay of it, and of the reference. What the rest comes to is told behind the targets
of a guest that holds much of it.

Also tried, and not kept; these figures were taken once, by programs that are not in this project,
of frames of 64 KiB at level 3 where no others are named. A dictionary shared by all cold frames:
of 1 MiB 3 % smaller on db, at half the speed of create and of decode; of 4 MiB 5 %, at a third of
create's. Cold pages of memory beside those of the disk that they came from: 0.7 % on db. These
pages in frames of 4 MiB, all others in small ones: 3 to 7 %, and a first response over 38 Mbit/s
half as late again. The whole base as history (zstd --patch-from, of the stored pages of flask): 2
%. A filter for x86 code before xz: 0.3 %; before zstd, with the code's pages in the order of the
disk, so that the same call has the same bytes: 0.5 % on flask, 1.5 on node, 1.9 on db. Other
literal and position bits of xz: 0.1 %. The bytes of words apart from one another, in the frames
that this makes smaller: 0.3, 1.3 and 1.5 %, in part of those that strides make smaller still. A
delta also where half of a page's few words stay: 0.04 % larger.

CPU profiles stand at the end of each guest. What was done about their first entries: unmodified
pages are compared, not hashed, when an overlay is made, and whether a delta pays is counted, not
sketched; what is left is the codec, one SHA-256 of each page, for the overlay's id, and one of
each frame, which is what lets nothing unverified reach a guest.

`

// document writes a guest's chapter.
func (g *guestResult) document(b *strings.Builder) {
	m, d := g.Stats.Memory, g.Stats.Disk
	fmt.Fprintf(b, "\n## %s\n\n", g.Name)
	fmt.Fprintf(b, "| pages | modified | zero | in the base | twice | stored |\n|---|--:|--:|--:|--:|--:|\n")
	for _, p := range []struct {
		name string
		overlay.PageStats
	}{{"memory", m}, {"disk", d}} {
		fmt.Fprintf(b, "| %s | %d | %d | %d | %d | %d |\n", p.name, p.Modified, p.Zero, p.Base, p.Self, p.Stored)
	}
	if len(g.Rows) > 0 {
		fmt.Fprintf(b, "\n![size against decode speed](strategies-%s.svg)\n\n", g.Name)
		fmt.Fprint(b, "| varied | strategy | MiB | vs ref | codec saves | delta saves | create s | create MB/s | peak MiB | decode MB/s | first MB/s | open ms |\n|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	}
	best := front(g.points())
	for _, w := range g.Rows {
		label := w.Label
		if slices.ContainsFunc(best, func(p point) bool { return p.label == w.Label }) {
			label = "**" + label + "**"
		}
		fmt.Fprintf(b, "| %s | %s | %.2f | %s | %.2f | %s | %s | %.0f | %.0f | %s | %.0f | %.1f |\n", w.Factor, label, figures.MiB(w.Bytes), g.ratio(w.Bytes), figures.MiB(w.Saved.Codec), w.Saved.delta(),
			w.createWall().format(1), w.createSpeed().Median, figures.MiB(w.Peak), w.decodeSpeed().format(0), w.firstSpeed().Median, 1000*w.openTime().Median)
	}
	if len(g.Rows) > 0 {
		fmt.Fprint(b, "\nBold: on the Pareto front, where no other strategy is both smaller and faster to decode.\n")
	}
	if len(g.Rivals) > 0 {
		fmt.Fprint(b, "\n| other programs | what | MiB | vs ref | made in s of CPU | decode MB/s |\n|---|---|--:|--:|--:|--:|\n")
	}
	for i := range g.Rivals {
		v := &g.Rivals[i]
		if v.Error != "" {
			fmt.Fprintf(b, "| %s | %s | did not work: %.120s | | | |\n", v.Name, v.Text, strings.ReplaceAll(v.Error, "|", " "))
			continue
		}
		speed := "-"
		if s := g.rivalSpeed(v); s > 0 {
			speed = fmt.Sprintf("%.0f", s)
		}
		fmt.Fprintf(b, "| %s | %s | %.2f | %s | %.0f | %s |\n", v.Name, v.Text, figures.MiB(v.Bytes), g.ratio(v.Bytes), v.Create.CPU, speed)
	}
	g.documentResponses(b)
	if list := g.targets(); len(list) > 0 {
		fmt.Fprint(b, "\n```\n")
		for _, t := range list {
			fmt.Fprintln(b, t)
		}
		fmt.Fprint(b, "```\n")
	}
	if text := g.withoutNoise(); text != "" {
		fmt.Fprintf(b, "\n%s\n", text)
	}
	g.paid(b)
	if len(g.Hot) > 0 {
		fmt.Fprintf(b, "\nWhere the processor's time goes, by CPU profiles of balanced; decoding is repeated, pages\nof the base are known:\n\n")
	}
	for i := range g.Hot {
		g.Hot[i].document(b)
	}
}

// withoutNoise tells the shares of the reference without the pages that no codec makes smaller,
// where they are a part of it that matters.
func (g *guestResult) withoutNoise() string {
	ref := g.rival(referenceName)
	if ref == nil || g.Noise*20 <= ref.Bytes || g.Noise >= ref.Bytes {
		return ""
	}
	var shares []string
	tell := func(name string, bytes int64) {
		shares = append(shares, fmt.Sprintf("%s %.3f", name, float64(bytes-g.Noise)/float64(ref.Bytes-g.Noise)))
	}
	for _, name := range []string{"balanced", "small"} {
		if w := g.find(name); w != nil {
			tell(name, w.Bytes)
		}
	}
	if solid := g.rival(solidName); solid != nil {
		tell(solidName, solid.Bytes)
	}
	if shares == nil {
		return ""
	}
	return fmt.Sprintf("%.1f MiB of the stored pages are noise, in the reference as in every overlay. Without them, of the\nreference's bytes: %s.", figures.MiB(g.Noise), strings.Join(shares, ", "))
}

// paid tells what each change of balanced saved or cost.
func (g *guestResult) paid(b *strings.Builder) {
	base := g.find(standard)
	if base == nil {
		return
	}
	var lost, won []string
	for _, w := range g.Rows {
		if w.Factor == "preset" || w.Factor == "deduplication" || w.Factor == "small" || w == base {
			continue
		}
		size := 100 * (float64(w.Bytes)/float64(base.Bytes) - 1)
		text := fmt.Sprintf("- %s: %+.1f %% of size, decodes at %.0f %% and is created at %.0f %% of the speed of balanced", w.Label, size,
			100*w.decodeSpeed().Median/base.decodeSpeed().Median, 100*w.createSpeed().Median/base.createSpeed().Median)
		if size < -0.5 {
			won = append(won, text)
		} else {
			lost = append(lost, text)
		}
	}
	for _, part := range []struct {
		head  string
		lines []string
	}{{"What makes balanced smaller, at a price:", won}, {"What did not make it smaller by half a percent:", lost}} {
		if len(part.lines) > 0 {
			fmt.Fprintf(b, "\n%s\n\n%s\n", part.head, strings.Join(part.lines, "\n"))
		}
	}
}
