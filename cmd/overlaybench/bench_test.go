package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"cloudlet/integration/figures"
	"cloudlet/integration/need"
	"cloudlet/overlay"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == childArgument {
		os.Exit(childMain(context.Background(), os.Stdin, os.Stdout))
	}
	// With the race detector every child would sleep a second before it exits.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// newGuest makes a base and the files of a launch VM: "base:memory:disk".
func newGuest(t *testing.T) string {
	rng := rand.New(rand.NewPCG(1, 1))
	fill := func(p []byte) {
		for i := range p {
			p[i] = byte(rng.IntN(4) * rng.IntN(60))
		}
	}
	dir := t.TempDir()
	base := filepath.Join(dir, "base")
	require.NoError(t, os.Mkdir(base, 0o755))
	for _, name := range []string{"memory", "disk"} {
		p := make([]byte, 256*overlay.PageSize)
		fill(p[:128*overlay.PageSize])
		noise := make([]byte, 2*overlay.PageSize)
		for i := range noise {
			noise[i] = byte(rng.Uint32())
		}
		copy(p[11*3*overlay.PageSize:], noise[overlay.PageSize:])
		require.NoError(t, os.WriteFile(filepath.Join(base, name), p, 0o600))
		for page := range 64 {
			q := p[page*3*overlay.PageSize:][:overlay.PageSize]
			switch page % 4 {
			case 0:
				clear(q)
			case 1:
				copy(q, p[20*overlay.PageSize:])
			default:
				fill(q[100:])
			}
			switch page {
			case 7:
				copy(q, noise)
			case 11: // in the base as well, but for a byte
				copy(q, noise[overlay.PageSize:])
				q[5]++
			}
		}
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), p, 0o600))
	}
	b, err := overlay.SealBase(t.Context(), base, json.RawMessage(`{"type":"test"}`), nil)
	require.NoError(t, err)
	require.NoError(t, b.Close())
	return base + ":" + filepath.Join(dir, "memory") + ":" + filepath.Join(dir, "disk")
}

// TestBench measures small guests: every variant and every rival, and rounds.
func TestBench(t *testing.T) {
	for _, program := range []string{"xdelta3", "xz", "zstd", "qemu-img"} {
		need.Program(t, program)
	}
	dir := t.TempDir()
	o := options{guests: []string{"one=" + newGuest(t)}, strategies: "factors", rivals: strings.Join(rivalNames(), ","), rounds: 1, patience: time.Minute,
		dir: dir, json: filepath.Join(dir, "r.json"), csv: filepath.Join(dir, "r.csv"), picture: filepath.Join(dir, "r"), publish: filepath.Join(dir, "root")}
	r, err := o.results(t.Context())
	require.NoError(t, err)
	g := r.Guests[0]
	for _, w := range g.Rows {
		require.Len(t, w.Create, 1, w.Label)
		all := w.Saved.Zero + w.Saved.Base + w.Saved.Self + w.Saved.Codec + w.Saved.Delta + w.Bytes - w.Index
		require.Equal(t, w.change, all, "%s: what the steps save, and what is left", w.Label)
		if w.Label == "no class at all" {
			require.Equal(t, w.change, w.Stored)
		} else if w.Factor == "preset" {
			require.Positive(t, w.Saved.Zero)
			require.Positive(t, w.Saved.Base+w.Saved.Self)
		}
	}
	for _, v := range g.Rivals {
		require.Positive(t, v.Bytes, v.Name)
		require.Empty(t, v.Error, v.Name)
	}
	require.Len(t, g.Hot, 2)
	require.EqualValues(t, 2*overlay.PageSize, g.Noise) // one page of each image
	left, err := os.ReadDir(filepath.Join(dir, "one"))
	require.NoError(t, err)
	for _, e := range left {
		require.True(t, e.Name() == "plain.overlay" || strings.HasSuffix(e.Name(), ".pprof") || strings.HasPrefix(e.Name(), "rivals-"), "%s is left", e.Name())
	}

	two := o
	two.guests, two.strategies, two.rivals, two.rounds = []string{"two=" + newGuest(t)}, "balanced;small", "solid", 2
	more, err := two.results(t.Context())
	require.NoError(t, err)
	for _, w := range more.Guests[0].Rows {
		require.Len(t, w.Create, 2)
		require.Len(t, w.Decode, 2)
		require.Len(t, w.Open, 2*opens)
	}
	r.Guests = append(r.Guests, more.Guests...)
	require.NoError(t, figures.WriteJSON(o.json, r))
	o.requireReports(t, r)
}

