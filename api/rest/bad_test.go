package rest

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"cloudlet/api"
	"cloudlet/api/service"

	"github.com/stretchr/testify/require"
)

// TestBadRequests: what is wrong is refused with the right status, the field is named, and
// nothing is begun.
func TestBadRequests(t *testing.T) {
	zip := func(kv ...string) map[string]string {
		h := map[string]string{"Content-Type": typeZip}
		for i := 0; i < len(kv); i += 2 {
			h[kv[i]] = kv[i+1]
		}
		return h
	}
	const bases, overlays, instances, actions, operations = "/v1/bases", "/v1/overlays", "/v1/instances", "/v1/instances/0123/actions", "/v1/operations"
	const handoff, messages = "/v1/instances/0123/handoff", "/v1/handoffs"
	const put = "/v1/overlays/upload-0000/content"
	rows := []struct {
		name   string
		call   call
		status int
		field  string
	}{
		{"no such path", call{method: "GET", path: "/v1/nothing"}, 404, ""},
		{"root", call{method: "GET", path: "/"}, 404, ""},
		{"another version", call{method: "GET", path: "/v2/bases"}, 404, ""},
		{"path to be cleaned", call{method: "GET", path: "/v1//bases"}, 404, ""},
		{"path with dots", call{method: "GET", path: "/v1/x/../bases"}, 404, ""},
		{"slash at the end", call{method: "GET", path: "/v1/bases/"}, 404, ""},
		{"wrong method", call{method: "PATCH", path: bases}, 405, ""},
		{"wrong method below", call{method: "POST", path: "/v1/bases/debian"}, 405, ""},
		{"unknown parameter", call{method: "GET", path: "/v1/bases?limit=1"}, 400, "limit"},
		{"unknown parameter beside known", call{method: "GET", path: "/v1/instances?all=true&x=1"}, 400, "x"},
		{"parameter twice", call{method: "GET", path: "/v1/instances?all=true&all=false"}, 400, "all"},
		{"parameter that is no flag", call{method: "GET", path: "/v1/instances?all=1"}, 400, "all"},
		{"flag without value", call{method: "DELETE", path: "/v1/instances/0123?force"}, 400, "force"},
		{"query that is none", call{method: "GET", path: "/v1/instances?all=%zz"}, 400, ""},
		{"body on GET", call{method: "GET", path: bases, body: "{}"}, 400, ""},
		{"body on DELETE", call{method: "DELETE", path: "/v1/bases/debian", body: "{}"}, 400, ""},

		{"no such base", call{method: "GET", path: "/v1/bases/nothing"}, 404, ""},
		{"no such base to delete", call{method: "DELETE", path: "/v1/bases/nothing"}, 404, ""},
		{"no such package", call{method: "GET", path: "/v1/bases/nothing/package"}, 404, ""},
		{"no such overlay", call{method: "GET", path: "/v1/overlays/nothing"}, 404, ""},
		{"no such content", call{method: "GET", path: "/v1/overlays/nothing/content"}, 404, ""},
		{"no such overlay to delete", call{method: "DELETE", path: "/v1/overlays/nothing"}, 404, ""},
		{"no such upload", call{method: "GET", path: "/v1/overlays/upload-9"}, 404, ""},
		{"no such upload to delete", call{method: "DELETE", path: "/v1/overlays/upload-9"}, 404, ""},
		{"no such upload to send", call{method: "PUT", path: "/v1/overlays/upload-9/content", body: "x", header: zip()}, 404, ""},
		{"no such instance", call{method: "GET", path: "/v1/instances/nothing"}, 404, ""},
		{"no such instance to delete", call{method: "DELETE", path: "/v1/instances/nothing"}, 404, ""},
		{"no such instance to act on", call{method: "POST", path: "/v1/instances/nothing/actions", body: `{"action":"stop"}`}, 404, ""},
		{"no such log", call{method: "GET", path: "/v1/instances/nothing/log"}, 404, ""},
		{"no such operation", call{method: "GET", path: "/v1/operations/nothing"}, 404, ""},
		{"no such operation to await", call{method: "GET", path: "/v1/operations/nothing?wait=1"}, 404, ""},
		{"no such operation to follow", call{method: "GET", path: "/v1/operations/nothing", header: map[string]string{"Accept": typeEvents}}, 404, ""},
		{"no such operation to cancel", call{method: "DELETE", path: "/v1/operations/nothing"}, 404, ""},
		{"no such handoff", call{method: "GET", path: "/v1/handoffs/nothing"}, 404, ""},
		{"living instance", call{method: "DELETE", path: "/v1/instances/0123"}, 409, ""},

		{"no body", call{method: "POST", path: instances, header: map[string]string{"Content-Type": typeJSON}}, 400, ""},
		{"no content type", call{method: "POST", path: instances, body: `{"ref":"app"}`, header: map[string]string{"Content-Type": ""}}, 415, "Content-Type"},
		{"form", call{method: "POST", path: instances, body: "ref=app", header: map[string]string{"Content-Type": "application/x-www-form-urlencoded"}}, 415, "Content-Type"},
		{"text", call{method: "POST", path: bases, body: "{}", header: map[string]string{"Content-Type": "text/plain"}}, 415, "Content-Type"},
		{"charset", call{method: "POST", path: instances, body: `{"ref":"app"}`, header: map[string]string{"Content-Type": typeJSON + "; charset=latin1"}}, 415, "Content-Type"},
		{"compressed", call{method: "POST", path: instances, body: `{"ref":"app"}`, header: map[string]string{"Content-Encoding": "gzip"}}, 415, "Content-Encoding"},
		{"spaces", call{method: "POST", path: instances, body: "  \n"}, 400, ""},
		{"no JSON", call{method: "POST", path: instances, body: "{"}, 400, ""},
		{"null", call{method: "POST", path: instances, body: "null"}, 400, ""},
		{"list", call{method: "POST", path: instances, body: `[{"ref":"app"}]`}, 400, ""},
		{"number", call{method: "POST", path: operations, body: "1"}, 400, ""},
		{"two documents", call{method: "POST", path: instances, body: `{"ref":"app"} {"ref":"b"}`}, 400, ""},
		{"text behind", call{method: "POST", path: instances, body: `{"ref":"app"}x`}, 400, ""},
		{"no UTF-8", call{method: "POST", path: instances, body: "{\"ref\":\"\xff\"}"}, 400, ""},
		{"deep", call{method: "POST", path: instances, body: strings.Repeat(`{"probe":`, 20000) + "1" + strings.Repeat("}", 20000)}, 400, ""},
		{"large", call{method: "POST", path: instances, body: `{"ref":"` + strings.Repeat("a", 1<<20) + `"}`}, 413, ""},
		{"large by its length", call{method: "POST", path: operations, body: `{"ref":"` + strings.Repeat("a", 2<<20) + `"}`, length: 2 << 20}, 413, ""},

		{"unknown field of run", call{method: "POST", path: instances, body: `{"ref":"app","x":1}`}, 400, "x"},
		{"field in capitals", call{method: "POST", path: instances, body: `{"REF":"app"}`}, 400, "REF"},
		{"field twice", call{method: "POST", path: instances, body: `{"ref":"app","ref":"b"}`}, 400, "ref"},
		{"wrong type", call{method: "POST", path: instances, body: `{"ref":1}`}, 400, "ref"},
		{"wrong type inside", call{method: "POST", path: instances, body: `{"ref":"app","probe":{"port":"80"}}`}, 400, "probe.port"},
		{"unknown field inside", call{method: "POST", path: instances, body: `{"ref":"app","probe":{"port":80,"url":"http://x"}}`}, 400, "probe.url"},
		{"unknown field in a list", call{method: "POST", path: instances, body: `{"ref":"app","forwards":[{"guest":1},{"guset":2}]}`}, 400, "forwards[1].guset"},
		{"fraction", call{method: "POST", path: instances, body: `{"ref":"app","timeout":1.5}`}, 400, "timeout"},
		{"beyond 64 bits", call{method: "POST", path: overlays, body: `{"size":99999999999999999999}`}, 400, "size"},
		{"text for a size", call{method: "POST", path: overlays, body: `{"size":"10"}`}, 400, "size"},
		{"size below 0", call{method: "POST", path: overlays, body: `{"size":-1}`}, 400, "size"},
		{"overlay of nothing", call{method: "POST", path: overlays, body: `{"name":"x"}`}, 400, "size"},
		{"overlay of two things", call{method: "POST", path: overlays, body: `{"size":1,"source":"https://x"}`}, 400, "size"},
		{"base of nothing", call{method: "POST", path: bases, body: `{}`}, 400, "source"},
		{"base of two things", call{method: "POST", path: bases, body: `{"disk":"/d","source":"https://x"}`}, 400, "disk"},
		{"name of a base twice", call{method: "POST", path: "/v1/bases?name=x", body: `{"source":"https://x"}`}, 400, "name"},
		{"no action", call{method: "POST", path: actions, body: `{}`}, 400, "action"},
		{"unknown action", call{method: "POST", path: actions, body: `{"action":"explode"}`}, 400, "action"},
		{"action of a wrong type", call{method: "POST", path: actions, body: `{"action":["stop"]}`}, 400, "action"},
		{"handoff of another instance", call{method: "POST", path: handoff, body: `{"instance":"app","to":"http://x:1"}`}, 400, "instance"},
		{"handoff without a body", call{method: "POST", path: handoff, header: map[string]string{"Content-Type": typeJSON}}, 400, ""},
		{"handoff of an unknown field", call{method: "POST", path: handoff, body: `{"to":"http://x:1","speed":9}`}, 400, "speed"},
		{"handoff with half a round", call{method: "POST", path: handoff, body: `{"to":"http://x:1","rounds":0.5}`}, 400, "rounds"},
		{"message that is none", call{method: "POST", path: messages, body: "x"}, 400, ""},
		{"message of nothing", call{method: "POST", path: messages, header: map[string]string{"Content-Type": typeJSON}}, 400, ""},
		{"message as text", call{method: "POST", path: messages, body: "{}", header: map[string]string{"Content-Type": "text/plain"}}, 415, "Content-Type"},
		{"message that is compressed", call{method: "POST", path: messages, body: "{}", header: map[string]string{"Content-Encoding": "gzip"}}, 415, "Content-Encoding"},
		{"message that is too large", call{method: "POST", path: messages, body: `"` + strings.Repeat("a", mostMessage-1) + `"`}, 413, ""},
		{"message with a parameter", call{method: "POST", path: messages + "?key=x", body: "{}"}, 400, "key"},
		{"operation that is begun elsewhere", call{method: "POST", path: operations, body: `{"kind":"run","ref":"app"}`}, 400, "kind"},
		{"operation of no kind", call{method: "POST", path: operations, body: `{"ref":"app"}`}, 400, "kind"},

		{"wait that is no number", call{method: "GET", path: "/v1/operations/000000000001?wait=x"}, 400, "wait"},
		{"wait below 0", call{method: "GET", path: "/v1/operations/000000000001?wait=-1"}, 400, "wait"},
		{"wait too long", call{method: "GET", path: "/v1/operations/000000000001?wait=301"}, 400, "wait"},
		{"wait of nothing", call{method: "GET", path: "/v1/operations/000000000001?wait="}, 400, "wait"},
		{"after alone", call{method: "GET", path: "/v1/operations/000000000001?after=1"}, 400, "after"},
		{"after below 0", call{method: "GET", path: "/v1/operations/000000000001?wait=1&after=-1"}, 400, "after"},
		{"wrong event", call{method: "GET", path: "/v1/operations/000000000001", header: map[string]string{"Accept": typeEvents, "Last-Event-ID": "x"}}, 400, "Last-Event-ID"},

		{"range beyond the end", call{method: "GET", path: "/v1/overlays/app/content", header: map[string]string{"Range": "bytes=10-"}}, 416, "Range"},
		{"range that is none", call{method: "GET", path: "/v1/overlays/app/content", header: map[string]string{"Range": "bytes=x"}}, 416, "Range"},

		{"content of a handoff without a key", call{method: "GET", path: handoffContentPath}, 404, ""},
		{"content of a handoff with two keys", call{method: "GET", path: handoffContentPath + "?key=x&key=" + handoffKey}, 400, "key"},
		{"content of a handoff with another parameter", call{method: "GET", path: handoffContentPath + "?token=x"}, 400, "token"},
		{"content of a handoff, the query broken", call{method: "GET", path: handoffContentPath + "?key=%zz"}, 400, ""},
		{"content of a handoff beyond the end", call{method: "GET", path: handoffContentPath + "?key=" + handoffKey, header: map[string]string{"Range": "bytes=10-"}}, 416, "Range"},
		{"content of a handoff by a range that is none", call{method: "GET", path: handoffContentPath + "?key=" + handoffKey, header: map[string]string{"Range": "bytes=x"}}, 416, "Range"},

		{"package of no length", call{method: "POST", path: bases, body: "PK", header: zip(), length: -1}, 411, "Content-Length"},
		{"empty package", call{method: "POST", path: bases, header: zip()}, 400, ""},
		{"package shorter than said", call{method: "POST", path: bases, body: "PK", header: zip(), length: 9}, 400, ""},

		{"content of an overlay", call{method: "PUT", path: "/v1/overlays/app/content", body: "x", header: zip()}, 409, ""},
		{"content of no length", call{method: "PUT", path: put, body: "0123456789", header: zip(), length: -1}, 411, "Content-Length"},
		{"whole of another length", call{method: "PUT", path: put, body: "0123", header: zip()}, 400, "Content-Range"},
		{"range of another total", call{method: "PUT", path: put, body: "0123", header: zip("Content-Range", "bytes 0-3/11")}, 400, "Content-Range"},
		{"range backwards", call{method: "PUT", path: put, body: "0123", header: zip("Content-Range", "bytes 4-3/10")}, 400, "Content-Range"},
		{"range to the size", call{method: "PUT", path: put, body: "0123456789A", header: zip("Content-Range", "bytes 0-10/10")}, 400, "Content-Range"},
		{"range of other units", call{method: "PUT", path: put, body: "0123", header: zip("Content-Range", "pages 0-3/10")}, 400, "Content-Range"},
		{"range of 64 bits", call{method: "PUT", path: put, body: "0123", header: zip("Content-Range", "bytes 0-99999999999999999999/10")}, 400, "Content-Range"},
		{"range of another length", call{method: "PUT", path: put, body: "0123", header: zip("Content-Range", "bytes 0-4/10")}, 400, "Content-Range"},
		{"range longer than its body", call{method: "PUT", path: put, body: "0123", header: zip("Content-Range", "bytes 0-4/10"), length: -1}, 400, ""},
		{"range shorter than its body", call{method: "PUT", path: put, body: "0123", header: zip("Content-Range", "bytes 0-2/10"), length: -1}, 400, "Content-Range"},
		{"range elsewhere", call{method: "PUT", path: put, body: "0123", header: zip("Content-Range", "bytes 3-6/10")}, 409, "Content-Range"},

		{"empty key", call{method: "POST", path: instances, body: `{"ref":"app"}`, header: map[string]string{"Idempotency-Key": ""}}, 400, "Idempotency-Key"},
		{"long key", call{method: "POST", path: instances, body: `{"ref":"app"}`, header: map[string]string{"Idempotency-Key": strings.Repeat("k", 256)}}, 400, "Idempotency-Key"},
		{"key of other characters", call{method: "POST", path: instances, body: `{"ref":"app"}`, header: map[string]string{"Idempotency-Key": "a\tb"}}, 400, "Idempotency-Key"},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			r := newRig(t, Limits{})
			r.fake.ops = []api.Operation{{ID: "000000000001", State: api.OperationRunning, Kind: api.KindRun, Version: 1}}
			_, err := r.fake.CreateUpload(t.Context(), service.Caller{}, api.CreateUpload{Size: 10})
			require.NoError(t, err)
			resp := r.do(row.call)
			p := as[problem](t, resp)
			require.Equal(t, row.status, resp.StatusCode, "%+v", p)
			require.Equal(t, row.field, p.Field, "%+v", p)
			require.Len(t, r.fake.ops, 1, "an operation was begun")
			if row.status == http.StatusBadRequest {
				require.Empty(t, r.fake.acts)
			}
			if row.status == http.StatusMethodNotAllowed {
				require.Contains(t, resp.Header.Get("Allow"), "GET")
			}
		})
	}
}

