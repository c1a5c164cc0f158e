package figures

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Host is a sentence about the machine that something is measured on, without its end.
func Host() (string, error) {
	text, err := Machine()
	return "Measured on " + text, err
}

// Machine describes this machine and what Go it runs.
func Machine() (string, error) {
	var name unix.Utsname
	var info unix.Sysinfo_t
	if err := errors.Join(unix.Uname(&name), unix.Sysinfo(&info)); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d cores (%s), %.1f GiB, Linux %s, %s", runtime.NumCPU(), processor(),
		float64(info.Totalram)*float64(info.Unit)/(1<<30), unix.ByteSliceToString(name.Release[:]), runtime.Version()), nil
}

// processor returns the name that the kernel gives the processor.
func processor() string {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err == nil {
		if _, rest, ok := strings.Cut(string(b), "model name"); ok {
			line, _, _ := strings.Cut(rest, "\n")
			return strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), ":"))
		}
	}
	return runtime.GOARCH
}
