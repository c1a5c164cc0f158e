package service

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"time"

	"cloudlet/api"
	"cloudlet/handoff"
	"cloudlet/overlay/source"
)

// The folder of a handoff, STATE/handoffs/ID, holds its journal, meta.json, and a folder for
// each overlay that is published here, or arrives: ID/overlay, and ID/whole once all of it
// has arrived and was checked.
const (
	handoffJournal  = "journal"
	handoffMetaFile = "meta.json"
	handoffKept     = 24 * time.Hour // after its end
	maxHandoffs     = 64             // folders of handoffs that have not ended
)

var handoffForm = regexp.MustCompile(`^[0-9a-f]{16,64}$`)

// handoffMeta is what a side of a handoff keeps beside the journal.
type handoffMeta struct {
	Side     api.HandoffSide `json:"side"`
	Instance string          `json:"instance"`
	Created  time.Time       `json:"created"`

	// Of a source.
	Operation string   `json:"operation,omitempty"`
	To        string   `json:"to,omitempty"`
	Token     string   `json:"token,omitempty"`
	Allow     []string `json:"allow,omitzero"` // rules that To must pass; nil: none
	Key       string   `json:"key,omitempty"`  // of the URLs; "" once they are withdrawn
	Epoch     uint64   `json:"epoch,omitempty"`
	Parents   int      `json:"parents,omitempty"` // overlays of the instance's chain under the rounds

	// Of a destination.
	From netip.Addr `json:"from,omitzero"` // address of the source
}

func (s *Service) handoffPath(id string, parts ...string) string {
	return s.path(append([]string{"handoffs", id}, parts...)...)
}

func (s *Service) readHandoff(id string) (m handoffMeta, err error) {
	if !handoffForm.MatchString(id) {
		return m, fs.ErrNotExist
	}
	err = readJSON(s.handoffPath(id, handoffMetaFile), &m)
	return m, err
}

func (s *Service) writeHandoff(id string, m handoffMeta) error {
	return writeJSON(s.handoffPath(id, handoffMetaFile), m)
}

func (s *Service) journal(id string) handoff.FileJournal {
	return handoff.FileJournal{Path: s.handoffPath(id, handoffJournal)}
}

// newHandoffID returns an id that no handoff has had.
func newHandoffID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// arrivedID returns the id of the instance that a handoff makes at its destination.
func arrivedID(handoffID string) string { return handoffID[:12] }

// cloudletID returns the id of this store as a cloudlet, making it at first.
func (s *Service) cloudletID(ctx context.Context) (id string, err error) {
	var c struct {
		ID string `json:"id"`
	}
	err = s.locked(ctx, func() error {
		if err := readJSON(s.path("cloudlet.json"), &c); err == nil || !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		c.ID = newHandoffID()
		return writeJSON(s.path("cloudlet.json"), c)
	})
	return c.ID, err
}

// checkServer refuses what is not the address of a service.
func checkServer(field, server string) error {
	u, err := url.Parse(server)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.Path != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return invalid(field, "%.200q is not the address of a cloudlet", server).Fix("write http://HOST:PORT or https://HOST:PORT")
	}
	return nil
}

// Handoff describes a handoff, as this side of it sees it. ref is its id, or an instance that
// it is or was about, whose latest it is.
func (s *Service) Handoff(ctx context.Context, ref string) (api.Handoff, error) {
	h, err := s.describeHandoff(ctx, ref)
	return h, fail(err)
}

func (s *Service) describeHandoff(ctx context.Context, ref string) (out api.Handoff, err error) {
	id, m, err := s.findHandoff(ref)
	if err != nil {
		return out, err
	}
	out = api.Handoff{ID: id, Side: m.Side, Instance: m.Instance, Operation: m.Operation, Peer: m.To, Created: m.Created}
	if m.Side == api.HandoffDestination {
		d, err := s.arrival(ctx, id)
		if err != nil {
			return out, err
		}
		st, err := d.dest.Status(ctx)
		out.State, out.Epoch, out.Lineage, out.Stuck = string(st.State), st.Epoch, st.Offer.Lineage, st.Stuck
		out.Reasons, out.Missing = shownReasons(st.Reasons), d.missing()
		return out, err
	}
	src, err := s.sourceOf(ctx, id)
	if err != nil {
		return out, err
	}
	st := src.Status()
	out.State, out.Theirs, out.Epoch, out.Rounds, out.Bytes = string(st.State), string(st.Theirs), st.Epoch, shownRounds(st.Rounds), st.Bytes
	out.Missing, out.Pause, out.Why, out.InDoubt, out.Loss, out.Stuck = st.Missing, st.Pause.Seconds(), st.Why, st.InDoubt, st.Loss, st.Stuck
	out.Endpoints, out.Reasons = shownEndpoints(st.Endpoints), shownReasons(st.Reasons)
	if r, err := s.readRecord(m.Instance); err == nil {
		out.Lineage = r.Lineage
	}
	return out, nil
}

