package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"time"

	"cloudlet/api"
	"cloudlet/overlay"

	"github.com/spf13/cobra"
)

func newOverlay(env *environment) *cobra.Command {
	return group("overlay", "Make and keep overlays", `An overlay is what a launch VM holds that its parent does not: one compressed, immutable
file, a zip with a manifest that jq can read. Its id names its content, whatever the
compression; its digest names the file's bytes.`,
		newOverlayCreate(env), newOverlayImport(env), newOverlayList(env), newOverlayShow(env), newOverlayVerify(env), newOverlayProfile(env), newOverlayRemove(env))
}

func newOverlayCreate(env *environment) *cobra.Command {
	var req api.CreateOverlay
	var out string
	var probes probesFlag
	cmd := &cobra.Command{
		Use:   "create INSTANCE",
		Short: "Capture what a running instance has changed as an overlay",
		Long: `Captures memory, disk and device state of INSTANCE as the difference to the image that it
was resumed from, and puts the overlay into the store. The guest stands still for the
moments in which its changed memory is copied, then runs on.

First the guest lends free memory to its balloon for about a second, and gets it back: what stood
there is left out. Linux does so with its module virtio_balloon; its caches of files stay.

Strategies: balanced; fast, where somebody waits for the overlay; small, for slow links, which
takes minutes and the program xz; elijah, xdelta3 and LZMA as in the original system, by these
programs; none. Or one of them with changes, like
"balanced,codec=xz,frame=1M,delta=none,hot=16K,order=address,stride=no".
With level=19 the program zstd makes balanced 7 to 13 % smaller, in a minute or more, which is read
nearly as fast. Who uses an overlay needs none of these programs.`,
		Example: "  cloudlet overlay create work -o app.overlay\n  cloudlet overlay create work --strategy small --name app",
		Args:    args(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			req.Instance = a[0]
			return env.with(func(ctx context.Context, s *session, _ []string) error {
				return createOverlay(ctx, env, s, req, out, probes)
			})(cmd, a)
		},
	}
	cmd.Flags().StringVarP(&out, "output", "o", "", "also write the overlay to this file")
	cmd.Flags().Var(&probes, "profile", "then record the touch profile by a trial run until 3 seconds after this probe is answered, and repack; may be repeated")
	cmd.Flags().StringVar(&req.Name, "name", "", "name of the overlay in the store")
	cmd.Flags().StringVar(&req.Strategy, "strategy", "balanced", "how to encode")
	cmd.Flags().BoolVar(&req.KeepFree, "keep-free-memory", false, "leave the guest in peace: the overlay also holds what stands in memory that it does not use")
	return cmd
}

// createOverlay lets the service write a file of this host itself; from another host, and
// where the overlay is repacked first, it is copied out of the store.
func createOverlay(ctx context.Context, env *environment, s *session, req api.CreateOverlay, path string, probes probesFlag) (err error) {
	var file *output
	if path != "" && s.remote == "" && len(probes) == 0 {
		if req.Output, err = s.path(path); err != nil {
			return err
		}
	} else if path != "" {
		if file, err = newOutput(path); err != nil {
			return err
		}
	}
	o, err := work[api.CreatedOverlay](ctx, env, s, func(ctx context.Context) (api.Operation, error) { return s.CreateOverlay(ctx, req) })
	if err == nil && len(probes) > 0 {
		var p api.ProfiledOverlay
		if p, err = profileOverlay(ctx, env, s, api.Profile{Ref: o.ID, Probes: probes, Repack: true}); err == nil {
			o.Overlay = p.Overlay
		} else {
			err = fmt.Errorf("overlay %.12s is in the store, but without a profile: %w", o.ID, err)
		}
	}
	if file != nil {
		if err == nil {
			o.Output = file.path
			if err = s.OverlayContent(ctx, o.ID, file, nil); err != nil {
				err = fmt.Errorf("write %s (overlay %.12s is in the store): %w", file.path, o.ID, err)
			}
		}
		err = file.finish(err)
	}
	if err != nil {
		return err
	}
	fmt.Fprintf(env.stderr, "overlay of %s, made in %.2f s, without %s of free memory; the guest stood still for %.0f ms\n", size(o.Size), o.Took, size(o.Freed), 1000*o.Pause)
	if o.FreeKept != "" {
		fmt.Fprintf(env.stderr, "it holds free memory, too: %s\n", o.FreeKept)
	}
	for _, id := range o.Needs {
		fmt.Fprintf(env.stderr, "to run it, import its parent too, which is not in the store: overlay %s\n", id)
	}
	return env.print(o, func(w io.Writer) { fmt.Fprintln(w, o.ID) })
}

func newOverlayImport(env *environment) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use: "import FILE|URL", Short: "Take an overlay into the store, checked", Args: args(1),
		RunE: env.with(func(ctx context.Context, s *session, a []string) error {
			o, err := importOverlay(ctx, env, s, a[0], name)
			if err != nil {
				return err
			}
			return env.print(o, func(w io.Writer) { fmt.Fprintln(w, o.ID) })
		}),
	}
	cmd.Flags().StringVar(&name, "name", "", "name of the overlay")
	return cmd
}

// importOverlay lets the service read a URL or a file of this host, or sends it to another.
func importOverlay(ctx context.Context, env *environment, s *session, from, name string) (out api.Overlay, err error) {
	if !isURL(from) {
		f, err := os.Open(from)
		if err != nil {
			return out, hostError(fmt.Errorf("import overlay: %w", err))
		}
		defer f.Close()
		if s.remote != "" {
			info, err := f.Stat()
			if err != nil {
				return out, err
			}
			return follow[api.Overlay](ctx, env, s, func(report api.Progress) (api.Operation, error) {
				return s.SendOverlay(ctx, name, f, info.Size(), report)
			})
		}
		if from, err = s.path(from); err != nil {
			return out, err
		}
	}
	return work[api.Overlay](ctx, env, s, func(ctx context.Context) (api.Operation, error) {
		return s.ImportOverlay(ctx, api.ImportOverlay{Name: name, Source: from})
	})
}

