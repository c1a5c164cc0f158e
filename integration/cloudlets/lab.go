package cloudlets

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"
	"cloudlet/integration/guest"

	"golang.org/x/sys/unix"
)

// Options say what a Lab is.
type Options struct {
	Program   string   // path of the program under test
	GuestDir  string   // folder of the test guest, which is built if missing
	Dir       string   // folder to work in; a base that was made is kept in it
	Store     string   // folder of a store whose bases the cloudlets get; "": a base is made
	Count     int      // of cloudlets, named a, b, c and so on
	MemoryMiB int      // of a base that is made, in MiB; 0: guest.MemoryMiB
	Network   Network  // between cloudlets
	Disk      int64    // bytes of a disk, in memory, of each cloudlet's own; 0: all share that of Dir
	Serve     []string // more arguments of each `cloudlet serve`
	// ServeEach, if not nil, returns more arguments of one cloudlet's.
	ServeEach func(c *Cloudlet) ([]string, error)
	Log       io.Writer
}

// Lab is several cloudlets that run. Close it.
type Lab struct {
	Options
	Cloudlets []*Cloudlet
	Base      string // id of the base that all have; empty with Options.Store

	begin   time.Time
	network *network
}

// Open makes a lab: the base, the network, the stores, the daemons. It ends what an earlier
// run left in the folder.
func Open(ctx context.Context, o Options) (_ *Lab, err error) {
	l := &Lab{Options: o, begin: time.Now()}
	if l.Log == nil {
		l.Log = io.Discard
	}
	if l.MemoryMiB == 0 {
		l.MemoryMiB = guest.MemoryMiB
	}
	if o.Count < 1 || o.Count > 26 {
		return nil, fmt.Errorf("a lab of %d cloudlets: make it 1 to 26", o.Count)
	}
	for _, p := range []*string{&l.Program, &l.GuestDir, &l.Dir} {
		if *p, err = filepath.Abs(*p); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(l.Dir, 0o755); err != nil {
		return nil, err
	}
	for i := range l.Count {
		c, err := l.cloudlet(i)
		if err != nil {
			return nil, err
		}
		l.Cloudlets = append(l.Cloudlets, c)
	}
	if err := l.clear(ctx); err != nil {
		return nil, fmt.Errorf("clear %s of what an earlier run left: %w", l.Dir, err)
	}
	store := o.Store
	if store == "" {
		if store, err = l.makeBase(ctx); err != nil {
			return nil, err
		}
	}
	if l.network, err = wire(l.Network, l.Count); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close(context.WithoutCancel(ctx)))
		}
	}()
	for i, c := range l.Cloudlets {
		c.net = l.network.nodes[i]
		if err := c.prepare(ctx, store); err != nil {
			return nil, err
		}
		if err := c.Start(ctx); err != nil {
			return nil, err
		}
	}
	return l, nil
}

// Say writes a line with the time since Open to Options.Log.
func (l *Lab) Say(format string, args ...any) {
	fmt.Fprintf(l.Log, "%6.1f s  %s\n", time.Since(l.begin).Seconds(), fmt.Sprintf(format, args...))
}

// clear ends and removes what was left of the cloudlets' stores.
func (l *Lab) clear(ctx context.Context) error {
	var err error
	for _, c := range l.Cloudlets {
		if _, serr := os.Stat(c.State); serr == nil {
			err = errors.Join(err, sweep(ctx, l.Program, c.State))
			if uerr := unix.Unmount(c.State, unix.MNT_DETACH); uerr != nil && !errors.Is(uerr, unix.EINVAL) { // it is no mount
				err = errors.Join(err, uerr)
			}
			err = errors.Join(err, os.RemoveAll(c.State))
		}
	}
	return err
}

// Close removes all instances, ends the daemons, and removes stores and network. Its error
// names processes, mounts and files that were left; they are gone, too.
func (l *Lab) Close(ctx context.Context) error {
	errs := make([]error, len(l.Cloudlets))
	var wait sync.WaitGroup
	for i, c := range l.Cloudlets {
		wait.Go(func() { errs[i] = c.close(ctx) })
	}
	wait.Wait()
	return errors.Join(slices.Concat(errs, []error{l.clear(ctx), l.network.close()})...)
}

// Cut cuts the link between two cloudlets, or mends it. It is safe for concurrent use.
func (l *Lab) Cut(a, b *Cloudlet, cut bool) error {
	between := l.network.links[[2]int{min(a.index, b.index), max(a.index, b.index)}]
	if between == nil {
		return fmt.Errorf("there is no link between %s and %s: set Network.Cuttable", a.Name, b.Name)
	}
	between.Cut(cut)
	return nil
}

// Carried returns how many bytes cloudlets have sent each other, headers included. It is safe
// for concurrent use.
func (l *Lab) Carried() (int64, error) { return l.network.carried() }

// Dial connects from the clients' namespace to an IP address. It is safe for concurrent use.
func (l *Lab) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return l.network.dial(ctx, network, address)
}

// Remote returns a client of a cloudlet's API over TCP, from the clients' namespace.
func (l *Lab) Remote(c *Cloudlet) (*client.Client, error) {
	return client.New(client.Options{Server: c.URL, Token: c.Token, Transport: &http.Transport{DialContext: l.Dial}})
}

// Application makes the overlay of an application at a cloudlet: the base's, after it has
// worked. prepare is given the instance's address. It returns the overlay's id.
func (l *Lab) Application(ctx context.Context, c *Cloudlet, prepare func(address string) error) (id string, err error) {
	base := l.Base
	if base == "" {
		list, err := c.Client.Bases(ctx)
		if err != nil {
			return "", err
		}
		if len(list) != 1 {
			return "", fmt.Errorf("cloudlet %s has %d bases, want one", c.Name, len(list))
		}
		base = list[0].ID
	}
	in, err := c.Run(ctx, base)
	if err != nil {
		return "", err
	}
	defer func() {
		err = errors.Join(err, c.Client.DeleteInstance(context.WithoutCancel(ctx), in.ID, true))
	}()
	if err := prepare(c.Address(in)); err != nil {
		return "", err
	}
	var o api.CreatedOverlay
	if err := c.CLI(ctx, &o, "overlay", "create", in.ID, "--name", "app"); err != nil {
		return "", err
	}
	return o.ID, nil
}
