package vmm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Rounds that are given up at any moment leave the VM as it was, no file, and nothing out.
func TestRoundsCancelled(t *testing.T) { onDrivers(t, testRoundsCancelled) }

func testRoundsCancelled(t *testing.T, newRig func(*testing.T) (rig, string)) {
	rig, disk := newRig(t)
	vm, base := rig.resumed(t, disk)
	rounds, err := vm.Rounds(t.Context())
	require.NoError(t, err)
	// persist repeats a round with more and more time until it succeeds.
	persist := func(name, state string, round func(context.Context, string) (*Residue, error)) *Residue {
		for after := time.Millisecond; ; after += after / 2 {
			require.Less(t, after, time.Minute)
			out := newDir(t, "out")
			ctx, cancel := context.WithTimeout(t.Context(), after)
			res, err := round(ctx, out)
			cancel()
			requireState(t, vm, state)
			if err == nil {
				apply(t, base, res)
				return res
			}
			t.Logf("%s, after %v: %v", name, after, err)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			entries, err := os.ReadDir(out)
			require.NoError(t, err)
			require.Empty(t, entries)
			require.NoFileExists(t, filepath.Join(vm.Dir(), stoppedFile))
			names, err := layerNames(vm.Dir())
			require.NoError(t, err)
			require.LessOrEqual(t, len(names), len(rounds.taken)+2)
		}
	}
	ask(t, vm, "POST", "/load?on=1")
	var held []*Residue
	for i := range 3 {
		ask(t, vm, "POST", fmt.Sprintf("/write?mib=8&seed=%d", i))
		held = append(held, persist("next", Running, rounds.Next))
	}
	ask(t, vm, "POST", "/write?mib=2&seed=8")
	require.NoError(t, vm.Pause(t.Context()))
	held = append(held, persist("last", Paused, rounds.Last))
	requireEqualMemory(t, vm, base.memory)
	requireEqualDisk(t, vm, base.disk)
	require.NoError(t, vm.Continue(t.Context()))
	for i, res := range held {
		for after := time.Millisecond; ; after += after / 2 {
			require.Less(t, after, time.Minute)
			ctx, cancel := context.WithTimeout(t.Context(), after)
			err := res.Release(ctx)
			cancel()
			if err == nil {
				break
			}
			t.Logf("release of %d, after %v: %v", i, after, err)
			require.ErrorIs(t, err, context.DeadlineExceeded)
		}
	}
	names, err := layerNames(vm.Dir())
	require.NoError(t, err)
	require.LessOrEqual(t, len(names), 2) // the one written to and the one prepared
	require.NoError(t, rounds.Close(t.Context()))
	requireLayers(t, vm)
	ask(t, vm, "GET", "/verify?seed=2")
}

// roundsProcess takes rounds of the VM in dir for ever, and tells of every step. At the one
// named until it waits to be killed.
func roundsProcess(dir, out, until string) int {
	if err := takeRounds(context.Background(), dir, out, func(step string) {
		fmt.Println(step)
		if step == until {
			time.Sleep(time.Hour)
		}
	}); err != nil {
		fmt.Println("error:", err)
	}
	return 1
}

func takeRounds(ctx context.Context, dir, out string, step func(string)) error {
	vm, err := new(QEMU).Adopt(ctx, dir)
	if err != nil {
		return err
	}
	for n := 0; ; n++ {
		rounds, err := vm.Rounds(ctx)
		if err != nil {
			return err
		}
		step("begun")
		var held []*Residue
		take := func(round func(context.Context, string) (*Residue, error)) error {
			sub, err := os.MkdirTemp(out, "")
			if err != nil {
				return err
			}
			res, err := round(ctx, sub)
			if err != nil {
				return err
			}
			held = append(held, res)
			step(fmt.Sprintf("taken %d", len(held)))
			return nil
		}
		release := func(i int) error {
			err := held[i].Release(ctx)
			step(fmt.Sprintf("released %d", i+1))
			return err
		}
		err = errors.Join(take(rounds.Next), take(rounds.Next), release(0), release(1), take(rounds.Next), vm.Pause(ctx))
		step("paused")
		err = errors.Join(err, take(rounds.Last), release(2), vm.Continue(ctx), rounds.Close(ctx))
		step("closed")
		if err != nil {
			return err
		}
	}
}

