// Command benchapi measures the service: what a synthesis costs through the API, what ten at
// once do to one launch image, how it answers a crowd, and how fast it starts.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	b := &bench{}
	flag.StringVar(&b.program, "cloudlet", "build/cloudlet", "the program")
	flag.StringVar(&b.guestDir, "guest", "build/guest", "folder of the test guest, which is built if missing")
	flag.StringVar(&b.dir, "dir", "build/benchapi", "folder to work in; its stores are removed at the end")
	flag.StringVar(&b.out, "o", "build/bench-api.json", "file for the results")
	flag.StringVar(&b.only, "only", "", "measure only this: pairs, burst, crowd or start")
	flag.IntVar(&b.pairs, "pairs", 60, "pairs of a synthesis through the API and one in this process")
	minutes := flag.Float64("minutes", 5, "minutes for which the crowd stays")
	flag.Parse()
	b.stay = time.Duration(*minutes * float64(time.Minute))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := b.run(ctx)
	stop()
	switch {
	case errors.Is(err, errMissed):
		os.Exit(1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "benchapi:", err)
		os.Exit(2)
	}
}
