package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/handoff"
	"cloudlet/integration/appclient"
	"cloudlet/integration/cloudlets"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// faultBound is how long anything may take that is waited for: longer than the longest limit
// of a handoff, the destination's lease.
const faultBound = 3 * time.Minute

// momentBound is how long a handoff may take until a moment.
const momentBound = time.Minute

// faultLab is two cloudlets with all that passes between them under control.
type faultLab struct {
	*handoffLab
	a, b    *cloudlets.Cloudlet
	between *cloudlets.Between
	app     string // id of the application's overlay
}

func newFaultLab(t *testing.T, o cloudlets.Options) *faultLab {
	t.Helper()
	o.Count, o.Network = max(o.Count, 2), cloudlets.Network{Cuttable: true}
	messages, err := os.Create(filepath.Join(t.TempDir(), "messages"))
	require.NoError(t, err)
	t.Cleanup(func() {
		if text, err := os.ReadFile(messages.Name()); err == nil && t.Failed() {
			t.Logf("%s", text)
		}
		require.NoError(t, messages.Close())
	})
	o.Log = messages
	l := &faultLab{handoffLab: newHandoffLab(t, o)}
	l.a, l.b = l.Cloudlets[0], l.Cloudlets[1]
	l.between, err = l.Between(l.a, l.b)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, l.between.Close()) })
	require.NoError(t, l.a.End(syscall.SIGTERM))
	l.startA(t)
	l.app, err = l.Application(t.Context(), l.a, func(address string) error {
		return l.Ask(t.Context(), nil, http.MethodPost, address, "/write?mib=1&seed=app")
	})
	require.NoError(t, err)
	return l
}

// startA starts the source's daemon, whose overlays are fetched through what is between.
func (l *faultLab) startA(t *testing.T) {
	t.Helper()
	require.NoError(t, l.a.Start(t.Context(), "--advertise", l.between.Back))
}

// faultRun is one handoff of one instance with a client at work.
type faultRun struct {
	*faultLab
	t         *testing.T
	began     time.Time
	in        api.Instance // at the source
	at        string       // address of its application there
	token     string
	client    *appclient.Client
	handoff   string // id
	operation string // id
	stops     []*cloudlets.Stop
	told      int64 // what the client had been told when the guest was paused for go
	witness   *witness
}

// begin runs an instance and a client.
func (l *faultLab) begin(t *testing.T) *faultRun {
	t.Helper()
	r := &faultRun{faultLab: l, t: t, began: time.Now()}
	ctx := t.Context()
	var err error
	r.in, err = l.a.Run(ctx, l.app)
	require.NoError(t, err)
	r.at = l.a.Address(r.in)
	var first struct{ Token string }
	require.NoError(t, l.Ask(ctx, &first, http.MethodGet, r.at, "/"))
	r.token = first.Token
	require.NoError(t, l.Ask(ctx, nil, http.MethodPost, r.at, "/fill?mib=2&seed=fault"))
	r.client = r.work("c", r.find)
	r.say("the client works")
	t.Cleanup(func() { r.end() })
	return r
}

// work lets a client begin.
func (r *faultRun) work(name string, find func(context.Context) (string, error)) *appclient.Client {
	r.t.Helper()
	c, err := appclient.Start(r.t.Context(), appclient.Config{Name: name, Find: find, Dial: r.Dial, Rest: 2 * time.Millisecond, Timeout: 2 * time.Second})
	require.NoError(r.t, err)
	r.t.Cleanup(c.Stop)
	return c
}

// find asks the source where the application is.
func (r *faultRun) find(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	in, err := r.a.Client.Instance(ctx, r.in.ID)
	if err != nil {
		return "", err
	}
	if in.Moved != nil {
		return r.b.Address(api.Instance{Endpoints: in.Moved.Endpoints}), nil
	}
	return r.at, nil
}

// there is the id that the instance has at the destination.
func (r *faultRun) there() string { return r.handoff[:12] }

// handOff begins the handoff. rounds is as in api.HandOff.
func (r *faultRun) handOff(rounds int) {
	r.t.Helper()
	op, err := r.a.Client.HandOff(r.t.Context(), api.HandOff{Instance: r.in.ID, To: r.between.To, Token: r.b.Peer, Rounds: rounds})
	require.NoError(r.t, err)
	r.follow(op.Target.ID, op.ID)
}

func (r *faultRun) follow(handoff, operation string) {
	r.handoff, r.operation = handoff, operation
	r.witness = r.watch()
}

// stop holds what passes once at is true of it.
func (r *faultRun) stop(at func(cloudlets.Passing) bool) *cloudlets.Stop {
	s := r.between.Stop(at)
	r.stops = append(r.stops, s)
	return s
}

// say logs a step with the time since the begin.
func (r *faultRun) say(what string) {
	r.t.Helper()
	r.t.Logf("%5.1f s %s", time.Since(r.began).Seconds(), what)
}

