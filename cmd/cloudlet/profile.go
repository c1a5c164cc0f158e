package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"cloudlet/api"

	"github.com/spf13/cobra"
)

// probesFlag is a list of PORT/PATH.
type probesFlag []api.Probe

func (f *probesFlag) String() string { return "" }
func (f *probesFlag) Type() string   { return "PORT/PATH" }
func (f *probesFlag) Set(text string) error {
	var one probeFlag
	if err := one.Set(text); err != nil {
		return err
	}
	*f = append(*f, *one.Probe)
	return nil
}

func newOverlayProfile(env *environment) *cobra.Command {
	var req api.Profile
	var probes probesFlag
	cmd := &cobra.Command{
		Use:   "profile OVERLAY",
		Short: "Record by trial runs which pages the guest touches first",
		Long: `Resumes OVERLAY once for each probe, notes which pages the guest touches and in which order
until it answers and 3 seconds longer, and removes the instance. The touch profile is kept in
the store: later instances of the overlay get these pages before they ask for them. Give the
requests that users begin with.

With --repack the overlay in the store is also written anew, the pages of the profile first
and in small frames, which helps those who fetch it from afar. Its id stays the same.`,
		Example: "  cloudlet overlay profile app --probe 80/\n  cloudlet overlay profile app --probe 80/ --probe 80/search?q=x --repack",
		Args:    args(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			if len(probes) == 0 {
				return usageError{errors.New("a trial run ends with an answer: give --probe PORT/PATH")}
			}
			return env.with(func(ctx context.Context, s *session, _ []string) (err error) {
				if req.Ref, err = s.ref(ctx, a[0], s.isOverlay); err != nil {
					return err
				}
				req.Probes = probes
				p, err := profileOverlay(ctx, env, s, req)
				if err != nil {
					return err
				}
				return env.print(p, func(w io.Writer) {
					fmt.Fprintf(w, "profile of overlay %s: %d pages of memory, %d of disk\n", short(p.ID), p.MemoryPages, p.DiskPages)
				})
			})(cmd, a)
		},
	}
	cmd.Flags().Var(&probes, "probe", "request that the application answers; may be repeated")
	cmd.Flags().DurationVar(&req.Timeout, "timeout", time.Minute, "how long to wait for each answer")
	cmd.Flags().BoolVar(&req.Fresh, "fresh", false, "forget what earlier trials found")
	cmd.Flags().BoolVar(&req.Repack, "repack", false, "write the overlay anew, the pages of the profile first")
	cmd.Flags().StringVar(&req.Strategy, "strategy", "", "how to encode the repacked overlay (default: as it is)")
	return cmd
}

func profileOverlay(ctx context.Context, env *environment, s *session, req api.Profile) (api.ProfiledOverlay, error) {
	return work[api.ProfiledOverlay](ctx, env, s, func(ctx context.Context) (api.Operation, error) { return s.Profile(ctx, req) })
}
