package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Phases of the operation of a handoff: the states of the source, and doubt.
const (
	phaseMoved      = "moved"
	phaseDiscarding = "discarding"
	phaseAborting   = "aborting"
	phaseResuming   = "resuming"
	phaseDoubt      = "in doubt"
)

// cancelGrace is how long the end of a handoff that was cancelled is awaited, and lookGrace
// then what is said of it.
const (
	cancelGrace = time.Minute
	lookGrace   = 10 * time.Second
)

type handoffCommand struct {
	env       *environment
	req       api.HandOff
	tokenFile string
	detach    bool
	status    bool
	resolve   string
}

func newHandoff(env *environment) *cobra.Command {
	o := &handoffCommand{env: env}
	cmd := &cobra.Command{
		Use:   "handoff INSTANCE {--to URL | --status | --resolve DECISION}",
		Short: "Move a running instance to another cloudlet", Args: args(1),
		Long: `Moves an instance to the cloudlet at --to while its guest runs: what it has changed is sent
in rounds, then the guest is paused for the last of it and runs on over there, before all of
its memory has arrived. Both sides need a daemon, and the other one the same base. This one
must be reachable from there: cloudlet serve --listen HOST:PORT, or --advertise URL.

The other cloudlet wants a token of its tokens file, of the role peer or operate: in the file
of --to-token-file, or in $CLOUDLET_TO_TOKEN.

Ctrl-C cancels until the guest goes; until then, whatever fails, it runs on here. Once it may
have run there it is paused here until that is known. If it cannot be known, because the link
or the other cloudlet is gone for good, --status says what there is to lose, and --resolve
accepts that loss: resume-here lets the guest run on here as it was when it went, discard-here
gives up what is held here of a guest that ran there.`,
		Example: `  cloudlet handoff web --to http://10.0.0.2:7300 --to-token-file edge-2.token
  cloudlet handoff web --status
  cloudlet handoff web --resolve resume-here`,
		RunE: func(cmd *cobra.Command, a []string) error {
			if err := o.check(cmd.Flags()); err != nil {
				return err
			}
			return env.with(o.run)(cmd, a)
		},
	}
	o.addFlags(cmd.Flags())
	decisions := cobra.FixedCompletions([]string{string(api.ActionResumeHere), string(api.ActionDiscardHere)}, cobra.ShellCompDirectiveNoFileComp)
	if err := cmd.RegisterFlagCompletionFunc("resolve", decisions); err != nil {
		panic(err) // there is no such flag
	}
	return cmd
}

func (o *handoffCommand) addFlags(f *pflag.FlagSet) {
	f.StringVar(&o.req.To, "to", "", "the other cloudlet, http(s)://HOST:PORT")
	f.StringVar(&o.tokenFile, "to-token-file", "", "file with a token for --to ($CLOUDLET_TO_TOKEN holds one itself)")
	f.IntVar(&o.req.Rounds, "rounds", 4, "most rounds while the guest runs; 0: all is sent while it is paused")
	f.BoolVar(&o.req.KeepPorts, "keep-ports", false, "refuse to move unless the guest's ports are free over there, by the same numbers")
	f.BoolVar(&o.detach, "detach", false, "print the operation, and do not wait for its end")
	f.BoolVar(&o.status, "status", false, "say how the newest handoff of the instance stands")
	f.StringVar(&o.resolve, "resolve", "", "decide about one in doubt and accept the loss: resume-here or discard-here")
}

func (o *handoffCommand) check(f *pflag.FlagSet) error {
	switch {
	case o.req.To == "" && !o.status && o.resolve == "":
		return usageError{errors.New("one of --to, --status and --resolve is needed")}
	case o.status && o.resolve != "":
		return usageError{errors.New("--status and --resolve exclude one another")}
	case o.resolve != "" && o.resolve != string(api.ActionResumeHere) && o.resolve != string(api.ActionDiscardHere):
		return usageError{fmt.Errorf("--resolve %s: want %s or %s", o.resolve, api.ActionResumeHere, api.ActionDiscardHere)}
	case o.req.Rounds < 0:
		return usageError{errors.New("--rounds cannot be negative")}
	}
	if o.status || o.resolve != "" {
		for _, name := range []string{"to", "to-token-file", "rounds", "keep-ports", "detach"} {
			if f.Changed(name) {
				return usageError{fmt.Errorf("--%s begins a handoff; it does not go with --status and --resolve", name)}
			}
		}
	}
	return nil
}

