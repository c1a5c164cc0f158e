//go:build faults

package integration

// everyFault: make test-faults.
const everyFault = true
