package table

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
)

// Sizes of the guest's contents in bytes, and in windows.
const (
	WindowSize  = 1 << 20
	Windows     = 64
	Size        = Windows * WindowSize
	FileWindows = 8
	FileSize    = FileWindows * WindowSize
)

// FillTable makes p, of at most WindowSize bytes, window n of token's memory table.
func FillTable(p []byte, token string, n int) { Fill(p, fmt.Sprintf("%s/table/%d", token, n)) }

// FillFile makes p, of at most WindowSize bytes, window n of token's state file.
func FillFile(p []byte, token string, n int) { Fill(p, fmt.Sprintf("%s/file/%d", token, n)) }

// FillExtra makes p, of at most WindowSize bytes, window n of the file written for seed.
// It does not depend on a token: two guests write the same bytes for one seed.
func FillExtra(p []byte, seed string, n int) { Fill(p, fmt.Sprintf("extra/%s/%d", seed, n)) }

// Fill makes p the first len(p) bytes of the stream called name.
func Fill(p []byte, name string) {
	sum := sha256.Sum256([]byte(name))
	stream(p, binary.LittleEndian.Uint64(sum[:]))
}

const gamma = 0x9e3779b97f4a7c15

// stream makes p the first len(p) bytes of the SplitMix64 stream after state.
func stream(p []byte, state uint64) {
	next := func() uint64 {
		state += gamma
		return mix(state)
	}
	for len(p) >= 8 {
		binary.LittleEndian.PutUint64(p, next())
		p = p[8:]
	}
	if len(p) > 0 {
		var tail [8]byte
		binary.LittleEndian.PutUint64(tail[:], next())
		copy(p, tail[:])
	}
}

func mix(z uint64) uint64 {
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// Window returns window n of token's memory table, 0 <= n < Windows.
func Window(token string, n int) []byte {
	p := make([]byte, WindowSize)
	FillTable(p, token, n)
	return p
}

// WindowHash returns the hexadecimal SHA-256 of Window(token, n), as the guest answers it.
func WindowHash(token string, n int) string {
	sum := sha256.Sum256(Window(token, n))
	return hex.EncodeToString(sum[:])
}

// Hash returns the hexadecimal SHA-256 of token's whole memory table.
func Hash(token string) string {
	return hashOf(Windows, func(p []byte, n int) { FillTable(p, token, n) })
}

// FileHash returns the hexadecimal SHA-256 of token's whole state file.
func FileHash(token string) string {
	return hashOf(FileWindows, func(p []byte, n int) { FillFile(p, token, n) })
}

// ExtraHash returns the hexadecimal SHA-256 of the file of mib MiB written for seed.
func ExtraHash(seed string, mib int) string {
	return hashOf(mib, func(p []byte, n int) { FillExtra(p, seed, n) })
}

func hashOf(windows int, fill func(p []byte, n int)) string {
	h := sha256.New()
	_ = writeTo(h, windows, fill) // a hash.Hash never returns an error
	return hex.EncodeToString(h.Sum(nil))
}

// WriteExtra writes the file of mib MiB for seed to w, one window at a time.
func WriteExtra(w io.Writer, seed string, mib int) error {
	return writeTo(w, mib, func(p []byte, n int) { FillExtra(p, seed, n) })
}

// WriteFile writes token's state file to w, one window at a time.
func WriteFile(w io.Writer, token string) error {
	return writeTo(w, FileWindows, func(p []byte, n int) { FillFile(p, token, n) })
}

func writeTo(w io.Writer, windows int, fill func(p []byte, n int)) error {
	p := make([]byte, WindowSize)
	for n := range windows {
		fill(p, n)
		if _, err := w.Write(p); err != nil {
			return fmt.Errorf("write window %d: %w", n, err)
		}
	}
	return nil
}
