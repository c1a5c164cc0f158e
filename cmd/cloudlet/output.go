package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// output is a file that appears at its path only when it is whole.
type output struct {
	*os.File
	path string
	gone bool
}

// newOutput opens a temporary file beside path.
func newOutput(path string) (*output, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return nil, hostError(fmt.Errorf("write %s: %w", path, err))
	}
	return &output{File: f, path: path}, nil
}

// finish puts the file in its place if err is nil, else removes it and returns err. Calls
// after the first do nothing.
func (o *output) finish(err error) error {
	if o.gone {
		return err
	}
	o.gone = true
	if err == nil {
		err = errors.Join(o.Chmod(0o644), o.Sync())
	}
	if cerr := o.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(o.Name(), o.path)
	}
	if err != nil {
		return errors.Join(hostError(err), os.Remove(o.Name()))
	}
	dir, err := os.Open(filepath.Dir(o.path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
