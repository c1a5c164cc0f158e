package integration

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"
	"cloudlet/integration/guest"

	"github.com/stretchr/testify/require"
)

// served is a running `cloudlet serve`.
type served struct {
	*client.Client
	cmd   *exec.Cmd
	log   string // path
	ended chan struct{}
}

// serve starts the daemon of the lab's store and waits until it is ready.
func (l *lab) serve(args ...string) *served {
	l.t.Helper()
	d := &served{cmd: l.command(append([]string{"serve"}, args...)...), log: filepath.Join(l.t.TempDir(), "log"), ended: make(chan struct{})}
	f, err := os.Create(d.log)
	require.NoError(l.t, err)
	defer f.Close()
	d.cmd.Stderr = f
	require.NoError(l.t, d.cmd.Start())
	go func() { defer close(d.ended); _ = d.cmd.Wait() }()
	l.t.Cleanup(d.kill)
	d.Client, err = client.New(client.Options{Server: "unix:" + filepath.Join(l.state, "cloudlet.sock")})
	require.NoError(l.t, err)
	l.t.Cleanup(d.Close)
	eventually(l.t, "the daemon does not answer", func() bool {
		select {
		case <-d.ended:
			l.t.Fatalf("the daemon has ended: %s", read(l.t, d.log))
		default:
		}
		_, err := d.Operations(l.t.Context())
		return err == nil
	})
	return d
}

// kill ends the daemon by SIGKILL.
func (d *served) kill() {
	_ = d.cmd.Process.Kill() // it may have ended
	<-d.ended
}

// TestKillDaemon kills the daemon during ten syntheses, at several moments, and sees what its
// next start makes of them.
func TestKillDaemon(t *testing.T) {
	file := launchFile(t)
	l := newLab(t)
	run := api.Run{Ref: file, Probe: &api.Probe{Port: guest.Port, Path: "/healthz"}}
	d := l.serve()
	op, err := d.Run(t.Context(), run) // warms the caches
	require.NoError(t, err)
	op, err = d.Wait(t.Context(), op, nil)
	require.NoError(t, err)
	require.Equal(t, api.OperationDone, op.State)
	d.kill()
	l.clear("after a whole run")

	total := map[api.OperationState]int{}
	for _, after := range []time.Duration{0, 300 * time.Millisecond, 1200 * time.Millisecond, 2500 * time.Millisecond} {
		d := l.serve()
		var begun []api.Operation
		for range 10 {
			op, err := d.Run(t.Context(), run)
			require.NoError(t, err)
			begun = append(begun, op)
		}
		time.Sleep(after) // the moment of the kill
		d.kill()
		d = l.serve()
		states := map[api.OperationState]int{}
		for _, op := range begun {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			end, err := d.Wait(ctx, op, nil)
			cancel()
			require.NoError(t, err)
			require.True(t, end.State.Ended(), end)
			states[end.State]++
			total[end.State]++
			switch end.State {
			case api.OperationDone:
				in, err := client.Result[api.Instance](end)
				require.NoError(t, err)
				now, err := d.Instance(t.Context(), in.ID)
				require.NoError(t, err)
				require.Equal(t, api.Running, now.State)
				ask(t, now, "GET", "/")
			case api.OperationFailed:
				require.Contains(t, end.Error.Detail, "was killed or crashed")
			default:
				t.Fatalf("operation %s is %s", end.ID, end.State)
			}
		}
		living, err := d.Instances(t.Context(), false)
		require.NoError(t, err)
		require.Len(t, living, states[api.OperationDone], "what lives has an operation that says so")
		t.Logf("killed %s after ten requests: %v; the next start said:\n%s", after, states, adopted(string(read(t, d.log))))
		d.kill()
		l.clear(fmt.Sprintf("daemon killed after %s", after))
	}
	require.NotZero(t, total[api.OperationFailed])
}

// adopted returns the lines in which a daemon says what it found.
func adopted(log string) string {
	var out []string
	for line := range strings.Lines(log) {
		if strings.Contains(line, "instance of before") || strings.Contains(line, "dead process") || strings.Contains(line, "taken up") {
			out = append(out, line)
		}
	}
	return strings.Join(out, "")
}
