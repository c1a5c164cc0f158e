package nova

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"strconv"

	"cloudlet/api"
)

// refusal is an error with a status that its code alone does not tell.
type refusal struct {
	cause  *api.Error
	status int
}

// Error is that of the api.Error.
func (e *refusal) Error() string { return e.cause.Error() }

// Unwrap makes the api.Error known to errors.As.
func (e *refusal) Unwrap() error { return e.cause }

func refuse(status int, code api.Code, format string, args ...any) *refusal {
	return &refusal{cause: api.Errorf(code, format, args...), status: status}
}

// fix gives the refusal a remedy.
func (e *refusal) fix(format string, args ...any) *refusal {
	e.cause = e.cause.Fix(format, args...)
	return e
}

// bad is a 400.
func bad(format string, args ...any) *refusal {
	return refuse(http.StatusBadRequest, api.Invalid, format, args...)
}

// missing is a 404.
func missing(format string, args ...any) *refusal {
	return refuse(http.StatusNotFound, api.NotFound, format, args...)
}

// conflict is a 409.
func conflict(format string, args ...any) *refusal {
	return refuse(http.StatusConflict, api.Conflict, format, args...)
}

// faultNames are the words under which Nova answers with a status.
var faultNames = map[int]string{
	http.StatusBadRequest: "badRequest", http.StatusUnauthorized: "unauthorized", http.StatusForbidden: "forbidden",
	http.StatusNotFound: "itemNotFound", http.StatusMethodNotAllowed: "badMethod", http.StatusConflict: "conflictingRequest",
	http.StatusRequestEntityTooLarge: "overLimit", http.StatusUnsupportedMediaType: "badMediaType",
	http.StatusTooManyRequests: "overLimit", http.StatusNotImplemented: "notImplemented", http.StatusServiceUnavailable: "serviceUnavailable",
}

// fault is Nova's form of an error.
type fault struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
	Created string `json:"created,omitempty"` // of a server's
}

// statusOf is the status of an error: that of the refusal, or of the code.
func statusOf(err error) int {
	var known *refusal
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &known):
		return known.status
	case errors.As(err, &large):
		return http.StatusRequestEntityTooLarge
	case errors.Is(err, os.ErrDeadlineExceeded):
		return http.StatusRequestTimeout
	case errors.Is(err, context.DeadlineExceeded):
		return http.StatusGatewayTimeout
	}
	return api.CodeOf(err).HTTPStatus()
}

// wordsOf is what an error says: what is wrong, and what to do.
func wordsOf(err error) string {
	var known *api.Error
	if errors.As(err, &known) {
		return known.Error()
	}
	return err.Error()
}

// writeFault answers with an error. Nothing must have been written before.
func writeFault(w http.ResponseWriter, err error) {
	status := statusOf(err)
	name, ok := faultNames[status]
	if !ok {
		name = "computeFault"
	}
	switch status {
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", `Token realm="cloudlet"`)
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", strconv.Itoa(retryAfter))
	}
	w.Header().Del("Location")
	write(w, status, map[string]fault{name: {Code: status, Message: wordsOf(err)}})
}

// retryAfter is what a client that was refused for want of room is told to wait, in seconds.
const retryAfter = 1

// write answers with a document.
func write(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v) // the client may be gone; there is nobody else to tell
}
