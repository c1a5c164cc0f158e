package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func newBase(env *environment) *cobra.Command {
	return group("base", "Make and keep base VMs", `A base VM is a booted guest, captured: disk, memory and device state, with a hash of every
page. Bases never change; an instance of one keeps its changes to itself.`,
		newBaseCreate(env), newBaseImport(env), newBaseExport(env), newBaseList(env), newBaseShow(env), newBaseVerify(env), newBaseRemove(env))
}

type baseCreate struct {
	env      *environment
	req      api.CreateBase
	memory   bytesFlag
	forwards forwardsFlag
	probe    probeFlag
	contains string
}

func newBaseCreate(env *environment) *cobra.Command {
	o := &baseCreate{env: env, memory: 1 << 30}
	cmd := &cobra.Command{
		Use:   "create DISK",
		Short: "Boot a disk image and capture the guest as a base",
		Long: `Boots a copy of DISK (raw or qcow2; the image itself is not changed), waits until the
guest is ready, and captures it. Ready is: --probe answers, --console text was shown,
--settle time has passed; with none of them, you say so by pressing Enter.`,
		Example: `  cloudlet base create disk.raw --kernel vmlinuz --initrd initrd --append console=ttyS0 \
      --memory 256M --probe 8080/healthz --name base
  cloudlet base create debian.qcow2 --memory 1G --console "login:" --settle 5s`,
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

func (o *baseCreate) addFlags(f *pflag.FlagSet) {
	f.StringVar(&o.req.Name, "name", "", "name of the base")
	f.StringVar(&o.req.Format, "format", "", "format of DISK: raw or qcow2 (default: look)")
	f.StringVar(&o.req.Kernel, "kernel", "", "kernel to boot, where DISK has no boot loader")
	f.StringVar(&o.req.Initrd, "initrd", "", "initial RAM disk for --kernel")
	f.StringVar(&o.req.Append, "append", "", "command line for --kernel")
	f.Var(&o.memory, "memory", "size of the guest's memory")
	f.IntVar(&o.req.CPUs, "cpus", 1, "number of the guest's CPUs")
	f.StringVar(&o.req.Accelerator, "accel", "auto", "accelerator: kvm, tcg, or auto")
	f.VarP(&o.forwards, "port", "p", "reach a port of the guest (ADDR: default 127.0.0.1)")
	f.Var(&o.probe, "probe", "capture when the application answers GET PATH on this port of the guest")
	f.StringVar(&o.contains, "probe-contains", "", "text that the answer to --probe must contain")
	f.StringVar(&o.req.Console, "console", "", "capture when the serial console has shown this text")
	f.DurationVar(&o.req.Settle, "settle", 0, "capture this much later")
	f.DurationVar(&o.req.Timeout, "timeout", 5*time.Minute, "how long to wait for --probe or --console")
}

func (o *baseCreate) check() error {
	if (o.req.Initrd != "" || o.req.Append != "") && o.req.Kernel == "" {
		return usageError{errors.New("--initrd and --append go with --kernel")}
	}
	if o.probe.Probe == nil && o.contains != "" {
		return usageError{errors.New("--probe-contains goes with --probe")}
	}
	if o.probe.Probe == nil && o.req.Console == "" && o.req.Settle == 0 && !o.env.terminal {
		return usageError{errors.New("say when the guest is ready: --probe, --console or --settle (without a terminal nobody can press Enter)")}
	}
	return nil
}

func (o *baseCreate) run(ctx context.Context, s *session, args []string) (err error) {
	o.req.Disk = args[0]
	for _, file := range []*string{&o.req.Disk, &o.req.Kernel, &o.req.Initrd} {
		if *file, err = s.path(*file); err != nil {
			return err
		}
	}
	o.req.Memory, o.req.Forwards, o.req.Probe = int64(o.memory), o.forwards, o.probe.Probe
	if o.req.Probe != nil {
		o.req.Probe.Contains = o.contains
	}
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	report, done := o.env.progress()
	tell, asked := show(report), false
	op, err := begin(ctx, func(ctx context.Context) (api.Operation, error) { return s.CreateBase(ctx, o.req) })
	if err == nil {
		op, err = s.Wait(ctx, op, func(op api.Operation) {
			tell(op)
			if op.State == api.OperationWaiting && !asked {
				asked = true
				go func() { // ends with the process if nobody presses a key
					if err := o.pressEnter(ctx, s, op); err != nil {
						giveUp(err)
					}
				}()
			}
		})
	}
	done()
	if err != nil {
		return err
	}
	b, err := client.Result[api.Base](op)
	if err != nil {
		return err
	}
	return o.env.print(b, func(w io.Writer) { fmt.Fprintln(w, b.ID) })
}

// pressEnter asks a person when the guest is ready, and tells the service.
func (o *baseCreate) pressEnter(ctx context.Context, s *session, op api.Operation) error {
	guest := op.ID
	if op.Target != nil && op.Target.Type == "instance" {
		guest = op.Target.ID
		in, err := s.Instance(ctx, guest)
		if err != nil {
			return err
		}
		for _, e := range in.Endpoints {
			fmt.Fprintf(o.env.stderr, "guest port %d is at %s\n", e.Guest, e.Address)
		}
	}
	fmt.Fprintln(o.env.stderr, "The guest is running. Press Enter to capture it, Ctrl-C to give up.")
	if _, err := bufio.NewReader(o.env.stdin).ReadString('\n'); err != nil {
		return err
	}
	_, err := s.Act(ctx, guest, api.ActionReady)
	return err
}

func newBaseImport(env *environment) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use: "import FILE", Short: "Take a base from a zip into the store, every page checked",
		Args: args(1),
		RunE: env.with(func(ctx context.Context, s *session, a []string) error {
			b, err := importBase(ctx, env, s, a[0], name)
			if err != nil {
				return err
			}
			return env.print(b, func(w io.Writer) { fmt.Fprintln(w, b.ID) })
		}),
	}
	cmd.Flags().StringVar(&name, "name", "", "name of the base")
	return cmd
}

