package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"cloudlet/integration/demoguest"
)

// demo is one run of the demonstration.
type demo struct {
	options      demoguest.Options
	out, picture string
	publish      string // root of the project, to renew its documents
	rounds       int
	walking      bool

	*demoguest.Lab
	round int // the present one; it chooses the request
}

func (d *demo) run(ctx context.Context) (err error) {
	for _, p := range []*string{&d.out, &d.picture} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Dir(d.out), 0o755); err != nil {
		return err
	}
	if d.Lab, err = demoguest.Open(ctx, d.options); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close(ctx)) }()
	if d.walking {
		return d.walk(ctx)
	}
	r, err := d.measure(ctx)
	if err != nil {
		return err
	}
	return d.report(ctx, r)
}
