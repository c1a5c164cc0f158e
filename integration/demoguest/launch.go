package demoguest

import (
	"context"
	"fmt"

	"cloudlet/api"
	"cloudlet/integration/figures"
)

// Launch is what an overlay is made of: the base with an application installed in it.
type Launch struct {
	Name   string // of the overlay in the store
	Output string // file that the overlay is also written to; may be empty
	Port   int    // of the guest, where the application answers

	// Customise installs and starts the application over the serial console.
	Customise func(ctx context.Context, serialSocket string) error
	// Check asks the application at its address on the host, before it is captured.
	Check func(ctx context.Context, address string) error
}

// MakeOverlay customises an instance of the base as a user does, and captures it. After an
// error, Close removes the instance.
func (l *Lab) MakeOverlay(ctx context.Context, v Launch) (o api.CreatedOverlay, err error) {
	var in api.Instance
	if err := l.Cloudlet(ctx, &in, "run", l.Made.Base, "-p", fmt.Sprint(v.Port)); err != nil {
		return o, err
	}
	if err := v.Customise(ctx, l.Path("state", "instances", in.ID, "vm", "serial.sock")); err != nil {
		return o, err
	}
	if err := v.Check(ctx, in.Endpoints[0].Address); err != nil {
		return o, err
	}
	l.Say("overlay: capture what has changed")
	args := []string{"overlay", "create", in.ID, "--name", v.Name}
	if v.Output != "" {
		args = append(args, "-o", v.Output)
	}
	if err := l.Cloudlet(ctx, &o, args...); err != nil {
		return o, err
	}
	l.Say("overlay: %.1f MiB in %.1f s; the guest stood still for %.0f ms", figures.MiB(o.Size), o.Took, 1000*o.Pause)
	return o, l.Cloudlet(ctx, nil, "rm", "--force", in.ID)
}

// Profile records the touch profile of an overlay by a trial run until the request PORT/PATH
// is answered, and packs the overlay by it.
func (l *Lab) Profile(ctx context.Context, overlay, request string) (o api.ProfiledOverlay, err error) {
	l.Say("profile: a trial run, then the overlay is packed by it")
	if err := l.Cloudlet(ctx, &o, "overlay", "profile", overlay, "--probe", request, "--fresh", "--repack"); err != nil {
		return o, err
	}
	l.Say("profile: %d pages of memory, %d of disk; the overlay has %.1f MiB", o.MemoryPages, o.DiskPages, figures.MiB(o.Size))
	return o, nil
}
