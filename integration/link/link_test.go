package link

import (
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"cloudlet/integration/need"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const mbit = 1_000_000

// TestRate: a busy transmitter lets bytes out at its rate, and the first after the delay.
func TestRate(t *testing.T) {
	for _, p := range []Params{{Rate: 10 * mbit, Delay: 50 * time.Millisecond}, {Rate: 1000 * mbit, Delay: time.Millisecond}} {
		t.Run(fmt.Sprint(p.Rate), func(t *testing.T) {
			q := newPipe(p, 1)
			var last time.Duration
			const n = 900
			for i := range n {
				out, f := q.admit(0, mtu)
				require.Equal(t, passes, f)
				require.Greater(t, out, last)
				if last = out; i == 0 {
					require.InEpsilon(t, p.Delay+time.Duration(mtu*8*int64(time.Second)/p.Rate), out, 1e-6)
				}
			}
			require.InEpsilon(t, float64(n*mtu*8)/float64(p.Rate), (last - p.Delay).Seconds(), 1e-3)
		})
	}
}

// TestQueue: what the queue has no room for is dropped, and there is room again later.
func TestQueue(t *testing.T) {
	q := newPipe(Params{Rate: 12 * mbit, Queue: 10 * mtu}, 1) // a packet takes 1 ms
	for range 10 {
		_, f := q.admit(0, mtu)
		require.Equal(t, passes, f)
	}
	_, f := q.admit(0, mtu)
	require.Equal(t, dropped, f)
	out, f := q.admit(time.Millisecond, mtu)
	require.Equal(t, passes, f)
	require.Equal(t, 11*time.Millisecond, out)
}

// TestLoss: the share of what is lost is that of Params, and the seed decides which.
func TestLoss(t *testing.T) {
	fates := func(seed, direction uint64) (list []fate, n int) {
		q := newPipe(Params{Loss: 0.01, Seed: seed}, direction)
		for i := range 100_000 {
			_, f := q.admit(time.Duration(i), mtu)
			if list = append(list, f); f == lost {
				n++
			}
		}
		return list, n
	}
	one, n := fates(1, 1)
	require.InDelta(t, 1000, n, 100)
	again, _ := fates(1, 1)
	require.Equal(t, one, again)
	for _, other := range [][2]uint64{{2, 1}, {1, 2}} {
		list, _ := fates(other[0], other[1])
		require.NotEqual(t, one, list)
	}
}

func TestOnWire(t *testing.T) {
	require.Equal(t, 40, onWire(40))
	require.Equal(t, mtu, onWire(mtu))
	require.Equal(t, 2*mtu, onWire(header+2*(mtu-header)))
	require.Equal(t, 2*mtu+header+1, onWire(header+2*(mtu-header)+1))
}

// up makes a link whose server runs serve for each connection.
func up(t *testing.T, p Params, serve func(net.Conn)) *Link {
	t.Helper()
	need.No(t, Probe(), ErrUnavailable)
	l, err := Up(p)
	require.NoError(t, err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.Listener().Accept()
			if err != nil {
				return
			}
			serve(c)
			c.Close()
		}
	}()
	t.Cleanup(func() {
		require.NoError(t, l.Close())
		<-ended
	})
	return l
}

// trips is how many connections are made to find the time of one, downloads how often a rate
// is measured at most.
const (
	trips     = 5
	downloads = 3
)

// TestTransfer measures what TCP makes of a link: the time of a connection is a round trip,
// and downloads come at the rate once slow start is over.
func TestTransfer(t *testing.T) {
	for _, c := range []struct {
		name string
		p    Params
		n    int64
		less float64 // the share of the rate by which a download may be slower
	}{
		// Here the rate is also that of the host, which tests share.
		{"1 Gbit/s, 1 ms", Params{Rate: 1000 * mbit, Delay: time.Millisecond}, 64 << 20, 0.7},
		{"100 Mbit/s, 5 ms", Params{Rate: 100 * mbit, Delay: 5 * time.Millisecond}, 16 << 20, 0.1},
		{"38 Mbit/s, 20 ms", Params{Rate: 38 * mbit, Delay: 20 * time.Millisecond}, 8 << 20, 0.1},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := up(t, c.p, func(conn net.Conn) { // ends early where nobody reads
				_, _ = io.CopyN(conn, zeros{}, c.n)
			})
			trip := time.Hour
			for range trips {
				begin := time.Now()
				conn, err := net.Dial("tcp", l.Address())
				require.NoError(t, err)
				trip = min(trip, time.Since(begin))
				require.NoError(t, conn.(*net.TCPConn).SetLinger(0))
				require.NoError(t, conn.Close())
			}
			require.GreaterOrEqual(t, trip, 2*c.p.Delay)
			require.Less(t, trip, 2*c.p.Delay*11/10+2*time.Millisecond)
			var rate float64
			for range downloads { // a host that is busy makes a link slower
				if rate = download(t, l, c.n); rate > 0.9*float64(c.p.Rate) {
					break
				}
			}
			t.Logf("a round trip took %v, bytes came at %.1f Mbit/s; %+v", trip, rate/mbit, l.Stats())
			require.Greater(t, rate, (1-c.less)*float64(c.p.Rate))
			require.Less(t, rate, 1.1*float64(c.p.Rate))
		})
	}
}

// download returns the bits a second at which the second half of n bytes comes.
func download(t *testing.T, l *Link, n int64) float64 {
	conn, err := net.Dial("tcp", l.Address())
	require.NoError(t, err)
	defer conn.Close()
	_, err = io.CopyN(io.Discard, conn, n/2)
	require.NoError(t, err)
	begin := time.Now()
	rest, err := io.Copy(io.Discard, conn)
	require.NoError(t, err)
	return float64(rest) * 8 / time.Since(begin).Seconds()
}

// send is how many bytes cross the link of TestLossy.
const send = 4 << 20

// TestLossy: what is lost comes again, and the link tells what it has done.
func TestLossy(t *testing.T) {
	l := up(t, Params{Rate: 100 * mbit, Delay: time.Millisecond, Loss: 0.01, Seed: 7}, func(conn net.Conn) {
		if _, err := io.CopyN(conn, zeros{}, send); err != nil {
			t.Log(err)
		}
	})
	conn, err := net.Dial("tcp", l.Address())
	require.NoError(t, err)
	defer conn.Close()
	n, err := io.Copy(io.Discard, conn)
	require.NoError(t, err)
	require.EqualValues(t, send, n)
	s := l.Stats()
	require.Positive(t, s.Down.Lost)
	require.InDelta(t, 0.01, float64(s.Down.Lost)/float64(s.Down.Packets+s.Down.Lost), 0.006)
	require.GreaterOrEqual(t, s.Down.Bytes, int64(send))
}

// TestDown: a link that was closed carries nothing more, and can be closed again.
func TestDown(t *testing.T) {
	l := up(t, Params{}, func(net.Conn) {})
	address := l.Address()
	require.NoError(t, l.Close())
	require.NoError(t, l.Close())
	_, err := net.DialTimeout("tcp", address, 50*time.Millisecond)
	require.Error(t, err)
	require.False(t, errors.Is(err, io.EOF))
}

// zeros reads as zero bytes without end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }
