// Command app is the application of the test guest: a small HTTP server whose every answer
// a test on the host can compute from the token that the server drew when it started.
//
// It holds a memory table and a state file derived from the token (package table) and
// answers on port 8080:
//
//	GET  /?window=N           token, counter, SHA-256 of window N of the table (default 0)
//	GET  /verify[?seed=S]     SHA-256 of the whole table and of the state file as read from
//	                          the disk; with S also of the file that /write made for S; and
//	                          of the cargo its seed, size, steps and checksum
//	GET  /healthz             "ok"
//	POST /write?mib=N&seed=S  makes the file for S, N MiB, and syncs it
//	POST /delete?seed=S       removes that file, syncs and trims the file system
//	POST /dirty?mib=N         rewrites the first N MiB of a second buffer in memory
//	POST /load?on=1|0         starts or stops a writer that dirties memory and appends
//	                          to a synced file without rest; answers what it has done
//	POST /append?client=C&n=N appends record N of client C to its list in memory and to its
//	                          file, which is synced before the answer; answers their checksums
//	GET  /journal?client=C    all records of C and their checksum, as memory has them and as
//	                          read from the disk
//	POST /fill?mib=N&seed=S   makes the cargo: N MiB in memory, half random, half text
//	POST /churn?kib_per_s=K   rewrites so much of the cargo at random, 0 to rest
//
// Records of a client are 1, 2, 3 and so on. One that is there already changes nothing, so a
// client repeats what was not answered; one whose predecessor is missing is answered with 409.
// /append also answers how many appends were answered since the start.
//
// The counter counts the answers of / since the start: it shows that a resumed guest goes
// on where it was captured. A bad parameter is answered with 400 and its name, a seed
// without a file with 404.
package main
