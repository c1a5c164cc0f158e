package product

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Run runs a program that was made with exec.CommandContext(ctx, ...) and returns what it
// printed. The error holds the end of stderr, and the remedy; after a cancellation it is
// the context's.
func Run(ctx context.Context, cmd *exec.Cmd, remedy string) (string, error) {
	if cmd.Err != nil && !strings.Contains(cmd.Args[0], "/") { // a user's PATH often lacks the folders of system programs
		for _, dir := range []string{"/usr/sbin", "/sbin"} {
			if path, err := exec.LookPath(filepath.Join(dir, cmd.Args[0])); err == nil {
				cmd.Path, cmd.Err = path, nil
				break
			}
		}
	}
	var stdout, stderr bytes.Buffer
	if cmd.Stdout == nil {
		cmd.Stdout = &stdout
	}
	cmd.Stderr = &stderr
	cmd.Env = append(cmd.Environ(), "LC_ALL=C")
	// The program dies with us, even if we are killed: the signal comes when the thread ends
	// that has started it, so this one must stay.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil { // the program was killed: it did not fail
			return "", fmt.Errorf("run %s: %w", filepath.Base(cmd.Args[0]), ctx.Err())
		}
		text := strings.TrimSpace(stderr.String())
		if len(text) > 800 {
			text = "..." + text[len(text)-800:]
		}
		if text != "" {
			text = ": " + text
		}
		return "", fmt.Errorf("run %s: %w%s (remedy: %s)", filepath.Base(cmd.Args[0]), err, text, remedy)
	}
	return stdout.String(), nil
}
