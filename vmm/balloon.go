package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// ErrNoBalloon means that the guest cannot say which of its memory is free: its machine has no
// balloon, or no driver of the guest's answers.
var ErrNoBalloon = errors.New("the guest's free memory cannot be told from the rest")

// Bounds of DropFree. A guest whose driver has said nothing for balloonAnswer has none, one
// that has moved nothing for balloonStall moves no more, and what is not given up within
// balloonLimit stays.
const (
	balloonAnswer = 4 * time.Second // the device asks once a second
	balloonStall  = time.Second
	balloonLimit  = 60 * time.Second
	balloonPoll   = 50 * time.Millisecond
)

// maxReserve bounds, in bytes, the free memory that a guest keeps.
const maxReserve = 256 << 20

// reserve is how much free memory, in bytes, is left to a guest. Linux begins to throw out its
// cache of files, which the guest is to keep, below its high watermark: with huge pages up to
// 7.5 % of a small memory. Watchers of memory in the guest begin at a tenth.
func reserve(memory int64) int64 { return min(memory/8, maxReserve) }

// DropFree makes a resumed VM forget what stands in memory that its guest does not use, so that
// captures do not hold it: those pages are again what they were in the image. The guest gives
// the memory to its balloon and gets it back: as much as the VM has changed, since what was
// used last is given first, and each page that the guest gives costs it a note of 64 bytes, and
// perhaps a read of what the image has there. It runs meanwhile: of a VM that is paused, or has
// ended, nothing is dropped. Its caches of files stay, and what it needs in that time its driver
// takes out of the balloon.
//
// DropFree returns the bytes that were dropped. report, which may be nil, is told how many of
// how many bytes are. The error wraps ErrNoBalloon, or ErrBusy during captures. Also after an
// error, and when ctx ends, the guest gets its memory back; if this process is killed, by the
// next Adopt.
//
// The way is that of memory ballooning: C. Waldspurger, Memory Resource Management in VMware
// ESX Server, OSDI 2002; by virtio-balloon, Virtual I/O Device (VIRTIO) 1.1, section 5.5.
func (vm *VM) DropFree(ctx context.Context, report func(done, total int64)) (int64, error) {
	dropped, err := vm.dropFree(ctx, report)
	if err != nil {
		return 0, fmt.Errorf("drop free memory of VM: %w", err)
	}
	return dropped, nil
}

func (vm *VM) dropFree(ctx context.Context, report func(done, total int64)) (dropped int64, err error) {
	switch {
	case !vm.info.Resumed: // its memory is a file of its own, of which SaveBase takes all
		return 0, errors.New("it was booted, not resumed")
	case !vm.info.Machine.has(DeviceBalloon):
		return 0, fmt.Errorf("%w: its machine has no %s: make a new base", ErrNoBalloon, DeviceBalloon)
	}
	lock, err := lockCapture(vm.dir)
	if err != nil {
		return 0, err
	}
	defer lock.Close()
	if now, err := vm.Status(ctx); err != nil || now.State != Running {
		return 0, err
	}
	changed, err := vm.changedMemory()
	if err != nil || changed < MemoryUnit {
		return 0, vm.orEnded(ctx, err)
	}
	var before lent
	if err := vm.Monitor(ctx, "qom-get", property(pollingInterval), &before.Interval); err != nil {
		return 0, err
	}
	if err := writeJSON(vm.dir, balloonFile, before); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, vm.takeBack(ctx)) }()
	free, err := vm.freeMemory(ctx)
	if err != nil {
		return 0, err
	}
	size := vm.info.Machine.Memory
	give := min(free-reserve(size), changed) &^ (MemoryUnit - 1)
	if give <= 0 {
		return 0, nil
	}
	has, err := vm.ballooned(ctx) // the guest's word, and it may be wrong: what counts is how it moves
	if err != nil {
		return 0, err
	}
	note := func(now int64) {
		dropped = max(dropped, min(has-now, give))
		if report != nil {
			report(dropped, give)
		}
	}
	note(has)
	if err := vm.Monitor(ctx, "balloon", toHave(size-give), nil); err != nil {
		return 0, err
	}
	bound, cancel := context.WithTimeout(ctx, balloonLimit)
	defer cancel()
	err = vm.awaitBalloon(bound, size-give, note)
	if ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
		err = nil // what is done is done
	}
	return dropped, err
}

// changedMemory returns how many bytes of memory the VM has changed since it was resumed.
func (vm *VM) changedMemory() (bytes int64, err error) {
	regions, err := memoryRegions(vm.PID(), vm.info)
	if err != nil {
		return 0, err
	}
	spans, err := changedSpans(vm.PID(), regions)
	for _, s := range spans {
		bytes += s.n
	}
	return bytes, err
}

