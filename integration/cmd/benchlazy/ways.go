package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"
	"cloudlet/api/service"
	"cloudlet/fusefs"
	"cloudlet/integration/appguest"
	"cloudlet/integration/demoguest"
)

// Names of ways that the targets speak of.
const (
	floor   = "floor"
	push    = "push"
	profile = "profile"
	eager   = "eager"
	second  = "second"
)

// way is one way to a running application.
type way struct {
	name, text string
	file       string // that is fetched; "" and not eager: only measured on this host
	quick      bool   // takes a second or two on this host
	run        func(context.Context, *attempt) (sample, error)
}

func allWays() []way {
	return []way{
		{name: floor, text: "floor: resume from plain files", quick: true, run: runFloor},
		{name: "demand", text: "demand only", file: "packed.overlay", run: instance(api.PrefetchNone)},
		{name: push, text: "no profile: all of the overlay's memory is pushed", file: "app.overlay", quick: true, run: instance(api.PrefetchOverlay)},
		{name: profile, text: "by the touch profile", file: "packed.overlay", quick: true, run: instance(api.PrefetchAuto)},
		{name: second, text: "a second instance of the same launch", quick: true, run: runSecond},
		{name: "own-eager", text: "own eager: the whole overlay, decoded, then resume", file: "packed.overlay", run: runOwnEager},
		{name: eager, text: "eager: xz -d, xdelta3 -d, then resume", file: "memory.xz", run: runEager},
	}
}

func wayNames() (names []string) {
	for _, w := range allWays() {
		names = append(names, w.name)
	}
	return names
}

// over reports whether the way is measured over a link.
func (w way) over(n network) bool { return n.name == local || w.file != "" }

// local returns what to ask for on this host.
func (w way) local(b *bench) string {
	if w.file == "" || w.file == "packed.overlay" {
		return b.Made.Overlay
	}
	return b.files[w.file]
}

// attempt is one measurement under way.
type attempt struct {
	*bench
	ref    string  // of the overlay
	remote *remote // nil: on this host
	begin  time.Time
	first  time.Duration // until the first right answer; 0: not yet
	came   int64         // bytes over the link by then
}

// answer waits for the first right answer and stops the clock.
func (a *attempt) answer(ctx context.Context, address string) error {
	if _, err := demoguest.FirstAnswer(ctx, address, a.round%demoguest.ProfileWindow, a.Made.Token); err != nil {
		return err
	}
	a.first = time.Since(a.begin)
	if a.remote != nil {
		a.came = a.remote.received()
	}
	return nil
}

// sample is what the attempt has found.
func (a *attempt) sample() sample { return sample{Seconds: a.first.Seconds(), Bytes: a.came} }

func runFloor(ctx context.Context, a *attempt) (sample, error) {
	err := a.Resume(ctx, a.Path("plain"), func(address string) error { return a.answer(ctx, address) })
	return a.sample(), err
}

// runOwnEager fetches the whole overlay, decodes it, and resumes from plain files.
func runOwnEager(ctx context.Context, a *attempt) (s sample, err error) {
	if a.remote != nil {
		if err := demoguest.Command(ctx, nil, nil, "curl", "-sS", "--fail", "-o", a.Path("round", "app.overlay"), a.ref); err != nil {
			return s, err
		}
		a.ref = a.Path("round", "app.overlay")
	}
	err = a.OwnEager(ctx, a.ref, func(address string) error { return a.answer(ctx, address) })
	return a.sample(), err
}

// runEager decodes both images while they come.
func runEager(ctx context.Context, a *attempt) (sample, error) {
	err := a.Eager(ctx, func(name string) [][]string {
		if a.remote == nil {
			return [][]string{{"xz", "-d", "-c", a.Path("eager", name)}}
		}
		return [][]string{{"curl", "-sS", "--fail", a.remote.url(name + ".xz")}, {"xz", "-d", "-c"}}
	}, func(address string) error { return a.answer(ctx, address) })
	return a.sample(), err
}

// instance asks the daemon for an instance.
func instance(prefetch api.Prefetch) func(context.Context, *attempt) (sample, error) {
	return func(ctx context.Context, a *attempt) (s sample, err error) {
		err = a.instance(ctx, prefetch, func(in api.Instance) error {
			if err := a.answer(ctx, in.Endpoints[0].Address); err != nil {
				return err
			}
			s, err = a.look(ctx, in, prefetch != api.PrefetchNone)
			return err
		})
		return s, err
	}
}