func (r *faultRun) await(s *cloudlets.Stop) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), momentBound)
	defer cancel()
	_, err := s.Await(ctx)
	require.NoError(r.t, err, "the moment did not come: %s", r.stands())
	r.say("held")
}

// stands says how the handoff stands, for messages.
func (r *faultRun) stands() string {
	var out []string
	for _, c := range r.Cloudlets {
		h, err := c.Client.Handoff(context.WithoutCancel(r.t.Context()), r.handoff)
		text, _ := json.Marshal(h) // strings and numbers
		out = append(out, fmt.Sprintf("%s: %s (%v)", c.Name, text, err))
	}
	return strings.Join(out, "; ")
}

// until waits until f is true.
func (r *faultRun) until(what string, f func() bool) {
	r.t.Helper()
	for end := time.Now().Add(faultBound); !f(); time.Sleep(30 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("%s: not within %v; %s", what, faultBound, r.stands())
		}
	}
}

// status is the handoff as a cloudlet sees it; zero while that cannot be known.
func (r *faultRun) status(c *cloudlets.Cloudlet) api.Handoff {
	h, err := c.Client.Handoff(r.t.Context(), r.handoff)
	if err != nil {
		return api.Handoff{}
	}
	return h
}

// state is what an instance does; "" while that cannot be known, or if there is none.
func (r *faultRun) state(c *cloudlets.Cloudlet, id string) api.State {
	in, err := c.Client.Instance(r.t.Context(), id)
	if err != nil {
		return ""
	}
	return in.State
}

// ended waits for the end of the operation, through restarts of the daemon.
func (r *faultRun) ended() (op api.Operation) {
	r.t.Helper()
	r.until("the operation ends", func() bool {
		var err error
		op, err = r.a.Client.Operation(r.t.Context(), r.operation)
		return err == nil && op.State.Ended()
	})
	return op
}

// process returns the pid of an instance's QEMU or mount, as its command line and folder say.
func (r *faultRun) process(c *cloudlets.Cloudlet, what string) int {
	r.t.Helper()
	var pids []int
	for pid := range cloudlets.Processes(c.State) {
		args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			continue
		}
		words := strings.Split(string(args), "\x00")
		name := filepath.Base(words[0])
		switch {
		case what == "qemu" && strings.HasPrefix(name, "qemu-system"):
			pids = append(pids, pid)
		case what == "mount" && !strings.HasPrefix(name, "qemu-") && len(words) > 1 && contains(words[1:], "mount"):
			pids = append(pids, pid)
		}
	}
	require.Len(r.t, pids, 1, "%s of cloudlet %s", what, c.Name)
	return pids[0]
}

func contains(words []string, word string) bool {
	for _, w := range words {
		if w == word {
			return true
		}
	}
	return false
}

// answers reports whether an application answers a request that is sent now.
func (r *faultRun) answers(ctx context.Context, address string) bool {
	if address == "" {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/healthz", nil)
	if err != nil {
		return false
	}
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		return r.Dial(ctx, network, address)
	}}}
	resp, err := c.Do(req)
	if err != nil {
		return false
	}
	resp.Body.Close()
	return resp.StatusCode == http.StatusOK
}

// witness looks whether the guest runs in two places: once it has been seen to run at the
// destination, it must not run at the source.
type witness struct {
	stop context.CancelFunc
	done sync.WaitGroup

	mu    sync.Mutex
	there string // address at the destination
	twice string
}

func (r *faultRun) watch() *witness {
	w := &witness{}
	ctx, stop := context.WithCancel(context.WithoutCancel(r.t.Context()))
	w.stop = stop
	w.done.Go(func() {
		ran := false
		for ctx.Err() == nil {
			there, err := r.b.Client.Instance(ctx, r.there())
			if err == nil && there.State == api.Running && !strings.Contains(there.Reason, "not answer") {
				ran = true
			}
			if address := r.b.Address(there); err == nil && address != "" {
				w.mu.Lock()
				w.there = address
				w.mu.Unlock()
				ran = ran || r.answers(ctx, address)
			}
			if ran {
				here, err := r.a.Client.Instance(ctx, r.in.ID)
				runs := err == nil && here.State == api.Running && !strings.Contains(here.Reason, "not answer")
				if (runs || r.answers(ctx, r.at)) && ctx.Err() == nil {
					w.mu.Lock()
					w.twice = fmt.Sprintf("after the guest ran at the destination it runs at the source: %s %s", here.State, here.Reason)
					w.mu.Unlock()
				}
			}
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
		}
	})
	return w
}

// requireOnce ends the witness, before an operator decides or at the end.
func (r *faultRun) requireOnce() {
	r.t.Helper()
	if r.witness == nil {
		return
	}
	r.witness.stop()
	r.witness.done.Wait()
	require.Empty(r.t, r.witness.twice)
}

