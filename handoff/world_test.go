package handoff

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// fault is one thing that goes wrong at one point of a run.
type fault uint8

const (
	none        fault = iota
	crashBefore       // the process of this side dies and is started again
	crashAfter
	powerBefore // the host of this side is restarted: its VM is gone as well
	powerAfter
	failBefore // an error, and nothing was done
	failAfter  // an error, and it was done
	failAlways // an error from here on: the disk is full for good
	unreadable // an error, it was done, and for a while the record cannot be read back
	loseRequest
	loseAnswer
	repeatNow
	repeatNext // it comes again after the next message
	repeatEnd  // it comes again when all is over
	delayNext  // it is late, and comes after the next message
	delayEnd
	cutLong    // the link is down for some time
	cutResolve // the link is down until an operator has let the guest run at the source
	goneThere  // the destination's host is gone for good
	goneHere   // the source's process is gone for good
	wipedThere // the destination's host is replaced: its disk and VM are gone, it answers
	userCancel
)

var faultNames = [...]string{"none", "crash before", "crash after", "power before", "power after", "fail before", "fail after", "fail always",
	"unreadable", "lose request", "lose answer", "repeat now", "repeat next", "repeat end", "delay next", "delay end", "cut long", "cut resolve", "gone there", "gone here", "wiped there", "cancel"}

func (f fault) String() string { return faultNames[f] }

var (
	ofStore   = []fault{crashBefore, crashAfter, powerAfter, failBefore, failAfter, failAlways, unreadable}
	ofVerb    = []fault{crashBefore, crashAfter, powerAfter, failBefore, failAfter}
	ofLook    = []fault{crashAfter, powerBefore, failBefore}
	ofMessage = []fault{crashBefore, crashAfter, powerAfter, loseRequest, loseAnswer, repeatNow, repeatNext, repeatEnd, delayNext, delayEnd,
		cutLong, cutResolve, goneThere, goneHere, wipedThere, userCancel}
)

// planned is a fault at the n-th point of a run, or at the n-th of its name.
type planned struct {
	at   int
	f    fault
	name string
}

// point is a place where something can go wrong, as a run came by.
type point struct {
	name  string
	kinds []fault
}

var (
	errDead     = errors.New("this process is dead")
	errInjected = errors.New("injected")
	errLink     = errors.New("no answer")
)

// proc is one life of a side's process.
type proc struct {
	name string
	dead bool
}

type vmState int

const (
	absent vmState = iota
	loaded         // its guest has not run here
	runs
	paused
	ended
)

// machine is a VM. writes is how many acknowledged writes its guest knows.
type machine struct {
	state   vmState
	writes  int
	missing int // pages still at the source
}

// world is two hosts, what lies on their disks, the link, a guest and its clients.
type world struct {
	plan  []planned
	names map[string]int
	trace []point
	fired int // faults of the plan that came by
	bad   []string

	now      time.Time
	rules    mutations
	source   *Source
	dest     *Destination
	src, dst *proc
	here     machine
	there    machine

	disk       map[string][]byte // journals
	full       map[string]bool
	blind      map[string]int // reads of a journal that fail
	acked      int            // writes that clients were told of
	final      int            // writes in what Final has published; -1: nothing
	published  bool
	layers     bool // something of the rounds is in the VM at the source
	fetched    bool
	ranThere   bool
	wentGo     bool // going was on record
	accepted   bool // an operator has accepted the loss
	power      bool // a host lost power while its guest ran: not the protocol's doing
	gone       bool
	goneSrc    bool
	cut        int // messages that are lost yet; -1: until an operator acts
	next, last []Message
}

func newWorld(plan []planned, rules mutations) *world {
	return &world{plan: plan, rules: rules, names: map[string]int{}, now: time.Unix(1e9, 0), disk: map[string][]byte{}, full: map[string]bool{},
		blind: map[string]int{}, final: -1, here: machine{state: runs}, src: &proc{name: "source"}, dst: &proc{name: "destination"}}
}

func (w *world) wrong(format string, args ...any) {
	if len(w.bad) < 5 {
		w.bad = append(w.bad, fmt.Sprintf(format, args...))
	}
}

func (w *world) Now() time.Time                                { return w.now }
func (w *world) Wait(_ context.Context, d time.Duration) error { w.now = w.now.Add(d); return nil }

// often is how many times the same point of a run is made to fail: what a machine repeats
// without end is the same from then on.
const often = 3

// at passes a point and returns what goes wrong there.
func (w *world) at(name string, kinds []fault) fault {
	w.guests()
	if w.names[name]++; w.names[name] > often {
		kinds = nil
	}
	w.trace = append(w.trace, point{name, kinds})
	for _, p := range w.plan {
		if p.name == "" && p.at == len(w.trace)-1 || p.name == name && p.at == w.names[name] {
			w.fired++
			return p.f
		}
	}
	return none
}

