package nova

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

// body of a request for a server, with more fields.
func creation(image, flavor, more string) string {
	return fmt.Sprintf(`{"server":{"name":"n","imageRef":%q,"flavorRef":%q%s}}`, image, flavor, more)
}

// TestBad: what clients send wrongly is refused in Nova's form, with the reason in words, and
// nothing is done.
func TestBad(t *testing.T) {
	disk, ov := imageID(baseID, baseDisk), imageID(overlayID, overlayImage)
	const small, big = "c1.m256.d3", "c2.m1024.d8"
	action := func(n string) string { return "/v2.1/servers/" + server(n) + "/action" }
	for name, tc := range map[string]struct {
		method, path, body string
		status             int
		fault              string
		words              []string
	}{
		"no such path":            {"GET", "/v2.1/volumes", "", 404, "itemNotFound", []string{"/v2.1/volumes"}},
		"no such method":          {"PATCH", "/v2.1/servers", "", 405, "badMethod", []string{"GET"}},
		"unknown filter":          {"GET", "/v2.1/servers?colour=red", "", 400, "badRequest", []string{"colour", "status"}},
		"filter given twice":      {"GET", "/v2.1/servers?status=A&status=B", "", 400, "badRequest", []string{"status"}},
		"broken query":            {"GET", "/v2.1/servers?a=%zz", "", 400, "badRequest", nil},
		"name that is no pattern": {"GET", "/v2.1/servers?name=(", "", 400, "badRequest", []string{"("}},
		"limit":                   {"GET", "/v2.1/servers?limit=-1", "", 400, "badRequest", []string{"-1"}},
		"marker":                  {"GET", "/v2.1/servers?marker=x", "", 400, "badRequest", []string{"marker"}},
		"minRam":                  {"GET", "/v2.1/flavors?minRam=x", "", 400, "badRequest", []string{"minRam"}},
		"no such flavor":          {"GET", "/v2.1/flavors/m1.tiny", "", 404, "itemNotFound", []string{"m1.tiny"}},
		"no such image":           {"GET", "/v2.1/images/debian", "", 404, "itemNotFound", []string{"debian"}},
		"image of nothing":        {"GET", "/v2/images/" + imageID(strings.Repeat("34", 32), baseDisk), "", 404, "itemNotFound", nil},
		"overlay removed since":   {"GET", "/v2/images/" + promisedID("00000000001e", overlayImage), "", 404, "itemNotFound", nil},
		"promise of another kind": {"GET", "/v2/images/" + promisedID("00000000001d", overlayImage), "", 404, "itemNotFound", nil},
		"part of a base":          {"DELETE", "/v2/images/" + disk, "", 403, "forbidden", []string{"DELETE /v1/bases/" + baseID}},
		"image that is coming":    {"DELETE", "/v2/images/" + promisedID("00000000001a", overlayImage), "", 409, "conflictingRequest", []string{"saving"}},
		"no such server":          {"GET", "/v2.1/servers/" + server("ff"), "", 404, "itemNotFound", []string{server("ff")}},
		"name of a server":        {"GET", "/v2.1/servers/run", "", 404, "itemNotFound", []string{"run"}},
		"delete none":             {"DELETE", "/v2.1/servers/" + server("ff"), "", 404, "itemNotFound", nil},
		"metadatum":               {"GET", "/v2.1/servers/" + server("1") + "/metadata/x", "", 404, "itemNotFound", []string{"x"}},
		"no such network":         {"GET", "/v2.1/servers/" + server("1") + "/ips/public", "", 404, "itemNotFound", []string{"public"}},
		"change metadata":         {"POST", "/v2.1/servers/" + server("1") + "/metadata", `{"metadata":{}}`, 403, "forbidden", []string{"overlay_url"}},
		"migrations too early":    {"GET", "/v2.1/servers/" + server("7") + "/migrations", "", 404, "itemNotFound", []string{"2.23"}},
		"body of a GET":           {"GET", "/v2.1/servers", `{}`, 400, "badRequest", []string{"no body"}},

		"no JSON":             {"POST", "/v2.1/servers", `{`, 400, "badRequest", []string{"JSON"}},
		"no object":           {"POST", "/v2.1/servers", `[]`, 400, "badRequest", []string{"object"}},
		"null":                {"POST", "/v2.1/servers", `null`, 400, "badRequest", []string{"object"}},
		"two documents":       {"POST", "/v2.1/servers", `{}{}`, 400, "badRequest", nil},
		"no UTF-8":            {"POST", "/v2.1/servers", "{\"server\":\"\xff\"}", 400, "badRequest", nil},
		"not wrapped":         {"POST", "/v2.1/servers", `{"name":"n"}`, 400, "badRequest", []string{"name", "server"}},
		"empty":               {"POST", "/v2.1/servers", `{}`, 400, "badRequest", []string{"imageRef"}},
		"unknown field":       {"POST", "/v2.1/servers", creation(disk, small, `,"colour":"red"`), 400, "badRequest", []string{"server.colour"}},
		"field in capitals":   {"POST", "/v2.1/servers", creation(disk, small, `,"NAME":"m"`), 400, "badRequest", []string{"server.NAME"}},
		"field twice":         {"POST", "/v2.1/servers", creation(disk, small, `,"name":"m"`), 400, "badRequest", []string{"twice"}},
		"metadata twice":      {"POST", "/v2.1/servers", creation(disk, small, `,"metadata":{"probe":"1/","probe":"2/"}`), 400, "badRequest", []string{"twice"}},
		"wrong type":          {"POST", "/v2.1/servers", creation(disk, small, `,"metadata":{"overlay_url":7}`), 400, "badRequest", []string{"string"}},
		"no image":            {"POST", "/v2.1/servers", `{"server":{"name":"n","flavorRef":"1"}}`, 400, "badRequest", []string{"imageRef"}},
		"missing image":       {"POST", "/v2.1/servers", creation(imageID(strings.Repeat("34", 32), baseDisk), small, ""), 400, "badRequest", []string{"could not be found"}},
		"image by name":       {"POST", "/v2.1/servers", creation("debian-disk", small, ""), 400, "badRequest", []string{"debian-disk"}},
		"memory image":        {"POST", "/v2.1/servers", creation(imageID(baseID, baseMemory), small, ""), 400, "badRequest", []string{"cloudlet_base_memory", disk}},
		"image that comes":    {"POST", "/v2.1/servers", creation(promisedID("00000000001a", overlayImage), small, ""), 409, "conflictingRequest", []string{"saving"}},
		"image that failed":   {"POST", "/v2.1/servers", creation(promisedID("00000000001c", overlayImage), small, ""), 400, "badRequest", []string{"broken"}},
		"no flavor":           {"POST", "/v2.1/servers", creation(disk, "", ""), 400, "badRequest", []string{"flavorRef"}},
		"missing flavor":      {"POST", "/v2.1/servers", creation(disk, "m1.tiny", ""), 400, "badRequest", []string{"m1.tiny", small}},
		"wrong flavor":        {"POST", "/v2.1/servers", creation(disk, big, ""), 400, "badRequest", []string{small}},
		"overlay twice":       {"POST", "/v2.1/servers", creation(ov, small, `,"metadata":{"overlay_url":"http://a/b"}`), 400, "badRequest", []string{"overlay"}},
		"overlay by path":     {"POST", "/v2.1/servers", creation(disk, small, `,"metadata":{"overlay_url":"/etc/passwd"}`), 400, "badRequest", []string{"URL"}},
		"unknown metadata":    {"POST", "/v2.1/servers", creation(disk, small, `,"metadata":{"colour":"red"}`), 400, "badRequest", []string{"colour", "overlay_url"}},
		"receive a handoff":   {"POST", "/v2.1/servers", creation(disk, small, `,"metadata":{"handoff_info":"x"}`), 400, "badRequest", []string{"handoff_url"}},
		"ports":               {"POST", "/v2.1/servers", creation(disk, small, `,"metadata":{"ports":"80,x"}`), 400, "badRequest", []string{"x"}},
		"port 0":              {"POST", "/v2.1/servers", creation(disk, small, `,"metadata":{"ports":"0"}`), 400, "badRequest", nil},
		"port of a name":      {"POST", "/v2.1/servers", creation(disk, small, `,"metadata":{"ports":"host:1:1"}`), 400, "badRequest", nil},
		"four parts":          {"POST", "/v2.1/servers", creation(disk, small, `,"metadata":{"ports":"1:1:1:1"}`), 400, "badRequest", nil},
		"probe":               {"POST", "/v2.1/servers", creation(disk, small, `,"metadata":{"probe":"healthz"}`), 400, "badRequest", []string{"PORT/PATH"}},
		"many":                {"POST", "/v2.1/servers", creation(disk, small, `,"max_count":2`), 400, "badRequest", []string{"max_count"}},
		"volumes":             {"POST", "/v2.1/servers", creation(disk, small, `,"block_device_mapping_v2":[{"source_type":"volume","destination_type":"volume"}]`), 400, "badRequest", []string{"volumes"}},
		"networks":            {"POST", "/v2.1/servers", creation(disk, small, `,"networks":[{"uuid":"x"}]`), 400, "badRequest", []string{"ports"}},
		"security groups":     {"POST", "/v2.1/servers", creation(disk, small, `,"security_groups":[{"name":"web"}]`), 400, "badRequest", []string{"web"}},
		"config drive":        {"POST", "/v2.1/servers", creation(disk, small, `,"config_drive":true`), 400, "badRequest", []string{"config_drive"}},
		"zone":                {"POST", "/v2.1/servers", creation(disk, small, `,"availability_zone":"moon"`), 400, "badRequest", []string{"moon"}},
		"disk config":         {"POST", "/v2.1/servers", creation(disk, small, `,"OS-DCF:diskConfig":"NEVER"`), 400, "badRequest", []string{"NEVER"}},
		"a later description": {"POST", "/v2.1/servers", creation(disk, small, `,"description":"d"`), 400, "badRequest", []string{"2.19"}},
		"user data":           {"POST", "/v2.1/servers", creation(disk, small, `,"user_data":"aGk="`), 400, "badRequest", []string{"user_data"}},
		"key":                 {"POST", "/v2.1/servers", creation(disk, small, `,"key_name":"k"`), 400, "badRequest", []string{"key_name"}},

		"no action":               {"POST", action("1"), `{}`, 400, "badRequest", []string{"0 actions"}},
		"two actions":             {"POST", action("1"), `{"pause":null,"unpause":null}`, 400, "badRequest", []string{"pause", "unpause"}},
		"unknown action":          {"POST", action("1"), `{"evacuate":{}}`, 400, "badRequest", []string{"evacuate", "os-stop"}},
		"arguments of none":       {"POST", action("1"), `{"pause":{"x":1}}`, 400, "badRequest", []string{"null"}},
		"action on none":          {"POST", action("ff"), `{"pause":null}`, 404, "itemNotFound", nil},
		"pause a paused":          {"POST", action("2"), `{"pause":null}`, 409, "conflictingRequest", []string{"vm_state paused"}},
		"unpause a running":       {"POST", action("1"), `{"unpause":null}`, 409, "conflictingRequest", []string{"vm_state active"}},
		"unpause a stopped":       {"POST", action("3"), `{"unpause":null}`, 409, "conflictingRequest", []string{"vm_state stopped"}},
		"start a running":         {"POST", action("1"), `{"os-start":null}`, 409, "conflictingRequest", nil},
		"start an ended":          {"POST", action("4"), `{"os-start":null}`, 409, "conflictingRequest", []string{"stopped by request", "create another"}},
		"stop a lost":             {"POST", action("5"), `{"os-stop":null}`, 409, "conflictingRequest", []string{"mount has died"}},
		"pause one that leaves":   {"POST", action("7"), `{"pause":null}`, 409, "conflictingRequest", []string{"MIGRATING"}},
		"pause one that moved":    {"POST", action("6"), `{"pause":null}`, 409, "conflictingRequest", []string{"DELETED"}},
		"pause one that comes":    {"POST", action("a"), `{"pause":null}`, 409, "conflictingRequest", []string{"BUILD"}},
		"console of none":         {"POST", action("a"), `{"os-getConsoleOutput":{}}`, 409, "conflictingRequest", nil},
		"console length":          {"POST", action("1"), `{"os-getConsoleOutput":{"length":"x"}}`, 400, "badRequest", []string{"length"}},
		"soft reboot":             {"POST", action("1"), `{"reboot":{"type":"SOFT"}}`, 400, "badRequest", []string{"HARD"}},
		"base without name":       {"POST", action("1"), `{"cloudlet-base":{}}`, 400, "badRequest", []string{"name"}},
		"base with more":          {"POST", action("1"), `{"cloudlet-base":{"name":"b","x":1}}`, 400, "badRequest", []string{"x"}},
		"base of nothing":         {"POST", action("1"), `{"cloudlet-base":null}`, 400, "badRequest", []string{"object"}},
		"base of one that leaves": {"POST", action("7"), `{"cloudlet-base":{"name":"b"}}`, 409, "conflictingRequest", nil},
		"overlay without name":    {"POST", action("1"), `{"cloudlet-overlay-finish":{}}`, 400, "badRequest", []string{"overlay-name"}},
		"overlay of an ended":     {"POST", action("4"), `{"cloudlet-overlay-finish":{"overlay-name":"o"}}`, 409, "conflictingRequest", nil},
		"handoff without URL":     {"POST", action("1"), `{"cloudlet-handoff":{"dest_token":"t"}}`, 400, "badRequest", []string{"handoff_url"}},
		"handoff without token":   {"POST", action("1"), `{"cloudlet-handoff":{"handoff_url":"http://a:1"}}`, 400, "badRequest", []string{"dest_token"}},
		"handoff to a file":       {"POST", action("1"), `{"cloudlet-handoff":{"handoff_url":"file:///tmp/x","dest_token":"t"}}`, 400, "badRequest", []string{"cloudlet-overlay-finish"}},
		"handoff of an ended":     {"POST", action("4"), `{"cloudlet-handoff":{"handoff_url":"http://a:1","dest_token":"t"}}`, 409, "conflictingRequest", nil},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			status, h, body := r.send(tc.method, tc.path, tc.body)
			require.Equal(t, tc.status, status, body)
			require.Equal(t, "application/json", h.Get("Content-Type"))
			requireFault(t, tc.status, tc.fault, body, tc.words...)
			require.Empty(t, r.did)
		})
	}
}

