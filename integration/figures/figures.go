// Package figures is what the measuring commands have in common: how they start and with which
// exit code they end, medians, targets that are printed with pass or MISS, results as JSON, and
// what of them goes into the project's documents.
package figures

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
)

// Median returns the middle value, of an even number the mean of the two in the middle. v
// must not be empty; it stays as it is.
func Median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	if n := len(s); n%2 == 0 {
		return (s[n/2-1] + s[n/2]) / 2
	}
	return s[len(s)/2]
}

// MiB turns bytes into MiB.
func MiB[N int64 | float64](bytes N) float64 { return float64(bytes) / (1 << 20) }

// Target is a bound on a figure.
type Target struct {
	What         string
	Bound, Value float64
	Least        bool // Bound is the least that Value may be, else the most
	Unit         string
	Decimals     int // that are printed
}

// Met reports whether the value keeps to the bound.
func (t Target) Met() bool {
	if t.Least {
		return t.Value >= t.Bound
	}
	return t.Value <= t.Bound
}

// String returns target, measured, and pass or MISS.
func (t Target) String() string {
	bound, verdict := "at most", "pass"
	if t.Least {
		bound = "at least"
	}
	if !t.Met() {
		verdict = "MISS"
	}
	return fmt.Sprintf("%-52s target %s %.*f, measured %.*f %s: %s", t.What, bound, t.Decimals, t.Bound, t.Decimals, t.Value, t.Unit, verdict)
}

// WriteJSON writes v to a file, for people to read as well.
func WriteJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}
