package fusefs

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
)

// maxReply bounds in bytes what a client reads from a control socket.
const maxReply = 16 << 20

// Control talks to the process of a mount over its control socket.
type Control struct {
	socket string
	http   *http.Client
}

// Dial returns a client of the control socket at that path. It connects anew for each
// call and holds nothing open.
func Dial(socket string) *Control {
	return &Control{socket: socket, http: &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		},
	}}}
}

// Status returns the state of the mount.
func (c *Control) Status(ctx context.Context) (Status, error) {
	var st Status
	err := c.call(ctx, http.MethodGet, "/status", &st)
	return st, err
}

// Touches does what Server.Touches does.
func (c *Control) Touches(ctx context.Context) ([]Touch, error) {
	var list []Touch
	err := c.call(ctx, http.MethodGet, "/touches", &list)
	return list, err
}

// Begin does what Server.Begin does.
func (c *Control) Begin(ctx context.Context) error {
	return c.call(ctx, http.MethodPost, "/begin", nil)
}

// Abort does what Server.Abort does.
func (c *Control) Abort(ctx context.Context) error {
	return c.call(ctx, http.MethodPost, "/abort", nil)
}

// Unmount does what Server.Unmount does, or Server.ForceUnmount. It returns ErrBusy while
// the mount is in use.
func (c *Control) Unmount(ctx context.Context, force bool) error {
	path := "/unmount"
	if force {
		path += "?force=1"
	}
	return c.call(ctx, http.MethodPost, path, nil)
}

func (c *Control) call(ctx context.Context, method, path string, out any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://mount"+path, nil)
	if err != nil {
		return fmt.Errorf("control mount at %s: %w", c.socket, err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return fmt.Errorf("control mount at %s: %w", c.socket, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxReply))
	if err != nil {
		return fmt.Errorf("control mount at %s: %w", c.socket, err)
	}
	if resp.StatusCode != http.StatusOK {
		var p problem
		if err := json.Unmarshal(body, &p); err != nil || p.Error == "" {
			p.Error = resp.Status
		}
		if resp.StatusCode == http.StatusConflict {
			return fmt.Errorf("control mount at %s: %w: %s", c.socket, ErrBusy, p.Error)
		}
		return fmt.Errorf("control mount at %s: %s", c.socket, p.Error)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("decode status of %s: %w", c.socket, err)
	}
	return nil
}
