// Command buildguest builds the test guest, or finds it built, and prints the paths of its
// files on stdout, one a line, each after its name.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"cloudlet/integration/guest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "buildguest:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := pflag.NewFlagSet("buildguest", pflag.ContinueOnError)
	flags.SetOutput(stderr)
	out := flags.StringP("output", "o", "build/guest", "folder of the built guest")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q: give the folder with -o", flags.Arg(0))
	}
	g, err := guest.Build(ctx, *out, stderr)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(stdout, "kernel %s\ninitrd %s\ndisk %s\npackages %s\nappend %s\nmemory %d MiB\n",
		g.Kernel, g.Initrd, g.Disk, g.Packages, guest.Append, guest.MemoryMiB)
	return err
}
