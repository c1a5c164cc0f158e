package figures

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

// ErrMissed is what a command returns that has measured everything and missed a target.
var ErrMissed = errors.New("a target was missed")

// Main runs a command with its arguments and ends the process: with 0, with 1 where a target
// was missed, with 2 and a message after any other error. Its ctx ends by SIGINT and SIGTERM.
func Main(name string, run func(ctx context.Context, args []string) error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	os.Exit(exitCode(name, err, os.Stderr))
}

func exitCode(name string, err error, stderr io.Writer) int {
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err.Error() != ErrMissed.Error() { // which the figures have told
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
	}
	if errors.Is(err, ErrMissed) {
		return 1
	}
	return 2
}

// Parse parses the arguments of a command that takes flags only.
func Parse(flags *flag.FlagSet, args []string) error {
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	return nil
}