// Properties of the balloon device.
const (
	pollingInterval = "guest-stats-polling-interval" // seconds
	guestStats      = "guest-stats"
)

// property is the arguments that get a property of the balloon device, or with a value set it.
func property(name string, value ...int64) map[string]any {
	args := map[string]any{"path": "/machine/peripheral/" + balloonID, "property": name}
	for _, v := range value {
		args["value"] = v
	}
	return args
}

// freeMemory asks the guest how many bytes it does not use.
func (vm *VM) freeMemory(ctx context.Context) (int64, error) {
	type answer struct {
		Stats struct {
			Free uint64 `json:"stat-free-memory"`
		} `json:"stats"`
		Updated int64 `json:"last-update"` // seconds, 0: never
	}
	var before, now answer
	if err := vm.Monitor(ctx, "qom-get", property(guestStats), &before); err != nil {
		return 0, err
	}
	if err := vm.Monitor(ctx, "qom-set", property(pollingInterval, 1), nil); err != nil {
		return 0, err
	}
	bound, cancel := context.WithTimeout(ctx, balloonAnswer)
	defer cancel()
	err := pollUntil(bound, func() (bool, error) {
		err := vm.Monitor(bound, "qom-get", property(guestStats), &now)
		return now.Updated != before.Updated, err
	})
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		err = fmt.Errorf("%w: no driver answers in the guest: let it load virtio_balloon", ErrNoBalloon)
	}
	if err != nil {
		return 0, err
	}
	if now.Stats.Free > uint64(vm.info.Machine.Memory) { // its "unknown" is the largest number
		return 0, fmt.Errorf("%w: it says that %d of %d bytes are free", ErrNoBalloon, now.Stats.Free, vm.info.Machine.Memory)
	}
	return int64(now.Stats.Free), nil
}

// toHave is the arguments that ask the guest to have so many bytes of memory.
func toHave(bytes int64) map[string]any { return map[string]any{"value": bytes} }

// ballooned returns how many bytes of memory the guest says that it has.
func (vm *VM) ballooned(ctx context.Context) (int64, error) {
	var now struct {
		Actual int64 `json:"actual"`
	}
	err := vm.Monitor(ctx, "query-balloon", nil, &now)
	return now.Actual, err
}

// awaitBalloon returns when the guest, which was asked to, has so many bytes of memory, or when
// that goes no further. on is told of each step.
func (vm *VM) awaitBalloon(ctx context.Context, bytes int64, on func(now int64)) error {
	last, moved := int64(-1), time.Now()
	for {
		now, err := vm.ballooned(ctx)
		if err != nil {
			return err
		}
		on(now)
		if now != last {
			last, moved = now, time.Now()
		}
		if now == bytes || time.Since(moved) > balloonStall {
			return nil
		}
		select {
		case <-time.After(balloonPoll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// lent is what is to be undone for a VM that has lent memory.
type lent struct {
	Interval int64 `json:"interval"` // of the guest's statistics, in seconds
}

// takeBack gives the guest all of its memory back, also when ctx has ended, and waits for it for
// as long as that goes on, up to a bound.
func (vm *VM) takeBack(ctx context.Context) error {
	if err := vm.undoBalloon(ctx); err != nil {
		return fmt.Errorf("the guest may have less memory until it is looked at again: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	_ = vm.awaitBalloon(ctx, vm.info.Machine.Memory, func(int64) {}) // it is told; how long it takes is its own affair
	return nil
}

// undoBalloon tells the device what it was told before, and forgets that there was anything.
func (vm *VM) undoBalloon(ctx context.Context) error {
	var before lent
	err := readJSON(vm.dir, balloonFile, &before)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	err = vm.insist(ctx, func(ctx context.Context, c *qmp) error {
		if err := c.execute(ctx, "balloon", toHave(vm.info.Machine.Memory), nil); err != nil {
			return err
		}
		return c.execute(ctx, "qom-set", property(pollingInterval, before.Interval), nil)
	})
	if err != nil && !errors.Is(err, ErrEnded) {
		return err
	}
	return os.Remove(filepath.Join(vm.dir, balloonFile))
}

// recoverBalloon gives a guest back what a process that was killed had let it lend.
func (vm *VM) recoverBalloon(ctx context.Context) error {
	if _, err := os.Lstat(filepath.Join(vm.dir, balloonFile)); err != nil {
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
	if err := vm.undoBalloon(ctx); err != nil {
		return fmt.Errorf("give memory back: %w", err)
	}
	return nil
}
