package handoff

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// together returns a world with both sides started.
func together(t *testing.T) *world {
	w := newWorld(nil, mutations{})
	w.startDestination(t.Context())
	w.startSource(t.Context(), true)
	return w
}

// stepTo steps until the source is in a state.
func (w *world) stepTo(t *testing.T, st SourceState) {
	for i := 0; w.source.Status().State != st; i++ {
		require.Less(t, i, 200, "it does not come to %s, it is %+v", st, w.source.Status())
		wait, _ := w.source.Step(t.Context())
		w.now = w.now.Add(wait)
	}
}

func TestRun(t *testing.T) {
	w := together(t)
	require.NoError(t, w.source.Run(t.Context()))
	st := w.source.Status()
	require.Equal(t, SourceDone, st.State)
	require.Equal(t, Closed, st.Theirs)
	require.Len(t, st.Rounds, 2)
	require.Equal(t, int64(2), st.Bytes)
	require.False(t, st.InDoubt)
	require.Empty(t, st.Reasons)
	require.Empty(t, w.bad)
}

// stoppingVM ends a context in one of its verbs.
type stoppingVM struct {
	VM
	final func()
}

func (v stoppingVM) Final(ctx context.Context, n int) (Published, error) {
	v.final()
	if err := ctx.Err(); err != nil {
		return Published{}, err
	}
	return v.VM.Final(ctx, n)
}

func TestRunStoppedBeforeGo(t *testing.T) {
	w := together(t)
	ctx, cancel := context.WithCancel(t.Context())
	w.source.cfg.VM = stoppingVM{fakeVM{w, w.src}, cancel}
	require.ErrorIs(t, w.source.Run(ctx), context.Canceled)
	require.Equal(t, runs, w.here.state, "the guest runs on before Run returns")
	require.False(t, w.published)
	w.startSource(t.Context(), false)
	require.NoError(t, w.source.Run(t.Context()))
	require.Equal(t, SourceCancelled, w.source.Status().State)
	st, err := w.dest.Status(t.Context())
	require.NoError(t, err)
	require.Equal(t, Never, st.State)
	require.Empty(t, w.bad)
}

// peerFunc is a Peer.
type peerFunc func(context.Context, Message) (Answer, error)

func (f peerFunc) Send(ctx context.Context, m Message) (Answer, error) { return f(ctx, m) }

func TestRunStoppedAfterGo(t *testing.T) {
	w := together(t)
	ctx, cancel := context.WithCancel(t.Context())
	link := w.source.cfg.Peer
	w.source.cfg.Peer = peerFunc(func(ctx context.Context, m Message) (Answer, error) {
		if m.Kind == KindGo {
			cancel()
			return Answer{}, errLink
		}
		return link.Send(ctx, m)
	})
	require.ErrorIs(t, w.source.Run(ctx), context.Canceled)
	require.Equal(t, paused, w.here.state)
	require.ErrorIs(t, w.source.Cancel(), ErrTooLate)
	w.startSource(t.Context(), false)
	require.NoError(t, w.source.Run(t.Context()))
	require.Equal(t, SourceDone, w.source.Status().State)
	require.Empty(t, w.bad)
}

// TestStoppedBoundsMessages: a message that hangs does not keep the guest paused.
func TestStoppedBoundsMessages(t *testing.T) {
	w := together(t)
	link := w.source.cfg.Peer
	w.source.cfg.Clock, w.source.cfg.Limits.Stopped = SystemClock{}, 50*time.Millisecond
	w.source.cfg.Peer = peerFunc(func(ctx context.Context, m Message) (Answer, error) {
		if m.Kind == KindPrepare {
			<-ctx.Done()
			return Answer{}, ctx.Err()
		}
		return link.Send(ctx, m)
	})
	require.NoError(t, w.source.Run(t.Context()))
	st := w.source.Status()
	require.Equal(t, SourceCancelled, st.State)
	require.Contains(t, st.Reasons[0].Text, "the guest was paused for 50ms")
	require.Equal(t, runs, w.here.state)
}

// slowVM waits in Round until it is interrupted.
type slowVM struct {
	VM
	waits chan struct{}
}

func (v slowVM) Round(ctx context.Context, _ int) (Published, error) {
	close(v.waits)
	<-ctx.Done()
	return Published{}, ctx.Err()
}