// TestBadLater: what is wrong in later microversions.
func TestBadLater(t *testing.T) {
	r := newRig(t)
	for _, tc := range []struct {
		method, path, body string
		status             int
		fault              string
	}{
		{"GET", "/v2.1/servers/" + server("7") + "/migrations/1", "", 404, "itemNotFound"},
		{"GET", "/v2.1/servers/" + server("1") + "/migrations/42", "", 404, "itemNotFound"},
		{"DELETE", "/v2.1/servers/" + server("1") + "/migrations/43", "", 400, "badRequest"},
		{"POST", "/v2.1/servers", creation(imageID(baseID, baseDisk), "c1.m256.d3", `,"description":"d"`), 400, "badRequest"},
	} {
		status, _, body := r.send(tc.method, tc.path, tc.body, versionHeader, "compute latest")
		require.Equal(t, tc.status, status, body)
		requireFault(t, tc.status, tc.fault, body)
	}
	status, _, _ := r.send("POST", "/v2.1/servers", creation(imageID(baseID, baseDisk), "c1.m256.d3", `,"description":""`), versionHeader, "compute 2.19")
	require.Equal(t, 202, status)
}

// TestServiceErrors: what the service refuses keeps its words, and its status is honest.
func TestServiceErrors(t *testing.T) {
	for code, want := range map[api.Code]struct {
		status int
		fault  string
	}{
		api.Invalid: {400, "badRequest"}, api.NotFound: {404, "itemNotFound"}, api.Conflict: {409, "conflictingRequest"}, api.Damaged: {422, "computeFault"},
		api.Unavailable: {503, "serviceUnavailable"}, api.TimedOut: {504, "computeFault"}, api.Cancelled: {409, "conflictingRequest"}, api.Internal: {500, "computeFault"},
	} {
		r := newRig(t)
		r.err = fmt.Errorf("wrapped: %w", api.Errorf(code, "the reason").Fix("the remedy"))
		for _, body := range []string{`{"pause":null}`, `{"cloudlet-base":{"name":"b"}}`, `{"cloudlet-handoff":{"handoff_url":"http://a:1","dest_token":"t"}}`} {
			status, h, got := r.send("POST", "/v2.1/servers/"+server("1")+"/action", body)
			require.Equal(t, want.status, status)
			requireFault(t, want.status, want.fault, got, "the reason", "the remedy")
			require.Equal(t, want.status == 503, h.Get("Retry-After") != "")
		}
	}
	r := newRig(t)
	e := api.Errorf(api.Invalid, "no address")
	e.Field = "to"
	r.err = e
	_, _, got := r.send("POST", "/v2.1/servers/"+server("1")+"/action", `{"cloudlet-handoff":{"handoff_url":"x","dest_token":"t"}}`)
	requireFault(t, 400, "badRequest", got, "handoff_url: no address")
	r.err = errors.New("plain")
	status, _, got := r.send("POST", "/v2.1/servers", creation(imageID(baseID, baseDisk), "c1.m256.d3", ""))
	require.Equal(t, 500, status)
	requireFault(t, 500, "computeFault", got, "plain")
}

