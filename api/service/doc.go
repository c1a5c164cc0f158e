// Package service is where bases, overlays, mounts and VMs meet: the store on disk and the
// verbs over it. A Service keeps nothing in memory that is not in the store, so several
// processes may use one store at the same time, and a process may die at any moment: what it
// had begun is swept up by the next one, what it had finished stays.
//
// # Store
//
//	STATE/lock                     held for the moments in which names and records change
//	STATE/bases/ID/                a base, see package overlay; ID.json beside it: name, time
//	STATE/overlays/ID/overlay      an overlay; record.json: name, time
//	STATE/instances/ID/            record.json, vm/ (see vmm)
//	STATE/mounts/KEY/              spec.json, log, control socket, fs (the mountpoint)
//	STATE/tmp/                     what is being made; moved to its place when whole
//
// # Locks
//
// Locks are flock(2) on folders, so that they end with the process that held them. Whoever
// reads a base or an overlay for long (a mount) holds a shared lock on its folder, and
// removing one takes the exclusive lock. Whoever works on an instance, or makes something
// in tmp, holds the lock of that folder: a folder there whose lock is free was left by a
// process that died. The mount process holds the lock of its mount's "alive" file for life.
//
// An instance's record names its mount before the mount is looked for, and a mount is ended
// only under its own lock, when no record of a living instance names it.
package service
