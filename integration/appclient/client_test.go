package appclient

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"cloudlet/integration/guest/table"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const waitBound = 20 * time.Second

// application answers as the test guest's does, or does wrong on demand.
type application struct {
	mu           sync.Mutex
	token        string
	requests     int64
	memory, file map[string][]int64
	answering    atomic.Int64 // requests so far
	wrong        func(a *application, client string, n int64, out *answer)
	broken       func(a *application) // before /journal is answered
	gate         func(r *http.Request) bool
}

func newApplication() *application {
	return &application{token: "t", memory: map[string][]int64{}, file: map[string][]int64{}}
}

func sumOf(client string, list []int64) string {
	var s table.Sum
	for _, n := range list {
		s = s.Next(client, n)
	}
	return s.String()
}

func (a *application) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if a.gate != nil && !a.gate(r) {
		panic(http.ErrAbortHandler)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	client := r.FormValue("client")
	if r.URL.Path == "/journal" {
		if a.broken != nil {
			a.broken(a)
		}
		_ = json.NewEncoder(w).Encode(journal{client, listed{a.memory[client], sumOf(client, a.memory[client])}, listed{a.file[client], sumOf(client, a.file[client])}})
		return
	}
	n, _ := strconv.ParseInt(r.FormValue("n"), 10, 64)
	a.answering.Add(1)
	switch count := int64(len(a.memory[client])); {
	case n > count+1:
		http.Error(w, fmt.Sprintf("there are %d", count), http.StatusConflict)
		return
	case n == count+1:
		a.memory[client] = append(a.memory[client], n)
		a.file[client] = append(a.file[client], n)
	}
	a.requests++
	out := answer{a.token, a.requests, client, int64(len(a.memory[client])), sumOf(client, a.memory[client]), sumOf(client, a.file[client])}
	if a.wrong != nil {
		a.wrong(a, client, n, &out)
	}
	_ = json.NewEncoder(w).Encode(out)
}

