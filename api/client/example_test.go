package client_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"

	"cloudlet/api"
	"cloudlet/api/client"
)

// Synthesise an overlay of the service's store, and say where its application answers.
func Example() {
	run := func(ctx context.Context, token string) error {
		c, err := client.New(client.Options{Server: "https://edge.example.org:7300", Token: token})
		if err != nil {
			return err
		}
		defer c.Close()
		op, err := c.Run(ctx, api.Run{Ref: "app", Probe: &api.Probe{Port: 80, Path: "/healthz"}})
		if err != nil {
			return err
		}
		// If ctx ends before, the synthesis is cancelled and nothing is left of it.
		op, err = c.Wait(ctx, op, func(now api.Operation) { fmt.Println(now.Phase) })
		if err != nil {
			return err
		}
		in, err := client.Result[api.Instance](op)
		if err != nil {
			return err
		}
		fmt.Println(in.Endpoints[0].Address)
		return nil
	}
	_ = run // there is no service to run it against here
}

// Find an application again after its instance was handed off, perhaps more than once: whoever
// loses the connection asks the cloudlet that it knew last.
func Example_endpoints() {
	ctx := context.Background()
	// where says at which address a port of the guest is now, and where to ask next time.
	type place struct{ cloudlet, instance string }
	where := func(at place, port int) (string, place, error) {
		for {
			c, err := client.New(client.Options{Server: at.cloudlet, Token: "the token for " + at.cloudlet})
			if err != nil {
				return "", at, err
			}
			in, err := c.Instance(ctx, at.instance)
			c.Close()
			if err != nil {
				return "", at, err
			}
			if in.Moved != nil {
				at = place{in.Moved.To, in.Moved.Instance} // an id of its own for each place: this ends
				continue
			}
			for _, e := range in.Endpoints {
				if e.Guest == port {
					return e.Address, at, nil
				}
			}
			return "", at, fmt.Errorf("instance %s is %s, and port %d cannot be reached", in.ID, in.State, port)
		}
	}

	// Two cloudlets; the instance that the first one had is at the second one by now.
	second := stand(api.Instance{ID: "b2b2b2b2b2b2", State: api.Running, Endpoints: []api.Endpoint{{Guest: 80, Address: "10.0.0.2:8080"}}})
	defer second.Close()
	first := stand(api.Instance{ID: "a1a1a1a1a1a1", State: api.Stopped, Moved: &api.Moved{To: second.URL, Instance: "b2b2b2b2b2b2"}})
	defer first.Close()

	address, at, err := where(place{first.URL, "a1a1a1a1a1a1"}, 80)
	fmt.Println(address, at.instance, at.cloudlet == second.URL, err)
	// Output: 10.0.0.2:8080 b2b2b2b2b2b2 true <nil>
}

// stand stands in for a cloudlet that has one instance.
func stand(in api.Instance) *httptest.Server {
	return httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v1/instances/"+in.ID {
			http.NotFound(w, r)
			return
		}
		_ = json.NewEncoder(w).Encode(in)
	}))
}
