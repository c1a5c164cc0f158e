package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"cloudlet/integration/figures"
	"cloudlet/overlay"
	"cloudlet/overlay/vcdiff"
)

// rival is another way to make the same launch VM small.
type rival struct {
	name, text string
	programs   []string
	whole      bool // takes the whole images as files
	make       func(ctx context.Context, g *guest) (files []string, t cost, err error)
	use        func(ctx context.Context, g *guest, files []string) (cost, error) // nil: not measured
}

// cost is what a step took.
type cost struct {
	Wall float64 `json:"s"`
	CPU  float64 `json:"cpu_s"`
}

func (c *cost) add(o cost) { c.Wall, c.CPU = c.Wall+o.Wall, c.CPU+o.CPU }

// rivalResult is what became of a rival.
type rivalResult struct {
	Name   string `json:"name"`
	Text   string `json:"text"`
	Bytes  int64  `json:"bytes"`
	Create cost   `json:"create"`
	Decode *cost  `json:"decode,omitempty"`
	Error  string `json:"error,omitempty"` // it was tried and did not work
}

const (
	eagerName     = "eager"
	referenceName = "reference"
	solidName     = "solid"
)

// rivals lists them. The first three are what targets are told from.
func rivals() []rival {
	list := []rival{
		{name: eagerName, text: "whole images: xdelta3 -9 against the base, then xz -9e", programs: []string{"xdelta3", "xz"}, whole: true, make: makeEager, use: useEager},
		{name: referenceName, text: "stored pages: xdelta3 -9 each, then one solid xz -9e", programs: []string{"xdelta3", "xz"}, make: makeReference, use: useReference},
		{name: solidName, text: "stored pages as they are, one solid xz -9e", programs: []string{"xz"}, make: makeSolid, use: useSolid},
		{name: "patch", text: "whole images: zstd -19 --long --patch-from the base", programs: []string{"zstd"}, whole: true, make: makePatch, use: usePatch},
	}
	for _, kind := range []string{"zlib", "zstd"} {
		list = append(list, rival{
			name: "qcow2-" + kind, text: "whole images: qcow2 on the base, compressed clusters of 64 KiB (" + kind + ")", programs: []string{"qemu-img"}, whole: true,
			make: func(ctx context.Context, g *guest) ([]string, cost, error) { return makeQcow2(ctx, g, kind) },
		})
	}
	return list
}

func rivalNames() (names []string) {
	for _, r := range rivals() {
		names = append(names, r.name)
	}
	return names
}

// measureRivals measures the rivals that are asked for, or finds them measured.
func (g *guest) measureRivals(ctx context.Context, names []string, id overlay.Hash) (list []rivalResult, err error) {
	kept := filepath.Join(g.dir, "rivals-"+id.String()[:12]+".json")
	known := map[string]rivalResult{}
	if b, err := os.ReadFile(kept); err == nil && json.Unmarshal(b, &known) != nil {
		known = map[string]rivalResult{}
	}
	images := false
	defer func() {
		for _, s := range overlay.Spaces {
			if images {
				err = errors.Join(err, os.Remove(g.launchFile(s)))
			}
		}
	}()
	for _, r := range rivals() {
		if !slices.Contains(names, r.name) {
			continue
		}
		if have, ok := known[r.name]; ok {
			have.Text = r.text
			list = append(list, have)
			continue
		}
		if i := slices.IndexFunc(r.programs, func(p string) bool { _, err := exec.LookPath(p); return err != nil }); i >= 0 {
			say("%s: %s is left out: the program %s is missing", g.name, r.name, r.programs[i])
			continue
		}
		if r.whole && !images {
			if err := g.writeImages(ctx); err != nil {
				return list, err
			}
			images = true
		}
		say("%s: %s: %s", g.name, r.name, r.text)
		res, err := g.measureRival(ctx, r)
		if err != nil {
			return list, err
		}
		known[r.name] = res
		list = append(list, res)
		if err := figures.WriteJSON(kept, known); err != nil {
			return list, err
		}
	}
	return list, nil
}

