// Command cloudlet makes base VMs and overlays, and synthesises launch VMs of them.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"cloudlet/vmm"

	"golang.org/x/term"
)

func main() {
	if vmm.IsEmulator(os.Args[0]) {
		os.Exit(vmm.RunEmulator(os.Args))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, &environment{
		args: os.Args[1:], getenv: os.Getenv, stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr,
		terminal: term.IsTerminal(int(os.Stderr.Fd())),
	})
	stop()
	os.Exit(code)
}