// TestTokens: who may do what.
func TestTokens(t *testing.T) {
	r := newRig(t)
	for name, tc := range map[string]struct {
		method, path, body, token string
		status                    int
		fault                     string
	}{
		"discovery without token":   {"GET", "/", "", "", 200, ""},
		"version without token":     {"GET", "/v2.1", "", "", 200, ""},
		"no token":                  {"GET", "/v2.1/servers", "", "", 401, "unauthorized"},
		"no token, no path":         {"GET", "/v2.1/nothing", "", "", 401, "unauthorized"},
		"unknown token":             {"GET", "/v2.1/servers", "", "x", 401, "unauthorized"},
		"peer":                      {"GET", "/v2.1/servers", "", peerToken, 403, "forbidden"},
		"nobody can tell":           {"GET", "/v2.1/servers", "", brokenToken, 503, "serviceUnavailable"},
		"reader reads":              {"GET", "/v2.1/servers", "", readToken, 200, ""},
		"reader creates":            {"POST", "/v2.1/servers", `{}`, readToken, 403, "forbidden"},
		"reader deletes":            {"DELETE", "/v2.1/servers/" + server("1"), "", readToken, 403, "forbidden"},
		"reader acts":               {"POST", "/v2.1/servers/" + server("1") + "/action", `{"pause":null}`, readToken, 403, "forbidden"},
		"reader deletes an image":   {"DELETE", "/v2/images/" + imageID(overlayID, overlayImage), "", readToken, 403, "forbidden"},
		"reader deletes metadata":   {"DELETE", "/v2.1/servers/" + server("1") + "/metadata/x", "", readToken, 403, "forbidden"},
		"the bearer form is not it": {"GET", "/v2.1/servers", "", "", 401, "unauthorized"},
	} {
		t.Run(name, func(t *testing.T) {
			status, h, body := r.send(tc.method, tc.path, tc.body, "X-Auth-Token", tc.token, "Authorization", "Bearer "+operateToken)
			require.Equal(t, tc.status, status, body)
			if tc.fault != "" {
				requireFault(t, tc.status, tc.fault, body)
			}
			require.Equal(t, tc.status == 401, h.Get("WWW-Authenticate") != "")
		})
	}
	require.Empty(t, r.did)
	req := httptest.NewRequestWithContext(t.Context(), "GET", "/v2.1/servers", nil)
	req.Header["X-Auth-Token"] = []string{operateToken, operateToken}
	rec := httptest.NewRecorder()
	r.ServeHTTP(rec, req)
	require.Equal(t, 401, rec.Code)
}

