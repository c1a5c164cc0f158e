package rest

import (
	"context"
	"net/http"
	"testing"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

// TestMetrics: what an operator asks is answered, in Prometheus' text format.
func TestMetrics(t *testing.T) {
	r := newRig(t, Limits{})
	r.do(call{method: "GET", path: "/v1/bases/debian"})
	r.do(call{method: "GET", path: "/v1/bases/nothing"})
	r.do(call{method: "PATCH", path: "/v1/bases/nothing"})
	op := r.begin()
	r.do(call{method: "GET", path: "/v1/operations/" + op.ID + "?wait=0"})
	said := text(t, r.do(call{method: "GET", path: "/metrics", token: readToken}))
	for _, line := range []string{
		`cloudlet_store_readable 1`,
		`cloudlet_instances{state="running"} 2`,
		`cloudlet_instances{state="lost"} 1`,
		`cloudlet_operations{kind="run",state="done"} 3`,
		`cloudlet_overlays 4`,
		`cloudlet_fetched_bytes_total 100`,
		`cloudlet_saved_bytes 900`,
		`cloudlet_frames_verified_total 8`,
		`cloudlet_frames_refused_total 1`,
		`cloudlet_frame_cache_hits_total 11`,
		`cloudlet_held_reads 1`,
		`cloudlet_image_reads_total{image="memory"} 5`,
		`cloudlet_first_response_seconds_bucket{le="0.1"} 1`,
		`cloudlet_first_response_seconds_bucket{le="1"} 3`,
		`cloudlet_first_response_seconds_bucket{le="+Inf"} 4`,
		`cloudlet_first_response_seconds_sum 12.5`,
		`cloudlet_demand_wait_seconds_count 9`,
		`cloudlet_http_request_duration_seconds_count{method="GET",route="/v1/bases/{id}",status="200"} 1`,
		`cloudlet_http_request_duration_seconds_count{method="GET",route="/v1/bases/{id}",status="404"} 1`,
		`cloudlet_http_request_duration_seconds_count{method="other",route="none",status="405"} 1`,
		`cloudlet_http_request_duration_seconds_count{method="GET",route="/v1/operations/{id} wait",status="200"} 1`,
		`cloudlet_http_requests_under_way 1`,
	} {
		require.Contains(t, said, line+"\n")
	}
	// Without the service's numbers the server's own are still there.
	r.fake.fail["Collect"] = api.Errorf(api.Internal, "broken")
	said = text(t, r.do(call{method: "GET", path: "/metrics"}))
	require.Contains(t, said, "cloudlet_store_readable 0\n")
	require.Contains(t, said, "cloudlet_http_requests_under_way 1\n")
	require.NotContains(t, said, "cloudlet_instances{")
}

func TestReadyz(t *testing.T) {
	r := newRig(t, Limits{})
	r.fake.fail["Instances"] = api.Errorf(api.Internal, "the disk is gone")
	resp := r.do(call{method: "GET", path: "/readyz"})
	require.Equal(t, 503, resp.StatusCode)
	require.Contains(t, as[problem](t, resp).Detail, "the disk is gone")
	require.Equal(t, 200, r.do(call{method: "GET", path: "/healthz"}).StatusCode)
	r.fake.fail = map[string]error{}
	stop := make(chan struct{})
	close(stop)
	req, err := http.NewRequestWithContext(context.WithValue(t.Context(), stoppingKey, (<-chan struct{})(stop)), "GET", "/readyz", nil)
	require.NoError(t, err)
	require.Equal(t, 503, r.serve(req).StatusCode, "it is stopping")
}
