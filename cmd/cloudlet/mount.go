package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"cloudlet/api/service"
	"cloudlet/vmm"

	"github.com/spf13/cobra"
)

// The descriptors that a mount process inherits: on readyFD it tells the service that it
// serves, starterFD is the lock that it closes once it has its own.
const (
	readyFD   = 3
	starterFD = 4
)

func newMount(env *environment) *cobra.Command {
	var spec string
	var detach bool
	cmd := &cobra.Command{
		Use:   "mount REF DIR",
		Short: "Mount a launch image, to look at it",
		Long: `Mounts the launch image of REF (a base or an overlay) on the empty folder DIR, as the files
memory, disk and info.json, and serves it until Ctrl-C or umount. Look at it with cmp,
sha256sum, fdisk or qemu-img; nothing can be written to it. While a file is open, Ctrl-C
must be pressed twice.`,
		Example: "  mkdir m; cloudlet mount --detach app.overlay m\n  sha256sum m/memory; fdisk -l m/disk; umount m",
		Args: func(cmd *cobra.Command, a []string) error {
			if spec != "" {
				return args(0)(cmd, a)
			}
			return args(2)(cmd, a)
		},
		RunE: func(cmd *cobra.Command, a []string) error {
			if spec != "" {
				return mountForService(cmd.Context(), spec)
			}
			return env.withStore(func(ctx context.Context, s *service.Service, a []string) error {
				return mountForPerson(ctx, env, s, a[0], a[1], detach)
			})(cmd, a)
		},
	}
	cmd.Flags().BoolVarP(&detach, "detach", "d", false, "return once it is mounted, and serve in the background until umount")
	cmd.Flags().StringVar(&spec, "spec", "", "serve what the service wrote into this file")
	cmd.Flags().MarkHidden("spec")
	return cmd
}

func mountForPerson(ctx context.Context, env *environment, s *service.Service, ref, dir string, detach bool) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	if detach {
		return s.MountDetached(ctx, ref, dir)
	}
	spec, err := s.MountSpec(ctx, ref, dir)
	if err != nil {
		return err
	}
	stop := make(chan os.Signal, 2)
	signal.Notify(stop, os.Interrupt, syscall.SIGTERM)
	defer signal.Stop(stop)
	return service.ServeMount(context.WithoutCancel(ctx), spec, func() error {
		_, err := fmt.Fprintf(env.stderr, "image %s is at %s; Ctrl-C ends the mount\n", short(spec.Image), dir)
		return err
	}, stop, true, env.log())
}

// mountForService serves until the service, or SIGTERM while no VM uses it, ends it.
func mountForService(ctx context.Context, path string) error {
	signal.Ignore(os.Interrupt, syscall.SIGHUP, syscall.SIGPIPE)
	spec, err := service.ReadMountSpec(path)
	if err != nil {
		return err
	}
	stop := make(chan os.Signal, 2)
	signal.Notify(stop, syscall.SIGTERM)
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	ready := os.NewFile(readyFD, "ready")
	spec.Starter = os.NewFile(starterFD, "lock of the starter")
	syscall.CloseOnExec(readyFD)
	syscall.CloseOnExec(starterFD)
	return service.ServeMount(context.WithoutCancel(ctx), spec, func() error {
		_, err := ready.WriteString("ready\n")
		return errors.Join(err, ready.Close())
	}, stop, false, log)
}

func newLauncher(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "launcher DIR", Short: "Start QEMU as DIR says and stay its parent", Hidden: true, Args: args(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			if code := vmm.RunLauncher(cmd.Context(), a[0]); code != 0 {
				return fmt.Errorf("launcher ended with code %d", code)
			}
			return nil
		},
	}
}
