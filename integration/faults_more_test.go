package integration

import (
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"
	"cloudlet/handoff"
	"cloudlet/integration/cloudlets"

	"github.com/stretchr/testify/require"
)

// diskSize is that of a cloudlet whose disk is filled: the base and some overlays fit.
const diskSize = 1 << 30

// TestFaultsDisk fills the destination's disk at the moments of a handoff.
func TestFaultsDisk(t *testing.T) {
	if !everyFault {
		return // a part of make test-faults
	}
	l := newFaultLab(t, cloudlets.Options{Disk: diskSize})
	for _, cell := range []struct {
		which  string
		moment moment
		want   outcome
	}{
		{"destination", inRound, staysSoon}, {"destination", paused, staysSoon}, {"destination", prepared, resolves}, {"destination", goUnsent, resolves},
		{"destination", goUnanswered, waits}, {"destination", running, waits}, {"destination", complete, continues}, {"destination", discarded, continues},
		{"source", inRound, givenUp}, {"source", prepared, waits}, {"source", goUnanswered, waits}, {"source", complete, waits},
	} {
		t.Run("the "+cell.which+"'s disk is full, "+string(cell.moment), func(t *testing.T) {
			r := l.begin(t)
			goOn := r.reach(cell.moment, r.handOff)
			full := l.b
			if cell.which == "source" {
				full = l.a
			}
			free := r.fillDisk(full)
			t.Cleanup(free) // before the end of r
			r.say("the disk is full")
			goOn(false)
			cell.want(r, free)
			r.say("as it must be")
		})
	}
	t.Run("the destination's disk is full, before the offer", func(t *testing.T) {
		r := l.begin(t)
		free := r.fillDisk(l.b)
		t.Cleanup(free)
		r.handOff(0)
		r.requireRefused("disk")
	})
}

// staysSoon: it is seen at once that it cannot be.
func staysSoon(r *faultRun, mend func()) {
	stays(r, mend)
	require.Less(r.t, r.client.Gap(r.began, time.Now()).Length(), stoppedBound/3)
	require.Contains(r.t, fmt.Sprint(r.status(r.a).Reasons), "no space left")
}

// givenUp: the source cannot write the last overlay. The guest, which its own writes may have
// stopped, runs on there.
func givenUp(r *faultRun, mend func()) {
	r.until("the handoff is given up", func() bool {
		st := r.status(r.a).State
		return st == string(handoff.SourceAborting) || st == string(handoff.SourceCancelled)
	})
	require.Contains(r.t, fmt.Sprint(r.status(r.a).Reasons), "no space left")
	mend()
	r.until("the guest can be continued", func() bool {
		if r.state(r.a, r.in.ID) == api.Stalled {
			_, err := r.a.Client.Act(r.t.Context(), r.in.ID, api.ActionContinue)
			require.True(r.t, err == nil || api.CodeOf(err) == api.Conflict, "%v", err) // the handoff has not ended yet
		}
		return r.state(r.a, r.in.ID) == api.Running
	})
	stays(r, func() {})
}

// waits: it goes, for which there is room; it cannot end while the disk is full, and does so
// afterwards. The guest may have been stopped by its own writes.
func waits(r *faultRun, mend func()) {
	r.between.HoldTails(false)
	r.until("it says what it is stuck at", func() bool { return r.status(r.a).Stuck != "" || r.status(r.b).Stuck != "" })
	require.Contains(r.t, []handoff.SourceState{handoff.SourceGoing, handoff.SourceMoved, handoff.SourceDiscarding}, handoff.SourceState(r.status(r.a).State))
	continues(r, mend)
}

// continues: it moves, and the guest that its own writes have stopped is continued.
func continues(r *faultRun, mend func()) {
	mend()
	require.Equal(r.t, api.OperationDone, r.ended().State)
	if r.state(r.b, r.there()) == api.Stalled {
		_, err := r.b.Client.Act(r.t.Context(), r.there(), api.ActionContinue)
		require.NoError(r.t, err)
	}
	r.requireMoved()
}

// requireRefused requires that the handoff ends before it has begun, for a reason of a name.
func (r *faultRun) requireRefused(words ...string) {
	r.t.Helper()
	op := r.ended()
	require.Equal(r.t, api.OperationFailed, op.State)
	for _, w := range words {
		require.Contains(r.t, op.Error.Error(), w)
	}
	require.Equal(r.t, api.Running, r.state(r.a, r.in.ID))
	r.requireAnswers(r.client)
	for _, c := range r.Cloudlets[1:] {
		r.requireNothingAt(c)
	}
	require.Empty(r.t, r.files(r.a))
	in, err := r.a.Client.Instance(r.t.Context(), r.in.ID)
	require.NoError(r.t, err)
	require.Empty(r.t, in.Handoff)
}

