package table

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// Sum is the checksum of what a client has appended, all of it and its order: the zero value
// is that of nothing.
type Sum [16]byte

// Next returns the checksum after the client's record n.
func (s Sum) Next(client string, n int64) (next Sum) {
	h := sha256.Sum256(fmt.Appendf(s[:], "%s/%d", client, n))
	copy(next[:], h[:])
	return next
}

// String returns the checksum in hexadecimal digits.
func (s Sum) String() string { return hex.EncodeToString(s[:]) }

// ParseSum reads what String has made.
func ParseSum(text string) (s Sum, err error) {
	p, err := hex.DecodeString(text)
	if err == nil && len(p) != len(s) {
		err = fmt.Errorf("%d bytes, want %d", len(p), len(s))
	}
	if err != nil {
		return s, fmt.Errorf("read checksum %q: %w", text, err)
	}
	copy(s[:], p)
	return s, nil
}
