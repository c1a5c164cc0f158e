package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"time"

	"cloudlet/api"
	"cloudlet/overlay"
	"cloudlet/vmm"

	"golang.org/x/sys/unix"
)

// eventFirstAnswer is the event of the first right answer to the probe.
const eventFirstAnswer = "first answer"

// timeline collects the steps of a synthesis.
type timeline struct {
	start  time.Time
	events []api.Event
	report api.Progress
}

func (t *timeline) mark(name string) {
	t.events = append(t.events, api.Event{Name: name, Seconds: time.Since(t.start).Seconds()})
	if t.report != nil {
		t.report(name, 0, 0)
	}
}

// synthesis is a run that has been looked through.
type synthesis struct {
	id       string // of the instance
	req      api.Run
	forwards []vmm.Forward
	base     string // id; "": an overlay
	at       location
	t        *timeline

	// fits is asked whether the guest's memory can be had, where that is known late.
	fits func(ctx context.Context, memory int64) error

	resumable bool // the next daemon can wait on for the first answer

	// Of an image in the store; one at a URL is opened by the work.
	image   *launchImage
	machine vmm.Machine
	raw     json.RawMessage
}

func (j *synthesis) close() error {
	if j.image == nil {
		return nil
	}
	return j.image.close()
}

// newSynthesis checks a request for an instance and opens the image, unless it is at a URL.
func (s *Service) newSynthesis(ctx context.Context, caller Caller, req api.Run, t *timeline) (*synthesis, error) {
	if err := errors.Join(s.checkName(req.Name), s.checkInstanceName(req.Name), checkProbe(req.Probe), checkTime("timeout", req.Timeout)); err != nil {
		return nil, err
	}
	switch req.Prefetch {
	case api.PrefetchAuto, api.PrefetchNone, api.PrefetchOverlay, api.PrefetchProfile:
	default:
		return nil, invalid("prefetch", "prefetch %.50q is not known", req.Prefetch).Fix("use %s, %s or %s, or leave it out", api.PrefetchNone, api.PrefetchOverlay, api.PrefetchProfile)
	}
	if req.Record && req.Probe == nil {
		return nil, invalid("record", "a touch profile ends with the answer to a probe").Fix("give a probe as well")
	}
	if req.Probe != nil && req.Paused {
		return nil, invalid("paused", "a paused guest does not answer the probe").Fix("leave out one of the two")
	}
	forwards, err := checkForwards(req.Forwards, req.Probe)
	if err != nil {
		return nil, err
	}
	j := &synthesis{id: newID(), req: req, forwards: forwards, t: t}
	if req.Base != "" {
		if _, err := s.findBase(req.Base); err != nil {
			return nil, err
		}
	}
	if j.base, j.at, err = s.findLaunchFor(caller, req.Ref); err != nil {
		return nil, err
	}
	if isRemote(j.at.source) || j.at.upload > 0 {
		return j, nil
	}
	return j, s.openSynthesis(ctx, j)
}

// openSynthesis opens the image and sees that this host can resume it.
func (s *Service) openSynthesis(ctx context.Context, j *synthesis) (err error) {
	if j.image, err = s.openFound(ctx, j.base, j.at); err != nil {
		j.image = nil
		return err
	}
	if err = s.checkBase(j); err == nil {
		j.machine, j.raw, err = s.machineOf(ctx, j.image)
	}
	if err != nil {
		err = errors.Join(err, j.close())
		j.image = nil
		return err
	}
	j.t.mark("opened")
	return nil
}

// checkBase refuses an image that is not on the base that was asked for.
func (s *Service) checkBase(j *synthesis) error {
	if j.req.Base == "" {
		return nil
	}
	id, err := s.findBase(j.req.Base)
	if err != nil {
		return err
	}
	if is := j.image.base.ID().String(); is != id {
		return invalid("base", "the overlay is made on base %.12s, not on %.12s", is, id).Fix("ask for it with its own base")
	}
	return nil
}

