package cloudlets

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"cloudlet/integration/link"
)

const (
	mbit = 1_000_000
	// clientsAddress is that of the clients' namespace.
	clientsAddress = "10.73.0.250"
)

// Network says what lies between two cloudlets. The zero value is as fast as the host.
type Network struct {
	Name, Text string
	Rate       int64         // bits a second, each way; 0: no limit
	Delay      time.Duration // one way
	Loss       float64       // probability that a packet is lost
	Cuttable   bool          // Lab.Cut works
}

// Networks returns those that are measured.
func Networks() []Network {
	return []Network{
		{Name: "local", Text: "as fast as the host"},
		{Name: "1g", Text: "1 Gbit/s", Rate: 1000 * mbit},
		{Name: "38m", Text: "38 Mbit/s, 20 ms", Rate: 38 * mbit, Delay: 20 * time.Millisecond},
	}
}

// FindNetwork returns the one of Networks that has the name.
func FindNetwork(name string) (Network, error) {
	var names []string
	for _, n := range Networks() {
		if n.Name == name {
			return n, nil
		}
		names = append(names, n.Name)
	}
	return Network{}, fmt.Errorf("there is no link %q: choose from %s", name, strings.Join(names, ", "))
}

// linked reports whether pairs of cloudlets are joined by a link.
func (n Network) linked() bool { return n.Delay > 0 || n.Loss > 0 || n.Cuttable }

// network is the namespaces of a lab.
type network struct {
	bridge, clients *link.Namespace
	nodes           []*link.Namespace
	links           map[[2]int]*link.Link // by two nodes, the lower first
}

// wire makes the namespaces of count cloudlets and connects them.
func wire(n Network, count int) (w *network, err error) {
	if err := link.Probe(); err != nil {
		return nil, err
	}
	w = &network{links: map[[2]int]*link.Link{}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make the network: %w", err), w.close())
		}
	}()
	if w.bridge, err = link.NewNamespace(); err != nil {
		return w, err
	}
	for _, args := range []string{"link add br0 type bridge", "link set br0 up"} {
		if err := w.bridge.IP(strings.Fields(args)...); err != nil {
			return w, err
		}
	}
	if w.clients, err = w.plug("clients", clientsAddress, 0); err != nil {
		return w, err
	}
	for i := range count {
		rate := n.Rate
		if n.linked() {
			rate = 0
		}
		node, err := w.plug(fmt.Sprintf("port%d", i), address(i), rate)
		if err != nil {
			return w, err
		}
		w.nodes = append(w.nodes, node)
	}
	if !n.linked() {
		return w, nil
	}
	for b := range count {
		for a := range b {
			p := link.Params{Rate: n.Rate, Delay: n.Delay, Loss: n.Loss, Seed: uint64(a*count + b)}
			l, err := link.Join(p, link.End{Net: w.nodes[a], Address: address(a)}, link.End{Net: w.nodes[b], Address: address(b)})
			if err != nil {
				return w, err
			}
			w.links[[2]int{a, b}] = l
		}
	}
	return w, nil
}

func address(i int) string { return fmt.Sprintf("10.73.0.%d", i+1) }

// plug makes a namespace with a port of the bridge.
func (w *network) plug(port, address string, rate int64) (_ *link.Namespace, err error) {
	n, err := link.NewNamespace()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, n.Close())
		}
	}()
	for _, step := range []struct {
		in   *link.Namespace
		args string
	}{
		{n, "link add eth0 type veth peer name " + port + " netns " + w.bridge.Path()},
		{n, "addr add " + address + "/24 dev eth0"},
		{n, "link set eth0 up"},
		{w.bridge, "link set " + port + " master br0 up"},
	} {
		if err := step.in.IP(strings.Fields(step.args)...); err != nil {
			return nil, err
		}
	}
	if rate == 0 {
		return n, nil
	}
	return n, n.Do(func() error {
		out, err := exec.Command("tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", fmt.Sprint(rate), "burst", "256kb", "latency", "50ms").CombinedOutput()
		if err != nil {
			return fmt.Errorf("bound the rate with tc: %w: %s", err, out)
		}
		return nil
	})
}

// dial connects from the clients' namespace.
func (w *network) dial(ctx context.Context, network, address string) (c net.Conn, err error) {
	return dialFrom(ctx, w.clients, network, address)
}

func dialFrom(ctx context.Context, n *link.Namespace, network, address string) (c net.Conn, err error) {
	err = n.Do(func() error {
		c, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// carried returns the bytes between nodes: those of the links, and without links what the
// nodes have sent and the clients have not received. Large packets, as devices with
// segmentation offload are given them, have their headers counted once.
func (w *network) carried() (n int64, err error) {
	for _, between := range w.links {
		s := between.Stats()
		n += s.Down.Bytes + s.Up.Bytes
	}
	if len(w.links) > 0 {
		return n, nil
	}
	for _, node := range w.nodes {
		_, sent, err := counts(node)
		if err != nil {
			return 0, err
		}
		n += sent
	}
	received, _, err := counts(w.clients)
	return n - received, err
}

// counts returns the bytes that eth0 of a namespace has received and sent.
func counts(in *link.Namespace) (received, sent int64, err error) {
	err = in.Do(func() error {
		text, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil {
			return err
		}
		_, line, ok := strings.Cut(string(text), "eth0:")
		if !ok {
			return errors.New("count bytes: the namespace has no eth0")
		}
		var packets [7]int64 // packets, errors and so on, of what was received
		_, err = fmt.Sscan(line, &received, &packets[0], &packets[1], &packets[2], &packets[3], &packets[4], &packets[5], &packets[6], &sent)
		return err
	})
	return received, sent, err
}

func (w *network) close() error {
	var err error
	for _, l := range w.links {
		err = errors.Join(err, l.Close())
	}
	for _, n := range slices.Concat([]*link.Namespace{w.bridge, w.clients}, w.nodes) {
		if n != nil {
			err = errors.Join(err, n.Close())
		}
	}
	return err
}
