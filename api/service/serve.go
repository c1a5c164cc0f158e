package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"

	"cloudlet/api"
	"cloudlet/fusefs"
	"cloudlet/overlay"

	"golang.org/x/sys/unix"
)

// How much the kernel reads around a page that the guest waits for, in KiB. Its default is 128:
// too much where a profile has brought what is likely and the guest only strays from it, and
// over a network, where each frame that is touched costs a request. Nothing but the page itself
// where an overlay from far away was packed by a profile: what lies beside a page in memory is
// then in another frame, often one that nobody wants, and the guest would wait for it as well.
const (
	profileReadAhead = 32
	remoteReadAhead  = 16
	packedReadAhead  = 4
)

func readAheadOf(spec MountSpec, im *overlay.Image) int {
	profile, err := profileOf(spec, im)
	hot := err == nil && profile != nil && (spec.Prefetch == api.PrefetchAuto || spec.Prefetch == api.PrefetchProfile)
	switch {
	case hot && !im.Local() && packed(im):
		return packedReadAhead
	case !im.Local():
		return remoteReadAhead
	case hot:
		return profileReadAhead
	}
	return 0 // the kernel's; prefetch says what is wrong with the profile
}

// packed reports whether the last overlay brings the profile that its frames are packed by.
func packed(im *overlay.Image) bool {
	n := len(im.Chain())
	return n > 0 && im.Chain()[n-1].Manifest().Members.Profile.Size > 0
}

// MountSpec tells a mount process what to serve and where.
type MountSpec struct {
	Image      string       `json:"image"` // id
	Base       string       `json:"base"`  // folder
	Links      []link       `json:"overlays"`
	Hold       []string     `json:"hold"`                  // folders of the store that must stay while it lives
	Dir        string       `json:"dir"`                   // mountpoint
	Socket     string       `json:"control,omitempty"`     // control socket
	Cache      string       `json:"cache,omitempty"`       // folder of frames that were fetched
	CacheLimit int64        `json:"cache_limit,omitempty"` // bytes; less than 1: nothing is kept
	Profile    string       `json:"profile,omitempty"`     // file of the image's touch profile, which need not exist
	Prefetch   api.Prefetch `json:"prefetch,omitempty"`
	Shared     bool         `json:"shared,omitempty"` // other users may reach the files: QEMU runs as one
	Record     bool         `json:"record,omitempty"` // record a touch profile, and push nothing
	Alive      string       `json:"alive,omitempty"`  // file whose lock the process holds for life
	Memory     int64        `json:"memory_limit"`     // bytes that the process should stay below, beside its indexes; 0: no limit

	// Starter, if not nil, is the mount's lock as inherited from the starter; it is closed
	// once Alive is locked, so that there is no moment in which the mount seems dead.
	Starter *os.File `json:"-"`
}

// MountInfo is the content of a mount's info.json.
type MountInfo struct {
	Image      string          `json:"image"`
	Base       string          `json:"base"`
	Overlays   []string        `json:"overlays"`
	MemorySize int64           `json:"memory_size"`
	DiskSize   int64           `json:"disk_size"`
	Machine    json.RawMessage `json:"machine"`
}

// MountStatus is what a mount's control socket says of how the overlays are read.
type MountStatus struct {
	overlay.ImageStats
	// Complete: every overlay of the chain is on this host.
	Complete bool            `json:"complete"`
	Stalls   []overlay.Stall `json:"stalls"`
	Waits    Histogram       `json:"waits"` // of the kernel's reads
}

// spec returns how to mount a launch image on dir.
func (l *launchImage) spec(dir string, limit int64) MountSpec {
	links := slices.Clone(l.links)
	for i := range links {
		links[i].Beginning = l.begun[i]
	}
	return MountSpec{Image: l.image.ID().String(), Base: l.base.Dir(), Links: links, Hold: l.hold, Dir: dir, Memory: limit}
}

// MountSpec returns how to mount what ref names on dir, for a person to look at.
func (s *Service) MountSpec(ctx context.Context, ref, dir string) (MountSpec, error) {
	l, err := s.openLaunch(ctx, ref)
	if err != nil {
		return MountSpec{}, fail(err)
	}
	if rel, err := relative(s.cfg.Dir, dir); err == nil && rel {
		return MountSpec{}, fail(errors.Join(api.Errorf(api.Invalid, "mountpoint %s lies in the state folder %s", dir, s.cfg.Dir).Fix("choose a folder outside of it"), l.close()))
	}
	spec := l.spec(dir, s.cfg.MountMemory)
	spec.Cache = s.path("cache") // for what comes in order only
	return spec, fail(l.close())
}

// ServeMount serves a launch image until it is unmounted. ready is called once it can be
// used. A value from stop asks for the end: while the mount is in use that is refused with a
// message, the second time it is done by force where force is set.
func ServeMount(ctx context.Context, spec MountSpec, ready func() error, stop <-chan os.Signal, force bool, log *slog.Logger) error {
	var closers []func() error
	err := serveMount(ctx, spec, ready, stop, force, log, func(c func() error) { closers = append(closers, c) })
	for i := len(closers) - 1; i >= 0; i-- {
		err = errors.Join(err, closers[i]())
	}
	return fail(err)
}