// run makes an instance of a base or an overlay: VM synthesis. It returns when the guest
// runs, or with a probe when the application has given its first right answer. On an error
// nothing is left of the instance, unless it only missed its probe and req.Keep is set. made
// is told the instance's id once it has one. The image is closed.
func (s *Service) run(ctx context.Context, j *synthesis, made func(id string)) (in api.Instance, err error) {
	if j.image == nil {
		if err := s.openSynthesis(ctx, j); err != nil {
			return in, err
		}
	}
	l, req, t := j.image, j.req, j.t
	defer func() { err = errors.Join(err, l.close()) }()
	if j.fits != nil {
		if err := j.fits(ctx, j.machine.Memory); err != nil {
			return in, err
		}
	}
	r, lk, err := s.newRecord(ctx, j.id, req, l, j.raw)
	if lk != nil {
		defer lk.unlock()
	}
	if err != nil {
		return in, err
	}
	made(r.ID)
	keep := false
	defer func() {
		if err != nil && !keep {
			err = errors.Join(s.spaceError(err), s.undo(r))
		}
	}()
	vm, err := s.resume(ctx, r, l, j.machine, j.forwards, req.Prefetch, req.Paused, t)
	if err != nil {
		return in, err
	}
	r.State, r.Timeline = api.Running, t.events
	if err := s.writeRecord(r); err != nil {
		return in, err
	}
	if in, err = s.firstAnswer(ctx, r, vm, req, t); err != nil {
		keep = req.Keep && ctx.Err() == nil || j.resumable && errors.Is(context.Cause(ctx), errStopping)
	}
	return in, err
}

// firstAnswer waits for the first right answer to the probe of a request, if it has one, and
// describes the instance.
func (s *Service) firstAnswer(ctx context.Context, r *record, vm *vmm.VM, req api.Run, t *timeline) (in api.Instance, err error) {
	if req.Probe != nil && !slices.ContainsFunc(t.events, func(e api.Event) bool { return e.Name == eventFirstAnswer }) {
		if err := s.await(ctx, vm, req, t); err != nil {
			return in, err
		}
		t.mark(eventFirstAnswer)
		r.Timeline = t.events
		if err := s.writeRecord(r); err != nil {
			return in, err
		}
	}
	if req.Record {
		if err := s.keepTouches(ctx, r); err != nil {
			return in, err
		}
	}
	if err := ctx.Err(); err != nil {
		return in, err // given up in the last moment: it is undone
	}
	return s.inspect(ctx, r.ID)
}

// machineOf checks that the image can be resumed on this host, before anything is started.
func (s *Service) machineOf(ctx context.Context, l *launchImage) (m vmm.Machine, raw json.RawMessage, err error) {
	resumable := l.base.Resumable()
	if n := len(l.readers); n > 0 {
		resumable = l.readers[n-1].Manifest().State != nil
	}
	if !resumable {
		return m, nil, api.Errorf(api.Invalid, "image %.12s has no device state, so it cannot be resumed", l.image.ID()).Fix("capture it again, with its device state")
	}
	base := l.base.Manifest()
	if raw = base.Machine; len(l.readers) > 0 {
		raw = l.readers[len(l.readers)-1].Manifest().Machine
	}
	if m, err = vmm.ParseMachine(raw); err != nil {
		return m, raw, fmt.Errorf("machine configuration of image %.12s: %w", l.image.ID(), err)
	}
	of, err := vmm.ParseMachine(base.Machine)
	if err != nil {
		return m, raw, fmt.Errorf("machine configuration of base %.12s: %w", l.base.ID(), err)
	}
	if of.Fingerprint() != m.Fingerprint() {
		return m, raw, api.Errorf(api.Conflict, "overlay %.12s was made on machine %s, its base %.12s on %s", l.image.ID(), raw, l.base.ID(), base.Machine).
			Fix("use the base that the overlay was made on")
	}
	if m.Memory != l.base.Size(overlay.Memory) {
		return m, raw, api.Errorf(api.Damaged, "machine of base %.12s has %d bytes of memory, its image %d", l.base.ID(), m.Memory, l.base.Size(overlay.Memory))
	}
	host, err := s.vmm.Probe(ctx)
	if err != nil {
		return m, raw, err
	}
	return m, raw, m.Runnable(host)
}

