package rest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"cloudlet/api"
	"cloudlet/api/strict"
)

const (
	typeJSON = "application/json"
	typeZip  = "application/zip"
)

// mediaType is the type of the body, which must be one of those wanted.
func mediaType(r *http.Request, wanted ...string) (string, error) {
	unfit := func(got string) error {
		return refuse(http.StatusUnsupportedMediaType, "the body's content type is %q", got).fix("send it as %s", strings.Join(wanted, " or ")).at("Content-Type").with("Accept", strings.Join(wanted, ", "))
	}
	values := r.Header.Values("Content-Type")
	if len(values) != 1 {
		return "", unfit(strings.Join(values, ", "))
	}
	got, params, err := mime.ParseMediaType(values[0])
	if err != nil || !slices.Contains(wanted, got) {
		return "", unfit(values[0])
	}
	if cs, ok := params["charset"]; ok && !strings.EqualFold(cs, "utf-8") {
		return "", unfit(values[0])
	}
	if enc := r.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		return "", refuse(http.StatusUnsupportedMediaType, "the body is encoded as %q", enc).fix("send it as it is").at("Content-Encoding")
	}
	return got, nil
}

// readJSON reads a body that is one JSON object.
func (s *server) readJSON(w *response, r *http.Request) ([]byte, error) {
	if _, err := mediaType(r, typeJSON); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(http.MaxBytesReader(w.ResponseWriter, r.Body, s.limits.Body))
	if err != nil {
		return nil, broken(err)
	}
	switch text := bytes.TrimSpace(data); {
	case len(text) == 0:
		return nil, bad("", "the body is empty").fix("send a JSON object")
	case !utf8.Valid(text):
		return nil, bad("", "the body is not UTF-8")
	case text[0] != '{':
		return nil, bad("", "the body is not a JSON object")
	}
	return data, nil
}

// broken says of a body that could not be read that it is the client's doing.
func broken(err error) error {
	var large *http.MaxBytesError
	var known *refusal
	if errors.As(err, &large) || errors.As(err, &known) || errors.Is(err, errStalled) {
		return err
	}
	return bad("", "the body broke off: %w", err).fix("send the request again")
}

// decode reads a JSON body into v, a pointer to a struct. Nothing may be in it that v lacks.
func (s *server) decode(w *response, r *http.Request, v any) error {
	data, err := s.readJSON(w, r)
	if err != nil {
		return err
	}
	return parse(data, v)
}

// parse is decode of a body that was read.
func parse(data []byte, v any) error { return strict.Decode(data, v) }

// has reports which of the names are fields of a body, to tell apart the requests that one
// route takes. The first one counts.
func has(data []byte, names ...string) (string, error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(data, &fields); err != nil {
		return "", bad("", "the body is not one JSON document: %w", err)
	}
	for _, name := range names {
		if _, ok := fields[name]; ok {
			return name, nil
		}
	}
	return "", nil
}

// accepted answers that an operation has begun.
func accepted(w *response, op api.Operation, err error) error {
	if err != nil {
		return err
	}
	w.Header().Set("Location", "/v1/operations/"+op.ID)
	return writeJSON(w, http.StatusAccepted, op)
}

// submit begins an operation on behalf of whoever sent a request.
func (s *server) submit(w *response, r *http.Request, req any) error {
	caller, err := callerOf(r)
	if err != nil {
		return err
	}
	op, err := s.service.Submit(r.Context(), caller, req)
	return accepted(w, op, err)
}

// flag reads a parameter that is true or false.
func flag(r *http.Request, name string) (bool, error) {
	switch v := r.URL.Query().Get(name); v {
	case "true":
		return true, nil
	case "false":
		return false, nil
	case "":
		if !r.URL.Query().Has(name) {
			return false, nil
		}
		fallthrough
	default:
		return false, bad(name, "%s=%q is neither true nor false", name, v)
	}
}

// number reads a header or parameter that is a whole number from 0 to most.
func number(name, text string, most int64) (int64, error) {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n < 0 || n > most || text[0] == '+' {
		return 0, bad(name, "%s %q is not a whole number from 0 to %d", name, text, most)
	}
	return n, nil
}