// TestUploadSaysWhereToGoOn: every refusal of a part tells the offset.
func TestUploadSaysWhereToGoOn(t *testing.T) {
	r := newRig(t, Limits{})
	up := as[api.Upload](t, r.do(call{method: "POST", path: "/v1/overlays", body: `{"size":10}`}))
	path := "/v1/overlays/" + up.ID + "/content"
	// A part that breaks off: what came stays.
	resp := r.do(call{method: "PUT", path: path, body: "0123", header: map[string]string{"Content-Type": typeZip, "Content-Range": "bytes 0-5/10"}, length: 6})
	require.Equal(t, 400, resp.StatusCode)
	require.Equal(t, "4", resp.Header.Get("Upload-Offset"))
	resp = r.do(call{method: "PUT", path: path, body: "0123", header: map[string]string{"Content-Type": typeZip, "Content-Range": "bytes 0-3/10"}})
	require.Equal(t, 409, resp.StatusCode)
	require.Equal(t, "4", resp.Header.Get("Upload-Offset"))
	// Asked to finish what is not whole, it says that more is wanted.
	resp = r.do(call{method: "PUT", path: path, header: map[string]string{"Content-Range": "bytes */10"}})
	require.Equal(t, 200, resp.StatusCode)
	require.Equal(t, "4", resp.Header.Get("Upload-Offset"))
	r.fake.fail["Append"] = api.Errorf(api.Unavailable, "no space is left").Fix("free some")
	resp = r.do(call{method: "PUT", path: path, body: "456789", header: map[string]string{"Content-Type": typeZip, "Content-Range": "bytes 4-9/10"}})
	require.Equal(t, 503, resp.StatusCode)
	require.Equal(t, "4", resp.Header.Get("Upload-Offset"))
	require.Equal(t, "free some", as[problem](t, resp).Remedy)
}

