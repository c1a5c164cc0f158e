package table

import (
	"bytes"
	"compress/flate"
	"crypto/sha256"
	"encoding/hex"
	"testing"

	"github.com/stretchr/testify/require"
)

// The value was computed by another implementation, in Python. The stream is part of what
// captured guests hold: it must not change.
func TestFillIsFixed(t *testing.T) {
	p := make([]byte, 20)
	Fill(p, "name")
	require.Equal(t, "0dacde32033ffd0d438c5c5bc45bf5192b1d19b0", hex.EncodeToString(p))
}

func TestFillPrefix(t *testing.T) {
	long := make([]byte, 64)
	Fill(long, "name")
	for n := range len(long) {
		p := make([]byte, n)
		Fill(p, "name")
		require.Equal(t, long[:n], p, "length %d", n)
	}
}

func TestWindows(t *testing.T) {
	seen := map[string]bool{}
	for _, token := range []string{"a", "b"} {
		for n := range Windows {
			p := make([]byte, 32)
			FillTable(p, token, n)
			seen[string(p)] = true
		}
	}
	require.Len(t, seen, 2*Windows, "every window differs")
	sum := sha256.Sum256(Window("a", 3))
	require.Equal(t, hex.EncodeToString(sum[:]), WindowHash("a", 3))
}

func TestWholeIsWindows(t *testing.T) {
	h := sha256.New()
	for n := range Windows {
		h.Write(Window("a", n))
	}
	require.Equal(t, hex.EncodeToString(h.Sum(nil)), Hash("a"))

	var file bytes.Buffer
	require.NoError(t, WriteFile(&file, "a"))
	require.Equal(t, FileSize, file.Len())
	sum := sha256.Sum256(file.Bytes())
	require.Equal(t, hex.EncodeToString(sum[:]), FileHash("a"))
	require.NotEqual(t, FileHash("a"), FileHash("b"))

	var extra bytes.Buffer
	require.NoError(t, WriteExtra(&extra, "s", 3))
	require.Equal(t, 3<<20, extra.Len())
	sum = sha256.Sum256(extra.Bytes())
	require.Equal(t, hex.EncodeToString(sum[:]), ExtraHash("s", 3))
}

func TestIncompressible(t *testing.T) {
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, flate.BestCompression)
	require.NoError(t, err)
	_, err = w.Write(Window("a", 0))
	require.NoError(t, err)
	require.NoError(t, w.Close())
	require.Greater(t, b.Len(), WindowSize*99/100)
}
