package vcdiff

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
)

// Errors of deltas. They arrive wrapped; test with errors.Is.
var (
	// ErrFormat: the bytes are not a VCDIFF delta, or are damaged, or are one of another source.
	ErrFormat = errors.New("not a valid VCDIFF delta")
	// ErrUnsupported: the delta uses what this package does not read.
	ErrUnsupported = errors.New("VCDIFF delta is not supported")

	errShort = fmt.Errorf("%w: it is cut off", ErrFormat)
)

const (
	headSecondary   = 1 // a secondary compressor's id follows
	headTable       = 2 // a code table follows
	headApplication = 4 // xdelta3: size and text for the application follow

	winSource  = 1
	winTarget  = 2
	winAdler32 = 4 // xdelta3: the target's sum stands behind the sections' sizes

	maxApplication = 64 << 10
	defaultWindow  = 16 << 20
)

var magic = []byte{'V' | 0x80, 'C' | 0x80, 'D' | 0x80}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrFormat}, args...)...)
}

func unsupported(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{ErrUnsupported}, args...)...)
}

// short turns an end of the delta into an error of it.
func short(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errShort
	}
	return err
}

// Apply fills dst from a whole delta, which must make exactly that many bytes, and its
// source. It allocates nothing that grows with either.
func Apply(dst, source, delta []byte) error {
	in := &memory{delta}
	if err := parseHeader(in); err != nil {
		return err
	}
	pos := 0
	for len(in.rest) > 0 {
		w, err := parseWindow(in, uint64(pos), uint64(len(source)), len(dst)-pos)
		if err != nil {
			return short(err)
		}
		from := source
		if w.fromTarget {
			from = dst[:pos]
		}
		from = from[w.start : w.start+w.size]
		err = w.run(dst[pos:pos+w.target], func(p []byte, off uint64) error {
			copy(p, from[off:])
			return nil
		})
		if err != nil {
			return err
		}
		pos += w.target
	}
	if pos != len(dst) {
		return corrupt("it makes %d bytes, want %d", pos, len(dst))
	}
	return nil
}

// Source is what a delta refers to: a *bytes.Reader, an *io.SectionReader.
type Source interface {
	io.ReaderAt
	Size() int64
}

// Target is where Decode writes, from the beginning on, and reads back what it has written:
// an empty *os.File.
type Target interface {
	io.Writer
	io.ReaderAt
}

// Limits bound what a delta may ask for; the zero value is fit for files of any size whose
// windows are no larger than 16 MiB.
type Limits struct {
	Window int   // bytes of the target of one window; its sections may have 13 times as many
	Total  int64 // bytes of the target; 0: no bound
}

// Decode writes the target of a whole delta to dst, a window at a time, and returns its size.
// On error what has been written is of no use.
func Decode(dst Target, source Source, delta io.Reader, l Limits) (int64, error) {
	if l.Window <= 0 {
		l.Window = defaultWindow
	}
	if l.Total <= 0 {
		l.Total = math.MaxInt64
	}
	in := &stream{Reader: bufio.NewReaderSize(delta, 64<<10)}
	if err := parseHeader(in); err != nil {
		return 0, err
	}
	var made int64
	var out []byte
	for {
		if _, err := in.Peek(1); err == io.EOF {
			return made, nil
		}
		w, err := parseWindow(in, uint64(made), uint64(source.Size()), int(min(int64(l.Window), l.Total-made)))
		if err != nil {
			return made, fmt.Errorf("decode VCDIFF window at %d: %w", made, short(err))
		}
		from := io.ReaderAt(source)
		if w.fromTarget {
			from = dst
		}
		if cap(out) < w.target {
			out = make([]byte, w.target)
		}
		err = w.run(out[:w.target], func(p []byte, off uint64) error { return readAt(from, p, int64(w.start+off)) })
		if err != nil {
			return made, fmt.Errorf("decode VCDIFF window at %d: %w", made, err)
		}
		if _, err := dst.Write(out[:w.target]); err != nil {
			return made, fmt.Errorf("write target at %d: %w", made, err)
		}
		made += int64(w.target)
	}
}

func readAt(r io.ReaderAt, p []byte, off int64) error {
	if n, err := r.ReadAt(p, off); n < len(p) {
		return fmt.Errorf("read %d bytes at %d of the source: %w", len(p), off, err)
	}
	return nil
}

// input is where a delta comes from.
type input interface {
	io.ByteReader
	section(n int) ([]byte, error) // the next n bytes, valid until the next call
}

type memory struct{ rest []byte }

func (m *memory) ReadByte() (byte, error) {
	if len(m.rest) == 0 {
		return 0, io.EOF
	}
	c := m.rest[0]
	m.rest = m.rest[1:]
	return c, nil
}

func (m *memory) section(n int) ([]byte, error) {
	if n > len(m.rest) {
		return nil, io.ErrUnexpectedEOF
	}
	b := m.rest[:n:n]
	m.rest = m.rest[n:]
	return b, nil
}

type stream struct {
	*bufio.Reader
	buf bytes.Buffer // grows with what arrives
}

func (s *stream) section(n int) ([]byte, error) {
	s.buf.Reset()
	_, err := io.CopyN(&s.buf, s.Reader, int64(n))
	return s.buf.Bytes(), err
}

// numbers reads integers of section 2 of the RFC: seven bits a byte, the highest first.
func numbers(in io.ByteReader, into ...*uint64) error {
	for _, v := range into {
		*v = 0
		for i := 0; ; i++ {
			c, err := in.ReadByte()
			if err != nil {
				return short(err)
			}
			if i == 0 && c == 0x80 || *v > math.MaxInt64>>7 {
				return corrupt("number is too long")
			}
			*v = *v<<7 | uint64(c&0x7f)
			if c < 0x80 {
				break
			}
		}
	}
	return nil
}

// number takes one integer from the front of b.
func number(b []byte) (v uint64, rest []byte, err error) {
	for i, c := range b {
		if i == 0 && c == 0x80 || v > math.MaxInt64>>7 {
			return 0, nil, corrupt("number is too long")
		}
		v = v<<7 | uint64(c&0x7f)
		if c < 0x80 {
			return v, b[i+1:], nil
		}
	}
	return 0, nil, errShort
}

// numberSize returns how many bytes v has as a number.
func numberSize(v uint64) uint64 {
	n := uint64(1)
	for ; v >= 0x80; v >>= 7 {
		n++
	}
	return n
}
