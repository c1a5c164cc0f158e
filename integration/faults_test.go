package integration

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/handoff"
	"cloudlet/integration/cloudlets"

	"github.com/stretchr/testify/require"
)

var onlyFaults = flag.String("faults", "", "regular expression of the faults, with their moments, that TestFaults makes; all of them if empty")

// A moment of a handoff, in their order.
type moment string

const (
	inRound      moment = "in a round"              // the guest runs, the first round is published and not told
	paused       moment = "paused"                  // the last overlay is published; prepare is not sent
	prepared     moment = "prepared"                // the destination has the VM, paused; the source has not heard it
	goUnsent     moment = "go on record"            // and not sent
	goUnanswered moment = "go unanswered"           // the guest runs at the destination; that is lost on its way
	running      moment = "running"                 // the source knows it; pages are missing at the destination
	complete     moment = "complete"                // the source has not heard it
	discarded    moment = "discarded at the source" // the destination has not heard it
)

var faultMoments = []moment{inRound, paused, prepared, goUnsent, goUnanswered, running, complete, discarded}

// reach begins the handoff by start and returns when it is at the moment, and with what lets
// it go on.
func (r *faultRun) reach(m moment, start func(rounds int)) (goOn func(lose bool)) {
	r.t.Helper()
	rounds, at := -1, func(cloudlets.Passing) bool { return false }
	switch m {
	case inRound:
		rounds, at = 0, messageOf(handoff.KindRound)
	case paused:
		rounds, at = 0, messageOf(handoff.KindPrepare)
	case prepared:
		at = answerOf(handoff.KindPrepare, handoff.Prepared)
	case goUnsent:
		at = messageOf(handoff.KindGo)
	case goUnanswered:
		at = answerOf(handoff.KindGo, handoff.Running)
	case complete:
		at = func(p cloudlets.Passing) bool { return p.Answer != nil && p.Answer.State == handoff.Complete }
	case discarded:
		at = messageOf(handoff.KindEnd)
	}
	late := m == goUnanswered || m == running
	prepare := func(p cloudlets.Passing) bool { return late && messageOf(handoff.KindPrepare)(p) }
	after := m == goUnanswered || m == running || m == complete || m == discarded
	commit := func(p cloudlets.Passing) bool { return after && messageOf(handoff.KindGo)(p) }
	last, going, held := r.stop(prepare), r.stop(commit), r.stop(at)
	start(rounds)
	if late {
		r.await(last)
		r.between.HoldTails(true) // the last overlay's only: this is the first that is held
		last.Release(false)
	}
	if after {
		r.await(going)
		r.told = r.client.Report().Acknowledged
		going.Release(false)
	}
	if m == running {
		r.until("it is known to run there", func() bool {
			h := r.status(r.a)
			return h.State == string(handoff.SourceMoved) && h.Theirs == string(handoff.Running)
		})
		require.Positive(r.t, r.status(r.b).Missing)
		return func(bool) {}
	}
	r.await(held)
	if m == goUnsent {
		r.told = r.client.Report().Acknowledged
	}
	return func(lose bool) { held.Release(lose || m == goUnanswered) }
}

// A fault is made at a moment; then what is held goes on, or is lost; then it is mended.
type fault struct {
	name string
	do   func(r *faultRun)
	mend func(r *faultRun) // nil: there is nothing to mend
	lose bool
}

func killDaemon(sig syscall.Signal, which string) fault {
	f := fault{name: "kill -9 of the " + which + "'s daemon"}
	if sig == syscall.SIGTERM {
		f.name = "SIGTERM of the " + which + "'s daemon"
	}
	if which == "source" {
		f.do = func(r *faultRun) { require.NoError(r.t, r.a.End(sig)) }
		f.mend = func(r *faultRun) { r.startA(r.t) }
	} else {
		f.do = func(r *faultRun) { require.NoError(r.t, r.b.End(sig)) }
		f.mend = func(r *faultRun) { require.NoError(r.t, r.b.Start(r.t.Context())) }
	}
	return f
}