// TestPatience: where creating takes longer, what the delta saves is not told apart.
func TestPatience(t *testing.T) {
	dir := t.TempDir()
	o := options{guests: []string{"one=" + newGuest(t)}, strategies: "balanced;balanced,delta=none", rounds: 2, patience: 1,
		dir: dir, json: filepath.Join(dir, "r.json")}
	r, err := o.results(t.Context())
	require.NoError(t, err)
	for i, w := range r.Guests[0].Rows {
		require.Len(t, w.Create, 1)
		require.Equal(t, i == 0, w.Saved.Together, w.Label)
		require.Equal(t, w.Stored-(w.Bytes-w.Index), w.Saved.Codec+w.Saved.Delta, w.Label)
	}
	require.Equal(t, "-", r.Guests[0].Rows[0].Saved.delta())
	require.Equal(t, "0.00", r.Guests[0].Rows[1].Saved.delta())
	require.Empty(t, r.Guests[0].Rows[0].Saved.apart())
}

// TestResultsOfRuns: the guests of several runs make one report, no guest twice.
func TestResultsOfRuns(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, r results) string {
		path := filepath.Join(dir, name)
		require.NoError(t, figures.WriteJSON(path, &r))
		return path
	}
	one := write("1", results{Host: "here", Rounds: 2, Guests: []*guestResult{{Name: "a"}, {Name: "b"}}})
	two := write("2", results{Host: "there", Rounds: 2, Guests: []*guestResult{{Name: "c"}}})
	again := write("3", results{Host: "here", Rounds: 2, Guests: []*guestResult{{Name: "b"}}})
	short := write("4", results{Host: "here", Rounds: 1, Guests: []*guestResult{{Name: "d"}}})
	r, err := readResults([]string{one, two})
	require.NoError(t, err)
	require.Equal(t, "here; there", r.Host)
	require.Equal(t, 2, r.Rounds)
	var names []string
	for _, g := range r.Guests {
		names = append(names, g.Name)
	}
	require.Equal(t, []string{"a", "b", "c"}, names)
	_, err = readResults([]string{one, again})
	require.ErrorContains(t, err, "guest b is in the results before, too")
	_, err = readResults([]string{one, short})
	require.ErrorContains(t, err, "it has 1 rounds, those before 2")
}

// requireReports requires that every form of the results is written, and can be read again.
func (o *options) requireReports(t *testing.T, r *results) {
	if err := o.report(r); err != nil { // times are what they are
		require.ErrorIs(t, err, figures.ErrMissed)
	}
	for _, name := range []string{"-one.svg", "-two.png"} {
		info, err := os.Stat(o.picture + name)
		require.NoError(t, err)
		require.Greater(t, info.Size(), int64(5000))
	}
	f, err := os.Open(o.csv)
	require.NoError(t, err)
	defer f.Close()
	lines, err := csv.NewReader(f).ReadAll()
	require.NoError(t, err)
	want := 1
	for _, g := range r.Guests {
		want += len(g.Rows) + len(g.Rivals)
	}
	require.Len(t, lines, want)
	doc, err := os.ReadFile(filepath.Join(o.publish, "docs", "strategies.md"))
	require.NoError(t, err)
	require.Contains(t, string(doc), "# Overlay strategies")
	require.Contains(t, string(doc), "strategies-two.svg")

	again := options{from: o.json}
	s, err := again.results(t.Context())
	require.NoError(t, err)
	for i, g := range r.Guests {
		var first, second bytes.Buffer
		g.print(&first)
		s.Guests[i].print(&second)
		require.Equal(t, first.String(), second.String())
	}
}

