package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"cloudlet/api"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

type runCommand struct {
	env      *environment
	req      api.Run
	forwards forwardsFlag
	probe    probeFlag
	status   int
	contains string
}

func newRun(env *environment) *cobra.Command {
	o := &runCommand{env: env}
	cmd := &cobra.Command{
		Use: "run REF", Aliases: []string{"synth"},
		Short: "Synthesise: resume an instance of a base or an overlay",
		Long: `Makes an instance of REF: a base or an overlay by id, the beginning of an id, or name; an
overlay also by file or URL, without importing it. The launch image is mounted and QEMU
resumes at once; pages are decoded when the guest touches them. Instances of one image
share the mount. The instance outlives the command.

With --probe the command waits until the application has given its first right answer,
and prints the time line.`,
		Example: `  cloudlet run base -p 8080
  cloudlet run app.overlay -p 127.0.0.1:8080:80 --probe 80/healthz
  cloudlet run https://example.org/app.overlay --probe 8080/ --json`,
		Args: args(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			if err := o.check(); err != nil {
				return err
			}
			return env.with(o.run)(cmd, a)
		},
	}
	o.addFlags(cmd.Flags())
	return cmd
}

func (o *runCommand) addFlags(f *pflag.FlagSet) {
	f.StringVar(&o.req.Name, "name", "", "name of the instance")
	f.VarP(&o.forwards, "port", "p", "reach a port of the guest (ADDR: default 127.0.0.1; HOST: default a free one)")
	f.Var(&o.probe, "probe", "wait until the application answers GET PATH on this port of the guest")
	f.IntVar(&o.status, "probe-status", 0, "status that the right answer has (default: any below 400)")
	f.StringVar(&o.contains, "probe-contains", "", "text that the right answer contains")
	f.DurationVar(&o.req.Timeout, "timeout", time.Minute, "how long to wait for the probe")
	f.BoolVar(&o.req.Keep, "keep", false, "keep the instance if the probe is not answered")
	f.StringVar((*string)(&o.req.Prefetch), "prefetch", "", "give the guest pages before it asks: none, overlay (all it holds of memory) or profile (default: profile if there is one, else overlay)")
	f.BoolVar(&o.req.Record, "record", false, "keep which pages the guest touches until the probe is answered, and for 3 seconds more, as the image's profile")
	f.BoolVar(&o.req.Paused, "paused", false, "resume without letting the guest run")
}

func (o *runCommand) check() error {
	if o.probe.Probe == nil && (o.status != 0 || o.contains != "") {
		return usageError{errors.New("--probe-status and --probe-contains go with --probe")}
	}
	if o.probe.Probe == nil && o.req.Keep {
		return usageError{errors.New("--keep goes with --probe, without which nothing is removed")}
	}
	if o.probe.Probe == nil && o.req.Record {
		return usageError{errors.New("--record goes with --probe, whose answer ends the touch profile")}
	}
	if o.probe.Probe != nil && o.req.Paused {
		return usageError{errors.New("--probe and --paused exclude one another: a paused guest does not answer")}
	}
	return nil
}

func (o *runCommand) run(ctx context.Context, s *session, args []string) (err error) {
	if o.req.Ref, err = s.ref(ctx, args[0], s.isBase, s.isOverlay); err != nil {
		return err
	}
	o.req.Forwards, o.req.Probe = o.forwards, o.probe.Probe
	if o.req.Probe != nil {
		o.req.Probe.Status, o.req.Probe.Contains = o.status, o.contains
	}
	in, err := work[api.Instance](ctx, o.env, s, func(ctx context.Context) (api.Operation, error) { return s.Run(ctx, o.req) })
	if err != nil {
		return err
	}
	return o.env.print(in, func(w io.Writer) {
		fmt.Fprintln(w, in.ID)
		for _, e := range in.Endpoints {
			fmt.Fprintf(o.env.stderr, "guest port %d is at %s\n", e.Guest, e.Address)
		}
		fmt.Fprintln(o.env.stderr, timeLine(in.Timeline))
	})
}

// timeLine writes events as one line of milliseconds since the request.
func timeLine(events []api.Event) string {
	var parts []string
	for _, e := range events {
		parts = append(parts, fmt.Sprintf("%s %.0f ms", e.Name, 1000*e.Seconds))
	}
	return strings.Join(parts, " · ")
}

func newPS(env *environment) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use: "ps", Aliases: []string{"list"}, Short: "List instances", Args: args(0),
		Long: "Lists the living instances, with --all also those that have ended, and why, or where they went.",
		RunE: env.with(func(ctx context.Context, s *session, _ []string) error {
			list, err := s.Instances(ctx, all)
			if err != nil {
				return err
			}
			return env.print(list, func(w io.Writer) {
				rows := [][]string{{"ID", "NAME", "IMAGE", "STATE", "AGE", "PORTS", "REASON"}}
				for _, in := range list {
					var ports []string
					for _, e := range in.Endpoints {
						ports = append(ports, fmt.Sprintf("%s->%d", e.Address, e.Guest))
					}
					rows = append(rows, []string{in.ID, in.Name, short(in.Image), string(in.State), age(in.Created), strings.Join(ports, ","), reason(in)})
				}
				table(w, rows)
			})
		}),
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "also instances that have ended")
	return cmd
}

// newVerb makes a command that does one thing to instances.
func newVerb(env *environment, action api.Action, short string) *cobra.Command {
	return &cobra.Command{
		Use: string(action) + " INSTANCE...", Short: short, Args: someArgs,
		RunE: env.with(func(ctx context.Context, s *session, a []string) error {
			for _, ref := range a {
				in, err := s.Act(ctx, ref, action)
				if err != nil {
					return err
				}
				if err := env.print(in, func(w io.Writer) { fmt.Fprintln(w, in.ID, in.State) }); err != nil {
					return err
				}
			}
			return nil
		}),
	}
}

func newAbort(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "abort INSTANCE", Short: "Give up on pages that an instance waits for; its guest will die", Args: args(1),
		Long: `When the source of an overlay is away, the guest waits for its pages. This ends the wait:
its disk reads fail, and a guest that waits for memory is killed. All instances of the same
image share the mount and this fate.`,
		RunE: env.with(func(ctx context.Context, s *session, a []string) error {
			_, err := s.Act(ctx, a[0], api.ActionAbort)
			return err
		}),
	}
}

func newRemove(env *environment) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "rm INSTANCE...", Aliases: []string{"remove"}, Short: "Remove instances that have ended", Args: someArgs,
		RunE: env.with(func(ctx context.Context, s *session, a []string) error {
			for _, ref := range a {
				if err := s.DeleteInstance(ctx, ref, force); err != nil {
					return err
				}
			}
			return nil
		}),
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "stop them first")
	return cmd
}

func newLogs(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "logs INSTANCE", Short: "Print the serial console of an instance", Args: args(1),
		RunE: env.with(func(ctx context.Context, s *session, a []string) error {
			return s.Log(ctx, a[0], env.stdout)
		}),
	}
}

func newVersion(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version of this program and of its formats", Args: args(0),
		RunE: func(*cobra.Command, []string) error {
			v := version()
			return env.print(v, func(w io.Writer) {
				fmt.Fprintf(w, "cloudlet %s (%s), overlay format %d\n", v.Version, v.Go, v.OverlayFormat)
			})
		},
	}
}