// addressThere is where the application was seen to be at the destination.
func (r *faultRun) addressThere() string {
	r.witness.mu.Lock()
	defer r.witness.mu.Unlock()
	return r.witness.there
}

// requireWhole compares what the client was told, and the application's own data, with what is
// at an address.
func (r *faultRun) requireWhole(address string) {
	r.t.Helper()
	r.client.Stop()
	require.NoError(r.t, r.client.Verify(r.t.Context(), address))
	require.Positive(r.t, r.client.Report().Acknowledged)
	_, err := r.Verify(r.t.Context(), address, r.token)
	require.NoError(r.t, err)
}

// requireAnswers waits until the client is answered again.
func (r *faultRun) requireAnswers(c *appclient.Client) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), answerBound)
	defer cancel()
	require.NoError(r.t, c.Await(ctx, time.Now()), r.stands())
	require.NoError(r.t, c.Err())
}

// requireNothingAt requires that a cloudlet has no instance, process, mount or published or
// fetched file of the handoff.
func (r *faultRun) requireNothingAt(c *cloudlets.Cloudlet) {
	r.t.Helper()
	var left []string
	r.until("nothing is left at "+c.Name, func() bool {
		left = r.left(c)
		return len(left) == 0 || r.t.Failed()
	})
	require.Empty(r.t, left)
}

func (r *faultRun) left(c *cloudlets.Cloudlet) (left []string) {
	for _, what := range cloudlets.Leftovers(c.State) {
		if !strings.Contains(what, " serve ") && !strings.Contains(what, "serve\x00") {
			left = append(left, what)
		}
	}
	return append(left, r.files(c)...)
}

// files lists the overlays that a handoff has published or brought.
func (r *faultRun) files(c *cloudlets.Cloudlet) (left []string) {
	dirs, _ := filepath.Glob(c.Path("handoffs", r.handoff, "*")) // the pattern is right
	for _, d := range dirs {
		if info, err := os.Stat(d); err == nil && info.IsDir() {
			left = append(left, d)
		}
	}
	return left
}

// requireWithdrawn requires that no URL that was published leads anywhere.
func (r *faultRun) requireWithdrawn() {
	r.t.Helper()
	r.until("what was published is removed", func() bool { return len(r.files(r.a)) == 0 })
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		return r.Dial(ctx, network, address)
	}}}
	for _, u := range r.between.Published() {
		resp, err := c.Get(u)
		require.NoError(r.t, err)
		resp.Body.Close()
		require.Equal(r.t, http.StatusNotFound, resp.StatusCode, u)
	}
}

// end lets go of all that is held, mends what is broken, and removes the instances. Nothing
// may be left.
func (r *faultRun) end() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.t.Context()), faultBound)
	defer cancel()
	if r.t.Failed() && r.handoff != "" {
		r.t.Log(r.stands())
	}
	for _, s := range r.stops {
		s.Release(true)
	}
	r.between.HoldTails(false)
	if err := r.Cut(r.a, r.b, false); err != nil {
		r.t.Error(err)
	}
	r.client.Stop()
	r.requireOnce()
	for _, c := range r.Cloudlets {
		var list []api.Instance
		if err := c.CLI(ctx, &list, "ps", "--all"); err != nil {
			r.t.Error(err)
		}
		for _, in := range list {
			if err := c.CLI(ctx, nil, "rm", "--force", in.ID); err != nil {
				r.t.Error(err)
			}
		}
	}
	if r.t.Failed() {
		return
	}
	for _, c := range r.Cloudlets {
		r.requireNothingAt(c)
	}
}

// fillDisk takes the room of a cloudlet's disk and returns what gives it back.
func (r *faultRun) fillDisk(c *cloudlets.Cloudlet) (free func()) {
	r.t.Helper()
	path := c.Path("ballast")
	f, err := os.Create(path)
	require.NoError(r.t, err)
	defer f.Close()
	for step := int64(1 << 20); step >= 4096; {
		info, err := f.Stat()
		require.NoError(r.t, err)
		if err := unix.Fallocate(int(f.Fd()), 0, info.Size(), step); err != nil {
			require.ErrorIs(r.t, err, unix.ENOSPC)
			step /= 16
		}
	}
	return func() { require.NoError(r.t, os.RemoveAll(path)) }
}

// messageOf is true of a message on its way there.
func messageOf(k handoff.Kind) func(cloudlets.Passing) bool {
	return func(p cloudlets.Passing) bool { return p.Message.Kind == k && p.Answer == nil }
}

// answerOf is true of an answer on its way back.
func answerOf(k handoff.Kind, st handoff.State) func(cloudlets.Passing) bool {
	return func(p cloudlets.Passing) bool { return p.Message.Kind == k && p.Answer != nil && p.Answer.State == st }
}
