package fusefs

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"
)

// killed reports whether thread tid is gone or has a SIGKILL pending. The kernel gives one
// to every thread of a process that ends, whatever the signal was. A thread that cannot be
// seen (0) counts as alive.
func killed(tid uint32) bool {
	if tid == 0 {
		return false
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return true
	}
	return err == nil && killPending(status)
}

// killPending reads the text of /proc/TID/status.
func killPending(status []byte) bool {
	const sigkill = 1 << (uint(syscall.SIGKILL) - 1)
	for line := range bytes.Lines(status) {
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimSpace(value)
		switch string(name) {
		case "State":
			if len(value) > 0 && (value[0] == 'Z' || value[0] == 'X') {
				return true
			}
		case "SigPnd", "ShdPnd":
			if v, err := strconv.ParseUint(string(value), 16, 64); err == nil && v&sigkill != 0 {
				return true
			}
		}
	}
	return false
}
