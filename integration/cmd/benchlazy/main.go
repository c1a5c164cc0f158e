// Command benchlazy measures laziness over a slow network: how soon the demo's application
// answers when its overlay lies behind a link, by each way to bring it, and what that fetches.
package main

import (
	"context"
	"errors"
	"flag"
	"strings"
	"time"

	"cloudlet/integration/figures"
)

func main() { figures.Main("benchlazy", run) }

func run(ctx context.Context, args []string) error {
	b := &bench{}
	f := flag.NewFlagSet("benchlazy", flag.ContinueOnError)
	var links, ways, strategies string
	f.StringVar(&b.options.Program, "cloudlet", "build/cloudlet", "the program")
	f.StringVar(&b.options.GuestDir, "guest", "build/appguest", "folder of the guest, which is built if missing")
	f.StringVar(&b.options.Dir, "dir", "build/demo", "the demo's folder, in which it keeps what is expensive")
	f.StringVar(&b.out, "o", "build/bench-lazy.json", "file for the results")
	f.StringVar(&b.picture, "svg", "build/bench-lazy.svg", "file for the picture")
	f.StringVar(&b.publish, "publish", "", "root of the project, to put figures and picture into its documents")
	f.StringVar(&b.from, "from", "", "results of an earlier run, to be reported again")
	f.StringVar(&links, "links", strings.Join(linkNames(), ","), "links to measure")
	f.StringVar(&ways, "ways", strings.Join(wayNames(), ","), "ways to measure")
	f.StringVar(&strategies, "strategies", "", "also measure the overlay packed by these strategies, as overlay create takes them, separated by semicolons")
	f.IntVar(&b.rounds, "rounds", 3, "rounds of measuring, every way over every link once in each")
	f.IntVar(&b.pairs, "pairs", 9, "rounds of the quick ways without a network, which have the closest targets")
	f.DurationVar(&b.bound, "bound", 2*time.Minute, "when a measurement is given up")
	if err := figures.Parse(f, args); err != nil {
		return err
	}
	if err := errors.Join(b.choose(links, ways), b.chooseStrategies(strategies)); err != nil {
		return err
	}
	return b.run(ctx)
}
