package service

import (
	"testing"
	"time"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

// TestForgetOperation: only what has ended is forgotten, and then it is.
func TestForgetOperation(t *testing.T) {
	s := newService(t)
	gate := make(chan struct{})
	op := gated(t, s, Caller{}, gate)
	require.Equal(t, api.Conflict, api.CodeOf(s.ForgetOperation(t.Context(), op.ID)))
	close(gate)
	awaitEnd(t, s, op.ID)
	require.NoError(t, s.ForgetOperation(t.Context(), op.ID))
	_, err := reopen(t, s, nil).Operation(t.Context(), op.ID)
	require.Equal(t, api.NotFound, api.CodeOf(err))
	require.Equal(t, api.NotFound, api.CodeOf(s.ForgetOperation(t.Context(), "000000000000")))
}

// TestRunInsistsOnBase: an overlay of another base is refused by name, as is a base that is not
// there.
func TestRunInsistsOnBase(t *testing.T) {
	s := newService(t)
	one, two := addBase(t, s, "one", 'a'), addBase(t, s, "two", 'b')
	o := addOverlay(t, s, one.ID, "app", 'x')
	for base, code := range map[string]api.Code{"two": api.Invalid, two.ID: api.Invalid, "three": api.NotFound} {
		_, err := s.newSynthesis(t.Context(), Caller{}, api.Run{Ref: o.ID, Base: base}, &timeline{start: time.Now()})
		require.Equal(t, code, api.CodeOf(err), "%v", err)
		require.ErrorContains(t, err, "base")
	}
	l, err := s.openLaunch(t.Context(), o.ID)
	require.NoError(t, err)
	require.NoError(t, s.checkBase(&synthesis{req: api.Run{Base: "one"}, image: l}))
	require.NoError(t, l.close())
}

// TestCaptureRefused: what cannot be captured is refused before anything begins.
func TestCaptureRefused(t *testing.T) {
	s := newService(t)
	addBase(t, s, "taken", 'a')
	for name, code := range map[string]api.Code{"taken": api.Conflict, "No Name": api.Invalid, "free": api.NotFound} {
		_, err := s.Submit(t.Context(), Caller{}, api.CaptureBase{Instance: "none", Name: name})
		require.Equal(t, code, api.CodeOf(err), "%v", err)
	}
}
