package main

import (
	"context"
	"fmt"
	"html"
	"os"
	"slices"
	"strings"
	"time"

	"cloudlet/integration/figures"
)

// results are the figures of a demo: medians in seconds, sizes in bytes, and all values.
type results struct {
	FirstResponse float64 `json:"first_response_s"`
	// With the touch profile, recorded with another request in another run.
	FirstResponseProfile float64              `json:"first_response_profile_s"`
	FirstResponseCold    float64              `json:"first_response_cold_s"`
	Floor                float64              `json:"floor_s"`
	Eager                float64              `json:"eager_s"`
	OwnEager             float64              `json:"own_eager_s"`
	ColdBoot             float64              `json:"cold_boot_s"`
	SecondInstance       float64              `json:"second_instance_s"`
	ThirdInstance        float64              `json:"third_instance_s"`
	OverlayBytes         int64                `json:"overlay_bytes"`
	EagerBytes           int64                `json:"eager_bytes"`
	MemoryRead           int64                `json:"memory_bytes_read"`   // of the mount, before the first answer
	MemoryPushed         int64                `json:"memory_bytes_pushed"` // by the mount, before the guest asked
	DiskRead             int64                `json:"disk_bytes_read"`     // the same
	OverlayRead          int64                `json:"overlay_bytes_read"`  // of the overlay, before the first answer
	SecondRead           int64                `json:"second_instance_bytes_read"`
	Rounds               int                  `json:"rounds"`
	Host                 string               `json:"host"`
	All                  map[string][]float64 `json:"all_s"`
	reads                map[string][]int64
}

func newResults(d *demo) *results {
	return &results{OverlayBytes: d.Made.Size, EagerBytes: d.Made.EagerBytes, Rounds: d.rounds, All: map[string][]float64{}, reads: map[string][]int64{}}
}

func (r *results) add(key string, took time.Duration) {
	r.All[key] = append(r.All[key], took.Seconds())
}

func (r *results) addRead(key string, n int64) { r.reads[key] = append(r.reads[key], n) }

// report prints the table and the targets and writes the files.
func (d *demo) report(ctx context.Context, r *results) error {
	r.FirstResponse, r.FirstResponseCold, r.Floor = figures.Median(r.All["lazy"]), figures.Median(r.All["cold"]), figures.Median(r.All["floor"])
	r.FirstResponseProfile = figures.Median(r.All["profile"])
	r.Eager, r.OwnEager, r.ColdBoot = figures.Median(r.All["eager"]), figures.Median(r.All["own eager"]), figures.Median(r.All["cold boot"])
	r.SecondInstance, r.ThirdInstance = figures.Median(r.All["second"]), figures.Median(r.All["third"])
	r.SecondRead = slices.Max(r.reads["second"])
	h, err := d.QEMU().Probe(ctx)
	if err != nil {
		return err
	}
	r.Host = host(h.QEMU, d.Machine.Accelerator)

	rows := d.rows()
	fmt.Printf("\nSeconds from the request to the first right answer: median of %d rounds (least to most)\n", r.Rounds)
	for _, w := range rows {
		v := r.All[w.key]
		fmt.Printf("  %-50s %7.2f  (%.2f to %.2f)\n", w.text, figures.Median(v), slices.Min(v), slices.Max(v))
	}
	fmt.Printf("\noverlay %.1f MiB (eager's %.1f MiB); before the first answer the mount served %.1f MiB of memory\n(and pushed %.1f MiB) and %.1f MiB of disk from %.1f MiB of the overlay; a second instance read %.2f MiB\n\n",
		figures.MiB(r.OverlayBytes), figures.MiB(r.EagerBytes), figures.MiB(r.MemoryRead), figures.MiB(r.MemoryPushed), figures.MiB(r.DiskRead), figures.MiB(r.OverlayRead), figures.MiB(r.SecondRead))
	missed := r.judge()
	if err := figures.WriteJSON(d.out, r); err != nil {
		return err
	}
	if err := os.WriteFile(d.picture, []byte(picture(rows, r)), 0o644); err != nil {
		return err
	}
	fmt.Printf("figures: %s\npicture: %s\n", d.out, d.picture)
	if d.publish != "" {
		if err := publish(d.publish, d, r); err != nil {
			return err
		}
	}
	if missed {
		return figures.ErrMissed
	}
	return nil
}

// rows are the ways in the order of the table, the siblings of the first among them.
func (d *demo) rows() []way {
	w := d.ways()
	return slices.Concat(w[:3], []way{{key: "second", text: "a second instance of the same launch"}, {key: "third", text: "a third instance"}}, w[3:])
}

// judge prints target, measured, and pass or miss.
func (r *results) judge() (missed bool) {
	for _, t := range []figures.Target{
		{What: "first response, no profile yet", Bound: r.Floor + 0.5, Value: r.FirstResponse, Unit: "s (floor + 0.5)"},
		{What: "first response, by profile", Bound: r.Floor + 0.1, Value: r.FirstResponseProfile, Unit: "s (floor + 0.1)"},
		{What: "times sooner than eager", Bound: 8, Value: r.Eager / r.FirstResponse, Least: true},
		{What: "second instance", Bound: slices.Max(r.All["floor"]), Value: r.SecondInstance, Unit: "s (spread of the floor)"},
		{What: "second instance reads", Bound: 1, Value: figures.MiB(r.SecondRead), Unit: "MiB"},
		{What: "overlay against eager's bytes", Bound: 0.9, Value: float64(r.OverlayBytes) / float64(r.EagerBytes)},
	} {
		t.Decimals = 2
		missed = missed || !t.Met()
		fmt.Printf("  %s\n", t)
	}
	return missed
}

// picture draws the rows as bars: medians, and a line for their spread.
func picture(rows []way, r *results) string {
	const left, width, height, top = 330, 520, 30, 50
	var most float64
	for _, w := range rows {
		most = max(most, slices.Max(r.All[w.key]))
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="13">`, left+width+80, top+height*len(rows)+20)
	b.WriteString("\n" + `<rect width="100%" height="100%" fill="white"/>` + "\n")
	fmt.Fprintf(&b, `<text x="10" y="24" font-size="15">Seconds to the first right answer (median of %d rounds; line: least to most)</text>`+"\n", r.Rounds)
	for i, w := range rows {
		v, y := r.All[w.key], top+height*i
		colour := "#9aa5b1"
		if slices.Contains([]string{"lazy", "profile", "cold", "second", "third"}, w.key) {
			colour = "#2f6fb7"
		}
		x := func(s float64) float64 { return left + s/most*width }
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>`, left-8, y+17, html.EscapeString(w.text))
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.1f" height="18" fill="%s"/>`, left, y+4, x(figures.Median(v))-left, colour)
		fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="black"/>`, x(slices.Min(v)), x(slices.Max(v)), y+13, y+13)
		fmt.Fprintf(&b, `<text x="%.1f" y="%d">%.2f</text>`+"\n", x(slices.Max(v))+6, y+17, figures.Median(v))
	}
	b.WriteString("</svg>\n")
	return b.String()
}
