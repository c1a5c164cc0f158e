// Package need says what a test cannot do without on a machine that lacks it.
package need

import (
	"os"
	"os/exec"
	"testing"
)

// Skip skips a test for a reason that was probed, or fails it where CLOUDLET_NO_SKIP is 1:
// there a test that did not run is no test that passed.
func Skip(t testing.TB, reason any) {
	t.Helper()
	if os.Getenv("CLOUDLET_NO_SKIP") == "1" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

// No skips a test unless err is nil.
func No(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		Skip(t, err)
	}
}

// Program returns the path of a program, without which the test is skipped.
func Program(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	No(t, err)
	return path
}

// Root skips a test that does what only root can.
func Root(t testing.TB, what string) {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "only root can "+what)
	}
}
