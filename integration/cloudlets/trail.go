package cloudlets

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"
	"cloudlet/integration/guest"
)

// askBound is how long a cloudlet may take to say where an instance is.
const askBound = time.Second

// Trail follows an instance from cloudlet to cloudlet as a client does that knows where it was
// last: over TCP, by what the cloudlet there says of it. It is safe for concurrent use.
type Trail struct {
	lab     *Lab
	remotes []*client.Client

	mu sync.Mutex
	at *Cloudlet
	id string
}

// Follow begins a trail at an instance of a cloudlet. Close it.
func (l *Lab) Follow(c *Cloudlet, id string) (*Trail, error) {
	t := &Trail{lab: l, at: c, id: id}
	for _, c := range l.Cloudlets {
		remote, err := l.Remote(c)
		if err != nil {
			return nil, err
		}
		t.remotes = append(t.remotes, remote)
	}
	return t, nil
}

// Where returns the cloudlet where the instance was last found to be, and its id there.
func (t *Trail) Where() (*Cloudlet, string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.at, t.id
}

// Find returns host:port of the application, for the clients' namespace.
func (t *Trail) Find(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, askBound)
	defer cancel()
	c, id := t.Where()
	in, err := t.remotes[c.index].Instance(ctx, id)
	if err != nil {
		return "", err
	}
	if in.Moved != nil {
		next := t.lab.byURL(in.Moved.To)
		if next == nil {
			return "", fmt.Errorf("instance %s of cloudlet %s has moved to %s, which is none of the lab's", id, c.Name, in.Moved.To)
		}
		t.mu.Lock()
		if t.at == c && t.id == id { // nobody else was sooner
			t.at, t.id = next, in.Moved.Instance
		}
		t.mu.Unlock()
		c, in.Endpoints = next, in.Moved.Endpoints
	}
	address := c.Address(api.Instance{Endpoints: in.Endpoints})
	if address == "" {
		return "", errors.New("nobody can reach port " + fmt.Sprint(guest.Port) + " of the instance")
	}
	return address, nil
}

// Close closes idle connections.
func (t *Trail) Close() {
	for _, r := range t.remotes {
		r.Close()
	}
}

func (l *Lab) byURL(url string) *Cloudlet {
	for _, c := range l.Cloudlets {
		if c.URL == url {
			return c
		}
	}
	return nil
}

// HandOff moves an instance to another cloudlet and returns when it is there whole. watch, if
// not nil, is told each state of the operation. If ctx ends before, it is cancelled, as far as
// it still can be.
func (c *Cloudlet) HandOff(ctx context.Context, id string, to *Cloudlet, rounds int, watch func(api.Operation)) (out api.HandedOff, err error) {
	op, err := c.Client.HandOff(ctx, api.HandOff{Instance: id, To: to.URL, Token: to.Peer, Rounds: rounds})
	if err == nil {
		id := op.ID
		op, err = c.Client.Wait(ctx, op, watch)
		if ctx.Err() != nil {
			_, cerr := c.Client.CancelOperation(context.WithoutCancel(ctx), id)
			if api.CodeOf(cerr) != api.Conflict { // it is too late
				err = errors.Join(err, cerr)
			}
		}
	}
	if err != nil {
		return out, fmt.Errorf("hand instance %s off from %s to %s: %w", id, c.Name, to.Name, err)
	}
	return client.Result[api.HandedOff](op)
}
