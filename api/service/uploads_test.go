package service

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"testing"
	"testing/iotest"
	"time"

	"cloudlet/api"
	needs "cloudlet/integration/need" // need is a type here

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// overlayBytes makes an overlay and removes it from the store again.
func overlayBytes(t *testing.T, s *Service) (id string, content []byte) {
	t.Helper()
	b := addBase(t, s, "", 'a')
	o := addOverlay(t, s, b.ID, "", 'x')
	content, err := os.ReadFile(s.overlayFile(o.ID))
	require.NoError(t, err)
	require.NoError(t, s.DeleteOverlay(t.Context(), o.ID))
	return o.ID, content
}

func TestUpload(t *testing.T) {
	s := newService(t)
	id, content := overlayBytes(t, s)
	size := int64(len(content))
	remote := Caller{Name: "peer"}
	u, err := s.CreateUpload(t.Context(), remote, api.CreateUpload{Name: "app", Size: size})
	require.NoError(t, err)
	require.Zero(t, u.Offset)

	_, err = s.FinishUpload(t.Context(), remote, u.ID)
	require.Equal(t, api.Conflict, api.CodeOf(err))
	require.ErrorContains(t, err, "go on at offset 0")

	// A client that vanishes: what has arrived stays.
	gone := errors.New("connection reset")
	u, err = s.Append(t.Context(), u.ID, 0, io.MultiReader(bytes.NewReader(content[:1000]), iotest.ErrReader(gone)))
	require.ErrorIs(t, err, gone)
	require.EqualValues(t, 1000, u.Offset)

	// Another process goes on, after bytes that a crash left without counting them.
	f, err := os.OpenFile(s.uploadPath(u.ID, "overlay"), os.O_WRONLY|os.O_APPEND, 0)
	require.NoError(t, err)
	_, err = f.WriteString("not counted")
	require.NoError(t, errors.Join(err, f.Close()))
	other := reopen(t, s, nil)
	for _, off := range []int64{0, 999, 1001, size} {
		now, err := other.Append(t.Context(), u.ID, off, bytes.NewReader(content))
		require.Equal(t, api.Conflict, api.CodeOf(err))
		require.EqualValues(t, 1000, now.Offset, "where to go on is told")
	}
	// One byte too many: nothing of it stays.
	_, err = other.Append(t.Context(), u.ID, 1000, io.MultiReader(bytes.NewReader(content[1000:]), bytes.NewReader([]byte{0})))
	require.Equal(t, api.Invalid, api.CodeOf(err))
	u, err = other.Upload(t.Context(), u.ID)
	require.NoError(t, err)
	require.EqualValues(t, 1000, u.Offset)
	info, err := os.Stat(s.uploadPath(u.ID, "overlay"))
	require.NoError(t, err)
	require.EqualValues(t, 1000, info.Size())

	cut, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = other.Append(cut, u.ID, 1000, bytes.NewReader(content[1000:]))
	require.Equal(t, api.Cancelled, api.CodeOf(err))
	u, err = other.Append(t.Context(), u.ID, 1000, bytes.NewReader(content[1000:]))
	require.NoError(t, err)
	require.Equal(t, size, u.Offset)
	require.NoDirExists(t, s.path("overlays", id))
	op, err := other.FinishUpload(t.Context(), remote, u.ID)
	require.NoError(t, err)
	require.Equal(t, api.OperationDone, awaitEnd(t, other, op.ID).State)
	o, err := s.OverlayFor(t.Context(), Caller{}, "app")
	require.NoError(t, err)
	require.Equal(t, id, o.ID)

	same, err := s.FinishUpload(t.Context(), remote, u.ID)
	require.NoError(t, err)
	require.Equal(t, op.ID, same.ID, "asking again is harmless")
	_, err = s.Append(t.Context(), u.ID, size, bytes.NewReader(nil))
	require.Equal(t, api.Conflict, api.CodeOf(err))
	require.NoError(t, s.DeleteUpload(t.Context(), u.ID))
	_, err = s.Upload(t.Context(), u.ID)
	require.Equal(t, api.NotFound, api.CodeOf(err))
}

// TestUploadOfRubbish: what is no overlay fails its operation, and its bytes are gone.
func TestUploadOfRubbish(t *testing.T) {
	s := newService(t)
	p := make([]byte, 3<<20)
	_, err := rand.Read(p)
	require.NoError(t, err)
	u, err := s.CreateUpload(t.Context(), Caller{}, api.CreateUpload{Size: int64(len(p))})
	require.NoError(t, err)
	_, err = s.Append(t.Context(), u.ID, 0, bytes.NewReader(p))
	require.NoError(t, err)
	op, err := s.FinishUpload(t.Context(), Caller{}, u.ID)
	require.NoError(t, err)
	end := awaitEnd(t, s, op.ID)
	require.Equal(t, api.OperationFailed, end.State)
	require.Equal(t, api.Damaged, end.Error.Code)
	require.NoError(t, s.Close(t.Context()))
	require.NoFileExists(t, s.uploadPath(u.ID, "overlay"))

	old := time.Now().Add(-uploadLife - time.Minute)
	require.NoError(t, os.Chtimes(s.uploadPath(u.ID, "upload.json"), old, old))
	reopen(t, s, nil)
	require.NoDirExists(t, s.uploadPath(u.ID))
}

