package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"cloudlet/api"
	"cloudlet/overlay"
	"cloudlet/overlay/source"
)

// strategyWays are the ways by the touch profile of overlays that were packed by strategies.
func strategyWays(strategies []string) (list []way) {
	for i, s := range strategies {
		list = append(list, way{
			name: s, text: "by the touch profile, packed by " + s, file: fmt.Sprintf("strategy-%d.overlay", i), quick: true, run: instance(api.PrefetchAuto),
		})
	}
	return list
}

// chooseStrategies takes the strategies to measure from a list of them.
func (b *bench) chooseStrategies(list string) error {
	if list == "" {
		return nil
	}
	for s := range strings.SplitSeq(list, ";") {
		parsed, err := overlay.ParseStrategy(s)
		if err != nil {
			return fmt.Errorf("-strategies: %w", err)
		}
		if err := parsed.CheckPrograms(context.Background()); err != nil {
			return fmt.Errorf("-strategies: %w", err)
		}
		b.r.Strategies = append(b.r.Strategies, s)
	}
	b.ways = append(b.ways, strategyWays(b.r.Strategies)...)
	return nil
}

// pack packs the overlay by the strategies that are to be measured.
func (b *bench) pack(ctx context.Context) (err error) {
	b.files = map[string]string{"packed.overlay": b.Path("state", "overlays", b.Made.Overlay, "overlay"), "app.overlay": b.Path("app.overlay")}
	if len(b.r.Strategies) == 0 {
		return nil
	}
	base, err := overlay.OpenBase(b.Path("state", "bases", b.Made.Base))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, base.Close()) }()
	src, err := source.OpenFile(b.files["packed.overlay"])
	if err != nil {
		return err
	}
	r, err := overlay.Open(ctx, src)
	if err != nil {
		return errors.Join(err, src.Close())
	}
	defer func() { err = errors.Join(err, r.Close()) }()
	im, err := overlay.NewImage(base, []*overlay.Reader{r}, overlay.ImageOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	for _, w := range strategyWays(b.r.Strategies) {
		s, err := overlay.ParseStrategy(w.name)
		if err != nil {
			return err
		}
		b.files[w.file] = b.Path(w.file)
		made, err := overlay.Repack(ctx, b.files[w.file], im, nil, overlay.CreateOptions{Strategy: s})
		if err != nil {
			return err
		}
		b.Say("packed by %s: %.1f MiB", w.name, float64(made.Size)/(1<<20))
	}
	return nil
}

// unpack removes what pack has made.
func (b *bench) unpack() (err error) {
	for _, w := range strategyWays(b.r.Strategies) {
		if e := os.Remove(b.Path(w.file)); !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}