// killRounds runs roundsProcess and kills it at a step, or so long after its first.
func killRounds(t *testing.T, vm *VM, until string, after time.Duration) {
	t.Helper()
	exe, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.CommandContext(t.Context(), exe, "rounds", vm.Dir(), t.TempDir(), until)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	in := bufio.NewScanner(stdout)
	var kill *time.Timer
	last := ""
	for in.Scan() {
		last = in.Text()
		require.NotContains(t, last, "error:")
		if last == until {
			require.NoError(t, cmd.Process.Kill())
		}
		if until == "" && kill == nil {
			kill = time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		}
	}
	require.Error(t, cmd.Wait())
	t.Logf("killed after step %q", last)
}

// After a process that takes rounds was killed, at any step, the VM can be captured as ever.
func TestRoundsKilled(t *testing.T) {
	rig, disk := newRig(t)
	vm, base := rig.resumed(t, disk)
	before := ask(t, vm, "GET", "/verify")
	ask(t, vm, "POST", "/load?on=1")
	recoveries := []struct {
		name string
		run  func(*VM) error
	}{
		{"merge", func(vm *VM) error { return vm.Merge(t.Context()) }},
		{"rounds", func(vm *VM) error {
			rounds, err := vm.Rounds(t.Context())
			if err != nil {
				return err
			}
			requireLayers(t, vm, layerName(1))
			return rounds.Close(t.Context())
		}},
		{"capture", func(vm *VM) error {
			res, err := vm.Capture(t.Context(), newDir(t, "out"))
			if err != nil {
				return err
			}
			return res.Release(t.Context())
		}},
	}
	n := 0
	recovered := func(paused bool) {
		adopted, err := rig.q.Adopt(t.Context(), vm.Dir())
		require.NoError(t, err)
		status, err := adopted.Status(t.Context())
		require.NoError(t, err)
		if paused {
			require.Equal(t, Paused, status.State)
		}
		require.NoFileExists(t, filepath.Join(vm.Dir(), stoppedFile))
		how := recoveries[n%len(recoveries)]
		n++
		require.NoError(t, how.run(adopted), how.name)
		requireLayers(t, vm)
		require.Equal(t, topLayer, activeLayer(t, vm))
		requireState(t, vm, status.State)
		if status.State == Paused {
			require.NoError(t, adopted.Continue(t.Context()))
		}
	}
	for _, step := range []string{"begun", "taken 1", "taken 2", "released 1", "released 2", "taken 3", "paused", "taken 4", "released 3", "closed"} {
		killRounds(t, vm, step, 0)
		recovered(step == "paused" || step == "taken 4" || step == "released 3")
	}
	for after := 5 * time.Millisecond; after < 500*time.Millisecond; after += after / 2 {
		killRounds(t, vm, "", after)
		recovered(false)
	}

	// Killed while QEMU merges a layer: the merge goes on, and others wait for it.
	rounds, err := vm.Rounds(t.Context())
	require.NoError(t, err)
	for range 2 {
		ask(t, vm, "POST", "/write?mib=4&seed=1")
		_, err := rounds.Next(t.Context(), newDir(t, "out"))
		require.NoError(t, err)
	}
	require.NoError(t, rounds.lock.Close())
	require.NoError(t, vm.Monitor(t.Context(), "block-commit", map[string]any{
		"job-id": commitJob, "device": diskID, "top": layerName(1), "base": topLayer, "speed": 64 << 10}, nil))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, vm.Merge(ctx), context.DeadlineExceeded)
	require.NoError(t, vm.Monitor(t.Context(), "block-job-set-speed", map[string]any{"device": commitJob, "speed": 0}, nil))
	recovered(false)

	// A layer between others that another process reads, as the qemu-img of a killed one does,
	// is waited for. QEMU takes byte 100 of a file for who reads it (block/file-posix.c).
	rounds, err = vm.Rounds(t.Context())
	require.NoError(t, err)
	for range 2 {
		_, err = rounds.Next(t.Context(), newDir(t, "out"))
		require.NoError(t, err)
	}
	require.NoError(t, rounds.lock.Close())
	layer, err := os.Open(filepath.Join(vm.Dir(), layerName(1)))
	require.NoError(t, err)
	lock := unix.Flock_t{Type: unix.F_RDLCK, Whence: io.SeekStart, Start: 100, Len: 1}
	require.NoError(t, unix.FcntlFlock(layer.Fd(), unix.F_OFD_SETLK, &lock))
	ctx, cancel = context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, vm.Merge(ctx), context.DeadlineExceeded)
	require.NoError(t, layer.Close())
	recovered(false)

	// The guest and its disk are whole.
	ask(t, vm, "POST", "/load?on=0")
	after := ask(t, vm, "GET", "/verify?seed=1")
	require.Equal(t, before.Table, after.Table)
	require.Equal(t, before.File, after.File)
	require.NoError(t, vm.Pause(t.Context()))
	res, err := vm.Capture(t.Context(), newDir(t, "out"))
	require.NoError(t, err)
	merged := merge(t, base, res)
	requireEqualMemory(t, vm, merged.memory)
	requireEqualDisk(t, vm, merged.disk)
	require.NoError(t, res.Release(t.Context()))
}

