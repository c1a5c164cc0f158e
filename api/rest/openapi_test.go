package rest

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

// document is what the tests look at in the OpenAPI document.
type document struct {
	OpenAPI    string                                `json:"openapi"`
	Paths      map[string]map[string]json.RawMessage `json:"paths"`
	Components struct {
		Schemas map[string]schema `json:"schemas"`
	} `json:"components"`
}

type schema struct {
	Properties map[string]struct {
		Type   any      `json:"type"`
		Format string   `json:"format"`
		Ref    string   `json:"$ref"`
		Enum   []string `json:"enum"`
		Items  struct {
			Ref string `json:"$ref"`
		} `json:"items"`
	} `json:"properties"`
	Required             []string `json:"required"`
	AdditionalProperties *bool    `json:"additionalProperties"`
}

type documented struct {
	Security   *[]any `json:"security"`
	Parameters []struct {
		Name string `json:"name"`
		In   string `json:"in"`
	} `json:"parameters"`
	RequestBody any                        `json:"requestBody"`
	Responses   map[string]json.RawMessage `json:"responses"`
}

func readDocument(t *testing.T) document {
	var d document
	require.NoError(t, json.Unmarshal(openAPIDocument, &d))
	return d
}

// operations are the documented ones by method and path.
func (d document) operations(t *testing.T) map[string]documented {
	out := map[string]documented{}
	for path, methods := range d.Paths {
		for method, raw := range methods {
			if method == "parameters" {
				continue
			}
			var op documented
			require.NoError(t, json.Unmarshal(raw, &op))
			out[strings.ToUpper(method)+" "+path] = op
		}
	}
	return out
}

// TestOpenAPIRoutes: the routes and their parameters, bodies and need of a token are those
// that the document has, no more and no fewer.
func TestOpenAPIRoutes(t *testing.T) {
	ops := readDocument(t).operations(t)
	var have, listed []string
	v1 := 0
	for _, rt := range routes() {
		name := rt.method + " " + rt.path
		have = append(have, name)
		if strings.HasPrefix(rt.path, "/v1/") && rt.path != "/v1/openapi.json" {
			v1++
		}
		op := ops[name]
		require.Equal(t, rt.body, op.RequestBody != nil, "body of %s", name)
		require.Equal(t, rt.public, op.Security != nil, "security of %s", name)
		var params []string
		for _, p := range op.Parameters {
			if p.In == "query" {
				params = append(params, p.Name)
			}
		}
		if !slices.Equal(rt.query, anyQuery) {
			require.ElementsMatch(t, rt.query, params, "parameters of %s", name)
		}
	}
	for name := range ops {
		listed = append(listed, name)
	}
	require.ElementsMatch(t, have, listed)
	require.Equal(t, 25, v1, "which is all that /v1 may have")
}

