package api

import (
	"errors"
	"fmt"
	"net/http"
)

// Code says what kind of failure an Error is.
type Code string

// The kinds of failure. Commands map each to an exit code, the REST API to a status.
const (
	Invalid     Code = "invalid"     // the request cannot be right: wrong value, wrong file
	NotFound    Code = "not_found"   // the thing named does not exist
	Conflict    Code = "conflict"    // not in this state: in use, busy, exists already
	Damaged     Code = "damaged"     // content does not match its hashes
	Unavailable Code = "unavailable" // this host cannot: no FUSE, no QEMU, no space, no permission
	TimedOut    Code = "timed_out"   // a bound was reached
	Cancelled   Code = "cancelled"   // the caller gave up
	Internal    Code = "internal"    // everything else
)

// HTTPStatus returns the status that answers a request which failed in this way.
func (c Code) HTTPStatus() int {
	switch c {
	case Invalid:
		return http.StatusBadRequest
	case NotFound:
		return http.StatusNotFound
	case Conflict, Cancelled:
		return http.StatusConflict
	case Damaged:
		return http.StatusUnprocessableEntity
	case Unavailable:
		return http.StatusServiceUnavailable
	case TimedOut:
		return http.StatusGatewayTimeout
	}
	return http.StatusInternalServerError
}

// Error is a failure with what a user needs to act on it.
type Error struct {
	Code   Code   `json:"code"`
	Detail string `json:"detail"`           // names the thing
	Field  string `json:"field,omitempty"`  // of the request, where one is wrong
	Remedy string `json:"remedy,omitempty"` // what to do
	Err    error  `json:"-"`                // cause, part of Detail already
}

// Error returns detail and remedy.
func (e *Error) Error() string {
	if e.Remedy == "" {
		return e.Detail
	}
	return e.Detail + ": " + e.Remedy
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an Error whose detail is formatted as by fmt.Errorf, %w included.
func Errorf(code Code, format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Code: code, Detail: err.Error(), Err: errors.Unwrap(err)}
}

// Fix returns e with a remedy.
func (e *Error) Fix(format string, args ...any) *Error {
	e.Remedy = fmt.Sprintf(format, args...)
	return e
}

// CodeOf returns the code of the first Error in err's chain, Internal where there is none.
func CodeOf(err error) Code {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return Internal
}
