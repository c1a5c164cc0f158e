package vmm

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const greeting = `{"QMP": {"version": {}, "capabilities": []}}` + "\n"

// fakeMonitor listens in a folder with a long path and lets serve answer each client.
func fakeMonitor(t *testing.T, serve func(net.Conn)) (dir string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), strings.Repeat("long", 40))
	require.NoError(t, os.Mkdir(dir, 0o700))
	d, err := os.Open(dir)
	require.NoError(t, err)
	defer d.Close()
	l, err := net.Listen("unix", fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), qmpSocket))
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serve(conn)
			_ = conn.Close()
		}
	})
	t.Cleanup(func() { _ = l.Close(); wg.Wait() })
	return dir
}

// answers serves a client: each command gets what f returns, after a greeting.
func answers(f func(command string, id int) string) func(net.Conn) {
	return commands(func(command string, _ map[string]any, id int) string { return f(command, id) })
}

// commands is answers for a function that looks at the arguments, too.
func commands(f func(command string, args map[string]any, id int) string) func(net.Conn) {
	return func(conn net.Conn) {
		fmt.Fprint(conn, greeting)
		in := bufio.NewScanner(conn)
		for in.Scan() {
			var req struct {
				Execute   string         `json:"execute"`
				Arguments map[string]any `json:"arguments"`
				ID        int            `json:"id"`
			}
			if json.Unmarshal(in.Bytes(), &req) != nil {
				return
			}
			a := fmt.Sprintf(`{"return": {}, "id": %d}`, req.ID)
			if req.Execute != "qmp_capabilities" {
				a = f(req.Execute, req.Arguments, req.ID)
			}
			if a == "" {
				return
			}
			fmt.Fprintln(conn, a)
		}
	}
}

// idsOf returns a function that returns the id of a client's next command.
func idsOf(conn net.Conn) func() int {
	in := json.NewDecoder(conn)
	return func() int {
		var req struct{ ID int }
		_ = in.Decode(&req)
		return req.ID
	}
}

func TestQMP(t *testing.T) {
	dir := fakeMonitor(t, answers(func(command string, id int) string {
		switch command {
		case "query-status":
			return fmt.Sprintf("{\"event\": \"STOP\"}\n{\"event\":\"RESUME\",\"data\":{\"id\":1}}\n{\"return\": {\"status\": \"paused\"}, \"id\": %d}", id)
		case "cont":
			return fmt.Sprintf(`{"error": {"class": "GenericError", "desc": "no"}, "id": %d}`, id)
		}
		return fmt.Sprintf(`{"return": {}, "id": %d}`, id)
	}))
	c, err := dialQMP(t.Context(), dir)
	require.NoError(t, err)
	defer c.close()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if s, err := c.runState(t.Context()); err != nil || s != "paused" {
				t.Errorf("state %q, %v", s, err)
			}
		})
	}
	wg.Wait()
	err = c.execute(t.Context(), "cont", nil, nil)
	var refused *QMPError
	require.ErrorAs(t, err, &refused)
	require.Equal(t, QMPError{"cont", "GenericError", "no"}, *refused)
	var wrong int
	require.ErrorContains(t, c.execute(t.Context(), "stop", nil, &wrong), "parse answer")
}

// Answers to commands of clients that have left are passed over.
func TestQMPAnswersOfOthers(t *testing.T) {
	dir := fakeMonitor(t, answers(func(_ string, id int) string {
		return fmt.Sprintf(`{"return": {"status": "stale"}, "id": %d}
{"error": {"class": "GenericError", "desc": "stale"}, "id": %d}
{"return": {"status": "paused"}, "id": %d}`, id-5*qmpIDs, id+5*qmpIDs, id)
	}))
	ids := map[int]bool{}
	for range 3 {
		c, err := dialQMP(t.Context(), dir)
		require.NoError(t, err)
		s, err := c.runState(t.Context())
		require.NoError(t, err)
		require.Equal(t, "paused", s)
		ids[c.transport.(*socket).last] = true
		require.NoError(t, c.close())
	}
	require.Len(t, ids, 3)
}

// TestQMPNegotiatedByAnother: the negotiation that a client left behind is run for the next.
func TestQMPNegotiatedByAnother(t *testing.T) {
	dir := fakeMonitor(t, func(conn net.Conn) {
		id := idsOf(conn)
		fmt.Fprintln(conn, `{"return": {}, "id": 7}`)
		fmt.Fprintln(conn, `{"event": "STOP"}`)
		fmt.Fprint(conn, greeting)
		ours := id()
		fmt.Fprintf(conn, "{\"return\": {}, \"id\": %d}\n", ours-5*qmpIDs)
		fmt.Fprintf(conn, "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"Capabilities negotiation is already complete, command ignored\"}, \"id\": %d}\n", ours)
		fmt.Fprintf(conn, "{\"return\": {\"status\": \"paused\"}, \"id\": %d}\n", id())
	})
	c, err := dialQMP(t.Context(), dir)
	require.NoError(t, err)
	defer c.close()
	s, err := c.runState(t.Context())
	require.NoError(t, err)
	require.Equal(t, "paused", s)
}

