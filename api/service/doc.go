// Package service is where bases, overlays, mounts and VMs meet: the store on disk, the verbs
// over it, and the operations that long work is. Several processes may use one store at the
// same time, and a process may die at any moment: what it had begun is swept up, ended with a
// reason or taken up by the next one; what it had finished stays.
//
// # Store
//
//	STATE/lock                     held for the moments in which names and records change
//	STATE/bases/ID/                a base, see package overlay; ID.json beside it: name, time
//	STATE/overlays/ID/overlay      an overlay; record.json: name, time
//	STATE/instances/ID/            record.json, vm/ (see vmm)
//	STATE/mounts/KEY/              spec.json, log, control socket, fs (the mountpoint)
//	STATE/profiles/ID              touch profile of an image, see overlay.MarshalProfile
//	STATE/cache/ID-SIZE            frames of an overlay at a URL that were fetched, locked while used
//	STATE/tmp/                     what is being made; moved to its place when whole
//	STATE/operations/ID/           record.json; cancel: another process asks for its end
//	STATE/active/ID                a mark: the operation has not ended
//	STATE/keys/HASH.json           which operation an idempotency key has begun
//	STATE/uploads/upload-ID/       upload.json, overlay: the bytes that have arrived
//	STATE/counts/                  what metrics know of the past
//	STATE/daemon.lock              held by the daemon
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
//
// # Operations
//
// Submit looks a request through, admits it and lays its operation down before it answers;
// then the work runs in a goroutine that Close joins. Admission and the idempotency key are
// decided under the store's lock, so no two requests get the same room or the same key. The
// process that works holds the lock of the operation's folder. Whoever finds an operation
// that has not ended and whose lock is free ends it, except for what the next daemon takes
// up: imports from a URL begin again, a run whose VM lives waits on for its first answer.
// Changes reach watchers and the disk ten times a second at most; only beginning and end are
// synced. Watchers in other processes read the record.
//
// # Handoffs
//
// STATE/handoffs/ID holds a side's journal, its meta data, and a folder for each overlay that
// is published or arrives. At the source the handoff is an operation, which holds the
// instance's lock; a daemon takes it up again from the journal. At the destination each
// message is handled as it comes, and a tick does the rest. Until the handoff is over on its
// side an instance's record names it, and nobody else may change the instance. An instance that
// has arrived is made of the launch's overlays and, the last ones of its chain, its own
// (record.Own), which go with it.
//
// # Callers
//
// A caller who is not Local names things of the store, or URLs that pass Config.AllowURLs: at
// once, at every redirect, and at the address that is dialled. The rules travel with the
// link of an overlay into instance records and mount processes. No path of a request reaches
// the file system unless its caller is Local.
package service