// guests lets every running guest acknowledge a write, and checks what must hold at any time.
func (w *world) guests() {
	if w.here.state == runs && w.there.state == runs && !w.accepted {
		w.wrong("two are running")
	}
	if w.here.state == runs {
		w.ack(&w.here)
	} else if w.there.state == runs && !w.accepted {
		w.ack(&w.there)
	}
	if w.there.state == runs && w.there.missing > 0 && !w.published && !w.accepted {
		w.wrong("released while the destination needs it")
	}
}

func (w *world) ack(m *machine) {
	if m.writes != w.acked {
		w.wrong("a guest runs with %d writes, %d were acknowledged", m.writes, w.acked)
	}
	w.acked++
	m.writes++
}

// lose is the loss of power of a side's host.
func (w *world) lose(p *proc) {
	m := &w.here
	if p.name == "destination" {
		m = &w.there
	}
	if m.state == runs || m.state == paused && m.writes != w.final {
		w.power = true
	}
	if m.state != absent {
		m.state = ended
	}
}

// do passes a point around an effect.
func (w *world) do(p *proc, name string, kinds []fault, effect func() error) error {
	if p.dead {
		return errDead
	}
	switch f := w.at(p.name+" "+name, kinds); f {
	case crashBefore, powerBefore:
		if p.dead = true; f == powerBefore {
			w.lose(p)
		}
		return errDead
	case crashAfter, powerAfter:
		effect()
		if p.dead = true; f == powerAfter {
			w.lose(p)
		}
		return errDead
	case failBefore:
		return errInjected
	case failAfter:
		effect()
		return errInjected
	case userCancel:
		w.source.Cancel()
	}
	return effect()
}

// terms are short, so that a run has few steps.
var terms = Limits{Rounds: 1, Stopped: 20 * time.Second, Patience: 20 * time.Second, Farewell: 5 * time.Minute, Poll: time.Second, Backoff: 8 * time.Second}

var sampleOffer = Offer{Cloudlet: "0123456789abcdef", Lineage: "fedcba9876543210", Base: strings.Repeat("b", 64), Machine: []byte(`{}`),
	Fingerprint: strings.Repeat("f", 64), Memory: 4096}

const sampleHandoff = "00112233445566778899aabbccddeeff"

func (w *world) startSource(ctx context.Context, fresh bool) {
	w.src = &proc{name: "source"}
	cfg := SourceConfig{Handoff: sampleHandoff, Epoch: 7, Offer: sampleOffer, VM: fakeVM{w, w.src}, Peer: fakePeer{w, w.src},
		Journal: memJournal{w, w.src}, Clock: w, Limits: terms}
	var s *Source
	var err error
	if fresh {
		s, err = NewSource(ctx, cfg)
	} else {
		s, err = OpenSource(ctx, cfg)
	}
	if err != nil {
		w.src.dead = true
		if !errors.Is(err, errInjected) && !errors.Is(err, errDead) && !errors.Is(err, ErrNoRecord) {
			w.wrong("start source: %v", err)
		}
		return
	}
	w.source = s
}

func (w *world) startDestination(ctx context.Context) {
	w.dst = &proc{name: "destination"}
	d, err := OpenDestination(ctx, DestinationConfig{Handoff: sampleHandoff, Site: fakeSite{w, w.dst}, Journal: memJournal{w, w.dst}, Clock: w, Lease: time.Minute})
	if err != nil {
		w.dst.dead = true
		return
	}
	w.dest = d
}

