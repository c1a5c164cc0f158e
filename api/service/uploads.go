package service

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"cloudlet/api"

	"golang.org/x/sys/unix"
)

const (
	maxUploads   = 256
	uploadLife   = 24 * time.Hour // without a byte
	uploadSync   = 64 << 20       // bytes after which what has arrived is made sure of
	uploadBuffer = 1 << 20
)

var uploadForm = regexp.MustCompile(`^upload-[0-9a-f]{12}$`)

// uploadRecord is what the store keeps of an upload, in a folder beside the file "overlay".
type uploadRecord struct {
	api.Upload
	Caller    string `json:"caller,omitempty"`
	Operation string `json:"operation,omitempty"` // that has taken it in
}

func (s *Service) uploadPath(id string, parts ...string) string {
	return s.path(append([]string{"uploads", id}, parts...)...)
}

func (s *Service) readUpload(id string) (u uploadRecord, err error) {
	if !uploadForm.MatchString(id) {
		return u, errNoUpload(id)
	}
	err = readJSON(s.uploadPath(id, "upload.json"), &u)
	if errors.Is(err, fs.ErrNotExist) {
		return u, errNoUpload(id)
	}
	return u, err
}

func errNoUpload(id string) error {
	return api.Errorf(api.NotFound, "no upload %.80q", id).Fix("create one; an upload is dropped %s after its last byte", uploadLife)
}

func (s *Service) uploads() (out []uploadRecord, err error) {
	ids, err := s.list("uploads")
	for _, id := range ids {
		if u, err := s.readUpload(id); err == nil { // else removed since
			out = append(out, u)
		}
	}
	return out, err
}

// CreateUpload makes room for an overlay whose content will be sent with Append. The caller's
// key is not looked at: an upload that is not used costs nothing and goes away.
func (s *Service) CreateUpload(ctx context.Context, caller Caller, req api.CreateUpload) (api.Upload, error) {
	u, err := s.createUpload(ctx, caller, req)
	return u, fail(err)
}

func (s *Service) createUpload(ctx context.Context, caller Caller, req api.CreateUpload) (out api.Upload, err error) {
	if req.Size <= 0 {
		return out, invalid("size", "an upload of %d bytes", req.Size).Fix("give the size of the overlay file in bytes")
	}
	if err := s.checkName(req.Name); err != nil {
		return out, err
	}
	if s.closing() {
		return out, errClosing()
	}
	var b [6]byte
	rand.Read(b[:]) // never fails
	u := uploadRecord{Upload: api.Upload{ID: "upload-" + hex.EncodeToString(b[:]), Name: req.Name, Size: req.Size, Created: time.Now().UTC()}, Caller: caller.Name}
	err = s.locked(ctx, func() error {
		all, err := s.uploads()
		if err != nil {
			return err
		}
		if len(all) >= maxUploads {
			return api.Errorf(api.Unavailable, "%d uploads are open, which is the limit", len(all)).Fix("delete one, then ask again")
		}
		if err := s.admit(need{Disk: req.Size}, nil); err != nil {
			return err
		}
		if err := os.Mkdir(s.uploadPath(u.ID), 0o700); err != nil {
			return err
		}
		return s.writeUpload(u)
	})
	if err != nil {
		return out, errors.Join(s.spaceError(err), os.RemoveAll(s.uploadPath(u.ID)))
	}
	return u.Upload, nil
}

func (s *Service) writeUpload(u uploadRecord) error {
	return writeJSON(s.uploadPath(u.ID, "upload.json"), u)
}

// Upload describes an upload.
func (s *Service) Upload(ctx context.Context, id string) (api.Upload, error) {
	u, err := s.readUpload(id)
	return u.Upload, fail(err)
}