// serve runs an application and returns its address.
func serve(t *testing.T, a *application) string {
	t.Helper()
	s := httptest.NewServer(a)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func fixed(address string) func(context.Context) (string, error) {
	return func(context.Context) (string, error) { return address, nil }
}

// TestRight: an application that does right has no faults, whatever the network does.
func TestRight(t *testing.T) {
	a := newApplication()
	var i atomic.Int64
	a.gate = func(r *http.Request) bool { return r.URL.Path == "/journal" || i.Add(1)%5 != 0 } // each fifth is cut off
	address := serve(t, a)
	c, err := Start(t.Context(), Config{Name: "c", Workers: 3, Find: fixed(address)})
	require.NoError(t, err)
	require.Eventually(t, func() bool { return c.Report().Acknowledged > 200 }, waitBound, time.Millisecond)
	c.Stop()
	require.NoError(t, c.Verify(t.Context(), address))
	r := c.Report()
	require.Positive(t, r.Repeated)
	require.Zero(t, r.Moves)
	require.Empty(t, r.Faults)
}

// TestFaults: what an application loses or does twice is noticed.
func TestFaults(t *testing.T) {
	const when = 30
	once := func(f func(a *application, client string, out *answer)) func(*application, string, int64, *answer) {
		return func(a *application, client string, n int64, out *answer) {
			if n == when {
				f(a, client, out)
			}
		}
	}
	forget := func(list map[string][]int64, client string, n int) {
		list[client] = list[client][:len(list[client])-n]
	}
	for _, test := range []struct {
		name, says string
		wrong      func(*application, string, int64, *answer)
		broken     func(*application)
	}{
		{name: "one is lost after it was acknowledged", says: "record 31 was refused", wrong: once(func(a *application, c string, _ *answer) {
			forget(a.memory, c, 1)
			forget(a.file, c, 1)
		})},
		{name: "all goes back", says: "record 31 was refused", wrong: once(func(a *application, c string, _ *answer) {
			forget(a.memory, c, 20)
			forget(a.file, c, 20)
			a.requests -= 20
		})},
		{name: "requests are forgotten", says: "it went back", wrong: once(func(a *application, _ string, _ *answer) { a.requests -= 10 })},
		{name: "the count is lower", says: "there are 29 records", wrong: once(func(_ *application, _ string, out *answer) { out.Count-- })},
		{name: "one counts twice", says: "there are 31 records", wrong: once(func(_ *application, _ string, out *answer) { out.Count++ })},
		{name: "the file lacks it", says: "checksum in the file", wrong: once(func(a *application, c string, out *answer) {
			forget(a.file, c, 1)
			out.File = sumOf(c, a.file[c])
		})},
		{name: "memory lacks it", says: "checksum in memory", wrong: once(func(_ *application, c string, out *answer) { out.Memory = sumOf(c, upTo(when-1)) })},
		{name: "another application", says: "by application other", wrong: once(func(a *application, _ string, out *answer) { a.token, out.Token = "other", "other" })},
		{name: "another client's", says: "as one of client x", wrong: once(func(_ *application, _ string, out *answer) { out.Client = "x" })},
		{name: "the file is short at the end", says: "the file has", broken: func(a *application) { forget(a.file, "c0", 2) }},
		{name: "memory is short at the end", says: "memory has", broken: func(a *application) { forget(a.memory, "c0", 2) }},
		{name: "both are, by the last one", says: "were acknowledged", broken: func(a *application) {
			forget(a.file, "c0", 2)
			forget(a.memory, "c0", 2)
		}},
		{name: "one is there twice", says: "the 6th is 5", broken: func(a *application) {
			for _, list := range []map[string][]int64{a.memory, a.file} {
				list["c0"] = slices.Insert(list["c0"], 5, 5)
			}
		}},
		{name: "two too many", says: "were acknowledged", broken: func(a *application) {
			for _, list := range []map[string][]int64{a.memory, a.file} {
				list["c0"] = upTo(int64(len(list["c0"]) + 2))
			}
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := newApplication()
			a.wrong, a.broken = test.wrong, test.broken
			address := serve(t, a)
			c, err := Start(t.Context(), Config{Name: "c", Find: fixed(address)})
			require.NoError(t, err)
			require.Eventually(t, func() bool { return a.answering.Load() > 2*when || c.Err() != nil }, waitBound, time.Millisecond)
			c.Stop()
			if test.broken != nil {
				require.NoError(t, c.Err())
			}
			require.ErrorContains(t, c.Verify(t.Context(), address), test.says)
		})
	}
}

// TestMove: the application stands still, moves with all that it has, and is found again; the
// gap is that long.
func TestMove(t *testing.T) {
	still := 300 * time.Millisecond
	one, two := newApplication(), newApplication()
	hang := make(chan struct{})
	var paused atomic.Bool
	one.gate = func(r *http.Request) bool {
		if paused.Load() {
			<-hang // no answer, and the connection stays
			return false
		}
		return true
	}
	addresses := []string{serve(t, one), serve(t, two)}
	t.Cleanup(func() { close(hang) })
	var at atomic.Int64
	c, err := Start(t.Context(), Config{Name: "c", Workers: 2, Timeout: waitBound, Find: func(context.Context) (string, error) { return addresses[at.Load()], nil }})
	require.NoError(t, err)
	require.NoError(t, c.Await(t.Context(), time.Now()))
	quiet := time.Now()

	begin := time.Now()
	paused.Store(true)
	time.Sleep(still) // what is measured
	one.mu.Lock()
	two.memory, two.file, two.requests = one.memory, one.file, one.requests
	one.mu.Unlock()
	at.Store(1)
	resumed := time.Now()
	require.NoError(t, c.Await(t.Context(), resumed))
	silence := c.Gap(begin, time.Now())
	require.True(t, silence.Found.After(resumed) && silence.Found.Before(silence.End))
	gap := silence.Length()
	require.GreaterOrEqual(t, gap, still-10*time.Millisecond)
	require.Less(t, gap, time.Since(begin)+time.Second)
	require.Less(t, c.Gap(quiet.Add(-time.Hour), quiet.Add(-time.Minute)).Length(), still, "nothing was then")
	require.NoError(t, c.Await(t.Context(), time.Now()))
	c.Stop()
	require.NoError(t, c.Verify(t.Context(), addresses[1]))
	require.EqualValues(t, 2, c.Report().Moves)
	require.Error(t, c.Verify(t.Context(), "127.0.0.1:1"))
}

// TestMoveToSlow: a new place that takes long to answer is asked once, however often the client
// is told of it meanwhile, and by questions from before that are answered late.
func TestMoveToSlow(t *testing.T) {
	one, two := newApplication(), newApplication()
	hang := make(chan struct{})
	var paused atomic.Bool
	one.gate = func(*http.Request) bool {
		if paused.Load() {
			<-hang
			return false
		}
		return true
	}
	two.gate = func(*http.Request) bool {
		time.Sleep(200 * time.Millisecond) // the time that it takes
		return true
	}
	addresses := []string{serve(t, one), serve(t, two)}
	t.Cleanup(func() { close(hang) })
	var at, asked atomic.Int64
	c, err := Start(t.Context(), Config{Name: "c", Timeout: waitBound, Find: func(ctx context.Context) (string, error) {
		address := addresses[at.Load()]
		if asked.Add(1)%2 == 0 {
			pause(ctx, 60*time.Millisecond)
		}
		return address, nil
	}})
	require.NoError(t, err)
	require.NoError(t, c.Await(t.Context(), time.Now()))
	paused.Store(true)
	require.Eventually(t, func() bool { return asked.Load() > 3 }, waitBound, time.Millisecond, "it looks during a silence")
	one.mu.Lock()
	two.memory, two.file, two.requests = one.memory, one.file, one.requests
	one.mu.Unlock()
	before := c.Report().Acknowledged
	at.Store(1)
	require.Eventually(t, func() bool { return c.Report().Acknowledged > before+3 }, waitBound, time.Millisecond)
	c.Stop()
	require.NoError(t, c.Verify(t.Context(), addresses[1]))
	require.EqualValues(t, 1, c.Report().Moves)
	require.EqualValues(t, 1, c.Report().Repeated)
}

// TestAwaitEnds: who waits for answers that do not come is told why.
func TestAwaitEnds(t *testing.T) {
	c, err := Start(t.Context(), Config{Name: "c", Find: fixed("127.0.0.1:1")})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	require.ErrorContains(t, c.Await(ctx, time.Now()), "refused")
	c.Stop()
	require.ErrorContains(t, c.Await(t.Context(), time.Now()), "ended")
	require.NoError(t, c.Err())

	_, err = Start(t.Context(), Config{Find: func(context.Context) (string, error) { return "", errors.New("nowhere") }})
	require.ErrorContains(t, err, "nowhere")
}
