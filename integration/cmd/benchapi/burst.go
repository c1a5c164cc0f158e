package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"cloudlet/api"
	"cloudlet/api/service"
	"cloudlet/fusefs"

	"golang.org/x/sync/errgroup"
)

const (
	burstSize   = 10
	burstRounds = 3
)

// burstResult is about many instances of one launch that are asked for at once.
type burstResult struct {
	Size   int     `json:"instances"`
	Rounds int     `json:"rounds"`
	P50    float64 `json:"first_answer_p50_s"`
	P95    float64 `json:"first_answer_p95_s"`
	Mounts int     `json:"mounts"` // the most at a time
	// Frames decoded when all had answered, and when afterwards every page was read; the
	// latter is the number of frames if each was decoded once.
	FramesDecoded int64     `json:"frames_decoded"`
	FramesAfter   int64     `json:"frames_decoded_after_all_was_read"`
	Frames        int64     `json:"frames"`
	Most          float64   `json:"times_decoded"` // the most of FramesAfter/Frames of a round
	All           []float64 `json:"all_first_answer_s"`
}

// burst asks for many instances at once, some times over.
func (b *bench) burst(ctx context.Context, d *daemon) error {
	r := &burstResult{Size: burstSize, Rounds: burstRounds}
	for round := range burstRounds {
		b.say("%d instances at once, round %d of %d", burstSize, round+1, burstRounds)
		if err := b.burstRound(ctx, d, r); err != nil {
			return err
		}
	}
	r.P50, r.P95 = quantile(r.All, 0.5), quantile(r.All, 0.95)
	b.r.Burst = r
	return nil
}

func (b *bench) burstRound(ctx context.Context, d *daemon, r *burstResult) (err error) {
	list := make([]api.Instance, burstSize)
	took := make([]float64, burstSize)
	defer func() {
		for _, in := range list {
			if in.ID != "" {
				err = errors.Join(err, d.client.DeleteInstance(context.WithoutCancel(ctx), in.ID, true))
			}
		}
	}()
	g, gctx := errgroup.WithContext(ctx)
	begun := time.Now()
	for i := range list {
		g.Go(func() (err error) {
			list[i], err = finish[api.Instance](gctx, d.client)(d.client.Run(gctx, b.launch))
			took[i] = time.Since(begun).Seconds()
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	r.All = append(r.All, took...)
	keys, err := b.mounts()
	if err != nil {
		return err
	}
	processes := map[int]bool{}
	for _, in := range list {
		processes[in.Mount.PID] = true
	}
	if r.Mounts = max(r.Mounts, len(keys), len(processes)); r.Mounts != 1 {
		return nil // missed: there is not the one to look at
	}
	before, err := b.mountStatus(ctx, keys[0])
	if err != nil {
		return err
	}
	if err := readAll(ctx, b.path("state", "mounts", keys[0], "fs")); err != nil {
		return err
	}
	after, err := b.mountStatus(ctx, keys[0])
	if err != nil {
		return err
	}
	r.FramesDecoded, r.FramesAfter, r.Frames = before.FramesDecoded, after.FramesDecoded, after.FrameCount
	r.Most = max(r.Most, float64(after.FramesDecoded)/float64(after.FrameCount))
	return nil
}

// mounts returns the keys of the store's mounts.
func (b *bench) mounts() ([]string, error) {
	table, err := os.ReadFile("/proc/self/mounts")
	var keys []string
	for line := range strings.Lines(string(table)) {
		if rest, ok := strings.CutPrefix(strings.Fields(line)[1], b.path("state", "mounts")+"/"); ok {
			keys = append(keys, strings.TrimSuffix(rest, "/fs"))
		}
	}
	if err == nil && len(keys) == 0 {
		err = errors.New("instances run, and nothing is mounted")
	}
	return keys, err
}

// mountStatus asks the mount process how it has read the overlays.
func (b *bench) mountStatus(ctx context.Context, key string) (out service.MountStatus, err error) {
	st, err := fusefs.Dial(b.path("state", "mounts", key, "control")).Status(ctx)
	if err != nil {
		return out, err
	}
	return out, json.Unmarshal(st.Image, &out)
}

// readAll reads both images of a mount from beginning to end.
func readAll(ctx context.Context, dir string) error {
	buf := make([]byte, 1<<20)
	for _, name := range []string{fusefs.MemoryName, fusefs.DiskName} {
		f, err := os.Open(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		for err == nil && ctx.Err() == nil {
			_, err = f.Read(buf)
		}
		if errors.Is(err, io.EOF) {
			err = nil
		}
		if err = errors.Join(err, context.Cause(ctx), f.Close()); err != nil {
			return fmt.Errorf("read all of %s: %w", name, err)
		}
	}
	return nil
}
