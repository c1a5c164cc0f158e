package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/overlay"
	"cloudlet/vmm"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newService(t *testing.T) *Service {
	t.Helper()
	s, err := Open(t.Context(), Config{Dir: t.TempDir(), Program: []string{"/bin/false"}})
	require.NoError(t, err)
	return s
}

// addBase puts a base of two small images into the store.
func addBase(t *testing.T, s *Service, name string, fill byte) api.Base {
	t.Helper()
	st, err := s.newStage(t.Context(), "base")
	require.NoError(t, err)
	dir := filepath.Join(st.dir, "base")
	require.NoError(t, os.Mkdir(dir, 0o700))
	page := []byte(strings.Repeat(string(rune(fill)), 8192))
	for _, f := range []string{"memory", "disk"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, f), page, 0o600))
	}
	b, err := overlay.SealBase(t.Context(), dir, json.RawMessage(`{}`), nil)
	require.NoError(t, err)
	out, err := s.keepBase(t.Context(), b, name)
	require.NoError(t, err)
	require.NoError(t, st.drop())
	return out
}

// addOverlay makes an overlay of one changed page on what ref names and stores it.
func addOverlay(t *testing.T, s *Service, ref, name string, fill byte) api.Overlay {
	t.Helper()
	l, err := s.openLaunch(t.Context(), ref)
	require.NoError(t, err)
	st, err := s.newStage(t.Context(), "overlay")
	require.NoError(t, err)
	changes := overlay.Changes{Extents: []overlay.Extent{{Off: 0, Len: 4096}}, Read: func(p []byte, _ int64) error {
		for i := range p {
			p[i] = fill
		}
		return nil
	}}
	_, err = overlay.Create(t.Context(), filepath.Join(st.dir, "overlay"), overlay.Launch{Parent: l.image, Machine: json.RawMessage(`{}`), Memory: changes}, overlay.CreateOptions{})
	require.NoError(t, err)
	o, err := s.keepOverlay(t.Context(), st.dir, name)
	require.NoError(t, err)
	require.NoError(t, st.drop())
	require.NoError(t, l.close())
	return o
}

func verified(t *testing.T, s *Service, ref string) (api.VerifiedOverlay, error) {
	t.Helper()
	at, err := s.findOverlay(ref)
	require.NoError(t, err)
	v, err := s.verifyOverlay(t.Context(), at, nil)
	return v, fail(err)
}

func TestStoreOfBasesAndOverlays(t *testing.T) {
	s := newService(t)
	b := addBase(t, s, "debian", 'a')
	other := addBase(t, s, "", 'b')
	o1 := addOverlay(t, s, "debian", "app", 'x')
	o2 := addOverlay(t, s, "app", "", 'y')
	require.Equal(t, o1.ID, o2.Parent)
	require.Equal(t, 2, o2.Depth)

	for _, ref := range []string{"debian", b.ID, b.ID[:8]} {
		have, err := s.Base(t.Context(), ref)
		require.NoError(t, err)
		require.Equal(t, b.ID, have.ID)
		require.Len(t, have.UsedBy, 2)
	}
	v, err := verified(t, s, o2.ID)
	require.NoError(t, err)
	require.True(t, v.Pages)

	for what, err := range map[string]error{
		"base":    s.DeleteBase(t.Context(), "debian"),
		"overlay": s.DeleteOverlay(t.Context(), "app"),
	} {
		require.Equal(t, api.Conflict, api.CodeOf(err), what)
		require.ErrorContains(t, err, "in use by overlay "+map[string]string{"base": o1.ID, "overlay": o2.ID}[what][:12])
	}
	lk, err := tryLock(s.path("bases", other.ID), unix.LOCK_SH) // as a mount holds it
	require.NoError(t, err)
	require.Equal(t, api.Conflict, api.CodeOf(s.DeleteBase(t.Context(), other.ID)))
	lk.unlock()
	require.NoError(t, s.DeleteBase(t.Context(), other.ID))
	require.NoError(t, s.DeleteOverlay(t.Context(), o2.ID))
	require.NoError(t, s.DeleteOverlay(t.Context(), "app"))
	require.NoError(t, s.DeleteBase(t.Context(), "debian"))
	for _, dir := range []string{"bases", "overlays", "tmp"} {
		left, err := os.ReadDir(s.path(dir))
		require.NoError(t, err)
		require.Empty(t, left, dir)
	}
}

