// Package source reads the bytes of an overlay file from where they are: a local file, one
// that somebody still appends to, or a web server.
//
// A Source is an immutable run of bytes of known size. ReadAt fills the buffer wholly or
// returns an error, io.EOF only where the buffer reaches over the end; it obeys its context
// and is safe for concurrent use. What changes while it is open is found out as far as the
// place allows and reported as ErrChanged, for good: overlays are immutable, and what their
// hashes would refuse later is better refused by name now.
//
// A Source over a network retries one request with back-off, and goes on where the last
// answer ended. When it gives up, Temporary tells whether a later attempt may succeed: an
// outage is temporary; a file that is gone, forbidden or changed is not.
//
// Some sources grow: the file of an upload, and the download from a web server that does not
// answer ranges. Their bytes come in order, a read waits for its own, and once all are there
// the source is a local one.
//
// Names and errors never hold what may be a secret of a URL: user, password and query are
// left out.
package source
