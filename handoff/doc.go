// Package handoff moves a running instance from one cloudlet, the source, to another, the
// destination: the protocol between them, as two state machines over verbs that they declare.
// This text is normative.
//
// # What must hold
//
//   - The guest never runs in two places. Only an operator who accepts the loss can bring that
//     about, and then the protocol ends it.
//   - Before go, whatever fails: the guest runs on at the source.
//   - After go it runs at the destination; or it has been proved that it did not and never
//     will, and it runs on at the source; or it is paused at the source, in doubt, with all
//     that was published in files, until the source knows or an operator decides.
//   - What the guest has acknowledged is not dropped silently: each way that can lose
//     something goes through Resolve, and Status.Loss says what.
//   - What was published, prepared and fetched is removed in the end.
//
// # Words
//
// Go is the commit: the moment when the source's journal says SourceGoing. An epoch is the
// number of a right to run an instance: each attempt to hand it off uses one that is higher
// than any before it, and the instance keeps it if it moves. A lineage is the id that an
// instance keeps wherever it goes. In doubt is a source after go that has heard nothing good
// for Limits.Patience, or something bad.
//
// # Messages
//
// The source sends messages, the destination answers each; it sends none of its own. Overlays
// are fetched by the destination from the URLs in them. A message and an answer are JSON
// objects (Message, Answer): version 1, MaxMessage bytes at most; unknown fields, trailing
// bytes and whatever breaks a limit are refused. A step is named by (handoff, epoch, kind,
// round). The same step again is answered again and not done again, however late it comes.
//
//	offer      may this instance come? Answered accepted (with the overlays that are lacking)
//	           or refused (with reasons).
//	round n    n overlays are published, here is the chain: fetch. Answered with the bytes
//	           that are missing yet.
//	prepare n  the guest is paused and this is all of it: mount it, load it, do not run it.
//	           Answered prepared.
//	go         run. Answered running.
//	ask        how is it? Answered complete once all bytes are at the destination, durably.
//	abort      before go only: it will not come. Answered never.
//	end        the source has discarded its VM. Answered closed.
//	supersede  of a higher epoch: an operator has let the guest run at the source. Answered
//	           superseded, or never.
//
// An answer carries the state of the destination. Two states are only ever answers: unknown
// (there is no record) and refused. Unknown proves nothing: the record may be lost. Whatever
// the destination itself did not say, such as an error of a proxy, is no answer (Peer).
//
// The fields that a Reason of a refusal may name are: base, chain, cloudlet (a handoff to
// itself), disk, epoch (the same lineage is here with this epoch or a higher one),
// fingerprint, lineage, machine, memory, port, token, version.
//
// # The source
//
//	            NewSource
//	                | open is on record
//	                v
//	  +---------- open ------------+   offer, rounds: the guest runs
//	  |             | pausing is on record
//	  |             v              |
//	  |          pausing ----------+   pause, last overlay, prepare
//	  |             | going is on record                       (GO)
//	  |             v
//	  |           going  --- go until answered ---+  doubt, operator
//	  |   never |   | running                     |
//	  v         |   v                             |
//	aborting <--+ moved  --- ask until complete --+
//	  |             | complete                    |
//	  |             v                             v
//	  |         discarding                     resuming
//	  |             |                        superseding
//	  v             v                             v
//	cancelled      done                        resumed
//
// Each arrow into a state is a record that is durable before anything that the state allows
// is done. Every record before go means the same, so one that cannot be written stops
// nothing but the handoff. From open and pausing every failure, every restart and Cancel lead
// to aborting.
//
//	open        may send offer, round; take rounds; not touch the guest otherwise.
//	pausing     may pause the guest; publish the last overlay; send prepare.
//	going       may send go, and nothing else; the guest stays paused. A restart sends go
//	            again. Answers: running, complete: moved. Never: aborting. All others: again.
//	moved       may send ask. Complete: discarding. All others: again.
//	discarding  discards the VM, releases what is published, sends end (for Patience).
//	aborting    lets the guest run on, if pausing was reached and it was not paused before;
//	            then releases; then sends abort (for Patience: a lease ends it otherwise).
//	resuming    lets the guest run on, and leaves nothing of the handoff in its VM.
//	superseding sends supersede (for Farewell), then releases. It does not touch the VM, of an
//	            instance that is an ordinary one: paused, captured, deleted, handed off again.
//
// Cancel works until go, and is refused with ErrTooLate from the moment on at which the
// record of go is being written. If it cannot be learned whether that record stands, go is
// not sent: the source withdraws, by a record of pausing that does stand, or by an abort that
// is answered never; until one of them the guest stays paused.
//
// In doubt (going and moved) the source goes on asking without end. An operator may decide:
// ResumeHere leads to resuming, from both; DiscardHere to discarding, from moved only, where
// it is known that the guest ran there. A decision is carried out once it is on record.
//
// # The destination
//
//	  (no record: unknown)
//	        | offer: accepted is on record
//	        v                   abort, lease, error,
//	     accepted ------------- supersede -------------> never
//	        | prepare: loaded, then prepared on record     ^
//	        v                                              |
//	     prepared -----------------------------------------+
//	        | go: went is on record
//	        v                VM gone
//	      went ----------------------+
//	        | run                    |
//	        v                VM gone v            supersede (from went,
//	     running ------------------> lost         running, complete, lost)
//	        | nothing is missing     |                 |
//	        v                        |                 v
//	     complete                    |            superseded
//	        | end                    | end
//	        v                        v
//	      closed <-------------------+
//
//	accepted    may fetch, mount, load a VM and leave it paused. Resources are those of a
//	            record in this state. Go is answered never: what was not prepared cannot run.
//	prepared    as accepted. If the VM is gone, go prepares it once more: it has not run.
//	went        runs the VM that is there, never another: if it is gone, it may have run, and
//	            is lost. Told as running once Run has succeeded.
//	running     fetches the rest.
//	complete    the instance is an ordinary one, except that the source still holds its VM.
//	closed      so is it here, without that.
//	never       the promise, durable before it is told, that this handoff will not run here.
//	            All of it is then removed.
//	lost        kept for its operator to look at.
//	superseded  the VM is paused and kept for its operator to look at.
//
// Before go a destination that hears nothing for its lease goes to never by itself: safe,
// since a go that comes later is answered never. After go it waits without end. Records of
// never and closed, and those of superseded once the VM is deleted, may be forgotten after a
// day, longer than any message can be late. An instance may be captured and deleted only in
// complete and closed. It may be handed off again in closed, and in complete only once that
// has lasted for a day: until the source has said end, its operator may choose ResumeHere, and
// supersede could not follow a guest that has left.
//
// # Faults
//
// A crash is the end of a process at any point: OpenSource and OpenDestination go on from the
// record. VMs and mounts are processes of their own and survive it. If a host restarts, its
// VMs are gone: a source before go may then make its VM again from what Final published, one
// after go needs none, a destination prepares again before went and is lost after it. An
// error of a verb may have had its effect or not; verbs are asked again until they succeed,
// except before go, where an error ends the handoff. An error of a Journal is followed by a
// look at which record stands. A destination whose disk is full removes what it holds of a
// handoff before go, and cannot become complete after it.
//
// What is not covered: an operator who chooses ResumeHere at a source that the destination has
// not heard of for a day, when the guest has been handed on from there; a destination that
// lies; a destination that loses its record and is then sent, late and in order, an offer, a
// prepare and a go of the same handoff; loss of power at the source before go, which loses
// what the same loss loses without a handoff.
//
// # Rounds
//
// Limits.Another is the rule: a round is taken while number, time and bytes allow, the pause
// without it would be too long, and it is expected to be smaller than the last by a factor.
// The last overlay is not one of them: it is always made, of the paused guest.
//
// # Concurrency
//
// One goroutine runs a Source; Cancel, Resolve and Status may be called from others. All
// methods of a Destination may be called concurrently; it works on one message at a time.
package handoff
