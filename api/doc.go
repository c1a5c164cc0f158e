// Package api holds the types that the service and its clients exchange, and the errors
// they share. It imports nothing of ours and depends on no host facility, so any program
// can use it. Sizes are bytes, times RFC 3339, ids 64 hexadecimal digits where they name
// content (bases, overlays) and 12 where they name an instance or an operation.
package api
