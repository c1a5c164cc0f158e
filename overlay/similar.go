package overlay

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"slices"
)

// Codecs find repetition within a frame only, so pages that resemble one another belong into
// the same one. Whether a page resembles the base's page at its address is counted (shareWords);
// which of the others resemble one another is told by sketches: the least values, by some hash functions,
// of the runs of bytes in a page (Broder, On the resemblance and containment of documents,
// 1997; sampled by content as in Manber, Finding similar files in a large file system, 1994).

const (
	// sketchSize is the number of hash functions. More find hardly more, fewer less.
	sketchSize = 4
	// sketchRun is the length of a run in bytes: what shifts out of a 64-bit hash by 4 bits a
	// byte.
	sketchRun = 16
	// sketchMask samples one run of 64, by its content.
	sketchMask = 63 << 40
	// similarSpan is the number of pages that are ordered together: 1 GiB of them, and about
	// 60 bytes of memory each.
	similarSpan = 1 << 18
	// sharedWords is the least number of words that a page has in common with the base's where
	// a delta pays, by three real guests.
	sharedWords = 32
	// sketchBatch is the number of pages that a worker reads at a time.
	sketchBatch = 256
)

// sketch holds the least values of a page; noValue where it has none, as a page of one byte.
type sketch [sketchSize]uint32

const noValue = ^uint32(0)

// gear are the random words of the rolling hash, mix the factors of the hash functions. Both
// are a part of what makes the bytes of an overlay.
var gear, mix = func() (g [256]uint64, m [sketchSize]uint64) {
	x := uint64(0)
	next := func() uint64 { // SplitMix64
		x += 0x9E3779B97F4A7C15
		z := (x ^ x>>30) * 0xBF58476D1CE4E5B9
		z = (z ^ z>>27) * 0x94D049BB133111EB
		return z ^ z>>31
	}
	for i := range g {
		g[i] = next()
	}
	for i := range m {
		m[i] = next() | 1
	}
	return g, m
}()

func newSketch(page []byte) (s sketch) {
	for k := range s {
		s[k] = noValue
	}
	var h uint64
	for _, b := range page[:sketchRun] {
		h = h<<4 + gear[b]
	}
	for _, b := range page[sketchRun:] {
		h = h<<4 + gear[b]
		if h&sketchMask != 0 {
			continue
		}
		for k := range s {
			s[k] = min(s[k], uint32(h*mix[k]>>32))
		}
	}
	return s
}

// shareWords reports whether pages have enough words of 8 bytes in common, in the same
// places, that the one makes the other smaller; words of zeros do not count.
func shareWords(p, q []byte) bool {
	n := 0
	for i := 0; i < PageSize; i += 8 {
		if w := binary.LittleEndian.Uint64(p[i:]); w != 0 && w == binary.LittleEndian.Uint64(q[i:]) {
			n++
		}
	}
	return n >= sharedWords
}

// sketched is a page and its sketch, which is zero where own or stride is set.
type sketched struct {
	addr   Addr
	sketch sketch
	// own: the page resembles the base's page at its address, so that a delta to that makes it
	// smaller. To any other page a delta does harm: it hides what the page shares with others.
	own bool
	// stride, if not 0, is the size in words of the records in the page.
	stride uint8
}

// bySimilarity parts addrs, which ascend, into the pages that resemble the base's at the same
// address and those of records of one size, by address, and the others, in an order that has
// similar pages of the same image together.
func (c *creation) bySimilarity(ctx context.Context, addrs []Addr) ([]group, error) {
	size := c.strategy.FrameSize
	own, others := group{size: size, delta: c.strategy.Delta}, group{size: size}
	var records [maxStrideWords + 1]group
	for len(addrs) > 0 {
		n := 1
		for n < len(addrs) && n < similarSpan && addrs[n].Space() == addrs[0].Space() {
			n++
		}
		pages, err := c.sketches(ctx, addrs[:n])
		if err != nil {
			return nil, fmt.Errorf("look for similar pages: %w", err)
		}
		rest := pages[:0]
		for _, p := range pages {
			switch {
			case p.own:
				own.addrs = append(own.addrs, p.addr)
			case p.stride > 0:
				records[p.stride].addrs = append(records[p.stride].addrs, p.addr)
			default:
				rest = append(rest, p)
			}
		}
		for _, i := range chain(rest) {
			others.addrs = append(others.addrs, rest[i].addr)
		}
		addrs = addrs[n:]
	}
	parts := []group{own}
	for n, g := range records {
		g.size, g.stride = size, n
		parts = append(parts, g)
	}
	return append(parts, others), nil
}

