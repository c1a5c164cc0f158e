// Package strict reads JSON that comes from outside. It takes what its type knows and nothing
// else: encoding/json lets unknown fields, fields in another case and fields given twice pass
// in silence, and what a client asked for and did not get is a defect that shows late. A
// json.RawMessage and the fields below it are left to whoever decodes that.
package strict

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"strconv"
	"strings"

	"cloudlet/api"
)

// Decode reads a document into v, a pointer to a struct. Every error is an *api.Error of the
// code Invalid that names the field.
func Decode(data []byte, v any) error {
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
	if err := check(json.NewDecoder(bytes.NewReader(data)), reflect.TypeOf(v).Elem(), ""); err != nil {
		return err
	}
	return nil
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

// check reads one value and refuses fields that t has not under exactly that name, and
// fields given twice: encoding/json takes both in silence.
func check(dec *json.Decoder, t reflect.Type, path string) *api.Error {
	tok, err := dec.Token()
	if err != nil {
		return bad("", "the body cannot be understood: %w", err)
	}
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	switch tok {
	case json.Delim('['):
		for i := 0; dec.More(); i++ {
			if err := check(dec, elem(t), path+"["+strconv.Itoa(i)+"]"); err != nil {
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
				return bad(at, "there is no field %q", at).Fix("it knows %s", strings.Join(fieldsOf(t), ", "))
			}
			if seen[name] {
				return bad(at, "the field %q is given twice", at)
			}
			seen[name] = true
			if err := check(dec, field, at); err != nil {
				return err
			}
		}
	default:
		return nil
	}
	if _, err = dec.Token(); err != nil { // the closing one
		return bad("", "the body cannot be understood: %w", err)
	}
	return nil
}

// elem is the type of a list's elements; nil: any.
func elem(t reflect.Type) reflect.Type {
	if t != nil && t.Kind() == reflect.Slice && t != rawType {
		return t.Elem()
	}
	return nil
}

var rawType = reflect.TypeFor[json.RawMessage]()

// fieldOf is the type of a field; nil: any.
func fieldOf(t reflect.Type, name string) (reflect.Type, bool) {
	switch {
	case t != nil && t.Kind() == reflect.Map:
		return t.Elem(), true
	case t == nil || t.Kind() != reflect.Struct: // a value that is looked at later
		return nil, true
	}
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

func bad(field, format string, args ...any) *api.Error {
	e := api.Errorf(api.Invalid, format, args...)
	e.Field = field
	return e
}
