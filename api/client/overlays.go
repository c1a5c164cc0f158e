package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"cloudlet/api"
)

// Overlays lists the overlays, the oldest first.
func (c *Client) Overlays(ctx context.Context) ([]api.Overlay, error) {
	return list[api.Overlay](ctx, c, "overlays", nil)
}

// Overlay describes the overlay that ref names: an id, its beginning, or a name.
func (c *Client) Overlay(ctx context.Context, ref string) (api.Overlay, error) {
	return show[api.Overlay](ctx, c, "overlays", ref)
}

// DeleteOverlay removes an overlay that nothing uses.
func (c *Client) DeleteOverlay(ctx context.Context, ref string) error {
	return c.remove(ctx, "overlays", ref, nil)
}

// CreateOverlay begins to capture an instance. The result is an api.CreatedOverlay.
func (c *Client) CreateOverlay(ctx context.Context, req api.CreateOverlay) (api.Operation, error) {
	return post[api.Operation](ctx, c, "overlays", req)
}

// ImportOverlay begins to take in an overlay from where the service can read it. The result
// is an api.Overlay.
func (c *Client) ImportOverlay(ctx context.Context, req api.ImportOverlay) (api.Operation, error) {
	return post[api.Operation](ctx, c, "overlays", req)
}

// OverlayContent writes the file of an overlay to w.
func (c *Client) OverlayContent(ctx context.Context, ref string, w io.Writer, p api.Progress) error {
	path, err := at("overlays", ref, "content")
	if err != nil {
		return err
	}
	return c.copyTo(ctx, w, call{method: http.MethodGet, path: path}, "copy", p)
}

// CreateUpload makes an entry that content is sent to.
func (c *Client) CreateUpload(ctx context.Context, req api.CreateUpload) (api.Upload, error) {
	return post[api.Upload](ctx, c, "overlays", req)
}

// Upload describes an entry: Offset is where to go on.
func (c *Client) Upload(ctx context.Context, id string) (api.Upload, error) {
	return show[api.Upload](ctx, c, "overlays", id)
}

// DeleteUpload gives an entry up, with what it has received.
func (c *Client) DeleteUpload(ctx context.Context, id string) error {
	return c.remove(ctx, "overlays", id, nil)
}

// SendOverlay sends an overlay file of size bytes, going on where a broken connection left
// off, and returns the operation that takes it in; its result is an api.Overlay. On an error
// the service keeps nothing.
func (c *Client) SendOverlay(ctx context.Context, name string, content io.ReaderAt, size int64, p api.Progress) (api.Operation, error) {
	up, err := c.CreateUpload(ctx, api.CreateUpload{Name: name, Size: size})
	if err != nil {
		return api.Operation{}, err
	}
	op, err := c.ResumeUpload(ctx, up, content, p)
	if err != nil {
		bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), cancelBound)
		defer cancel()
		if derr := c.giveUp(bound, up.ID); derr != nil {
			err = errors.Join(err, derr)
		}
	}
	return op, err
}

// giveUp removes an upload, if need be when the service has let go of it: it may still be
// writing what had arrived before the connection broke.
func (c *Client) giveUp(ctx context.Context, id string) error {
	for pause := firstPause; ; pause *= 2 {
		err := c.DeleteUpload(ctx, id)
		switch api.CodeOf(err) {
		case api.NotFound:
			return nil
		case api.Conflict:
			if sleep(ctx, pause) == nil {
				continue
			}
		}
		return err
	}
}

// uploadPatience is how long an upload goes on trying while not a byte arrives.
const uploadPatience = 30 * time.Second

// ResumeUpload sends what is missing of an upload, and returns the operation that takes the
// overlay in. On an error the service keeps what has arrived, for another try.
func (c *Client) ResumeUpload(ctx context.Context, up api.Upload, content io.ReaderAt, p api.Progress) (api.Operation, error) {
	last := time.Now() // when something had arrived
	pause := firstPause
	for {
		op, now, err := c.put(ctx, up, content, p)
		if err == nil && op.ID != "" {
			return op, nil
		}
		var wrong *offsetError
		if err != nil && !errors.As(err, &wrong) && api.CodeOf(err) != api.Unavailable || ctx.Err() != nil {
			return op, err
		}
		if err != nil {
			var serr error
			if now, serr = c.Upload(ctx, up.ID); serr != nil && api.CodeOf(serr) != api.Unavailable {
				return op, errors.Join(err, serr)
			} else if serr != nil {
				now = up
			}
		}
		if now.Offset > up.Offset {
			last, pause = time.Now(), firstPause
		}
		up = now
		if err == nil {
			continue
		}
		if time.Since(last) > uploadPatience {
			return op, err
		}
		if err := sleep(ctx, pause); err != nil {
			return op, err
		}
		pause = min(2*pause, 5*time.Second)
	}
}

// offsetError is an upload's refusal, with where it stands: where the bytes that were sent do
// not follow those it has, that is another place than theirs.
type offsetError struct {
	error
	off int64
}

func (e *offsetError) Unwrap() error { return e.error }

// put sends the rest of an upload: with it an operation begins, or it says how far it is.
func (c *Client) put(ctx context.Context, up api.Upload, content io.ReaderAt, p api.Progress) (op api.Operation, now api.Upload, err error) {
	path, err := at("overlays", up.ID, "content")
	if err != nil {
		return op, now, err
	}
	rest := up.Size - up.Offset
	cl := call{method: http.MethodPut, path: path, body: http.NoBody, header: http.Header{
		"Content-Type": {"application/zip"}, "Content-Range": {fmt.Sprintf("bytes */%d", up.Size)},
	}}
	from := &countedReader{r: io.NewSectionReader(content, up.Offset, rest), phase: "send", done: up.Offset, total: up.Size, report: p}
	if rest > 0 {
		cl.body, cl.size = from, rest
		cl.header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", up.Offset, up.Size-1, up.Size))
	}
	resp, err := c.send(ctx, cl)
	if err == nil {
		defer resp.Body.Close()
	}
	var wrong *offsetError
	if errors.As(err, &wrong) && wrong.off == up.Offset {
		err = wrong.error // it is refused for another reason
	}
	if from.err != nil && ctx.Err() == nil {
		err = from.err
	}
	if err != nil {
		return op, now, err
	}
	if resp.StatusCode == http.StatusAccepted {
		return op, now, c.decode(ctx, resp, &op)
	}
	err = c.decode(ctx, resp, &now)
	if off := resp.Header.Get("Upload-Offset"); err == nil && off != "" && off != strconv.FormatInt(now.Offset, 10) {
		err = api.Errorf(api.Internal, "upload %s is said to be at %s and at %d", up.ID, off, now.Offset)
	}
	return op, now, err
}