// TestUploadCutOff: an upload whose operation died can be finished again.
func TestUploadCutOff(t *testing.T) {
	s := newService(t)
	_, content := overlayBytes(t, s)
	u, err := s.CreateUpload(t.Context(), Caller{}, api.CreateUpload{Size: int64(len(content))})
	require.NoError(t, err)
	_, err = s.Append(t.Context(), u.ID, 0, bytes.NewReader(content))
	require.NoError(t, err)
	dead := left(t, s, operationRecord{Operation: api.Operation{Kind: api.KindImportOverlay, Request: []byte(`{}`)}, Upload: u.ID})
	r, err := s.readUpload(u.ID)
	require.NoError(t, err)
	r.Operation = dead
	require.NoError(t, s.writeUpload(r))
	op, err := s.FinishUpload(t.Context(), Caller{}, u.ID)
	require.NoError(t, err)
	require.NotEqual(t, dead, op.ID)
	require.Equal(t, api.OperationDone, awaitEnd(t, s, op.ID).State)
	was, err := s.Operation(t.Context(), dead)
	require.NoError(t, err)
	require.Contains(t, was.Error.Remedy, "finish the upload again")
}

// TestUploadAtStop: a stop of the service loses nothing of an upload that it takes in; whoever
// cancels that wants it gone.
func TestUploadAtStop(t *testing.T) {
	s := newService(t)
	_, content := overlayBytes(t, s)
	for _, cause := range []error{errStopping, context.Canceled} {
		u, err := s.CreateUpload(t.Context(), Caller{}, api.CreateUpload{Size: int64(len(content))})
		require.NoError(t, err)
		_, err = s.Append(t.Context(), u.ID, 0, bytes.NewReader(content))
		require.NoError(t, err)
		r, err := s.readUpload(u.ID)
		require.NoError(t, err)
		ctx, end := context.WithCancelCause(t.Context())
		end(cause)
		_, err = s.takeIn(ctx, r, nil)
		require.ErrorIs(t, err, context.Canceled)
		if cause != errStopping {
			require.NoFileExists(t, s.uploadPath(u.ID, "overlay"))
			continue
		}
		op, err := reopen(t, s, nil).FinishUpload(t.Context(), Caller{}, u.ID)
		require.NoError(t, err)
		require.Equal(t, api.OperationDone, awaitEnd(t, s, op.ID).State)
	}
}

func TestUploadLimits(t *testing.T) {
	s := newService(t)
	for _, size := range []int64{0, -1} {
		_, err := s.CreateUpload(t.Context(), Caller{}, api.CreateUpload{Size: size})
		require.Equal(t, api.Invalid, api.CodeOf(err))
	}
	_, err := s.CreateUpload(t.Context(), Caller{}, api.CreateUpload{Size: 1 << 60})
	require.Equal(t, api.Unavailable, api.CodeOf(err))
	require.ErrorContains(t, err, "1073741824.0 GiB are needed")
	free, err := s.freeDisk()
	require.NoError(t, err)
	_, err = s.CreateUpload(t.Context(), Caller{}, api.CreateUpload{Size: free * 2 / 3})
	require.NoError(t, err)
	_, err = s.CreateUpload(t.Context(), Caller{}, api.CreateUpload{Size: free * 2 / 3})
	require.Equal(t, api.Unavailable, api.CodeOf(err), "the room is promised to the first")
	for _, id := range []string{"", "upload-x", "upload-000000000000", "../bases"} {
		_, err := s.Upload(t.Context(), id)
		require.Equal(t, api.NotFound, api.CodeOf(err), id)
		require.Equal(t, api.NotFound, api.CodeOf(s.DeleteUpload(t.Context(), id)), id)
	}
}

// smallStore returns a service over a store in a file system of its own.
func smallStore(t *testing.T, size string) *Service {
	t.Helper()
	needs.Root(t, "mount a small file system")
	dir := t.TempDir()
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, 0)) })
	s, err := Open(t.Context(), Config{Dir: dir, Program: []string{"/bin/false"}})
	require.NoError(t, err)
	t.Cleanup(func() { closeNow(t, s) })
	return s
}