// TestStatuses: each code, also wrapped, has its status, and a problem keeps what the error said.
func TestStatuses(t *testing.T) {
	for _, row := range []struct {
		err    error
		status int
		code   api.Code
	}{
		{api.Errorf(api.Invalid, "x"), 400, api.Invalid},
		{api.Errorf(api.NotFound, "x"), 404, api.NotFound},
		{api.Errorf(api.Conflict, "x"), 409, api.Conflict},
		{api.Errorf(api.Cancelled, "x"), 409, api.Cancelled},
		{api.Errorf(api.Damaged, "x"), 422, api.Damaged},
		{api.Errorf(api.Unavailable, "x"), 503, api.Unavailable},
		{api.Errorf(api.TimedOut, "x"), 504, api.TimedOut},
		{api.Errorf(api.Internal, "x"), 500, api.Internal},
		{errors.New("x"), 500, api.Internal},
		{fmt.Errorf("x: %w", context.Canceled), 409, api.Cancelled},
		{context.DeadlineExceeded, 504, api.TimedOut},
		{fmt.Errorf("outer: %w", &api.Error{Code: api.Conflict, Detail: "in use", Field: "f", Remedy: "r"}), 409, api.Conflict},
	} {
		t.Run(row.err.Error(), func(t *testing.T) {
			r := newRig(t, Limits{})
			r.fake.fail["Instances"] = row.err
			rec := httptest.NewRecorder()
			r.handler.ServeHTTP(rec, httptest.NewRequestWithContext(Local(t.Context()), "GET", "/v1/instances", nil))
			p := as[problem](t, rec.Result())
			require.Equal(t, row.status, rec.Code)
			require.Equal(t, row.code, p.Code)
			require.Equal(t, row.status == 503, rec.Header().Get("Retry-After") != "")
			var e *api.Error
			if errors.As(row.err, &e) {
				require.Equal(t, []string{e.Detail, e.Field, e.Remedy}, []string{p.Detail, p.Field, p.Remedy})
			}
		})
	}
}

