package overlay

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestProfileRoundTrip(t *testing.T) {
	d := MakeAddr(Disk, 3)
	for name, p := range map[string][]Addr{"empty": {}, "one": {7}, "both": {9, d, 0, 15}} {
		t.Run(name, func(t *testing.T) {
			have, err := ParseProfile(MarshalProfile(p), 16*PageSize, 4*PageSize)
			require.NoError(t, err)
			require.Equal(t, p, have)
		})
	}
	for name, b := range map[string][]byte{
		"odd length": {1, 2, 3}, "memory end": MarshalProfile([]Addr{16}), "disk end": MarshalProfile([]Addr{MakeAddr(Disk, 4)}),
		"twice": MarshalProfile([]Addr{d, 4, d}), "too long": make([]byte, maxProfile+4),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseProfile(b, 16*PageSize, 4*PageSize)
			require.ErrorIs(t, err, ErrFormat)
		})
	}
}

func TestMergeProfiles(t *testing.T) {
	require.Empty(t, MergeProfiles())
	require.Equal(t, []Addr{1, 5, 2, 3, 4}, MergeProfiles([]Addr{1, 2, 3}, []Addr{5, 1, 3, 4}))
	require.Equal(t, []Addr{1, 2}, MergeProfiles(nil, []Addr{1, 2}))
}
