package overlay

import (
	"context"

	"golang.org/x/sync/errgroup"
)

// ordered runs work on items in parallel and consume on the results in the order of the
// items, one at a time. produce calls yield for each item and returns its error. At most
// 2*workers items are under way, which bounds memory. newWork makes a worker's own function,
// so that each may keep buffers.
func ordered[T, R any](ctx context.Context, workers int,
	produce func(yield func(T) error) error,
	newWork func() (func(T) (R, error), error),
	consume func(R) error,
) error {
	type job struct {
		item T
		out  chan R
	}
	g, ctx := errgroup.WithContext(ctx)
	jobs := make(chan job)
	order := make(chan chan R, workers)
	g.Go(func() error {
		defer close(jobs)
		defer close(order)
		return produce(func(item T) error {
			j := job{item, make(chan R, 1)}
			select {
			case order <- j.out:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			select {
			case jobs <- j:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		})
	})
	for range workers {
		g.Go(func() error {
			work, err := newWork()
			if err != nil {
				return err
			}
			for j := range jobs {
				r, err := work(j.item)
				if err != nil {
					return err
				}
				j.out <- r
			}
			return nil
		})
	}
	g.Go(func() error {
		for out := range order {
			select {
			case r := <-out:
				if err := consume(r); err != nil {
					return err
				}
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		return nil
	})
	return g.Wait()
}