// TestMicroversions: what is asked for is answered in, or refused with the range.
func TestMicroversions(t *testing.T) {
	r := newRig(t)
	for name, tc := range map[string]struct {
		header []string
		status int
		is     string
		words  []string
	}{
		"none":              {nil, 200, "2.1", nil},
		"lowest":            {[]string{versionHeader, "compute 2.1"}, 200, "2.1", nil},
		"highest":           {[]string{versionHeader, "compute 2.24"}, 200, "2.24", nil},
		"latest":            {[]string{versionHeader, "compute latest"}, 200, "2.24", nil},
		"older header":      {[]string{legacyHeader, "2.9"}, 200, "2.9", nil},
		"the newer counts":  {[]string{versionHeader, "compute 2.3", legacyHeader, "2.9"}, 200, "2.3", nil},
		"several services":  {[]string{versionHeader, "volume 3.1, Compute 2.7"}, 200, "2.7", nil},
		"another service":   {[]string{versionHeader, "volume 3.1"}, 200, "2.1", nil},
		"too high":          {[]string{versionHeader, "compute 2.25"}, 406, "", []string{"2.25", "2.1", "2.24"}},
		"too low":           {[]string{versionHeader, "compute 2.0"}, 406, "", []string{"2.0"}},
		"another major":     {[]string{versionHeader, "compute 3.1"}, 406, "", nil},
		"huge":              {[]string{versionHeader, "compute 9999.9999"}, 406, "", nil},
		"no version":        {[]string{versionHeader, "compute two"}, 400, "", []string{"two"}},
		"a leading zero":    {[]string{versionHeader, "compute 2.01"}, 400, "", nil},
		"no version, older": {[]string{legacyHeader, "2"}, 400, "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			status, h, body := r.send("GET", "/v2.1/servers/"+server("1"), "", tc.header...)
			require.Equal(t, tc.status, status, body)
			if tc.status != 200 {
				requireFault(t, tc.status, map[int]string{400: "badRequest", 406: "computeFault"}[tc.status], body, tc.words...)
				return
			}
			require.Equal(t, "compute "+tc.is, h.Get(versionHeader))
			require.Equal(t, tc.is, h.Get(legacyHeader))
			require.Contains(t, h.Get("Vary"), versionHeader)
		})
	}
	status, h, _ := r.send("GET", "/v2/images", "", versionHeader, "compute 2.99")
	require.Equal(t, 200, status, "Glance has no microversions")
	require.Empty(t, h.Get(versionHeader))
}

