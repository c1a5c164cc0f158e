package service

import (
	"bytes"
	"encoding/json"
	"net/url"
	"strings"

	"cloudlet/api"
)

// shownRef returns what was asked for as others may see it: a URL without user, password,
// query and fragment, which may be what gives access.
func shownRef(ref string) string {
	if !isRemote(strings.ToLower(ref)) {
		return ref
	}
	u, err := url.Parse(ref)
	if err != nil {
		return "..." // refused, or soon to fail
	}
	name := u.Scheme + "://" + u.Host + u.EscapedPath()
	if u.RawQuery != "" {
		name += "?..."
	}
	return name
}

// shown is the operation as others may see it.
func (r operationRecord) shown() api.Operation {
	op := r.Operation
	op.Request = shownRequest(op.Request)
	return op
}

// shownRequest is a request with its URLs as others may see them.
func shownRequest(request json.RawMessage) json.RawMessage {
	var fields map[string]json.RawMessage
	if !bytes.Contains(request, []byte("://")) || json.Unmarshal(request, &fields) != nil {
		return request
	}
	changed := false
	for _, name := range []string{"source", "ref"} {
		var ref string
		if json.Unmarshal(fields[name], &ref) != nil || shownRef(ref) == ref {
			continue
		}
		fields[name], _ = json.Marshal(shownRef(ref)) // a string
		changed = true
	}
	if !changed {
		return request
	}
	out, err := json.Marshal(fields)
	if err != nil {
		return nil
	}
	return out
}
