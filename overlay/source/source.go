package source

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
)

// Source is an immutable run of bytes; see the package's documentation for the contract of
// ReadAt. String names it for messages.
type Source interface {
	Size() int64
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
	Close() error
	String() string
}

// ErrChanged says that what a source reads is not what it was when it was opened.
var ErrChanged = errors.New("changed while in use")

// ErrClosed is returned by reads of a closed source.
var ErrClosed = errors.New("source is closed")

// Error is an error of a source with what was done to what.
type Error struct {
	Op   string // "open" or "read"
	Name string // of the source
	Err  error
	temp bool
}

// Error names operation and source.
func (e *Error) Error() string { return e.Op + " " + e.Name + ": " + e.Err.Error() }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Temporary reports whether the same call may succeed later.
func (e *Error) Temporary() bool { return e.temp }

// Temporary reports whether err is of a source that may be able to read later.
func Temporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary()
}

// Open opens a path, a file:// URL, or an http:// or https:// URL with default options. The
// caller closes the source.
func Open(ctx context.Context, ref string) (Source, error) {
	scheme, _, found := strings.Cut(ref, "://")
	if !found {
		return opened(OpenFile(ref))
	}
	switch strings.ToLower(scheme) {
	case "http", "https":
		return opened(OpenHTTP(ctx, ref, HTTPOptions{}))
	case "file":
		u, err := url.Parse(ref)
		if err != nil {
			return nil, fmt.Errorf("open %q: %w", ref, err)
		}
		if u.Host != "" && u.Host != "localhost" || u.Path == "" {
			return nil, fmt.Errorf("open %q: a file URL is file:///PATH", ref)
		}
		return opened(OpenFile(u.Path))
	}
	return nil, fmt.Errorf("open %.20s://: no such kind of source: use a path, file://, http:// or https://", scheme)
}

// opened keeps a nil pointer from becoming an interface that is not nil.
func opened[S Source](s S, err error) (Source, error) {
	if err != nil {
		return nil, err
	}
	return s, nil
}

// clamp checks an offset and returns how many of n bytes at off lie within size.
func clamp(name string, n int, off, size int64) (int, error) {
	if off < 0 {
		return 0, &Error{Op: "read", Name: name, Err: fmt.Errorf("negative offset %d", off)}
	}
	return int(min(int64(n), max(0, size-off))), nil
}
