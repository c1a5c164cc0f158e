package source

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
)

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-9/10", "BYTES 5-5/6", "bytes 0-9/*", "bytes */10", "bytes 0-18446744073709551615/10", "bytes -1-2/3", "", "bytes +1-2/3"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		first, last, size, err := parseContentRange(s)
		if err != nil {
			return
		}
		require.True(t, 0 <= first && first <= last && last < size)
		a, b, c, err := parseContentRange(fmt.Sprintf("bytes %d-%d/%d", first, last, size))
		require.NoError(t, err)
		require.Equal(t, [3]int64{first, last, size}, [3]int64{a, b, c})
	})
}