// importBase lets the service read a file of this host, or sends it to another.
func importBase(ctx context.Context, env *environment, s *session, file, name string) (out api.Base, err error) {
	f, err := os.Open(file)
	if err != nil {
		return out, hostError(fmt.Errorf("import base: %w", err))
	}
	defer f.Close()
	if s.remote == "" {
		path, err := s.path(file)
		if err != nil {
			return out, err
		}
		return work[api.Base](ctx, env, s, func(ctx context.Context) (api.Operation, error) {
			return s.ImportBase(ctx, api.ImportBase{Name: name, Source: path})
		})
	}
	info, err := f.Stat()
	if err != nil {
		return out, err
	}
	report, done := env.progress()
	defer done()
	return s.SendBase(ctx, name, f, info.Size(), report)
}

func newBaseExport(env *environment) *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use: "export BASE", Short: "Write a base as a zip, to be imported elsewhere",
		Args: args(1),
		RunE: func(cmd *cobra.Command, a []string) error {
			if out == "" {
				return usageError{errors.New("say where to write with -o FILE")}
			}
			return env.with(func(ctx context.Context, s *session, a []string) error {
				f, err := newOutput(out)
				if err != nil {
					return err
				}
				report, done := env.progress()
				err = s.BasePackage(ctx, a[0], f, report)
				done()
				return f.finish(err)
			})(cmd, a)
		},
	}
	cmd.Flags().StringVarP(&out, "output", "o", "", "file to write")
	return cmd
}

func newBaseList(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the bases of the store", Args: args(0),
		RunE: env.with(func(ctx context.Context, s *session, _ []string) error {
			list, err := s.Bases(ctx)
			if err != nil {
				return err
			}
			return env.print(list, func(w io.Writer) {
				rows := [][]string{{"ID", "NAME", "MEMORY", "DISK", "STORED", "AGE"}}
				for _, b := range list {
					if b.Problem != "" {
						fmt.Fprintf(env.stderr, "base %s cannot be used: %s\n", short(b.ID), b.Problem)
					}
					rows = append(rows, []string{short(b.ID), b.Name, size(b.MemorySize), size(b.DiskSize), size(b.Stored), age(b.Created)})
				}
				table(w, rows)
			})
		}),
	}
}

func newBaseShow(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "show BASE", Aliases: []string{"inspect"}, Short: "Show what a base is and what uses it", Args: args(1),
		RunE: env.with(func(ctx context.Context, s *session, a []string) error {
			b, err := s.Base(ctx, a[0])
			if err != nil {
				return err
			}
			return env.print(b, func(w io.Writer) { showBase(w, b) })
		}),
	}
}

func showBase(w io.Writer, b api.Base) {
	rows := [][]string{{"id", b.ID}, {"name", b.Name}, {"created", b.Created.Format(time.RFC3339)},
		{"memory", size(b.MemorySize)}, {"disk", size(b.DiskSize)}, {"stored", size(b.Stored)},
		{"resumable", fmt.Sprint(b.Resumable)}, {"machine", string(b.Machine)}}
	for _, u := range b.UsedBy {
		rows = append(rows, []string{"used by", u})
	}
	table(w, rows)
}

func newBaseVerify(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "verify BASE", Short: "Read a whole base and check every page against its hash", Args: args(1),
		RunE: env.with(func(ctx context.Context, s *session, a []string) error {
			b, err := work[api.Base](ctx, env, s, func(ctx context.Context) (api.Operation, error) {
				return s.Verify(ctx, api.KindVerifyBase, a[0])
			})
			if err != nil {
				return err
			}
			return env.print(b, func(w io.Writer) { fmt.Fprintf(w, "base %s is whole\n", b.ID) })
		}),
	}
}

func newBaseRemove(env *environment) *cobra.Command {
	return &cobra.Command{
		Use: "rm BASE...", Aliases: []string{"remove", "delete"}, Short: "Remove bases that nothing uses", Args: someArgs,
		RunE: env.with(func(ctx context.Context, s *session, a []string) error {
			for _, ref := range a {
				if err := s.DeleteBase(ctx, ref); err != nil {
					return err
				}
			}
			return nil
		}),
	}
}
