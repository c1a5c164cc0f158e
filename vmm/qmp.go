package vmm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxQMPLine bounds one message of the monitor in bytes; the longest known answers, of
// schemas, have a few hundred KiB.
const maxQMPLine = 16 << 20

// QMPError is an error that QEMU's monitor answered.
type QMPError struct {
	Command string
	Class   string
	Desc    string
}

// Error returns for example "monitor command cont: GenericError: ...".
func (e *QMPError) Error() string {
	return fmt.Sprintf("monitor command %s: %s: %s", e.Command, e.Class, e.Desc)
}

// errMonitor means that the connection to the monitor broke or cannot be understood.
var errMonitor = errors.New("monitor connection lost")

// qmp is a connection to QEMU's monitor. Commands run one at a time; events are passed
// over. After an error that wraps errMonitor the connection is of no more use; after the end
// of a context the command may still take effect, before any later one.
type qmp struct {
	transport
	folder string // before the names of the VM's files, "" where QEMU runs in their folder
}

// transport carries the commands of a monitor.
type transport interface {
	// executeFD runs one command, passes a file along with it if f is not nil, and decodes its
	// answer into out, unless that is nil.
	executeFD(ctx context.Context, command string, args, out any, f *os.File) error
	// close lets the next client in.
	close() error
}

// request is a command as the monitor reads it.
type request struct {
	Execute   string `json:"execute"`
	Arguments any    `json:"arguments,omitempty"`
	ID        int    `json:"id,omitempty"`
}

// socket is a connection to the monitor's socket in a VM's folder.
type socket struct {
	conn *net.UnixConn

	mu   sync.Mutex
	in   *bufio.Reader
	line []byte // read so far of a message, where a deadline cut in
	last int    // id of a command
	end  int    // above our ids
}

// qmpIDs is the number of ids that a connection has for itself. The answer to a command of a
// client that has left, or was killed, goes to whoever comes next: ids tell whose it is.
const qmpIDs = 1 << 20

// dialQMP connects to the socket in a VM's folder and negotiates. It waits until another
// client has left, bounded by ctx.
func dialQMP(ctx context.Context, dir string) (*qmp, error) {
	conn, err := dialUnix(ctx, dir, qmpSocket)
	if err != nil {
		return nil, err
	}
	s := &socket{conn: conn, in: bufio.NewReaderSize(conn, 64<<10), last: rand.IntN(1<<32) * qmpIDs}
	s.end = s.last + qmpIDs
	if err := s.negotiate(ctx); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return &qmp{transport: s}, nil
}

// dialUnix connects to a socket in a folder through the folder's descriptor, whose path is
// short however long the folder's is. Where too many clients wait already it waits with them.
func dialUnix(ctx context.Context, dir, name string) (*net.UnixConn, error) {
	d, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("open folder of VM: %w", err)
	}
	defer d.Close()
	var conn net.Conn
	err = pollUntil(ctx, func() (bool, error) {
		var nd net.Dialer
		conn, err = nd.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name))
		if errors.Is(err, unix.EAGAIN) { // the queue of clients is full
			return false, nil
		}
		return true, err
	})
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", name, err)
	}
	return conn.(*net.UnixConn), nil
}

func (c *socket) close() error { return c.conn.Close() }

func (c *socket) negotiate(ctx context.Context) error {
	err := c.during(ctx, func() error {
		for {
			m, err := c.read()
			if err != nil || m.QMP != nil {
				return err
			}
			if m.ID == nil && m.Event == "" { // else it is an answer to a client that has left
				return fmt.Errorf("%w: no greeting", errMonitor)
			}
		}
	})
	if err != nil {
		return fmt.Errorf("greet monitor: %w", err)
	}
	err = c.executeFD(ctx, "qmp_capabilities", nil, nil, nil)
	var refused *QMPError
	if errors.As(err, &refused) && refused.Class == "CommandNotFound" {
		// QEMU has this command until a connection has negotiated: the command of a client that
		// left, run after this one came, has done it.
		return nil
	}
	return err
}

