package main

import (
	"fmt"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"cloudlet/integration/guest/table"
)

const (
	// maxCargoMiB is more than any guest of ours has; what is free decides.
	maxCargoMiB = 4096
	// spareMiB is what must stay free beside the cargo.
	spareMiB = 24
	maxChurn = 1 << 20 // KiB a second
	// churnTick is how often the churn works; what it did not get to within churnMost, since
	// the guest stood still or was busy, it leaves out.
	churnTick = 20 * time.Millisecond
	churnMost = time.Second
)

// cargo is data in memory that the application may rewrite at random without rest.
type cargo struct {
	mu    sync.Mutex
	made  table.Cargo
	p     []byte // mapped
	steps int64  // of churn since it was made

	control sync.Mutex // held by setChurn
	quit    chan struct{}
	done    chan struct{}
}

// fill makes the cargo anew.
func (c *cargo) fill(made table.Cargo) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.p) != made.Size() {
		if c.p != nil {
			if err := unix.Munmap(c.p); err != nil {
				return fmt.Errorf("unmap the cargo: %w", err)
			}
			c.p, c.made = nil, table.Cargo{}
		}
		free, err := freeMiB()
		if err != nil {
			return err
		}
		if made.MiB > free-spareMiB {
			return badRequest{fmt.Errorf("parameter mib is %d, and of the guest's memory %d MiB are free, of which %d must stay so: give the guest more", made.MiB, free, spareMiB)}
		}
		if c.p, err = anonymous(made.Size()); err != nil {
			return err
		}
	}
	made.Fill(c.p)
	c.made, c.steps = made, 0
	return nil
}

// freeMiB returns how much of the memory nobody uses.
func freeMiB() (int, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, fmt.Errorf("ask for free memory: %w", err)
	}
	return int((info.Freeram + info.Bufferram) * uint64(info.Unit) >> 20), nil
}

// cargoState is what /fill, /churn and /verify answer.
type cargoState struct {
	Seed  string `json:"seed"`
	MiB   int    `json:"mib"`
	Steps int64  `json:"steps"`
	Sum   string `json:"sum,omitempty"`
}

// state returns what the cargo is, with the checksum of what is there if asked for.
func (c *cargo) state(sum bool) cargoState {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := cargoState{Seed: c.made.Seed, MiB: c.made.MiB, Steps: c.steps}
	if sum && c.p != nil {
		s.Sum = table.WordSum(c.p)
	}
	return s
}

// setChurn makes the churn rewrite so much, 0 to end it.
func (c *cargo) setChurn(kibPerSecond int) {
	c.control.Lock()
	defer c.control.Unlock()
	if c.quit != nil {
		close(c.quit)
		<-c.done
		c.quit = nil
	}
	if kibPerSecond == 0 {
		return
	}
	quit, done := make(chan struct{}), make(chan struct{})
	c.quit, c.done = quit, done
	go func() {
		defer close(done)
		c.churn(float64(kibPerSecond)*1024/table.BlockSize, quit)
	}()
}

// churn makes so many steps a second until quit is closed.
func (c *cargo) churn(rate float64, quit <-chan struct{}) {
	tick := time.NewTicker(churnTick)
	defer tick.Stop()
	last, due := time.Now(), 0.0
	for {
		select {
		case <-quit:
			return
		case <-tick.C:
		}
		now := time.Now()
		due += min(now.Sub(last), churnMost).Seconds() * rate
		last = now
		c.mu.Lock()
		for ; due >= 1; due-- {
			if c.p != nil {
				c.steps++
				c.made.Step(c.p, c.steps)
			}
		}
		c.mu.Unlock()
	}
}

func (s *server) fill(r *http.Request) (any, error) {
	mib, err := number(r, "mib", 1, maxCargoMiB, -1)
	if err != nil {
		return nil, err
	}
	seed, err := wordOf(r, "seed")
	if err != nil {
		return nil, err
	}
	if err := s.cargo.fill(table.NewCargo(seed, mib)); err != nil {
		return nil, err
	}
	return s.cargo.state(false), nil
}

func (s *server) churn(r *http.Request) (any, error) {
	rate, err := number(r, "kib_per_s", 0, maxChurn, -1)
	if err != nil {
		return nil, err
	}
	s.cargo.setChurn(rate)
	return s.cargo.state(false), nil
}
