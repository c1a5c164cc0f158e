package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"cloudlet/integration/cloudlets"
	"cloudlet/integration/figures"
	"cloudlet/integration/guest"
)

const (
	// hostPort is where the application of the other way's guests is reached, migrationPort
	// where its destination waits for the guest.
	hostPort, migrationPort = 8080, 4444
	// migrationPoll is the time between two looks at a migration.
	migrationPoll = time.Millisecond
	// bandwidth is more than any link has: QEMU is not to bound it.
	bandwidth = 1 << 34
)

// qemuSample is one migration by QEMU: stop, then copy. Times in seconds, sizes in bytes. All
// that surrounds it is in its favour: the disk need not be carried, since both ends have the
// same file; the destination waits with its state ready to be loaded; the client is told the
// new place the moment the guest runs there.
type qemuSample struct {
	Pause    float64 `json:"pause_s"` // from stop to cont at the destination
	Gap      float64 `json:"client_gap_s"`
	Quiet    float64 `json:"client_gap_before_s"`
	Answered float64 `json:"first_answer_s"` // after cont
	Bytes    int64   `json:"bytes"`          // by QEMU's count
	Carried  int64   `json:"link_bytes"`     // headers included
	Answers  int64   `json:"acknowledged"`
}

func (q qemuSample) String() string {
	return fmt.Sprintf("pause %.3f s, client gap %.3f s, %.1f MiB, %.1f MiB on the link", q.Pause, q.Gap, figures.MiB(q.Bytes), figures.MiB(q.Carried))
}

// migration boots the guest in a plain QEMU at a, brings it into the condition of a cell and
// migrates it to a plain QEMU at b. Live migration is no rival here: with QEMU 7.2 and without
// KVM it loses pages.
func (s *session) migration(ctx context.Context, c condition, seed string) (q qemuSample, err error) {
	dir := s.scratch()
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
		return q, err
	}
	disk := filepath.Join(dir, "disk")
	if out, err := exec.CommandContext(ctx, "cp", "--sparse=always", s.guest.Disk, disk).CombinedOutput(); err != nil {
		return q, fmt.Errorf("copy the disk: %w: %s", err, out)
	}
	source, err := s.startQEMU(ctx, s.a, dir, "source", disk)
	if err != nil {
		return q, err
	}
	defer func() { err = errors.Join(err, source.end()) }()
	address := net.JoinHostPort(s.a.Host, strconv.Itoa(hostPort))
	token, err := s.booted(ctx, address)
	if err != nil {
		return q, err
	}
	if err := errors.Join(s.launch(ctx, address), s.fill(ctx, address, c, seed)); err != nil {
		return q, err
	}
	destination, err := s.startQEMU(ctx, s.b, dir, "destination", disk, "-incoming", fmt.Sprintf("tcp:%s:%d", s.b.Host, migrationPort))
	if err != nil {
		return q, err
	}
	defer func() { err = errors.Join(err, destination.end()) }()
	err = source.run(ctx, "migrate-set-parameters", map[string]any{"max-bandwidth": int64(bandwidth)}, nil)
	if err != nil {
		return q, err
	}
	var at place
	at.set(address)
	client, quiet, err := s.work(ctx, at.find)
	if err != nil {
		return q, err
	}
	defer client.Stop()
	q.Quiet = quiet.Seconds()
	carried, err := s.lab.Carried()
	if err != nil {
		return q, err
	}
	begin := time.Now()
	if err := source.run(ctx, "stop", nil, nil); err != nil {
		return q, err
	}
	if err := source.run(ctx, "migrate", map[string]any{"uri": fmt.Sprintf("tcp:%s:%d", s.b.Host, migrationPort)}, nil); err != nil {
		return q, err
	}
	if q.Bytes, err = source.migrated(ctx); err != nil {
		return q, err
	}
	if err := destination.loaded(ctx); err != nil {
		return q, err
	}
	if err := destination.run(ctx, "cont", nil, nil); err != nil {
		return q, err
	}
	runs := time.Now()
	address = net.JoinHostPort(s.b.Host, strconv.Itoa(hostPort))
	at.set(address)
	now, err := s.lab.Carried()
	if err != nil {
		return q, err
	}
	if err := client.Await(ctx, time.Now()); err != nil {
		return q, err
	}
	gap := client.Gap(begin, time.Now())
	q.Pause, q.Gap, q.Answered, q.Carried = runs.Sub(begin).Seconds(), gap.Length().Seconds(), gap.End.Sub(runs).Seconds(), now-carried
	q.Answers, err = s.verify(ctx, client, address, token)
	return q, err
}

