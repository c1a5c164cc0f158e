package nova

import (
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"

	"cloudlet/api"
)

// microversion is the 2.x that a client speaks, by its x.
type microversion int

// The microversions that are answered as Nova would: lowest, and highest, with which a
// migration can be aborted.
const (
	lowest  microversion = 1
	highest microversion = 24
)

// The microversions that add something here.
const (
	withAttributes  microversion = 3
	withLocked      microversion = 9
	withDescription microversion = 19
	withMigrations  microversion = 23
	withAbort       microversion = 24
)

// String writes it as clients do.
func (v microversion) String() string { return fmt.Sprintf("2.%d", int(v)) }

const (
	versionHeader = "OpenStack-API-Version"
	legacyHeader  = "X-OpenStack-Nova-API-Version"
)

var versionForm = regexp.MustCompile(`^([1-9]\d{0,3})\.(0|[1-9]\d{0,3})$`)

// versionOf reads which microversion a request is in: without a header the lowest one.
func versionOf(r *http.Request) (microversion, error) {
	text := ""
	for _, value := range r.Header.Values(versionHeader) {
		for one := range strings.SplitSeq(value, ",") {
			if service, version, ok := strings.Cut(strings.TrimSpace(one), " "); ok && strings.EqualFold(service, "compute") {
				text = strings.TrimSpace(version)
			}
		}
	}
	if text == "" {
		text = r.Header.Get(legacyHeader)
	}
	switch text {
	case "":
		return lowest, nil
	case "latest":
		return highest, nil
	}
	m := versionForm.FindStringSubmatch(text)
	if m == nil {
		return 0, bad("API version string %.40q is of an invalid format", text).fix("it must be of the form major.minor, or latest")
	}
	minor, _ := strconv.Atoi(m[2]) // four digits at most
	if v := microversion(minor); m[1] == "2" && v >= lowest && v <= highest {
		return v, nil
	}
	return 0, refuse(http.StatusNotAcceptable, api.Invalid, "version %s is not supported by the API: minimum is %s and maximum is %s", text, lowest, highest)
}

// announce says in which microversion the answer is.
func (v microversion) announce(w http.ResponseWriter) {
	w.Header().Set(versionHeader, "compute "+v.String())
	w.Header().Set(legacyHeader, v.String())
	w.Header().Add("Vary", versionHeader+", "+legacyHeader)
}

// link is where something can be asked for.
type link struct {
	Rel  string `json:"rel"`
	Href string `json:"href"`
}

// version describes the API to those who look for it.
type version struct {
	ID         string      `json:"id"`
	Status     string      `json:"status"`
	Version    string      `json:"version"`
	MinVersion string      `json:"min_version"`
	Updated    string      `json:"updated"`
	Links      []link      `json:"links"`
	MediaTypes []mediaType `json:"media-types,omitempty"`
}

type mediaType struct {
	Base string `json:"base"`
	Type string `json:"type"`
}

func (c *call) version() version {
	return version{
		ID: "v2.1", Status: "CURRENT", Version: highest.String(), MinVersion: lowest.String(), Updated: "2013-07-23T11:33:21Z",
		Links: []link{{"self", c.url("/v2.1/")}},
	}
}

// versions answers GET /.
func (h *Handler) versions(c *call) error {
	return c.answer(http.StatusOK, map[string][]version{"versions": {c.version()}})
}

// thisVersion answers GET /v2.1.
func (h *Handler) thisVersion(c *call) error {
	v := c.version()
	v.MediaTypes = []mediaType{{"application/json", "application/vnd.openstack.compute+json;version=2.1"}}
	return c.answer(http.StatusOK, map[string]version{"version": v})
}

// imageVersions answers GET /v2.
func (h *Handler) imageVersions(c *call) error {
	return c.answer(http.StatusOK, map[string][]version{"versions": {{
		ID: "v2.0", Status: "CURRENT", Version: "", MinVersion: "", Updated: "2013-07-23T11:33:21Z", Links: []link{{"self", c.url("/v2/")}},
	}}})
}
