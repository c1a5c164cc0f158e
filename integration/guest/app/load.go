package main

import (
	"fmt"
	"os"
	"sync"

	"cloudlet/integration/guest/table"
)

// A round of the load rewrites the next loadStep bytes of a buffer and appends them to a
// file; after loadSize bytes both start over from their beginning.
const (
	loadStep = 128 << 10
	loadSize = 16 << 20
)

// load is the background writer of a guest that must be captured while it writes.
type load struct {
	control sync.Mutex // held by start and stop
	quit    chan struct{}
	done    chan struct{}
	buf     []byte // mapped at the first start, kept when the writer rests

	mu     sync.Mutex
	rounds int64
	on     bool
	err    error // why the last run ended
}

// loadProgress is what /load answers.
type loadProgress struct {
	On     bool  `json:"on"`
	Rounds int64 `json:"rounds"`
	Bytes  int64 `json:"bytes"`
}

func (l *load) progress() loadProgress {
	l.mu.Lock()
	defer l.mu.Unlock()
	return loadProgress{On: l.on, Rounds: l.rounds, Bytes: l.rounds * loadStep}
}

// start begins to write; it does nothing if the writer runs already.
func (l *load) start(name, token string) error {
	l.control.Lock()
	defer l.control.Unlock()
	if l.quit != nil {
		return nil
	}
	if l.buf == nil {
		p, err := anonymous(loadSize)
		if err != nil {
			return err
		}
		l.buf = p
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	l.quit, l.done = make(chan struct{}), make(chan struct{})
	l.set(true, nil)
	go func() {
		defer close(l.done)
		err := l.write(f, token)
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		l.set(false, err)
	}()
	return nil
}

// stop ends the writer, waits for it, and returns its error.
func (l *load) stop() error {
	l.control.Lock()
	defer l.control.Unlock()
	if l.quit == nil {
		return nil
	}
	close(l.quit)
	<-l.done
	l.quit = nil
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

func (l *load) set(on bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.on, l.err = on, err
}

func (l *load) write(f *os.File, token string) error {
	for off := 0; ; off = (off + loadStep) % loadSize {
		select {
		case <-l.quit:
			return nil
		default:
		}
		step := l.buf[off:][:loadStep]
		table.Fill(step, fmt.Sprintf("%s/load/%d", token, l.progress().Rounds))
		if _, err := f.WriteAt(step, int64(off)); err != nil {
			return fmt.Errorf("append to %s: %w", f.Name(), err)
		}
		if err := f.Sync(); err != nil {
			return fmt.Errorf("sync %s: %w", f.Name(), err)
		}
		l.mu.Lock()
		l.rounds++
		l.mu.Unlock()
	}
}