// sketches reads the pages at addrs, and the base's where there may be deltas to them.
func (c *creation) sketches(ctx context.Context, addrs []Addr) (out []sketched, err error) {
	out = make([]sketched, 0, len(addrs))
	err = ordered(ctx, c.workers,
		func(yield func([]Addr) error) error {
			for batch := range slices.Chunk(addrs, sketchBatch) {
				if err := yield(batch); err != nil {
					return err
				}
			}
			return nil
		},
		func() (func([]Addr) ([]sketched, error), error) {
			pages, base := make([]byte, sketchBatch*PageSize), make([]byte, sketchBatch*PageSize)
			return func(batch []Addr) ([]sketched, error) {
				if err := c.readLaunch(pages[:len(batch)*PageSize], batch); err != nil {
					return nil, err
				}
				if c.strategy.Delta != DeltaNone {
					if err := readPages(base[:len(batch)*PageSize], batch, c.l.Parent.base.ReadRaw); err != nil { // an order needs no proof
						return nil, err
					}
				}
				list := make([]sketched, len(batch))
				for i := range list {
					page, under := pages[i*PageSize:][:PageSize], base[i*PageSize:][:PageSize] // zero where there are no deltas
					list[i] = c.sketch(batch[i], page, under)
				}
				return list, nil
			}, nil
		},
		func(list []sketched) error {
			out = append(out, list...)
			return nil
		})
	return out, err
}

// sketch tells where a page belongs; under is the base's page at its address.
func (c *creation) sketch(a Addr, page, under []byte) sketched {
	s := sketched{addr: a, own: shareWords(page, under)}
	if !s.own && c.strategy.Stride {
		s.stride = uint8(strideOf(page))
	}
	if !s.own && s.stride == 0 {
		s.sketch = newSketch(page)
	}
	return s
}

// chain orders pages by their sketches: each is followed by one that shares a value with it,
// or with one before it, as long as there are some, and then by the next in line.
func chain(pages []sketched) []int32 {
	// For each value the pages that have it, ascending: a range of order[k], which begins at
	// at[k] of each of these pages.
	var order, at [sketchSize][]int32
	for k := range sketchSize {
		order[k], at[k] = make([]int32, len(pages)), make([]int32, len(pages))
		for i := range order[k] {
			order[k][i] = int32(i)
		}
		slices.SortFunc(order[k], func(a, b int32) int {
			return cmp.Or(cmp.Compare(pages[a].sketch[k], pages[b].sketch[k]), cmp.Compare(a, b))
		})
		for pos, i := range order[k] {
			at[k][i] = int32(pos)
			if pos > 0 {
				if before := order[k][pos-1]; pages[before].sketch[k] == pages[i].sketch[k] {
					at[k][i] = at[k][before]
				}
			}
		}
	}
	const spent = -1 // a range that was followed, at its first page
	out := make([]int32, 0, len(pages))
	done := make([]bool, len(pages))
	var stack []int32
	for next := range pages {
		stack = append(stack, int32(next))
		for len(stack) > 0 {
			i := stack[len(stack)-1]
			stack = stack[:len(stack)-1]
			if done[i] {
				continue
			}
			done[i] = true
			out = append(out, i)
			for k := range sketchSize {
				value, from := pages[i].sketch[k], at[k][i]
				if value == noValue || from == spent {
					continue
				}
				for pos := from; int(pos) < len(pages); pos++ {
					j := order[k][pos]
					if pages[j].sketch[k] != value {
						break
					}
					at[k][j] = spent
					if !done[j] {
						stack = append(stack, j)
					}
				}
			}
		}
	}
	return out
}
