package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"cloudlet/api"
	"cloudlet/api/service"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// environment is what a command has of the world.
type environment struct {
	args           []string
	getenv         func(string) string
	stdin          io.Reader
	stdout, stderr io.Writer
	terminal       bool // stderr is one: progress may be drawn

	flags       *pflag.FlagSet // of every command
	state       string
	server      string // "" is the daemon of state, or this process
	tokenFile   string
	mountMemory bytesFlag
	cacheSize   bytesFlag
	json        bool
	vmm         string // what runs new VMs
	verbose     bool
}

// Exit codes. A script can tell with them what to do next.
const (
	exitOK          = 0
	exitError       = 1
	exitUsage       = 2
	exitNotFound    = 3
	exitConflict    = 4
	exitDamaged     = 5
	exitUnavailable = 6
	exitTimedOut    = 7
	exitInterrupted = 130
)

var exitCodes = map[api.Code]int{
	api.Invalid: exitUsage, api.NotFound: exitNotFound, api.Conflict: exitConflict, api.Damaged: exitDamaged,
	api.Unavailable: exitUnavailable, api.TimedOut: exitTimedOut, api.Cancelled: exitInterrupted, api.Internal: exitError,
}

// usageError is a command line that cannot be understood.
type usageError struct{ error }

func exitCode(err error) int {
	var usage usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &usage):
		return exitUsage
	}
	if code, ok := exitCodes[api.CodeOf(err)]; ok {
		return code
	}
	return exitError // of a service that knows more codes
}

// run runs one command line and returns its exit code.
func run(ctx context.Context, env *environment) int {
	root := newRoot(env)
	root.SetArgs(env.args)
	err := root.ExecuteContext(ctx)
	if err != nil {
		if ctx.Err() != nil && errors.Is(err, context.Canceled) {
			fmt.Fprintln(env.stderr, "cloudlet: interrupted")
			return exitInterrupted
		}
		env.fail(err)
	}
	return exitCode(err)
}

// fail prints an error: what, and what to do.
func (env *environment) fail(err error) {
	var e *api.Error
	if errors.As(err, &e) {
		whole := *e
		whole.Detail = strings.Replace(err.Error(), e.Error(), e.Detail, 1) // with what was added to e
		e = &whole
	}
	if e != nil && env.json {
		json.NewEncoder(env.stderr).Encode(e) // nothing is left to do if this fails
		return
	}
	if e != nil && e.Remedy != "" {
		fmt.Fprintf(env.stderr, "cloudlet: %s\n  remedy: %s\n", e.Detail, e.Remedy)
		return
	}
	fmt.Fprintf(env.stderr, "cloudlet: %v\n", err)
	var usage usageError
	if errors.As(err, &usage) {
		fmt.Fprintln(env.stderr, "  remedy: see --help of the command")
	}
}

