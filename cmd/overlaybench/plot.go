package main

import (
	"cmp"
	"fmt"
	"image/color"
	"math"
	"slices"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"

	"cloudlet/integration/figures"
)

// point is a way to make the launch VM small: its size and how fast it decodes.
type point struct {
	label       string
	size, speed float64 // MiB, MB/s of one core
	rival       bool
	low, high   float64 // spread of the speed
}

// points returns what can be drawn, each way once.
func (g *guestResult) points() (list []point) {
	for _, w := range g.Rows {
		if w.Factor == "deduplication" {
			continue // makes a larger overlay of the same codec: no choice
		}
		s := w.decodeSpeed()
		list = append(list, point{w.Label, figures.MiB(w.Bytes), s.Median, false, s.Least, s.Most})
	}
	for i := range g.Rivals {
		if s := g.rivalSpeed(&g.Rivals[i]); s > 0 && g.Rivals[i].Error == "" {
			list = append(list, point{g.Rivals[i].Name, figures.MiB(g.Rivals[i].Bytes), s, true, s, s})
		}
	}
	return list
}

// front returns the strategies that no other is both smaller and faster than, by size. Other
// programs' files cannot be read lazily, and so are no choice beside them.
func front(list []point) (out []point) {
	list = slices.DeleteFunc(slices.Clone(list), func(p point) bool { return p.rival })
	sorted := slices.SortedFunc(slices.Values(list), func(a, b point) int {
		return cmp.Or(cmp.Compare(a.size, b.size), -cmp.Compare(a.speed, b.speed))
	})
	best := 0.0
	for _, p := range sorted {
		if p.speed > best {
			out, best = append(out, p), p.speed
		}
	}
	return out
}

// draw writes the plot to path.svg and path.png.
func (g *guestResult) draw(path string) error {
	list := g.points()
	if len(list) == 0 {
		return nil
	}
	p := plot.New()
	p.Title.Text = fmt.Sprintf("%s: size against decode speed; line: no other strategy is smaller and faster", g.Name)
	p.X.Label.Text = "size of the overlay without device state and profile, MiB"
	p.Y.Label.Text = "decoding, MB/s of one core"
	p.Y.Scale = plot.LogScale{}
	p.Y.Tick.Marker = plot.ConstantTicks(speedTicks(list))
	p.Add(plotter.NewGrid())
	for _, kind := range []struct {
		name  string
		rival bool
		color color.Color
		shape draw.GlyphDrawer
	}{
		{"strategies", false, color.RGBA{0x2f, 0x6f, 0xb7, 0xff}, draw.CircleGlyph{}},
		{"other programs", true, color.RGBA{0x77, 0x77, 0x77, 0xff}, draw.SquareGlyph{}},
	} {
		if err := addPoints(p, kind.name, kind.color, kind.shape, slices.DeleteFunc(slices.Clone(list), func(q point) bool { return q.rival != kind.rival })); err != nil {
			return err
		}
	}
	var line plotter.XYs
	for _, q := range front(list) {
		line = append(line, plotter.XY{X: q.size, Y: q.speed})
	}
	l, err := plotter.NewLine(line)
	if err != nil {
		return fmt.Errorf("draw front: %w", err)
	}
	l.Color, l.Width = color.RGBA{0xc0, 0x39, 0x2b, 0xff}, vg.Points(1.2)
	p.Add(l)
	p.Legend.Add("Pareto front", l)
	p.Legend.Padding, p.Legend.YOffs = vg.Points(3), vg.Points(4) // lower right, where little is
	p.X.Max += (p.X.Max - p.X.Min + 1) / 8                        // for the labels
	ticks := speedTicks(list)
	p.Y.Min, p.Y.Max = ticks[0].Value, ticks[len(ticks)-1].Value
	for _, ending := range []string{".svg", ".png"} {
		if err := p.Save(10*vg.Inch, 6.5*vg.Inch, path+ending); err != nil {
			return fmt.Errorf("write plot %s: %w", path+ending, err)
		}
	}
	return nil
}

// speedTicks returns 1, 2 and 5 of each power of ten around the speeds.
func speedTicks(list []point) (ticks []plot.Tick) {
	least, most := math.Inf(1), 0.0
	for _, p := range list {
		least, most = min(least, p.low), max(most, p.high)
	}
	for power := math.Pow(10, math.Floor(math.Log10(max(least, 1e-3)))); ; power *= 10 {
		for _, n := range []float64{1, 2, 5} {
			v := n * power
			if v <= least {
				ticks = nil // one at or below the least is enough
			}
			ticks = append(ticks, plot.Tick{Value: v, Label: strconv.FormatFloat(v, 'g', 4, 64)})
			if v > most {
				return ticks
			}
		}
	}
}

func addPoints(p *plot.Plot, name string, c color.Color, shape draw.GlyphDrawer, list []point) error {
	if len(list) == 0 {
		return nil
	}
	type bars struct {
		plotter.XYs
		plotter.YErrors
	}
	var b bars
	var names []string
	for _, q := range list {
		b.XYs = append(b.XYs, plotter.XY{X: q.size, Y: q.speed})
		b.YErrors = append(b.YErrors, struct{ Low, High float64 }{q.speed - q.low, q.high - q.speed})
		names = append(names, " "+q.label)
	}
	s, err := plotter.NewScatter(b.XYs)
	if err != nil {
		return fmt.Errorf("draw points: %w", err)
	}
	s.Color, s.Shape, s.Radius = c, shape, vg.Points(3)
	e, err := plotter.NewYErrorBars(b)
	if err != nil {
		return fmt.Errorf("draw spread: %w", err)
	}
	e.Color = c
	labels, err := plotter.NewLabels(plotter.XYLabels{XYs: b.XYs, Labels: names})
	if err != nil {
		return fmt.Errorf("draw labels: %w", err)
	}
	for i := range labels.TextStyle {
		labels.TextStyle[i].Font.Size = vg.Points(8)
	}
	p.Add(e, s, labels)
	p.Legend.Add(name, s)
	return nil
}
