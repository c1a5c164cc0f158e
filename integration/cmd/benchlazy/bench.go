package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"cloudlet/integration/demoguest"
	"cloudlet/integration/figures"
	"cloudlet/integration/link"
)

// bench is one run of the benchmark.
type bench struct {
	options               demoguest.Options
	out, picture, publish string
	from                  string // results to report again
	rounds, pairs         int
	bound                 time.Duration
	links                 []network
	ways                  []way

	*demoguest.Lab
	files map[string]string // overlays, by the names of ways: packed.overlay is that of the store, packed by its profile
	round int               // the present one; it chooses the request and the losses
	r     results
}

// choose takes the links and ways to measure from lists of names.
func (b *bench) choose(links, ways string) error {
	for name := range strings.SplitSeq(links, ",") {
		i := slices.IndexFunc(networks(), func(n network) bool { return n.name == name })
		if i < 0 {
			return fmt.Errorf("there is no link %q: choose from %s", name, strings.Join(linkNames(), ","))
		}
		b.links = append(b.links, networks()[i])
	}
	for name := range strings.SplitSeq(ways, ",") {
		i := slices.IndexFunc(allWays(), func(w way) bool { return w.name == name })
		if i < 0 {
			return fmt.Errorf("there is no way %q: choose from %s", name, strings.Join(wayNames(), ","))
		}
		b.ways = append(b.ways, allWays()[i])
	}
	return nil
}

func (b *bench) run(ctx context.Context) (err error) {
	if b.publish != "" {
		if err := figures.HasTable(figures.Readme(b.publish), tableName); err != nil {
			return err
		}
	}
	if b.from != "" {
		return b.again()
	}
	for _, p := range []*string{&b.out, &b.picture} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	if err := errors.Join(os.MkdirAll(filepath.Dir(b.out), 0o755), b.checkLinks()); err != nil {
		return err
	}
	if b.Lab, err = demoguest.Open(ctx, b.options); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.Close(ctx)) }()
	defer func() { err = errors.Join(err, b.unpack()) }()
	if err := b.pack(ctx); err != nil {
		return err
	}
	if err := b.describe(ctx); err != nil {
		return err
	}
	if err := b.measure(ctx); err != nil {
		return err
	}
	return b.report()
}

// again reports the results of an earlier run.
func (b *bench) again() error {
	text, err := os.ReadFile(b.from)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(text, &b.r); err != nil {
		return fmt.Errorf("%s holds no results: %w", b.from, err)
	}
	for _, n := range networks() { // what is older has no texts
		for _, c := range b.r.Cells {
			if c.Link == n.name {
				c.Text = n.text
			}
		}
	}
	return b.report()
}

func (b *bench) checkLinks() error {
	if slices.ContainsFunc(b.links, func(n network) bool { return n.name != local }) {
		return link.Probe()
	}
	return nil
}

// measure runs every way over every link once in each round, so that a busy moment of the
// host hits all.
func (b *bench) measure(ctx context.Context) error {
	for b.round = 0; b.round < max(b.rounds, b.pairs); b.round++ {
		b.Say("round %d of %d", b.round+1, max(b.rounds, b.pairs))
		for _, n := range b.links {
			for _, w := range b.ways {
				if !w.over(n) || b.round >= b.rounds && !(n.name == local && w.quick) || b.round >= b.pairs && w.quick && n.name == local {
					continue
				}
				if err := b.once(ctx, n, w); err != nil {
					return fmt.Errorf("%s, %s: %w", n.text, w.text, err)
				}
			}
		}
	}
	return b.comparePeer(ctx)
}

// once measures a way over a link, unless it was given up before.
func (b *bench) once(ctx context.Context, n network, w way) (err error) {
	c := b.r.cell(n, w.name)
	if c.Cut {
		return nil
	}
	warm := slices.AppendSeq([]string{b.Path("state", "bases"), b.Path("eager")}, maps.Values(b.files))
	if w.name == floor {
		warm = []string{b.Path("plain")}
	}
	if err := demoguest.SetCache(warm); err != nil {
		return err
	}
	run := attempt{bench: b, ref: w.local(b)}
	if n.name != local {
		if err := b.forgetFrames(); err != nil {
			return err
		}
		files := maps.Clone(b.files)
		for _, name := range demoguest.Images {
			files[name+".xz"] = b.Path("eager", name)
		}
		if run.remote, err = serveOver(n, uint64(b.round), files); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, run.remote.close()) }()
		run.ref = run.remote.url(w.file)
	}
	bctx, cancel := bounded(ctx, b.bound)
	defer cancel()
	run.begin = time.Now()
	s, err := w.run(bctx, &run)
	if errors.Is(context.Cause(bctx), errCut) && run.first == 0 {
		b.Say("  %-28s %-12s > %.0f s", n.text, w.name, b.bound.Seconds())
		c.Cut = true
		return errors.Join(b.removeAll(context.WithoutCancel(ctx)), b.ClearRound())
	}
	if err != nil {
		return err
	}
	b.Say("  %-28s %-12s %s", n.text, w.name, s)
	c.Samples = append(c.Samples, s)
	return nil
}

// removeAll removes what a measurement that was given up has left.
func (b *bench) removeAll(ctx context.Context) error {
	list, err := b.Daemon.Instances(ctx, true)
	for _, in := range list {
		err = errors.Join(err, b.Daemon.DeleteInstance(ctx, in.ID, true))
	}
	return err
}

// forgetFrames removes what earlier mounts have fetched.
func (b *bench) forgetFrames() error {
	list, err := filepath.Glob(b.Path("state", "cache", "*"))
	for _, path := range list {
		err = errors.Join(err, os.RemoveAll(path))
	}
	return err
}