// TestMissingParts: what an overlay needs and the store lacks is named.
func TestMissingParts(t *testing.T) {
	s := newService(t)
	b := addBase(t, s, "", 'a')
	o1 := addOverlay(t, s, b.ID, "", 'x')
	o2 := addOverlay(t, s, o1.ID, "", 'y')
	file := filepath.Join(t.TempDir(), "o2")
	require.NoError(t, copyOut(s.overlayFile(o2.ID), file, func() error { return nil }))

	elsewhere := newService(t)
	_, err := elsewhere.openLaunch(t.Context(), file)
	require.Equal(t, api.NotFound, api.CodeOf(err))
	require.ErrorContains(t, err, "needs its parent, overlay "+o1.ID)
	v, err := verified(t, elsewhere, file)
	require.NoError(t, err)
	require.False(t, v.Pages, "without its parents only its bytes can be checked")
	_, err = elsewhere.importOverlay(t.Context(), location{source: s.overlayFile(o1.ID)}, "", nil)
	require.NoError(t, err)
	_, err = elsewhere.openLaunch(t.Context(), file)
	require.Equal(t, api.NotFound, api.CodeOf(err))
	require.ErrorContains(t, err, "needs base "+b.ID)
}

// TestDamagedInStore: a damaged overlay is shown with its problem, hides nothing, and can go.
func TestDamagedInStore(t *testing.T) {
	s := newService(t)
	b := addBase(t, s, "", 'a')
	good := addOverlay(t, s, b.ID, "good", 'x')
	bad := addOverlay(t, s, b.ID, "bad", 'y')
	require.NoError(t, os.Truncate(s.overlayFile(bad.ID), bad.Size/2))
	list, err := s.Overlays(t.Context())
	require.NoError(t, err)
	require.Len(t, list, 2)
	for _, o := range list {
		require.Equal(t, o.ID == bad.ID, o.Problem != "", o.ID)
	}
	_, err = verified(t, s, "bad")
	require.Equal(t, api.Damaged, api.CodeOf(err))
	require.NoError(t, s.DeleteOverlay(t.Context(), "bad"))
	_, err = verified(t, s, "good")
	require.NoError(t, err)
	require.NotEmpty(t, good.ID)
}

func TestNames(t *testing.T) {
	s := newService(t)
	a := addBase(t, s, "one", 'a')
	addBase(t, s, "", 'b')
	require.Equal(t, api.Conflict, api.CodeOf(s.checkNameFree("one", "other")))
	require.NoError(t, s.checkNameFree("one", a.ID))
	for _, name := range []string{"a", "web-1.2_x", strings.Repeat("a", 62) + "z"} {
		require.NoError(t, s.checkName(name), name)
	}
	for _, name := range []string{"A", "-x", "a/b", "..", "abcdef", "deadbeef", strings.Repeat("x", 64), "a b", "a\n"} {
		require.Equal(t, api.Invalid, api.CodeOf(s.checkName(name)), name)
	}
	_, err := s.Base(t.Context(), a.ID[:5])
	require.Equal(t, api.NotFound, api.CodeOf(err), "five digits are too few")
}

// TestSweep: what a dead process left goes, what a living one works on stays.
func TestSweep(t *testing.T) {
	s := newService(t)
	alive, err := s.newStage(t.Context(), "alive")
	require.NoError(t, err)
	dead, err := s.newStage(t.Context(), "dead")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dead.dir, "half"), []byte("x"), 0o600))
	dead.lock.unlock() // as its process's death does
	require.NoError(t, os.Mkdir(s.instancePath("0123456789ab"), 0o700))
	_, err = Open(t.Context(), s.cfg)
	require.NoError(t, err)
	require.DirExists(t, alive.dir)
	require.NoDirExists(t, dead.dir)
	require.NoDirExists(t, s.instancePath("0123456789ab"), "a folder without a record")
	require.NoError(t, alive.drop())
}

// TestStartKilled: an instance whose starter died is shown as that, not as starting for ever.
func TestStartKilled(t *testing.T) {
	s := newService(t)
	b := addBase(t, s, "", 'a')
	l, err := s.openLaunch(t.Context(), b.ID)
	require.NoError(t, err)
	defer l.close()
	r, lk, err := s.newRecord(t.Context(), newID(), api.Run{Name: "i"}, l, nil)
	require.NoError(t, err)
	in, err := s.Instance(t.Context(), "i")
	require.NoError(t, err)
	require.Equal(t, api.Starting, in.State)
	_, _, err = s.newRecord(t.Context(), newID(), api.Run{Name: "i"}, l, nil)
	require.Equal(t, api.Conflict, api.CodeOf(err))
	lk.unlock()
	in, err = s.Instance(t.Context(), "i")
	require.NoError(t, err)
	require.Equal(t, api.Stopped, in.State)
	require.Contains(t, in.Reason, "was killed")
	require.NoError(t, s.Delete(t.Context(), r.ID, false))
}