func (g *guest) measureRival(ctx context.Context, r rival) (rivalResult, error) {
	res := rivalResult{Name: r.name, Text: r.text}
	files, c, err := r.make(ctx, g)
	defer func() {
		for _, f := range files {
			os.Remove(f) // made here, and of no use to anybody
		}
	}()
	if ctx.Err() != nil {
		return res, context.Cause(ctx)
	}
	if err != nil {
		res.Error = err.Error()
		say("%s: %s: %v", g.name, r.name, err)
		return res, nil
	}
	res.Create = c
	for _, f := range files {
		info, err := os.Stat(f)
		if err != nil {
			return res, err
		}
		res.Bytes += info.Size()
	}
	if r.use == nil {
		return res, nil
	}
	d, err := r.use(ctx, g, files)
	if err != nil {
		return res, fmt.Errorf("use what %s made: %w", r.name, err)
	}
	res.Decode = &d
	return res, nil
}

// piped runs programs, each one's output the next one's input, the first reading in, the last
// writing to out; nil is nothing.
func piped(ctx context.Context, in io.Reader, out io.Writer, programs ...[]string) (c cost, err error) {
	start := time.Now()
	var cmds []*exec.Cmd
	for i, p := range programs {
		cmd := exec.CommandContext(ctx, p[0], p[1:]...)
		cmd.Stderr = new(strings.Builder)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH")} // programs take options from theirs
		cmd.Stdin = in
		if i > 0 {
			if cmd.Stdin, err = cmds[i-1].StdoutPipe(); err != nil {
				return c, err
			}
		}
		cmds = append(cmds, cmd)
	}
	cmds[len(cmds)-1].Stdout = out
	for i, cmd := range cmds {
		if err := cmd.Start(); err != nil {
			for _, before := range cmds[:i] {
				err = errors.Join(err, before.Process.Kill(), before.Wait())
			}
			return c, err
		}
		if i > 0 { // else a program that writes to one that has died would never hear of it
			_ = cmd.Stdin.(io.Closer).Close() // Wait, which closes it too, would come too late
		}
	}
	for _, cmd := range slices.Backward(cmds) { // the last first: Wait closes what the next one reads
		if e := cmd.Wait(); e != nil {
			err = errors.Join(fmt.Errorf("run %s: %w: %.200s", cmd.Path, e, strings.TrimSpace(cmd.Stderr.(*strings.Builder).String())), err)
		}
		c.CPU += (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()
	}
	c.Wall = time.Since(start).Seconds()
	return c, err
}

// pipedTo is piped into a file.
func pipedTo(ctx context.Context, in io.Reader, path string, programs ...[]string) (c cost, err error) {
	f, err := os.Create(path)
	if err != nil {
		return c, err
	}
	c, err = piped(ctx, in, f, programs...)
	return c, errors.Join(err, f.Close())
}

var (
	pack   = []string{"xz", "-9e", "-T1", "-c"}
	unpack = []string{"xz", "-d", "-T1", "-c"}
)

// eachImage runs step for memory and disk and adds up what it cost.
func (g *guest) eachImage(name string, step func(base, launch, file string) (cost, error)) (files []string, c cost, err error) {
	for _, s := range overlay.Spaces {
		file := filepath.Join(g.dir, name+"-"+s.String())
		files = append(files, file)
		k, err := step(filepath.Join(g.base, s.String()), g.launchFile(s), file)
		if err != nil {
			return files, c, err
		}
		c.add(k)
	}
	return files, c, nil
}

func makeEager(ctx context.Context, g *guest) ([]string, cost, error) {
	return g.eachImage(eagerName, func(base, launch, file string) (c cost, err error) {
		info, err := os.Stat(launch)
		if err != nil {
			return c, err
		}
		return pipedTo(ctx, nil, file, []string{"xdelta3", "-e", "-9", "-D", "-S", "none", "-B", strconv.FormatInt(info.Size(), 10), "-c", "-s", base, launch}, pack)
	})
}

func useEager(ctx context.Context, g *guest, files []string) (c cost, err error) {
	for i, s := range overlay.Spaces {
		base := filepath.Join(g.base, s.String())
		k, err := piped(ctx, nil, nil, append(slices.Clone(unpack), files[i]), []string{"xdelta3", "-d", "-D", "-c", "-B", "2147483648", "-s", base})
		if err != nil {
			return c, err
		}
		c.add(k)
	}
	return c, nil
}

// storedPages calls yield for the pages that the overlay stores, in its order.
func (g *guest) storedPages(ctx context.Context, yield func(page, base []byte) error) (err error) {
	im, err := g.image(ctx, g.plain())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, im.Close()) }()
	return im.StoredPages(ctx, func(_ overlay.Addr, page, base []byte) error { return yield(page, base) })
}

