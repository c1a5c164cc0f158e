package vcdiff

import (
	"bytes"
	"hash/adler32"
)

// window is one window of a delta, its header parsed.
type window struct {
	fromTarget  bool   // the segment is of the target before it, else of the source
	start, size uint64 // of the segment
	target      int    // bytes that the window makes
	sum         uint32
	summed      bool // sum is the target's Adler-32

	data, inst, addr []byte
}

// run makes the window's target in dst, whose length is the window's target. segment fills p
// from offset off of the segment, within its size.
func (w *window) run(dst []byte, segment func(p []byte, off uint64) error) error {
	data, inst, from := w.data, w.inst, addresses{in: w.addr}
	pos := 0
	for len(inst) > 0 {
		pair := &standard[inst[0]]
		inst = inst[1:]
		for i := range pair {
			op := &pair[i]
			if op.kind == noop {
				continue
			}
			n := uint64(op.size)
			if n == 0 {
				var err error
				if n, inst, err = number(inst); err != nil {
					return err
				}
				if n == 0 {
					return corrupt("instruction of no bytes at %d", pos)
				}
			}
			if n > uint64(len(dst)-pos) {
				return corrupt("instruction of %d bytes at %d of a target of %d", n, pos, len(dst))
			}
			out := dst[pos : pos+int(n)]
			switch op.kind {
			case add:
				if n > uint64(len(data)) {
					return errShort
				}
				copy(out, data)
				data = data[n:]
			case run:
				if len(data) == 0 {
					return errShort
				}
				fill(out, data[0])
				data = data[1:]
			default:
				at, err := from.take(op.mode, w.size+uint64(pos))
				if err != nil {
					return err
				}
				if err := w.copy(dst, pos, out, at, segment); err != nil {
					return err
				}
			}
			pos += int(n)
		}
	}
	switch {
	case pos != len(dst):
		return corrupt("window makes %d bytes, announces %d", pos, len(dst))
	case len(data) > 0 || len(from.in) > 0:
		return corrupt("%d bytes of data and %d of addresses are left over", len(data), len(from.in))
	case w.summed && adler32.Checksum(dst) != w.sum:
		return corrupt("target of %d bytes does not match its sum", len(dst))
	}
	return nil
}

// copy fills out, which stands at pos in dst, from address at: the segment, and behind it the
// target so far, which may grow into what it copies from.
func (w *window) copy(dst []byte, pos int, out []byte, at uint64, segment func([]byte, uint64) error) error {
	if at < w.size {
		n := min(uint64(len(out)), w.size-at)
		if err := segment(out[:n], at); err != nil {
			return err
		}
		out, pos, at = out[n:], pos+int(n), at+n
	}
	for begin := int(at - w.size); len(out) > 0; { // what is there doubles each time
		n := copy(out, dst[begin:pos])
		out, pos = out[n:], pos+n
	}
	return nil
}

func fill(p []byte, c byte) {
	if c == 0 {
		clear(p)
		return
	}
	p[0] = c
	for n := 1; n < len(p); n *= 2 {
		copy(p[n:], p[:n])
	}
}

// parseWindow reads the header of the next window and its sections. made is how many bytes
// the windows before it made, source the size of the source, most the cap of the target.
func parseWindow(in input, made, source uint64, most int) (*window, error) {
	flags, err := in.ReadByte()
	if err != nil {
		return nil, err
	}
	w := &window{fromTarget: flags&winTarget != 0, summed: flags&winAdler32 != 0}
	if flags&^(winSource|winTarget|winAdler32) != 0 || flags&winSource != 0 && w.fromTarget {
		return nil, corrupt("unknown window indicator %#x", flags)
	}
	if flags&(winSource|winTarget) != 0 {
		if err := numbers(in, &w.size, &w.start); err != nil {
			return nil, err
		}
		if w.fromTarget {
			source = made
		}
		if w.size > source || w.start > source-w.size {
			return nil, corrupt("segment of %d bytes at %d is outside of the %d there are", w.size, w.start, source)
		}
	}
	var length, target, data, inst, addr uint64
	if err := numbers(in, &length, &target); err != nil {
		return nil, err
	}
	if target > uint64(most) {
		return nil, corrupt("window of %d bytes, the limit is %d", target, most)
	}
	w.target = int(target)
	compressed, err := in.ReadByte()
	if err != nil {
		return nil, short(err)
	}
	if compressed != 0 {
		return nil, unsupported("sections with secondary compression")
	}
	if err := numbers(in, &data, &inst, &addr); err != nil {
		return nil, err
	}
	// An instruction makes one byte at least, and has two for that, or three for 128; an
	// address has ten at most.
	if data > target || inst > 2*target || addr > 10*target {
		return nil, corrupt("window of %d bytes has sections of %d, %d and %d", target, data, inst, addr)
	}
	rest := 1 + numberSize(target) + numberSize(data) + numberSize(inst) + numberSize(addr) + data + inst + addr
	if w.summed {
		rest += 4
		for range 4 {
			c, err := in.ReadByte()
			if err != nil {
				return nil, short(err)
			}
			w.sum = w.sum<<8 | uint32(c)
		}
	}
	if rest != length {
		return nil, corrupt("window announces %d bytes and has %d", length, rest)
	}
	b, err := in.section(int(data + inst + addr))
	if err != nil {
		return nil, short(err)
	}
	w.data, w.inst, w.addr = b[:data], b[data:data+inst], b[data+inst:]
	return w, nil
}

// parseHeader reads the file's header.
func parseHeader(in input) error {
	b, err := in.section(5)
	if err != nil {
		return short(err)
	}
	if !bytes.Equal(b[:3], magic) {
		return corrupt("it does not begin as a VCDIFF file")
	}
	if b[3] != 0 {
		return unsupported("VCDIFF version %#x", b[3])
	}
	switch flags := b[4]; {
	case flags&headSecondary != 0:
		return unsupported("secondary compression")
	case flags&headTable != 0:
		return unsupported("a code table of the file's own")
	case flags&^headApplication != 0:
		return corrupt("unknown header indicator %#x", flags)
	case flags == 0:
		return nil
	}
	var n uint64
	if err := numbers(in, &n); err != nil {
		return err
	}
	if n > maxApplication {
		return corrupt("application header of %d bytes, the limit is %d", n, maxApplication)
	}
	_, err = in.section(int(n))
	return short(err)
}