func serveMount(ctx context.Context, spec MountSpec, ready func() error, stop <-chan os.Signal, force bool, log *slog.Logger, onClose func(func() error)) error {
	for _, dir := range spec.Hold {
		l, err := tryLock(dir, unix.LOCK_SH)
		if err != nil {
			return err
		}
		onClose(func() error { l.unlock(); return nil })
	}
	if spec.Alive != "" {
		if err := lockForLife(ctx, spec.Alive); err != nil {
			return err
		}
		if err := os.WriteFile(spec.Alive, []byte(strconv.Itoa(os.Getpid())), 0o600); err != nil {
			return err
		}
	}
	if spec.Starter != nil {
		if err := spec.Starter.Close(); err != nil {
			return err
		}
	}
	im, err := openSpec(ctx, spec, onClose)
	if err != nil {
		return err
	}
	if spec.Memory > 0 { // the collector works harder near it
		var now runtime.MemStats
		runtime.ReadMemStats(&now)
		debug.SetMemoryLimit(int64(now.HeapAlloc) + spec.Memory)
	}
	info, err := describeImage(im)
	if err != nil {
		return err
	}
	var hold overlay.Hold
	waits := newWaits()
	srv, err := fusefs.Mount(spec.Dir, fusefs.Options{
		Memory: waits.file(hold.File(im.File(overlay.Memory))), Disk: waits.file(hold.File(im.File(overlay.Disk))), Info: info,
		Name: "cloudlet:" + spec.Image[:12], Socket: spec.Socket, Log: log, Record: spec.Record, AllowOther: spec.Shared, ReadAheadKiB: readAheadOf(spec, im),
		Status: func() any { return MountStatus{im.Stats(), complete(im), hold.Stalls(), waits.histogram()} },
	})
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENOTEMPTY) {
		return api.Errorf(api.Invalid, "%w", err)
	}
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- srv.Wait() }()
	if err := ready(); err != nil {
		return errors.Join(err, srv.Unmount(ctx), <-ended)
	}
	if spec.Alive != "" && !spec.Record { // for a VM
		ctx, cancel := context.WithCancel(ctx)
		prefetched := make(chan struct{})
		go func() { defer close(prefetched); prefetch(ctx, spec, im, srv, log) }()
		defer func() { cancel(); <-prefetched }()
	}
	for asked := false; ; asked = true {
		select {
		case err := <-ended:
			return err
		case <-stop:
		}
		// The context of the command may have ended by the same signal.
		err := srv.Unmount(context.WithoutCancel(ctx))
		if errors.Is(err, fusefs.ErrBusy) && asked && force {
			err = srv.ForceUnmount(context.WithoutCancel(ctx))
		} else if errors.Is(err, fusefs.ErrBusy) {
			log.Warn("the mount is in use and stays: close its files or stop its VMs first, then ask again", "dir", spec.Dir)
			continue
		}
		if err != nil {
			log.Error("unmount", "dir", spec.Dir, "err", err)
		}
	}
}

func complete(im *overlay.Image) bool {
	return !slices.ContainsFunc(im.Chain(), func(r *overlay.Reader) bool { return !r.Complete() })
}

// openSpec opens base and overlays of a spec as a launch image.
func openSpec(ctx context.Context, spec MountSpec, onClose func(func() error)) (*overlay.Image, error) {
	base, err := overlay.OpenBase(spec.Base)
	if err != nil {
		return nil, err
	}
	onClose(base.Close)
	var readers []*overlay.Reader
	for _, l := range spec.Links {
		src, err := l.open(ctx, spec.Cache)
		if err != nil {
			return nil, err
		}
		cache, err := openCache(spec, l)
		if err != nil {
			return nil, errors.Join(err, src.Close())
		}
		if cache != nil {
			onClose(cache.Close)
		}
		r, err := overlay.OpenWith(ctx, src, overlay.OpenOptions{Cache: cache})
		if err != nil {
			return nil, err
		}
		onClose(r.Close)
		readers = append(readers, r)
	}
	decoded, err := openDecoded(spec, readers)
	if err != nil {
		return nil, err
	}
	if decoded != nil {
		onClose(decoded.Close)
	}
	im, err := overlay.NewImage(base, readers, overlay.ImageOptions{FrameCache: int(spec.Memory * 4 / 7), Decoded: decoded})
	if err != nil {
		return nil, err
	}
	onClose(im.Close)
	if im.ID().String() != spec.Image {
		return nil, api.Errorf(api.Conflict, "the files make image %.12s, not %.12s: one of them was replaced", im.ID(), spec.Image)
	}
	return im, nil
}

func describeImage(im *overlay.Image) ([]byte, error) {
	info := MountInfo{
		Image: im.ID().String(), Base: im.Base().ID().String(), Overlays: []string{},
		MemorySize: im.Size(overlay.Memory), DiskSize: im.Size(overlay.Disk), Machine: im.Base().Manifest().Machine,
	}
	for _, r := range im.Chain() {
		info.Overlays = append(info.Overlays, r.ID().String())
		info.Machine = r.Manifest().Machine
	}
	b, err := json.MarshalIndent(info, "", " ")
	return append(b, '\n'), err
}

// ReadMountSpec reads a spec that the service wrote for a mount process.
func ReadMountSpec(path string) (MountSpec, error) {
	var spec MountSpec
	err := readJSON(path, &spec)
	if err == nil && len(spec.Image) != 64 {
		err = fmt.Errorf("read %s: no image id", path)
	}
	return spec, fail(err)
}

// relative reports whether dir is root or lies below it.
func relative(root, dir string) (bool, error) {
	for path := dir; ; {
		a, err := os.Stat(path)
		if err != nil {
			return false, err
		}
		b, err := os.Stat(root)
		if err != nil {
			return false, err
		}
		if os.SameFile(a, b) {
			return true, nil
		}
		up := path + "/.."
		c, err := os.Stat(up)
		if err != nil || os.SameFile(a, c) {
			return false, err
		}
		path = up
	}
}
