package client

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"cloudlet/api"
)

// Operations lists the operations that are kept, the oldest first.
func (c *Client) Operations(ctx context.Context) ([]api.Operation, error) {
	return list[api.Operation](ctx, c, "operations", nil)
}

// Operation describes the operation with this id.
func (c *Client) Operation(ctx context.Context, id string) (api.Operation, error) {
	return show[api.Operation](ctx, c, "operations", id)
}

// Verify begins to check every byte of a base (KindVerifyBase; the result is an api.Base) or
// of an overlay (KindVerifyOverlay; the result is an api.VerifiedOverlay).
func (c *Client) Verify(ctx context.Context, kind api.Kind, ref string) (api.Operation, error) {
	return post[api.Operation](ctx, c, "operations", struct {
		Kind api.Kind `json:"kind"`
		api.Verify
	}{kind, api.Verify{Ref: ref}})
}

// Profile begins trial runs of an overlay that record its touch profile; the result is an
// api.ProfiledOverlay.
func (c *Client) Profile(ctx context.Context, req api.Profile) (api.Operation, error) {
	return post[api.Operation](ctx, c, "operations", struct {
		Kind api.Kind `json:"kind"`
		api.Profile
	}{api.KindProfile, req})
}

// PollOperation returns an operation when its version is over after or it has ended, and as
// it is at the latest after wait, which the service rounds and bounds.
func (c *Client) PollOperation(ctx context.Context, id string, after int64, wait time.Duration) (out api.Operation, err error) {
	path, err := at("operations", id)
	if err != nil {
		return out, err
	}
	query := url.Values{"wait": {strconv.Itoa(int(math.Ceil(wait.Seconds())))}, "after": {strconv.FormatInt(after, 10)}}
	return out, c.json(ctx, call{method: http.MethodGet, path: path, query: query}, &out)
}

// CancelOperation cancels an operation and returns it when its work has ended and is undone.
// One that has ended is an error, api.Conflict.
func (c *Client) CancelOperation(ctx context.Context, id string) (out api.Operation, err error) {
	path, err := at("operations", id)
	if err != nil {
		return out, err
	}
	return out, c.json(ctx, call{method: http.MethodDelete, path: path}, &out)
}

// Result returns what an operation made. One that did not succeed is its error, one that has
// not ended is an error as well.
func Result[T any](op api.Operation) (out T, err error) {
	if op.State != api.OperationDone {
		if op.Error != nil {
			return out, op.Error
		}
		return out, api.Errorf(api.Conflict, "operation %s is %s", op.ID, op.State).Fix("wait for its end")
	}
	if err := json.Unmarshal(op.Result, &out); err != nil {
		return out, fmt.Errorf("result of operation %s: %w", op.ID, err)
	}
	return out, nil
}
