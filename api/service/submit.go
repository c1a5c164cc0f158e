package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"cloudlet/api"

	"golang.org/x/sys/unix"
)

// Caller is on whose behalf work is done.
type Caller struct {
	Name  string // who asks, for idempotency and logs
	Local bool   // a unix socket or this process: may name host paths and any URL
	Key   string // idempotency key; "" means none
}

// VerifyBase asks Submit to check a base.
type VerifyBase struct{ api.Verify }

// VerifyOverlay asks Submit to check an overlay.
type VerifyOverlay struct{ api.Verify }

// Submit begins an operation: api.CreateBase, api.CaptureBase, api.ImportBase, VerifyBase, api.CreateOverlay,
// api.ImportOverlay, VerifyOverlay, api.Profile, api.Run or api.HandOff. What is wrong with the request, and what
// cannot fit on this host, is an error at once and leaves nothing. The work goes on when ctx
// has ended; Close joins it. The same caller, key and request give the same operation for 24
// hours; another request under that key is a Conflict.
func (s *Service) Submit(ctx context.Context, caller Caller, req any) (api.Operation, error) {
	if h, ok := req.(api.HandOff); ok {
		op, err := s.submitHandOff(ctx, caller, h)
		return op, fail(err)
	}
	op, err := s.submitOnce(ctx, caller, kindOf(req), req, func() (api.Operation, error) { return s.submit(ctx, caller, req) })
	return op, fail(err)
}

// submitOnce calls do unless the caller's key has an operation already. It looks once more
// when do fails, since another with the same key may have taken the name or the room.
func (s *Service) submitOnce(ctx context.Context, caller Caller, kind api.Kind, req any, do func() (api.Operation, error)) (api.Operation, error) {
	if caller.Key == "" {
		return do()
	}
	request, err := json.Marshal(req)
	if err == nil {
		err = checkKey(caller.Key)
	}
	if err != nil {
		return api.Operation{}, err
	}
	if id, err := s.keyed(caller, kind, request); err != nil {
		return api.Operation{}, err
	} else if id != "" {
		return s.Operation(ctx, id)
	}
	op, err := do()
	if err != nil {
		if id, kerr := s.keyed(caller, kind, request); kerr == nil && id != "" {
			return s.Operation(ctx, id)
		}
	}
	return op, err
}

func kindOf(req any) api.Kind {
	switch req.(type) {
	case api.CreateBase, api.CaptureBase:
		return api.KindCreateBase
	case api.ImportBase:
		return api.KindImportBase
	case VerifyBase:
		return api.KindVerifyBase
	case api.CreateOverlay:
		return api.KindCreateOverlay
	case api.ImportOverlay:
		return api.KindImportOverlay
	case VerifyOverlay:
		return api.KindVerifyOverlay
	case api.Profile:
		return api.KindProfile
	case api.Run:
		return api.KindRun
	}
	return ""
}

func (s *Service) submit(ctx context.Context, caller Caller, req any) (op api.Operation, err error) {
	t := task{caller: caller, kind: kindOf(req), req: req}
	switch req := req.(type) {
	case api.Run:
		return s.submitRun(ctx, t, req)
	case api.CreateBase:
		err = s.submitCreateBase(ctx, &t, req)
	case api.CaptureBase:
		err = s.submitCaptureBase(&t, req)
	case api.ImportBase:
		err = s.submitImportBase(&t, req)
	case VerifyBase:
		err = s.submitVerifyBase(&t, req)
	case api.CreateOverlay:
		err = s.submitCreateOverlay(ctx, &t, req)
	case api.ImportOverlay:
		err = s.submitImportOverlay(&t, req)
	case VerifyOverlay:
		err = s.submitVerifyOverlay(&t, req)
	case api.Profile:
		err = s.submitProfile(ctx, &t, req)
	default:
		panic(fmt.Sprintf("no operation begins with a %T", req))
	}
	if err != nil {
		return op, err
	}
	op, _, err = s.begin(ctx, t)
	return op, err
}

