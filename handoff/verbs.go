package handoff

import (
	"context"
	"errors"
	"time"
)

// ErrEnded means that the VM does not exist any more.
var ErrEnded = errors.New("the VM has ended")

// ErrForGood is wrapped by an error of a Peer that will not change by asking again: no such
// host, another program, a token that is not accepted.
var ErrForGood = errors.New("asking again will not help")

// VM is what a Source needs of the instance. Each verb may be called again after an error or
// a crash; all but Round and Final then find done what was done. What they publish is bound to
// the handoff and outlives the process.
type VM interface {
	// Round publishes what the running guest has changed since the last round, durably, and
	// returns with it the whole chain, that overlay last.
	Round(ctx context.Context, n int) (Published, error)
	// Pause stops the guest.
	Pause(ctx context.Context) error
	// Final publishes, of the paused guest, what was changed since the last round, with the
	// device state, as Round does. All of it is in files when it returns.
	Final(ctx context.Context, n int) (Published, error)
	// Continue lets the guest run on after Pause; ErrEnded if there is none.
	Continue(ctx context.Context) error
	// Discard ends the VM for good and removes what is its own.
	Discard(ctx context.Context) error
	// Settle makes the VM an ordinary one: nothing of the rounds is left in it. ErrEnded if
	// there is none.
	Settle(ctx context.Context) error
	// Release removes all that was published: files and URLs. It does not touch the VM.
	Release(ctx context.Context) error
}

// Published is what a round has made.
type Published struct {
	Chain []Overlay
	Round Round // Sent is set by the Source
}

// Peer carries messages to the destination. It returns an answer only if the destination
// itself has given it, authenticated; whatever else comes back is an error and proves
// nothing. A message may be lost, delivered late, or more than once.
type Peer interface {
	Send(ctx context.Context, m Message) (Answer, error)
}

// Site is what a Destination needs of its cloudlet, for one handoff. Each verb may be called
// again after an error or a crash and then finds done what was done.
type Site interface {
	// Admit looks whether the instance could run here. It reserves nothing; the Destination's
	// record does. Reasons refuse it. Lacks are the ids of overlays of the chain that are not
	// here.
	Admit(ctx context.Context, epoch uint64, o Offer) (lacks []string, reasons []Reason, err error)
	// Fetch lets the overlays of the chain be fetched in the background and returns at once.
	// An error says that it will not succeed.
	Fetch(ctx context.Context, chain []Overlay) error
	// Prepare mounts the chain and loads the VM, paused: its guest has not run when it
	// returns. A VM of an earlier Prepare is taken as it is or made anew.
	Prepare(ctx context.Context, o Offer, chain []Overlay) error
	// Run lets the guest run, unless o.Paused. It never makes a VM; ErrEnded if there is none.
	Run(ctx context.Context, o Offer) error
	// Look says how the VM is.
	Look(ctx context.Context) (Look, error)
	// Pause stops the guest; ErrEnded if there is none.
	Pause(ctx context.Context) error
	// Destroy removes all of the handoff: VM, mount, what was fetched.
	Destroy(ctx context.Context) error
}

// Look is how a VM at a destination is.
type Look struct {
	Alive     bool  // there is a VM, running or paused
	Missing   int64 // bytes of the chain that are not on this disk, durably, yet
	Endpoints []Endpoint
	Reason    string // why it is not alive, or what it is stuck at
}

// Journal keeps one record. Store replaces it atomically and durably; after an error the old
// record stands, or the new one, and Load tells which. Load returns fs.ErrNotExist if there
// is none.
type Journal interface {
	Load(ctx context.Context) ([]byte, error)
	Store(ctx context.Context, record []byte) error
}

// Clock is the time.
type Clock interface {
	Now() time.Time
	// Wait returns after d, or with ctx's error.
	Wait(ctx context.Context, d time.Duration) error
}

// SystemClock is the time of this host.
type SystemClock struct{}

// Now returns time.Now.
func (SystemClock) Now() time.Time { return time.Now() }

// Wait waits.
func (SystemClock) Wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
