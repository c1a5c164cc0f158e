package service

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/handoff"

	"github.com/stretchr/testify/require"
)

// asDaemon reopens a store as a daemon.
func asDaemon(t *testing.T, s *Service, change func(*Config)) *Service {
	t.Helper()
	return reopen(t, s, func(c *Config) {
		c.Daemon, c.Advertise = true, "http://127.0.0.1:7300"
		if change != nil {
			change(c)
		}
	})
}

const testHandoff = "00112233445566778899aabbccddeeff"

// offerOf is an offer that would be accepted but for its machine.
func offerOf(base api.Base) handoff.Offer {
	return handoff.Offer{
		Cloudlet: newHandoffID(), Lineage: newHandoffID(), Base: base.ID, Machine: base.Machine,
		Fingerprint: strings.Repeat("ab", 32), Memory: base.MemorySize, Disk: base.DiskSize,
	}
}

func say(t *testing.T, s *Service, m handoff.Message) (handoff.Answer, error) {
	t.Helper()
	m.Version = handoff.Version
	if m.Handoff == "" {
		m.Handoff = testHandoff
	}
	if m.Epoch == 0 {
		m.Epoch = 2
	}
	b, err := json.Marshal(m)
	require.NoError(t, err)
	answer, err := s.HandoffMessage(t.Context(), Caller{Name: "peer"}, netip.MustParseAddr("127.0.0.1"), b)
	if err != nil {
		return handoff.Answer{}, err
	}
	a, err := handoff.ParseAnswer(answer)
	require.NoError(t, err)
	return a, nil
}

// TestOffersRefused: an offer that cannot be met is refused with the field at fault, and
// leaves nothing.
func TestOffersRefused(t *testing.T) {
	s := newService(t)
	base := addBase(t, s, "", 'a')
	d := asDaemon(t, s, nil)
	own, err := d.cloudletID(t.Context())
	require.NoError(t, err)
	require.NoError(t, d.placeRecord(t.Context(), &record{ID: "0123456789ab", State: api.Stopped, Lineage: strings.Repeat("cd", 16), Epoch: 2}))
	for name, tc := range map[string]struct {
		change func(*handoff.Offer)
		field  string
	}{
		"machine": {func(*handoff.Offer) {}, "machine"},
		"base":    {func(o *handoff.Offer) { o.Base = strings.Repeat("0", 64) }, "base"},
		"itself":  {func(o *handoff.Offer) { o.Cloudlet = own }, "cloudlet"},
		"lineage": {func(o *handoff.Offer) { o.Lineage = strings.Repeat("cd", 16) }, "lineage"},
		"memory":  {func(o *handoff.Offer) { o.Memory = 1 << 60 }, "memory"},
		"disk":    {func(o *handoff.Offer) { o.Residue = 1 << 60 }, "disk"},
		"port":    {func(o *handoff.Offer) { o.Forwards = []handoff.Forward{{Guest: 80, Host: takenPort(t)}} }, "port"},
	} {
		t.Run(name, func(t *testing.T) {
			o := offerOf(base)
			tc.change(&o)
			a, err := say(t, d, handoff.Message{Kind: handoff.KindOffer, Offer: &o})
			require.NoError(t, err)
			require.Equal(t, handoff.Refused, a.State)
			var fields []string
			for _, r := range a.Reasons {
				fields = append(fields, r.Field)
			}
			require.Contains(t, fields, tc.field, "%v", a.Reasons)
			require.NoDirExists(t, d.handoffPath(testHandoff))
			a, err = say(t, d, handoff.Message{Kind: handoff.KindGo})
			require.NoError(t, err)
			require.Equal(t, handoff.Unknown, a.State, "what was refused is not known")
		})
	}
	for _, text := range []string{"", "{", "[]", `{"version":1}`, `{"version":2,"handoff":"0011223344556677","epoch":1,"kind":"ask"}`, `{"version":1,"handoff":"../../../etc/passwd","epoch":1,"kind":"ask"}`} {
		_, err := d.HandoffMessage(t.Context(), Caller{}, netip.MustParseAddr("127.0.0.1"), []byte(text))
		require.Equal(t, api.Invalid, api.CodeOf(err), text)
	}
	entries, err := os.ReadDir(d.path("handoffs"))
	require.NoError(t, err)
	require.Empty(t, entries)
}

