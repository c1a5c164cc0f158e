package vcdiff

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"cloudlet/integration/need"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// encode returns what xdelta3 makes of source and target.
func encode(t testing.TB, source, target []byte, args ...string) []byte {
	dir := t.TempDir()
	s, d := filepath.Join(dir, "source"), filepath.Join(dir, "target")
	require.NoError(t, os.WriteFile(s, source, 0o600))
	require.NoError(t, os.WriteFile(d, target, 0o600))
	cmd := exec.CommandContext(t.Context(), need.Program(t, "xdelta3"), append(append([]string{"-e", "-S", "none", "-c"}, args...), "-s", s, d)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	require.NoError(t, err)
	return out
}

// decode runs both ways to decode and requires that they agree.
func decode(t testing.TB, source, delta []byte, size int) ([]byte, error) {
	out := make([]byte, size)
	err := Apply(out, source, delta)
	f, ferr := os.Create(filepath.Join(t.TempDir(), "out"))
	require.NoError(t, ferr)
	defer f.Close()
	n, derr := Decode(f, bytes.NewReader(source), bytes.NewReader(delta), Limits{})
	if derr == nil && n == int64(size) {
		require.NoError(t, err)
		b, err := os.ReadFile(f.Name())
		require.NoError(t, err)
		require.True(t, bytes.Equal(out, b))
		return out, nil
	}
	require.Error(t, err)
	return nil, err
}

func newRand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 7)) }

// noise returns n bytes that do not repeat.
func noise(rng *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}

// edit returns what could be a later version of p: pieces moved, repeated, dropped, written
// anew, and runs.
func edit(rng *rand.Rand, p []byte, size int) []byte {
	var out []byte
	for len(out) < size {
		n := 1 + rng.IntN(1<<(1+rng.IntN(14)))
		switch rng.IntN(6) {
		case 0:
			out = append(out, noise(rng, min(n, 300))...)
		case 1:
			out = append(out, bytes.Repeat([]byte{byte(rng.IntN(3))}, n)...)
		case 2:
			if len(out) > 0 {
				at := rng.IntN(len(out))
				out = append(out, out[at:min(at+n, len(out))]...)
			}
		default:
			if len(p) > 0 {
				at := rng.IntN(len(p))
				out = append(out, p[at:min(at+n, len(p))]...)
			}
		}
	}
	return out[:size]
}

// TestProgram: what xdelta3 writes decodes to the byte.
func TestProgram(t *testing.T) {
	rng := newRand(1)
	page := bytes.Repeat([]byte("a line of a page\n"), 241)[:4096]
	pairs := []struct {
		name           string
		source, target []byte
	}{
		{"empty from empty", nil, nil},
		{"empty", page, nil},
		{"from empty", nil, page},
		{"same", page, page},
		{"one byte", page, []byte("x")},
		{"zeros", make([]byte, 4096), make([]byte, 65536)},
		{"noise", noise(rng, 5000), noise(rng, 7000)},
		{"two windows", noise(rng, 100), bytes.Repeat(noise(rng, 1000), 9<<10)},
		{"far source", noise(rng, 9<<20), nil},
	}
	pairs[len(pairs)-1].target = edit(rng, pairs[len(pairs)-1].source, 200000)
	for i := range 40 {
		source := edit(rng, nil, rng.IntN(1<<(1+rng.IntN(17))))
		pairs = append(pairs, struct {
			name           string
			source, target []byte
		}{fmt.Sprintf("random %d", i), source, edit(rng, source, rng.IntN(1<<(1+rng.IntN(18))))})
	}
	for i, p := range pairs {
		t.Run(p.name, func(t *testing.T) {
			for _, args := range [][]string{{"-9"}, {"-1", "-n", "-A="}, {"-3", "-W", "16384", "-B", "524288"}}[i%2:] {
				delta := encode(t, p.source, p.target, args...)
				out, err := decode(t, p.source, delta, len(p.target))
				require.NoError(t, err, "%v", args)
				require.True(t, bytes.Equal(p.target, out), "%v", args)
			}
		})
	}
}

// program is a delta under construction, by the words of the RFC, with what it must make.
type program struct {
	source, target   []byte
	window           []byte // target of this window
	segment          []byte
	data, inst, addr []byte
	near             [4]int
	next             int
	same             [768]int
	delta            []byte
	apart            bool // copies stay within the segment, or behind it: xdelta3 reads no others
}

func (p *program) put(b []byte, v int) []byte {
	digits := []byte{byte(v & 0x7f)}
	for v >>= 7; v > 0; v >>= 7 {
		digits = append([]byte{byte(v&0x7f) | 0x80}, digits...)
	}
	return append(b, digits...)
}

func (p *program) add(b []byte) {
	p.data = append(p.data, b...)
	p.window = append(p.window, b...)
}

// copy appends a copy from at, its address in the given mode, or another where that one
// cannot say it.
func (p *program) copyMode(at, wish int) (mode int) {
	here := len(p.segment) + len(p.window)
	switch {
	case wish >= 6 && p.same[at%768] == at:
		mode = 6 + at%768/256
		p.addr = append(p.addr, byte(at%256))
	case wish >= 2 && wish < 6 && p.near[wish-2] <= at:
		mode = wish
		p.addr = p.put(p.addr, at-p.near[wish-2])
	case wish == 1:
		mode = 1
		p.addr = p.put(p.addr, here-at)
	default:
		p.addr = p.put(p.addr, at)
	}
	p.near[p.next] = at
	p.next = (p.next + 1) % 4
	p.same[at%768] = at
	return mode
}

func (p *program) copied(at, n int) {
	for range n {
		if at < len(p.segment) {
			p.window = append(p.window, p.segment[at])
		} else {
			p.window = append(p.window, p.window[at-len(p.segment)])
		}
		at++
	}
}

