package client

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"cloudlet/api"
)

const (
	// cancelBound is how long a service may take to undo what a caller has given up.
	cancelBound = time.Minute
	// quietBound is how long an event stream may be without a line, comments included.
	quietBound = 45 * time.Second
	// pollWait is how long one poll waits at the service.
	pollWait = 20 * time.Second
	// gonePatience is how long a service that cannot be reached is awaited.
	gonePatience = 10 * time.Second
	maxEvent     = 4 << 20
)

// Wait follows an operation to its end and returns it; how it ended is in its State, and
// Result reads it. watch, if not nil, is told each state that is seen, one at a time. When
// ctx ends first, Wait cancels the operation, waits until what it did is undone, and returns
// the error of ctx; an operation that had ended by then is returned without an error.
func (c *Client) Wait(ctx context.Context, op api.Operation, watch func(api.Operation)) (api.Operation, error) {
	op, err := c.Follow(ctx, op, watch)
	if err == nil || ctx.Err() == nil {
		return op, err
	}
	bound, cancel := context.WithTimeout(context.WithoutCancel(ctx), cancelBound)
	defer cancel()
	ended, cerr := c.CancelOperation(bound, op.ID)
	if api.CodeOf(cerr) == api.Conflict { // it had ended, perhaps well
		ended, cerr = c.Operation(bound, op.ID)
	}
	switch {
	case cerr != nil:
		return op, errors.Join(err, fmt.Errorf("cancel operation %s: %w", op.ID, cerr))
	case ended.State == api.OperationCancelled:
		return ended, err
	}
	return ended, nil
}

// Follow is Wait that leaves the operation alone when ctx ends.
func (c *Client) Follow(ctx context.Context, op api.Operation, watch func(api.Operation)) (api.Operation, error) {
	if watch == nil {
		watch = func(api.Operation) {}
	}
	see := func(now api.Operation) {
		if now.Version > op.Version || now.State.Ended() {
			op = now
			watch(op)
		}
	}
	if op.State.Ended() {
		watch(op)
	}
	streams := true
	var gone time.Time // since when the service cannot be reached
	for !op.State.Ended() {
		if streams {
			before := op.Version
			err := c.stream(ctx, op, see)
			if ctx.Err() != nil {
				return op, context.Cause(ctx)
			}
			streams = err == nil || op.Version > before
			if op.State.Ended() {
				break
			}
		}
		now, err := c.PollOperation(ctx, op.ID, op.Version, pollWait)
		switch {
		case err == nil:
			gone = time.Time{}
			see(now)
			continue
		case ctx.Err() != nil:
			return op, context.Cause(ctx)
		case api.CodeOf(err) != api.Unavailable:
			return op, err
		case answered(err): // it has no room for one more at the moment
			gone = time.Time{}
		case gone.IsZero():
			gone = time.Now()
		case time.Since(gone) > gonePatience:
			return op, api.Errorf(api.Unavailable, "operation %s goes on, or has ended, without us: %w", op.ID, err).
				Fix("ask for it when the service can be reached again: cloudlet op wait %s", op.ID)
		}
		if err := sleep(ctx, 4*firstPause); err != nil {
			return op, err
		}
	}
	return op, nil
}

// answered says of an error whether the service gave it.
func answered(err error) bool {
	var e *api.Error
	return errors.As(err, &e) && e.Err == nil
}

// stream follows an operation by server-sent events until its end, or that of the stream.
func (c *Client) stream(ctx context.Context, op api.Operation, see func(api.Operation)) error {
	path, err := at("operations", op.ID)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	quiet := time.AfterFunc(quietBound, cancel)
	defer quiet.Stop()
	resp, err := c.send(ctx, call{method: http.MethodGet, path: path, header: http.Header{
		"Accept": {"text/event-stream"}, "Last-Event-Id": {strconv.FormatInt(op.Version, 10)},
	}})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if kind, _, err := mime.ParseMediaType(resp.Header.Get("Content-Type")); err != nil || kind != "text/event-stream" {
		return fmt.Errorf("read events: the answer is %q", resp.Header.Get("Content-Type"))
	}
	return events(resp.Body, func() { quiet.Reset(quietBound) }, see)
}

// events reads operations from an event stream until the final one. heard is called at each line.
func events(r io.Reader, heard func(), see func(api.Operation)) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxEvent)
	var name string
	var data []string
	for lines.Scan() {
		heard()
		field, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimPrefix(value, " ")
		switch {
		case lines.Text() == "":
			if name == "operation" && len(data) > 0 {
				var op api.Operation
				if err := json.Unmarshal([]byte(strings.Join(data, "\n")), &op); err != nil {
					return fmt.Errorf("read event: %w", err)
				}
				see(op)
				if op.State.Ended() {
					return nil
				}
			}
			name, data = "", nil
		case field == "event":
			name = value
		case field == "data":
			data = append(data, value)
		}
	}
	return lines.Err()
}
