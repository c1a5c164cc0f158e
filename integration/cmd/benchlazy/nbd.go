package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"cloudlet/integration/demoguest"
	"cloudlet/integration/figures"
	"cloudlet/overlay"
	"cloudlet/overlay/source"
)

const (
	// peerReads is how many pages of the disk are read from us and from the peer.
	peerReads = 128
	// peerBlock is the unit of compression of the peer's disk.
	peerBlock = 256 << 10
	// nbdkitStart bounds the start of nbdkit, which asks the server for the size.
	nbdkitStart = 20 * time.Second
)

// peer compares our mount with nbdkit's disk over a link: the same reads by the same program,
// from before mount or server are started until the last answer.
type peer struct {
	Link        string  `json:"link"`
	Ours        float64 `json:"ours_s"`
	OursBytes   int64   `json:"ours_bytes"`
	NBDKit      float64 `json:"nbdkit_s"`
	NBDKitBytes int64   `json:"nbdkit_bytes"`
	Cut         string  `json:"given_up,omitempty"` // who took longer than the bound
}

func (p peer) String() string {
	show := func(s float64, n int64, who string) string {
		if strings.Contains(p.Cut, who) {
			return fmt.Sprintf("> %.0f s", s)
		}
		return fmt.Sprintf("%.2f s, %.1f MiB", s, figures.MiB(n))
	}
	return fmt.Sprintf("%-28s demand only by our mount %s; nbdkit (curl, xz, cow, readahead) %s", p.Link, show(p.Ours, p.OursBytes, "ours"), show(p.NBDKit, p.NBDKitBytes, "nbdkit"))
}

// comparePeer reads the same pages of the disk from a mount and from nbdkit, over each link.
func (b *bench) comparePeer(ctx context.Context) error {
	for _, program := range []string{"nbdkit", "qemu-io"} {
		if _, err := exec.LookPath(program); err != nil {
			b.Say("no comparison with nbdkit: there is no program %s (apt-get install nbdkit qemu-utils)", program)
			return nil
		}
	}
	if err := b.packDisk(ctx); err != nil {
		return err
	}
	reads, err := b.diskReads(ctx)
	if err != nil {
		return err
	}
	for _, n := range b.links {
		if n.name == local {
			continue
		}
		p := peer{Link: n.text}
		for _, side := range []struct {
			name    string
			seconds *float64
			bytes   *int64
			run     func(ctx context.Context, url string, reads []int64) error
		}{{"ours", &p.Ours, &p.OursBytes, b.readMount}, {"nbdkit", &p.NBDKit, &p.NBDKitBytes, b.readNBDKit}} {
			took, came, err := b.readOver(ctx, n, reads, side.run)
			if errors.Is(err, errCut) {
				p.Cut += side.name + " "
			} else if err != nil {
				return fmt.Errorf("read the disk by %s over %s: %w", side.name, n.text, err)
			}
			*side.seconds, *side.bytes = took.Seconds(), came
		}
		b.Say("  %s", p)
		b.r.Peer = append(b.r.Peer, p)
	}
	return nil
}

// packDisk compresses the plain disk as nbdkit's xz filter wants it, in blocks.
func (b *bench) packDisk(ctx context.Context) error {
	packed, key := b.Path("nbd", "disk.xz"), b.Path("nbd", "key")
	if k, err := os.ReadFile(key); err == nil && string(k) == b.Made.Token {
		return nil
	}
	b.Say("the disk for nbdkit: xz in blocks of %d KiB", peerBlock>>10)
	if err := os.MkdirAll(filepath.Dir(packed), 0o755); err != nil {
		return err
	}
	err := demoguest.Piped(ctx, packed, []string{"xz", "-3", "-T0", fmt.Sprintf("--block-size=%d", peerBlock), "-c", b.Path("plain", "disk")})
	if err != nil {
		return err
	}
	return os.WriteFile(key, []byte(b.Made.Token), 0o644)
}

// diskReads returns offsets of pages: those of the profile, then some of those in which the
// launch VM's disk differs from the base's, at even distances.
func (b *bench) diskReads(ctx context.Context) (reads []int64, err error) {
	profile, err := readProfile(ctx, b.files["packed.overlay"])
	if err != nil {
		return nil, err
	}
	for _, a := range profile {
		if a.Space() == overlay.Disk && len(reads) < peerReads {
			reads = append(reads, a.Offset())
		}
	}
	changed, err := differing(b.Path("state", "bases", b.Made.Base, "disk"), b.Path("plain", "disk"))
	if err != nil {
		return nil, err
	}
	if missing := peerReads - len(reads); len(changed) >= missing {
		for i := range missing {
			if off := changed[i*len(changed)/missing]; !slices.Contains(reads, off) {
				reads = append(reads, off)
			}
		}
	}
	return reads, nil
}

