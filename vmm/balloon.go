package vmm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// ErrNoBalloon means that the guest cannot say which of its memory is free: its machine has no
// balloon, or no driver of the guest's answers.
var ErrNoBalloon = errors.New("the guest's free memory cannot be told from the rest")

// Bounds of DropFree. A guest whose driver has said nothing for balloonAnswer has none, one
// that has moved nothing for balloonStall moves no more, and what is not given back within
// balloonLimit stays.
const (
	balloonAnswer = 4 * time.Second // the device asks once a second
	balloonStall  = time.Second
	balloonLimit  = 60 * time.Second
	balloonPoll   = 50 * time.Millisecond
)

// maxReserve bounds, in bytes, the free memory that a guest keeps.
const maxReserve = 128 << 20

// reserve is how much free memory, in bytes, is left to a guest. Linux begins to throw out its
// cache of files, which the guest is to keep, when less than its high watermark is free: with
// huge pages that is up to 7.5 % of a small memory and 100 MiB of a large one.
func reserve(memory int64) int64 { return min(memory*3/40, maxReserve) }

// DropFree makes a resumed VM forget what stands in memory that its guest does not use, so that
// captures do not hold it: those pages are again what they were in the image. The guest gives
// the memory to its balloon and gets it back. It runs meanwhile: of a VM that is paused, or
// has ended, nothing is dropped. Its caches of files stay, and what it needs in that time its driver takes out of the
// balloon. DropFree returns the bytes that were dropped. report, which may be nil, is told how many of how many
// bytes are. The error wraps ErrNoBalloon, or ErrBusy during captures. Also after an error, and
// when ctx ends, the guest gets its memory back; if this process is killed, by the next Adopt.
//
// The way is that of memory ballooning: C. Waldspurger, Memory Resource Management in VMware
// ESX Server, OSDI 2002; by virtio-balloon, Virtual I/O Device (VIRTIO) 1.1, section 5.5.
func (vm *VM) DropFree(ctx context.Context, report func(done, total int64)) (dropped int64, err error) {
	fail := func(err error) (int64, error) { return dropped, fmt.Errorf("drop free memory of VM: %w", err) }
	switch {
	case !vm.info.Resumed: // its memory is a file of its own, of which SaveBase takes all
		return fail(errors.New("it was booted, not resumed"))
	case !vm.info.Machine.has(DeviceBalloon):
		return fail(fmt.Errorf("%w: its machine has no %s: make a new base", ErrNoBalloon, DeviceBalloon))
	}
	lock, err := lockCapture(vm.dir)
	if err != nil {
		return fail(err)
	}
	defer lock.Close()
	if now, err := vm.Status(ctx); err != nil || now.State != Running {
		return 0, err
	}
	free, err := vm.freeMemory(ctx)
	if err != nil {
		return fail(err)
	}
	size := vm.info.Machine.Memory
	give := (free - reserve(size)) &^ (MemoryUnit - 1)
	if give <= 0 {
		return 0, nil
	}
	if err := writeJSON(vm.dir, balloonFile, struct{}{}); err != nil {
		return fail(err)
	}
	bound, cancel := context.WithTimeout(ctx, balloonLimit)
	err = vm.balloon(bound, size-give, func(actual int64) {
		dropped = max(dropped, size-actual)
		if report != nil {
			report(min(dropped, give), give)
		}
	})
	cancel()
	if bound.Err() != nil {
		err = ctx.Err() // its own limit is no error
	}
	if derr := vm.deflate(ctx); err != nil || derr != nil {
		return fail(errors.Join(err, derr))
	}
	return dropped, nil
}

// freeMemory asks the guest how many bytes it does not use.
func (vm *VM) freeMemory(ctx context.Context) (int64, error) {
	type property struct {
		Path     string `json:"path"`
		Property string `json:"property"`
		Value    any    `json:"value,omitempty"`
	}
	const device, interval, stats = "/machine/peripheral/" + balloonID, "guest-stats-polling-interval", "guest-stats"
	type answer struct {
		Stats struct {
			Free uint64 `json:"stat-free-memory"`
		} `json:"stats"`
		Updated int64 `json:"last-update"` // seconds, 0: never
	}
	var before, now answer
	if err := vm.Monitor(ctx, "qom-get", property{Path: device, Property: stats}, &before); err != nil {
		return 0, err
	}
	if err := vm.Monitor(ctx, "qom-set", property{device, interval, 1}, nil); err != nil {
		return 0, err
	}
	bound, cancel := context.WithTimeout(ctx, balloonAnswer)
	defer cancel()
	err := pollUntil(bound, func() (bool, error) {
		err := vm.Monitor(bound, "qom-get", property{Path: device, Property: stats}, &now)
		return now.Updated > before.Updated, err
	})
	if bound.Err() != nil && ctx.Err() == nil {
		err = fmt.Errorf("%w: no driver answers in the guest: let it load virtio_balloon, and run", ErrNoBalloon)
	}
	err = errors.Join(err, vm.insist(ctx, func(ctx context.Context, c *qmp) error {
		return c.execute(ctx, "qom-set", property{device, interval, 0}, nil)
	}))
	free := now.Stats.Free // the guest's word: its "unknown" is the largest number
	if err == nil && free > uint64(vm.info.Machine.Memory) {
		err = fmt.Errorf("%w: it says that %d of %d bytes are free", ErrNoBalloon, free, vm.info.Machine.Memory)
	}
	return int64(free), err
}

// balloon asks the guest to have so many bytes of memory, and returns when it has, or when that
// goes no further. on is told of each step.
func (vm *VM) balloon(ctx context.Context, bytes int64, on func(actual int64)) error {
	if err := vm.Monitor(ctx, "balloon", map[string]any{"value": bytes}, nil); err != nil {
		return err
	}
	last, moved := int64(-1), time.Now()
	for {
		var now struct {
			Actual int64 `json:"actual"`
		}
		if err := vm.Monitor(ctx, "query-balloon", nil, &now); err != nil {
			return err
		}
		on(now.Actual)
		if now.Actual != last {
			last, moved = now.Actual, time.Now()
		}
		if now.Actual == bytes || time.Since(moved) > balloonStall {
			return nil
		}
		select {
		case <-time.After(balloonPoll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// deflate gives the guest all of its memory back, also when ctx has ended.
func (vm *VM) deflate(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	err := vm.balloon(ctx, vm.info.Machine.Memory, func(int64) {})
	if err != nil && !errors.Is(err, ErrEnded) {
		return fmt.Errorf("the guest has less memory until it is looked at again: %w", err)
	}
	return os.Remove(filepath.Join(vm.dir, balloonFile))
}

// recoverBalloon gives a guest back what a process that was killed had let it give away.
func (vm *VM) recoverBalloon(ctx context.Context) error {
	path := filepath.Join(vm.dir, balloonFile)
	if _, err := os.Lstat(path); err != nil {
		return nil
	}
	lock, err := lockCapture(vm.dir)
	if errors.Is(err, ErrBusy) {
		return nil // it goes on
	}
	if err != nil {
		return err
	}
	defer lock.Close()
	err = vm.Monitor(ctx, "balloon", map[string]any{"value": vm.info.Machine.Memory}, nil)
	if err == nil || errors.Is(err, ErrEnded) {
		err = os.Remove(path)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("give memory back: %w", err)
	}
	return nil
}
