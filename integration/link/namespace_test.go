package link

import (
	"fmt"
	"io"
	"net"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"cloudlet/integration/need"
)

// pair is two namespaces, joined, and a server in the second that answers each connection
// with text.
func pair(t *testing.T, p Params, text string) (l *Link, a *Namespace, dial func(timeout time.Duration) (net.Conn, error)) {
	t.Helper()
	need.No(t, Probe(), ErrUnavailable)
	ends := make([]End, 2)
	for i := range ends {
		n, err := NewNamespace()
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, n.Close()) })
		ends[i] = End{n, fmt.Sprintf("10.77.0.%d", i+1)}
		require.NoError(t, n.IP("addr", "add", ends[i].Address+"/32", "dev", "lo"))
	}
	l, err := Join(p, ends[0], ends[1])
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, l.Close()) })
	var listener net.Listener
	require.NoError(t, ends[1].Net.Do(func() error {
		listener, err = net.Listen("tcp4", ends[1].Address+":0")
		return err
	}))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, text+c.RemoteAddr().(*net.TCPAddr).IP.String()) // the client looks
			c.Close()
		}
	}()
	t.Cleanup(func() {
		require.NoError(t, listener.Close())
		<-ended
	})
	return l, ends[0].Net, func(timeout time.Duration) (c net.Conn, err error) {
		err = ends[0].Net.Do(func() error {
			c, err = net.DialTimeout("tcp4", listener.Addr().String(), timeout)
			return err
		})
		return c, err
	}
}

// TestJoin: connections between the namespaces cross the link with their own addresses, and
// there is no other way.
func TestJoin(t *testing.T) {
	l, a, dial := pair(t, Params{Rate: 100 * mbit, Delay: 10 * time.Millisecond}, "hello ")
	begin := time.Now()
	c, err := dial(waitBound)
	require.NoError(t, err)
	require.GreaterOrEqual(t, time.Since(begin), 20*time.Millisecond)
	said, err := io.ReadAll(c)
	require.NoError(t, err)
	require.NoError(t, c.Close())
	require.Equal(t, "hello 10.77.0.1", string(said))
	require.Positive(t, l.Stats().Down.Bytes)
	require.Positive(t, l.Stats().Up.Bytes)

	l.Cut(true)
	_, err = dial(100 * time.Millisecond)
	require.Error(t, err)
	l.Cut(false)
	c, err = dial(waitBound)
	require.NoError(t, err)
	require.NoError(t, c.Close())

	require.NoError(t, a.Do(func() error { // programs start in the namespace, too
		out, err := exec.Command("ip", "-o", "-4", "addr").CombinedOutput()
		require.Contains(t, string(out), "10.77.0.1")
		return err
	}))
	out, err := exec.Command("ip", "-o", "-4", "addr").CombinedOutput()
	require.NoError(t, err)
	require.NotContains(t, string(out), "10.77.0.1")
}

func TestJoinRefuses(t *testing.T) {
	_, err := Join(Params{Congestion: "cubic"}, End{}, End{})
	require.ErrorContains(t, err, "Congestion")
}

// TestJoinRefusesAddress: an address that no device has.
func TestJoinRefusesAddress(t *testing.T) {
	need.No(t, Probe(), ErrUnavailable)
	n, err := NewNamespace()
	require.NoError(t, err)
	_, err = Join(Params{}, End{n, "10.77.0.1"}, End{n, "10.77.0.2"})
	require.ErrorContains(t, err, "10.77.0.1")
	require.NoError(t, n.Close())
	require.True(t, strings.HasPrefix(n.Path(), "/proc/"))
}

const waitBound = 10 * time.Second
