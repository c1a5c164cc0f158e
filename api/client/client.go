package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"cloudlet/api"
)

// Options say where the service is.
type Options struct {
	// Server is http://HOST:PORT, https://HOST:PORT, or unix:PATH of its socket.
	Server string
	// Token is the bearer token; "" sends none, as a unix socket needs none.
	Token string
	// Transport carries the requests; nil: a new one for Server.
	Transport http.RoundTripper
}

// Client calls one service.
type Client struct {
	base  url.URL
	where string // for messages
	token string
	http  *http.Client
}

// New returns a Client. It does not connect yet; a wrong address is an error.
func New(o Options) (*Client, error) {
	c := &Client{where: o.Server, token: o.Token}
	transport := o.Transport
	if path, ok := strings.CutPrefix(o.Server, "unix:"); ok {
		path = strings.TrimPrefix(path, "//")
		c.base = url.URL{Scheme: "http", Host: "cloudlet"}
		if transport == nil {
			transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", path)
			}}
		}
	} else {
		u, err := url.Parse(o.Server)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.User != nil {
			return nil, api.Errorf(api.Invalid, "%q is not the address of a service", o.Server).Fix("use http://HOST:PORT, https://HOST:PORT or unix:PATH")
		}
		c.base = url.URL{Scheme: u.Scheme, Host: u.Host}
		if transport == nil {
			transport = http.DefaultTransport.(*http.Transport).Clone()
		}
	}
	c.http = &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return c, nil
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// call is one request.
type call struct {
	method string
	path   string
	query  url.Values
	header http.Header
	in     any       // sent as JSON; or
	body   io.Reader // sent as it is, once, with
	size   int64     // its bytes, -1 if not known
}

// Requests without a stream are tried this often, with growing pauses between.
const (
	tries      = 4
	firstPause = 50 * time.Millisecond
	maxAnswer  = 64 << 20 // bytes of a JSON answer
)

// send makes a call. The caller closes the body of the answer, whose status is below 300.
func (c *Client) send(ctx context.Context, cl call) (*http.Response, error) {
	var content []byte
	if cl.in != nil {
		var err error
		if content, err = json.Marshal(cl.in); err != nil {
			return nil, err
		}
	}
	key := ""
	if cl.method == http.MethodPost {
		key = rand.Text()
	}
	for try := 1; ; try++ {
		req, err := c.request(ctx, cl, content, key)
		if err != nil {
			return nil, err
		}
		resp, err := c.http.Do(req)
		if err == nil {
			if resp.StatusCode >= 300 {
				defer resp.Body.Close()
				return nil, problem(resp)
			}
			return resp, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if try == tries || cl.body != nil {
			return nil, c.unreachable(err)
		}
		if err := sleep(ctx, firstPause<<(2*try-2)); err != nil {
			return nil, err
		}
	}
}

func (c *Client) request(ctx context.Context, cl call, content []byte, key string) (*http.Request, error) {
	u := c.base.String() + cl.path
	if len(cl.query) > 0 {
		u += "?" + cl.query.Encode()
	}
	body := cl.body
	if cl.in != nil {
		body = bytes.NewReader(content)
	}
	req, err := http.NewRequestWithContext(ctx, cl.method, u, body)
	if err != nil {
		return nil, err
	}
	for name, values := range cl.header {
		req.Header[name] = values
	}
	if cl.in != nil {
		req.Header.Set("Content-Type", "application/json")
	} else if cl.body != nil {
		if req.ContentLength = cl.size; cl.size == 0 {
			req.Body = http.NoBody // else the length would count as not known
		}
	}
	if key != "" {
		req.Header.Set("Idempotency-Key", key)
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	return req, nil
}

func (c *Client) unreachable(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err // without the address, which where says
	}
	return api.Errorf(api.Unavailable, "reach the service at %s: %w", c.where, err).Fix("see that it runs there, and that the address is right")
}

// json makes a call and decodes its answer into out, unless that is nil.
func (c *Client) json(ctx context.Context, cl call, out any) error {
	resp, err := c.send(ctx, cl)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return c.decode(ctx, resp, out)
}

func (c *Client) decode(ctx context.Context, resp *http.Response, out any) error {
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return c.unreachable(err)
	}
	if len(b) > maxAnswer {
		return api.Errorf(api.Internal, "the answer of %s is over %d bytes", c.where, maxAnswer)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return api.Errorf(api.Internal, "read the answer of %s: %w", c.where, err).Fix("see that a cloudlet service of this version is there")
	}
	return nil
}

