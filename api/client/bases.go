package client

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"cloudlet/api"
)

// Bases lists the bases, the oldest first.
func (c *Client) Bases(ctx context.Context) ([]api.Base, error) {
	return list[api.Base](ctx, c, "bases", nil)
}

// Base describes the base that ref names: an id, its beginning, or a name.
func (c *Client) Base(ctx context.Context, ref string) (api.Base, error) {
	return show[api.Base](ctx, c, "bases", ref)
}

// DeleteBase removes a base that nothing uses.
func (c *Client) DeleteBase(ctx context.Context, ref string) error {
	return c.remove(ctx, "bases", ref, nil)
}

// CreateBase begins to boot and capture a guest. The result is an api.Base.
func (c *Client) CreateBase(ctx context.Context, req api.CreateBase) (api.Operation, error) {
	return post[api.Operation](ctx, c, "bases", req)
}

// ImportBase begins to take in a base package from where the service can read it. The result
// is an api.Base.
func (c *Client) ImportBase(ctx context.Context, req api.ImportBase) (api.Operation, error) {
	return post[api.Operation](ctx, c, "bases", req)
}

// SendBase sends a base package of size bytes (-1: not known) and returns when the service
// has verified and stored it.
func (c *Client) SendBase(ctx context.Context, name string, content io.Reader, size int64, p api.Progress) (out api.Base, err error) {
	from := &countedReader{r: content, phase: "send", total: max(size, 0), report: p}
	cl := call{method: http.MethodPost, path: "/v1/bases", body: from, size: size, header: http.Header{"Content-Type": {"application/zip"}}}
	if name != "" {
		cl.query = url.Values{"name": {name}}
	}
	if err = c.json(ctx, cl, &out); err != nil && from.err != nil && ctx.Err() == nil {
		err = from.err
	}
	return out, err
}

// BasePackage writes the package of a base to w.
func (c *Client) BasePackage(ctx context.Context, ref string, w io.Writer, p api.Progress) error {
	path, err := at("bases", ref, "package")
	if err != nil {
		return err
	}
	return c.copyTo(ctx, w, call{method: http.MethodGet, path: path}, "export", p)
}

// countedReader is a Reader that reports what went through.
type countedReader struct {
	r           io.Reader
	phase       string
	done, total int64
	report      api.Progress
	err         error // of r, or its early end
}

func (r *countedReader) Read(p []byte) (n int, err error) {
	n, err = r.r.Read(p)
	r.done += int64(n)
	if err == io.EOF && r.done < r.total {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && err != io.EOF {
		r.err = fmt.Errorf("read what is to be sent: %w", err)
	}
	if r.report != nil {
		r.report(r.phase, r.done, r.total)
	}
	return n, err
}
