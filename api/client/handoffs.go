package client

import (
	"context"
	"net/http"

	"cloudlet/api"
)

// HandOff begins to move an instance to another cloudlet while it runs. The result is an
// api.HandedOff. The operation can be cancelled until the guest goes; from then on cancelling
// it is an error, api.Conflict, and it goes on.
func (c *Client) HandOff(ctx context.Context, req api.HandOff) (out api.Operation, err error) {
	path, err := at("instances", req.Instance, "handoff")
	if err != nil {
		return out, err
	}
	return out, c.json(ctx, call{method: http.MethodPost, path: path, in: req}, &out)
}

// Handoff describes a handoff as the service's side of it sees it: the one with this id, or
// the newest of the instance that ref names.
func (c *Client) Handoff(ctx context.Context, ref string) (api.Handoff, error) {
	return show[api.Handoff](ctx, c, "handoffs", ref)
}