func (o *handoffCommand) run(ctx context.Context, s *session, a []string) (err error) {
	if s.end != nil {
		return api.Errorf(api.Unavailable, "handoff works with a daemon only, and none runs on %s", o.env.state).
			Fix("start `cloudlet serve --listen HOST:PORT`, with an address at which the other cloudlet reaches this one")
	}
	switch {
	case o.status:
		h, err := s.Handoff(ctx, a[0])
		if err != nil {
			return err
		}
		return o.env.print(h, func(w io.Writer) { showHandoff(w, h) })
	case o.resolve != "":
		return o.decide(ctx, s, a[0])
	}
	if o.req.Token, err = o.token(); err != nil {
		return err
	}
	o.req.Instance = a[0]
	if o.req.Rounds == 0 {
		o.req.Rounds = -1 // 0 leaves the number to the service
	}
	op, err := begin(ctx, func(ctx context.Context) (api.Operation, error) { return s.HandOff(ctx, o.req) })
	if err != nil {
		return err
	}
	if o.detach {
		return o.env.print(op, func(w io.Writer) { fmt.Fprintln(w, op.ID) })
	}
	moved, err := o.follow(ctx, s, op)
	if err != nil {
		return err
	}
	return o.env.print(moved, func(w io.Writer) { showHandedOff(w, moved) })
}

// token is what the other cloudlet accepts, "" if none is given.
func (o *handoffCommand) token() (string, error) {
	if o.tokenFile == "" {
		return o.env.getenv("CLOUDLET_TO_TOKEN"), nil
	}
	if info, err := os.Stat(o.tokenFile); err == nil && info.Mode().Perm()&0o077 != 0 && !o.env.json {
		fmt.Fprintf(o.env.stderr, "cloudlet: others can read the token in %s\n  remedy: chmod 600 %s\n", o.tokenFile, o.tokenFile)
	}
	return readToken(o.tokenFile)
}

// decide ends a doubt. What that gives up is printed before.
func (o *handoffCommand) decide(ctx context.Context, s *session, ref string) error {
	h, err := s.Handoff(ctx, ref)
	if err != nil {
		return err
	}
	if h.Loss != "" && !o.env.json {
		fmt.Fprintln(o.env.stderr, "accepted:", h.Loss)
	}
	in, err := s.Act(ctx, ref, api.Action(o.resolve))
	if err != nil {
		return err
	}
	return o.env.print(struct {
		Loss string `json:"loss"`
		api.Instance
	}{h.Loss, in}, func(w io.Writer) { fmt.Fprintln(w, in.ID, in.State) })
}

// follow waits for the end of a handoff. If ctx ends first, the handoff is cancelled, unless it
// is too late for that.
func (o *handoffCommand) follow(ctx context.Context, s *session, op api.Operation) (api.HandedOff, error) {
	report, done := o.env.progress()
	doubt := false
	watch := func(now api.Operation) {
		if is := now.Phase == phaseDoubt && !now.State.Ended(); is != doubt {
			if doubt = is; is && !o.env.json {
				done() // or the line would be drawn over
				report, done = o.env.progress()
				fmt.Fprintf(o.env.stderr, "in doubt: %s\nIt is asked on. What can be done: cloudlet handoff %s --status\n", o.goesOn(now), o.req.Instance)
			}
		}
		show(report)(now)
	}
	watch(op)
	op, err := s.Follow(ctx, op, watch)
	done()
	if err != nil && ctx.Err() != nil {
		op, err = o.cancel(context.WithoutCancel(ctx), s, op, cancelGrace)
	}
	if err != nil {
		return api.HandedOff{}, err
	}
	return client.Result[api.HandedOff](op)
}

// cancel ends a handoff before go. One that had ended by then is returned.
func (o *handoffCommand) cancel(ctx context.Context, s *session, op api.Operation, grace time.Duration) (api.Operation, error) {
	bound, stop := context.WithTimeout(ctx, grace)
	now, err := s.CancelOperation(bound, op.ID)
	stop()
	ctx, stop = context.WithTimeout(ctx, lookGrace)
	defer stop()
	if api.CodeOf(err) == api.Conflict || errors.Is(err, context.DeadlineExceeded) { // the guest has gone, or all has ended; or the other side is slow to hear of it
		now, err = s.Operation(ctx, op.ID)
	}
	switch {
	case err != nil:
		return op, api.Errorf(api.CodeOf(err), "cancel the handoff of %s: %w", o.req.Instance, err).Fix("see what became of it: cloudlet handoff %s --status", o.req.Instance)
	case now.State == api.OperationCancelled:
		how := "runs on"
		if in, err := s.Instance(ctx, o.req.Instance); err == nil && in.State != api.Running {
			how = "is " + string(in.State)
		}
		return op, api.Errorf(api.Cancelled, "the handoff of %s was cancelled: the guest %s here", o.req.Instance, how)
	case !now.State.Ended() && now.Phase == phaseAborting:
		return op, api.Errorf(api.Cancelled, "the handoff of %s was cancelled: %s", o.req.Instance, o.goesOn(now)).
			Fix("nothing need be done; it ends by itself when the other side does not answer")
	case !now.State.Ended():
		return op, api.Errorf(api.Cancelled, "it is too late to cancel the handoff of %s, which goes on: %s", o.req.Instance, o.goesOn(now)).
			Fix("see how it stands with cloudlet handoff %s --status, or wait with cloudlet op wait %s", o.req.Instance, op.ID)
	}
	return now, nil
}