func TestCancelInterrupts(t *testing.T) {
	w := together(t)
	waits, ended := make(chan struct{}), make(chan error)
	w.source.cfg.VM = slowVM{fakeVM{w, w.src}, waits}
	go func() { ended <- w.source.Run(t.Context()) }()
	<-waits
	require.Equal(t, SourceOpen, w.source.Status().State)
	require.NoError(t, w.source.Cancel())
	require.NoError(t, <-ended)
	st := w.source.Status()
	require.Equal(t, SourceCancelled, st.State)
	require.Equal(t, "it was cancelled", st.Reasons[0].Text)
	require.Equal(t, runs, w.here.state)
}

// TestCancelWaits sees that a source that waits for a silent destination can be cancelled.
func TestCancelWaits(t *testing.T) {
	w := together(t)
	w.source.cfg.Clock = SystemClock{}
	w.source.cfg.Limits = Limits{Poll: time.Hour, Backoff: time.Hour}.withDefaults()
	asked, ended := make(chan struct{}, 10), make(chan error)
	w.source.cfg.Peer = peerFunc(func(_ context.Context, m Message) (Answer, error) {
		asked <- struct{}{}
		if m.Kind == KindAbort {
			return Answer{}, ErrForGood
		}
		return Answer{}, errLink
	})
	go func() { ended <- w.source.Run(t.Context()) }()
	<-asked
	require.NoError(t, w.source.Cancel())
	require.NoError(t, <-ended)
	require.Equal(t, SourceCancelled, w.source.Status().State)
}

func TestCancelTooLate(t *testing.T) {
	for _, st := range []SourceState{SourceGoing, SourceMoved, SourceDiscarding, SourceDone} {
		w := together(t)
		w.stepTo(t, st)
		require.ErrorIs(t, w.source.Cancel(), ErrTooLate, st)
		require.NoError(t, w.source.Run(t.Context()))
		require.Equal(t, SourceDone, w.source.Status().State)
		require.Empty(t, w.bad)
	}
	w := together(t)
	w.stepTo(t, SourcePausing)
	require.NoError(t, w.source.Cancel())
	require.NoError(t, w.source.Run(t.Context()))
	require.NoError(t, w.source.Cancel(), "it was cancelled already")
	require.Equal(t, SourceCancelled, w.source.Status().State)
}

func TestRefused(t *testing.T) {
	for _, tc := range []struct {
		name string
		peer peerFunc
		want string
	}{
		{"reasons", func(_ context.Context, m Message) (Answer, error) {
			return Answer{Version: Version, Handoff: m.Handoff, Epoch: m.Epoch, State: Refused, Reasons: []Reason{{"base", "there is no base bbbb", "import it"}}}, nil
		}, "there is no base bbbb"},
		{"token", func(context.Context, Message) (Answer, error) { return Answer{}, ErrForGood }, "asking again"},
		{"silence", func(context.Context, Message) (Answer, error) { return Answer{}, errLink }, "no answer"},
		{"another handoff", func(_ context.Context, m Message) (Answer, error) {
			return Answer{Version: Version, Handoff: "ffffffffffffffff", Epoch: m.Epoch, State: Accepted}, nil
		}, "about handoff"},
		{"another epoch", func(_ context.Context, m Message) (Answer, error) {
			return Answer{Version: Version, Handoff: m.Handoff, Epoch: m.Epoch + 1, State: Accepted}, nil
		}, "epoch 8"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := together(t)
			w.source.cfg.Peer = tc.peer
			require.NoError(t, w.source.Run(t.Context()))
			st := w.source.Status()
			require.Equal(t, SourceCancelled, st.State)
			require.Contains(t, st.Reasons[len(st.Reasons)-1].Text, tc.want)
			require.Equal(t, runs, w.here.state)
		})
	}
	_, err := NewSource(t.Context(), SourceConfig{Handoff: "x", Epoch: 1})
	require.ErrorIs(t, err, ErrWire)
}

// TestPausedStays sees that an instance its user had paused is not let run by a failure.
func TestPausedStays(t *testing.T) {
	w := together(t)
	w.source.rec.Offer.Paused = true
	w.here.state = paused
	w.stepTo(t, SourcePausing)
	require.NoError(t, w.source.Cancel())
	require.NoError(t, w.source.Run(t.Context()))
	require.Equal(t, paused, w.here.state)
}

func TestResolve(t *testing.T) {
	w := together(t)
	require.ErrorIs(t, w.source.Resolve(ResumeHere), ErrNoDoubt)
	w.stepTo(t, SourceGoing)
	require.ErrorIs(t, w.source.Resolve(ResumeHere), ErrNoDoubt, "it is not in doubt yet")
	w.cut = -1
	w.now = w.now.Add(time.Hour)
	require.True(t, w.source.Status().InDoubt)
	require.ErrorContains(t, w.source.Resolve(DiscardHere), "may be the only one")
	require.Error(t, w.source.Resolve("whatever"))
	w.cut = 0
	require.NoError(t, w.source.Resolve(ResumeHere))
	w.stepTo(t, SourceResumed)
	require.Equal(t, runs, w.here.state)
	require.Empty(t, w.bad)

	w = together(t)
	w.stepTo(t, SourceMoved)
	w.cut = -1
	w.now = w.now.Add(time.Hour)
	require.Contains(t, w.source.Status().Loss, "would be given up")
	require.NoError(t, w.source.Resolve(DiscardHere))
	w.stepTo(t, SourceDone)
	require.Equal(t, absent, w.here.state)
}

