//go:build !fuzzing

package rest

import (
	"net/http"
	"sync"
	"testing"

	"github.com/pb33f/libopenapi"
	validator "github.com/pb33f/libopenapi-validator"
	"github.com/pb33f/libopenapi-validator/config"
	"github.com/stretchr/testify/require"
)

// described is the OpenAPI document, read once: that takes longer than all of a test.
var described = sync.OnceValues(func() (validator.Validator, error) {
	doc, err := libopenapi.NewDocument(openAPIDocument)
	if err != nil {
		return nil, err
	}
	v, errs := validator.NewValidator(doc, config.WithoutSecurityValidation(), config.WithFormatAssertions())
	if len(errs) > 0 {
		return nil, errs[0]
	}
	return v, nil
})

// holdToDocument holds an exchange against the document; what was refused may have been a
// request that the document does not allow.
func holdToDocument(t *testing.T, req *http.Request, resp *http.Response, body []byte) {
	t.Helper()
	v, err := described()
	require.NoError(t, err)
	if resp.StatusCode < 400 {
		ok, errs := v.ValidateHttpRequest(req)
		require.True(t, ok, "request %s %s: %v", req.Method, req.URL, errs)
	}
	ok, errs := v.ValidateHttpResponse(req, resp)
	for _, e := range errs {
		for _, s := range e.SchemaValidationErrors {
			t.Log(s.FieldPath, s.Reason)
		}
	}
	require.True(t, ok, "answer %d to %s %s: %v\n%s", resp.StatusCode, req.Method, req.URL, errs, body)
}

func TestOpenAPIIsValid(t *testing.T) {
	v, err := described()
	require.NoError(t, err)
	ok, errs := v.ValidateDocument()
	require.True(t, ok, "%v", errs)
	require.Equal(t, "3.1.0", readDocument(t).OpenAPI)
}