// booted waits until the application of a guest that boots answers, and asks who it is.
func (s *session) booted(ctx context.Context, address string) (string, error) {
	for {
		try, cancel := context.WithTimeout(ctx, time.Second)
		token, err := s.token(try, address)
		cancel()
		if err == nil {
			return token, nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return "", fmt.Errorf("boot the guest in a plain QEMU: %w: %w", context.Cause(ctx), err)
		}
	}
}

// plainQEMU is a QEMU of this command's own.
type plainQEMU struct {
	*monitor
	cmd    *exec.Cmd
	ended  chan error
	stderr bytes.Buffer
}

// startQEMU starts QEMU with the machine of the base in a cloudlet's namespace. It ends with
// this process, however that ends.
func (s *session) startQEMU(ctx context.Context, at *cloudlets.Cloudlet, dir, name, disk string, more ...string) (q *plainQEMU, err error) {
	m := s.machine
	socket := filepath.Join(dir, name+".sock")
	args := []string{
		"-no-user-config", "-nodefaults", "-display", "none", "-accel", m.Accelerator, "-machine", m.Type, "-cpu", m.CPU, "-smp", strconv.Itoa(m.CPUs),
		"-m", fmt.Sprintf("%dM", m.Memory>>20), "-qmp", "unix:" + socket + ",server=on,wait=off",
		"-serial", "file:" + filepath.Join(dir, name+".serial"),
		"-drive", "if=none,id=disk0,format=raw,cache=writeback,discard=unmap,file=" + disk, "-device", "virtio-blk-pci,drive=disk0",
		"-netdev", fmt.Sprintf("user,id=net0,hostfwd=tcp:0.0.0.0:%d-:%d", hostPort, guest.Port), "-device", "virtio-net-pci,netdev=net0,romfile=",
		"-kernel", s.guest.Kernel, "-initrd", s.guest.Initrd, "-append", m.Append,
	}
	q = &plainQEMU{cmd: exec.Command("qemu-system-x86_64", append(args, more...)...), ended: make(chan error, 1)}
	q.cmd.Stderr = &q.stderr
	q.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	started := make(chan error, 1)
	go func() {
		running := false
		err := at.Do(func() error { // whose thread is QEMU's parent, and stays
			err := q.cmd.Start()
			running = err == nil
			started <- err
			if running {
				return q.cmd.Wait()
			}
			return nil
		})
		if !running {
			started <- err
		}
		q.ended <- err
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	if q.monitor, err = dialMonitor(ctx, socket); err != nil {
		return nil, errors.Join(err, q.end())
	}
	return q, nil
}

// end kills QEMU and waits for it.
func (q *plainQEMU) end() error {
	if q.monitor != nil {
		_ = q.conn.Close() // it ends now
	}
	err := q.cmd.Process.Kill()
	if errors.Is(err, os.ErrProcessDone) {
		err = fmt.Errorf("QEMU has ended by itself: %s", q.stderr.Bytes())
	}
	<-q.ended // it says that it was killed
	return err
}

// migrated waits until all was sent and returns how many bytes that were.
func (q *plainQEMU) migrated(ctx context.Context) (int64, error) {
	var info struct {
		Status string
		Desc   string `json:"error-desc"`
		RAM    struct{ Transferred int64 }
	}
	err := poll(ctx, func() (bool, error) {
		if err := q.run(ctx, "query-migrate", nil, &info); err != nil {
			return false, err
		}
		if info.Status == "failed" || info.Status == "cancelled" {
			return false, fmt.Errorf("QEMU's migration has %s: %s", info.Status, info.Desc)
		}
		return info.Status == "completed", nil
	})
	return info.RAM.Transferred, err
}

// loaded waits until the destination has the whole state.
func (q *plainQEMU) loaded(ctx context.Context) error {
	return poll(ctx, func() (bool, error) {
		var info struct{ Status string }
		err := q.run(ctx, "query-status", nil, &info)
		return info.Status == "paused", err
	})
}

func poll(ctx context.Context, done func() (bool, error)) error {
	tick := time.NewTicker(migrationPoll)
	defer tick.Stop()
	for {
		if ok, err := done(); ok || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
