//go:build !faults

package integration

// everyFault: without the tag faults, a sample of them is tested.
const everyFault = false