// TestCommitOfLayerInUse: a layer that another process reads for a moment is waited for; other
// refusals are not.
func TestCommitOfLayerInUse(t *testing.T) {
	refusals := []string{ // as QEMU 7.2 words them
		`Failed to get \"write\" lock`,
		`Failed to get shared \"write\" lock`,
		`Failed to get shared \"consistent read\" lock`,
	}
	var asked atomic.Int64
	dir := fakeMonitor(t, answers(func(_ string, id int) string {
		desc := "Job ID 'release' already in use"
		switch n := int(asked.Add(1)); {
		case n <= len(refusals):
			desc = refusals[n-1]
		case n == len(refusals)+1:
			return fmt.Sprintf(`{"return": {}, "id": %d}`, id)
		}
		return fmt.Sprintf(`{"error": {"class": "GenericError", "desc": "%s"}, "id": %d}`, desc, id)
	}))
	c, err := dialQMP(t.Context(), dir)
	require.NoError(t, err)
	defer c.close()
	require.NoError(t, beginCommit(t.Context(), c, nil))
	require.EqualValues(t, len(refusals)+1, asked.Load())
	require.ErrorContains(t, beginCommit(t.Context(), c, nil), "already in use")
	require.EqualValues(t, len(refusals)+2, asked.Load())
}

func TestQMPMisbehaves(t *testing.T) {
	for name, serve := range map[string]func(net.Conn){
		"closes at once": func(net.Conn) {},
		"no greeting":    func(c net.Conn) { fmt.Fprintln(c, `{"return": {}}`) },
		"garbage":        func(c net.Conn) { fmt.Fprintln(c, "HTTP/1.1 400 Bad Request") },
		"cut greeting":   func(c net.Conn) { fmt.Fprint(c, `{"QMP": {`) },
		"endless line": func(c net.Conn) {
			b := make([]byte, 1<<20)
			for range 20 {
				if _, err := c.Write(b); err != nil {
					return
				}
			}
		},
		"closes later":     answers(func(string, int) string { return "" }),
		"garbage later":    answers(func(string, int) string { return "?" }),
		"another's answer": answers(func(_ string, id int) string { return fmt.Sprintf(`{"return": {}, "id": %d}`, id+1) }),
		"no id":            answers(func(string, int) string { return `{"return": {}}` }),
	} {
		t.Run(name, func(t *testing.T) {
			dir := fakeMonitor(t, serve)
			c, err := dialQMP(t.Context(), dir)
			if err == nil {
				defer c.close()
				err = c.execute(t.Context(), "stop", nil, nil)
			}
			require.ErrorIs(t, err, errMonitor)
		})
	}
	_, err := dialQMP(t.Context(), t.TempDir())
	require.ErrorIs(t, err, os.ErrNotExist)
}

// A monitor that does not answer is left when ctx ends, at the greeting or later.
func TestQMPSlow(t *testing.T) {
	release := make(chan struct{})
	silent := func(net.Conn) { <-release }
	mute := answers(func(string, int) string { <-release; return "" })
	for name, serve := range map[string]func(net.Conn){"greeting": silent, "answer": mute} {
		t.Run(name, func(t *testing.T) {
			dir := fakeMonitor(t, serve)
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			c, err := dialQMP(ctx, dir)
			if err == nil {
				defer c.close()
				err = c.execute(ctx, "stop", nil, nil)
			}
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.ErrorIs(t, c.tryAfter(t, ctx), context.DeadlineExceeded)
			release <- struct{}{}
		})
	}
}

func (c *qmp) tryAfter(t *testing.T, ctx context.Context) error {
	if c == nil {
		return ctx.Err()
	}
	return c.execute(ctx, "cont", nil, nil)
}

// The late answer to a command that was given up, even cut in two by the deadline, does not
// disturb the next one.
func TestQMPLateAnswer(t *testing.T) {
	release := make(chan struct{})
	dir := fakeMonitor(t, func(conn net.Conn) {
		id := idsOf(conn)
		fmt.Fprint(conn, greeting)
		fmt.Fprintf(conn, "{\"return\": {}, \"id\": %d}\n", id())
		given := id()
		fmt.Fprint(conn, `{"return": {}, `)
		<-release
		fmt.Fprintf(conn, "\"id\": %d}\n", given)
		fmt.Fprintf(conn, "{\"return\": {\"status\": \"running\"}, \"id\": %d}\n", id())
	})
	c, err := dialQMP(t.Context(), dir)
	require.NoError(t, err)
	defer c.close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, c.execute(ctx, "stop", nil, nil), context.DeadlineExceeded)
	close(release)
	state, err := c.runState(t.Context())
	require.NoError(t, err)
	require.Equal(t, Running, state)
}

// TestStatusOf: a guest that was reset while it was paused is told from one that waits.
func TestStatusOf(t *testing.T) {
	require.Equal(t, Status{State: Running}, statusOf("running"))
	require.Equal(t, Status{State: Paused}, statusOf("paused"))
	off := statusOf("prelaunch")
	require.Equal(t, Paused, off.State)
	require.True(t, off.Reset)
	require.False(t, statusOf("inmigrate").Reset)
	require.Contains(t, statusOf("colo").Reason, "colo")
}