// TestBrokenAnswers: an answer that cannot be completed is not taken for a whole one.
func TestBrokenAnswers(t *testing.T) {
	r := newRig(t, Limits{})
	r.fake.breakAt = 4
	require.PanicsWithValue(t, http.ErrAbortHandler, func() { r.do(call{method: "GET", path: "/v1/bases/debian/package"}) })
	require.Contains(t, r.log.String(), "page 3 of the base is damaged")
	// Before the first byte it is an ordinary problem.
	r.fake.fail["BasePackage"] = api.Errorf(api.Damaged, "page 1")
	require.Equal(t, 422, r.do(call{method: "GET", path: "/v1/bases/debian/package"}).StatusCode)
	r.fake.fail["Log"] = api.Errorf(api.NotFound, "no log yet")
	require.Equal(t, 404, r.do(call{method: "GET", path: "/v1/instances/0123/log"}).StatusCode)
}

// panics is a service that is broken.
type panics struct{ *fake }

func (panics) Bases(context.Context) ([]api.Base, error) { panic("the service is broken") }

func TestPanicIsA500(t *testing.T) {
	r := newRig(t, Limits{})
	r.handler.(*server).service = panics{r.fake}
	resp := r.do(call{method: "GET", path: "/v1/bases"})
	require.Equal(t, 500, resp.StatusCode)
	require.NotContains(t, text(t, resp), "broken")
	require.Contains(t, r.log.String(), "the service is broken")
}

// TestMethodNotAllowed names the methods that there are.
func TestMethodNotAllowed(t *testing.T) {
	r := newRig(t, Limits{})
	resp := r.do(call{method: "PATCH", path: "/v1/overlays/app/content"})
	require.Equal(t, "GET, HEAD, PUT", resp.Header.Get("Allow"))
}