// goesOn says what a handoff does that cannot be cancelled any more.
func (o *handoffCommand) goesOn(op api.Operation) string {
	switch op.Phase {
	case phaseMoved:
		return "the guest runs at " + o.req.To + ", and the rest of its pages is brought there"
	case phaseDiscarding:
		return "the guest runs at " + o.req.To + ", and what is left of it here is removed"
	case phaseAborting:
		return "the guest stays here, and the other side is being told"
	case phaseResuming:
		return "it was decided that the guest runs on here, and the other side is being told"
	case phaseDoubt:
		return "it is not known whether the guest runs at " + o.req.To + "; here it is paused"
	}
	return "the guest has been told to run at " + o.req.To + "; here it is paused"
}

// showHandedOff writes where an instance is now, and what that took.
func showHandedOff(w io.Writer, m api.HandedOff) {
	fmt.Fprintf(w, "instance %s at %s\n", m.Instance, m.To)
	showEndpoints(w, m.Endpoints)
	showRounds(w, m.Rounds)
	fmt.Fprintf(w, "%s in %s, the guest stood still for %s\n", size(m.Bytes), seconds(m.Took), seconds(m.Pause))
}

func showEndpoints(w io.Writer, list []api.Endpoint) {
	for _, e := range list {
		fmt.Fprintf(w, "guest port %d is at %s\n", e.Guest, e.Address)
	}
}

func showRounds(w io.Writer, list []api.HandoffRound) {
	if len(list) == 0 {
		return
	}
	rows := [][]string{{"ROUND", "CHANGED", "OVERLAY", "MADE IN", "SENT IN", "PAUSE"}}
	for i, r := range list {
		rows = append(rows, []string{strconv.Itoa(i + 1), size(r.Dirty), size(r.Bytes), seconds(r.Made), seconds(r.Sent), seconds(r.Pause)})
	}
	table(w, rows)
}

// seconds writes a time for people.
func seconds(s float64) string {
	if s < 1 {
		return fmt.Sprintf("%.0f ms", 1000*s)
	}
	return fmt.Sprintf("%.2f s", s)
}

// showHandoff writes how a handoff stands.
func showHandoff(w io.Writer, h api.Handoff) {
	rows := [][2]string{{"handoff", h.ID}, {"side", string(h.Side)}, {"instance", h.Instance}, {"peer", h.Peer}, {"state", h.State}, {"theirs", h.Theirs},
		{"lineage", h.Lineage}, {"epoch", strconv.FormatUint(h.Epoch, 10)}, {"operation", h.Operation}, {"begun", h.Created.Format(time.RFC3339)}}
	if h.Bytes > 0 {
		rows = append(rows, [2]string{"published", size(h.Bytes)}, [2]string{"missing", size(h.Missing) + " of it are not there yet"})
	}
	if h.Pause > 0 {
		rows = append(rows, [2]string{"pause", seconds(h.Pause)})
	}
	rows = append(rows, [2]string{"rounds", h.Why}, [2]string{"stuck", h.Stuck})
	if h.InDoubt {
		rows = append(rows, [2]string{"in doubt", "it is not known whether the guest runs at " + h.Peer + "; here it is paused"})
	}
	if rows = append(rows, [2]string{"loss", h.Loss}); h.Loss != "" {
		how := string(api.ActionResumeHere)
		if h.State == phaseMoved {
			how += " or " + string(api.ActionDiscardHere)
		}
		rows = append(rows, [2]string{"remedy", fmt.Sprintf("wait until the other side answers, or accept the loss: cloudlet handoff %s --resolve %s", h.Instance, how)})
	}
	for _, row := range rows {
		if row[1] != "" {
			fmt.Fprintf(w, "%-10s%s\n", row[0], row[1])
		}
	}
	for _, r := range h.Reasons {
		fmt.Fprintf(w, "%-10s%s\n", "reason", strings.TrimPrefix(r.Field+": "+r.Text, ": "))
		if r.Remedy != "" {
			fmt.Fprintf(w, "%-10s%s\n", "remedy", r.Remedy)
		}
	}
	showEndpoints(w, h.Endpoints)
	showRounds(w, h.Rounds)
}

// reason is why an instance is in its state, with where it went or that it is about to go.
func reason(in api.Instance) string {
	if in.Moved != nil {
		return fmt.Sprintf("it was handed off to %s, where it is %s", in.Moved.To, in.Moved.Instance)
	}
	return in.Reason
}
