package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"cloudlet/integration/guest/table"
)

// The largest memory and file sizes in MiB that one request may ask for: what fits beside
// the table into the guest's memory, and beside the state file onto its disk.
const (
	maxDirtyMiB = 64
	maxWriteMiB = 48
)

// server holds what the answers are about. The table lies outside the Go heap, so that
// the collector neither moves nor doubles it.
type server struct {
	token   string
	dir     string
	table   []byte
	counter atomic.Int64
	load    load
	cargo   cargo

	requests atomic.Int64 // of /append
	journals journals

	mu    sync.Mutex
	dirty []byte // allocated at the first /dirty
	round int    // of /dirty, so that each rewrite stores other bytes
}

func newServer(dir string) (*server, error) {
	token, err := newToken()
	if err != nil {
		return nil, err
	}
	p, err := anonymous(table.Size)
	if err != nil {
		return nil, err
	}
	for n := range table.Windows {
		table.FillTable(p[n*table.WindowSize:][:table.WindowSize], token, n)
	}
	s := &server{token: token, dir: dir, table: p, journals: journals{dir: dir}}
	if err := writeSynced(s.stateFile(), func(f io.Writer) error { return table.WriteFile(f, token) }); err != nil {
		return nil, err
	}
	return s, nil
}

// anonymous maps n bytes of zeroed memory.
func anonymous(n int) ([]byte, error) {
	p, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", n, err)
	}
	return p, nil
}

func (s *server) stateFile() string { return filepath.Join(s.dir, "state.bin") }

func (s *server) extraFile(seed string) string { return filepath.Join(s.dir, "extra-"+seed+".bin") }

func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", answer(s.window))
	mux.HandleFunc("GET /verify", answer(s.verify))
	mux.HandleFunc("POST /write", answer(s.write))
	mux.HandleFunc("POST /delete", answer(s.remove))
	mux.HandleFunc("POST /dirty", answer(s.rewrite))
	mux.HandleFunc("POST /load", answer(s.setLoad))
	mux.HandleFunc("POST /append", answer(s.append))
	mux.HandleFunc("GET /journal", answer(s.journal))
	mux.HandleFunc("POST /fill", answer(s.fill))
	mux.HandleFunc("POST /churn", answer(s.churn))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("ok\n")) // a client that is gone needs no answer
	})
	return mux
}

func (s *server) window(r *http.Request) (any, error) {
	n, err := number(r, "window", 0, table.Windows-1, 0)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(s.table[n*table.WindowSize:][:table.WindowSize])
	return struct {
		Token   string `json:"token"`
		Counter int64  `json:"counter"`
		Window  int    `json:"window"`
		SHA256  string `json:"sha256"`
	}{s.token, s.counter.Add(1), n, hex.EncodeToString(sum[:])}, nil
}

func (s *server) verify(r *http.Request) (any, error) {
	var extra string
	if r.FormValue("seed") != "" {
		seed, err := wordOf(r, "seed")
		if err != nil {
			return nil, err
		}
		if extra, err = hashFromDisk(s.extraFile(seed)); err != nil {
			return nil, err
		}
	}
	file, err := hashFromDisk(s.stateFile())
	if err != nil {
		return nil, err
	}
	var held *cargoState
	if state := s.cargo.state(true); state.MiB > 0 {
		held = &state
	}
	sum := sha256.Sum256(s.table)
	return struct {
		Token   string      `json:"token"`
		Counter int64       `json:"counter"`
		Table   string      `json:"table"`
		File    string      `json:"file"`
		Extra   string      `json:"extra,omitempty"`
		Cargo   *cargoState `json:"cargo,omitempty"`
	}{s.token, s.counter.Load(), hex.EncodeToString(sum[:]), file, extra, held}, nil
}

func (s *server) write(r *http.Request) (any, error) {
	mib, err := number(r, "mib", 1, maxWriteMiB, -1)
	if err != nil {
		return nil, err
	}
	seed, err := wordOf(r, "seed")
	if err != nil {
		return nil, err
	}
	err = writeSynced(s.extraFile(seed), func(f io.Writer) error { return table.WriteExtra(f, seed, mib) })
	return struct {
		Seed string `json:"seed"`
		MiB  int    `json:"mib"`
	}{seed, mib}, err
}

func (s *server) remove(r *http.Request) (any, error) {
	seed, err := wordOf(r, "seed")
	if err != nil {
		return nil, err
	}
	trimmed, err := removeAndTrim(s.extraFile(seed), s.dir)
	return struct {
		Seed    string `json:"seed"`
		Trimmed uint64 `json:"trimmed_bytes"`
	}{seed, trimmed}, err
}

func (s *server) rewrite(r *http.Request) (any, error) {
	mib, err := number(r, "mib", 1, maxDirtyMiB, -1)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.dirty == nil {
		if s.dirty, err = anonymous(maxDirtyMiB << 20); err != nil {
			return nil, err
		}
	}
	s.round++
	for n := range mib {
		table.Fill(s.dirty[n<<20:][:1<<20], fmt.Sprintf("%s/dirty/%d/%d", s.token, s.round, n))
	}
	return struct {
		MiB   int `json:"mib"`
		Round int `json:"round"`
	}{mib, s.round}, nil
}

func (s *server) setLoad(r *http.Request) (any, error) {
	on, err := number(r, "on", 0, 1, -1)
	if err != nil {
		return nil, err
	}
	if on == 1 {
		err = s.load.start(filepath.Join(s.dir, "load.log"), s.token)
	} else {
		err = s.load.stop()
	}
	return s.load.progress(), err
}

// number reads an integer parameter within [low, high]; a missing one is missing, or an
// error where missing is negative.
func number(r *http.Request, name string, low, high, missing int) (int, error) {
	text := r.FormValue(name)
	if text == "" && missing >= 0 {
		return missing, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < low || n > high {
		return 0, badRequest{fmt.Errorf("parameter %s is %q: give a number from %d to %d", name, text, low, high)}
	}
	return n, nil
}

var wordPattern = regexp.MustCompile(`^[0-9A-Za-z]{1,32}$`)

// wordOf reads a parameter that becomes part of a file name.
func wordOf(r *http.Request, name string) (string, error) {
	word := r.FormValue(name)
	if !wordPattern.MatchString(word) {
		return "", badRequest{fmt.Errorf("parameter %s is %q: give 1 to 32 letters and digits", name, word)}
	}
	return word, nil
}
