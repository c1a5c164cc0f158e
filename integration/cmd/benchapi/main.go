// Command benchapi measures the service: what a synthesis costs through the API, what ten at
// once do to one launch image, how it answers a crowd, and how fast it starts.
package main

import (
	"context"
	"flag"
	"time"

	"cloudlet/integration/figures"
)

func main() { figures.Main("benchapi", run) }

func run(ctx context.Context, args []string) error {
	b := &bench{}
	f := flag.NewFlagSet("benchapi", flag.ContinueOnError)
	f.StringVar(&b.program, "cloudlet", "build/cloudlet", "the program")
	f.StringVar(&b.guestDir, "guest", "build/guest", "folder of the test guest, which is built if missing")
	f.StringVar(&b.dir, "dir", "build/benchapi", "folder to work in; its stores are removed at the end")
	f.StringVar(&b.out, "o", "build/bench-api.json", "file for the results")
	f.StringVar(&b.only, "only", "", "measure only this: pairs, burst, crowd or start")
	f.IntVar(&b.pairs, "pairs", 60, "pairs of a synthesis through the API and one in this process")
	minutes := f.Float64("minutes", 5, "minutes for which the crowd stays")
	if err := figures.Parse(f, args); err != nil {
		return err
	}
	b.stay = time.Duration(*minutes * float64(time.Minute))
	return b.run(ctx)
}