// makeReference makes a file of each page's delta, its size before it, and compresses it.
func makeReference(ctx context.Context, g *guest) (files []string, c cost, err error) {
	deltas, file := filepath.Join(g.dir, "deltas"), filepath.Join(g.dir, referenceName)
	files = []string{file}
	out, err := os.Create(deltas)
	if err != nil {
		return files, c, err
	}
	defer func() { err = errors.Join(err, out.Close(), os.Remove(deltas)) }()
	w := bufio.NewWriterSize(out, 1<<20)
	start := time.Now()
	cpu, err := g.pageDeltas(ctx, func(delta []byte) error {
		if _, err := w.Write(binary.LittleEndian.AppendUint16(nil, uint16(len(delta)))); err != nil {
			return err
		}
		_, err := w.Write(delta)
		return err
	})
	c = cost{time.Since(start).Seconds(), cpu}
	if err = errors.Join(err, w.Flush()); err != nil {
		return files, c, err
	}
	if _, err := out.Seek(0, io.SeekStart); err != nil {
		return files, c, err
	}
	k, err := pipedTo(ctx, out, file, pack)
	c.add(k)
	return files, c, err
}

// pageDeltas calls yield with what xdelta3 makes of every stored page, in order.
func (g *guest) pageDeltas(ctx context.Context, yield func([]byte) error) (cpu float64, err error) {
	dir, err := os.MkdirTemp("/dev/shm", "overlaybench-") // many small files: none for the disk
	if err != nil {
		if dir, err = os.MkdirTemp(g.dir, "pages-"); err != nil {
			return 0, err
		}
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	const batch = 8 // programs at the same time
	var group sync.WaitGroup
	type work struct {
		page, base, delta []byte
		cpu               float64
		err               error
	}
	var list []*work
	flush := func() error {
		for i, w := range list {
			group.Go(func() { w.delta, w.cpu, w.err = pageDelta(ctx, filepath.Join(dir, strconv.Itoa(i)), w.base, w.page) })
		}
		group.Wait()
		for _, w := range list {
			if w.err != nil {
				return w.err
			}
			cpu += w.cpu
			if err := yield(w.delta); err != nil {
				return err
			}
		}
		list = list[:0]
		return nil
	}
	err = g.storedPages(ctx, func(page, base []byte) error {
		list = append(list, &work{page: slices.Clone(page), base: slices.Clone(base)})
		if len(list) < batch {
			return nil
		}
		return flush()
	})
	return cpu, errors.Join(err, flush())
}

// pageDelta runs xdelta3 on one page, its base page in the file at path.
func pageDelta(ctx context.Context, path string, base, page []byte) ([]byte, float64, error) {
	if err := os.WriteFile(path, base, 0o600); err != nil {
		return nil, 0, err
	}
	var out strings.Builder
	c, err := piped(ctx, strings.NewReader(string(page)), &out, []string{"xdelta3", "-e", "-9", "-D", "-S", "none", "-n", "-A=", "-B", "524288", "-W", "16384", "-c", "-s", path})
	return []byte(out.String()), c.CPU, err
}

// useReference decodes with our own decoder, which is the fastest there is for single pages.
func useReference(ctx context.Context, g *guest, files []string) (c cost, err error) {
	pr, pw := io.Pipe()
	type result struct {
		cost
		error
	}
	done := make(chan result, 1)
	go func() {
		k, err := piped(ctx, nil, pw, append(slices.Clone(unpack), files[0]))
		pw.CloseWithError(err)
		done <- result{k, err}
	}()
	defer func() {
		r := <-done
		c.Wall, c.CPU = r.Wall, c.CPU+r.CPU
		err = errors.Join(err, r.error)
	}()
	defer pr.Close()
	in := bufio.NewReaderSize(pr, 1<<20)
	delta, out := make([]byte, 1<<16), make([]byte, overlay.PageSize)
	err = g.storedPages(ctx, func(page, base []byte) error {
		if _, err := io.ReadFull(in, delta[:2]); err != nil {
			return err
		}
		d := delta[:binary.LittleEndian.Uint16(delta)]
		if _, err := io.ReadFull(in, d); err != nil {
			return err
		}
		start := time.Now()
		if err := vcdiff.Apply(out, base, d); err != nil {
			return err
		}
		c.CPU += time.Since(start).Seconds()
		if string(out) != string(page) {
			return errors.New("a page is not what it was")
		}
		return nil
	})
	return c, err
}

func makeSolid(ctx context.Context, g *guest) (files []string, c cost, err error) {
	file := filepath.Join(g.dir, solidName)
	pr, pw := io.Pipe()
	go func() {
		pw.CloseWithError(g.storedPages(ctx, func(page, _ []byte) error {
			_, err := pw.Write(page)
			return err
		}))
	}()
	defer pr.Close()
	c, err = pipedTo(ctx, pr, file, pack)
	return []string{file}, c, err
}

func useSolid(ctx context.Context, _ *guest, files []string) (cost, error) {
	return piped(ctx, nil, nil, append(slices.Clone(unpack), files[0]))
}

func makePatch(ctx context.Context, g *guest) ([]string, cost, error) {
	return g.eachImage("patch", func(base, launch, file string) (cost, error) {
		return pipedTo(ctx, nil, file, []string{"zstd", "-19", "--long=31", "--single-thread", "-q", "-c", "--patch-from=" + base, launch})
	})
}

func usePatch(ctx context.Context, g *guest, files []string) (c cost, err error) {
	for i, s := range overlay.Spaces {
		k, err := piped(ctx, nil, nil, []string{"zstd", "-d", "--long=31", "-q", "-c", "--patch-from=" + filepath.Join(g.base, s.String()), files[i]})
		if err != nil {
			return c, err
		}
		c.add(k)
	}
	return c, nil
}

// makeQcow2 takes the difference to the base cluster by cluster, then compresses it.
func makeQcow2(ctx context.Context, g *guest, kind string) ([]string, cost, error) {
	return g.eachImage("qcow2-"+kind, func(base, launch, file string) (c cost, err error) {
		if base, err = filepath.Abs(base); err != nil {
			return c, err
		}
		if launch, err = filepath.Abs(launch); err != nil {
			return c, err
		}
		changed := file + ".changed"
		defer os.Remove(changed)
		for _, step := range [][]string{
			{"create", "-q", "-f", "qcow2", "-b", launch, "-F", "raw", changed},
			{"rebase", "-f", "qcow2", "-b", base, "-F", "raw", changed},
			{"convert", "-c", "-f", "qcow2", "-O", "qcow2", "-B", base, "-F", "raw", "-o", "compression_type=" + kind, changed, file},
		} {
			k, err := piped(ctx, nil, nil, append([]string{"qemu-img"}, step...))
			if err != nil {
				return c, err
			}
			c.add(k)
		}
		return c, nil
	})
}
