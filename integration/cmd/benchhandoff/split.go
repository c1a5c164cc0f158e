package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"cloudlet/api"
	"cloudlet/integration/appclient"
)

// split says where the time of a client's gap went, in seconds since the guest was stopped.
type split struct {
	Last      float64 `json:"client_last_answer_s"` // before the silence, so mostly negative
	Published float64 `json:"published_s"`          // the last overlay
	Prepared  float64 `json:"prepared_s"`           // at the other cloudlet
	Runs      float64 `json:"runs_s"`               // the guest, there
	Known     float64 `json:"client_knows_s"`       // where it is
	Answered  float64 `json:"client_next_answer_s"`
}

// parts are the times between the moments of a split, and what they are.
func (s split) parts() []float64 {
	return []float64{-s.Last, s.Published, s.Prepared - s.Published, s.Runs - s.Prepared, s.Known - s.Runs, s.Answered - s.Known}
}

// partNames names the parts. The last is the guest's: its emulator begins anew, and it touches
// pages that nobody has touched there.
func partNames() []string {
	return []string{"until the stop", "last overlay", "prepare", "go", "until the client knows", "first answer"}
}

func (s split) String() string {
	var b strings.Builder
	for i, d := range s.parts() {
		if i > 0 {
			b.WriteString(" · ")
		}
		fmt.Fprintf(&b, "%s %.0f ms", partNames()[i], 1000*d)
	}
	return b.String()
}

// logs are the messages of both daemons from a moment on. Both have this host's clock.
type logs struct {
	files [2]string // of source and destination
	from  [2]int64
}

func (s *session) logs() (l logs, err error) {
	l.files = [2]string{s.a.Log(), s.b.Log()}
	for i, name := range l.files {
		info, err := os.Stat(name)
		if err != nil {
			return l, err
		}
		l.from[i] = info.Size()
	}
	return l, nil
}

// read returns what the source's or the destination's daemon has said since.
func (l logs) read(i int) (text string, err error) {
	f, err := os.Open(l.files[i])
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Seek(l.from[i], io.SeekStart); err != nil {
		return "", err
	}
	b, err := io.ReadAll(f)
	return string(b), err
}

// split finds the moments of a handoff and of the client's silence.
func (l logs) split(moved api.HandedOff, gap appclient.Silence) (s split, err error) {
	source, err := l.read(0)
	if err != nil {
		return s, err
	}
	destination, err := l.read(1)
	if err != nil {
		return s, err
	}
	return newSplit(source, destination, moved, gap)
}

func newSplit(source, destination string, moved api.HandedOff, gap appclient.Silence) (s split, err error) {
	id := "handoff=" + moved.Handoff
	published, err := moment(source, `msg="handoff round"`, id, "final=true")
	if err != nil {
		return s, fmt.Errorf("the source's log: %w", err)
	}
	prepared, err := moment(destination, `msg="handoff to here"`, id, "state=prepared")
	if err != nil {
		return s, fmt.Errorf("the destination's log: %w", err)
	}
	runs := time.Time{}
	for _, state := range []string{"state=running", "state=complete"} {
		if at, merr := moment(destination, `msg="handoff to here"`, id, state); merr == nil {
			runs = at
			break
		} else {
			err = merr
		}
	}
	if runs.IsZero() {
		return s, fmt.Errorf("the destination's log: %w", err)
	}
	// The program's pause ends when it has published; when it began is not in the log.
	stopped := published.Add(-time.Duration(moved.Pause * float64(time.Second)))
	since := func(at time.Time) float64 { return at.Sub(stopped).Seconds() }
	s = split{Last: since(gap.Begin), Published: since(published), Prepared: since(prepared), Runs: since(runs), Known: since(gap.Found), Answered: since(gap.End)}
	if gap.Found.IsZero() {
		return s, errors.New("the longest silence of the client is not that of the handoff")
	}
	return s, nil
}

// moment returns the time of the first line that has all these words.
func moment(log string, words ...string) (time.Time, error) {
lines:
	for line := range strings.Lines(log) {
		fields := " " + strings.TrimSpace(line) + " "
		for _, w := range words {
			if !strings.Contains(fields, " "+w+" ") {
				continue lines
			}
		}
		text, ok := strings.CutPrefix(strings.Fields(line)[0], "time=")
		if !ok {
			return time.Time{}, fmt.Errorf("a line without a time: %.200s", line)
		}
		return time.Parse(time.RFC3339, text)
	}
	return time.Time{}, fmt.Errorf("no line with %s", strings.Join(words, ", "))
}