// TestStale sees that a message of another epoch changes nothing.
func TestStale(t *testing.T) {
	for _, st := range []SourceState{SourcePausing, SourceGoing, SourceMoved} {
		w := together(t)
		w.stepTo(t, st)
		before := string(w.disk["destination"])
		for _, k := range kinds {
			for _, epoch := range []uint64{1, 6, 8, 100} {
				if k == KindSupersede && epoch > 7 {
					continue
				}
				m := Message{Version: Version, Handoff: sampleHandoff, Epoch: epoch, Kind: k}
				switch k {
				case KindOffer:
					m.Offer = &sampleOffer
				case KindRound, KindPrepare:
					m.Round, m.Chain = 9, fakeChain(9)
				}
				_, err := w.dest.Handle(t.Context(), m)
				require.ErrorIs(t, err, ErrStale, "%s of epoch %d", k, epoch)
			}
		}
		_, err := w.dest.Handle(t.Context(), Message{Version: Version, Handoff: "ffffffffffffffff", Epoch: 7, Kind: KindGo})
		require.ErrorIs(t, err, ErrWire)
		require.Equal(t, before, string(w.disk["destination"]))
		require.NoError(t, w.source.Run(t.Context()))
		require.Empty(t, w.bad)
	}
}

// TestUnknownProvesNothing sees that a destination without a record changes nothing after go.
func TestUnknownProvesNothing(t *testing.T) {
	w := together(t)
	w.stepTo(t, SourceGoing)
	delete(w.disk, "destination")
	w.startDestination(t.Context())
	for range 5 {
		w.source.Step(t.Context())
	}
	st := w.source.Status()
	require.Equal(t, SourceGoing, st.State)
	require.True(t, st.InDoubt)
	require.Equal(t, paused, w.here.state)
	require.True(t, w.published)
}

func TestDamagedRecord(t *testing.T) {
	for _, text := range []string{"", "{", `{"version":1}{}`, `{"version":1,"force":true}`, `{"version":2}`} {
		w := newWorld(nil, mutations{})
		w.disk["source"], w.disk["destination"] = []byte(text), []byte(text)
		_, err := OpenSource(t.Context(), SourceConfig{Journal: memJournal{w, w.src}})
		require.Error(t, err, text)
		require.False(t, errors.Is(err, ErrNoRecord))
		_, err = OpenDestination(t.Context(), DestinationConfig{Journal: memJournal{w, w.dst}})
		require.Error(t, err, text)
	}
	w := newWorld(nil, mutations{})
	_, err := OpenSource(t.Context(), SourceConfig{Journal: memJournal{w, w.src}})
	require.ErrorIs(t, err, ErrNoRecord)
}

// slowSite waits in Prepare until it is interrupted.
type slowSite struct {
	Site
	waits chan struct{}
}

func (s slowSite) Prepare(ctx context.Context, _ Offer, _ []Overlay) error {
	close(s.waits)
	<-ctx.Done()
	return ctx.Err()
}

// TestAbortCutsPrepare: a destination that prepares does not keep an abort of its source
// waiting, nor heed one of another epoch.
func TestAbortCutsPrepare(t *testing.T) {
	w := together(t)
	w.stepTo(t, SourcePausing)
	for w.source.phase != preparing {
		w.source.Step(t.Context())
	}
	waits, answers := make(chan struct{}), make(chan Answer)
	w.dest.cfg.Site = slowSite{w.dest.cfg.Site, waits}
	prepare := w.source.message(KindPrepare)
	go func() {
		a, _ := w.dest.Handle(t.Context(), prepare)
		answers <- a
	}()
	<-waits
	abort := w.source.message(KindAbort)
	stale := abort
	stale.Epoch++
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	_, err := w.dest.Handle(short, stale)
	require.ErrorIs(t, err, context.DeadlineExceeded, "another epoch waits for its turn")
	a, err := w.dest.Handle(t.Context(), abort)
	require.NoError(t, err)
	require.Equal(t, Never, a.State)
	require.Equal(t, Never, (<-answers).State)
}
