// Package rest is the service over HTTP: the routes under /v1, and beside them /healthz,
// /readyz, /metrics and the OpenAPI document. New makes the handler, Serve runs it on
// listeners. The handler is safe for concurrent use and keeps no state of its own beyond
// tokens, counters and the number of requests under way.
//
// # Callers
//
// Who speaks over a unix socket is known by the uid of its process: the daemon's own and root
// may do everything, others nothing. Who speaks in this process (see Local) may do everything.
// Whoever else brings a bearer token from the tokens file:
//
//	# ROLE NAME TOKEN, one a line
//	read    dashboard  4a8...
//	operate backend    9f1...
//	peer    edge-2     c07...
//
// read may ask, operate may do everything, peer is for other cloudlets: it may only fetch the
// content of overlays and send messages of the handoff protocol. The file must be readable by
// its owner alone. It is read again when it changes; one that cannot be understood changes
// nothing, and is reported to the log.
//
// What a handoff publishes is fetched without a token: the key in its URL is the right to it,
// for as long as the handoff goes on. Queries of URLs are never logged.
//
// # Refusals
//
// Every failure is a problem document (RFC 9457) that carries the code, field and remedy of an
// api.Error. Fields and query parameters that a route does not know are refused, as are field
// names in another case, fields given twice and anything after the document. Bodies, headers,
// the time for either and the number of requests at once are bounded; a body that stalls ends
// with 408. An answer that breaks after its first byte ends the connection, so that it cannot
// be taken for a whole one: the handler then panics with http.ErrAbortHandler.
package rest
