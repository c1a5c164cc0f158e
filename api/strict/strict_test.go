package strict

import (
	"encoding/json"
	"testing"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

type inner struct {
	N int `json:"n"`
}

type outer struct {
	Name string                     `json:"name"`
	Sub  *inner                     `json:"sub,omitempty"`
	List []inner                    `json:"list,omitempty"`
	Tags map[string]string          `json:"tags,omitempty"`
	Raw  json.RawMessage            `json:"raw,omitempty"`
	Raws map[string]json.RawMessage `json:"raws,omitempty"`
}

// TestDecode: what a type knows is taken, and what it does not is named.
func TestDecode(t *testing.T) {
	for name, tc := range map[string]struct {
		text  string
		field string // "-": no error
	}{
		"all":                     {`{"name":"x","sub":{"n":1},"list":[{"n":2}],"tags":{"a":"b"},"raw":[{"x":1}],"raws":{"k":{"z":[1]}}}`, "-"},
		"nulls":                   {`{"name":null,"sub":null,"list":null,"tags":null,"raw":null}`, "-"},
		"unknown":                 {`{"other":1}`, "other"},
		"unknown below":           {`{"sub":{"m":1}}`, "sub.m"},
		"unknown in a list":       {`{"list":[{"n":1},{"m":1}]}`, "list[1].m"},
		"capitals":                {`{"Name":"x"}`, "Name"},
		"twice":                   {`{"name":"x","name":"y"}`, "name"},
		"twice in a map":          {`{"tags":{"a":"b","a":"c"}}`, "tags.a"},
		"twice in what comes raw": {`{"raw":{"a":1,"a":2}}`, "raw.a"},
		"a map's value":           {`{"tags":{"a":1}}`, "tags"},
		"a text for a number":     {`{"sub":{"n":"1"}}`, "sub.n"},
		"a list for an object":    {`{"sub":[]}`, "sub"},
		"two documents":           {`{}{}`, ""},
		"half":                    {`{"name":`, ""},
		"nothing":                 {``, ""},
	} {
		t.Run(name, func(t *testing.T) {
			var v outer
			err := Decode([]byte(tc.text), &v)
			if tc.field == "-" {
				require.NoError(t, err)
				return
			}
			var e *api.Error
			require.ErrorAs(t, err, &e)
			require.Equal(t, api.Invalid, e.Code)
			require.Equal(t, tc.field, e.Field)
			require.NotEmpty(t, e.Detail)
		})
	}
}
