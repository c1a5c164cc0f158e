package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"
	"cloudlet/api/service"
	"cloudlet/integration/figures"
	"cloudlet/overlay"

	"golang.org/x/sync/errgroup"
)

const (
	manyOverlays = 1000
	manyStarts   = 7
	manySize     = 1 << 20 // of each image of the base
	manyAtOnce   = 8       // imports
)

// startResult is about how fast a daemon starts over a large store.
type startResult struct {
	Overlays int       `json:"overlays"`
	Most     float64   `json:"ready_most_s"` // of all starts
	Median   float64   `json:"ready_s"`
	List     float64   `json:"first_list_s"` // median of the first GET /v1/overlays of each start
	All      []float64 `json:"all_ready_s"`  // every second one after kill -9
}

// start registers many overlays and starts the daemon over them, some times.
func (b *bench) start(ctx context.Context) error {
	b.say("register %d overlays", manyOverlays)
	if err := b.register(ctx); err != nil {
		return err
	}
	b.say("start the daemon over them, %d times", manyStarts)
	r := &startResult{}
	var lists []float64
	for i := range manyStarts {
		d, err := b.serve(ctx, b.path("many"))
		if err != nil {
			return err
		}
		r.All = append(r.All, d.took.Seconds())
		begun := time.Now()
		list, err := d.client.Overlays(ctx)
		lists = append(lists, time.Since(begun).Seconds())
		if r.Overlays = len(list); r.Overlays != manyOverlays && err == nil {
			err = fmt.Errorf("%d overlays are listed, %d were registered", r.Overlays, manyOverlays)
		}
		if err := errors.Join(err, d.end([]syscall.Signal{syscall.SIGKILL, syscall.SIGTERM}[i%2])); err != nil {
			return err
		}
	}
	r.Median, r.Most, r.List = figures.Median(r.All), slices.Max(r.All), figures.Median(lists)
	b.r.Start = r
	return nil
}

// register makes a store of its own with a small base and many overlays on it, each imported
// as any other.
func (b *bench) register(ctx context.Context) (err error) {
	if err := os.MkdirAll(b.path("tmp", "base"), 0o755); err != nil {
		return err
	}
	for _, s := range overlay.Spaces {
		p := make([]byte, manySize)
		rand.Read(p) // never fails
		if err := os.WriteFile(b.path("tmp", "base", s.String()), p, 0o644); err != nil {
			return err
		}
	}
	base, err := overlay.SealBase(ctx, b.path("tmp", "base"), nil, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, base.Close()) }()
	s, err := b.open(ctx, b.path("many"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close(ctx)) }()
	if err := importBase(ctx, s, base, b.path("tmp", "base.zip")); err != nil {
		return err
	}
	im, err := overlay.NewImage(base, nil, overlay.ImageOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(manyAtOnce)
	for i := range manyOverlays {
		g.Go(func() error { return b.registerOne(gctx, s, im, i) })
	}
	return g.Wait()
}

func importBase(ctx context.Context, s *service.Service, base *overlay.Base, path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if err := errors.Join(base.Export(ctx, f, nil), f.Close()); err != nil {
		return err
	}
	return do[api.Base](ctx, s, api.ImportBase{Source: path})
}

// registerOne makes and imports an overlay that changes the first bytes of one page.
func (b *bench) registerOne(ctx context.Context, s *service.Service, im *overlay.Image, i int) error {
	path := b.path("tmp", fmt.Sprintf("%d.overlay", i))
	_, err := overlay.Create(ctx, path, overlay.Launch{
		Parent: im, Machine: json.RawMessage(`{}`),
		Memory: overlay.Changes{
			Extents: []overlay.Extent{{Off: int64(i%(manySize/overlay.PageSize)) * overlay.PageSize, Len: overlay.PageSize}},
			Read: func(p []byte, _ int64) error {
				clear(p)
				binary.BigEndian.PutUint64(p, uint64(i+1))
				return nil
			},
		},
		Disk: overlay.Changes{},
	}, overlay.CreateOptions{Workers: 1})
	if err != nil {
		return err
	}
	return errors.Join(do[api.Overlay](ctx, s, api.ImportOverlay{Source: path}), os.Remove(path))
}

// do runs an operation in this process.
func do[T any](ctx context.Context, s *service.Service, req any) error {
	op, err := s.Submit(ctx, service.Caller{Name: "bench", Local: true}, req)
	for err == nil && ctx.Err() == nil && !op.State.Ended() {
		op, err = s.WaitOperation(ctx, op.ID, op.Version)
	}
	if err = errors.Join(err, context.Cause(ctx)); err != nil {
		return err
	}
	_, err = client.Result[T](op)
	return err
}
