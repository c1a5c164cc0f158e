package handoff

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
)

// errUnsettled means that it is not known which record stands.
var errUnsettled = errors.New("it is not known whether it was written")

// store writes a record. It returns nil only if Store did, tried twice where the first error
// left the new record to be seen, which may not be durable; errUnsettled if it is not known
// which stands; any other error if the old one does.
func store(ctx context.Context, j Journal, record any) error {
	data, err := json.Marshal(record)
	if err != nil {
		return fmt.Errorf("write handoff record: %w", err)
	}
	if err = j.Store(ctx, data); err == nil {
		return nil
	}
	got, loadErr := j.Load(ctx)
	switch {
	case loadErr == nil && bytes.Equal(got, data):
		if again := j.Store(ctx, data); again != nil {
			return fmt.Errorf("write handoff record: %w: %w", errUnsettled, errors.Join(err, again))
		}
		return nil
	case loadErr != nil && !errors.Is(loadErr, fs.ErrNotExist):
		return fmt.Errorf("write handoff record: %w: %w", errUnsettled, errors.Join(err, loadErr))
	}
	return fmt.Errorf("write handoff record: %w", err)
}

// load reads a record into v and reports whether there is one.
func load(ctx context.Context, j Journal, v any) (bool, error) {
	data, err := j.Load(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read handoff record: %w", err)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return false, fmt.Errorf("read handoff record: %w", err)
	}
	if _, err := d.Token(); err != io.EOF {
		return false, errors.New("read handoff record: there is more behind it")
	}
	return true, nil
}
