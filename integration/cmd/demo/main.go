// Command demo does the main job on a real application with the program under test, and
// measures it against its alternatives on the same host, in the same minutes.
package main

import (
	"context"
	"flag"

	"cloudlet/integration/figures"
)

func main() { figures.Main("demo", run) }

func run(ctx context.Context, args []string) error {
	d := &demo{}
	f := flag.NewFlagSet("demo", flag.ContinueOnError)
	f.StringVar(&d.options.Program, "cloudlet", "build/cloudlet", "the program")
	f.StringVar(&d.options.GuestDir, "guest", "build/appguest", "folder of the guest, which is built if missing")
	f.StringVar(&d.options.Dir, "dir", "build/demo", "folder to work in; what is expensive is kept there")
	f.StringVar(&d.out, "o", "build/demo.json", "file for the results")
	f.StringVar(&d.picture, "svg", "build/demo.svg", "file for the picture")
	f.IntVar(&d.rounds, "rounds", 5, "rounds of measuring, every way once in each")
	f.BoolVar(&d.walking, "walk", false, "measure nothing; use the rest of the command line on the guest: export, import, a chain, qcow2")
	f.StringVar(&d.publish, "publish", "", "root of the project, to put table and picture into its documents")
	if err := figures.Parse(f, args); err != nil {
		return err
	}
	return d.run(ctx)
}
