// Command appguest builds the application guest, or customises a running instance of it.
//
//	appguest -o DIR            builds it, or finds it built, and prints its parts
//	appguest -o DIR SOCKET     installs the application over the serial console SOCKET
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"

	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"cloudlet/integration/appguest"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "appguest:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	flags := pflag.NewFlagSet("appguest", pflag.ContinueOnError)
	flags.SetOutput(stderr)
	out := flags.StringP("output", "o", "build/appguest", "folder of the built guest")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 1 {
		return fmt.Errorf("unexpected argument %q: give one socket", flags.Arg(1))
	}
	g, err := appguest.Build(ctx, *out, stderr)
	if err != nil {
		return err
	}
	if flags.NArg() == 1 {
		return appguest.Customise(ctx, flags.Arg(0), g, stderr)
	}
	_, err = fmt.Fprintf(stdout, "kernel %s\ninitrd %s\ndisk %s\npackages %s\nrepo %s\nappend %s\nmemory %d MiB\nready %s\n",
		g.Kernel, g.Initrd, g.Disk, g.Packages, g.Repo, appguest.Append, appguest.MemoryMiB, appguest.Ready)
	return err
}
