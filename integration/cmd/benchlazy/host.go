package main

import (
	"archive/zip"
	"context"
	"errors"
	"fmt"
	"os"

	"cloudlet/integration/figures"
)

// describe returns results without measurements: the machine, the sizes.
func (b *bench) describe(ctx context.Context) (r results, err error) {
	r = results{Rounds: b.rounds, Bound: b.bound.Seconds(), EagerBytes: b.Made.EagerBytes}
	for path, size := range map[string]*int64{b.packed: &r.OverlayBytes, b.Path("app.overlay"): &r.PlainBytes} {
		info, err := os.Stat(path)
		if err != nil {
			return r, err
		}
		*size = info.Size()
	}
	if r.IndexBytes, err = indexSize(b.packed); err != nil {
		return r, err
	}
	h, err := b.QEMU().Probe(ctx)
	if err != nil {
		return r, err
	}
	host, err := figures.Host()
	if err != nil {
		return r, err
	}
	r.Host = fmt.Sprintf("%s, QEMU %s with %s", host, h.QEMU, b.Machine.Accelerator)
	return r, nil
}

// indexSize returns the bytes of an overlay's index.
func indexSize(path string) (size int64, err error) {
	z, err := zip.OpenReader(path)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, z.Close()) }()
	for _, f := range z.File {
		if f.Name == "index" {
			return int64(f.UncompressedSize64), nil
		}
	}
	return 0, fmt.Errorf("%s has no member index", path)
}