func (s *Service) submitRun(ctx context.Context, t task, req api.Run) (api.Operation, error) {
	line := &timeline{start: time.Now()}
	line.mark("accepted")
	j, err := s.newSynthesis(ctx, t.caller, req, line)
	if err != nil {
		return api.Operation{}, err
	}
	t.since, t.need = line.start, need{Memory: j.machine.Memory, Instances: 1}
	j.resumable = s.cfg.Daemon
	late := j.image == nil
	t.work = func(ctx context.Context, op *operation) (any, error) {
		line.report = op.progress
		j.id = op.record.ID // so whoever began it knows the instance before there is one
		if late {
			j.fits = func(ctx context.Context, memory int64) error { return s.admitLate(ctx, op, memory) }
		}
		return s.run(ctx, j, func(id string) { op.aim("instance", id) })
	}
	op, fresh, err := s.begin(ctx, t)
	if !fresh {
		err = errors.Join(err, j.close())
	}
	return op, err
}

func (s *Service) submitCreateBase(ctx context.Context, t *task, req api.CreateBase) error {
	for _, path := range []struct{ field, value string }{{"disk", req.Disk}, {"kernel", req.Kernel}, {"initrd", req.Initrd}} {
		if path.value == "" && path.field != "disk" {
			continue
		}
		if err := checkPath(t.caller, path.field, path.value); err != nil {
			return err
		}
		if err := checkFile(path.field, path.value, path.field == "disk"); err != nil {
			return err
		}
	}
	if req.CPUs < 0 {
		return invalid("cpus", "%d CPUs", req.CPUs).Fix("leave it out to have one")
	}
	if (req.Initrd != "" || req.Append != "") && req.Kernel == "" {
		return invalid("kernel", "initrd and append go with a kernel")
	}
	if err := errors.Join(s.checkNewName(req.Name), checkProbe(req.Probe), checkTime("timeout", req.Timeout), checkTime("settle", req.Settle)); err != nil {
		return err
	}
	if _, err := checkForwards(req.Forwards, req.Probe); err != nil {
		return err
	}
	if _, err := s.newMachine(ctx, req); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(req.Disk, &st); err != nil {
		return &os.PathError{Op: "stat", Path: req.Disk, Err: err}
	}
	t.need = need{Memory: req.Memory, Disk: st.Blocks * 512}
	t.work = func(ctx context.Context, op *operation) (any, error) {
		return s.createBase(ctx, req, func(ctx context.Context, in api.Instance) error { return op.awaitReady(ctx, in) }, op.progress)
	}
	return nil
}

func (s *Service) submitImportBase(t *task, req api.ImportBase) error {
	if err := s.checkName(req.Name); err != nil {
		return err
	}
	if _, err := s.checkSource(t.caller, req.Source); err != nil {
		return err
	}
	rules := s.rules(t.caller)
	t.work = func(ctx context.Context, op *operation) (any, error) {
		return s.importBase(ctx, req, rules, op.progress)
	}
	return nil
}

func (s *Service) submitImportOverlay(t *task, req api.ImportOverlay) error {
	if err := s.checkName(req.Name); err != nil {
		return err
	}
	size, err := s.checkSource(t.caller, req.Source)
	if err != nil {
		return err
	}
	t.need = need{Disk: size}
	at := location{source: req.Source, allow: s.rules(t.caller)}
	t.work = func(ctx context.Context, op *operation) (any, error) {
		return s.importOverlay(ctx, at, req.Name, op.progress)
	}
	return nil
}

func (s *Service) submitVerifyBase(t *task, req VerifyBase) error {
	id, err := s.findBase(req.Ref)
	if err != nil {
		return err
	}
	t.target = &api.Target{Type: "base", ID: id}
	t.work = func(ctx context.Context, op *operation) (any, error) { return s.verifyBase(ctx, id, op.progress) }
	return nil
}

func (s *Service) submitVerifyOverlay(t *task, req VerifyOverlay) error {
	at, err := s.findOverlayFor(t.caller, "ref", req.Ref)
	if err != nil {
		return err
	}
	if at.id != "" {
		t.target = &api.Target{Type: "overlay", ID: at.id}
	}
	t.work = func(ctx context.Context, op *operation) (any, error) { return s.verifyOverlay(ctx, at, op.progress) }
	return nil
}

func (s *Service) submitCreateOverlay(ctx context.Context, t *task, req api.CreateOverlay) error {
	if req.Output != "" {
		if err := checkPath(t.caller, "output", req.Output); err != nil {
			return err
		}
	}
	if _, err := usableStrategy(ctx, req.Strategy); err != nil {
		return err
	}
	id, err := s.submitCapture(t, req.Instance, req.Name)
	if err != nil {
		return err
	}
	t.work = func(ctx context.Context, op *operation) (any, error) {
		return s.createOverlay(ctx, id, req, op.progress)
	}
	return nil
}