// stoppingTracker needs a stopped process, as the one for soft-dirty bits does.
type stoppingTracker struct {
	*hashTracker
	during func() error
}

func (t stoppingTracker) stops() bool { return true }

func (t stoppingTracker) mark(last bool) error {
	return errors.Join(t.during(), t.hashTracker.mark(last))
}

// Where the tracker needs it, the VM stands still while changes are looked for, and no
// longer; one that was paused stays so.
func TestRoundsStopAndEnd(t *testing.T) {
	rig, disk := newRig(t)
	vm, base := rig.resumed(t, disk)
	var marked error
	stopped := filepath.Join(vm.Dir(), stoppedFile)
	running := true
	rounds, err := vm.rounds(t.Context(), func(regions []region) (tracker, error) {
		return stoppingTracker{newHashTracker(vm.PID(), regions, vm.info.Machine.Memory), func() error {
			if _, err := os.Stat(stopped); (err == nil) != running {
				return fmt.Errorf("while marked: %w", err)
			}
			return marked
		}}, nil
	})
	require.NoError(t, err)
	res, err := rounds.Next(t.Context(), newDir(t, "out"))
	require.NoError(t, err)
	require.NotZero(t, res.Pause)
	requireState(t, vm, Running)
	require.NoFileExists(t, stopped)
	apply(t, base, res)

	marked = errors.New("no")
	_, err = rounds.Next(t.Context(), newDir(t, "out"))
	require.ErrorIs(t, err, marked)
	requireState(t, vm, Running)
	require.NoFileExists(t, stopped)
	marked = nil

	ask(t, vm, "POST", "/write?mib=2&seed=1")
	require.NoError(t, vm.Pause(t.Context()))
	running = false
	res, err = rounds.Next(t.Context(), newDir(t, "out"))
	require.NoError(t, err)
	require.Zero(t, res.Pause)
	requireState(t, vm, Paused)
	apply(t, base, res)
	requireEqualMemory(t, vm, base.memory)
	requireEqualDisk(t, vm, base.disk)

	// Killed while the VM stands still for it: whoever adopts the VM lets it run.
	require.NoError(t, vm.Continue(t.Context()))
	require.NoError(t, writeJSON(vm.Dir(), stoppedFile, struct{}{}))
	require.NoError(t, vm.Pause(t.Context()))
	require.NoError(t, rounds.lock.Close())
	_, err = rig.q.Adopt(t.Context(), vm.Dir())
	require.NoError(t, err)
	requireState(t, vm, Running)
	require.NoError(t, vm.Merge(t.Context()))
	requireLayers(t, vm)

	// A VM that ends is reported as such, and what was taken before stays readable.
	rounds, err = vm.Rounds(t.Context())
	require.NoError(t, err)
	var held []*Residue
	for range 2 {
		ask(t, vm, "POST", "/write?mib=2&seed=2")
		res, err := rounds.Next(t.Context(), newDir(t, "out"))
		require.NoError(t, err)
		held = append(held, res)
	}
	require.NoError(t, vm.Destroy(t.Context()))
	for name, round := range map[string]func(context.Context, string) (*Residue, error){"next": rounds.Next, "last": rounds.Last} {
		out := newDir(t, "out")
		_, err := round(t.Context(), out)
		require.ErrorIs(t, err, ErrEnded, name)
		entries, err := os.ReadDir(out)
		require.NoError(t, err)
		require.Empty(t, entries)
	}
	e, d := held[1].MemoryExtents()[0], held[1].DiskExtents()[0]
	require.NoError(t, held[1].ReadMemory(make([]byte, e.Len), e.Off))
	require.NoError(t, held[1].ReadDisk(make([]byte, d.Len), d.Off))
	for _, res := range held {
		require.NoError(t, res.Release(t.Context()))
	}
	require.NoError(t, rounds.Close(t.Context()))
	_, err = vm.Rounds(t.Context())
	require.ErrorIs(t, err, ErrEnded)
	require.NoError(t, vm.Merge(t.Context()))
}
