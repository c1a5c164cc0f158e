package nova

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"cloudlet/api"
	"cloudlet/api/service"

	"github.com/stretchr/testify/require"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestGolden holds what is answered to the files of testdata, byte by byte.
func TestGolden(t *testing.T) {
	r := newRig(t)
	latest := []string{versionHeader, "compute latest"}
	for name, path := range map[string]string{
		"versions": "/", "version": "/v2.1", "version-slash": "/v2.1/", "image-versions": "/v2",
		"flavors": "/v2.1/flavors", "flavors-detail": "/v2.1/flavors/detail", "flavor": "/v2.1/flavors/c1.m256.d3", "extra-specs": "/v2.1/flavors/c1.m256.d3/os-extra_specs",
		"images": "/v2.1/images", "images-detail": "/v2.1/images/detail", "image": "/v2.1/images/" + imageID(baseID, baseDisk), "glance": "/v2/images", "glance-image": "/v2/images/" + imageID(overlayID, overlayImage),
		"servers": "/v2.1/servers", "servers-detail": "/v2.1/servers/detail", "servers-deleted": "/v2.1/servers?deleted=True", "server": "/v2.1/servers/" + server("1"), "server-failed": "/v2.1/servers/" + server("b"),
		"ips": "/v2.1/servers/" + server("1") + "/ips", "ips-network": "/v2.1/servers/" + server("1") + "/ips/cloudlet",
		"server-moved": "/v2.1/servers/" + server("6"), "metadata": "/v2.1/servers/" + server("7") + "/metadata", "metadatum": "/v2.1/servers/" + server("1") + "/metadata/endpoint_8080",
	} {
		requireGolden(t, r, name, path)
	}
	requireGolden(t, r, "server-latest", "/v2.1/servers/"+server("1"), latest...)
	requireGolden(t, r, "migrations", "/v2.1/servers/"+server("7")+"/migrations", latest...)
	requireGolden(t, r, "migration", "/v2.1/servers/"+server("7")+"/migrations/42", latest...)
	requireGolden(t, r, "os-migrations", "/v2.1/os-migrations", latest...)
	require.Empty(t, r.did, "a GET has changed something")
}

func requireGolden(t *testing.T, r *rig, name, path string, header ...string) {
	t.Helper()
	status, h, body := r.send("GET", path, "", header...)
	require.Equal(t, 200, status, "%s: %s", path, body)
	require.Equal(t, "application/json", h.Get("Content-Type"))
	var text bytes.Buffer
	require.NoError(t, json.Indent(&text, []byte(body), "", "  "))
	// When a handoff under way was last changed is now.
	got := regexp.MustCompile(`"updated_at": "\d{4}-\d\d-\d\dT[\d:.]{15}"`).ReplaceAll(text.Bytes(), []byte(`"updated_at": "NOW"`))
	file := filepath.Join("testdata", name+".json")
	if *update {
		require.NoError(t, os.MkdirAll("testdata", 0o755))
		require.NoError(t, os.WriteFile(file, got, 0o644))
	}
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(want), string(got), path)
}

// TestStatus: each state has its word, and one only.
func TestStatus(t *testing.T) {
	r := newRig(t)
	for n, want := range map[string]string{
		"1": active, "2": paused, "3": shutoff, "4": shutoff, "5": failed, "6": deleted, "7": migrating, "8": failed, "9": build, "a": build, "b": failed,
	} {
		status, _, body := r.send("GET", "/v2.1/servers/"+server(n), "")
		require.Equal(t, 200, status)
		var s struct {
			Server struct {
				Status string  `json:"status"`
				VM     string  `json:"OS-EXT-STS:vm_state"`
				Task   *string `json:"OS-EXT-STS:task_state"`
				Fault  *fault  `json:"fault"`
			} `json:"server"`
		}
		require.NoError(t, json.Unmarshal([]byte(body), &s))
		require.Equal(t, want, s.Server.Status, n)
		require.Equal(t, vmStates[want], s.Server.VM)
		require.Equal(t, want == build || want == migrating, s.Server.Task != nil)
		require.Equal(t, want == failed, s.Server.Fault != nil)
		if s.Server.Fault != nil {
			require.NotEmpty(t, s.Server.Fault.Message)
		}
	}
	status, _, _ := r.send("GET", "/v2.1/servers/"+server("c"), "")
	require.Equal(t, 404, status, "a run that was cancelled leaves no server")
}

