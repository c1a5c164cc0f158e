package handoff

import (
	"context"
	"fmt"
	"io/fs"
	"strings"
)

// memJournal is a side's journal on the world's disk.
type memJournal struct {
	w *world
	p *proc
}

func (j memJournal) Load(context.Context) ([]byte, error) {
	if j.p.dead {
		return nil, errDead
	}
	if j.w.blind[j.p.name] > 0 {
		j.w.blind[j.p.name]--
		return nil, errInjected
	}
	data, ok := j.w.disk[j.p.name]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return data, nil
}

func (j memJournal) Store(_ context.Context, record []byte) error {
	w := j.w
	if j.p.dead {
		return errDead
	}
	name := j.p.name + " store " + stateOf(record)
	effect := func() {
		if w.rules.drop == name {
			return
		}
		w.disk[j.p.name] = record
		w.wentGo = w.wentGo || strings.HasSuffix(name, "store going")
	}
	if w.full[j.p.name] {
		return errInjected
	}
	switch w.at(name, ofStore) {
	case crashBefore:
		j.p.dead = true
		return errDead
	case crashAfter:
		effect()
		j.p.dead = true
		return errDead
	case powerAfter:
		effect()
		w.lose(j.p)
		j.p.dead = true
		return errDead
	case failBefore:
		return errInjected
	case failAfter:
		effect()
		return errInjected
	case failAlways:
		w.full[j.p.name] = true
		return errInjected
	case unreadable:
		effect()
		w.blind[j.p.name] = 2
		return errInjected
	}
	effect()
	return nil
}

// stateOf finds the state in a record without reading all of it.
func stateOf(record []byte) string {
	_, rest, _ := strings.Cut(string(record), `"state":"`)
	st, _, _ := strings.Cut(rest, `"`)
	return st
}

// fakeVM is the instance at the source.
type fakeVM struct {
	w *world
	p *proc
}

func (v fakeVM) alive() error {
	if v.w.here.state == absent || v.w.here.state == ended {
		return ErrEnded
	}
	return nil
}

func fakeChain(n int) []Overlay {
	id := strings.Repeat(fmt.Sprint(n%10), 64)
	return []Overlay{{ID: id, Digest: id, Bytes: 1, URL: "http://a/b"}}
}

func (v fakeVM) Round(_ context.Context, n int) (out Published, err error) {
	err = v.w.do(v.p, "round", append(ofVerb, userCancel), func() error {
		v.w.published, v.w.layers = true, true
		out = Published{Chain: fakeChain(n), Round: Round{Dirty: 4096, Bytes: 1}}
		return v.alive()
	})
	return out, err
}

func (v fakeVM) Pause(context.Context) error {
	return v.w.do(v.p, "pause", append(ofVerb, userCancel), func() error {
		if v.w.here.state == runs {
			v.w.here.state = paused
		}
		return v.alive()
	})
}

func (v fakeVM) Final(_ context.Context, n int) (out Published, err error) {
	w := v.w
	err = w.do(v.p, "final", append(ofVerb, userCancel), func() error {
		if w.here.state == runs {
			w.wrong("the last round of a running guest")
		}
		if err := v.alive(); err != nil {
			return err
		}
		w.published, w.layers, w.final = true, true, w.here.writes
		out = Published{Chain: fakeChain(n), Round: Round{Bytes: 1}}
		return nil
	})
	return out, err
}

func (v fakeVM) Continue(context.Context) error {
	w := v.w
	return w.do(v.p, "continue", ofVerb, func() error {
		w.ours("continued")
		if w.source.Status().State == SourceResuming {
			w.accepted = true
		}
		if w.here.state == absent {
			w.wrong("continue after discard")
		}
		if w.here.state == ended {
			if w.final < 0 || w.power {
				return ErrEnded
			}
			w.here.writes = w.final // made again of the files
		}
		w.here.state = runs
		if w.accepted {
			w.acked = w.here.writes // what was done there is given up, and that was said
		} else if w.ranThere {
			w.wrong("runs here after it has run there")
		}
		return nil
	})
}

func (v fakeVM) Discard(context.Context) error {
	w := v.w
	return w.do(v.p, "discard", ofVerb, func() error {
		if w.here.state == runs {
			w.wrong("a running guest is discarded")
		}
		if !w.ranThere || w.there.missing > 0 {
			w.wrong("discarded before the destination has everything")
		}
		w.here.state = absent
		return nil
	})
}

func (v fakeVM) Release(context.Context) error {
	w := v.w
	return w.do(v.p, "release", ofVerb, func() error {
		if w.here.state == paused {
			w.wrong("released while the guest is paused")
		}
		if w.layers && w.here.state == runs {
			w.wrong("released while something of the rounds is in the VM")
		}
		w.published = false
		return nil
	})
}

func (v fakeVM) Settle(context.Context) error {
	w := v.w
	return w.do(v.p, "settle", ofVerb, func() error {
		w.ours("settled")
		if w.here.state == paused {
			w.wrong("settled while the guest is paused")
		}
		w.layers = false
		return v.alive()
	})
}

