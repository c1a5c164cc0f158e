// Command guests makes more real guests beside the demo's, for the bench of strategies: a
// database with data, a Node service.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"path/filepath"

	"cloudlet/integration/demoguest"
	"cloudlet/integration/figures"
	"cloudlet/integration/launches"
)

func main() { figures.Main("guests", run) }

const help = `usage: guests [flags] [APPLICATION...]

Resumes the demo's base, installs an application in it over its serial console, captures what
has changed as an overlay, packs that by its touch profile, and verifies an instance that is
synthesised from it. Without names, all applications:

`

const more = `
Each has a folder of its name in the folder -o: its Debian packages, prepared.json, and a link
to the store in the demo's folder, which holds the overlay. What is there and has not changed is
found again. The demo's folder is prepared as well where it is not; its daemon is needed, so the
demo and its benchmarks cannot run at the same time. Afterwards:

  make bench-strategies                          compares strategies on all guests
  overlaybench -guest db=build/db                on this one
  cloudlet --state build/demo/state run db -p 80 an instance, to ask by hand

The first time takes several minutes an application where QEMU has no KVM. Needs root, and
a Debian mirror once.

`

func run(ctx context.Context, args []string) (err error) {
	var options demoguest.Options
	flags := flag.NewFlagSet("guests", flag.ContinueOnError)
	flags.StringVar(&options.Program, "cloudlet", "build/cloudlet", "the program")
	flags.StringVar(&options.GuestDir, "guest", "build/appguest", "folder of the guest, which is built if missing")
	flags.StringVar(&options.Dir, "dir", "build/demo", "the demo's folder, whose base and store are used")
	out := flags.String("o", "build", "folder for the folders of the applications")
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), help)
		for _, a := range launches.Applications() {
			fmt.Fprintf(flags.Output(), "  %-5s %s\n", a.Name, a.About)
		}
		fmt.Fprint(flags.Output(), more)
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return err
	}
	applications, err := launches.Find(flags.Args())
	if err != nil {
		return err
	}
	lab, err := demoguest.Open(ctx, options)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lab.Close(context.WithoutCancel(ctx))) }()
	for _, a := range applications {
		if err := launches.Prepare(ctx, lab, a, filepath.Join(*out, a.Name)); err != nil {
			return err
		}
	}
	return nil
}
