package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"cloudlet/api"
	"cloudlet/integration/appguest"
	"cloudlet/integration/demoguest"
)

// walk uses the rest of the command line on the demo's guest, in a store of its own: the base
// exported and imported, the overlay imported, the launch VM customised once more and captured
// as a chain of two, and a base made of a qcow2 image. Every VM is verified wholly.
func (d *demo) walk(ctx context.Context) (err error) {
	if err := d.ClearRound(); err != nil {
		return err
	}
	zip, state, second := d.Path("round", "base.zip"), d.Path("round", "state"), d.Path("round", "second.overlay")
	there := func(v any, args ...string) error {
		return d.Cloudlet(ctx, v, append([]string{"--state", state}, args...)...)
	}
	d.Say("walk: export the base, import it and the overlay into another store")
	if err := d.Cloudlet(ctx, nil, "base", "export", d.Made.Base, "-o", zip); err != nil {
		return err
	}
	var base, qcow2 api.Base
	if err := errors.Join(there(&base, "base", "import", zip), os.Remove(zip), there(nil, "overlay", "import", d.Path("app.overlay"))); err != nil {
		return err
	}
	if base.ID != d.Made.Base {
		return fmt.Errorf("base %s came back as %s", d.Made.Base, base.ID)
	}
	d.Say("walk: resume the overlay there, customise it once more, capture the second overlay")
	const change = "head -c 16777216 /dev/urandom > /srv/second && sync && sha256sum /srv/second"
	first, err := d.inside(ctx, state, d.Made.Overlay, change, func(in api.Instance) error {
		var o api.CreatedOverlay
		if err := there(&o, "overlay", "create", in.ID, "-o", second); err != nil {
			return err
		}
		if o.Parent != d.Made.Overlay || o.Depth != 2 {
			return fmt.Errorf("the second overlay has parent %s at depth %d", o.Parent, o.Depth)
		}
		return nil
	})
	if err != nil {
		return err
	}
	d.Say("walk: resume the chain of two")
	again, err := d.inside(ctx, state, second, "sha256sum /srv/second", nil)
	if err != nil {
		return err
	}
	if first != again {
		return fmt.Errorf("the file written before the second capture was %s, and is %s", first, again)
	}
	d.Say("walk: a base of the same disk as qcow2")
	disk := d.Path("round", "disk.qcow2")
	if err := demoguest.Command(ctx, nil, nil, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", d.Guest.Disk, disk); err != nil {
		return err
	}
	err = there(&qcow2, "base", "create", disk, "--kernel", d.Guest.Kernel, "--initrd", d.Guest.Initrd, "--append", appguest.Append,
		"--memory", fmt.Sprintf("%dM", appguest.MemoryMiB), "--console", appguest.Ready, "--timeout", "15m", "--name", "qcow2")
	if err != nil {
		return err
	}
	if err := errors.Join(there(nil, "base", "verify", "qcow2"), d.ClearRound()); err != nil {
		return err
	}
	d.Say("walk: done")
	return nil
}

// inside resumes ref in a store, verifies the application, runs a line in the guest's shell,
// calls then, if not nil, and removes the instance. It returns the first word of the last line
// that the guest printed.
func (d *demo) inside(ctx context.Context, state, ref, line string, then func(api.Instance) error) (word string, err error) {
	var in api.Instance
	if err := d.Cloudlet(ctx, &in, "--state", state, "run", ref, "-p", fmt.Sprint(appguest.Port)); err != nil {
		return "", err
	}
	defer func() {
		err = errors.Join(err, d.Cloudlet(context.WithoutCancel(ctx), nil, "--state", state, "rm", "--force", in.ID))
	}()
	address := in.Endpoints[0].Address
	if _, err := demoguest.FirstAnswer(ctx, address, 1, d.Made.Token); err != nil {
		return "", err
	}
	if err := demoguest.Verify(ctx, address, d.Made.Token); err != nil {
		return "", err
	}
	c, err := appguest.OpenConsole(ctx, fmt.Sprintf("%s/instances/%s/vm/serial.sock", state, in.ID))
	if err != nil {
		return "", err
	}
	var said bytes.Buffer
	if err := errors.Join(c.Run(ctx, line, io.Writer(&said)), c.Close()); err != nil {
		return "", err
	}
	for _, l := range strings.Split(said.String(), "\n") {
		if f := strings.Fields(l); len(f) == 2 && len(f[0]) == 64 {
			word = f[0]
		}
	}
	if word == "" {
		return "", fmt.Errorf("the guest printed no hash: %q", said.String())
	}
	if then != nil {
		err = then(in)
	}
	return word, err
}
