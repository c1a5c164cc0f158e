// Command demohandoff moves a running application from cloudlet to cloudlet while a client
// works with it: there, back, and on to a third. It measures how long the client heard nothing
// and verifies that nothing that was acknowledged is lost.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"cloudlet/integration/cloudlets"
)

func main() {
	d := &demo{}
	flag.StringVar(&d.options.Program, "cloudlet", "build/cloudlet", "the program")
	flag.StringVar(&d.options.GuestDir, "guest", "build/guest", "folder of the test guest, which is built if missing")
	flag.StringVar(&d.options.Dir, "dir", "build/handoff", "folder to work in; the base is kept there")
	flag.StringVar(&d.out, "o", "build/demo-handoff.json", "file for the results")
	link := flag.String("link", "local", "what is between the cloudlets: local, 1g or 38m")
	flag.IntVar(&d.options.MemoryMiB, "memory", 512, "MiB of the guest's memory")
	flag.IntVar(&d.fill, "fill", 128, "MiB of application data that are written before each handoff")
	flag.IntVar(&d.churn, "churn", 0, "KiB of it a second that the application rewrites at random")
	flag.IntVar(&d.workers, "clients", 1, "clients at the same time")
	flag.IntVar(&d.rounds, "rounds", 0, "most rounds of each handoff while the guest runs; 0: the program's choice, -1: none")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	var err error
	if d.options.Network, err = cloudlets.FindNetwork(*link); err == nil {
		err = d.run(ctx)
	}
	stop()
	switch {
	case errors.Is(err, errMissed):
		os.Exit(1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "demohandoff:", err)
		os.Exit(2)
	}
}