// TestList: filters and pages.
func TestList(t *testing.T) {
	r := newRig(t)
	names := func(query string) string {
		status, _, body := r.send("GET", "/v2.1/servers"+query, "")
		require.Equal(t, 200, status, body)
		var l struct {
			Servers []struct{ Name string }
			Links   []link `json:"servers_links"`
		}
		require.NoError(t, json.Unmarshal([]byte(body), &l))
		var out []string
		for _, s := range l.Servers {
			out = append(out, s.Name)
		}
		for _, l := range l.Links {
			out = append(out, strings.TrimPrefix(l.Href, "http://edge:7300/v2.1/servers"))
		}
		return strings.Join(out, " ")
	}
	require.Equal(t, "run paused off ended lost leaving stalled probed coming 00000000000b", names(""))
	require.Equal(t, "moved", names("?deleted=True"))
	require.Equal(t, "moved", names("?status=DELETED"))
	require.Equal(t, "off ended", names("?status=SHUTOFF"))
	require.Equal(t, "run", names("?name=^ru"))
	require.Equal(t, "run", names("?image="+imageID(overlayID, overlayImage)))
	require.Equal(t, "", names("?flavor=c2.m1024.d8"))
	require.Equal(t, "run paused ?limit=2&marker="+server("2"), names("?limit=2"))
	require.Equal(t, "coming 00000000000b", names("?limit=9&marker="+server("9")))
}

// TestCreate: what a request becomes.
func TestCreate(t *testing.T) {
	for name, tc := range map[string]struct {
		body string
		want api.Run
	}{
		"a base": {`{"server":{"name":"n","imageRef":"` + imageID(baseID, baseDisk) + `","flavorRef":"c1.m256.d3"}}`,
			api.Run{Ref: baseID, Base: baseID, Name: "n"}},
		"an overlay": {`{"server":{"name":"n","imageRef":"` + imageID(overlayID, overlayImage) + `","flavorRef":"c1.m256.d3","metadata":{"ports":"8080, 2222:22,10.0.0.1:80:80,10.0.0.1::81"}}}`,
			api.Run{Ref: overlayID, Base: baseID, Name: "n", Forwards: []api.Forward{{Guest: 8080}, {Host: 2222, Guest: 22}, {Address: "10.0.0.1", Host: 80, Guest: 80}, {Address: "10.0.0.1", Guest: 81}}}},
		"an overlay that was promised": {`{"server":{"name":"n","imageRef":"` + promisedID("00000000001b", overlayImage) + `","flavorRef":"c1.m256.d3"}}`,
			api.Run{Ref: overlayID, Base: baseID, Name: "n"}},
		"a base that was promised": {`{"server":{"name":"n","imageRef":"` + promisedID("00000000001d", baseDisk) + `","flavorRef":"c1.m256.d3"}}`,
			api.Run{Ref: baseID, Base: baseID, Name: "n"}},
		"an overlay at a URL": {`{"server":{"name":"n","imageRef":"` + imageID(baseID, baseDisk) + `","flavorRef":"c1.m256.d3","metadata":{"overlay_url":"https://depot/app","probe":"8080/healthz?x=1"}}}`,
			api.Run{Ref: "https://depot/app", Base: baseID, Name: "n", Probe: &api.Probe{Port: 8080, Path: "/healthz?x=1"}, Timeout: probeTime}},
		"as novaclient asks": {`{"server":{"name":"n","imageRef":"` + imageID(baseID, baseDisk) + `","flavorRef":"c1.m256.d3","min_count":1,"max_count":1,"networks":"auto","security_groups":[{"name":"default"}],"OS-DCF:diskConfig":"AUTO","config_drive":false,"block_device_mapping_v2":[{"uuid":"x","boot_index":0,"source_type":"image","destination_type":"local","delete_on_termination":true}]}}`,
			api.Run{Ref: baseID, Base: baseID, Name: "n"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			status, h, body := r.send("POST", "/v2.1/servers", tc.body)
			require.Equal(t, 202, status, body)
			require.Equal(t, tc.want, r.last)
			require.Equal(t, service.Caller{Name: "operator"}, r.caller, "a caller over HTTP is never local")
			require.Contains(t, body, `"id":"`+serverID("0123456789ab")+`"`)
			require.Equal(t, "http://edge:7300/v2.1/servers/"+serverID("0123456789ab"), h.Get("Location"))
		})
	}
}

