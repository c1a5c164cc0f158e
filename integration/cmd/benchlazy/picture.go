package main

import (
	"fmt"
	"html"
	"math"
	"slices"
	"strings"

	"cloudlet/integration/figures"
)

// The picture's measures, in pixels.
const (
	pictureLeft  = 400
	pictureWidth = 560
	barHeight    = 20
	headHeight   = 34
)

// picture draws a bar for each way over each link, its time to the first response on a
// logarithmic scale, and a line for the spread.
func picture(r *results) string {
	lo, hi := r.scale()
	x := func(s float64) float64 {
		return pictureLeft + math.Log10(max(s, lo)/lo)/math.Log10(hi/lo)*pictureWidth
	}
	var bars strings.Builder
	y := 60
	for _, n := range networks() {
		header := false
		for _, w := range r.ways() {
			c := r.find(n.name, w.name)
			if c == nil {
				continue
			}
			if !header {
				y += headHeight - barHeight
				fmt.Fprintf(&bars, `<text x="10" y="%d" font-weight="bold">%s</text>`+"\n", y+15, html.EscapeString(n.text))
				y += barHeight
				header = true
			}
			drawBar(&bars, r, c, w, x, y)
			y += barHeight
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="13">`, pictureLeft+pictureWidth+110, y+40)
	b.WriteString("\n" + `<rect width="100%" height="100%" fill="white"/>` + "\n")
	fmt.Fprintf(&b, `<text x="10" y="24" font-size="15">Seconds to the first right answer, by link and way (logarithmic; line: least to most; blue: lazy)</text>`+"\n")
	fmt.Fprintf(&b, `<text x="10" y="%d" fill="#555">%s</text>`+"\n", y+28, html.EscapeString(r.Host))
	for s := lo; s <= hi*1.001; s *= 10 {
		fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="52" y2="%d" stroke="#ddd"/><text x="%.1f" y="46" text-anchor="middle" fill="#555">%g</text>`+"\n", x(s), x(s), y+6, x(s), s)
	}
	b.WriteString(bars.String())
	b.WriteString("</svg>\n")
	return b.String()
}

// scale returns the powers of ten around all times.
func (r *results) scale() (lo, hi float64) {
	lo, hi = 1, 1
	for _, c := range r.Cells {
		v := c.seconds()
		if c.Cut || len(v) == 0 {
			v = append(v, r.Bound)
		}
		lo, hi = min(lo, slices.Min(v)), max(hi, slices.Max(v))
	}
	lo, hi = math.Pow(10, math.Floor(math.Log10(lo))), math.Pow(10, math.Ceil(math.Log10(hi)))
	return lo, max(hi, 10*lo)
}

func drawBar(b *strings.Builder, r *results, c *cell, w way, x func(float64) float64, y int) {
	colour, mid, least, most, text := "#9aa5b1", r.Bound, r.Bound, r.Bound, fmt.Sprintf("> %.0f", r.Bound)
	if slices.Contains([]string{"demand", push, profile, second}, w.name) {
		colour = "#2f6fb7"
	}
	if v := c.seconds(); len(v) > 0 && !c.Cut {
		mid, least, most = figures.Median(v), slices.Min(v), slices.Max(v)
		text = fmt.Sprintf("%.2f", mid)
		if n := figures.Median(c.bytes()); c.Link != local && n > 0 {
			text += fmt.Sprintf(" (%.1f MiB)", figures.MiB(n))
		}
	}
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="end">%s</text>`, pictureLeft-8, y+14, html.EscapeString(w.text))
	fmt.Fprintf(b, `<rect x="%d" y="%d" width="%.1f" height="14" fill="%s"/>`, pictureLeft, y+3, x(mid)-pictureLeft, colour)
	fmt.Fprintf(b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="black"/>`, x(least), x(most), y+10, y+10)
	fmt.Fprintf(b, `<text x="%.1f" y="%d">%s</text>`+"\n", x(most)+6, y+14, html.EscapeString(text))
}