// takenPort returns a port that somebody listens on.
func takenPort(t *testing.T) int {
	srv := httptest.NewServer(http.NotFoundHandler())
	t.Cleanup(srv.Close)
	return int(netip.MustParseAddrPort(srv.Listener.Addr().String()).Port())
}

// newArrival makes an arrival without a record.
func newArrival(t *testing.T, d *Service) *arrival {
	t.Helper()
	require.NoError(t, d.newHandoffFolder(t.Context(), testHandoff, handoffMeta{
		Side: api.HandoffDestination, Instance: arrivedID(testHandoff), From: netip.MustParseAddr("127.0.0.1"),
	}))
	a, err := d.arrival(t.Context(), testHandoff)
	require.NoError(t, err)
	t.Cleanup(a.stop)
	return a
}

// leaveArrival leaves the files of a handoff to here, as a daemon does that ends in state.
func leaveArrival(t *testing.T, d *Service, id string, state handoff.State) {
	t.Helper()
	require.NoError(t, d.newHandoffFolder(t.Context(), id, handoffMeta{Side: api.HandoffDestination, Instance: arrivedID(id)}))
	journal, err := json.Marshal(map[string]any{"version": handoff.Version, "handoff": id, "epoch": 2, "state": state,
		"offer": offerOf(api.Base{Machine: json.RawMessage(`{}`)}), "settled": false})
	require.NoError(t, err)
	require.NoError(t, d.journal(id).Store(t.Context(), journal))
}

// TestSettleAgain: an instance that has come becomes an ordinary one even if that cannot be
// written down at first, and under another daemon.
func TestSettleAgain(t *testing.T) {
	d := asDaemon(t, newService(t), nil)
	id := arrivedID(testHandoff)
	require.NoError(t, d.placeRecord(t.Context(), &record{ID: id, State: api.Stopped, Handoff: testHandoff}))
	leaveArrival(t, d, testHandoff, handoff.Complete)
	file := d.instancePath(id, "record.json")
	require.NoError(t, os.Rename(file, file+".away"))
	require.NoError(t, os.Mkdir(file, 0o700)) // cannot be read or written
	require.Error(t, d.takeUpArrivals(t.Context()))
	a, err := d.arrival(t.Context(), testHandoff)
	require.NoError(t, err)
	t.Cleanup(a.stop)
	require.True(t, a.unsettled())
	require.Error(t, a.settle(t.Context()))
	require.True(t, a.unsettled())
	require.NoError(t, os.Remove(file))
	require.NoError(t, os.Rename(file+".away", file))
	require.NoError(t, a.settle(t.Context()))
	require.False(t, a.unsettled())
	r, err := d.readRecord(id)
	require.NoError(t, err)
	require.Empty(t, r.Handoff)
}