// TestFirstResponses: those of a run of benchlazy go to the guest of its overlay, into table,
// document and JSON; what was given up is told.
func TestFirstResponses(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "lazy.json")
	write := func(text string) { require.NoError(t, os.WriteFile(path, []byte(text), 0o600)) }
	write(fmt.Sprintf(`{"host":"Measured here","overlay":"%s","strategies":["small","fast","none"],"given_up_after_s":120,"cells":[
		{"link":"38m","link_text":"38 Mbit/s","way":"profile","samples":[{"first_response_s":1,"bytes_before":1}]},
		{"link":"38m","link_text":"38 Mbit/s","way":"small","samples":[{"first_response_s":2,"bytes_before":1048576},{"first_response_s":4,"bytes_before":3145728}]},
		{"link":"38m","link_text":"38 Mbit/s","way":"fast","given_up":true,"samples":[{"first_response_s":5,"bytes_before":1048576}]},
		{"link":"38m","link_text":"38 Mbit/s","way":"none","given_up":true,"samples":null}]}`, overlay.Hash{2}))
	r := &results{Rounds: 1, Guests: []*guestResult{{Name: "one", ID: overlay.Hash{1}}, {Name: "two", ID: overlay.Hash{2}}}}
	from := filepath.Join(dir, "r.json")
	require.NoError(t, figures.WriteJSON(from, r))
	o := options{from: from, lazy: path}
	r, err := o.results(t.Context())
	require.NoError(t, err)
	require.Nil(t, r.Guests[0].Responses)
	var text bytes.Buffer
	r.Guests[1].print(&text)
	require.Regexp(t, `38 Mbit/s +small +3.00 \(2.00-4.00\) +2.0 \(1.0-3.0\)`, text.String())
	require.NoError(t, publish(dir, r))
	doc, err := os.ReadFile(filepath.Join(dir, "docs", "strategies.md"))
	require.NoError(t, err)
	for _, line := range []string{"small | 3.00 (2.00-4.00) | 2.0 (1.0-3.0)", "fast | 5.00, once > 120 | 1.0", "none | > 120 | -"} {
		require.Contains(t, string(doc), "| 38 Mbit/s | "+line+" |\n")
	}
	require.Contains(t, string(doc), "\nMeasured here.\n")
	again, err := readResults([]string{filepath.Join(dir, "docs", "bench-strategies.json")})
	require.NoError(t, err)
	require.Equal(t, r.Guests[1].Responses, again.Guests[1].Responses)

	require.NoError(t, figures.WriteJSON(from, &results{Guests: r.Guests[:1]}))
	_, err = o.results(t.Context())
	require.ErrorContains(t, err, "none of the guests")
	for _, bad := range []string{
		`{"strategies":["small"],"cells":[{"way":"small","samples":[{"first_response_s":2}]}]}`, // older: its overlay has no name
		`{"overlay":"` + overlay.Hash{1}.String() + `","cells":[{"way":"profile"}]}`,
	} {
		write(bad)
		_, err = o.results(t.Context())
		require.ErrorContains(t, err, "benchlazy -strategies")
	}
}

func TestRefused(t *testing.T) {
	for want, args := range map[string][]string{
		"name a guest":             {},
		"want NAME=":               {"-guest", "/some/where"},
		"the name of lower-case":   {"-guest", "A B=x:y"},
		"too many colons":          {"-guest", "a=1:2:3:4"},
		"prepare it with make":     {"-guest", "a=" + t.TempDir()},
		"there are eager":          {"-guest", "a=b:c", "-rivals", "bogus"},
		"unknown overlay strategy": {"-guest", "a=b:c", "-strategies", "balanced;bogus"},
		"there are none, xor":      {"-guest", "a=b:c", "-strategies", "balanced,delta=bogus"},
		"unexpected argument":      {"x"},
		"no such file":             {"-guest", "a=/nowhere:/nowhere", "-dir", t.TempDir()},
	} {
		require.ErrorContains(t, run(t.Context(), args), want)
	}
}