// submitCapture aims a task at an instance that is to be captured under a new name.
func (s *Service) submitCapture(t *task, instance, name string) (id string, err error) {
	if err := s.checkNewName(name); err != nil {
		return "", err
	}
	if id, err = s.findInstance(instance); err != nil {
		return "", err
	}
	if r, err := s.readRecord(id); err == nil && !r.alive() {
		return "", api.Errorf(api.Conflict, "instance %s has ended: %s", id, r.Reason).Fix("start another with `cloudlet run`")
	}
	t.target = &api.Target{Type: "instance", ID: id}
	return id, nil
}

func (s *Service) submitCaptureBase(t *task, req api.CaptureBase) error {
	id, err := s.submitCapture(t, req.Instance, req.Name)
	if err != nil {
		return err
	}
	t.work = func(ctx context.Context, op *operation) (any, error) {
		return s.captureBase(ctx, id, req.Name, op.progress)
	}
	return nil
}

// checkNewName refuses a name for something new that is not one, or that is taken.
func (s *Service) checkNewName(name string) error {
	if err := s.checkName(name); err != nil {
		return err
	}
	return s.checkNameFree(name, "")
}

// checkSource refuses a path or URL that the caller may not name, or that is not there, and
// returns the size of a file.
func (s *Service) checkSource(c Caller, source string) (int64, error) {
	if isRemote(source) {
		return 0, s.checkURL(c, "source", source)
	}
	if err := checkPath(c, "source", strings.TrimPrefix(source, "file://")); err != nil {
		return 0, err
	}
	info, err := os.Stat(strings.TrimPrefix(source, "file://"))
	if err != nil {
		return 0, err
	}
	if !info.Mode().IsRegular() {
		return 0, invalid("source", "%.200q is not a regular file", source)
	}
	return info.Size(), nil
}

// checkPath refuses a path in a request, unless it is absolute and the caller on this host.
func checkPath(c Caller, field, path string) error {
	switch {
	case !c.Local:
		return errPath(field, path)
	case strings.ContainsRune(path, 0):
		return invalid(field, "%.200q is no path: it has a zero byte", path)
	case !filepath.IsAbs(path):
		return invalid(field, "%.200q is not an absolute path", path).Fix("give the whole path, from / on")
	}
	return nil
}

// checkFile refuses a file of this host from which a base could not be made: whoever opens
// a pipe waits for its other end, for ever. A disk may also be a block device.
func checkFile(field, path string, disk bool) error {
	info, err := os.Stat(path)
	if err != nil {
		return invalidAs(api.CodeOf(fail(err)), field, "%w", err)
	}
	device := info.Mode().Type() == os.ModeDevice // ModeCharDevice is set as well for others
	if !info.Mode().IsRegular() && !(disk && device) {
		return invalid(field, "%.200q is not a regular file", path)
	}
	return nil
}

func isRemote(ref string) bool {
	return strings.HasPrefix(ref, "http://") || strings.HasPrefix(ref, "https://")
}

const (
	maxWait     = 24 * time.Hour
	maxContains = 64 << 10
)

// checkTime refuses times that cannot be meant.
func checkTime(field string, d time.Duration) error {
	if d < 0 || d > maxWait {
		return invalid(field, "%s is not between 0 and %s", d, maxWait).Fix("give nanoseconds")
	}
	return nil
}

// checkProbe refuses a probe that no answer could satisfy.
func checkProbe(p *api.Probe) error {
	switch {
	case p == nil:
		return nil
	case p.Port < 1 || p.Port > 65535:
		return invalid("probe.port", "probe port %d: ports are 1 to 65535", p.Port)
	case p.Status != 0 && (p.Status < 100 || p.Status > 599):
		return invalid("probe.status", "probe status %d: statuses are 100 to 599", p.Status).Fix("leave it out to take any below 400")
	case len(p.Contains) > maxContains:
		return invalid("probe.contains", "the text of the probe has %d bytes, the limit is %d", len(p.Contains), maxContains)
	}
	if _, err := http.NewRequest(http.MethodGet, probeURL("127.0.0.1:80", p.Path), nil); err != nil {
		return invalid("probe.path", "probe path %.200q: %v", p.Path, err)
	}
	return nil
}

func probeURL(addr, path string) string {
	return "http://" + addr + "/" + strings.TrimPrefix(path, "/")
}