// TestFullDisk: what arrives until the disk is full stays; when there is room it goes on.
func TestFullDisk(t *testing.T) {
	s := smallStore(t, "4m")
	id, content := overlayBytes(t, s)
	u, err := s.CreateUpload(t.Context(), Caller{}, api.CreateUpload{Size: int64(len(content))})
	require.NoError(t, err)
	ballast := s.path("ballast")
	b := make([]byte, 8<<20)
	require.Error(t, os.WriteFile(ballast, b, 0o600), "fills it")
	u, err = s.Append(t.Context(), u.ID, 0, bytes.NewReader(content))
	require.Equal(t, api.Unavailable, api.CodeOf(err), err)
	require.ErrorContains(t, err, "disk space")
	require.Less(t, u.Offset, u.Size)

	_, err = s.Submit(t.Context(), Caller{Local: true}, VerifyBase{api.Verify{Ref: mustBase(t, s)}})
	require.Equal(t, api.Unavailable, api.CodeOf(err), err)
	_, err = s.ReceiveBase(t.Context(), Caller{}, "", bytes.NewReader(b), -1)
	require.Equal(t, api.Unavailable, api.CodeOf(err), err)
	left, err := os.ReadDir(s.path("tmp"))
	require.NoError(t, err)
	require.Empty(t, left)
	reopen(t, s, nil) // opens on a full disk

	require.NoError(t, os.Remove(ballast))
	now, err := s.Upload(t.Context(), u.ID)
	require.NoError(t, err)
	_, err = s.Append(t.Context(), u.ID, now.Offset, bytes.NewReader(content[now.Offset:]))
	require.NoError(t, err)
	op, err := s.FinishUpload(t.Context(), Caller{}, u.ID)
	require.NoError(t, err)
	require.Equal(t, api.OperationDone, awaitEnd(t, s, op.ID).State)
	_, err = s.OverlayFor(t.Context(), Caller{}, id)
	require.NoError(t, err)
}

func mustBase(t *testing.T, s *Service) string {
	t.Helper()
	list, err := s.Bases(t.Context())
	require.NoError(t, err)
	require.Len(t, list, 1)
	return list[0].ID
}

// TestEndOnFullDisk: the end of an operation that cannot be written is known all the same.
func TestEndOnFullDisk(t *testing.T) {
	s := smallStore(t, "4m")
	gate := make(chan struct{})
	op := gated(t, s, Caller{}, gate)
	_, err := s.WaitOperation(t.Context(), op.ID, op.Version)
	require.NoError(t, err)
	ballast := s.path("ballast")
	require.Error(t, os.WriteFile(ballast, make([]byte, 8<<20), 0o600))
	close(gate)
	require.Equal(t, api.OperationDone, awaitEnd(t, s, op.ID).State)
	require.Eventually(t, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.unsaved == 1 }, 5*time.Second, time.Millisecond)
	now, err := s.Operation(t.Context(), op.ID)
	require.NoError(t, err)
	require.Equal(t, api.OperationDone, now.State)
	require.NoError(t, os.Remove(ballast))
	require.NoError(t, s.Close(t.Context()))
	r, err := s.readOperation(op.ID)
	require.NoError(t, err)
	require.Equal(t, api.OperationDone, r.State)
}

func TestTransfer(t *testing.T) {
	s := newService(t)
	b := addBase(t, s, "", 'a')
	o := addOverlay(t, s, b.ID, "app", 'x')
	write, size, err := s.BasePackage(t.Context(), b.ID)
	require.NoError(t, err)
	require.EqualValues(t, -1, size)
	var zip bytes.Buffer
	require.NoError(t, write(t.Context(), &zip))

	to := newService(t)
	for _, tt := range []struct {
		name string
		r    io.Reader
		size int64
		code api.Code
	}{
		{"cut off", io.MultiReader(bytes.NewReader(zip.Bytes()[:100]), iotest.ErrReader(io.ErrUnexpectedEOF)), -1, api.Invalid},
		{"short", bytes.NewReader(zip.Bytes()[:100]), int64(zip.Len()), api.Invalid},
		{"no package", bytes.NewReader([]byte("hello")), -1, api.Damaged},
		{"too large", bytes.NewReader(zip.Bytes()), 1 << 60, api.Unavailable},
	} {
		_, err := to.ReceiveBase(t.Context(), Caller{}, "", tt.r, tt.size)
		require.Equal(t, tt.code, api.CodeOf(err), "%s: %v", tt.name, err)
		for _, dir := range []string{"tmp", "bases"} {
			left, err := os.ReadDir(to.path(dir))
			require.NoError(t, err)
			require.Empty(t, left, tt.name)
		}
	}
	have, err := to.ReceiveBase(t.Context(), Caller{}, "base", bytes.NewReader(zip.Bytes()), int64(zip.Len()))
	require.NoError(t, err)
	require.Equal(t, b.ID, have.ID)

	f, meta, err := s.OverlayContent(t.Context(), "app")
	require.NoError(t, err)
	require.Equal(t, o.Digest, meta.Digest)
	require.Equal(t, api.Conflict, api.CodeOf(s.DeleteOverlay(t.Context(), "app")), "it is being read")
	n, err := f.Seek(0, io.SeekEnd)
	require.NoError(t, err)
	require.Equal(t, meta.Size, n)
	require.NoError(t, f.Close())
	require.NoError(t, s.DeleteOverlay(t.Context(), "app"))
	_, _, err = s.OverlayContent(t.Context(), "/etc/passwd")
	require.Equal(t, api.NotFound, api.CodeOf(err))
	require.Equal(t, api.Invalid, api.CodeOf(s.DeleteOverlay(t.Context(), "/etc/passwd")))
}