func TestFront(t *testing.T) {
	a, b, c, d := point{label: "a", size: 1, speed: 1}, point{label: "b", size: 2, speed: 3}, point{label: "c", size: 3, speed: 2}, point{label: "d", size: 2, speed: 2}
	require.Equal(t, []point{a, b}, front([]point{d, {label: "solid", size: 0.5, speed: 9, rival: true}, c, b, a}))
	require.Empty(t, front(nil))
}

func TestSpeedTicks(t *testing.T) {
	var have []float64
	for _, tick := range speedTicks([]point{{low: 21, high: 30}, {low: 150, high: 640}}) {
		have = append(have, tick.Value)
	}
	require.Equal(t, []float64{20, 50, 100, 200, 500, 1000}, have)
	require.Len(t, speedTicks([]point{{low: 5, high: 5}}), 2)
}

// TestPipedInVain: a program whose reader has died ends, too.
func TestPipedInVain(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := piped(ctx, nil, nil, []string{"head", "-c", "10000000", "/dev/zero"}, []string{"false"})
	require.ErrorContains(t, err, "false")
	require.NoError(t, ctx.Err())
}

func TestSpread(t *testing.T) {
	require.Equal(t, spread{2.5, 1, 4}, newSpread([]float64{4, 1, 2, 3}))
	require.Equal(t, "2.5 (1.0-4.0)", newSpread([]float64{4, 1, 2, 3}).format(1))
	require.Equal(t, "7", newSpread([]float64{7}).format(0))
	require.Zero(t, newSpread(nil))
}

// TestTargets: only what was measured is judged, a rival that did not work is none.
func TestTargets(t *testing.T) {
	w := &row{variant: variant{Strategy: "balanced"}, Bytes: 108, File: 120, Stored: 600e6, change: 90e6, Create: []cost{{2, 1}}, Decode: []cost{{2, 1}}, Open: []float64{0.01}}
	g := &guestResult{Rows: []*row{w}, Rivals: []rivalResult{{Name: referenceName, Bytes: 100}, {Name: eagerName, Error: "no luck"}}}
	var have []string
	for _, target := range g.targets() {
		have = append(have, target.String())
	}
	text := strings.Join(have, "\n")
	require.Len(t, have, 4)
	require.Contains(t, text, "target at most 1.100, measured 1.080 of the reference: pass")
	require.Contains(t, text, "measured 90 MB/s a core: MISS")
	require.Contains(t, text, "measured 600 MB/s a core: pass")
	require.NotContains(t, text, "eager")
}

// TestNoise: what nothing makes smaller is counted, and told where it matters.
func TestNoise(t *testing.T) {
	g := &guestResult{Noise: 40, Rows: []*row{{variant: variant{Strategy: "balanced"}, Bytes: 106}, {variant: variant{Strategy: "small"}, Bytes: 91}},
		Rivals: []rivalResult{{Name: referenceName, Bytes: 100}, {Name: solidName, Bytes: 85}}}
	require.Contains(t, g.withoutNoise(), "reference's bytes: balanced 1.100, small 0.850, solid 0.750.")
	g.Noise = 4
	require.Empty(t, g.withoutNoise())
	g.Noise = 100
	require.Empty(t, g.withoutNoise())
	g.Noise, g.Rivals = 40, nil
	require.Empty(t, g.withoutNoise())
}

func TestVariants(t *testing.T) {
	keys := map[string]string{}
	for _, v := range factors() {
		_, err := overlay.ParseStrategy(v.Strategy)
		require.NoError(t, err)
		require.NotContains(t, keys, v.key(), "%s makes the same bytes as %s", v.Label, keys[v.key()])
		keys[v.key()] = v.Label
	}
	v, ok := variant{Strategy: "small"}.plain()
	require.True(t, ok)
	require.Equal(t, "small,delta=none", v.Strategy)
	_, ok = variant{Strategy: "small,delta=none"}.plain()
	require.False(t, ok)
}