func killProcess(what, which string) fault {
	return fault{name: "kill -9 of the " + which + "'s " + what, do: func(r *faultRun) {
		c := r.a
		if which == "destination" {
			c = r.b
		}
		kill(r.t, r.process(c, strings.ToLower(what)))
	}}
}

func cutLink(r *faultRun)  { require.NoError(r.t, r.Cut(r.a, r.b, true)) }
func mendLink(r *faultRun) { require.NoError(r.t, r.Cut(r.a, r.b, false)) }

var (
	killSource      = killDaemon(syscall.SIGKILL, "source")
	killDestination = killDaemon(syscall.SIGKILL, "destination")
	termSource      = killDaemon(syscall.SIGTERM, "source")
	termDestination = killDaemon(syscall.SIGTERM, "destination")
	shortCut        = fault{name: "link cut for 5 s", lose: true, do: cutLink, mend: func(r *faultRun) {
		time.Sleep(5 * time.Second) // the fault's length
		mendLink(r)
	}}
	longCut = fault{name: "link cut", lose: true, do: cutLink, mend: mendLink}
)

// An outcome is what must come of a fault. It mends it when that is due.
type outcome func(r *faultRun, mend func())

// moves: the instance runs at the destination, whole, and is nowhere else.
func moves(r *faultRun, mend func()) {
	mend()
	r.between.HoldTails(false)
	op := r.ended()
	r.say("the operation has ended")
	require.Equal(r.t, api.OperationDone, op.State, "%+v", op.Error)
	r.requireMoved()
}

func (r *faultRun) requireMoved() {
	r.t.Helper()
	left, err := r.a.Client.Instance(r.t.Context(), r.in.ID)
	require.NoError(r.t, err)
	require.Contains(r.t, []api.State{api.Stopped, api.Lost}, left.State, "lost if its mount was killed")
	require.NotNil(r.t, left.Moved)
	require.Equal(r.t, r.there(), left.Moved.Instance)
	r.requireAnswers(r.client)
	there, err := r.b.Client.Instance(r.t.Context(), r.there())
	require.NoError(r.t, err)
	require.Equal(r.t, api.Running, there.State, there.Reason)
	r.requireOnce()
	r.requireWhole(r.b.Address(there))
	r.until("the destination's part ends", func() bool {
		st := r.status(r.b).State
		return st == string(handoff.Complete) || st == string(handoff.Closed)
	})
	r.requireWithdrawn()
	require.NoError(r.t, r.a.Client.DeleteInstance(r.t.Context(), r.in.ID, false))
	r.requireNothingAt(r.a)
}

// stoppedBound is how long a guest may stand still before go and run on then: the 30 s that a
// handoff allows, and what a busy machine adds.
const stoppedBound = 45 * time.Second

// stays: the guest runs on at the source, and nothing is left at the destination.
func stays(r *faultRun, mend func()) {
	if _, err := r.a.Client.Instances(r.t.Context(), false); err != nil {
		mend() // nobody is there to be asked
		mend = func() {}
	}
	r.until("the guest runs on", func() bool { return r.state(r.a, r.in.ID) == api.Running })
	r.requireAnswers(r.client)
	gap := r.client.Gap(r.began, time.Now())
	r.say(fmt.Sprintf("the guest runs on, after a silence of %v", gap.Length().Round(time.Millisecond)))
	require.Less(r.t, gap.Length(), stoppedBound)
	mend()
	op := r.ended()
	r.say("the operation has ended")
	require.Contains(r.t, []api.OperationState{api.OperationFailed, api.OperationCancelled}, op.State)
	h := r.status(r.a)
	require.Equal(r.t, string(handoff.SourceCancelled), h.State)
	require.NotEmpty(r.t, h.Reasons)
	r.requireAnswers(r.client)
	r.requireNothingAt(r.b)
	r.requireWithdrawn()
	r.requireOnce()
	r.requireWhole(r.at)
}