// run lets it all happen until nothing moves any more, then checks how it has ended.
func (w *world) run(ctx context.Context) {
	w.startDestination(ctx)
	w.startSource(ctx, true)
	resolved, doubtful := false, 0
	for i := 0; ; i++ {
		if i > 1500 {
			w.wrong("it does not end")
			return
		}
		if w.dst.dead && !w.gone {
			w.startDestination(ctx)
		}
		if w.src.dead && !w.goneSrc && w.disk["source"] != nil {
			w.startSource(ctx, false)
			resolved = false // an operator whose word was lost says it again
		}
		w.guests()
		over, wait := w.src.dead && (w.goneSrc || w.disk["source"] == nil), 5*time.Second
		if !w.src.dead {
			wait, over = w.source.Step(ctx)
			if over = over && !w.src.dead; over {
				wait = 5 * time.Second
			}
		}
		w.now = w.now.Add(wait + time.Millisecond)
		quiet := true
		if !w.dst.dead {
			settled, _ := w.dest.Tick(ctx)
			// A full disk, and a source that has gone for good, leave it waiting.
			quiet = settled || i > 50 && (w.full["destination"] || w.goneSrc)
		} else {
			quiet = w.gone
		}
		if !over && !w.src.dead && !resolved {
			st := w.source.Status()
			if st.InDoubt {
				doubtful++
				w.doubt(st)
			}
			if st.InDoubt && (w.cut < 0 || doubtful > 8) {
				resolved = w.source.Resolve(ResumeHere) == nil
				if w.cut < 0 {
					w.cut = 1 // the decision is carried out before the link is there again
				}
			}
		}
		if w.cut < 0 && over {
			w.cut = 0
		}
		if !over && (w.full["source"] || w.full["destination"]) && i > 50 {
			// It cannot write down what it does. The guest must run somewhere, or it is in doubt.
			if st := w.source.Status(); w.here.state != runs && w.there.state != runs && !w.power && !w.gone && !st.InDoubt {
				w.wrong("a full disk, and the guest runs nowhere")
			}
			return
		}
		if !over || !quiet || w.dst.dead && !w.gone {
			continue
		}
		if late := append(w.next, w.last...); len(late) > 0 {
			w.next, w.last = nil, nil
			for _, m := range late {
				w.deliver(ctx, m)
			}
			continue
		}
		break
	}
	w.check(ctx)
}

// doubt checks what must hold while the source does not know.
func (w *world) doubt(st Status) {
	if w.here.state == runs || w.here.state == absent {
		w.wrong("in doubt, and the guest is not paused")
	}
	if !w.published {
		w.wrong("in doubt, and nothing is published any more")
	}
	if st.Loss == "" {
		w.wrong("in doubt, and the loss is not said")
	}
}

// check is what must hold when all is over.
func (w *world) check(ctx context.Context) {
	w.guests()
	theirs := State("gone")
	if !w.dst.dead {
		st, _ := w.dest.Status(ctx)
		theirs = st.State
	}
	whole := !w.full["destination"] && !w.gone
	if w.disk["source"] == nil {
		if w.here.state != runs && !w.power {
			w.wrong("it never began, and the guest does not run")
		}
		return
	}
	ours := SourceState(stateOf(w.disk["source"]))
	if !w.goneSrc {
		switch {
		case !ours.Ended() && !w.full["source"]:
			w.wrong("the source ended in %s", ours)
		case w.published:
			w.wrong("%s, and something is published still", ours)
		case !w.wentGo && ours == SourceDone, !w.wentGo && ours == SourceResumed:
			w.wrong("%s without go", ours)
		}
		switch ours {
		case SourceDone:
			if w.there.state != runs && !w.power && !w.gone {
				w.wrong("done, and the guest does not run there")
			}
			if w.here.state != absent {
				w.wrong("done, and the VM here was not discarded")
			}
		case SourceCancelled, SourceResumed:
			if w.here.state != runs && !w.power {
				w.wrong("%s, and the guest does not run here", ours)
			}
			if w.here.state == runs && w.layers {
				w.wrong("%s, and something of the rounds is in the VM", ours)
			}
			if ours == SourceCancelled && w.ranThere {
				w.wrong("cancelled, and it has run there")
			}
			if w.there.state == runs && !w.gone {
				w.wrong("%s, and the guest runs there", ours)
			}
		}
	} else if w.here.state != runs && w.there.state != runs && theirs == Running {
		w.wrong("the destination says running, and nothing runs")
	}
	switch theirs {
	case Accepted, Prepared, Went:
		if whole {
			w.wrong("the destination ended in %s", theirs)
		}
	case Never, Unknown:
		if w.there.state != absent || w.fetched && theirs == Never {
			w.wrong("the destination is %s, and something of it is left", theirs)
		}
	case Superseded:
		if w.there.state == runs {
			w.wrong("superseded, and it runs")
		}
	case Lost:
		if w.there.state == runs {
			w.wrong("lost, and it runs")
		}
	}
}

// mutations are wrong ways, to see that they are noticed.
type mutations struct {
	drop     string // a record that is said to be written and is not
	runEarly bool   // prepare lets the guest run
	answer   func(Message, Answer, error) (Answer, error)
}

func describe(plan []planned, trace []point) string {
	var out []string
	for _, p := range plan {
		name := p.name
		if name == "" && p.at < len(trace) {
			name = trace[p.at].name
		}
		out = append(out, fmt.Sprintf("%s at %d (%s)", p.f, p.at, name))
	}
	return strings.Join(out, ", then ")
}

func journey(trace []point) string {
	names := make([]string, 0, len(trace))
	for _, p := range trace {
		names = append(names, p.name)
	}
	return strings.Join(slices.Compact(names), "; ")
}