// TestDamagedInstance: an instance whose record is lost may run on anything, and is in the way
// of nobody but those who would take that from it.
func TestDamagedInstance(t *testing.T) {
	s := newService(t)
	b := addBase(t, s, "", 'a')
	l, err := s.openLaunch(t.Context(), b.ID)
	require.NoError(t, err)
	var made []*record
	for _, name := range []string{"one", "two", "three"} {
		r, lk, err := s.newRecord(t.Context(), newID(), api.Run{Name: name}, l, nil)
		require.NoError(t, err)
		r.State = api.Running
		require.NoError(t, s.writeRecord(r))
		require.NoError(t, os.Mkdir(s.instancePath(r.ID, "vm"), 0o700))
		lk.unlock()
		made = append(made, r)
	}
	require.NoError(t, l.close())
	torn, empty, bare := made[0].ID, made[1].ID, made[2].ID
	require.NoError(t, os.WriteFile(s.instancePath(torn, "record.json"), []byte("{\"id\": "), 0o600))
	require.NoError(t, os.WriteFile(s.instancePath(empty, "vm", "vm.json"), nil, 0o600)) // by a power failure
	requireUsed := func(want bool) {
		used, err := s.mountUsed("any")
		require.NoError(t, err)
		require.Equal(t, want, used)
		users, err := s.imageUsers("any")
		require.NoError(t, err)
		require.Len(t, users, map[bool]int{true: 1, false: 0}[want])
	}
	requireUsed(true)

	s = reopen(t, s, nil)
	list, err := s.Instances(t.Context(), true)
	require.NoError(t, err)
	require.Len(t, list, 3)
	for id, reason := range map[string]string{torn: "record cannot be read", empty: "mount process", bare: "mount process"} {
		in, err := s.Instance(t.Context(), id)
		require.NoError(t, err)
		require.Equal(t, api.Lost, in.State)
		require.Contains(t, in.Reason, reason)
	}
	requireUsed(true)
	_, err = s.stopInstance(t.Context(), torn)
	require.NoError(t, err)
	require.Equal(t, api.Conflict, api.CodeOf(s.Delete(t.Context(), torn, false)))
	for _, id := range []string{torn[:8], empty, bare} {
		require.NoError(t, s.Delete(t.Context(), id, true))
	}
	requireUsed(false)
	require.NoError(t, s.DeleteBase(t.Context(), b.ID))
}

func TestLocks(t *testing.T) {
	dir := t.TempDir()
	a, err := tryLock(dir, unix.LOCK_EX)
	require.NoError(t, err)
	_, err = tryLock(dir, unix.LOCK_SH)
	require.ErrorIs(t, err, errLocked)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err = waitLock(ctx, dir, unix.LOCK_EX)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	var wg sync.WaitGroup
	wg.Go(func() {
		b, err := waitLock(t.Context(), dir, unix.LOCK_EX)
		if err == nil {
			b.unlock()
		}
	})
	a.unlock()
	wg.Wait()
	require.False(t, isLocked(dir))
	_, err = tryLock(filepath.Join(dir, "no"), unix.LOCK_EX)
	require.ErrorIs(t, err, fs.ErrNotExist)
}

func TestFail(t *testing.T) {
	require.NoError(t, fail(nil))
	for _, tt := range []struct {
		err  error
		want api.Code
	}{
		{api.Errorf(api.TimedOut, "x"), api.TimedOut},
		{context.Canceled, api.Cancelled},
		{context.DeadlineExceeded, api.TimedOut},
		{overlay.ErrFormat, api.Damaged},
		{overlay.ErrParent, api.Conflict},
		{&overlay.BasePageError{}, api.Damaged},
		{&overlay.BaseSpaceError{}, api.Unavailable},
		{vmm.ErrNoQEMU, api.Unavailable},
		{&vmm.MismatchError{Field: "cpu"}, api.Unavailable},
		{vmm.ErrEnded, api.Conflict},
		{unix.ENOSPC, api.Unavailable},
		{fs.ErrPermission, api.Unavailable},
		{fs.ErrNotExist, api.NotFound},
		{errLocked, api.Conflict},
		{errors.New("x"), api.Internal},
	} {
		err := fail(fmt.Errorf("wrapped: %w", tt.err))
		require.Equal(t, tt.want, api.CodeOf(err), tt.err)
		require.ErrorIs(t, err, tt.err)
	}
	require.Equal(t, api.Damaged, api.CodeOf(failAs(api.Damaged, errors.New("x"))))
	require.Equal(t, api.Cancelled, api.CodeOf(failAs(api.Damaged, context.Canceled)))
}

func TestMountpointInStore(t *testing.T) {
	s := newService(t)
	b := addBase(t, s, "", 'a')
	_, err := s.MountSpec(t.Context(), b.ID, s.path("tmp"))
	require.Equal(t, api.Invalid, api.CodeOf(err))
	link := filepath.Join(t.TempDir(), "link")
	require.NoError(t, os.Symlink(s.path("tmp"), link))
	_, err = s.MountSpec(t.Context(), b.ID, link)
	require.Equal(t, api.Invalid, api.CodeOf(err), "through a link too")
	_, err = s.MountSpec(t.Context(), b.ID, t.TempDir())
	require.NoError(t, err)
}