// gone: the fault ended the VM, as it would have without a handoff; that is said.
func gone(r *faultRun, mend func()) {
	mend()
	op := r.ended()
	r.say("the operation has ended")
	require.Equal(r.t, api.OperationFailed, op.State)
	in, err := r.a.Client.Instance(r.t.Context(), r.in.ID)
	require.NoError(r.t, err)
	require.Contains(r.t, []api.State{api.Stopped, api.Lost}, in.State)
	require.NotEmpty(r.t, in.Reason)
	r.requireNothingAt(r.b)
	r.requireWithdrawn()
}

// died: the handoff is complete, and the VM ends later: an ordinary instance that has ended.
func died(r *faultRun, mend func()) {
	mend()
	require.Equal(r.t, api.OperationDone, r.ended().State)
	in, err := r.b.Client.Instance(r.t.Context(), r.there())
	require.NoError(r.t, err)
	require.Contains(r.t, []api.State{api.Stopped, api.Lost}, in.State)
	require.NotEmpty(r.t, in.Reason)
	r.requireWithdrawn()
}

// doubt waits until the source is in doubt: the guest is paused there, and the loss is told.
func (r *faultRun) doubt() (h api.Handoff) {
	r.t.Helper()
	r.until("the source is in doubt", func() bool { h = r.status(r.a); return h.InDoubt })
	require.NotEmpty(r.t, h.Loss)
	in, err := r.a.Client.Instance(r.t.Context(), r.in.ID)
	require.NoError(r.t, err)
	require.Equal(r.t, api.Paused, in.State, in.Reason)
	require.Contains(r.t, in.Reason, "in doubt")
	require.False(r.t, r.answers(r.t.Context(), r.at), "in doubt the guest runs at the source")
	return h
}

// resolves: in doubt until the fault is mended, then the guest runs at the destination.
func resolves(r *faultRun, mend func()) {
	r.doubt()
	moves(r, mend)
}

// resumes: the operator of a source in doubt lets the guest run there, and what the
// destination has is not run any more. state is what that says then.
func resumes(state handoff.State) outcome {
	return func(r *faultRun, mend func()) {
		h := r.doubt()
		r.requireOnce() // until now; from here on the operator has decided
		r.client.Stop()
		var said struct{ Loss string }
		require.NoError(r.t, r.a.CLI(r.t.Context(), &said, "handoff", r.in.ID, "--resolve", "resume-here"))
		require.Equal(r.t, h.Loss, said.Loss)
		r.until("the guest runs on at the source", func() bool { return r.state(r.a, r.in.ID) == api.Running })
		r.requireKept()
		r.requireOrdinary(h.Epoch)
		mend()
		r.between.HoldTails(false)
		op := r.ended()
		r.say("the operation has ended")
		require.Equal(r.t, api.OperationFailed, op.State)
		require.Contains(r.t, op.Error.Detail, "an operator has let instance")
		require.Equal(r.t, string(handoff.SourceResumed), r.status(r.a).State)
		r.until("the destination knows it", func() bool { return r.status(r.b).State == string(state) })
		require.False(r.t, r.answers(r.t.Context(), r.addressThere()), "a superseded guest runs")
		switch state {
		case handoff.Superseded:
			r.until("the superseded VM is paused", func() bool {
				st := r.state(r.b, r.there())
				return st != api.Running && st != ""
			})
			require.NotEmpty(r.t, r.status(r.b).Reasons)
		case handoff.Never:
			r.requireNothingAt(r.b)
		}
		r.requireWithdrawn()
		_, err := r.Verify(r.t.Context(), r.at, r.token)
		require.NoError(r.t, err)
	}
}

// requireOrdinary requires that an instance that an operator has let run on is an ordinary
// one, whether the destination can be told yet or not. epoch is that of the handoff.
func (r *faultRun) requireOrdinary(epoch uint64) {
	r.t.Helper()
	var in api.Instance
	r.until("the instance is an ordinary one", func() (ok bool) {
		var err error
		in, err = r.a.Client.Instance(r.t.Context(), r.in.ID)
		require.NoError(r.t, err)
		return in.Handoff == ""
	})
	require.Greater(r.t, in.Epoch, epoch, "the right to run it is newer than the one that was given away")
	for _, a := range []api.Action{api.ActionPause, api.ActionContinue} {
		_, err := r.a.Client.Act(r.t.Context(), r.in.ID, a)
		require.NoError(r.t, err)
	}
	var o api.CreatedOverlay
	require.NoError(r.t, r.a.CLI(r.t.Context(), &o, "overlay", "create", r.in.ID, "--strategy", "fast"))
	require.NoError(r.t, r.a.Client.DeleteOverlay(r.t.Context(), o.ID))
	require.Contains(r.t, []handoff.SourceState{handoff.SourceSuperseding, handoff.SourceResumed}, handoff.SourceState(r.status(r.a).State))
}

