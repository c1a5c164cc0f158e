package service

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

var (
	stressFor  = flag.Duration("stress", 1500*time.Millisecond, "how long TestStress goes on")
	stressSeed = flag.Uint64("stress-seed", uint64(time.Now().UnixNano()), "what it does")
)

// TestStress does everything that needs no VM at the same time, from two processes' view,
// then requires that nothing is left.
func TestStress(t *testing.T) {
	s := newService(t)
	b := addBase(t, s, "base", 'a')
	id, content := overlayBytes(t, s)
	file := filepath.Join(t.TempDir(), "o")
	require.NoError(t, os.WriteFile(file, content, 0o600))
	s = reopen(t, s, func(c *Config) { c.Daemon, c.MaxOperations = true, 6 })
	other := reopen(t, s, func(c *Config) { c.Daemon, c.MaxOperations = false, 4 })
	before, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	t.Logf("-stress-seed %d", *stressSeed)

	ctx, cancel := context.WithTimeout(t.Context(), *stressFor)
	defer cancel()
	var wg sync.WaitGroup
	for i := range 10 {
		rnd := rand.New(rand.NewPCG(*stressSeed, uint64(i)))
		on := s
		if i%3 == 2 {
			on = other
		}
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := stressOnce(ctx, on, rnd, b.ID, id, file, content); err != nil {
					switch api.CodeOf(err) {
					case api.Conflict, api.NotFound, api.Unavailable, api.Cancelled, api.TimedOut, api.Invalid:
					default:
						t.Errorf("%v", err)
					}
				}
			}
		})
	}
	wg.Wait()
	list, err := s.Operations(t.Context())
	require.NoError(t, err)
	states := map[string]int{}
	for _, op := range list {
		end := awaitEnd(t, s, op.ID)
		states[string(end.Kind+" "+api.Kind(end.State))]++
		if end.State == api.OperationFailed {
			require.NotEqual(t, api.Internal, end.Error.Code, end.Error)
		}
	}
	t.Logf("%v", states)
	require.NoError(t, other.Close(t.Context()))
	require.NoError(t, s.Close(t.Context()))
	again := reopen(t, s, func(c *Config) { c.Daemon = false })
	uploads, err := again.uploads()
	require.NoError(t, err)
	for _, u := range uploads {
		require.NoError(t, again.DeleteUpload(t.Context(), u.ID))
	}
	for _, dir := range []string{"active", "tmp", "uploads", "mounts", "instances"} {
		left, err := os.ReadDir(s.path(dir))
		require.NoError(t, err)
		require.Empty(t, left, dir)
	}
	after, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	require.LessOrEqual(t, len(after), len(before), "descriptors")
}

// stressOnce does one thing.
func stressOnce(ctx context.Context, s *Service, rnd *rand.Rand, base, id, file string, content []byte) error {
	caller := Caller{Name: "stress", Local: rnd.IntN(4) > 0}
	if rnd.IntN(3) == 0 {
		caller.Key = fmt.Sprint(rnd.IntN(50))
	}
	submit := func(req any) error {
		op, err := s.Submit(ctx, caller, req)
		if err == nil && rnd.IntN(3) == 0 {
			_, err = s.CancelOperation(ctx, op.ID)
		}
		return err
	}
	switch rnd.IntN(9) {
	case 0:
		return submit(api.ImportOverlay{Source: file})
	case 1:
		return submit(VerifyOverlay{api.Verify{Ref: id}})
	case 2:
		return submit(VerifyBase{api.Verify{Ref: base}})
	case 3:
		return submit(api.Run{Ref: id})
	case 4:
		return s.DeleteOverlay(ctx, id)
	case 5:
		_, err := s.Collect(ctx)
		return err
	case 6:
		list, err := s.Operations(ctx)
		if err != nil || len(list) == 0 {
			return err
		}
		bound, cancel := context.WithTimeout(ctx, 5*time.Millisecond)
		defer cancel()
		_, err = s.WaitOperation(bound, list[rnd.IntN(len(list))].ID, rnd.Int64N(4))
		return err
	case 7:
		f, _, err := s.OverlayContent(ctx, id)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, f)
		return errors.Join(err, f.Close())
	}
	return stressUpload(ctx, s, rnd, caller, content)
}

// stressUpload sends an overlay in pieces that break off.
func stressUpload(ctx context.Context, s *Service, rnd *rand.Rand, caller Caller, content []byte) error {
	caller.Key = ""
	u, err := s.CreateUpload(ctx, caller, api.CreateUpload{Size: int64(len(content))})
	for err == nil && u.Offset < u.Size {
		n := 1 + rnd.IntN(len(content))
		rest := content[u.Offset:]
		rest = rest[:min(n, len(rest))]
		u, err = s.Append(ctx, u.ID, u.Offset, io.MultiReader(bytes.NewReader(rest), iotest.ErrReader(io.ErrUnexpectedEOF)))
		if api.CodeOf(err) == api.Invalid && rnd.IntN(5) > 0 { // it broke off, as it should
			err = nil
		}
	}
	if err == nil {
		_, err = s.FinishUpload(ctx, caller, u.ID)
	}
	return err
}
