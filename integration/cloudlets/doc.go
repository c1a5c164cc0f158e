// Package cloudlets is a lab of several cloudlets on one host, for tests and commands about
// handoff: each a `cloudlet serve` in a network namespace of its own, and a namespace for the
// clients of their guests.
//
//	a 10.73.0.1     b 10.73.0.2     c 10.73.0.3     clients 10.73.0.250
//	     |               |               |               |
//	     +---------------+--- bridge ----+---------------+
//
// With Network.Delay, Network.Loss or Network.Cuttable each pair of cloudlets is joined by a
// link (integration/link) besides, which all that they send each other crosses; clients stay
// on the bridge. With a rate alone the kernel's token bucket filter bounds what each cloudlet
// sends.
//
// All cloudlets have the same base of the test guest, in stores below Options.Dir. Namespaces
// and devices have no names outside of themselves and go with the processes in them. Close
// ends what was started, and its error names whatever was left. What a killed run has left is
// found by its paths, and ended by the next Open of the same folder.
//
// A Lab is used from one goroutine, if not said otherwise.
package cloudlets
