package client

import (
	"context"
	"io"
	"net/http"
	"net/url"

	"cloudlet/api"
)

// Run begins VM synthesis, or the resume of a base. The result is an api.Instance.
func (c *Client) Run(ctx context.Context, req api.Run) (api.Operation, error) {
	return post[api.Operation](ctx, c, "instances", req)
}

// Instances lists the instances, the oldest first; all: also those that have ended.
func (c *Client) Instances(ctx context.Context, all bool) ([]api.Instance, error) {
	var query url.Values
	if all {
		query = url.Values{"all": {"true"}}
	}
	return list[api.Instance](ctx, c, "instances", query)
}

// Instance describes the instance that ref names: an id, its beginning, or a name.
func (c *Client) Instance(ctx context.Context, ref string) (api.Instance, error) {
	return show[api.Instance](ctx, c, "instances", ref)
}

// Act does something to an instance and returns what it is then.
func (c *Client) Act(ctx context.Context, ref string, a api.Action) (out api.Instance, err error) {
	path, err := at("instances", ref, "actions")
	if err != nil {
		return out, err
	}
	in := struct {
		Action api.Action `json:"action"`
	}{a}
	return out, c.json(ctx, call{method: http.MethodPost, path: path, in: in}, &out)
}

// DeleteInstance removes an instance that has ended; force: ends it first.
func (c *Client) DeleteInstance(ctx context.Context, ref string, force bool) error {
	var query url.Values
	if force {
		query = url.Values{"force": {"true"}}
	}
	return c.remove(ctx, "instances", ref, query)
}

// Log writes the serial console of an instance to w.
func (c *Client) Log(ctx context.Context, ref string, w io.Writer) error {
	path, err := at("instances", ref, "log")
	if err != nil {
		return err
	}
	return c.copyTo(ctx, w, call{method: http.MethodGet, path: path}, "", nil)
}
