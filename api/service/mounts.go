package service

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"cloudlet/api"
	"cloudlet/fusefs"

	"golang.org/x/sys/unix"
)

// mountKey names the mount of a launch image: short, so that socket paths stay short.
func mountKey(image string) string { return image[:16] }

func (s *Service) mountPath(key string, parts ...string) string {
	return s.path(append([]string{"mounts", key}, parts...)...)
}

// mount makes sure that the launch image is mounted. A record that names the mount must
// exist already, or the mount may be ended again.
func (s *Service) mount(ctx context.Context, l *launchImage, key string, prefetch api.Prefetch) error {
	spec := l.spec(s.mountPath(key, "fs"), s.cfg.MountMemory)
	spec.Prefetch, spec.Cache, spec.CacheLimit = prefetch, s.path("cache"), s.cfg.CacheLimit
	spec.Record, spec.Profile = isRecording(key), s.profilePath(spec.Image)
	account, err := s.vmm.Account(ctx)
	if err != nil {
		return err
	}
	spec.Shared = account.Other()
	spec.Socket, spec.Alive = s.mountPath(key, "control"), s.mountPath(key, "alive")
	lk, err := s.lockMount(ctx, key)
	if err != nil {
		return err
	}
	defer lk.unlock()
	if s.mountLives(key) {
		return nil
	}
	if err := s.clearMount(key); err != nil {
		return err
	}
	if err := os.MkdirAll(spec.Dir, 0o700); err != nil {
		return err
	}
	if err := writeJSON(s.mountPath(key, "spec.json"), spec); err != nil {
		return err
	}
	if err := os.WriteFile(spec.Alive, nil, 0o600); err != nil {
		return err
	}
	return s.startMount(ctx, key, lk)
}

// lockMount makes the folder of a mount and takes its lock. The end of an earlier mount may
// remove the folder in between: then it is made again.
func (s *Service) lockMount(ctx context.Context, key string) (*lock, error) {
	for {
		if err := os.MkdirAll(s.mountPath(key), 0o700); err != nil {
			return nil, err
		}
		lk, err := waitLock(ctx, s.mountPath(key), unix.LOCK_EX)
		if !errors.Is(err, fs.ErrNotExist) {
			return lk, err
		}
	}
}

// startMount runs the mount process of the store's mount and waits until it serves.
func (s *Service) startMount(ctx context.Context, key string, lk *lock) error {
	err := s.startMountProcess(ctx, s.mountPath(key, "spec.json"), s.mountPath(key, "log"), lk)
	if err == nil {
		// The kernel keeps pages only for a file that was looked up, which the mount process
		// must not do itself: so it can push before QEMU opens it.
		_, err = os.Lstat(s.mountPath(key, "fs", fusefs.MemoryName))
	}
	if err != nil {
		return errors.Join(err, s.clearMount(key))
	}
	return nil
}

