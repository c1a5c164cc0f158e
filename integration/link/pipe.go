package link

import (
	"math/rand/v2"
	"time"
)

const (
	// header is what IP and TCP (with timestamps) add to a segment, mtu the largest packet.
	header = 52
	mtu    = 1500
	// defaultQueue is netem's: a thousand packets.
	defaultQueue = 1000 * mtu
)

// fate is what becomes of a packet.
type fate int

const (
	passes fate = iota
	dropped
	lost
)

// pipe is one direction of a link: it computes when a packet comes out. Times are since any
// fixed moment and must not decrease.
type pipe struct {
	rate  float64 // bytes a second; 0: no limit
	delay time.Duration
	loss  float64
	queue float64 // bytes
	rng   *rand.Rand
	free  time.Duration // when the transmitter will have sent all that it was given
}

func newPipe(p Params, direction uint64) *pipe {
	q := &pipe{rate: float64(p.Rate) / 8, delay: p.Delay, loss: p.Loss, queue: float64(p.Queue), rng: rand.New(rand.NewPCG(p.Seed, direction))}
	if q.queue <= 0 {
		q.queue = defaultQueue
	}
	return q
}

// admit takes a packet of size bytes at a time and says when it comes out. A packet that is
// lost on its way has used the transmitter; one that is dropped before it has not.
func (q *pipe) admit(at time.Duration, size int) (out time.Duration, f fate) {
	gone := q.loss > 0 && q.rng.Float64() < q.loss
	begin := max(at, q.free)
	if q.rate > 0 {
		if (begin-at).Seconds()*q.rate+float64(size) > q.queue {
			return 0, dropped
		}
		q.free = begin + time.Duration(float64(size)/q.rate*float64(time.Second))
	} else {
		q.free = begin
	}
	if gone {
		return 0, lost
	}
	return q.free + q.delay, passes
}

// onWire is how many bytes a packet of size bytes is once it is cut into segments.
func onWire(size int) int {
	if size <= mtu {
		return size
	}
	payload := size - header
	segments := (payload + mtu - header - 1) / (mtu - header)
	return payload + segments*header
}
