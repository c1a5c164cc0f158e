// Package need says what a test cannot do without on a machine that lacks it.
package need

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"testing"
)

// Skip skips a test for a reason that was probed, where CLOUDLET_NO_SKIP is unset, empty or 0.
// Elsewhere it fails the test: one that did not run is no test that passed.
func Skip(t testing.TB, reason any) {
	t.Helper()
	if v := os.Getenv("CLOUDLET_NO_SKIP"); v != "" && v != "0" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

// No skips a test where err is of one of the kinds that tell what this machine lacks; any other
// error fails the test.
func No(t testing.TB, err, kind error, more ...error) {
	t.Helper()
	if err == nil {
		return
	}
	kinds := append(more, kind)
	if !slices.ContainsFunc(kinds, func(k error) bool { return errors.Is(err, k) }) {
		t.Fatal(err)
	}
	Skip(t, err)
}

// Program returns the path of a program, without which the test is skipped.
func Program(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	No(t, err, exec.ErrNotFound, fs.ErrNotExist)
	return path
}

// Root skips a test that does what only root can.
func Root(t testing.TB, what string) {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "only root can "+what)
	}
}
