package main

import (
	"fmt"
	"strings"

	"cloudlet/overlay"
)

// variant is something to measure: a strategy, and what is changed that is no part of one.
type variant struct {
	Factor    string          `json:"factor"` // what is varied
	Label     string          `json:"label"`
	Strategy  string          `json:"strategy"`
	ByAddress bool            `json:"by_address,omitempty"` // pages of the touch profile are not apart
	Without   overlay.Classes `json:"without"`
}

const standard = "balanced"

// presets are the named strategies but "none", which is no way to make an overlay small.
func presets() (list []variant) {
	for _, name := range overlay.Strategies() {
		if name != "none" {
			list = append(list, variant{Factor: "preset", Label: name, Strategy: name})
		}
	}
	return list
}

// factors are the presets, and balanced with one thing changed at a time.
func factors() []variant {
	list := presets()
	one := func(factor string, changes ...string) {
		for _, c := range changes {
			list = append(list, variant{Factor: factor, Label: c, Strategy: standard + "," + c})
		}
	}
	one("delta", "delta=none", "delta=dict", "delta=vcdiff")
	one("codec", "level=1", "level=3", "level=4", "level=19", "codec=xz")
	one("frame size", "frame=16K", "frame=64K", "frame=128K", "frame=256K", "frame=1M", "frame=4M", "frame=256K,hot=256K")
	one("order", "order=address")
	list = append(list, variant{Factor: "order", Label: "all by address", Strategy: standard, ByAddress: true})
	one("records", "stride=no")
	for _, d := range []struct {
		label string
		off   overlay.Classes
	}{
		{"no zero class", overlay.Classes{Zero: true}},
		{"no base class", overlay.Classes{Base: true}},
		{"no self class", overlay.Classes{Self: true}},
		{"no class at all", overlay.Classes{Zero: true, Base: true, Parent: true, Self: true}},
	} {
		list = append(list, variant{Factor: "deduplication", Label: d.label, Strategy: standard, Without: d.off})
	}
	one("together", "frame=64K,level=3", "frame=1M,level=4", "frame=1M,level=19", "frame=4M,level=22", "order=address,frame=1M")
	for _, s := range []string{"small,frame=256K", "small,frame=4M", "small,stride=no"} {
		list = append(list, variant{Factor: "small", Label: s, Strategy: s})
	}
	return list
}

// parseVariants reads -strategies.
func parseVariants(text string) (list []variant, err error) {
	switch text {
	case "factors":
		return factors(), nil
	case "presets":
		return presets(), nil
	case "none":
		return nil, nil
	}
	for _, t := range strings.Split(text, ";") {
		if _, err := overlay.ParseStrategy(t); err != nil {
			return nil, fmt.Errorf("-strategies takes factors, presets, none, or strategies: %w", err)
		}
		list = append(list, variant{Factor: "asked for", Label: t, Strategy: t})
	}
	return list, nil
}

// plain returns the strategy without its delta, which shows what the delta saves.
func (v variant) plain() (variant, bool) {
	s, err := overlay.ParseStrategy(v.Strategy)
	if err != nil || s.Delta == overlay.DeltaNone {
		return v, false
	}
	v.Strategy += ",delta=none"
	return v, true
}

// key is the same for variants that make the same bytes.
func (v variant) key() string {
	s, err := overlay.ParseStrategy(v.Strategy)
	if err != nil {
		return v.Strategy
	}
	s.Name = ""
	return fmt.Sprintf("%+v %v %+v", s, v.ByAddress, v.Without)
}
