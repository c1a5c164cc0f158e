// Package demoguest prepares what the demo and the benchmarks on the demo's guest need (base
// VM, overlay with its touch profile, the launch image as plain files, the eager way's files)
// and holds what they share: the daemon, VMs of their own, requests to the application, the
// page cache. What is expensive is kept in the folder and found again; the two use the same
// folder, one at a time.
package demoguest