// to begins a handoff to somewhere else than the destination.
func (r *faultRun) to(url, token string) {
	r.t.Helper()
	op, err := r.a.Client.HandOff(r.t.Context(), api.HandOff{Instance: r.in.ID, To: url, Token: token})
	require.NoError(r.t, err)
	r.follow(op.Target.ID, op.ID)
}

// TestFaultsRefused asks for handoffs that cannot be: each is refused by name, and the guest
// runs on. It then moves all the same, and is an instance like any other.
func TestFaultsRefused(t *testing.T) {
	l := newFaultLab(t, cloudlets.Options{Count: 3})
	c := l.Cloudlets[2]
	bases, err := c.Client.Bases(t.Context())
	require.NoError(t, err)
	for _, b := range bases {
		require.NoError(t, c.Client.DeleteBase(t.Context(), b.ID))
	}
	// other answers as a cloudlet of another version would.
	other := func(code int, kind, text string) string {
		url, end, err := l.a.Serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			var m handoff.Message
			body, err := io.ReadAll(r.Body)
			if err == nil {
				m, err = handoff.ParseMessage(body)
			}
			if err != nil {
				panic(http.ErrAbortHandler)
			}
			w.Header().Set("Content-Type", kind)
			w.WriteHeader(code)
			fmt.Fprintf(w, text, m.Handoff, m.Epoch)
		}))
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, end()) })
		return url
	}
	older := other(http.StatusBadRequest, "application/problem+json", `{"code":"invalid","status":400,"detail":"read message: version 1, this is 2: update the older of the two cloudlets (%s %d)"}`)
	newer := other(http.StatusOK, "application/json", `{"version":2,"handoff":%q,"epoch":%d,"state":"accepted","missing":0}`)
	r := l.begin(t)
	for _, tc := range []struct {
		name, url, token string
		words            []string
	}{
		{"to itself", l.a.URL, l.a.Peer, []string{"cloudlet: the instance is at this cloudlet already"}},
		{"without the base", c.URL, c.Peer, []string{"base: base " + r.in.Base + " is not here"}},
		{"with a wrong token", l.b.URL, "wrong", []string{"401"}},
		{"of another version, which knows it", older, "", []string{"version 1, this is 2", "update the older"}},
		{"of another version, which does not", newer, "", []string{"version 2, this is 1", "update the older"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			now := *r
			now.t = t
			now.to(tc.url, tc.token)
			defer now.requireOnce()
			now.requireRefused(tc.words...)
		})
	}

	t.Run("two at once", func(t *testing.T) {
		now := *r
		now.t = t
		goOn := now.reach(inRound, now.handOff)
		second, err := l.a.Client.HandOff(t.Context(), api.HandOff{Instance: r.in.ID, To: c.URL, Token: c.Peer})
		if err == nil {
			second, err = l.a.Client.Wait(t.Context(), second, nil)
		}
		if err == nil {
			_, err = client.Result[api.HandedOff](second)
		}
		require.Equal(t, api.Conflict, api.CodeOf(err), "%v", err)
		require.ErrorContains(t, err, "busy")
		for _, change := range []api.Action{api.ActionPause, api.ActionReset, api.ActionStop} {
			_, err := l.a.Client.Act(t.Context(), r.in.ID, change)
			require.Equal(t, api.Conflict, api.CodeOf(err), "%s: %v", change, err)
		}
		require.Equal(t, api.Conflict, api.CodeOf(l.a.Client.DeleteInstance(t.Context(), r.in.ID, true)))
		goOn(false)
		moves(&now, func() {})
		*r = now
	})
	r.t = t
	if !everyFault {
		return // TestHandoff has most of the rest; a reset takes a boot
	}
	t.Run("afterwards", func(t *testing.T) {
		now := *r
		now.t = t
		ctx := t.Context()
		var o api.CreatedOverlay
		require.NoError(t, l.b.CLI(ctx, &o, "overlay", "create", now.there()))
		_, err := l.b.Client.Act(ctx, now.there(), api.ActionReset)
		require.NoError(t, err)
		there, err := l.b.Client.Instance(ctx, now.there())
		require.NoError(t, err)
		now.until("the guest is there again", func() bool {
			var first struct{ Token string }
			return l.Ask(ctx, &first, http.MethodGet, l.b.Address(there), "/") == nil && first.Token != now.token
		})
		back, err := l.b.HandOff(ctx, there.ID, l.a, 0, nil)
		require.NoError(t, err)
		here, err := l.a.Client.Instance(ctx, back.Instance)
		require.NoError(t, err)
		require.NoError(t, l.Ask(ctx, nil, http.MethodGet, l.a.Address(here), "/healthz"))
		require.Greater(t, here.Epoch, there.Epoch)
		require.NoError(t, l.b.Client.DeleteInstance(ctx, there.ID, false))
		require.NoError(t, l.b.Client.DeleteOverlay(ctx, o.ID))
		require.NoError(t, l.a.Client.DeleteInstance(ctx, here.ID, true))
		now.requireNothingAt(l.b)
		now.requireNothingAt(l.a)
	})
}