// TestBodies: what is no JSON, too long, or does not come.
func TestBodies(t *testing.T) {
	r := newRig(t)
	path := "/v2.1/servers"
	for _, kind := range []string{"", "text/plain", "application/json; charset=latin-1", "application/x-www-form-urlencoded"} {
		status, _, body := r.send("POST", path, `{}`, "Content-Type", kind)
		require.Equal(t, 415, status, kind)
		requireFault(t, 415, "badMediaType", body)
	}
	status, _, body := r.send("POST", path, `{"server":{"name":"`+strings.Repeat("x", mostBody)+`"}}`)
	require.Equal(t, 413, status)
	requireFault(t, 413, "overLimit", body)
	for err, want := range map[error]int{os.ErrDeadlineExceeded: 408, io.ErrUnexpectedEOF: 400} {
		req := httptest.NewRequestWithContext(t.Context(), "POST", path, io.MultiReader(strings.NewReader(`{"ser`), broken{err}))
		req.Header.Set("X-Auth-Token", operateToken)
		req.Header.Set("Content-Type", "application/json")
		rec := httptest.NewRecorder()
		r.ServeHTTP(rec, req)
		require.Equal(t, want, rec.Code, rec.Body)
	}
	rec := httptest.NewRecorder()
	r.Refuse(rec, nil, api.Errorf(api.Unavailable, "no room"))
	require.Equal(t, 503, rec.Code)
	requireFault(t, 503, "serviceUnavailable", rec.Body.String(), "no room")
}