// startMountProcess runs a mount process of its own session and waits until it serves: the
// process says "ready" on its descriptor 3 and lives on. If it ends before, its log says why.
// Its descriptor 4 is the lock that the caller holds: should the caller be killed, it stays
// until the process can be seen by the locks of its own.
func (s *Service) startMountProcess(ctx context.Context, spec, logPath string, lk *lock) error {
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	ready, child, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	args := append(append([]string{}, s.cfg.Program[1:]...), "mount", "--spec", spec)
	cmd := exec.Command(s.cfg.Program[0], args...)
	cmd.Stderr, cmd.ExtraFiles = log, []*os.File{child, lk.f}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	child.Close()
	if err != nil {
		return fmt.Errorf("start mount process: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { ready.SetReadDeadline(time.Now()) })
	defer stop()
	said, err := io.ReadAll(io.LimitReader(ready, 6))
	if string(said) == "ready\n" {
		go cmd.Wait() // ends with the mount: a daemon keeps no dead child
		return nil
	}
	cmd.Process.Kill() // our own child, not yet waited for: the pid is its own
	cmd.Wait()         // its exit status says nothing that its log does not
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return mountError(logPath, err)
}

// MountDetached mounts what ref names on dir by a process that lives on until dir is
// unmounted.
func (s *Service) MountDetached(ctx context.Context, ref, dir string) (err error) {
	spec, err := s.MountSpec(ctx, ref, dir)
	if err != nil {
		return err
	}
	st, err := s.newStage(ctx, "mount")
	if err != nil {
		return fail(err)
	}
	defer func() { err = fail(errors.Join(err, st.drop())) }()
	path := filepath.Join(st.dir, "spec.json")
	if err := writeJSON(path, spec); err != nil {
		return err
	}
	return s.startMountProcess(ctx, path, filepath.Join(st.dir, "log"), st.lock)
}

// mountError is what the log of a mount process that failed says.
func mountError(path string, err error) error {
	b, rerr := os.ReadFile(path)
	if rerr != nil {
		return errors.Join(err, rerr)
	}
	lines := strings.Split(string(bytes.TrimSpace(b)), "\n")
	text := strings.TrimPrefix(lines[len(lines)-1], "cloudlet: ")
	if text == "" {
		return fmt.Errorf("mount process ended without a word: %v", err)
	}
	return api.Errorf(api.Unavailable, "mount launch image: %s", text)
}

func (s *Service) mountLives(key string) bool { return isLocked(s.mountPath(key, "alive")) }

// clearMount removes what a dead mount process left: the connection, the mountpoint.
func (s *Service) clearMount(key string) error {
	if err := fusefs.AbortConnection(s.mountPath(key, "fs")); err != nil {
		return fmt.Errorf("clear dead mount: %w", err)
	}
	return ignoreMissing(os.Remove(s.mountPath(key, "control")))
}

// releaseMount ends a mount that no living instance uses.
func (s *Service) releaseMount(ctx context.Context, key string) error {
	lk, err := waitLock(ctx, s.mountPath(key), unix.LOCK_EX)
	if err != nil {
		return ignoreMissing(err)
	}
	defer lk.unlock()
	used, err := s.mountUsed(key)
	if err != nil || used {
		return err
	}
	if s.mountLives(key) {
		s.noteMount(ctx, key)
		if err := s.endMount(ctx, key); err != nil {
			return err
		}
	}
	return errors.Join(s.clearMount(key), os.RemoveAll(s.mountPath(key)))
}

// endMount unmounts, by force where the mount process does not do it in time.
func (s *Service) endMount(ctx context.Context, key string) error {
	bound, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	control := fusefs.Dial(s.mountPath(key, "control"))
	// Nobody is there any more for whom a read should wait: one that does would keep the mount.
	err := control.Abort(bound)
	if err == nil {
		err = control.Unmount(bound, false)
	}
	if err == nil {
		err = s.waitMountGone(bound, key)
	}
	if err == nil {
		return nil
	}
	s.log.Warn("unmount by force", "mount", key, "err", err)
	if err := fusefs.AbortConnection(s.mountPath(key, "fs")); err != nil {
		return err
	}
	if pid, err := s.mountPID(key); err == nil && s.mountLives(key) {
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			if s.mountLives(key) { // the lock is held, so the pid is still its own
				unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
			}
			unix.Close(fd)
		}
	}
	bound, cancel = context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return s.waitMountGone(bound, key)
}

// waitMountGone waits until the mount process has ended: its lock is free.
func (s *Service) waitMountGone(ctx context.Context, key string) error {
	l, err := waitLock(ctx, s.mountPath(key, "alive"), unix.LOCK_SH)
	if err != nil {
		return ignoreMissing(err)
	}
	l.unlock()
	return nil
}

// mountPID returns what a mount process wrote into its alive file.
func (s *Service) mountPID(key string) (int, error) {
	b, err := os.ReadFile(s.mountPath(key, "alive"))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// guestRuns tells the mount of an instance that its guest runs. Without it the mount waits longer
// before it takes the guest to be at rest.
func (s *Service) guestRuns(ctx context.Context, r *record) {
	bound, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if err := fusefs.Dial(s.mountPath(r.Mount, "control")).Begin(bound); err != nil {
		s.log.Warn("the mount does not know that its guest runs", "instance", r.ID, "mount", r.Mount, "problem", err)
	}
}

// describeMount asks a mount process how it is.
func (s *Service) describeMount(ctx context.Context, key string) (*api.Mount, error) {
	bound, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	st, err := fusefs.Dial(s.mountPath(key, "control")).Status(bound)
	if err != nil {
		return nil, err
	}
	var image MountStatus
	if err := json.Unmarshal(st.Image, &image); err != nil {
		return nil, fmt.Errorf("read status of mount %s: %w", key, err)
	}
	m := &api.Mount{
		Dir: st.Mountpoint, PID: st.PID, Fetched: image.Fetched, Complete: image.Complete,
		MemoryReads: st.Memory.Reads, MemoryBytes: st.Memory.Bytes, MemoryPushed: st.Memory.Pushed, DiskReads: st.Disk.Reads, DiskBytes: st.Disk.Bytes,
	}
	for _, h := range st.Held {
		held := api.Held{Image: h.File, Offset: h.Offset, Since: h.Since, Error: h.Error}
		for _, stall := range image.Stalls {
			if stall.Image == h.File && stall.Offset == h.Offset {
				held.Error = stall.Error
			}
		}
		m.Held = append(m.Held, held)
	}
	return m, nil
}

// abort makes the reads that an instance's mount holds fail, and its guest with them.
func (s *Service) abort(ctx context.Context, ref string) error {
	id, err := s.findInstance(ref)
	if err != nil {
		return fail(err)
	}
	r, err := s.readRecord(id)
	if err != nil {
		return fail(err)
	}
	return fail(fusefs.Dial(s.mountPath(r.Mount, "control")).Abort(ctx))
}
