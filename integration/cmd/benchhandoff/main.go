// Command benchhandoff measures the handoff of a running instance over a link between two
// cloudlets, with a client at work: how long the guest stands still, how long the client hears
// nothing, what is carried. Beside it, on the same link and in the same round: what zstd makes
// of the same residue, and QEMU's own migration of a guest in the same condition.
package main

import (
	"context"
	"flag"
	"strings"
	"time"

	"cloudlet/integration/figures"
)

func main() { figures.Main("benchhandoff", run) }

func run(ctx context.Context, args []string) error {
	b := &bench{}
	f := flag.NewFlagSet("benchhandoff", flag.ContinueOnError)
	var cells string
	f.StringVar(&b.options.Program, "cloudlet", "build/cloudlet", "the program")
	f.StringVar(&b.options.GuestDir, "guest", "build/guest", "folder of the test guest, which is built if missing")
	f.StringVar(&b.options.Dir, "dir", "build/handoff", "folder to work in; the base is kept there")
	f.IntVar(&b.options.MemoryMiB, "memory", 512, "MiB of the guest's memory")
	f.StringVar(&b.out, "o", "build/bench-handoff.json", "file for the results")
	f.StringVar(&b.publish, "publish", "", "root of the project, to put the figures into its documents")
	f.StringVar(&cells, "cells", strings.Join(cellNames(), ","), "cells to measure: MiB of residue, what the guest does, link")
	f.IntVar(&b.rounds, "rounds", 3, "rounds of measuring, every cell of a link once in each")
	f.DurationVar(&b.bound, "bound", 5*time.Minute, "when a measurement is given up")
	if err := figures.Parse(f, args); err != nil {
		return err
	}
	if err := b.choose(cells); err != nil {
		return err
	}
	return b.run(ctx)
}