// message is any message of the monitor.
type message struct {
	QMP    json.RawMessage `json:"QMP"`
	Event  string          `json:"event"`
	ID     *int            `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	} `json:"error"`
}

// read reads one message. The error wraps errMonitor; after a deadline reading may go on.
func (c *socket) read() (message, error) {
	var m message
	for {
		part, err := c.in.ReadSlice('\n')
		c.line = append(c.line, part...)
		if len(c.line) > maxQMPLine {
			return m, fmt.Errorf("%w: a message exceeds %d bytes", errMonitor, maxQMPLine)
		}
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			return m, fmt.Errorf("%w: read: %w", errMonitor, err)
		}
	}
	line := c.line
	c.line = nil
	if err := json.Unmarshal(line, &m); err != nil {
		return m, fmt.Errorf("%w: parse %.80q: %w", errMonitor, line, err)
	}
	return m, nil
}

// during runs f with the connection's deadline tied to ctx.
func (c *socket) during(ctx context.Context, f func() error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	fired := make(chan struct{})
	cancel := context.AfterFunc(ctx, func() {
		defer close(fired)
		_ = c.conn.SetDeadline(time.Unix(1, 0))
	})
	err := f()
	if !cancel() {
		<-fired
		_ = c.conn.SetDeadline(time.Time{})
		if err != nil && ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return err
}

// execute runs one command and decodes its answer into out, unless that is nil.
func (c *qmp) execute(ctx context.Context, command string, args, out any) error {
	return c.executeFD(ctx, command, args, out, nil)
}

func (c *socket) executeFD(ctx context.Context, command string, args, out any, f *os.File) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last++
	id := c.last
	req, err := json.Marshal(request{command, args, id})
	if err != nil {
		return fmt.Errorf("encode monitor command %s: %w", command, err)
	}
	var answer message
	err = c.during(ctx, func() error {
		if err := c.send(append(req, '\n'), f); err != nil {
			return err
		}
		for {
			m, err := c.read()
			if err != nil {
				return err
			}
			if m.ID != nil && *m.ID == id && m.Event == "" {
				answer = m
				return nil
			}
			// To a command that was given up, by us or by another client.
			late := m.ID != nil && (*m.ID < id || *m.ID >= c.end)
			if m.Event == "" && !late {
				return fmt.Errorf("%w: an answer to no question", errMonitor)
			}
		}
	})
	if err != nil {
		return fmt.Errorf("monitor command %s: %w", command, err)
	}
	return answer.into(command, out)
}

// into decodes the answer to a command into out, unless that is nil.
func (m message) into(command string, out any) error {
	if m.Error != nil {
		return &QMPError{Command: command, Class: m.Error.Class, Desc: m.Error.Desc}
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(m.Return, out); err != nil {
		return fmt.Errorf("monitor command %s: parse answer: %w", command, err)
	}
	return nil
}

func (c *socket) send(p []byte, f *os.File) error {
	var rights []byte
	if f != nil {
		rights = syscall.UnixRights(int(f.Fd()))
	}
	n, _, err := c.conn.WriteMsgUnix(p, rights, nil)
	if err == nil && n < len(p) {
		_, err = c.conn.Write(p[n:])
	}
	if err != nil {
		return fmt.Errorf("%w: write: %w", errMonitor, err)
	}
	return nil
}

// human runs a command of the human monitor, for the few facts that have no other one.
func (c *qmp) human(ctx context.Context, command string) (string, error) {
	var out string
	err := c.execute(ctx, "human-monitor-command", map[string]any{"command-line": command}, &out)
	return out, err
}

// runState asks for QEMU's run state, "running" or one of a dozen others.
func (c *qmp) runState(ctx context.Context) (string, error) {
	var s struct {
		Status string `json:"status"`
	}
	err := c.execute(ctx, "query-status", nil, &s)
	return s.Status, err
}

// ignoreRefusal returns nil for an error that only says that QEMU does not offer a command.
func ignoreRefusal(err error) error {
	var refused *QMPError
	if errors.As(err, &refused) {
		return nil
	}
	return err
}

// file returns the name by which QEMU is told of a file in the VM's folder.
func (c *qmp) file(name string) string { return filepath.Join(c.folder, name) }