// TestFetchForHandoff fetches from a source that fails in many ways, one after the other.
func TestFetchForHandoff(t *testing.T) {
	s := newService(t)
	id, content := overlayBytes(t, s)
	d := asDaemon(t, s, nil)
	size := int64(len(content))
	damaged := append([]byte{}, content...)
	damaged[len(damaged)/2] ^= 1
	var step atomic.Int32
	var went atomic.Bool
	serve := func(w http.ResponseWriter, r *http.Request, b []byte) {
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(string(b)))
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		require.NotEmpty(t, r.Header.Get("Range"))
		switch step.Add(1) {
		case 1:
			http.Error(w, "not now", http.StatusServiceUnavailable)
		case 2: // closes in the middle
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", size-1, size))
			w.Header().Set("Content-Length", fmt.Sprint(size))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(damaged[:1000])
			panic(http.ErrAbortHandler)
		case 3: // another file
			serve(w, r, content[:len(content)-1])
		case 4: // of the right size, and damaged
			serve(w, r, damaged)
		case 5: // elsewhere
			http.Redirect(w, r, "http://169.254.169.254/", http.StatusFound)
		default:
			went.Store(true)
			serve(w, r, content)
		}
	}))
	t.Cleanup(srv.Close)
	a := newArrival(t, d)
	o := handoff.Overlay{ID: id, Digest: strings.Repeat("0", 64), Bytes: size, URL: srv.URL + "/v1/handoffs/" + testHandoff + "/overlays/" + id + "?key=secret"}
	require.NoError(t, (*site)(a).Fetch(t.Context(), []handoff.Overlay{o}))
	require.Positive(t, a.missing())
	require.Eventually(t, func() bool { return a.missing() == 0 }, time.Minute, 10*time.Millisecond)
	require.True(t, went.Load())
	require.EqualValues(t, 6, step.Load())
	got, err := os.ReadFile(d.handoffPath(testHandoff, id, "overlay"))
	require.NoError(t, err)
	require.Equal(t, content, got)
	require.FileExists(t, d.handoffPath(testHandoff, id, "whole"))

	// The next daemon finds it whole and asks nobody.
	closeNow(t, d)
	n := asDaemon(t, s, nil)
	again, err := n.arrival(t.Context(), testHandoff)
	require.NoError(t, err)
	t.Cleanup(again.stop)
	require.NoError(t, (*site)(again).Fetch(t.Context(), []handoff.Overlay{o}))
	require.Zero(t, again.missing())
	require.EqualValues(t, 6, step.Load())
	require.NoError(t, (*site)(again).Destroy(t.Context()))
	require.NoDirExists(t, n.handoffPath(testHandoff, id))
}

// TestFetchRules: only the source's own address, whatever name it gives itself, and what the
// operator allows, is asked.
func TestFetchRules(t *testing.T) {
	s := newService(t)
	id, content := overlayBytes(t, s)
	asked := make(chan string, 10)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.URL.Path
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(string(content)))
	}))
	t.Cleanup(srv.Close)
	port := srv.Listener.Addr().String()[len("127.0.0.1"):]
	ours := "/v1/handoffs/" + testHandoff + "/overlays/" + id
	for name, tc := range map[string]struct {
		url, origin string
		allow       []string
		fails       bool
	}{
		"another path of the source": {url: srv.URL + "/v1/overlays/x/content", fails: true},
		"a name of its own":          {url: "http://edge-1.example.org" + port + ours},
		"another handoff":            {url: srv.URL + "/v1/handoffs/ffffffffffffffff/overlays/" + id, fails: true},
		"a name of another":          {url: "http://169.254.169.254" + port + ours},
		"with a user":                {url: "http://x@127.0.0.1" + port + ours, fails: true},
		"out of its folder":          {url: srv.URL + "/v1/handoffs/" + testHandoff + "/../../bases", fails: true},
		"the source":                 {url: srv.URL + ours, origin: "http://169.254.169.254/x"},
		"allowed":                    {url: "http://10.0.0.1/x", origin: srv.URL + "/depot/app", allow: []string{"private+" + srv.URL + "/depot/"}},
	} {
		t.Run(name, func(t *testing.T) {
			d := asDaemon(t, s, func(c *Config) { c.AllowURLs = tc.allow })
			defer closeNow(t, d)
			a := newArrival(t, d)
			err := (*site)(a).Fetch(t.Context(), []handoff.Overlay{{ID: id, Digest: id, Bytes: int64(len(content)), URL: tc.url, Origin: tc.origin}})
			if tc.fails {
				require.ErrorContains(t, err, "not allowed")
				require.Positive(t, a.missing(), "what cannot be fetched is missing")
			} else {
				require.NoError(t, err)
				require.Eventually(t, func() bool { return a.missing() == 0 }, time.Minute, 10*time.Millisecond)
				require.Len(t, asked, 1)
				<-asked
			}
			require.Empty(t, asked)
			a.stop()
			require.NoError(t, d.forgetArrival(t.Context(), testHandoff))
		})
	}
}

