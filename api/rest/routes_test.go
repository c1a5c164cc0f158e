package rest

import (
	"net/http"
	"strings"
	"testing"

	"cloudlet/api"
	"cloudlet/api/service"

	"github.com/stretchr/testify/require"
)

// TestEveryRoute asks each route for each success that the document lists, and each exchange
// is held against the document. In the end no success may have been missed.
func TestEveryRoute(t *testing.T) {
	r := newRig(t, Limits{})
	zip := map[string]string{"Content-Type": typeZip}
	up := as[api.Upload](t, r.do(call{method: "POST", path: "/v1/overlays", body: `{"size":10,"name":"n"}`}))
	op := r.begin()
	other := r.begin()
	r.fake.finish(other.ID)
	rows := []struct {
		name   string
		call   call
		status int
		check  func(*testing.T, *http.Response)
	}{
		{"list bases", call{method: "GET", path: "/v1/bases"}, 200, func(t *testing.T, resp *http.Response) {
			require.Len(t, as[[]api.Base](t, resp), 2)
			require.Equal(t, "no-store", resp.Header.Get("Cache-Control"))
		}},
		{"show base", call{method: "GET", path: "/v1/bases/debian"}, 200, func(t *testing.T, resp *http.Response) {
			require.Equal(t, aBase(), as[api.Base](t, resp))
		}},
		{"upload base", call{method: "POST", path: "/v1/bases?name=n", body: "PK", header: zip}, 201, func(t *testing.T, resp *http.Response) {
			require.Equal(t, "n", as[api.Base](t, resp).Name)
			require.Equal(t, "/v1/bases/"+baseID, resp.Header.Get("Location"))
		}},
		{"import base", call{method: "POST", path: "/v1/bases", body: `{"source":"https://depot/base.zip","name":"b"}`}, 202, submitted(r, api.ImportBase{Source: "https://depot/base.zip", Name: "b"})},
		{"create base", call{method: "POST", path: "/v1/bases", body: `{"disk":"/d.raw","memory":1,"probe":{"port":80,"path":"/"},"forwards":[{"guest":80}]}`}, 202,
			submitted(r, api.CreateBase{Disk: "/d.raw", Memory: 1, Probe: &api.Probe{Port: 80, Path: "/"}, Forwards: []api.Forward{{Guest: 80}}})},
		{"base of an instance", call{method: "POST", path: "/v1/bases", body: `{"instance":"one","name":"b"}`}, 202, submitted(r, api.CaptureBase{Instance: "one", Name: "b"})},
		{"package of base", call{method: "GET", path: "/v1/bases/debian/package"}, 200, func(t *testing.T, resp *http.Response) {
			require.Equal(t, "PK package", text(t, resp))
			require.Equal(t, "10", resp.Header.Get("Content-Length"))
		}},
		{"delete base", call{method: "DELETE", path: "/v1/bases/debian"}, 204, nil},
		{"list no overlays", call{method: "GET", path: "/v1/overlays"}, 200, func(t *testing.T, resp *http.Response) {
			require.Equal(t, "[]\n", text(t, resp))
		}},
		{"show overlay", call{method: "GET", path: "/v1/overlays/app"}, 200, nil},
		{"show overlay in a file", call{method: "GET", path: "/v1/overlays/%2Fabs%2Ffile"}, 200, nil},
		{"show upload", call{method: "GET", path: "/v1/overlays/" + up.ID}, 200, func(t *testing.T, resp *http.Response) {
			require.Equal(t, "0", resp.Header.Get("Upload-Offset"))
			require.Equal(t, up, as[api.Upload](t, resp))
		}},
		{"create upload", call{method: "POST", path: "/v1/overlays", body: `{"size":10}`}, 201, func(t *testing.T, resp *http.Response) {
			require.Equal(t, "/v1/overlays/upload-0001", resp.Header.Get("Location"))
		}},
		{"import overlay", call{method: "POST", path: "/v1/overlays", body: `{"source":"https://depot/o"}`}, 202, submitted(r, api.ImportOverlay{Source: "https://depot/o"})},
		{"create overlay", call{method: "POST", path: "/v1/overlays", body: `{"instance":"0123","strategy":"small"}`}, 202, submitted(r, api.CreateOverlay{Instance: "0123", Strategy: "small"})},
		{"delete overlay", call{method: "DELETE", path: "/v1/overlays/app"}, 204, nil},
		{"delete upload", call{method: "DELETE", path: "/v1/overlays/upload-0001"}, 204, nil},
		{"list instances", call{method: "GET", path: "/v1/instances"}, 200, func(t *testing.T, resp *http.Response) {
			require.Len(t, as[[]api.Instance](t, resp), 1)
		}},
		{"list all instances", call{method: "GET", path: "/v1/instances?all=true"}, 200, func(t *testing.T, resp *http.Response) {
			require.Len(t, as[[]api.Instance](t, resp), 2)
		}},
		{"show instance", call{method: "GET", path: "/v1/instances/0123"}, 200, func(t *testing.T, resp *http.Response) {
			require.Equal(t, anInstance(), as[api.Instance](t, resp))
		}},
		{"run", call{method: "POST", path: "/v1/instances", body: `{"ref":"app","forwards":[{"guest":80}],"timeout":1000000000}`}, 202,
			submitted(r, api.Run{Ref: "app", Forwards: []api.Forward{{Guest: 80}}, Timeout: 1e9})},
		{"delete instance", call{method: "DELETE", path: "/v1/instances/0123?force=true"}, 204, nil},
		{"pause", call{method: "POST", path: "/v1/instances/0123/actions", body: `{"action":"pause"}`}, 200, func(t *testing.T, resp *http.Response) {
			require.Equal(t, []api.Action{api.ActionPause}, r.fake.acts)
		}},
		{"log", call{method: "GET", path: "/v1/instances/0123/log"}, 200, func(t *testing.T, resp *http.Response) {
			require.Equal(t, "login: ", text(t, resp))
		}},
		{"hand off", call{method: "POST", path: "/v1/instances/0123/handoff", body: `{"to":"http://10.0.0.2:7300","token":"secret","rounds":-1,"keep_ports":true}`}, 202,
			submitted(r, api.HandOff{Instance: "0123", To: "http://10.0.0.2:7300", Token: "secret", Rounds: -1, KeepPorts: true})},
		{"hand off, the instance twice", call{method: "POST", path: "/v1/instances/0123/handoff", body: `{"instance":"0123","to":"https://edge:7300"}`}, 202,
			submitted(r, api.HandOff{Instance: "0123", To: "https://edge:7300"})},
		{"resolve", call{method: "POST", path: "/v1/instances/0123/actions", body: `{"action":"resume-here"}`}, 200, func(t *testing.T, resp *http.Response) {
			require.Equal(t, api.ActionResumeHere, r.fake.acts[len(r.fake.acts)-1])
		}},
		{"message of a handoff", call{method: "POST", path: "/v1/handoffs", body: ` {"version": 1} `}, 200, func(t *testing.T, resp *http.Response) {
			require.Equal(t, `{"version":1,"state":"accepted"}`, text(t, resp))
			require.Equal(t, ` {"version": 1} `, r.fake.messages[len(r.fake.messages)-1].text)
		}},
		{"show handoff", call{method: "GET", path: "/v1/handoffs/" + handoffID}, 200, func(t *testing.T, resp *http.Response) {
			require.Equal(t, aHandoff(), as[api.Handoff](t, resp))
		}},
		{"show the handoff of an instance", call{method: "GET", path: "/v1/handoffs/0123"}, 200, nil},
		{"content of a handoff", call{method: "GET", path: handoffContentPath + "?key=" + handoffKey}, 200, func(t *testing.T, resp *http.Response) {
			require.Equal(t, "0123456789", text(t, resp))
			require.Equal(t, `"`+digest+`"`, resp.Header.Get("ETag"))
			require.Equal(t, typeZip, resp.Header.Get("Content-Type"))
			require.Equal(t, "no-store", resp.Header.Get("Cache-Control"))
		}},
		{"range of content of a handoff", call{method: "GET", path: handoffContentPath + "?key=" + handoffKey, header: map[string]string{"Range": "bytes=2-4", "If-Range": `"` + digest + `"`}}, 206, func(t *testing.T, resp *http.Response) {
			require.Equal(t, "234", text(t, resp))
			require.Equal(t, "bytes 2-4/10", resp.Header.Get("Content-Range"))
		}},
		{"content of a handoff that the other side has", call{method: "GET", path: handoffContentPath + "?key=" + handoffKey, header: map[string]string{"If-None-Match": `"` + digest + `"`}}, 304, nil},
		{"list operations", call{method: "GET", path: "/v1/operations"}, 200, func(t *testing.T, resp *http.Response) {
			require.NotEmpty(t, as[[]api.Operation](t, resp))
		}},
		{"verify base", call{method: "POST", path: "/v1/operations", body: `{"kind":"verify-base","ref":"debian"}`}, 202, submitted(r, service.VerifyBase{Verify: api.Verify{Ref: "debian"}})},
		{"verify overlay", call{method: "POST", path: "/v1/operations", body: `{"kind":"verify-overlay","ref":"app"}`}, 202, submitted(r, service.VerifyOverlay{Verify: api.Verify{Ref: "app"}})},
		{"show operation", call{method: "GET", path: "/v1/operations/" + op.ID}, 200, nil},
		{"events of the end seen", call{method: "GET", path: "/v1/operations/" + other.ID, header: map[string]string{"Accept": typeEvents, "Last-Event-ID": "2"}}, 204, nil},
		{"cancel", call{method: "DELETE", path: "/v1/operations/" + op.ID}, 200, func(t *testing.T, resp *http.Response) {
			require.Equal(t, api.OperationCancelled, as[api.Operation](t, resp).State)
		}},
		{"content", call{method: "GET", path: "/v1/overlays/app/content"}, 200, func(t *testing.T, resp *http.Response) {
			require.Equal(t, "0123456789", text(t, resp))
			require.Equal(t, `"`+digest+`"`, resp.Header.Get("ETag"))
		}},
		{"range of content", call{method: "GET", path: "/v1/overlays/app/content", header: map[string]string{"Range": "bytes=2-4", "If-Range": `"` + digest + `"`}}, 206, func(t *testing.T, resp *http.Response) {
			require.Equal(t, "234", text(t, resp))
			require.Equal(t, "bytes 2-4/10", resp.Header.Get("Content-Range"))
		}},
		{"range of other content", call{method: "GET", path: "/v1/overlays/app/content", header: map[string]string{"Range": "bytes=2-4", "If-Range": `"other"`}}, 200, nil},
		{"content that the client has", call{method: "GET", path: "/v1/overlays/app/content", header: map[string]string{"If-None-Match": `"` + digest + `"`}}, 304, nil},
		{"part of upload", call{method: "PUT", path: "/v1/overlays/" + up.ID + "/content", body: "0123", header: map[string]string{"Content-Type": typeZip, "Content-Range": "bytes 0-3/10"}}, 200, func(t *testing.T, resp *http.Response) {
			require.Equal(t, int64(4), as[api.Upload](t, resp).Offset)
			require.Equal(t, "4", resp.Header.Get("Upload-Offset"))
		}},
		{"rest of upload", call{method: "PUT", path: "/v1/overlays/" + up.ID + "/content", body: "456789", header: map[string]string{"Content-Type": typeZip, "Content-Range": "bytes 4-9/*"}}, 202, submitted(r, api.ImportOverlay{Source: up.ID})},
		{"finish once more", call{method: "PUT", path: "/v1/overlays/" + up.ID + "/content", header: map[string]string{"Content-Range": "bytes */10"}}, 202, nil},
		{"document", call{method: "GET", path: "/v1/openapi.json"}, 200, nil},
		{"healthz", call{method: "GET", path: "/healthz"}, 200, nil},
		{"readyz", call{method: "GET", path: "/readyz"}, 200, nil},
		{"metrics", call{method: "GET", path: "/metrics?name[]=x"}, 200, nil},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			r := *r
			r.t = t
			resp := r.do(row.call)
			require.Equal(t, row.status, resp.StatusCode)
			if row.check != nil {
				row.check(t, resp)
			}
		})
	}
	missed := map[string]bool{}
	for name, op := range readDocument(t).operations(t) {
		for status := range op.Responses {
			if status[0] <= '3' && status != "304" {
				missed[name+" "+status] = true
			}
		}
	}
	for _, row := range rows {
		method, path, _ := strings.Cut(row.call.method+" "+row.call.path, " ")
		req, err := http.NewRequestWithContext(t.Context(), method, path, nil)
		require.NoError(t, err)
		delete(missed, method+" "+routeOf(req)+" "+statusText(row.status))
	}
	require.Empty(t, missed)
}

func statusText(status int) string {
	return string([]byte{byte('0' + status/100), byte('0' + status/10%10), byte('0' + status%10)})
}

// submitted checks that the last operation begun is of a request, and that its place is told.
func submitted(r *rig, want any) func(*testing.T, *http.Response) {
	return func(t *testing.T, resp *http.Response) {
		op := as[api.Operation](t, resp)
		require.Equal(t, "/v1/operations/"+op.ID, resp.Header.Get("Location"))
		require.Equal(t, want, r.fake.calls[len(r.fake.calls)-1])
		require.Equal(t, service.Caller{Name: localName, Local: true}, r.fake.callers[len(r.fake.callers)-1])
	}
}

func TestHead(t *testing.T) {
	r := newRig(t, Limits{})
	for _, path := range []string{"/v1/bases", "/v1/bases/debian/package", "/v1/overlays/app/content", "/healthz", handoffContentPath + "?key=" + handoffKey} {
		resp := r.do(call{method: "HEAD", path: path})
		require.Equal(t, 200, resp.StatusCode, path)
	}
	require.Equal(t, "10", r.do(call{method: "HEAD", path: "/v1/bases/debian/package"}).Header.Get("Content-Length"))
}
