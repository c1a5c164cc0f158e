// Command demo does the main job on a real application with the program under test, and
// measures it against its alternatives on the same host, in the same minutes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	d := &demo{}
	flag.StringVar(&d.options.Program, "cloudlet", "build/cloudlet", "the program")
	flag.StringVar(&d.options.GuestDir, "guest", "build/appguest", "folder of the guest, which is built if missing")
	flag.StringVar(&d.options.Dir, "dir", "build/demo", "folder to work in; what is expensive is kept there")
	flag.StringVar(&d.out, "o", "build/demo.json", "file for the results")
	flag.StringVar(&d.picture, "svg", "build/demo.svg", "file for the picture")
	flag.IntVar(&d.rounds, "rounds", 5, "rounds of measuring, every way once in each")
	flag.BoolVar(&d.walking, "walk", false, "measure nothing; use the rest of the command line on the guest: export, import, a chain, qcow2")
	flag.StringVar(&d.publish, "publish", "", "root of the project, to put table and picture into its documents")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := d.run(ctx)
	stop()
	switch {
	case errors.Is(err, errMissed):
		os.Exit(1)
	case err != nil:
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(2)
	}
}
