package rest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"

	"cloudlet/api"
)

// problem is an RFC 9457 document. Without type the title is that of the status.
type problem struct {
	Type   string   `json:"type"`
	Title  string   `json:"title"`
	Status int      `json:"status"`
	Detail string   `json:"detail"`
	Code   api.Code `json:"code"`
	Field  string   `json:"field,omitempty"`
	Remedy string   `json:"remedy,omitempty"`
}

// refusal is an error with a status that its code alone does not tell.
type refusal struct {
	cause  *api.Error
	status int
	header http.Header
}

// Error is that of the api.Error.
func (e *refusal) Error() string { return e.cause.Error() }

// Unwrap makes the api.Error known to errors.As.
func (e *refusal) Unwrap() error { return e.cause }

func refuse(status int, format string, args ...any) *refusal {
	code := api.Invalid
	switch status {
	case http.StatusNotFound:
		code = api.NotFound
	case http.StatusConflict:
		code = api.Conflict
	case http.StatusRequestTimeout:
		code = api.TimedOut
	case http.StatusServiceUnavailable, http.StatusTooManyRequests:
		code = api.Unavailable
	}
	return &refusal{cause: api.Errorf(code, format, args...), status: status, header: http.Header{}}
}

// fix gives the refusal a remedy.
func (e *refusal) fix(format string, args ...any) *refusal {
	e.cause.Remedy = fmt.Sprintf(format, args...)
	return e
}

// at names the field, parameter or header that is wrong.
func (e *refusal) at(field string) *refusal {
	e.cause.Field = field
	return e
}

// with gives the refusal a header.
func (e *refusal) with(key, value string) *refusal {
	e.header.Set(key, value)
	return e
}

// bad is a 400 that names what is wrong: a field, a parameter, a header.
func bad(field, format string, args ...any) *refusal {
	return refuse(http.StatusBadRequest, format, args...).at(field)
}

// retryAfter is what a client that was refused for want of room is told to wait, in seconds.
const retryAfter = 1

// problemOf translates any error of a verb: the one place where errors become statuses.
func problemOf(err error) (problem, http.Header) {
	var known *refusal
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &known):
	case errors.As(err, &large):
		known = refuse(http.StatusRequestEntityTooLarge, "the body is larger than %d bytes", large.Limit)
	case errors.Is(err, errStalled):
		known = refuse(http.StatusRequestTimeout, "the body stalled").fix("send it without pauses, or go on from where it stopped")
	default:
		var e *api.Error
		if !errors.As(err, &e) {
			e = &api.Error{Code: api.Internal, Detail: err.Error()}
			switch {
			case errors.Is(err, context.Canceled):
				e.Code = api.Cancelled
			case errors.Is(err, context.DeadlineExceeded):
				e.Code = api.TimedOut
			}
		}
		known = &refusal{cause: e, status: e.Code.HTTPStatus(), header: http.Header{}}
	}
	if known.status == http.StatusServiceUnavailable || known.status == http.StatusTooManyRequests {
		known.header.Set("Retry-After", strconv.Itoa(retryAfter))
	}
	return problem{
		Type: "about:blank", Title: http.StatusText(known.status), Status: known.status,
		Detail: known.cause.Detail, Code: known.cause.Code, Field: known.cause.Field, Remedy: known.cause.Remedy,
	}, known.header
}

// writeProblem answers with a problem. Nothing must have been written before.
func writeProblem(w http.ResponseWriter, err error) {
	p, header := problemOf(err)
	for key, values := range header {
		w.Header()[key] = values
	}
	for _, key := range []string{"Content-Length", "Content-Range", "Etag", "Last-Modified", "Location"} {
		if _, own := header[key]; !own {
			w.Header().Del(key)
		}
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(p.Status)
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(p) // the client may be gone; there is nobody else to tell
}
