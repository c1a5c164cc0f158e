// Command demohandoff moves a running application from cloudlet to cloudlet while a client
// works with it: there, back, and on to a third. It measures how long the client heard nothing
// and verifies that nothing that was acknowledged is lost.
package main

import (
	"context"
	"flag"

	"cloudlet/integration/cloudlets"
	"cloudlet/integration/figures"
)

func main() { figures.Main("demohandoff", run) }

func run(ctx context.Context, args []string) error {
	d := &demo{}
	f := flag.NewFlagSet("demohandoff", flag.ContinueOnError)
	f.StringVar(&d.options.Program, "cloudlet", "build/cloudlet", "the program")
	f.StringVar(&d.options.GuestDir, "guest", "build/guest", "folder of the test guest, which is built if missing")
	f.StringVar(&d.options.Dir, "dir", "build/handoff", "folder to work in; the base is kept there")
	f.StringVar(&d.out, "o", "build/demo-handoff.json", "file for the results")
	link := f.String("link", "local", "what is between the cloudlets: local, 1g or 38m")
	f.IntVar(&d.options.MemoryMiB, "memory", 512, "MiB of the guest's memory")
	f.IntVar(&d.fill, "fill", 128, "MiB of application data that are written before each handoff")
	f.IntVar(&d.churn, "churn", 0, "KiB of it a second that the application rewrites at random")
	f.IntVar(&d.workers, "clients", 1, "clients at the same time")
	f.IntVar(&d.rounds, "rounds", 0, "most rounds of each handoff while the guest runs; 0: the program's choice, -1: none")
	if err := figures.Parse(f, args); err != nil {
		return err
	}
	network, err := cloudlets.FindNetwork(*link)
	if err != nil {
		return err
	}
	d.options.Network = network
	return d.run(ctx)
}
