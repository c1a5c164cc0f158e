package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sync"

	"cloudlet/integration/guest/table"

	"golang.org/x/sys/unix"
)

// maxJournals bounds the clients: the file system has few inodes.
const maxJournals = 64

// A record of a journal's file: its number and the checksum of all until it.
const (
	recordFormat = "%015d %s\n"
	recordSize   = 15 + 1 + 32 + 1
)

// gapError is an append whose predecessor is not here.
type gapError struct{ error }

// journals are what clients have appended: each a list in memory and a synced file.
type journals struct {
	dir string

	mu   sync.Mutex
	open map[string]*journal
}

// journal belongs to one client, whose records are 1, 2, 3 and so on.
type journal struct {
	client string

	mu      sync.Mutex
	f       *os.File
	records []journalRecord
}

type journalRecord struct {
	n   int64
	sum table.Sum
}

// of returns the journal of a client. What an earlier application has left on the disk counts.
func (s *journals) of(client string) (*journal, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if j := s.open[client]; j != nil {
		return j, nil
	}
	if len(s.open) == maxJournals {
		return nil, badRequest{fmt.Errorf("parameter client is %q, and %d other clients have journals already", client, maxJournals)}
	}
	f, err := os.OpenFile(filepath.Join(s.dir, "journal-"+client+".log"), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, err
	}
	j := &journal{client: client, f: f}
	if j.records, err = j.read(); err == nil {
		err = syncFolder(s.dir)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if s.open == nil {
		s.open = map[string]*journal{}
	}
	s.open[client] = j
	return j, nil
}

func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// append adds record n, or finds it the last one. It returns the checksums of all records, as
// memory has it and as the file has it.
func (j *journal) append(n int64) (count int64, memory, file table.Sum, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	count = int64(len(j.records))
	var sum table.Sum
	if count > 0 {
		sum = j.records[count-1].sum
	}
	switch {
	case n > count+1:
		return count, sum, file, gapError{fmt.Errorf("record %d of client %s cannot be appended: there are %d", n, j.client, count)}
	case n == count+1:
		sum = sum.Next(j.client, n)
		if _, err := j.f.WriteAt(fmt.Appendf(nil, recordFormat, n, sum), count*recordSize); err != nil {
			return count, sum, file, err
		}
		if err := j.f.Sync(); err != nil {
			return count, sum, file, err
		}
		j.records = append(j.records, journalRecord{n, sum})
		count = n
	}
	var line [recordSize]byte
	if _, err := j.f.ReadAt(line[:], (count-1)*recordSize); err != nil {
		return count, sum, file, fmt.Errorf("read record %d of %s: %w", count, j.f.Name(), err)
	}
	r, err := parseRecord(line[:])
	return count, sum, r.sum, err
}

func parseRecord(line []byte) (r journalRecord, err error) {
	var text string
	if _, err := fmt.Sscanf(string(line), "%d %s\n", &r.n, &text); err != nil {
		return r, fmt.Errorf("read record %q: %w", line, err)
	}
	r.sum, err = table.ParseSum(text)
	return r, err
}

// read returns the records of the file as they are on the disk. What follows the last whole
// one was never acknowledged.
func (j *journal) read() (list []journalRecord, err error) {
	if err := j.f.Sync(); err != nil {
		return nil, err
	}
	if err := unix.Fadvise(int(j.f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return nil, fmt.Errorf("drop cached pages of %s: %w", j.f.Name(), err)
	}
	p, err := io.ReadAll(io.NewSectionReader(j.f, 0, 1<<40))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", j.f.Name(), err)
	}
	for ; len(p) >= recordSize; p = p[recordSize:] {
		r, err := parseRecord(p[:recordSize])
		if err != nil {
			return nil, fmt.Errorf("%s: %w", j.f.Name(), err)
		}
		list = append(list, r)
	}
	return list, nil
}

// listed is one of the two copies of a journal, with its checksum computed anew.
type listed struct {
	Records []int64 `json:"records"`
	Sum     string  `json:"sum"`
}

// list turns records into what is answered; their own checksums must be right.
func (j *journal) list(where string, records []journalRecord) (listed, error) {
	l := listed{Records: []int64{}}
	var sum table.Sum
	for i, r := range records {
		if sum = sum.Next(j.client, r.n); sum != r.sum {
			return l, fmt.Errorf("the %s's record %d of client %s, number %d, has the checksum %s, want %s", where, i+1, j.client, r.n, r.sum, sum)
		}
		l.Records = append(l.Records, r.n)
	}
	l.Sum = sum.String()
	return l, nil
}

func (s *server) append(r *http.Request) (any, error) {
	client, err := wordOf(r, "client")
	if err != nil {
		return nil, err
	}
	n, err := number(r, "n", 1, 1<<31-1, -1)
	if err != nil {
		return nil, err
	}
	j, err := s.journals.of(client)
	if err != nil {
		return nil, err
	}
	count, memory, file, err := j.append(int64(n))
	return struct {
		Token    string `json:"token"`
		Requests int64  `json:"requests"`
		Client   string `json:"client"`
		Count    int64  `json:"count"`
		Memory   string `json:"memory"`
		File     string `json:"file"`
	}{s.token, s.requests.Add(1), client, count, memory.String(), file.String()}, err
}

func (s *server) journal(r *http.Request) (any, error) {
	client, err := wordOf(r, "client")
	if err != nil {
		return nil, err
	}
	j, err := s.journals.of(client)
	if err != nil {
		return nil, err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	memory, err := j.list("memory", j.records)
	if err != nil {
		return nil, err
	}
	records, err := j.read()
	if err != nil {
		return nil, err
	}
	file, err := j.list("file", records)
	return struct {
		Token    string `json:"token"`
		Requests int64  `json:"requests"`
		Client   string `json:"client"`
		Memory   listed `json:"memory"`
		File     listed `json:"file"`
	}{s.token, s.requests.Load(), client, memory, file}, err
}