// codes are the kinds of failure behind the statuses, for answers that do not say theirs.
var codes = map[int]api.Code{
	http.StatusBadRequest: api.Invalid, http.StatusNotFound: api.NotFound, http.StatusConflict: api.Conflict,
	http.StatusUnprocessableEntity: api.Damaged, http.StatusServiceUnavailable: api.Unavailable, http.StatusGatewayTimeout: api.TimedOut,
	http.StatusUnauthorized: api.Unavailable, http.StatusForbidden: api.Unavailable, http.StatusTooManyRequests: api.Unavailable,
	http.StatusRequestEntityTooLarge: api.Invalid,
}

// problem reads the error of an answer.
func problem(resp *http.Response) error {
	b, rerr := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	e := &api.Error{}
	kind, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if rerr != nil || err != nil || kind != "application/problem+json" || json.Unmarshal(b, e) != nil || e.Detail == "" {
		*e = api.Error{Detail: fmt.Sprintf("%s %s answered %s", resp.Request.Method, resp.Request.URL.Path, resp.Status)}
		if text := strings.TrimSpace(string(b)); kind == "text/plain" && text != "" {
			e.Detail += ": " + text
		}
	}
	if e.Code == "" {
		e.Code = api.Internal
		if code, ok := codes[resp.StatusCode]; ok {
			e.Code = code
		}
	}
	if off, err := strconv.ParseInt(resp.Header.Get("Upload-Offset"), 10, 64); err == nil && resp.StatusCode == http.StatusConflict {
		return &offsetError{e, off}
	}
	return e
}

// at returns the path of a thing that ref names, below a collection of /v1.
func at(collection, ref string, more ...string) (string, error) {
	if ref == "" || ref == "." || ref == ".." {
		return "", api.Errorf(api.NotFound, "%q names nothing in %s", ref, collection).Fix("give an id, its beginning, or a name")
	}
	return strings.Join(append([]string{"/v1", collection, url.PathEscape(ref)}, more...), "/"), nil
}

// show reads the thing that ref names.
func show[T any](ctx context.Context, c *Client, collection, ref string) (out T, err error) {
	path, err := at(collection, ref)
	if err == nil {
		err = c.json(ctx, call{method: http.MethodGet, path: path}, &out)
	}
	return out, err
}

// list reads a collection.
func list[T any](ctx context.Context, c *Client, collection string, query url.Values) (out []T, err error) {
	return out, c.json(ctx, call{method: http.MethodGet, path: "/v1/" + collection, query: query}, &out)
}

// remove deletes the thing that ref names.
func (c *Client) remove(ctx context.Context, collection, ref string, query url.Values) error {
	path, err := at(collection, ref)
	if err != nil {
		return err
	}
	return c.json(ctx, call{method: http.MethodDelete, path: path, query: query}, nil)
}

// post sends a request to a collection.
func post[T any](ctx context.Context, c *Client, collection string, in any) (out T, err error) {
	return out, c.json(ctx, call{method: http.MethodPost, path: "/v1/" + collection, in: in}, &out)
}

// copyTo writes the body of an answer to w.
func (c *Client) copyTo(ctx context.Context, w io.Writer, cl call, phase string, p api.Progress) error {
	resp, err := c.send(ctx, cl)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	to := &counted{w: w, phase: phase, total: max(resp.ContentLength, 0), report: p}
	_, err = io.Copy(to, resp.Body)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil && to.err == nil {
		return api.Errorf(api.Unavailable, "the answer of the service at %s broke off: %w", c.where, err).Fix("try again; if that does not help, the service's log says why")
	}
	return err
}

// counted is a Writer that reports what went through, and remembers its own error.
type counted struct {
	w           io.Writer
	phase       string
	done, total int64
	report      api.Progress
	err         error
}

func (w *counted) Write(p []byte) (n int, err error) {
	n, err = w.w.Write(p)
	w.done, w.err = w.done+int64(n), err
	if w.report != nil {
		w.report(w.phase, w.done, w.total)
	}
	return n, err
}

// sleep waits for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
