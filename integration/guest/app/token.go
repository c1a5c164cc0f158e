package main

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// newToken returns 32 random hexadecimal digits. It never waits for the kernel to gather
// entropy, which can take seconds in a guest without a random number device: what the
// kernel has is mixed with the time of day, so that two boots always differ.
func newToken() (string, error) {
	var seed [40]byte
	if _, err := unix.Getrandom(seed[:32], unix.GRND_INSECURE); err != nil {
		return "", fmt.Errorf("draw a token: %w", err)
	}
	binary.LittleEndian.PutUint64(seed[32:], uint64(time.Now().UnixNano()))
	sum := sha256.Sum256(seed[:])
	return hex.EncodeToString(sum[:16]), nil
}