// findHandoff finds a handoff by its id, or the latest one of an instance.
func (s *Service) findHandoff(ref string) (id string, m handoffMeta, err error) {
	if m, err = s.readHandoff(ref); err == nil {
		return ref, m, nil
	}
	instance, ierr := s.findInstance(ref)
	if ierr != nil {
		instance = ref
	}
	ids, err := s.list("handoffs")
	if err != nil {
		return "", m, err
	}
	for _, other := range ids {
		if n, err := s.readHandoff(other); err == nil && n.Instance == instance && n.Created.After(m.Created) {
			id, m = other, n
		}
	}
	if id == "" {
		return "", m, api.Errorf(api.NotFound, "no handoff %.80q, and none of an instance of that name", ref).Fix("one that has ended is kept for %s", handoffKept)
	}
	return id, m, nil
}

func shownReasons(in []handoff.Reason) (out []api.HandoffReason) {
	for _, r := range in {
		out = append(out, api.HandoffReason(r))
	}
	return out
}

func shownEndpoints(in []handoff.Endpoint) (out []api.Endpoint) {
	for _, e := range in {
		out = append(out, api.Endpoint(e))
	}
	return out
}

func shownRounds(in []handoff.Round) (out []api.HandoffRound) {
	for _, r := range in {
		out = append(out, api.HandoffRound{Dirty: r.Dirty, Bytes: r.Bytes, Made: r.Made.Seconds(), Sent: r.Sent.Seconds(), Pause: r.Pause.Seconds()})
	}
	return out
}

// HandoffContent returns an overlay that a source has published, and its digest. Without the
// right key there is none.
func (s *Service) HandoffContent(ctx context.Context, id, overlayID, key string) (io.ReadSeekCloser, string, error) {
	none := api.Errorf(api.NotFound, "there is no such overlay, or the key is not its")
	m, err := s.readHandoff(id)
	if err != nil || m.Side != api.HandoffSource || m.Key == "" || subtle.ConstantTimeCompare([]byte(m.Key), []byte(key)) != 1 {
		return nil, "", none
	}
	if len(overlayID) != 64 || !hexForm.MatchString(overlayID) {
		return nil, "", none
	}
	if f, err := os.Open(s.handoffPath(id, overlayID, "overlay")); err == nil {
		digest, err := os.ReadFile(s.handoffPath(id, overlayID, "digest"))
		if err != nil {
			return nil, "", fail(errors.Join(err, f.Close()))
		}
		return f, string(digest), nil
	}
	r, err := s.readRecord(m.Instance)
	if err != nil {
		return nil, "", none
	}
	i := slices.IndexFunc(r.Links, func(l link) bool { return l.ID == overlayID })
	if i < 0 || i >= m.Parents {
		return nil, "", none
	}
	return s.linkContent(ctx, r.Links[i])
}

// linkContent opens the overlay of a link, wherever it is.
func (s *Service) linkContent(ctx context.Context, l link) (io.ReadSeekCloser, string, error) {
	at := s.whereIs(l)
	src, err := at.open(ctx, s.path("cache"))
	if err != nil {
		return nil, "", fail(err)
	}
	o, err := describe(ctx, &unclosed{src})
	if err != nil {
		return nil, "", errors.Join(err, src.Close())
	}
	return &sourceReader{SectionReader: io.NewSectionReader(&sourceAt{ctx, src}, 0, src.Size()), src: src}, o.Digest, nil
}

// unclosed keeps a source open.
type unclosed struct{ source.Source }

// Close does nothing.
func (*unclosed) Close() error { return nil }

// sourceAt reads a source on behalf of a request.
type sourceAt struct {
	ctx context.Context
	src source.Source
}

// ReadAt reads as the source does.
func (s *sourceAt) ReadAt(p []byte, off int64) (int, error) { return s.src.ReadAt(s.ctx, p, off) }

// sourceReader is the content of a source.
type sourceReader struct {
	*io.SectionReader
	src source.Source
}

