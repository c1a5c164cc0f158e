package cloudlets

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cloudlet/integration/guest/table"
	"cloudlet/integration/link"
	"cloudlet/integration/need"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// listen answers each connection to a namespace's address with text and zeros, until the test
// ends.
func listen(t *testing.T, n *link.Namespace, address, text string, zeros int) {
	t.Helper()
	var l net.Listener
	require.NoError(t, n.Do(func() (err error) {
		l, err = net.Listen("tcp4", address)
		return err
	}))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write(append([]byte(text), make([]byte, zeros)...)) // the client looks
			c.Close()
		}
	}()
	t.Cleanup(func() {
		require.NoError(t, l.Close())
		<-ended
	})
}

// What should come is waited for long, what should not come briefly.
const (
	longBound  = 30 * time.Second
	shortBound = 500 * time.Millisecond
)

// TestNetwork: cloudlets and clients reach each other, over what Network asks for.
func TestNetwork(t *testing.T) {
	need.No(t, link.Probe(), link.ErrUnavailable)
	const most = 4 << 20 // bytes in a transfer
	for _, test := range []struct {
		name  string
		n     Network
		zeros int
		least time.Duration // for a transfer between cloudlets
	}{
		{"as fast as the host", Network{}, most, 0},
		{"a rate", Network{Rate: 50 * mbit}, most, 500 * time.Millisecond},
		{"a rate and a delay", Network{Rate: 50 * mbit, Delay: 10 * time.Millisecond}, most, 600 * time.Millisecond},
		{"a link to cut", Network{Cuttable: true}, most, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			w, err := wire(test.n, 3)
			require.NoError(t, err)
			l := &Lab{network: w, Cloudlets: []*Cloudlet{{Name: "a"}, {Name: "b", index: 1}, {Name: "c", index: 2}}}
			t.Cleanup(func() { require.NoError(t, w.close()) })
			listen(t, w.nodes[1], address(1)+":80", "b", test.zeros)
			ask := func(from *link.Namespace, bound time.Duration) (string, error) {
				ctx, cancel := context.WithTimeout(t.Context(), bound)
				defer cancel()
				c, err := dialFrom(ctx, from, "tcp", address(1)+":80")
				if err != nil {
					return "", err
				}
				defer c.Close()
				b, err := io.ReadAll(c)
				require.Len(t, b, 1+test.zeros)
				return string(b[:1]), err
			}
			get := func(from *link.Namespace) (string, error) { return ask(from, longBound) }
			said, err := get(w.clients)
			require.NoError(t, err)
			require.Equal(t, "b", said)
			for _, from := range []int{0, 2} {
				begin := time.Now()
				said, err = get(w.nodes[from])
				require.NoError(t, err)
				require.Equal(t, "b", said)
				require.Greater(t, time.Since(begin), test.least)
			}
			carried, err := l.Carried()
			require.NoError(t, err)
			require.Greater(t, carried, int64(2*test.zeros))
			require.Less(t, carried, int64(2.2*float64(test.zeros)), "what the clients were sent does not count")
			if !test.n.linked() {
				require.ErrorContains(t, l.Cut(l.Cloudlets[0], l.Cloudlets[1], true), "Cuttable")
				return
			}
			require.NoError(t, l.Cut(l.Cloudlets[1], l.Cloudlets[0], true))
			_, err = ask(w.nodes[0], shortBound)
			require.Error(t, err)
			for _, from := range []*link.Namespace{w.nodes[2], w.clients} {
				_, err = get(from)
				require.NoError(t, err, "only one link is cut")
			}
			require.NoError(t, l.Cut(l.Cloudlets[0], l.Cloudlets[1], false))
			_, err = get(w.nodes[0])
			require.NoError(t, err)
		})
	}
	_, err := FindNetwork("5g")
	require.ErrorContains(t, err, "local, 1g, 38m")
}

