package client_test

import (
	"context"
	"fmt"

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