// TestActions: what each does, and what it answers.
func TestActions(t *testing.T) {
	for name, tc := range map[string]struct {
		n, body string
		did     []string
		answer  string
		last    any
	}{
		"pause":                      {"1", `{"pause":null}`, []string{"pause 000000000001"}, "", nil},
		"unpause":                    {"2", `{"unpause":null}`, []string{"continue 000000000002"}, "", nil},
		"unpause after a disk error": {"8", `{"unpause":{}}`, []string{"continue 000000000008"}, "", nil},
		"stop":                       {"1", `{"os-stop":null}`, []string{"pause 000000000001", "reset 000000000001"}, "", nil},
		"stop a paused":              {"2", `{"os-stop":null}`, []string{"pause 000000000002", "reset 000000000002"}, "", nil},
		"start":                      {"3", `{"os-start":null}`, []string{"continue 000000000003"}, "", nil},
		"reboot":                     {"1", `{"reboot":{"type":"HARD"}}`, []string{"reset 000000000001"}, "", nil},
		"base":                       {"1", `{"cloudlet-base":{"name":"b"}}`, []string{"api.CaptureBase"}, `{"base-disk":"` + promisedID("0123456789ab", baseDisk) + `","base-memory":"` + promisedID("0123456789ab", baseMemory) + `"}`, api.CaptureBase{Instance: "000000000001", Name: "b"}},
		"overlay":                    {"2", `{"cloudlet-overlay-finish":{"overlay-name":"o"}}`, []string{"api.CreateOverlay"}, `{"overlay-id":"` + promisedID("0123456789ab", overlayImage) + `"}`, api.CreateOverlay{Instance: "000000000002", Name: "o"}},
		"last overlay":               {"1", `{"cloudlet-overlay-finish":{"overlay-name":"o","terminate":true}}`, []string{"api.CreateOverlay"}, `{"overlay-id":"` + promisedID("0123456789ab", overlayImage) + `"}`, api.CreateOverlay{Instance: "000000000001", Name: "o", Stop: true}},
		"handoff":                    {"1", `{"cloudlet-handoff":{"handoff_url":"http://edge-2:7300","dest_token":"t","dest_vmname":"m"}}`, []string{"api.HandOff"}, `{"handoff":"` + strings.Repeat("42", 16) + `"}`, api.HandOff{Instance: "000000000001", To: "http://edge-2:7300", Token: "t", Name: "m"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			status, _, body := r.send("POST", "/v2.1/servers/"+server(tc.n)+"/action", tc.body)
			require.Equal(t, 202, status, body)
			require.Equal(t, tc.did, r.did)
			require.Equal(t, tc.answer, strings.TrimSpace(body))
			require.Equal(t, tc.last, r.last)
		})
	}
}

func TestConsole(t *testing.T) {
	r := newRig(t)
	for args, want := range map[string]string{`{}`: "one\ntwo\nthree\n", `{"length":2}`: "two\nthree\n", `{"length":"1"}`: "three\n", `{"length":null}`: "one\ntwo\nthree\n", `{"length":0}`: "", `{"length":99}`: "one\ntwo\nthree\n"} {
		status, _, body := r.send("POST", "/v2.1/servers/"+server("1")+"/action", `{"os-getConsoleOutput":`+args+`}`, "X-Auth-Token", readToken)
		require.Equal(t, 200, status)
		var out map[string]string
		require.NoError(t, json.Unmarshal([]byte(body), &out))
		require.Equal(t, want, out["output"], args)
	}
	var tail = &lastBytes{most: 4}
	for _, s := range []string{"", "ab", "cdefghijk", "l"} {
		n, err := tail.Write([]byte(s))
		require.NoError(t, err)
		require.Equal(t, len(s), n)
	}
	require.Equal(t, "ijkl", string(tail.last()))
}

// TestDelete: whatever a server is, it goes.
func TestDelete(t *testing.T) {
	for n, want := range map[string][]string{
		"1": {"delete 000000000001"},
		"6": {"delete 000000000006"},
		"9": {"cancel 000000000009", "delete 000000000009", "forget 000000000009"},
		"a": {"cancel 00000000000a", "forget 00000000000a"},
		"b": {"forget 00000000000b"},
	} {
		r := newRig(t)
		status, _, body := r.send("DELETE", "/v2.1/servers/"+server(n), "")
		require.Equal(t, 204, status, body)
		require.Empty(t, body)
		require.Equal(t, want, r.did)
	}
	r := newRig(t)
	status, _, _ := r.send("DELETE", "/v2.1/images/"+imageID(overlayID, overlayImage), "")
	require.Equal(t, 204, status)
	status, _, _ = r.send("DELETE", "/v2.1/servers/"+server("7")+"/migrations/42", "", versionHeader, "compute 2.24")
	require.Equal(t, 202, status)
	require.Equal(t, []string{"delete overlay cdcd", "cancel 00000000002a"}, r.did)
}

// TestIDs: every id can be read back, and those of others cannot be taken for ours.
func TestIDs(t *testing.T) {
	id, ok := instanceOf(serverID("0123456789ab"))
	require.True(t, ok)
	require.Equal(t, "0123456789ab", id)
	for k := range kindNames {
		n, ok := imageOf(imageID(baseID, k))
		require.True(t, ok)
		require.Equal(t, imageName{kind: k, begins: baseID[:31]}, n)
		n, ok = imageOf(promisedID("0123456789ab", k))
		require.True(t, ok)
		require.Equal(t, imageName{kind: k, operation: "0123456789ab"}, n)
		require.Regexp(t, uuidForm, imageID(baseID, k))
		require.Regexp(t, uuidForm, promisedID("0123456789ab", k))
	}
	for _, other := range []string{"", "run", "000000000001", baseID, imageID(baseID, baseDisk), promisedID("0123456789ab", baseDisk), strings.ToUpper(serverID("0123456789ab")), serverID("0123456789ab") + "0"} {
		_, ok := instanceOf(other)
		require.False(t, ok, other)
	}
	for _, other := range []string{"", "debian", baseID, serverID("0123456789ab"), strings.Repeat("0", 32), imageID(baseID, 0), imageID(baseID, 6)} {
		_, ok := imageOf(other)
		require.False(t, ok, other)
	}
}