// TestOpenAPISchemas: the schemas have the fields of the types that are sent, with their
// JSON types, and what is always sent is required.
func TestOpenAPISchemas(t *testing.T) {
	d := readDocument(t)
	types := map[string]any{
		"Base": api.Base{}, "Overlay": api.Overlay{}, "Upload": api.Upload{}, "Instance": api.Instance{}, "Endpoint": api.Endpoint{}, "Event": api.Event{},
		"Mount": api.Mount{}, "Held": api.Held{}, "Operation": api.Operation{}, "Target": api.Target{}, "Error": api.Error{}, "Problem": problem{}, "Health": health{},
		"ImportBase": api.ImportBase{}, "CreateBase": api.CreateBase{}, "CaptureBase": api.CaptureBase{}, "Forward": api.Forward{}, "Probe": api.Probe{}, "ImportOverlay": api.ImportOverlay{},
		"CreateOverlay": api.CreateOverlay{}, "CreateUpload": api.CreateUpload{}, "Run": api.Run{}, "Action": action{}, "NewOperation": newOperation{},
		"HandOff": api.HandOff{}, "Handoff": api.Handoff{}, "HandoffRound": api.HandoffRound{}, "HandoffReason": api.HandoffReason{}, "Moved": api.Moved{},
	}
	require.ElementsMatch(t, slices.Collect(maps.Keys(types)), slices.Collect(maps.Keys(d.Components.Schemas)))
	requests := []string{"ImportBase", "CreateBase", "CaptureBase", "Forward", "Probe", "ImportOverlay", "CreateOverlay", "CreateUpload", "Run", "Action", "NewOperation", "HandOff"}
	for name, v := range types {
		t.Run(name, func(t *testing.T) {
			s := d.Components.Schemas[name]
			typ := reflect.TypeOf(v)
			var fields, always []string
			for i := range typ.NumField() {
				tag := typ.Field(i).Tag.Get("json")
				if tag == "-" {
					continue
				}
				field := fieldName(typ.Field(i))
				fields = append(fields, field)
				if !strings.Contains(tag, ",omit") {
					always = append(always, field)
				}
				p, ok := s.Properties[field]
				require.True(t, ok, "field %s", field)
				require.Equal(t, jsonType(typ.Field(i).Type), docType(p.Type, p.Format, p.Ref), "type of %s", field)
			}
			require.ElementsMatch(t, fields, slices.Collect(maps.Keys(s.Properties)))
			if slices.Contains(requests, name) {
				require.NotNil(t, s.AdditionalProperties)
				require.False(t, *s.AdditionalProperties)
				require.Subset(t, fields, s.Required)
			} else {
				require.ElementsMatch(t, always, s.Required)
			}
		})
	}
}

func jsonType(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[json.RawMessage]():
		return "object"
	case t.PkgPath() == "time" && t.Name() == "Time":
		return "date-time"
	}
	switch t.Kind() {
	case reflect.String:
		return "string"
	case reflect.Bool:
		return "boolean"
	case reflect.Slice:
		return "array"
	case reflect.Int, reflect.Int64, reflect.Uint64:
		return "integer"
	case reflect.Float64:
		return "number"
	}
	return "object"
}

func docType(typ any, format, ref string) string {
	switch v := typ.(type) {
	case string:
		if format == "date-time" {
			return format
		}
		return v
	case []any: // object or null
		return v[0].(string)
	}
	if ref != "" {
		return "object"
	}
	return ""
}

// TestOpenAPIValues: what the document lists as the values of a field are the constants.
func TestOpenAPIValues(t *testing.T) {
	d := readDocument(t)
	constants := apiConstants(t)
	for _, row := range []struct{ schema, field, typ string }{
		{"Instance", "state", "State"}, {"Operation", "kind", "Kind"}, {"Operation", "state", "OperationState"},
		{"Action", "action", "Action"}, {"Error", "code", "Code"}, {"Problem", "code", "Code"}, {"Handoff", "side", "HandoffSide"},
	} {
		require.NotEmpty(t, constants[row.typ])
		require.ElementsMatch(t, constants[row.typ], d.Components.Schemas[row.schema].Properties[row.field].Enum, "%s of %s", row.field, row.schema)
	}
	for _, a := range constants["Action"] {
		require.True(t, known(api.Action(a)), a)
	}
}

// apiConstants are the string constants of package api by their type.
func apiConstants(t *testing.T) map[string][]string {
	out := map[string][]string{}
	for _, name := range []string{"../types.go", "../operations.go", "../errors.go", "../handoff.go"} {
		file, err := parser.ParseFile(gotoken.NewFileSet(), name, nil, parser.SkipObjectResolution)
		require.NoError(t, err)
		for _, decl := range file.Decls {
			g, ok := decl.(*ast.GenDecl)
			if !ok || g.Tok != gotoken.CONST {
				continue
			}
			for _, spec := range g.Specs {
				v := spec.(*ast.ValueSpec)
				typ, ok := v.Type.(*ast.Ident)
				if !ok {
					continue
				}
				out[typ.Name] = append(out[typ.Name], strings.Trim(v.Values[0].(*ast.BasicLit).Value, `"`))
			}
		}
	}
	return out
}

// fieldName is what a field is called in JSON.
func fieldName(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	return name
}