// step appends one entry of the code table.
func (p *program) step(rng *rand.Rand) {
	here := len(p.segment) + len(p.window)
	at := 0
	if here > 0 {
		at = rng.IntN(here)
		if rng.IntN(3) > 0 && p.next > 0 {
			at = min(p.near[rng.IntN(4)], here-1) // meets the caches
		}
	}
	size := 1 + rng.IntN(40)
	if n := len(p.segment); p.apart && at < n && at+size+6 > n {
		at = max(n-size-6, 0)
	}
	switch k := rng.IntN(6); {
	case k == 0: // run
		p.inst = p.put(append(p.inst, 0), size)
		p.data = append(p.data, byte(size))
		p.window = append(p.window, bytes.Repeat([]byte{byte(size)}, size)...)
	case k == 1 || here == 0: // add, its size in the code or behind it
		if size <= 17 && rng.IntN(2) == 0 {
			p.inst = append(p.inst, byte(1+size))
		} else {
			p.inst = p.put(append(p.inst, 1), size)
		}
		p.add(noise(rng, size))
	case k == 2 || k == 3:
		mode := p.copyMode(at, rng.IntN(9))
		if size >= 4 && size <= 18 && rng.IntN(2) == 0 {
			p.inst = append(p.inst, byte(19+16*mode+size-3))
		} else {
			p.inst = p.put(append(p.inst, byte(19+16*mode)), size)
		}
		p.copied(at, size)
	case k == 4: // add and copy
		n, m := 1+rng.IntN(4), 4+rng.IntN(3)
		p.add(noise(rng, n))
		mode := p.copyMode(at, rng.IntN(9))
		if mode < 6 {
			p.inst = append(p.inst, byte(163+12*mode+3*(n-1)+m-4))
		} else {
			m = 4
			p.inst = append(p.inst, byte(235+4*(mode-6)+n-1))
		}
		p.copied(at, m)
	default: // copy and add
		mode := p.copyMode(at, rng.IntN(9))
		p.inst = append(p.inst, byte(247+mode))
		p.copied(at, 4)
		p.add(noise(rng, 1))
	}
}

// begin starts a window with a segment of the source or the target.
func (p *program) begin(flags byte, start, size int) {
	p.delta = append(p.delta, flags)
	p.segment = nil
	if flags&3 != 0 {
		p.segment = map[byte][]byte{1: p.source, 2: p.target}[flags&3][start : start+size]
		p.delta = p.put(p.put(p.delta, size), start)
	}
}

// end writes the window.
func (p *program) end() {
	rest := append(p.put(nil, len(p.window)), 0)
	rest = p.put(p.put(p.put(rest, len(p.data)), len(p.inst)), len(p.addr))
	rest = append(append(append(rest, p.data...), p.inst...), p.addr...)
	p.delta = append(p.put(p.delta, len(rest)), rest...)
	p.target = append(p.target, p.window...)
	p.window, p.data, p.inst, p.addr = nil, nil, nil, nil
	p.near, p.next, p.same = [4]int{}, 0, [768]int{}
}

func newProgram(source []byte) *program {
	return &program{source: source, delta: []byte{0xd6, 0xc3, 0xc4, 0, 0}}
}

// TestInstructions: every code, address mode and kind of window, put together by hand, and
// read the same by xdelta3 as far as it knows them.
func TestInstructions(t *testing.T) {
	rng := newRand(2)
	seen := map[byte]bool{}
	for round := range 80 {
		p := newProgram(edit(rng, nil, 100+rng.IntN(3000)))
		p.apart = round%2 == 0
		for w := range 1 + rng.IntN(4) {
			flags, of := byte(rng.IntN(3)), p.source
			if flags == 2 && (p.apart || w == 0) { // nor windows on the target
				flags = 1
			}
			if flags == 2 {
				of = p.target
			}
			start, least := 0, 1
			if p.apart {
				least = 60
			}
			if len(of) > least {
				start = rng.IntN(len(of) - least)
			}
			p.begin(flags, start, min(len(of)-start, least+rng.IntN(len(of))))
			for range 1 + rng.IntN(800) {
				had := len(p.inst)
				p.step(rng)
				seen[p.inst[had]] = true
			}
			p.end()
		}
		out, err := decode(t, p.source, p.delta, len(p.target))
		require.NoError(t, err, "round %d", round)
		require.True(t, bytes.Equal(p.target, out), "round %d", round)
		if p.apart {
			requireProgram(t, p)
		}
	}
	for code := range 256 {
		require.True(t, seen[byte(code)], "code %d", code)
	}
}

// requireProgram requires that "xdelta3 -d" reads the delta as it was meant.
func requireProgram(t *testing.T, p *program) {
	dir := t.TempDir()
	s, d := filepath.Join(dir, "source"), filepath.Join(dir, "delta")
	require.NoError(t, os.WriteFile(s, p.source, 0o600))
	require.NoError(t, os.WriteFile(d, p.delta, 0o600))
	var say bytes.Buffer
	cmd := exec.CommandContext(t.Context(), need.Program(t, "xdelta3"), "-d", "-c", "-s", s, d)
	cmd.Stderr = &say
	out, err := cmd.Output()
	require.NoError(t, err, "%s", say.String())
	require.True(t, bytes.Equal(p.target, out))
}

func BenchmarkApply(b *testing.B) {
	rng := newRand(3)
	source := edit(rng, nil, 64<<10)
	target := edit(rng, source, 64<<10)
	delta := encode(b, source, target, "-9", "-n", "-A=")
	out := make([]byte, len(target))
	b.SetBytes(int64(len(out)))
	for b.Loop() {
		require.NoError(b, Apply(out, source, delta))
	}
}
