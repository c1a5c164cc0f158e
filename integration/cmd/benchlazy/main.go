// Command benchlazy measures laziness over a slow network: how soon the demo's application
// answers when its overlay lies behind a link, by each way to bring it, and what that fetches.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

func main() {
	b := &bench{}
	var links, ways string
	flag.StringVar(&b.options.Program, "cloudlet", "build/cloudlet", "the program")
	flag.StringVar(&b.options.GuestDir, "guest", "build/appguest", "folder of the guest, which is built if missing")
	flag.StringVar(&b.options.Dir, "dir", "build/demo", "the demo's folder, in which it keeps what is expensive")
	flag.StringVar(&b.out, "o", "build/bench-lazy.json", "file for the results")
	flag.StringVar(&b.picture, "svg", "build/bench-lazy.svg", "file for the picture")
	flag.StringVar(&b.publish, "publish", "", "root of the project, to put figures and picture into its documents")
	flag.StringVar(&b.from, "from", "", "results of an earlier run, to be reported again")
	flag.StringVar(&links, "links", strings.Join(linkNames(), ","), "links to measure")
	flag.StringVar(&ways, "ways", strings.Join(wayNames(), ","), "ways to measure")
	flag.IntVar(&b.rounds, "rounds", 3, "rounds of measuring, every way over every link once in each")
	flag.IntVar(&b.pairs, "pairs", 9, "rounds of the quick ways without a network, which have the closest targets")
	flag.DurationVar(&b.bound, "bound", 2*time.Minute, "when a measurement is given up")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := b.choose(links, ways)
	if err == nil {
		err = b.run(ctx)
	}
	stop()
	switch {
	case errors.Is(err, errMissed):
		os.Exit(1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "benchlazy:", err)
		os.Exit(2)
	}
}