// runSecond starts an instance of a launch that another one, which has answered, runs on.
func runSecond(ctx context.Context, a *attempt) (s sample, err error) {
	err = a.instance(ctx, api.PrefetchAuto, func(in api.Instance) error {
		if err := a.answer(ctx, in.Endpoints[0].Address); err != nil {
			return err
		}
		before, err := mountStatus(ctx, in)
		if err != nil {
			return err
		}
		a.begin, a.first = time.Now(), 0
		return a.instance(ctx, api.PrefetchAuto, func(in api.Instance) error {
			if err := a.answer(ctx, in.Endpoints[0].Address); err != nil {
				return err
			}
			after, err := mountStatus(ctx, in)
			s = a.sample()
			s.Timeline = in.Timeline
			s.Bytes = after.Memory.Bytes + after.Disk.Bytes - before.Memory.Bytes - before.Disk.Bytes
			return err
		})
	})
	return s, err
}

// instance runs the overlay, hands the instance to f, and removes it.
func (a *attempt) instance(ctx context.Context, prefetch api.Prefetch, f func(api.Instance) error) (err error) {
	op, err := a.Daemon.Run(ctx, api.Run{Ref: a.ref, Forwards: []api.Forward{{Guest: appguest.Port}}, Prefetch: prefetch})
	if err != nil {
		return err
	}
	if op, err = a.Daemon.Wait(ctx, op, nil); err != nil {
		if _, cerr := a.Daemon.CancelOperation(context.WithoutCancel(ctx), op.ID); cerr != nil && api.CodeOf(cerr) != api.Conflict {
			err = errors.Join(err, cerr)
		}
		return err
	}
	in, err := client.Result[api.Instance](op)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, a.Daemon.DeleteInstance(context.WithoutCancel(ctx), in.ID, true))
	}()
	if a.remote != nil && in.Source != a.ref {
		return fmt.Errorf("instance %s runs from %q instead of %s", in.ID, in.Source, a.ref)
	}
	if in, err = a.Daemon.Instance(ctx, in.ID); err != nil {
		return err
	}
	return f(in)
}

// status is what a mount says of itself.
type status struct {
	fusefs.Status
	image service.MountStatus
}

// mountStatus asks the mount that an instance runs on.
func mountStatus(ctx context.Context, in api.Instance) (s status, err error) {
	if in.Mount == nil {
		return s, fmt.Errorf("instance %s has no mount: %s", in.ID, in.Reason)
	}
	s.Status, err = fusefs.Dial(filepath.Join(filepath.Dir(in.Mount.Dir), "control")).Status(ctx)
	if err == nil {
		err = json.Unmarshal(s.Image, &s.image)
	}
	return s, err
}

// statusPoll is how often a mount is asked whether all has come.
const statusPoll = 100 * time.Millisecond

// look finds what the first response has taken, and when all has come.
func (a *attempt) look(ctx context.Context, in api.Instance, completes bool) (s sample, err error) {
	st, err := mountStatus(ctx, in)
	if err != nil {
		return s, err
	}
	s = a.sample()
	if a.remote == nil {
		s.Bytes = st.image.Fetched
	}
	s.Fetched, s.Pushed, s.Served = st.image.Fetched, st.Memory.Pushed, st.Memory.Bytes+st.Disk.Bytes
	s.Waits, s.Timeline = newWaits(st.image.Waits), in.Timeline
	if a.remote != nil && completes && a.round == 0 {
		if s.Complete, err = a.complete(ctx, in); err != nil {
			return s, err
		}
	}
	s.Peak, err = peak(st.PID)
	return s, err
}

// complete waits until all frames are on this host and returns the seconds since the
// beginning; nil where the mount keeps none, or the time is over.
func (a *attempt) complete(ctx context.Context, in api.Instance) (*float64, error) {
	for {
		st, err := mountStatus(ctx, in)
		if ctx.Err() != nil {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		if st.image.Cached >= st.image.FrameCount {
			seconds := time.Since(a.begin).Seconds()
			return &seconds, nil
		}
		if st.image.Cached == 0 || st.image.CacheOff != 0 {
			return nil, nil
		}
		select {
		case <-ctx.Done():
			return nil, nil
		case <-time.After(statusPoll):
		}
	}
}

// peak returns the most memory that a process has had resident.
func peak(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, rest, ok := strings.Cut(string(b), "VmHWM:")
	if !ok {
		return 0, fmt.Errorf("process %d: no VmHWM", pid)
	}
	n, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	return n << 10, err
}