// TestPublishedByKey: the key of a handoff gives its overlays, and nothing else.
func TestPublishedByKey(t *testing.T) {
	s := newService(t)
	base := addBase(t, s, "", 'a')
	launch := addOverlay(t, s, base.ID, "", 'x')
	other := addOverlay(t, s, base.ID, "", 'y')
	d := asDaemon(t, s, nil)
	require.NoError(t, d.placeRecord(t.Context(), &record{
		ID: "0123456789ab", State: api.Stopped, Base: base.ID,
		Links: []link{{ID: launch.ID, Source: d.overlayFile(launch.ID)}, {ID: other.ID, Source: d.overlayFile(other.ID)}},
	}))
	m := handoffMeta{Side: api.HandoffSource, Instance: "0123456789ab", Key: "secret", Parents: 1}
	require.NoError(t, d.newHandoffFolder(t.Context(), testHandoff, m))
	round := strings.Repeat("12", 32)
	require.NoError(t, os.Mkdir(d.handoffPath(testHandoff, round), 0o700))
	for name, text := range map[string]string{"overlay": "of a round", "digest": "its digest"} {
		require.NoError(t, os.WriteFile(filepath.Join(d.handoffPath(testHandoff, round), name), []byte(text), 0o600))
	}
	f, digest, err := d.HandoffContent(t.Context(), testHandoff, round, "secret")
	require.NoError(t, err)
	b, err := io.ReadAll(f)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.Equal(t, "of a round", string(b))
	require.Equal(t, "its digest", digest)
	f, digest, err = d.HandoffContent(t.Context(), testHandoff, launch.ID, "secret")
	require.NoError(t, err)
	b, err = io.ReadAll(f)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	want, err := os.ReadFile(d.overlayFile(launch.ID))
	require.NoError(t, err)
	require.Equal(t, want, b)
	require.Equal(t, launch.Digest, digest)
	for _, tc := range [][3]string{
		{testHandoff, round, "Secret"}, {testHandoff, round, ""}, {"ffffffffffffffff", round, "secret"}, {"../handoffs", round, "secret"},
		{testHandoff, "../" + testHandoff, "secret"}, {testHandoff, "meta.json", "secret"}, {testHandoff, strings.Repeat("34", 32), "secret"},
		{testHandoff, other.ID, "secret"},
	} {
		_, _, err := d.HandoffContent(t.Context(), tc[0], tc[1], tc[2])
		require.Equal(t, api.NotFound, api.CodeOf(err), "%q", tc)
	}
}

// TestHandedOnThroughRestart: a daemon that starts anew takes nothing from the handoff by which
// an instance is leaving, though the one by which it came has ended.
func TestHandedOnThroughRestart(t *testing.T) {
	d := asDaemon(t, newService(t), nil)
	id, second := arrivedID(testHandoff), strings.Repeat("f", 32)
	require.NoError(t, d.placeRecord(t.Context(), &record{ID: id, State: api.Running, Handoff: second}))
	leaveArrival(t, d, testHandoff, handoff.Closed)
	require.NoError(t, d.takeUpArrivals(t.Context()))
	defer d.stopArrivals()
	r, err := d.readRecord(id)
	require.NoError(t, err)
	require.Equal(t, second, r.Handoff)
}

// TestMayHandOn: an instance stays while the cloudlet that it came from may let it run there.
func TestMayHandOn(t *testing.T) {
	d := asDaemon(t, newService(t), nil)
	require.NoError(t, d.mayHandOn(t.Context(), &record{}))
	require.NoError(t, d.mayHandOn(t.Context(), &record{Arrived: strings.Repeat("e", 32)}), "long forgotten")
	for id, state := range map[string]handoff.State{strings.Repeat("a", 32): handoff.Complete, strings.Repeat("b", 32): handoff.Closed} {
		leaveArrival(t, d, id, state)
		r := &record{ID: arrivedID(id), State: api.Running, Arrived: id}
		err := d.mayHandOn(t.Context(), r)
		if state == handoff.Closed {
			require.NoError(t, err)
			continue
		}
		require.Equal(t, api.Conflict, api.CodeOf(err))
		long := time.Now().Add(-endBound - time.Minute)
		require.NoError(t, os.Chtimes(d.journal(id).Path, long, long))
		require.NoError(t, d.mayHandOn(t.Context(), r))
	}
	d.stopArrivals()
}
