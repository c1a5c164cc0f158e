package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"time"
)

// monitor is a connection to QEMU's monitor, for one command at a time.
type monitor struct {
	conn net.Conn
	in   *bufio.Reader
}

// dialMonitor connects as soon as the socket is there.
func dialMonitor(ctx context.Context, path string) (*monitor, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	for err != nil {
		select {
		case <-time.After(migrationPoll):
		case <-ctx.Done():
			return nil, fmt.Errorf("connect to QEMU: %w: %w", context.Cause(ctx), err)
		}
		conn, err = d.DialContext(ctx, "unix", path)
	}
	m := &monitor{conn: conn, in: bufio.NewReader(conn)}
	if _, err := m.in.ReadSlice('\n'); err != nil { // the greeting
		_ = conn.Close()
		return nil, fmt.Errorf("greet QEMU: %w", err)
	}
	return m, m.run(ctx, "qmp_capabilities", nil, nil)
}

// run runs a command and decodes its answer into out, unless that is nil.
func (m *monitor) run(ctx context.Context, command string, args, out any) error {
	stop := context.AfterFunc(ctx, func() { _ = m.conn.Close() })
	defer stop()
	err := json.NewEncoder(m.conn).Encode(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	for err == nil {
		var line []byte
		if line, err = m.in.ReadBytes('\n'); err != nil {
			break
		}
		var answer struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		if err = json.Unmarshal(line, &answer); err != nil {
			break
		}
		switch {
		case answer.Error != nil:
			return fmt.Errorf("QEMU's command %s: %s", command, answer.Error.Desc)
		case answer.Return != nil && out != nil:
			return json.Unmarshal(answer.Return, out)
		case answer.Return != nil:
			return nil
		}
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return fmt.Errorf("QEMU's command %s: %w", command, err)
}
