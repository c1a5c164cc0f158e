// Package client is the service's API for Go programs: a method for each route of /v1, over a
// unix socket, over TCP with a token, or straight into a handler of the same process (Local).
//
// Errors of the service arrive as *api.Error with the code, field and remedy it gave; a
// service that cannot be reached is api.Unavailable. When the ctx of a call has ended, the
// error is that of the ctx. Requests that carry no stream are repeated a few times when the
// connection fails; a POST has an Idempotency-Key, so that repeating it does nothing twice.
// Redirects are not followed, so that a token reaches no other host.
//
// Long work is an api.Operation: the methods that begin one return it at once. Wait follows
// it to its end, and Result reads what it made.
//
// A Client is safe for concurrent use. The package imports the types of api and the standard
// library only.
package client