// resume mounts the image and resumes a VM on it.
func (s *Service) resume(ctx context.Context, r *record, l *launchImage, m vmm.Machine, forwards []vmm.Forward, prefetch api.Prefetch, paused bool, t *timeline) (*vmm.VM, error) {
	state, err := l.image.State()
	if err != nil {
		return nil, err
	}
	vmDir := s.instancePath(r.ID, "vm")
	if err := os.Mkdir(vmDir, 0o700); err != nil {
		return nil, err
	}
	spec := vmm.ResumeSpec{
		Machine: m, Memory: s.mountPath(r.Mount, "fs", "memory"), Disk: s.mountPath(r.Mount, "fs", "disk"),
		DiskSize: l.base.Size(overlay.Disk), State: state, Forwards: forwards, Paused: paused, Name: domainOf(r.ID), Title: r.Name,
		Ready: func(ctx context.Context) error {
			defer t.mark("mounted")
			return s.mount(ctx, l, r.Mount, prefetch)
		},
	}
	if m.Kernel {
		spec.Kernel = l.base.Path(overlay.BaseKernelFile)
	}
	if m.Initrd {
		spec.Initrd = l.base.Path(overlay.BaseInitrdFile)
	}
	vm, err := s.vmm.Resume(ctx, vmDir, spec, t.mark)
	if err != nil {
		return nil, fmt.Errorf("resume image %.12s: %w", l.image.ID(), err)
	}
	if !paused {
		s.guestRuns(ctx, r)
	}
	return vm, nil
}

// undoBound is how long cleaning up may take after the caller has given up.
const undoBound = 30 * time.Second

// undo removes all of an instance that did not come to be.
func (s *Service) undo(r *record) error {
	ctx, cancel := context.WithTimeout(context.Background(), undoBound)
	defer cancel()
	if err := s.destroyVM(ctx, s.instancePath(r.ID, "vm")); err != nil {
		return err // the record stays, so that it is tried again
	}
	// Nothing is written here: the file system may be full.
	err := s.locked(ctx, func() error { return os.RemoveAll(s.instancePath(r.ID)) })
	return errors.Join(err, s.releaseMount(ctx, r.Mount))
}

const maxForwards = 64

// checkForwards translates forwards and sees that the probe's port is among them.
func checkForwards(in []api.Forward, probe *api.Probe) ([]vmm.Forward, error) {
	var out []vmm.Forward
	found := probe == nil
	if len(in) > maxForwards {
		return nil, invalid("forwards", "%d forwards, the limit is %d", len(in), maxForwards)
	}
	for _, f := range in {
		if addr, err := netip.ParseAddr(f.Address); f.Address != "" && (err != nil || !addr.Is4()) {
			return nil, invalid("forwards", "forward port %d: %.60q is not an IPv4 address", f.Guest, f.Address).Fix("use for example 127.0.0.1")
		}
		for _, port := range []int{f.Host, f.Guest} {
			if port < 0 || port > 65535 || f.Guest == 0 {
				err := api.Errorf(api.Invalid, "forward %s:%d:%d: ports are 1 to 65535", f.Address, f.Host, f.Guest)
				err.Field = "forwards"
				return nil, err
			}
		}
		if probe != nil && f.Guest == probe.Port {
			found = true
		}
		out = append(out, vmm.Forward{Addr: f.Address, Host: f.Host, Guest: f.Guest})
	}
	if !found {
		out = append(out, vmm.Forward{Guest: probe.Port})
	}
	return out, checkPorts(out)
}

// checkPorts sees early that the ports on the host can be had. QEMU has the last word.
func checkPorts(forwards []vmm.Forward) error {
	for _, f := range forwards {
		if f.Host == 0 {
			continue
		}
		addr := f.Addr
		if addr == "" {
			addr = "127.0.0.1"
		}
		addr = net.JoinHostPort(addr, strconv.Itoa(f.Host))
		l, err := net.Listen("tcp4", addr)
		switch {
		case err == nil:
			err = l.Close()
		case errors.Is(err, unix.EADDRINUSE):
			err = api.Errorf(api.Conflict, "port %s is in use", addr).Fix("choose another with -p, or leave it out to get a free one")
		case errors.Is(err, fs.ErrPermission):
			err = api.Errorf(api.Unavailable, "port %s may not be used by this user", addr).Fix("choose one above 1023 with -p")
		default:
			err = api.Errorf(api.Invalid, "port %s cannot be had: %w", addr, err).Fix("use an address of this host with -p")
		}
		if err != nil {
			return err
		}
	}
	return nil
}
