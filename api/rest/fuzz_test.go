package rest

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

// FuzzRequests: whatever is sent, the handler answers without a panic and without a 500, a
// failure is a problem, nothing that was refused has begun anything, and no slot stays taken.
// Build it with -tags fuzzing, or the OpenAPI validator is instrumented too, which takes minutes.
func FuzzRequests(f *testing.F) {
	for _, seed := range [][5]string{
		{"GET", "/v1/bases", "", "", ""},
		{"POST", "/v1/bases?name=x", typeZip, "", "PK"},
		{"POST", "/v1/bases", typeJSON, "", `{"source":"https://x/y"}`},
		{"POST", "/v1/bases", typeJSON, "", `{"disk":"/d,if=none","memory":1e9,"forwards":[{"guest":80,"host":-1}]}`},
		{"POST", "/v1/overlays", typeJSON, "", `{"size":10}`},
		{"POST", "/v1/overlays", typeJSON, "", `{"instance":"0123","strategy":null}`},
		{"GET", "/v1/overlays/upload-0000", "", "", ""},
		{"PUT", "/v1/overlays/upload-0000/content", typeZip, "Content-Range: bytes 0-3/10", "0123"},
		{"PUT", "/v1/overlays/upload-0000/content", typeZip, "Content-Range: bytes */10", ""},
		{"GET", "/v1/overlays/app/content", "", "Range: bytes=-1,0-2,5-", ""},
		{"POST", "/v1/instances", typeJSON, "Idempotency-Key: k", `{"ref":"app","probe":{"port":80,"path":"/"},"timeout":1}`},
		{"POST", "/v1/instances", typeJSON, "", `{"ref":"\u0000","ref":"b"}`},
		{"DELETE", "/v1/instances/0123?force=true", "", "", ""},
		{"POST", "/v1/instances/0123/actions", typeJSON, "", `{"action":"pause"}`},
		{"GET", "/v1/instances/0123/log", "", "", ""},
		{"GET", "/v1/operations/000000000001?wait=0&after=9223372036854775807", "", "", ""},
		{"GET", "/v1/operations/000000000002", "", "Accept: text/event-stream", ""},
		{"GET", "/v1/operations/000000000001", "", "Accept: text/event-stream", ""},
		{"GET", "/v1/operations/000000000001?wait=5", "", "", ""},
		{"GET", "/v1/operations/000000000002", "", "Last-Event-ID: 2", ""},
		{"DELETE", "/v1/operations/000000000001", "", "", ""},
		{"POST", "/v1/operations", typeJSON, "", `{"kind":"verify-base","ref":"debian"}`},
		{"POST", "/v1/instances/0123/handoff", typeJSON, "Idempotency-Key: k", `{"to":"http://10.0.0.2:7300","token":"t","rounds":4,"keep_ports":true}`},
		{"POST", "/v1/instances/0123/handoff", typeJSON, "", `{"instance":"4567","to":1}`},
		{"POST", "/v1/instances/0123/actions", typeJSON, "", `{"action":"discard-here"}`},
		{"POST", "/v1/handoffs", typeJSON, "Idempotency-Key: k", `{"version":1,"handoff":"4a4a4a4a4a4a4a4a","epoch":1,"kind":"ask"}`},
		{"POST", "/v1/handoffs", typeJSON, "", ""},
		{"GET", "/v1/handoffs/4a4a4a4a4a4a4a4a", "", "", ""},
		{"GET", handoffContentPath + "?key=" + handoffKey, "", "Range: bytes=5-,1-2", ""},
		{"GET", handoffContentPath + "?key=%00&key=", "", "If-Range: x", ""},
		{"PATCH", "/%2e%2e/v1//bases", "", "", "["},
		{"GET", "/metrics", "", "Accept-Encoding: zstd, gzip", ""},
	} {
		_, err := fuzzRequest(f.Context(), seed[0], seed[1], nil)
		require.NoError(f, err, "a seed that is no request")
		f.Add(seed[0], seed[1], seed[2], seed[3], []byte(seed[4]))
	}
	f.Fuzz(func(t *testing.T, method, target, kind, header string, body []byte) {
		ctx, cancel := context.WithTimeout(Local(t.Context()), fuzzPatience) // some answers wait, or never end
		defer cancel()
		req, err := fuzzRequest(ctx, method, target, body)
		if err != nil {
			return // no server sees it
		}
		if kind != "" {
			req.Header.Set("Content-Type", kind)
		}
		if name, value, ok := strings.Cut(header, ": "); ok {
			req.Header.Set(name, value)
		}
		fake := newFake()
		fake.ops = []api.Operation{
			{ID: "000000000001", State: api.OperationRunning, Kind: api.KindRun, Version: 1},
			{ID: "000000000002", State: api.OperationDone, Kind: api.KindRun, Version: 2},
		}
		fake.uploads["upload-0000"] = &upload{Upload: api.Upload{ID: "upload-0000", Size: 10}}
		h := New(Config{Service: fake})
		rec := httptest.NewRecorder()
		h.ServeHTTP(rec, req)
		if rec.Code >= 500 {
			t.Fatalf("%s %s: %d %s", method, target, rec.Code, rec.Body)
		}
		if rec.Code >= 400 && rec.Code != http.StatusPreconditionFailed {
			var p problem
			if err := json.Unmarshal(rec.Body.Bytes(), &p); err != nil || p.Status != rec.Code || p.Detail == "" {
				t.Fatalf("%s %s: %d %s", method, target, rec.Code, rec.Body)
			}
		}
		if begun := len(fake.calls); begun > 0 && rec.Code != http.StatusAccepted {
			t.Fatalf("%s %s: %d, but %d operations were begun", method, target, rec.Code, begun)
		}
		if n := len(h.(*server).slots) + len(h.(*server).fetches); n != 0 {
			t.Fatalf("%d slots are still taken", n)
		}
	})
}

// fuzzPatience is how long an answer that waits for an operation may wait.
const fuzzPatience = 20 * time.Millisecond

func fuzzRequest(ctx context.Context, method, target string, body []byte) (*http.Request, error) {
	u, err := url.ParseRequestURI(target)
	if err != nil {
		return nil, err
	}
	return http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
}
