package main

import (
	"archive/zip"
	"context"
	"errors"
	"fmt"
	"os"

	"cloudlet/integration/figures"
)

// describe sets what is known before the measurements: the machine, the sizes.
func (b *bench) describe(ctx context.Context) (err error) {
	r := &b.r
	r.Overlay, r.Rounds, r.Bound, r.EagerBytes = b.Made.Overlay, b.rounds, b.bound.Seconds(), b.Made.EagerBytes
	for name, size := range map[string]*int64{"packed.overlay": &r.OverlayBytes, "app.overlay": &r.PlainBytes} {
		info, err := os.Stat(b.files[name])
		if err != nil {
			return err
		}
		*size = info.Size()
	}
	if r.IndexBytes, err = indexSize(b.files["packed.overlay"]); err != nil {
		return err
	}
	h, err := b.QEMU().Probe(ctx)
	if err != nil {
		return err
	}
	host, err := figures.Host()
	if err != nil {
		return err
	}
	r.Host = fmt.Sprintf("%s, QEMU %s with %s", host, h.QEMU, b.Machine.Accelerator)
	return nil
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