func readProfile(ctx context.Context, path string) (profile []overlay.Addr, err error) {
	src, err := source.Open(ctx, path)
	if err != nil {
		return nil, err
	}
	r, err := overlay.Open(ctx, src)
	if err != nil {
		return nil, err
	}
	profile, err = r.Profile()
	return profile, errors.Join(err, r.Close())
}

// differing returns the offsets of the pages in which two files of the same size differ.
func differing(one, other string) (offsets []int64, err error) {
	var files [2]*os.File
	var bufs [2][]byte
	for i, path := range []string{one, other} {
		if files[i], err = os.Open(path); err != nil {
			return nil, err
		}
		defer files[i].Close()
		bufs[i] = make([]byte, 1<<20)
	}
	for at := int64(0); ; at += 1 << 20 {
		n, err := io.ReadFull(files[0], bufs[0])
		m, oerr := io.ReadFull(files[1], bufs[1])
		if n != m {
			return nil, fmt.Errorf("%s and %s are not of the same size", one, other)
		}
		for p := 0; p < n; p += overlay.PageSize {
			if end := min(n, p+overlay.PageSize); !bytes.Equal(bufs[0][p:end], bufs[1][p:end]) {
				offsets = append(offsets, at+int64(p))
			}
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return offsets, nil
		}
		if err := errors.Join(err, oerr); err != nil {
			return nil, err
		}
	}
}

// readOver times run over a link of its own.
func (b *bench) readOver(ctx context.Context, n network, reads []int64, run func(context.Context, string, []int64) error) (took time.Duration, came int64, err error) {
	warm := []string{b.Path("state", "bases"), b.files["packed.overlay"], b.Path("nbd")}
	if err := demoguest.SetCache(warm); err != nil {
		return 0, 0, err
	}
	if err := b.forgetFrames(); err != nil {
		return 0, 0, err
	}
	r, err := serveOver(n, 0, map[string]string{"packed.overlay": b.files["packed.overlay"], "disk.xz": b.Path("nbd", "disk.xz")})
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, r.close()) }()
	bctx, cancel := bounded(ctx, b.bound)
	defer cancel()
	begin := time.Now()
	err = run(bctx, r.url(""), reads)
	took, came = time.Since(begin), r.received()
	if errors.Is(context.Cause(bctx), errCut) {
		err = errCut
	}
	return took, came, err
}

func (b *bench) readMount(ctx context.Context, url string, reads []int64) error {
	return b.Mounted(ctx, url+"packed.overlay", func(dir string) error { return readPages(ctx, filepath.Join(dir, "disk"), reads) })
}

// readNBDKit reads from an nbdkit of its own.
func (b *bench) readNBDKit(ctx context.Context, url string, reads []int64) (err error) {
	socket, pidFile := b.Path("nbd", "socket"), b.Path("nbd", "pid")
	if err := errors.Join(os.RemoveAll(socket), os.RemoveAll(pidFile)); err != nil {
		return err
	}
	cmd := exec.Command("nbdkit", "--foreground", "--exit-with-parent", "--unix", socket, "--pidfile", pidFile,
		"--filter=readahead", "--filter=cow", "--filter=xz", "curl", url+"disk.xz", "cow-on-cache=true")
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stderr, &stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer func() {
		if kerr := cmd.Process.Kill(); !errors.Is(kerr, os.ErrProcessDone) { // a read under way may take long
			err = errors.Join(err, kerr)
		}
		<-ended
	}()
	start, cancel := context.WithTimeout(ctx, nbdkitStart)
	defer cancel()
	for {
		if b, err := os.ReadFile(pidFile); err == nil && len(b) > 0 { // written once it serves
			break
		}
		select {
		case err := <-ended:
			ended <- err
			return fmt.Errorf("nbdkit has ended: %w: %s", err, stderr.Bytes())
		case <-start.Done():
			return fmt.Errorf("nbdkit does not start: %s", stderr.Bytes())
		case <-time.After(time.Millisecond):
		}
	}
	return readPages(ctx, "nbd+unix:///?socket="+socket, reads)
}

// readPages reads pages of a raw image one after the other.
func readPages(ctx context.Context, image string, reads []int64) error {
	args := []string{"qemu-io", "-r", "-f", "raw"}
	for _, off := range reads {
		args = append(args, "-c", fmt.Sprintf("read %d %d", off, overlay.PageSize))
	}
	var out bytes.Buffer
	if err := demoguest.Command(ctx, nil, &out, append(args, image)...); err != nil {
		return err
	}
	if n := bytes.Count(out.Bytes(), []byte("\nread ")) + bytes.Count(out.Bytes()[:min(5, out.Len())], []byte("read ")); n < len(reads) || bytes.Contains(out.Bytes(), []byte("failed")) {
		return fmt.Errorf("%d of %d reads of %s were answered: %.300s", n, len(reads), image, out.Bytes())
	}
	return nil
}
