package table

import (
	"bytes"
	"compress/flate"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCargo(t *testing.T) {
	c := NewCargo("a", 2)
	p := make([]byte, c.Size())
	c.Fill(p)
	require.Equal(t, c.Sum(0), WordSum(p))
	require.NotEqual(t, NewCargo("b", 2).Sum(0), c.Sum(0))

	before := bytes.Clone(p)
	touched := map[int]bool{}
	for step := int64(1); step <= 300; step++ {
		c.Step(p, step)
		touched[int(c.at(step))] = true
	}
	require.Equal(t, c.Sum(300), WordSum(p))
	require.NotEqual(t, c.Sum(299), c.Sum(300))
	for b := range len(p) / BlockSize {
		same := bytes.Equal(before[b*BlockSize:][:BlockSize], p[b*BlockSize:][:BlockSize])
		require.Equal(t, touched[b], !same, "block %d", b)
	}
	require.Greater(t, len(touched), 200, "steps are all over it")

	// The last step of a block counts: the order matters, and so does each byte.
	p[len(p)-1] ^= 1
	require.NotEqual(t, c.Sum(300), WordSum(p))
}

// TestCargoCompresses: half of it is text, half is not.
func TestCargoCompresses(t *testing.T) {
	c := NewCargo("a", 4)
	p := make([]byte, c.Size())
	c.Fill(p)
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, flate.BestSpeed)
	require.NoError(t, err)
	_, err = w.Write(p)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	require.InDelta(t, 0.5+0.5*0.35, float64(b.Len())/float64(len(p)), 0.1)
}

func TestSum(t *testing.T) {
	var s Sum
	one := s.Next("a", 1)
	require.NotEqual(t, one, s.Next("a", 2))
	require.NotEqual(t, one, s.Next("b", 1))
	require.NotEqual(t, one.Next("a", 2), s.Next("a", 2))
	back, err := ParseSum(one.String())
	require.NoError(t, err)
	require.Equal(t, one, back)
	for _, bad := range []string{"", "0", "zz", one.String() + "00"} {
		_, err := ParseSum(bad)
		require.ErrorContains(t, err, "checksum")
	}
}