// TestLeftovers: what works below a folder is found, and of it the program's processes are
// ended, no others.
func TestLeftovers(t *testing.T) {
	need.No(t, link.Probe(), link.ErrUnavailable) // that is root
	sleep, err := exec.LookPath("sleep")
	require.NoError(t, err)
	program := filepath.Join(t.TempDir(), "program")
	b, err := os.ReadFile(sleep)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(program, b, 0o700))
	state := filepath.Join(t.TempDir(), "a")
	require.NoError(t, os.MkdirAll(filepath.Join(state, "tmp", "half"), 0o700))
	require.NoError(t, os.MkdirAll(filepath.Join(state, "mnt"), 0o700))
	start := func(path, dir string) *exec.Cmd {
		cmd := exec.Command(path, "1000")
		cmd.Dir = dir
		require.NoError(t, cmd.Start())
		t.Cleanup(func() {
			_ = cmd.Process.Kill() // it may have ended
			_ = cmd.Wait()         // by a signal
		})
		return cmd
	}
	ours, others, beside := start(program, filepath.Join(state, "tmp")), start(sleep, filepath.Join(state, "tmp")), start(program, filepath.Dir(state))
	require.NoError(t, exec.Command("mount", "-t", "tmpfs", "none", filepath.Join(state, "mnt")).Run())
	left := strings.Join(Leftovers(state), "\n")
	require.Contains(t, left, "mount "+filepath.Join(state, "mnt"))
	require.Contains(t, left, "tmp/half")
	require.Contains(t, left, program+" 1000")
	require.Contains(t, left, sleep+" 1000")

	gone := make(chan error, 1)
	go func() { gone <- ours.Wait() }()
	require.NoError(t, sweep(t.Context(), program, state))
	require.ErrorContains(t, <-gone, "killed")
	require.Contains(t, Processes(state), others.Process.Pid)
	require.Contains(t, Processes(filepath.Dir(state)), beside.Process.Pid)
	left = strings.Join(Leftovers(state), "\n")
	require.NotContains(t, left, "mount")
	require.NotContains(t, left, program)
}

func TestCheck(t *testing.T) {
	good := Verified{Token: "t", Table: "table", File: "file", Cargo: &Cargo{Seed: "s", MiB: 1, Steps: 5, Sum: table.NewCargo("s", 1).Sum(5)}}
	require.NoError(t, good.check("t", "table", "file"))
	require.NoError(t, good.check("", "table", "file"))
	require.ErrorContains(t, good.check("u", "table", "file"), "started anew")
	for says, change := range map[string]func(*Verified){
		"table": func(v *Verified) { v.Table = v.File },
		"file":  func(v *Verified) { v.File = v.Table },
		"cargo": func(v *Verified) { v.Cargo = &Cargo{Seed: "s", MiB: 1, Steps: 4, Sum: good.Cargo.Sum} },
	} {
		bad := good
		change(&bad)
		require.ErrorContains(t, bad.check("t", "table", "file"), says)
	}
}

func TestCopyBases(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(from, "bases", "id"), 0o700))
	for _, name := range []string{"id.json", "id/memory"} {
		require.NoError(t, os.WriteFile(filepath.Join(from, "bases", name), []byte(name), 0o600))
	}
	require.NoError(t, CopyBases(t.Context(), from, to))
	b, err := os.ReadFile(filepath.Join(to, "bases", "id", "memory"))
	require.NoError(t, err)
	require.Equal(t, "id/memory", string(b))
	id, err := onlyBase(to)
	require.NoError(t, err)
	require.Equal(t, "id", id)
	_, err = onlyBase(t.TempDir())
	require.ErrorContains(t, err, "0 bases")
}

func TestReach(t *testing.T) {
	c := &Cloudlet{Host: "10.73.0.1"}
	require.Equal(t, "10.73.0.1:5", c.reach("0.0.0.0:5"))
	require.Equal(t, "10.73.0.2:5", c.reach("10.73.0.2:5"))
}

func TestOpenRefuses(t *testing.T) {
	for says, o := range map[string]Options{"1 to 26": {Count: 0, Dir: t.TempDir()}, "not a directory": {Count: 1, Dir: "/dev/null/x"}} {
		var log bytes.Buffer
		o.Log = &log
		_, err := Open(t.Context(), o)
		require.ErrorContains(t, err, says)
		require.Empty(t, log.String())
	}
}