func newRoot(env *environment) *cobra.Command {
	root := &cobra.Command{
		Use:   "cloudlet",
		Short: "VM synthesis: launch VMs from a base and a small overlay, lazily",
		Long: `cloudlet keeps base VMs (a booted guest: disk, memory, device state) and synthesises
launch VMs of a base and an overlay: the compressed difference that an installed and
running application makes. The guest resumes at once; its pages are merged, checked and
decoded when it touches them.

A first walk:
  cloudlet base create disk.raw --kernel vmlinuz --initrd initrd --memory 256M --probe 8080/healthz --name base
  cloudlet run base --name work -p 8080      resume the base; change the guest as you like
  cloudlet overlay create work -o app.overlay
  cloudlet run app.overlay --probe 8080/     synthesise: the application answers
  cloudlet ps; cloudlet stop work`,
		SilenceErrors: true, SilenceUsage: true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: false},
		Args:              func(*cobra.Command, []string) error { return nil },
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknown(cmd, args[0])
			}
			return cmd.Help()
		},
	}
	root.SetIn(env.stdin)
	root.SetOut(env.stdout)
	root.SetErr(env.stderr)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	flags := root.PersistentFlags()
	env.flags = flags
	flags.StringVar(&env.state, "state", defaultState(env), "folder of the store ($CLOUDLET_STATE)")
	env.mountMemory = service.DefaultMountMemory
	env.cacheSize = service.DefaultCacheLimit
	flags.Var(&env.cacheSize, "cache-size", "disk for what was fetched of overlays at URLs; 0 keeps nothing")
	flags.Var(&env.mountMemory, "mount-memory", "memory that a mount should stay below, beside its program and indexes; about half of it holds decoded frames")
	flags.StringVar(&env.vmm, "vmm", env.getenv("CLOUDLET_VMM"), "what runs new VMs: qemu, libvirt or libvirt:URI ($CLOUDLET_VMM)")
	flags.StringVar(&env.server, "server", env.getenv("CLOUDLET_SERVER"), "use the service at http(s)://HOST:PORT or unix:PATH ($CLOUDLET_SERVER)")
	flags.StringVar(&env.tokenFile, "token-file", env.getenv("CLOUDLET_TOKEN_FILE"), "file with the token for --server ($CLOUDLET_TOKEN_FILE)")
	flags.BoolVar(&env.json, "json", false, "print facts, and errors, as JSON")
	flags.BoolVarP(&env.verbose, "verbose", "v", false, "say more on standard error")
	root.AddCommand(
		newBase(env), newOverlay(env), newRun(env), newPS(env), newLogs(env), newRemove(env), newMount(env), newLauncher(env), newVersion(env), newDoctor(env), newServe(env), newOperations(env), newHandoff(env),
		newVerb(env, api.ActionPause, "Stop the CPUs of an instance"),
		newVerb(env, api.ActionContinue, "Let a paused instance run on"),
		newVerb(env, api.ActionReset, "Reset the guest of an instance: it boots anew"),
		newVerb(env, api.ActionStop, "End an instance; what it has changed is dropped"),
		newAbort(env),
	)
	for path, f := range map[string]cobra.CompletionFunc{
		"base export": complete(env, false, bases), "base show": complete(env, false, bases), "base verify": complete(env, false, bases),
		"base rm": complete(env, false, bases), "overlay create": complete(env, false, living), "overlay show": complete(env, true, overlays),
		"overlay verify": complete(env, true, overlays), "overlay profile": complete(env, true, overlays), "overlay rm": complete(env, false, overlays), "run": complete(env, true, bases, overlays),
		"mount": complete(env, true, bases, overlays), "pause": complete(env, false, living), "continue": complete(env, false, living),
		"reset": complete(env, false, living), "stop": complete(env, false, living), "abort": complete(env, false, living),
		"handoff": complete(env, false, living), "rm": complete(env, false, everyInstance), "logs": complete(env, false, everyInstance),
		"op show": complete(env, false, everyOperation), "op wait": complete(env, false, working), "op cancel": complete(env, false, working),
	} {
		cmd, _, err := root.Find(strings.Fields(path))
		if err != nil {
			panic(err) // a path of this table that is no command
		}
		cmd.ValidArgsFunction = f
	}
	return root
}

func defaultState(env *environment) string {
	if dir := env.getenv("CLOUDLET_STATE"); dir != "" {
		return dir
	}
	if os.Geteuid() == 0 {
		return "/var/lib/cloudlet"
	}
	if dir := env.getenv("XDG_STATE_HOME"); dir != "" {
		return filepath.Join(dir, "cloudlet")
	}
	return filepath.Join(env.getenv("HOME"), ".local", "state", "cloudlet")
}

// log returns where messages for people go.
func (env *environment) log() *slog.Logger {
	level := slog.LevelWarn
	if env.verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(env.stderr, &slog.HandlerOptions{Level: level}))
}

// print writes v as JSON if that is asked for, and otherwise by text.
func (env *environment) print(v any, text func(io.Writer)) error {
	if !env.json {
		text(env.stdout)
		return nil
	}
	enc := json.NewEncoder(env.stdout)
	enc.SetIndent("", " ")
	return enc.Encode(v)
}

// args demands n arguments; a wrong number is answered with the form of the command.
func args(n int) cobra.PositionalArgs { return argsFromTo(n, n) }

// someArgs demands at least one argument.
func someArgs(cmd *cobra.Command, have []string) error { return argsFromTo(1, 1<<20)(cmd, have) }

func argsFromTo(low, high int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, have []string) error {
		if len(have) >= low && len(have) <= high {
			return nil
		}
		return usageError{fmt.Errorf("%d arguments are given; the form is: %s", len(have), cmd.UseLine())}
	}
}

// unknown is the error of a command that does not exist, with the ones that were meant.
func unknown(cmd *cobra.Command, name string) error {
	text := fmt.Sprintf("unknown command %q for %q", name, cmd.CommandPath())
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(name); len(near) > 0 {
		text += ": did you mean " + strings.Join(near, " or ") + "?"
	}
	return usageError{errors.New(text)}
}

// group makes a command that only holds others.
func group(use, short, long string, sub ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long,
		Args: func(*cobra.Command, []string) error { return nil },
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknown(cmd, args[0])
			}
			return cmd.Help()
		},
	}
	cmd.AddCommand(sub...)
	return cmd
}
