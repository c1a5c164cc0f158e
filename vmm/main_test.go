package vmm

import (
	"context"
	"os"
	"testing"

	"go.uber.org/goleak"
)

// TestMain lets the test binary stand in for the program's launcher command, as the tests
// of the launcher and of real VMs need one, and for a process that takes rounds and is killed.
func TestMain(m *testing.M) {
	if len(os.Args) == 3 && os.Args[1] == "launcher" {
		os.Exit(RunLauncher(context.Background(), os.Args[2]))
	}
	if IsEmulator(os.Args[0]) {
		os.Exit(RunEmulator(os.Args))
	}
	if len(os.Args) == 5 && os.Args[1] == "rounds" {
		os.Exit(roundsProcess(os.Args[2], os.Args[3], os.Args[4]))
	}
	if len(os.Args) > 2 && os.Args[1] == "filtered" {
		os.Exit(filteredProcess(os.Args[2], os.Args[3:]))
	}
	// With -race every launcher would linger for a second at its exit.
	if err := os.Setenv("GORACE", "atexit_sleep_ms=0"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(mainThen{m})
}

// mainThen closes what the tests share before leaks are looked for.
type mainThen struct{ *testing.M }

func (m mainThen) Run() int {
	code := m.M.Run()
	if err := embedded.close(); err != nil {
		panic(err)
	}
	return code
}

// testQEMU returns a QEMU whose launcher is the test binary.
func testQEMU(t *testing.T, binary string) *QEMU {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return &QEMU{Binary: binary, Launcher: []string{exe, "launcher"}}
}