// givesUp: the source cannot reach the destination for as long as its patience goes.
func givesUp(r *faultRun, mend func()) {
	r.until("the handoff is given up", func() bool { return r.status(r.a).State == string(handoff.SourceAborting) })
	stays(r, mend)
}

// expires: the source cannot be heard, and the destination waits for it no longer than its
// lease.
func expires(r *faultRun, mend func()) {
	r.until("the lease is over", func() bool { return r.status(r.b).State == string(handoff.Never) })
	r.requireNothingAt(r.b)
	stays(r, mend)
}

// requireKept requires that all that was told until go is at the source, in order, and that it
// works.
func (r *faultRun) requireKept() {
	r.t.Helper()
	var j struct{ Memory, File struct{ Records []int64 } }
	require.NoError(r.t, r.Ask(r.t.Context(), &j, http.MethodGet, r.at, "/journal?client=c0"))
	require.GreaterOrEqual(r.t, int64(len(j.File.Records)), r.told)
	require.Equal(r.t, j.File.Records, j.Memory.Records)
	for i, n := range j.File.Records {
		require.Equal(r.t, int64(i+1), n)
	}
	again := r.work("again", func(context.Context) (string, error) { return r.at, nil })
	r.requireAnswers(again)
	again.Stop()
	require.NoError(r.t, again.Verify(r.t.Context(), r.at))
}

// faultCell is one of the table.
type faultCell struct {
	fault  fault
	moment moment
	want   outcome
	sample bool // in make test, too
}

func (c faultCell) name() string { return c.fault.name + ", " + string(c.moment) }

// faultCells is the table: what must come of each fault at each moment.
func faultCells() (out []faultCell) {
	row := func(f fault, want map[moment]outcome, samples ...moment) {
		for _, m := range faultMoments {
			if want[m] == nil {
				continue // there is nothing that the fault could hit
			}
			c := faultCell{fault: f, moment: m, want: want[m]}
			for _, s := range samples {
				c.sample = c.sample || s == m
			}
			out = append(out, c)
		}
	}
	same := func(want outcome, changes map[moment]outcome) map[moment]outcome {
		all := map[moment]outcome{}
		for _, m := range faultMoments {
			all[m] = want
		}
		for m, o := range changes {
			all[m] = o
		}
		return all
	}
	beforeGo := map[moment]outcome{inRound: stays, paused: stays, prepared: stays}
	row(killSource, same(moves, beforeGo), prepared, goUnsent)
	row(termSource, same(moves, beforeGo))
	row(killDestination, same(moves, nil), goUnanswered)
	row(termDestination, same(moves, nil))
	row(killProcess("QEMU", "source"), same(moves, map[moment]outcome{inRound: gone, discarded: nil}))
	row(killProcess("mount", "source"), same(moves, map[moment]outcome{inRound: gone, discarded: nil}))
	lost := map[moment]outcome{
		prepared: moves, goUnsent: moves, goUnanswered: resumes(handoff.Superseded), running: resumes(handoff.Superseded), complete: died, discarded: died,
	}
	row(killProcess("QEMU", "destination"), lost, running)
	row(killProcess("mount", "destination"), lost)
	row(shortCut, same(moves, nil), prepared)
	row(longCut, map[moment]outcome{
		inRound: givesUp, paused: stays, prepared: stays, goUnsent: resumes(handoff.Never), goUnanswered: resumes(handoff.Superseded),
		running: resumes(handoff.Superseded), complete: resumes(handoff.Superseded),
	})
	apart := longCut
	apart.name = "link cut until the lease is over"
	row(apart, map[moment]outcome{inRound: expires, prepared: expires})
	long := longCut
	long.name = "link cut until it is in doubt"
	row(long, map[moment]outcome{goUnsent: resolves, goUnanswered: resolves, running: resolves})
	return out
}

