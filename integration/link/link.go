package link

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// offloadFrom is the rate from which packets cross a link in large pieces.
const offloadFrom = 500_000_000

// Params describe a link. The zero value is as fast as the host.
type Params struct {
	Rate       int64         // bits a second, each way; 0: no limit
	Delay      time.Duration // one way
	Loss       float64       // probability that a packet is lost, each way
	Queue      int           // bytes that wait for the transmitter at most; 0: 1,000 packets of 1,500 bytes
	Seed       uint64        // of the losses
	Congestion string        // of the server's connections; "": cubic
}

func (p Params) offload() bool { return p.Rate == 0 || p.Rate >= offloadFrom }

// Stats count the packets of a link since Up, and their bytes, IP headers included.
type Stats struct {
	Down, Up Count // to the client, to the server
}

// Count counts the packets of one direction.
type Count struct {
	Packets int64 // that came out
	Bytes   int64 // that came out
	Dropped int64 // packets for which the queue had no room
	Lost    int64 // packets, by Params.Loss
}

// Link is a network of two ends. Close it.
type Link struct {
	near, far *os.File
	listener  net.Listener
	down, up  direction
	joined    sync.WaitGroup
	cut       atomic.Bool
	closed    func() error
}

// Up makes a link. The client's end is this process's namespace.
func Up(p Params) (*Link, error) {
	if p.Congestion == "" {
		p.Congestion = "cubic"
	}
	server, client, err := freeNet()
	if err != nil {
		return nil, err
	}
	l := &Link{}
	if err = onThread(func() error { return l.makeFar(server, p.Congestion, p.offload()) }); err == nil {
		l.near, err = makeNear(client, p.offload())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("make link: %w", err), l.closeFiles())
	}
	l.move(p)
	return l, nil
}

// move carries packets between the ends until the link is closed.
func (l *Link) move(p Params) {
	epoch := time.Now()
	for _, d := range []struct {
		d        *direction
		from, to *os.File
		seed     uint64
	}{{&l.down, l.far, l.near, 1}, {&l.up, l.near, l.far, 2}} {
		*d.d = direction{pipe: newPipe(p, d.seed), epoch: epoch, from: d.from, to: d.to, cut: &l.cut, moving: make(chan moving, 1<<16)}
		l.joined.Go(d.d.receive)
		l.joined.Go(d.d.deliver)
	}
	l.closed = sync.OnceValue(func() error {
		err := l.closeFiles()
		l.joined.Wait()
		return err
	})
}

func (l *Link) closeFiles() error {
	var err error
	if l.listener != nil {
		err = ignoreClosed(l.listener.Close()) // an http.Server may have closed it
	}
	for _, f := range []*os.File{l.near, l.far} {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	return err
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// makeFar makes the server's end in a new network namespace.
func (l *Link) makeFar(address, control string, offload bool) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("new network namespace: %w", err)
	}
	f, name, err := openTun("far", offload)
	if err != nil {
		return err
	}
	l.far = f
	if err := setUp(name, address+"/30"); err != nil {
		return err
	}
	config := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if cerr := c.Control(func(fd uintptr) { err = congestion(fd, control) }); cerr != nil {
			return cerr
		}
		return err
	}}
	config.SetMultipathTCP(false)
	l.listener, err = config.Listen(context.Background(), "tcp4", address+":0")
	return err
}

func makeNear(address string, offload bool) (*os.File, error) {
	f, name, err := openTun("cloudlet%d", offload)
	if err != nil {
		return nil, err
	}
	if err := setUp(name, address+"/30"); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// freeNet returns the addresses of a network of two that no device of this host is in.
func freeNet() (server, client string, err error) {
	used := map[string]bool{}
	list, err := net.InterfaceAddrs()
	if err != nil {
		return "", "", err
	}
	for _, a := range list {
		if ip, _, err := net.ParseCIDR(a.String()); err == nil {
			used[ip.String()] = true
		}
	}
	for range 100 {
		n := rand.IntN(1<<17/4) * 4
		ip := func(i int) string { return fmt.Sprintf("198.%d.%d.%d", 18+n>>16, n>>8&255, n&255+i) }
		if server, client = ip(1), ip(2); !used[client] {
			return server, client, nil
		}
	}
	return "", "", errors.New("all networks of 198.18.0.0/15 are in use: remove links that are not needed")
}

// Listener returns the listener at the server's end, which Close closes; Join makes none.
func (l *Link) Listener() net.Listener { return l.listener }

// Address returns host:port of the Listener, as the client calls it.
func (l *Link) Address() string { return l.listener.Addr().String() }

// Stats returns the counts until now.
func (l *Link) Stats() Stats { return Stats{Down: l.down.count(), Up: l.up.count()} }

// Cut makes the link lose all packets, silently, those on their way too, or lets it carry them
// again.
func (l *Link) Cut(cut bool) { l.cut.Store(cut) }

// Close takes the link down: connections over it hang and then fail. The server should be
// closed before.
func (l *Link) Close() error { return l.closed() }

// moving is a packet on its way.
type moving struct {
	out    time.Duration
	packet []byte
}

// direction moves packets from one device to the other.
type direction struct {
	pipe     *pipe
	epoch    time.Time
	from, to *os.File
	cut      *atomic.Bool
	moving   chan moving // in the order of arrival, which is that of their times

	packets, bytes, dropped, lost atomic.Int64
}

func (d *direction) count() Count {
	return Count{Packets: d.packets.Load(), Bytes: d.bytes.Load(), Dropped: d.dropped.Load(), Lost: d.lost.Load()}
}

// receive reads packets until the device is closed.
func (d *direction) receive() {
	defer close(d.moving)
	buf := make([]byte, packetMost)
	for {
		n, err := d.from.Read(buf)
		if errors.Is(err, fs.ErrClosed) || err != nil && n <= 0 && !errors.Is(err, unix.EINTR) {
			return
		}
		if !isIPv4(buf[:n]) || d.cut.Load() {
			continue
		}
		out, f := d.pipe.admit(time.Since(d.epoch), onWire(n-vnetHeader))
		switch f {
		case dropped:
			d.dropped.Add(1)
		case lost:
			d.lost.Add(1)
		default:
			select {
			case d.moving <- moving{out, append([]byte(nil), buf[:n]...)}:
			default: // more than any link's rate times its delay
				d.dropped.Add(1)
			}
		}
	}
}

// deliver writes each packet when its time has come.
func (d *direction) deliver() {
	for m := range d.moving {
		if wait := m.out - time.Since(d.epoch); wait > 0 {
			time.Sleep(wait)
		}
		if d.cut.Load() {
			continue
		}
		if _, err := d.to.Write(m.packet); err != nil {
			continue // the other end is down: the packet is lost, as on any network
		}
		d.packets.Add(1)
		d.bytes.Add(int64(onWire(len(m.packet) - vnetHeader)))
	}
}
