package main

import (
	"fmt"
	"slices"

	"cloudlet/integration/figures"
)

// target is a bound on a figure of a cell, which explains a miss.
type target struct {
	figures.Target
	cell *cell
}

// targets returns those of which all figures were measured.
func (r *results) targets() (list []target) {
	mid := func(link, way string) (c *cell, seconds float64, ok bool) {
		c = r.find(link, way)
		switch {
		case c == nil:
			return nil, 0, false
		case c.Cut || len(c.Samples) == 0:
			return c, r.Bound, true // at least
		}
		return c, figures.Median(c.seconds()), true
	}
	least, floorTime, hasFloor := mid(local, floor)
	profiled, profileTime, hasProfile := mid(local, profile)
	plain, plainTime, hasPlain := mid(local, push)
	_, eagerTime, hasEager := mid(local, eager)
	another, secondTime, hasSecond := mid(local, second)
	if hasFloor && hasProfile {
		list = append(list, target{figures.Target{What: "first response by profile, local", Bound: floorTime + aboveProfile, Value: profileTime, Unit: "s (floor + 0.1)", Decimals: 2}, profiled})
	}
	if hasFloor && hasPlain {
		list = append(list, target{figures.Target{What: "first response without profile, local", Bound: floorTime + aboveFloor, Value: plainTime, Unit: "s (floor + 0.4)", Decimals: 2}, plain})
	}
	if hasEager && hasPlain {
		list = append(list, target{figures.Target{What: "sooner than eager, local, without profile", Bound: eagerLocal, Value: eagerTime / plainTime, Least: true, Unit: "times", Decimals: 2}, plain})
	}
	behind, behindTime, hasBehind := mid(slow, profile)
	if _, t, ok := mid(slow, eager); ok && hasBehind {
		list = append(list, target{figures.Target{What: "sooner than eager, 38 Mbit/s, 20 ms", Bound: eagerSlow, Value: t / behindTime, Least: true, Unit: "times", Decimals: 2}, behind})
	}
	if hasBehind && len(behind.Samples) > 0 {
		list = append(list, target{figures.Target{What: "fetched before the first response, 38 Mbit/s, 20 ms", Bound: 100 * shareSlow, Value: 100 * figures.Median(behind.bytes()) / float64(r.OverlayBytes), Unit: "% of the overlay", Decimals: 2}, behind})
	}
	if hasFloor && hasSecond && len(least.Samples) > 0 && len(another.Samples) > 0 {
		list = append(list,
			target{figures.Target{What: "second instance", Bound: slices.Max(least.seconds()), Value: secondTime, Unit: "s (spread of the floor)", Decimals: 2}, another},
			target{figures.Target{What: "second instance reads", Bound: secondReads, Value: figures.MiB(slices.Max(another.bytes())), Unit: "MiB", Decimals: 2}, another})
	}
	return append(list, r.memory()...)
}

// memory is the target of the mounts' memory, by the worst of them.
func (r *results) memory() []target {
	t := target{Target: figures.Target{What: "memory of the mount at most", Bound: mountMost + figures.MiB(r.IndexBytes), Unit: "MiB", Decimals: 2}}
	for _, c := range r.Cells {
		for _, s := range c.Samples {
			if m := figures.MiB(s.Peak); m > t.Value {
				t.Value, t.cell = m, c
			}
		}
	}
	if t.cell == nil {
		return nil
	}
	return []target{t}
}

// judge prints target, measured, and pass or miss.
func judge(list []target) (missed bool) {
	for _, t := range list {
		missed = missed || !t.Met()
		fmt.Printf("  %s\n", t)
	}
	return missed
}

// explain prints for each target that was missed where the time of its median sample went.
func (r *results) explain(list []target) {
	for _, t := range list {
		if t.Met() || t.cell == nil || len(t.cell.Samples) == 0 {
			continue
		}
		s := t.cell.middle()
		fmt.Printf("\n%s, over %s:\n ", t.What, t.cell.Link)
		for _, e := range s.Timeline {
			fmt.Printf(" %s %.0f ms ·", e.Name, 1000*e.Seconds)
		}
		fmt.Printf(" first response %.0f ms\n", 1000*s.Seconds)
		if s.Waits != nil {
			fmt.Printf("  until then %.1f MiB came, %.1f MiB were pushed, %.1f MiB served on demand; %s, %.2f s in all\n",
				figures.MiB(s.Bytes), figures.MiB(s.Pushed), figures.MiB(s.Served), s.Waits, s.Waits.Sum)
		}
	}
	fmt.Println()
}
