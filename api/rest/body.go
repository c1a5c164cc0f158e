package rest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"cloudlet/api"
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
func parse(data []byte, v any) error {
	err := json.Unmarshal(data, v)
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		return bad("", "the body is not one JSON document: byte %d: %w", syntax.Offset, err)
	case errors.As(err, &kind):
		return bad(kind.Field, "%s: a %s cannot be given where a %s is wanted", kind.Field, kind.Value, wanted(kind.Type))
	case err != nil:
		return bad("", "the body cannot be understood: %w", err)
	}
	return checkFields(json.NewDecoder(bytes.NewReader(data)), reflect.TypeOf(v).Elem(), "")
}

// wanted names a Go type in JSON's words.
func wanted(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return "string"
	case reflect.Bool:
		return "boolean"
	case reflect.Slice:
		return "list"
	case reflect.Struct, reflect.Map, reflect.Pointer:
		return "object"
	}
	return "whole number in range"
}

// checkFields reads one value and refuses fields that t has not under exactly that name, and
// fields given twice: encoding/json takes both in silence.
func checkFields(dec *json.Decoder, t reflect.Type, path string) error {
	tok, err := dec.Token()
	if err != nil {
		return bad("", "the body cannot be understood: %w", err)
	}
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch tok {
	case json.Delim('['):
		for i := 0; dec.More(); i++ {
			if err := checkFields(dec, t.Elem(), path+"["+strconv.Itoa(i)+"]"); err != nil {
				return err
			}
		}
	case json.Delim('{'):
		seen := map[string]bool{}
		for dec.More() {
			key, err := dec.Token()
			if err != nil {
				return bad("", "the body cannot be understood: %w", err)
			}
			name, _ := key.(string)
			at := strings.TrimPrefix(path+"."+name, ".")
			field, ok := fieldOf(t, name)
			if !ok {
				return bad(at, "there is no field %q", at).fix("it knows %s", strings.Join(fieldsOf(t), ", "))
			}
			if seen[name] {
				return bad(at, "the field %q is given twice", at)
			}
			seen[name] = true
			if err := checkFields(dec, field, at); err != nil {
				return err
			}
		}
	default:
		return nil
	}
	_, err = dec.Token() // the closing one
	return err
}

func fieldOf(t reflect.Type, name string) (reflect.Type, bool) {
	for i := range t.NumField() {
		if f := t.Field(i); nameOf(f) == name {
			return f.Type, true
		}
	}
	return nil, false
}

func fieldsOf(t reflect.Type) []string {
	var names []string
	for i := range t.NumField() {
		names = append(names, nameOf(t.Field(i)))
	}
	return names
}

func nameOf(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	return name
}

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
