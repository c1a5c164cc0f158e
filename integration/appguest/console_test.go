package appguest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// console listens on a unix socket with a long path and gives each connection to serve.
func console(t *testing.T, serve func(net.Conn)) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	require.NoError(t, os.Mkdir(dir, 0o755))
	f, err := os.Open(dir)
	require.NoError(t, err)
	defer f.Close()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "unix", fmt.Sprintf("/proc/self/fd/%d/serial.sock", f.Fd()))
	require.NoError(t, err)
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		serve(conn)
	}()
	t.Cleanup(func() {
		require.NoError(t, l.Close())
		<-done
	})
	return filepath.Join(dir, "serial.sock")
}

// shell is a guest whose console is a real shell, though not on a terminal.
func shell(conn net.Conn) {
	cmd := exec.Command("sh")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = conn, conn, conn
	cmd.WaitDelay = time.Second
	_ = cmd.Run() // ends with the connection
}

func TestConsole(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := OpenConsole(ctx, console(t, shell))
	require.NoError(t, err)
	var log bytes.Buffer
	require.NoError(t, c.Run(ctx, "echo a; echo b 1>&2; cat", &log))
	require.Equal(t, "a\nb\n", log.String())
	log.Reset()
	require.NoError(t, c.Run(ctx, "printf 'no newline'", &log))
	require.Equal(t, "no newline\n", log.String())
	err = c.Run(ctx, "for i in 1 2 3 4 5; do echo line$i; done; (exit 7)", &log)
	require.ErrorContains(t, err, "exit code 7: line3; line4; line5")
	require.ErrorContains(t, c.Run(ctx, "a\nb", &log), "not one line")
	require.ErrorContains(t, c.Run(ctx, strings.Repeat("x", 3000), &log), "more than 2000 bytes")
	require.NoError(t, c.Close())

	if c, err = OpenConsole(ctx, console(t, shell)); err != nil {
		t.Fatal(err)
	}
	short, cancelShort := context.WithCancelCause(ctx)
	time.AfterFunc(20*time.Millisecond, func() { cancelShort(errors.New("enough")) })
	require.ErrorIs(t, c.Run(short, "sleep 1", &log), context.Canceled)
	require.NoError(t, c.Close()) // the command is interrupted
}

func TestConsoleGone(t *testing.T) {
	_, err := OpenConsole(t.Context(), console(t, func(c net.Conn) {}))
	require.ErrorContains(t, err, "open console")
	_, err = OpenConsole(t.Context(), filepath.Join(t.TempDir(), "none"))
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestConsoleSilent(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	// It stays until the client has gone: what a guest's end looks like is another test's.
	_, err := OpenConsole(ctx, console(t, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }))
	require.ErrorIs(t, err, context.DeadlineExceeded)
}
