// Command overlaybench compares strategies of overlays on real guests: size and what each
// step saved, create time and memory, decode speed, open time, first responses that
// benchlazy has measured; and what other programs make of the same guests. It takes any number
// of guests, each a base and an overlay of it, or a base and the disk and memory of a launch VM.
package main

import (
	"context"
	"flag"
	"os"
	"strings"
	"time"

	"cloudlet/integration/figures"
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == childArgument {
		os.Exit(childMain(context.Background(), os.Stdin, os.Stdout))
	}
	figures.Main("overlaybench", run)
}

// options are the command line.
type options struct {
	guests     []string
	strategies string
	rivals     string
	rounds     int
	patience   time.Duration
	dir        string
	json       string
	csv        string
	picture    string
	publish    string
	from       string
	lazy       string
}

func run(ctx context.Context, args []string) error {
	var o options
	f := flag.NewFlagSet("overlaybench", flag.ContinueOnError)
	f.Func("guest", "a guest, as often as there are some: NAME=BASE_DIR:OVERLAY, NAME=BASE_DIR:MEMORY:DISK (raw files of a launch VM),\nor NAME=DIR where make demo or make guests has prepared DIR", func(s string) error {
		o.guests = append(o.guests, s)
		return nil
	})
	f.StringVar(&o.strategies, "strategies", "factors", "what to measure: factors (presets, and one factor at a time from balanced), presets, none,\nor strategies as `overlay create` takes them, separated by semicolons")
	f.StringVar(&o.rivals, "rivals", strings.Join(rivalNames(), ","), "other programs to measure, by name; those that are missing are left out")
	f.IntVar(&o.rounds, "rounds", 3, "rounds of measuring, every strategy once in each")
	f.DurationVar(&o.patience, "patience", time.Minute, "a strategy whose create takes longer is created once only,\nand not once more without its delta")
	f.StringVar(&o.dir, "dir", "build/strategies", "folder for what is made on the way; the rivals' results are found again in it")
	f.StringVar(&o.json, "o", "build/bench-strategies.json", "file for the results")
	f.StringVar(&o.csv, "csv", "build/bench-strategies.csv", "file for the table")
	f.StringVar(&o.picture, "plot", "build/bench-strategies", "beginning of the names of the plots, -GUEST.svg and -GUEST.png")
	f.StringVar(&o.publish, "publish", "", "root of the project, to write its docs/strategies.md")
	f.StringVar(&o.from, "from", "", "results to report again, instead of measuring; those of several runs, of different guests, with commas between")
	f.StringVar(&o.lazy, "lazy", "", "results of benchlazy -strategies, which should name balanced, too: the first responses over links\nare reported with the guest of that overlay")
	if err := figures.Parse(f, args); err != nil {
		return err
	}
	r, err := o.results(ctx)
	if err != nil {
		return err
	}
	return o.report(r)
}
