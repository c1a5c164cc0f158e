package main

import (
	"fmt"
	"slices"
)

// target is a bound on a figure.
type target struct {
	what         string
	bound, value float64
	least        bool // bound is the least, else the most
	unit         string
	cell         *cell // that it speaks of, to explain a miss
}

func (t target) met() bool {
	if t.least {
		return t.value >= t.bound
	}
	return t.value <= t.bound
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
		return c, median(c.seconds()), true
	}
	least, floorTime, hasFloor := mid(local, floor)
	profiled, profileTime, hasProfile := mid(local, profile)
	plain, plainTime, hasPlain := mid(local, push)
	_, eagerTime, hasEager := mid(local, eager)
	another, secondTime, hasSecond := mid(local, second)
	if hasFloor && hasProfile {
		list = append(list, target{what: "first response by profile, local", bound: floorTime + aboveProfile, value: profileTime, unit: "s (floor + 0.1)", cell: profiled})
	}
	if hasFloor && hasPlain {
		list = append(list, target{what: "first response without profile, local", bound: floorTime + aboveFloor, value: plainTime, unit: "s (floor + 0.4)", cell: plain})
	}
	if hasEager && hasPlain {
		list = append(list, target{what: "sooner than eager, local, without profile", bound: eagerLocal, value: eagerTime / plainTime, least: true, unit: "times", cell: plain})
	}
	behind, behindTime, hasBehind := mid(slow, profile)
	if _, t, ok := mid(slow, eager); ok && hasBehind {
		list = append(list, target{what: "sooner than eager, 38 Mbit/s, 20 ms", bound: eagerSlow, value: t / behindTime, least: true, unit: "times", cell: behind})
	}
	if hasBehind && len(behind.Samples) > 0 {
		list = append(list, target{what: "fetched before the first response, 38 Mbit/s, 20 ms", bound: 100 * shareSlow, value: 100 * median(behind.bytes()) / float64(r.OverlayBytes), unit: "% of the overlay", cell: behind})
	}
	if hasFloor && hasSecond && len(least.Samples) > 0 && len(another.Samples) > 0 {
		list = append(list,
			target{what: "second instance", bound: slices.Max(least.seconds()), value: secondTime, unit: "s (spread of the floor)", cell: another},
			target{what: "second instance reads", bound: secondReads, value: mib(slices.Max(another.bytes())), unit: "MiB", cell: another})
	}
	return append(list, r.memory()...)
}

// memory is the target of the mounts' memory, by the worst of them.
func (r *results) memory() []target {
	t := target{what: "memory of the mount at most", bound: mountMost + mib(r.IndexBytes), unit: "MiB"}
	for _, c := range r.Cells {
		for _, s := range c.Samples {
			if m := mib(s.Peak); m > t.value {
				t.value, t.cell = m, c
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
		verdict, bound := "pass", "at most"
		if !t.met() {
			verdict, missed = "MISS", true
		}
		if t.least {
			bound = "at least"
		}
		fmt.Printf("  %-52s target %s %.2f, measured %.2f %s: %s\n", t.what, bound, t.bound, t.value, t.unit, verdict)
	}
	return missed
}

// explain prints for each target that was missed where the time of its median sample went.
func (r *results) explain(list []target) {
	for _, t := range list {
		if t.met() || t.cell == nil || len(t.cell.Samples) == 0 {
			continue
		}
		s := t.cell.middle()
		fmt.Printf("\n%s, over %s:\n ", t.what, t.cell.Link)
		for _, e := range s.Timeline {
			fmt.Printf(" %s %.0f ms ·", e.Name, 1000*e.Seconds)
		}
		fmt.Printf(" first response %.0f ms\n", 1000*s.Seconds)
		if s.Waits != nil {
			fmt.Printf("  until then %.1f MiB came, %.1f MiB were pushed, %.1f MiB served on demand; %s, %.2f s in all\n",
				mib(s.Bytes), mib(s.Pushed), mib(s.Served), s.Waits, s.Waits.Sum)
		}
	}
	fmt.Println()
}