func newOverlayList(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the overlays of the store", Args: args(0),
		RunE: env.with(func(ctx context.Context, s *session, _ []string) error {
			list, err := s.Overlays(ctx)
			if err != nil {
				return err
			}
			return env.print(list, func(w io.Writer) {
				rows := [][]string{{"ID", "NAME", "PARENT", "BASE", "DEPTH", "SIZE", "AGE"}}
				for _, o := range list {
					if o.Problem != "" {
						fmt.Fprintf(env.stderr, "overlay %s cannot be used: %s\n", short(o.ID), o.Problem)
					}
					rows = append(rows, []string{short(o.ID), o.Name, short(o.Parent), short(o.Base), fmt.Sprint(o.Depth), size(o.Size), age(o.Created)})
				}
				table(w, rows)
			})
		}),
	}
}

func newOverlayShow(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "show OVERLAY", Aliases: []string{"inspect"}, Short: "Show what an overlay (id, name, file or URL) holds", Args: args(1),
		RunE: env.with(func(ctx context.Context, s *session, a []string) error {
			ref, err := s.ref(ctx, a[0], s.isOverlay)
			if err != nil {
				return err
			}
			o, err := s.Overlay(ctx, ref)
			if err != nil {
				return err
			}
			var stats overlay.Stats
			var strategy overlay.Strategy
			if err := json.Unmarshal(o.Stats, &stats); err != nil {
				return err
			}
			if err := json.Unmarshal(o.Strategy, &strategy); err != nil {
				return err
			}
			return env.print(o, func(w io.Writer) { showOverlay(w, o, stats, strategy) })
		}),
	}
}

func showOverlay(w io.Writer, o api.Overlay, stats overlay.Stats, st overlay.Strategy) {
	rows := [][]string{{"id", o.ID}, {"digest", o.Digest}}
	if o.Name != "" {
		rows = append(rows, []string{"name", o.Name})
	}
	if !o.Created.IsZero() {
		rows = append(rows, []string{"created", o.Created.Format(time.RFC3339)})
	}
	table(w, append(rows, [][]string{
		{"parent", o.Parent}, {"base", o.Base}, {"depth", fmt.Sprint(o.Depth)}, {"size", size(o.Size)},
		{"memory, disk", size(o.MemorySize) + ", " + size(o.DiskSize)}, {"resumable", fmt.Sprint(o.Resumable)},
		{"strategy", fmt.Sprintf("%s: delta %s, codec %s, level %d, frames of %s, hot ones of %s, order %s, stride %t; by %s",
			st.Name, st.Delta, st.Codec, st.Level, size(int64(st.FrameSize)), size(int64(st.HotSize)), st.Order, st.Stride, st.Encoder)},
		{"frames", fmt.Sprintf("%d, %s", stats.Frames, size(stats.FrameBytes))}, {"machine", string(o.Machine)},
	}...))
	for _, u := range o.UsedBy {
		fmt.Fprintf(w, "used by  %s\n", u)
	}
	fmt.Fprintln(w)
	pages := [][]string{{"PAGES", "MODIFIED", "ZERO", "IN BASE", "IN PARENT", "REPEATED", "STORED"}}
	for _, p := range []struct {
		name string
		s    overlay.PageStats
	}{{"memory", stats.Memory}, {"disk", stats.Disk}} {
		row := []string{p.name}
		for _, n := range []int64{p.s.Modified, p.s.Zero, p.s.Base, p.s.Parent, p.s.Self, p.s.Stored} {
			row = append(row, fmt.Sprint(n))
		}
		pages = append(pages, row)
	}
	table(w, pages)
	if stored := stats.Memory.Stored + stats.Disk.Stored; stored > 0 {
		fmt.Fprintf(w, "\n%s of modified pages, %s after deduplication, %s encoded\n",
			size((stats.Memory.Modified+stats.Disk.Modified)*overlay.PageSize), size(stored*overlay.PageSize), size(stats.FrameBytes))
	}
}

func newOverlayVerify(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "verify OVERLAY", Short: "Check every byte of an overlay (id, name, file or URL)", Args: args(1),
		RunE: env.with(func(ctx context.Context, s *session, a []string) error {
			ref, err := s.ref(ctx, a[0], s.isOverlay)
			if err != nil {
				return err
			}
			v, err := work[api.VerifiedOverlay](ctx, env, s, func(ctx context.Context) (api.Operation, error) {
				return s.Verify(ctx, api.KindVerifyOverlay, ref)
			})
			if err != nil {
				return err
			}
			return env.print(v, func(w io.Writer) {
				if v.Pages {
					fmt.Fprintf(w, "overlay %s is whole: every page decoded and checked\n", v.ID)
				} else {
					fmt.Fprintf(w, "overlay %s has the right bytes; its pages cannot be checked without its base and parents, which are not in the store\n", v.ID)
				}
			})
		}),
	}
}

func newOverlayRemove(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "rm OVERLAY...", Aliases: []string{"remove", "delete"}, Short: "Remove overlays that nothing uses from the store", Args: someArgs,
		RunE: env.with(func(ctx context.Context, s *session, a []string) error {
			for _, ref := range a {
				if err := s.DeleteOverlay(ctx, ref); err != nil {
					return err
				}
			}
			return nil
		}),
	}
}