// lockUpload reads an upload and keeps others from changing it until unlock.
func (s *Service) lockUpload(id string) (u uploadRecord, lk *lock, err error) {
	if u, err = s.readUpload(id); err != nil {
		return u, nil, err
	}
	lk, err = tryLock(s.uploadPath(id), unix.LOCK_EX)
	switch {
	case errors.Is(err, errLocked):
		return u, nil, api.Errorf(api.Conflict, "%s is busy: bytes are arriving, or it is being taken in", id).Fix("ask again when that has ended")
	case errors.Is(err, fs.ErrNotExist):
		return u, nil, errNoUpload(id)
	case err != nil:
		return u, nil, err
	}
	if u, err = s.readUpload(id); err != nil {
		lk.unlock()
		return u, nil, err
	}
	return u, lk, nil
}

// DeleteUpload removes an upload and what has arrived of it.
func (s *Service) DeleteUpload(ctx context.Context, id string) error {
	_, lk, err := s.lockUpload(id)
	if err != nil {
		return fail(err)
	}
	defer lk.unlock()
	users, err := s.usersThat(func(r *record) bool {
		return slices.ContainsFunc(r.Links, func(l link) bool { return l.Source == s.uploadPath(id, "overlay") })
	})
	if err == nil && len(users) > 0 {
		err = api.Errorf(api.Conflict, "%s is used by %s", id, strings.Join(users, ", ")).Fix("remove what uses it first, or send the rest")
	}
	if err != nil {
		return fail(err)
	}
	return fail(os.RemoveAll(s.uploadPath(id)))
}

// Append adds what r holds at off, which must be the upload's offset; else it is a Conflict,
// and the upload is returned too, to tell where to go on. What has arrived when r breaks
// stays. More than the upload's size is Invalid, and nothing of r stays.
func (s *Service) Append(ctx context.Context, id string, off int64, r io.Reader) (api.Upload, error) {
	if s.closing() {
		return api.Upload{}, errClosing()
	}
	u, lk, err := s.lockUpload(id)
	if err != nil {
		return u.Upload, fail(err)
	}
	defer lk.unlock()
	if u.Operation != "" {
		return u.Upload, api.Errorf(api.Conflict, "%s is complete; operation %s takes it in", id, u.Operation)
	}
	if off != u.Offset {
		return u.Upload, fail(errOffset(u, off))
	}
	err = s.receive(ctx, &u, arriving{r})
	return u.Upload, fail(s.spaceError(err))
}

func errOffset(u uploadRecord, off int64) error {
	return invalidAs(api.Conflict, "offset", "%s has %d of %d bytes, so bytes at %d do not follow", u.ID, u.Offset, u.Size, off).Fix("go on at offset %d", u.Offset)
}

func invalidAs(code api.Code, field, format string, args ...any) *api.Error {
	err := api.Errorf(code, format, args...)
	err.Field = field
	return err
}

