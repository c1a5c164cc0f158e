// Command benchhandoff measures the handoff of a running instance over a link between two
// cloudlets, with a client at work: how long the guest stands still, how long the client hears
// nothing, what is carried. Beside it, on the same link and in the same round: what zstd makes
// of the same residue, and QEMU's own migration of a guest in the same condition.
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
	var cells string
	flag.StringVar(&b.options.Program, "cloudlet", "build/cloudlet", "the program")
	flag.StringVar(&b.options.GuestDir, "guest", "build/guest", "folder of the test guest, which is built if missing")
	flag.StringVar(&b.options.Dir, "dir", "build/handoff", "folder to work in; the base is kept there")
	flag.IntVar(&b.options.MemoryMiB, "memory", 512, "MiB of the guest's memory")
	flag.StringVar(&b.out, "o", "build/bench-handoff.json", "file for the results")
	flag.StringVar(&b.publish, "publish", "", "root of the project, to put the figures into its documents")
	flag.StringVar(&cells, "cells", strings.Join(cellNames(), ","), "cells to measure: MiB of residue, what the guest does, link")
	flag.IntVar(&b.rounds, "rounds", 3, "rounds of measuring, every cell of a link once in each")
	flag.DurationVar(&b.bound, "bound", 5*time.Minute, "when a measurement is given up")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := b.choose(cells)
	if err == nil {
		err = b.run(ctx)
	}
	stop()
	switch {
	case errors.Is(err, errMissed):
		os.Exit(1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "benchhandoff:", err)
		os.Exit(2)
	}
}