// TestFaults brings about each fault at each moment of a handoff, with real processes and a
// client at work.
func TestFaults(t *testing.T) {
	l := newFaultLab(t, cloudlets.Options{})
	only := regexp.MustCompile(*onlyFaults)
	for _, cell := range faultCells() {
		if !cell.sample && !everyFault || !only.MatchString(cell.name()) {
			continue
		}
		ok := t.Run(cell.name(), func(t *testing.T) {
			r := l.begin(t)
			goOn := r.reach(cell.moment, r.handOff)
			cell.fault.do(r)
			r.say("the fault is made")
			goOn(cell.fault.lose)
			cell.want(r, func() {
				if cell.fault.mend != nil {
					cell.fault.mend(r)
					r.say("mended")
				}
			})
			r.say("as it must be")
		})
		if !ok {
			l.again(t)
		}
	}
}

// again starts what a cell that failed has left ended.
func (l *faultLab) again(t *testing.T) {
	t.Helper()
	if _, err := l.a.Client.Instances(t.Context(), false); err != nil {
		require.NoError(t, l.a.End(syscall.SIGKILL))
		l.startA(t)
	}
	if _, err := l.b.Client.Instances(t.Context(), false); err != nil {
		require.NoError(t, l.b.End(syscall.SIGKILL))
		require.NoError(t, l.b.Start(t.Context()))
	}
}

// TestFaultsCommand ends the command of a handoff by Ctrl-C: before go the guest runs on, later
// it goes all the same.
func TestFaultsCommand(t *testing.T) {
	if !everyFault {
		t.Log("a sample: before go only")
	}
	l := newFaultLab(t, cloudlets.Options{})
	tokens := filepath.Join(t.TempDir(), "token")
	require.NoError(t, os.WriteFile(tokens, []byte(l.b.Peer+"\n"), 0o600))
	for _, cell := range []struct {
		moment moment
		want   outcome
		words  string
	}{
		{inRound, stays, "was cancelled: the guest runs on here"}, {paused, stays, "was cancelled: the guest runs on here"}, {prepared, stays, "was cancelled: the guest runs on here"},
		{goUnsent, moves, "too late to cancel"}, {goUnanswered, moves, "too late to cancel"}, {running, moves, "too late to cancel"},
	} {
		if cell.moment != paused && !everyFault {
			continue
		}
		t.Run("Ctrl-C "+string(cell.moment), func(t *testing.T) {
			r := l.begin(t)
			var stderr bytes.Buffer
			cmd := exec.Command(shared.bin, "--state", l.a.State, "handoff", r.in.ID, "--to", l.between.To, "--to-token-file", tokens, "--rounds", "4")
			cmd.Stderr = &stderr
			goOn := r.reach(cell.moment, func(rounds int) {
				if rounds < 0 {
					cmd.Args[len(cmd.Args)-1] = "0"
				}
				require.NoError(t, cmd.Start())
				r.until("the handoff begins", func() bool {
					h, err := r.a.Client.Handoff(t.Context(), r.in.ID)
					if err == nil {
						r.follow(h.ID, h.Operation)
					}
					return err == nil
				})
			})
			require.NoError(t, cmd.Process.Signal(os.Interrupt))
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			if cell.words == "too late to cancel" {
				require.Error(t, <-ended) // while it is held
				goOn(false)
			} else {
				r.until("it is cancelled", func() bool {
					st := r.status(l.a).State
					return st == string(handoff.SourceAborting) || st == string(handoff.SourceCancelled)
				})
				goOn(false)
				require.Error(t, <-ended)
			}
			require.Equal(t, 130, cmd.ProcessState.ExitCode(), stderr.String())
			require.Contains(t, stderr.String(), cell.words)
			cell.want(r, func() {})
		})
	}
}