// Close closes the source.
func (r *sourceReader) Close() error { return r.src.Close() }

// sweepHandoffs removes what is left of handoffs that ended more than a day ago, unless the
// instance that came by them is still there.
func (s *Service) sweepHandoffs(ctx context.Context) error {
	ids, err := s.list("handoffs")
	for _, id := range ids {
		m, merr := s.readHandoff(id)
		info, serr := os.Stat(s.handoffPath(id, handoffJournal))
		switch {
		case errors.Is(merr, fs.ErrNotExist) || errors.Is(serr, fs.ErrNotExist):
			// One that never began, or is just about to.
			if dir, derr := os.Stat(s.handoffPath(id)); derr == nil && time.Since(dir.ModTime()) > time.Hour {
				err = errors.Join(err, s.locked(ctx, func() error { return os.RemoveAll(s.handoffPath(id)) }))
			}
			continue
		case merr != nil || serr != nil:
			err = errors.Join(err, merr, serr)
			continue
		case time.Since(info.ModTime()) < handoffKept:
			continue
		}
		if _, rerr := s.readRecord(arrivedID(id)); m.Side == api.HandoffDestination && rerr == nil {
			continue
		}
		if ended, eerr := s.handoffEnded(ctx, id, m); eerr != nil || !ended {
			err = errors.Join(err, eerr)
			continue
		}
		s.mu.Lock()
		delete(s.sources, id)
		delete(s.arrivals, id)
		s.mu.Unlock()
		err = errors.Join(err, s.locked(ctx, func() error { return os.RemoveAll(s.handoffPath(id)) }))
	}
	return err
}

func (s *Service) handoffEnded(ctx context.Context, id string, m handoffMeta) (bool, error) {
	if m.Side == api.HandoffSource {
		src, err := s.sourceOf(ctx, id)
		return err == nil && src.Status().State.Ended(), err
	}
	a, err := s.arrival(ctx, id)
	if err != nil {
		return false, err
	}
	st, err := a.dest.Status(ctx)
	return st.State == handoff.Never || st.State == handoff.Closed || st.State == handoff.Superseded || st.State == handoff.Lost, err
}

// newHandoffFolder makes the folder of a handoff with its meta data.
func (s *Service) newHandoffFolder(ctx context.Context, id string, m handoffMeta) error {
	return s.locked(ctx, func() error {
		ids, err := s.list("handoffs")
		if err != nil {
			return err
		}
		living := 0
		s.mu.Lock()
		for _, other := range ids {
			if s.arrivals[other].going() || s.sources[other] != nil && !s.sources[other].Status().State.Ended() {
				living++
			}
		}
		s.mu.Unlock()
		if living >= maxHandoffs {
			return api.Errorf(api.Unavailable, "%d handoffs are under way, which is the limit", living).Fix("ask again when one has ended")
		}
		if err := os.Mkdir(s.handoffPath(id), 0o700); err != nil {
			return err
		}
		if err := s.writeHandoff(id, m); err != nil {
			return errors.Join(err, os.RemoveAll(s.handoffPath(id)))
		}
		return syncDir(s.path("handoffs"))
	})
}

// handoffState describes for people why an instance is as it is while it is handed off.
func (s *Service) handoffState(id string) string {
	s.mu.Lock()
	src := s.sources[id]
	s.mu.Unlock()
	if src == nil {
		return fmt.Sprintf("handoff %.12s is under way", id)
	}
	st := src.Status()
	if st.InDoubt {
		return fmt.Sprintf("handoff %.12s is in doubt: %s", id, st.Loss)
	}
	return fmt.Sprintf("handoff %.12s: %s", id, st.State)
}

// movedTo returns where an instance of a handoff from here runs, once the other cloudlet has
// said that it does.
func (s *Service) movedTo(id string) *api.Moved {
	s.mu.Lock()
	src := s.sources[id]
	s.mu.Unlock()
	if src == nil {
		return nil
	}
	m, err := s.readHandoff(id)
	if st := src.Status(); err == nil && len(st.Endpoints) > 0 {
		return &api.Moved{To: m.To, Instance: arrivedID(id), Endpoints: shownEndpoints(st.Endpoints)}
	}
	return nil
}

// updateRecord changes the record of an instance.
func (s *Service) updateRecord(ctx context.Context, id string, change func(*record)) error {
	return s.locked(ctx, func() error {
		r, err := s.readRecord(id)
		if err != nil {
			return err
		}
		change(r)
		return s.writeRecord(r)
	})
}
