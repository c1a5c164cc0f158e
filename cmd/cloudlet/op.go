package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"

	"github.com/spf13/cobra"
)

func newOperations(env *environment) *cobra.Command {
	return group("op", "Look at operations: work that goes on, or has ended", `Each command that takes its time is an operation of the service. It goes on when its command
is killed, as long as the daemon lives, and can be found here; it is kept for a while when it has ended.`,
		&cobra.Command{
			Use: "list", Aliases: []string{"ls"}, Short: "List operations", Args: args(0),
			RunE: env.with(func(ctx context.Context, s *session, _ []string) error {
				list, err := s.Operations(ctx)
				if err != nil {
					return err
				}
				return env.print(list, func(w io.Writer) {
					rows := [][]string{{"ID", "KIND", "STATE", "PHASE", "DONE", "TARGET", "AGE", "ERROR"}}
					for _, op := range list {
						rows = append(rows, []string{op.ID, string(op.Kind), string(op.State), op.Phase, howFar(op), target(op), age(op.Created), problem(op)})
					}
					table(w, rows)
				})
			}),
		},
		&cobra.Command{
			Use: "show OPERATION", Short: "Show what an operation does and how far it is", Args: args(1),
			RunE: env.with(func(ctx context.Context, s *session, a []string) error {
				op, err := s.Operation(ctx, a[0])
				if err != nil {
					return err
				}
				return env.print(op, func(w io.Writer) { showOperation(w, op) })
			}),
		},
		&cobra.Command{
			Use: "wait OPERATION", Short: "Wait for the end of an operation", Args: args(1),
			Long: "Waits for the end of an operation, and ends as the command that began it would have. Ctrl-C\nends the wait, not the operation.",
			RunE: env.with(func(ctx context.Context, s *session, a []string) error {
				op, err := s.Operation(ctx, a[0])
				if err != nil {
					return err
				}
				report, done := env.progress()
				op, err = s.Follow(ctx, op, show(report))
				done()
				if err != nil {
					return err
				}
				if _, err := client.Result[any](op); err != nil {
					return err
				}
				return env.print(op, func(w io.Writer) { fmt.Fprintln(w, op.ID, op.State) })
			}),
		},
		&cobra.Command{
			Use: "cancel OPERATION...", Short: "Cancel operations, and wait until what they did is undone", Args: someArgs,
			RunE: env.with(func(ctx context.Context, s *session, a []string) error {
				for _, id := range a {
					op, err := s.CancelOperation(ctx, id)
					if err != nil {
						return err
					}
					if err := env.print(op, func(w io.Writer) { fmt.Fprintln(w, op.ID, op.State) }); err != nil {
						return err
					}
				}
				return nil
			}),
		},
	)
}

func howFar(op api.Operation) string {
	switch {
	case op.Done == 0 && op.Total == 0:
		return ""
	case op.Total == 0:
		return size(op.Done)
	}
	return size(op.Done) + " of " + size(op.Total)
}

func target(op api.Operation) string {
	if op.Target == nil {
		return ""
	}
	return op.Target.Type + " " + short(op.Target.ID)
}

func problem(op api.Operation) string {
	if op.Error == nil {
		return ""
	}
	return op.Error.Error()
}

func showOperation(w io.Writer, op api.Operation) {
	rows := [][]string{{"id", op.ID}, {"kind", string(op.Kind)}, {"state", string(op.State)}, {"phase", op.Phase}, {"done", howFar(op)},
		{"target", target(op)}, {"created", op.Created.Format(time.RFC3339)}, {"request", string(op.Request)}}
	if op.State.Ended() {
		rows = append(rows, []string{"ended", op.Ended.Format(time.RFC3339)}, []string{"error", problem(op)}, []string{"result", string(op.Result)})
	}
	for _, row := range rows {
		if row[1] != "" {
			fmt.Fprintf(w, "%-9s%s\n", row[0], row[1])
		}
	}
}
