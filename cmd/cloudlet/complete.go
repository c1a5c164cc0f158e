package main

import (
	"context"

	"cloudlet/api"

	"github.com/spf13/cobra"
)

// lister lists what the shell may complete an argument with.
type lister func(context.Context, *session) []string

func bases(ctx context.Context, s *session) (out []string) {
	list, _ := s.Bases(ctx) // nothing to offer where it fails
	for _, b := range list {
		out = append(out, nameOr(b.Name, short(b.ID)))
	}
	return out
}

func overlays(ctx context.Context, s *session) (out []string) {
	list, _ := s.Overlays(ctx)
	for _, o := range list {
		out = append(out, nameOr(o.Name, short(o.ID)))
	}
	return out
}

func living(ctx context.Context, s *session) []string { return instances(ctx, s, false) }

func everyInstance(ctx context.Context, s *session) []string { return instances(ctx, s, true) }

func instances(ctx context.Context, s *session, all bool) (out []string) {
	list, _ := s.Instances(ctx, all)
	for _, in := range list {
		out = append(out, nameOr(in.Name, in.ID))
	}
	return out
}

func everyOperation(ctx context.Context, s *session) []string {
	return operations(ctx, s, func(api.OperationState) bool { return true })
}

func working(ctx context.Context, s *session) []string {
	return operations(ctx, s, func(state api.OperationState) bool { return !state.Ended() })
}

func operations(ctx context.Context, s *session, which func(api.OperationState) bool) (out []string) {
	list, _ := s.Operations(ctx)
	for _, op := range list {
		if which(op.State) {
			out = append(out, op.ID)
		}
	}
	return out
}

func nameOr(name, id string) string {
	if name != "" {
		return name
	}
	return id
}

// complete offers names of the store in the shell, and files where files is set.
func complete(env *environment, files bool, listers ...lister) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		directive := cobra.ShellCompDirectiveNoFileComp
		if files {
			directive = cobra.ShellCompDirectiveDefault
		}
		s, err := env.dial(cmd.Context())
		if err != nil {
			return nil, directive
		}
		defer s.close(cmd.Context()) // nobody to tell of an error
		var out []string
		for _, l := range listers {
			out = append(out, l(cmd.Context(), s)...)
		}
		return out, directive
	}
}