// receive writes what r brings behind what has arrived. The record, which says how much
// counts, follows the synced file.
func (s *Service) receive(ctx context.Context, u *uploadRecord, r io.Reader) (err error) {
	f, err := os.OpenFile(s.uploadPath(u.ID, "overlay"), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	start, off := u.Offset, u.Offset
	keep := func(n int64) error {
		if err := f.Sync(); err != nil {
			return err
		}
		u.Offset = n
		return s.writeUpload(*u)
	}
	buf := make([]byte, uploadBuffer)
	for err == nil {
		if err = context.Cause(ctx); err != nil {
			break
		}
		var n int
		n, err = r.Read(buf)
		if n > 0 && off+int64(n) > u.Size {
			err = invalid("size", "more bytes arrive than the %d that %s was created for", u.Size, u.ID).Fix("create an upload of the right size")
			return errors.Join(err, f.Truncate(start), keep(start), f.Close())
		}
		if k, werr := f.WriteAt(buf[:n], off); werr != nil {
			err = werr
			off += int64(k)
		} else {
			off += int64(n)
		}
		if err == nil && off-u.Offset >= uploadSync {
			if err = s.roomFor(u.Size - off); err == nil {
				err = keep(off)
			}
		}
	}
	if err == io.EOF {
		err = nil
	} else {
		err = fmt.Errorf("upload %s: after %d of %d bytes: %w", u.ID, off, u.Size, err)
	}
	if off > u.Offset {
		err = errors.Join(err, keep(off))
	}
	return errors.Join(err, f.Close())
}

// FinishUpload begins the operation that checks a complete upload and takes it into the
// store. While that works, and after it has ended, asking again returns the same operation;
// one that was cut off by a crash is begun anew.
func (s *Service) FinishUpload(ctx context.Context, caller Caller, id string) (api.Operation, error) {
	op, err := s.finishUpload(ctx, caller, id)
	return op, fail(err)
}

func (s *Service) finishUpload(ctx context.Context, caller Caller, id string) (op api.Operation, err error) {
	if u, err := s.readUpload(id); err != nil {
		return op, err
	} else if op, ok := s.takenIn(ctx, u); ok {
		return op, nil
	}
	u, lk, err := s.lockUpload(id)
	if err != nil {
		return op, err
	}
	begun := false
	defer func() {
		if !begun {
			lk.unlock()
		}
	}()
	if op, ok := s.takenIn(ctx, u); ok {
		return op, nil
	}
	if u.Offset != u.Size {
		return op, errOffset(u, u.Size)
	}
	recorded := make(chan struct{})
	op, begun, err = s.begin(ctx, task{
		caller: Caller{Name: caller.Name, Local: caller.Local}, kind: api.KindImportOverlay, req: api.ImportOverlay{Name: u.Name, Source: id}, upload: id,
		work: func(ctx context.Context, op *operation) (any, error) {
			defer lk.unlock()
			<-recorded
			return s.takeIn(ctx, u, op.progress)
		},
	})
	defer close(recorded)
	if begun {
		u.Operation = op.ID
		err = errors.Join(err, s.writeUpload(u))
	}
	return op, err
}

// takenIn returns the operation that takes an upload in, unless it was cut off.
func (s *Service) takenIn(ctx context.Context, u uploadRecord) (api.Operation, bool) {
	if u.Operation == "" {
		return api.Operation{}, false
	}
	op, err := s.Operation(ctx, u.Operation)
	if err != nil {
		return op, false
	}
	if op.State.Ended() && op.State != api.OperationDone {
		if _, err := os.Stat(s.uploadPath(u.ID, "overlay")); err == nil {
			return op, false
		}
	}
	return op, true
}

// takeIn moves the content of an upload into the store. Whatever comes of it, the content is
// gone then, unless the service stops, after whose next start it can be finished again; the
// record stays for a while, to answer those who ask.
func (s *Service) takeIn(ctx context.Context, u uploadRecord, p api.Progress) (out api.Overlay, err error) {
	defer func() {
		if err == nil || !errors.Is(context.Cause(ctx), errStopping) {
			err = errors.Join(err, ignoreMissing(os.Remove(s.uploadPath(u.ID, "overlay"))))
		}
	}()
	return s.verifyAndKeep(ctx, s.uploadPath(u.ID), u.ID, u.Name, p)
}

// sweepUploads removes the uploads that nobody has touched for long, and what never became one.
func (s *Service) sweepUploads(ctx context.Context) error {
	ids, err := s.list("uploads")
	for _, id := range ids {
		at := s.uploadPath(id, "upload.json")
		info, serr := os.Stat(at)
		if serr == nil && time.Since(info.ModTime()) < uploadLife {
			continue
		}
		err = errors.Join(err, s.locked(ctx, func() error {
			lk, err := tryLock(s.uploadPath(id), unix.LOCK_EX)
			if err != nil {
				return nil // somebody cares for it, or it is gone
			}
			defer lk.unlock()
			return os.RemoveAll(s.uploadPath(id))
		}))
	}
	return err
}

func (s *Service) closing() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

func errClosing() error {
	return api.Errorf(api.Unavailable, "the service is stopping").Fix("ask again when it has started anew")
}
