package main

import (
	"fmt"
	"runtime"
	"slices"

	"cloudlet/integration/figures"
)

// results are the figures of a run, in seconds and bytes; nil: not measured.
type results struct {
	Pairs *pairsResult `json:"synthesis,omitempty"`
	Burst *burstResult `json:"burst,omitempty"`
	Crowd *crowdResult `json:"crowd,omitempty"`
	Start *startResult `json:"start,omitempty"`
	Host  string       `json:"host"`
	Busy  float64      `json:"busy_before"` // share of the processors that other work took at the beginning
}

// report prints the figures and the targets and writes the file.
func (b *bench) report() error {
	b.r.Host = fmt.Sprintf("%d cores, %s", runtime.NumCPU(), runtime.GOARCH)
	fmt.Println()
	b.r.figures()
	fmt.Println()
	missed := b.r.judge()
	if err := figures.WriteJSON(b.out, b.r); err != nil {
		return err
	}
	fmt.Printf("figures: %s\n", b.out)
	if missed {
		return figures.ErrMissed
	}
	return nil
}

// figures prints what stands behind the targets.
func (r *results) figures() {
	if p := r.Pairs; p != nil {
		fmt.Printf("synthesis: median of %d pairs %.1f ms through the API, %.1f ms in process; of that outside of the operation %.1f ms and %.1f ms\n",
			len(p.AllAPI), 1000*p.API, 1000*p.InProcess, 1000*p.BesideAPI, 1000*p.BesideInside)
	}
	if p := r.Burst; p != nil {
		fmt.Printf("%d instances at once, %d times: first answer p50 %.2f s, p95 %.2f s; %d of %d frames decoded by then\n",
			p.Size, p.Rounds, p.P50, p.P95, p.FramesDecoded, p.Frames)
	}
	if p := r.Crowd; p != nil {
		fmt.Printf("crowd for %.1f minutes: %d GETs, p50 %.1f ms, p99 %.1f ms, most %.1f ms; %d events, %d times to an operation's end; %d answers of guests;\n  daemon %.1f MiB early, %.1f MiB late; %d descriptors, %d when the clients had left\n",
			p.Minutes, p.Gets, 1000*p.P50, 1000*p.P99, 1000*p.Max, p.Events, p.Followed, p.Answers, figures.MiB(p.Early), figures.MiB(p.Late), p.FilesLate, p.FilesLeft)
	}
	if p := r.Start; p != nil {
		fmt.Printf("start with %d overlays, %d times: median %.0f ms, most %.0f ms; the first list of all takes %.0f ms\n",
			p.Overlays, len(p.All), 1000*p.Median, 1000*p.Most, 1000*p.List)
	}
}

func (r *results) targets() (list []figures.Target) {
	if p := r.Pairs; p != nil {
		list = append(list, figures.Target{What: "synthesis through the API, more than in process", Bound: 10, Value: 1000 * p.More, Unit: "ms", Decimals: 1})
	}
	if p := r.Burst; p != nil {
		list = append(list,
			figures.Target{What: "mounts under ten instances of one launch", Bound: 1, Value: float64(p.Mounts)},
			figures.Target{What: "times that a frame was decoded", Bound: 1, Value: p.Most, Decimals: 3})
	}
	if p := r.Crowd; p != nil {
		allowed := max(rssGrowth*float64(p.Early), rssLeast)
		list = append(list,
			figures.Target{What: "p99 of GET in a crowd", Bound: 50, Value: 1000 * p.P99, Unit: "ms", Decimals: 1},
			figures.Target{What: "growth of the daemon meanwhile", Bound: allowed / (1 << 20), Value: figures.MiB(p.Late - p.Early), Unit: "MiB", Decimals: 1})
	}
	if p := r.Start; p != nil {
		list = append(list, figures.Target{What: "start with 1,000 overlays", Bound: 1, Value: p.Most, Unit: "s", Decimals: 2})
	}
	return list
}

// judge prints target, measured, and pass or miss.
func (r *results) judge() (missed bool) {
	for _, t := range r.targets() {
		missed = missed || !t.Met()
		fmt.Printf("  %s\n", t)
	}
	return missed
}

// quantile returns the least value that at least a share q of all values do not exceed.
func quantile(v []float64, q float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Sorted(slices.Values(v))
	i := int(q * float64(len(s)))
	if float64(i) == q*float64(len(s)) {
		i--
	}
	return s[max(0, min(i, len(s)-1))]
}
