package appguest

import (
	"crypto/sha256"
	"crypto/sha3"
	"encoding/hex"
	"fmt"
	"io"
)

// Sizes of what the application holds: bytes of a window, windows of its table in memory
// and of its file on disk, keys in redis.
const (
	WindowSize  = 1 << 20
	Windows     = 16
	FileWindows = 8
	Keys        = 5000
)

// Answer is what GET /?window=N returns.
type Answer struct {
	Token   string `json:"token"`   // drawn when the application started
	Counter int    `json:"counter"` // answers since then, kept in redis
	Window  int    `json:"window"`
	SHA256  string `json:"sha256"` // WindowHash(Token, Window)
}

// Check returns an error unless the answer is right for the window, and for token unless
// that is empty.
func (a Answer) Check(token string, window int) error {
	switch {
	case token != "" && a.Token != token:
		return fmt.Errorf("check answer: token %q is of another launch, want %q", a.Token, token)
	case a.Window != window:
		return fmt.Errorf("check answer: window %d, asked for %d", a.Window, window)
	case a.SHA256 != WindowHash(a.Token, window):
		return fmt.Errorf("check answer: window %d has the hash %q, want %s", window, a.SHA256, WindowHash(a.Token, window))
	}
	return nil
}

// Verification is what GET /verify returns.
type Verification struct {
	Token   string `json:"token"`
	Counter int    `json:"counter"`
	Table   string `json:"table"` // TableHash(Token)
	Keys    string `json:"keys"`  // KeysHash()
	File    string `json:"file"`  // FileHash(Token)
}

// Check returns an error that names the first part which is not as it must be.
func (v Verification) Check(token string) error {
	if v.Token != token {
		return fmt.Errorf("verify guest: token %q is of another launch, want %q", v.Token, token)
	}
	for _, part := range [][3]string{{"table", v.Table, TableHash(token)}, {"keys", v.Keys, KeysHash()}, {"file", v.File, FileHash(token)}} {
		if part[1] != part[2] {
			return fmt.Errorf("verify guest: %s has the hash %q, want %s", part[0], part[1], part[2])
		}
	}
	return nil
}

// WindowHash returns the hexadecimal SHA-256 of window n of token's table, 0 <= n < Windows.
func WindowHash(token string, n int) string {
	sum := sha256.Sum256(stream(fmt.Sprintf("%s/table/%d", token, n), WindowSize))
	return hex.EncodeToString(sum[:])
}

// TableHash returns the hexadecimal SHA-256 of token's whole table.
func TableHash(token string) string { return hashOf(token+"/table", Windows) }

// FileHash returns the hexadecimal SHA-256 of token's file.
func FileHash(token string) string { return hashOf(token+"/file", FileWindows) }

// KeysHash returns the hexadecimal SHA-256 of the keys that Customise loads into redis.
func KeysHash() string {
	h := sha256.New()
	for i := range Keys {
		name, value := item(i)
		fmt.Fprintf(h, "%s %s\n", name, value)
	}
	return hex.EncodeToString(h.Sum(nil))
}

func hashOf(name string, windows int) string {
	h := sha256.New()
	for n := range windows {
		h.Write(stream(fmt.Sprintf("%s/%d", name, n), WindowSize))
	}
	return hex.EncodeToString(h.Sum(nil))
}

func stream(name string, size int) []byte { return sha3.SumSHAKE256([]byte(name), size) }

// item is key i in redis.
func item(i int) (name, value string) {
	name = fmt.Sprintf("item:%05d", i)
	return name, hex.EncodeToString(stream(name, 100))
}

// writeItems writes all keys in redis's protocol.
func writeItems(w io.Writer) error {
	for i := range Keys {
		name, value := item(i)
		if _, err := fmt.Fprintf(w, "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n", len(name), name, len(value), value); err != nil {
			return err
		}
	}
	return nil
}