// ours: what is an ordinary instance again may be anybody's.
func (w *world) ours(what string) {
	if stateOf(w.disk["source"]) == string(SourceSuperseding) {
		w.wrong("%s, and it is an ordinary instance", what)
	}
}

// fakeSite is the destination's cloudlet.
type fakeSite struct {
	w *world
	p *proc
}

func (s fakeSite) Admit(context.Context, uint64, Offer) (lacks []string, reasons []Reason, err error) {
	return nil, nil, s.w.do(s.p, "admit", ofLook, func() error { return nil })
}

func (s fakeSite) Fetch(context.Context, []Overlay) error {
	return s.w.do(s.p, "fetch", ofVerb, func() error { s.w.fetched = true; return nil })
}

func (s fakeSite) Prepare(context.Context, Offer, []Overlay) error {
	w := s.w
	return w.do(s.p, "prepare", ofVerb, func() error {
		if w.ranThere {
			w.wrong("prepared again after it has run")
		}
		if w.final < 0 || !w.published {
			return errInjected
		}
		w.fetched = true
		w.there = machine{state: loaded, writes: w.final, missing: 2}
		if w.rules.runEarly {
			w.there.state = runs
		}
		return nil
	})
}

func (s fakeSite) Run(context.Context, Offer) error {
	w := s.w
	return w.do(s.p, "run", ofVerb, func() error {
		if w.there.state == absent || w.there.state == ended {
			return ErrEnded
		}
		w.there.state, w.ranThere = runs, true
		return nil
	})
}

func (s fakeSite) Look(context.Context) (l Look, err error) {
	w := s.w
	err = w.do(s.p, "look", ofLook, func() error {
		l.Alive = w.there.state != absent && w.there.state != ended
		l.Missing = int64(w.there.missing)
		if l.Alive && w.there.missing > 0 && w.published && w.cut == 0 && !w.src.dead {
			w.there.missing-- // the background goes on
		}
		return nil
	})
	return l, err
}

func (s fakeSite) Pause(context.Context) error {
	w := s.w
	return w.do(s.p, "pause", ofVerb, func() error {
		if w.there.state == absent || w.there.state == ended {
			return ErrEnded
		}
		w.there.state = paused
		return nil
	})
}

func (s fakeSite) Destroy(context.Context) error {
	w := s.w
	return w.do(s.p, "destroy", ofVerb, func() error {
		if w.ranThere && w.there.state != absent {
			w.wrong("destroyed after it has run")
		}
		w.there, w.fetched = machine{}, false
		return nil
	})
}

// fakePeer is the link.
type fakePeer struct {
	w *world
	p *proc
}

func (l fakePeer) Send(ctx context.Context, m Message) (Answer, error) {
	a, err := l.send(ctx, m)
	if l.w.rules.answer != nil {
		a, err = l.w.rules.answer(m, a, err)
	}
	return a, err
}

func (l fakePeer) send(ctx context.Context, m Message) (a Answer, err error) {
	w := l.w
	if l.p.dead {
		return a, errDead
	}
	f := w.at("send "+string(m.Kind), ofMessage)
	switch f {
	case crashBefore:
		l.p.dead = true
		return a, errDead
	case goneHere:
		w.goneSrc, l.p.dead = true, true
		return a, errDead
	case cutLong:
		w.cut = 5
	case cutResolve:
		if w.cut = -1; w.accepted {
			w.cut = 5
		}
	case goneThere:
		w.gone, w.dst.dead = true, true
		w.there.state = ended
	case wipedThere:
		w.lose(w.dst)
		w.dst.dead, w.there, w.fetched = true, machine{}, false
		delete(w.disk, "destination")
	case userCancel:
		w.source.Cancel()
	}
	if w.cut != 0 {
		w.cut = max(w.cut-1, -1)
		return a, errLink
	}
	late := w.next
	w.next = nil
	defer func() {
		for _, m := range late {
			w.deliver(ctx, m)
		}
	}()
	switch f {
	case loseRequest:
		return a, errLink
	case delayNext:
		w.next = append(w.next, m)
		return a, errLink
	case delayEnd:
		w.last = append(w.last, m)
		return a, errLink
	case repeatNow:
		w.deliver(ctx, m)
	case repeatNext:
		w.next = append(w.next, m)
	case repeatEnd:
		w.last = append(w.last, m)
	}
	a, err = w.deliver(ctx, m)
	switch f {
	case loseAnswer:
		return Answer{}, errLink
	case crashAfter, powerAfter:
		if l.p.dead = true; f == powerAfter {
			w.lose(l.p)
		}
		return Answer{}, errDead
	}
	return a, err
}

func (w *world) deliver(ctx context.Context, m Message) (Answer, error) {
	if w.dst.dead {
		return Answer{}, errLink
	}
	a, err := w.dest.Handle(ctx, m)
	if w.dst.dead {
		return Answer{}, errLink
	}
	return a, err
}