type broken struct{ err error }

func (b broken) Read([]byte) (int, error) { return 0, b.err }

// TestLabels: metrics have one label a route, whatever ids are asked for.
func TestLabels(t *testing.T) {
	r := newRig(t)
	for path, want := range map[string]string{"/v2.1/servers/" + server("1"): "/v2.1/servers/{id}", "/": "/{$}", "/v2.1/x/y": "/v2.1", "/v2/x": "/v2.1"} {
		require.Equal(t, want, r.Label(httptest.NewRequest(http.MethodGet, path, nil)))
	}
}

// FuzzRequests: whatever is sent, the answer is JSON, a failure has Nova's form, and nothing
// that is no actions' or servers' changes anything.
func FuzzRequests(f *testing.F) {
	disk := imageID(baseID, baseDisk)
	for _, s := range [][4]string{
		{"GET", "/v2.1/servers/detail?limit=1", "", "2.1"},
		{"POST", "/v2.1/servers", creation(disk, "c1.m256.d3", `,"metadata":{"ports":"1:2","probe":"8/x"}`), "latest"},
		{"POST", "/v2.1/servers/" + server("1") + "/action", `{"cloudlet-handoff":{"handoff_url":"http://a:1","dest_token":"t"}}`, "2.24"},
		{"POST", "/v2.1/servers/" + server("1") + "/action", `{"os-getConsoleOutput":{"length":-1}}`, "2.24"},
		{"DELETE", "/v2.1/servers/" + server("7") + "/migrations/42", "", "2.24"},
		{"GET", "/v2/images/" + promisedID("00000000001a", overlayImage), "", ""},
		{"PUT", "/v2.1//servers/../x", "{}", "3.0"},
	} {
		f.Add(s[0], s[1], s[2], s[3])
	}
	f.Fuzz(func(t *testing.T, method, path, body, version string) {
		r := newRig(t)
		req, err := http.NewRequestWithContext(t.Context(), method, "http://edge:7300"+path, strings.NewReader(body))
		if err != nil || !strings.HasPrefix(path, "/") {
			return
		}
		req.RequestURI = req.URL.RequestURI()
		req.Header.Set("X-Auth-Token", operateToken)
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set(versionHeader, "compute "+version)
		rec := httptest.NewRecorder()
		r.ServeHTTP(rec, req)
		if rec.Code >= 400 {
			name, ok := faultNames[rec.Code]
			if !ok {
				name = "computeFault"
			}
			requireFault(t, rec.Code, name, rec.Body.String())
		}
		require.Less(t, rec.Code, 500, rec.Body)
		if rec.Code >= 300 || method == "GET" {
			require.Empty(t, r.did)
		}
	})
}
