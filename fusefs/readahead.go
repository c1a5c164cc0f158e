package fusefs

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

func readAheadPath(m mountEntry) string { return "/sys/class/bdi/" + m.bdi() + "/read_ahead_kb" }

// setReadAhead sets the kernel's read-ahead of a mount; go-fuse's own option can only lower it.
func setReadAhead(m mountEntry, kib int) error {
	if kib == 0 {
		return nil
	}
	if err := os.WriteFile(readAheadPath(m), []byte(strconv.Itoa(kib)), 0o644); err != nil {
		return fmt.Errorf("set read-ahead to %d KiB: %w", kib, err)
	}
	return nil
}

// readAhead returns the read-ahead in KiB, 0 if it cannot be read.
func readAhead(m mountEntry) int {
	text, err := os.ReadFile(readAheadPath(m))
	if err != nil {
		return 0
	}
	kib, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0
	}
	return kib
}
