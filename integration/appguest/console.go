package appguest

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Console runs commands at the root prompt of a guest's serial console. It is used from
// one goroutine at a time.
type Console struct {
	conn    net.Conn
	in      *bufio.Reader
	mark    string // no command prints it by chance
	running bool   // a command was sent and has not ended
}

// handshake bounds the wait for a shell's first answer: seconds, unless nobody is logged in
// or somebody else holds the socket.
const handshake = 30 * time.Second

// OpenConsole connects to a serial console's unix socket, where a root shell must wait at
// its prompt, and starts a shell of its own there. Close it to give the console back.
func OpenConsole(ctx context.Context, socket string) (*Console, error) {
	conn, err := dial(ctx, socket)
	if err != nil {
		return nil, fmt.Errorf("open console %s: %w", socket, err)
	}
	c := &Console{conn: conn, in: bufio.NewReader(conn), mark: rand.Text()}
	bound, cancel := context.WithTimeout(ctx, handshake)
	defer cancel()
	// What is typed next must not be read by the shell that is there now.
	err = c.send(bound, "\necho "+c.mark+"'-open'; env -u MAIL PS1= PS2= sh\n")
	if err == nil {
		err = c.await(bound, "-open")
	}
	if err == nil {
		err = c.send(bound, "stty -echo\n")
	}
	if err == nil {
		err = c.Run(bound, "true", io.Discard)
	}
	if err != nil {
		if ctx.Err() == nil && bound.Err() != nil {
			err = errors.New("no shell answers (remedy: wait until the guest shows its root prompt, and disconnect whoever else uses the console)")
		}
		return nil, errors.Join(fmt.Errorf("open console %s: %w", socket, err), conn.Close())
	}
	return c, nil
}

// dial connects to a unix socket whose path may be longer than a socket address holds.
func dial(ctx context.Context, socket string) (net.Conn, error) {
	dir, err := os.Open(filepath.Dir(socket))
	if err != nil {
		return nil, err
	}
	defer dir.Close() // read only: nothing is lost
	var d net.Dialer
	return d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(socket)))
}

// Run runs a line of shell with empty input, copies what it prints to log, and returns when
// it has ended: an error if its exit code is not 0, with the last lines that it printed.
// When ctx ends first, the command goes on and the console is only good for Close.
func (c *Console) Run(ctx context.Context, line string, log io.Writer) error {
	const longest = 2000 // a terminal takes 4095 bytes a line
	if len(line) > longest || strings.ContainsAny(line, "\n\r") {
		return fmt.Errorf("run %.40q in guest: more than %d bytes, or not one line", line, longest)
	}
	c.running = true
	// In two words, so that an echo of the line does not look like the end.
	if err := c.send(ctx, fmt.Sprintf("{ %s\n} </dev/null; echo %s'-end' $?\n", line, c.mark)); err != nil {
		return fmt.Errorf("run %q in guest: %w", line, err)
	}
	var tail []string
	for {
		text, err := c.line(ctx)
		if err != nil {
			return fmt.Errorf("run %q in guest: %w", line, err)
		}
		before, after, found := strings.Cut(text, c.mark+"-end ")
		if before != "" {
			fmt.Fprintln(log, before)
			tail = append(tail[max(0, len(tail)-2):], before)
		}
		if !found {
			continue
		}
		c.running = false
		if code := strings.TrimSpace(after); code != "0" {
			return fmt.Errorf("run %q in guest: exit code %s: %s", line, code, strings.Join(tail, "; "))
		}
		return nil
	}
}

// Close ends the shell that OpenConsole started and disconnects. A command that still runs
// is interrupted; then the console is not given back in order.
func (c *Console) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if c.running {
		return errors.Join(c.send(ctx, "\x03"), c.conn.Close())
	}
	// QEMU drops what it has not passed on when the connection ends: wait until it was read.
	err := c.send(ctx, "stty echo; echo "+c.mark+"'-close'; exit\n")
	if err == nil {
		err = c.await(ctx, "-close")
	}
	return errors.Join(err, c.conn.Close())
}

// await reads until a line holds the mark with this ending.
func (c *Console) await(ctx context.Context, ending string) error {
	for {
		text, err := c.line(ctx)
		if err != nil || strings.Contains(text, c.mark+ending) {
			return err
		}
	}
}

func (c *Console) send(ctx context.Context, text string) error {
	defer c.bound(ctx)()
	_, err := io.WriteString(c.conn, text)
	return cause(ctx, err)
}

func (c *Console) line(ctx context.Context) (string, error) {
	defer c.bound(ctx)()
	text, err := c.in.ReadString('\n')
	if errors.Is(err, io.EOF) && ctx.Err() == nil {
		err = errors.New("the console is gone: the VM has ended")
	}
	return strings.TrimRight(text, "\r\n"), cause(ctx, err)
}

// bound lets reads and writes fail once ctx ends, until the returned function is called.
func (c *Console) bound(ctx context.Context) (release func()) {
	past := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.conn.SetDeadline(time.Unix(1, 0)) // fails on a closed connection only
		close(past)
	})
	return func() {
		if !stop() {
			<-past
			_ = c.conn.SetDeadline(time.Time{})
		}
	}
}

func cause(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}
