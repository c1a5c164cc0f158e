package main

import "testing"

// TestProgressEnds: a phase that is left, or ends, before its bar is full holds nothing up.
func TestProgressEnds(t *testing.T) {
	for range 10 {
		report, done := (&environment{terminal: true, stderr: &said{}}).progress()
		report("offer", 0, 0)
		report("round 1", 10, 20)
		report("round 1", 30, 40)
		report("prepare", 10, 20)
		done()
	}
}
