// Package appclient is a client of the test guest's application that notices whatever a
// handoff loses: it appends records one after the other, repeats each until it is
// acknowledged, finds the application again when it has moved, and measures how long it heard
// nothing.
//
// Faults are what must not be: an answer from which something acknowledged is missing, in
// memory or in the synced file, one that goes back behind an earlier one, one of another
// application, one that was counted twice. A worker whose record is refused since the one
// before is missing stops there. At the end Verify compares the journals.
//
// All methods of a Client are safe for concurrent use.
package appclient
