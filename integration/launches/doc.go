// Package launches makes launch VMs of other kinds than the demo's, for benchmarks that want
// more than one real guest. Each is the demo's base, resumed, with an application installed
// over its serial console as a user does it, captured as an overlay with a touch profile:
//
//	db    PostgreSQL 15 with pgbench's tables; there are transactions in its log, and changed
//	      pages that it has not written
//	node  a service of Node.js that keeps tens of MiB of records and indexes on its heap
//
// Both answer on port 80 of the guest:
//
//	GET /        token, counter, and a record (/?account=N, /?id=N)
//	GET /verify  token, counter, and the SHA-256 of all data that the application holds
//
// The token is drawn when the data are made; the counter counts the answers to GET /. What
// GET /verify says before the capture is kept in Prepared, and a synthesised instance must
// say the same.
//
// Prepare keeps what it makes in a folder of the application, and finds it again as long as
// application, packages and base are the same. Base and overlays are in the store of the
// demo's folder. It is for one goroutine at a time, as demoguest.Lab is.
package launches
