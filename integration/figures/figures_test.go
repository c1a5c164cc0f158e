package figures

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestMedian(t *testing.T) {
	v := []float64{3, 1, 2}
	require.Equal(t, 2.0, Median(v))
	require.Equal(t, []float64{3, 1, 2}, v)
	require.Equal(t, 2.5, Median([]float64{4, 1, 2, 3}))
}

func TestTarget(t *testing.T) {
	most := Target{What: "first answer", Bound: 0.5, Value: 0.5, Unit: "s", Decimals: 2}
	require.True(t, most.Met())
	require.Contains(t, most.String(), "target at most 0.50, measured 0.50 s: pass")
	most.Value = 0.51
	require.Contains(t, most.String(), ": MISS")
	least := Target{Bound: 8, Value: 7, Least: true}
	require.Contains(t, least.String(), "target at least 8, measured 7 : MISS")
	least.Value = 8
	require.True(t, least.Met())
	for _, least := range []bool{false, true} {
		require.False(t, Target{Value: math.NaN(), Least: least}.Met(), "what could not be measured is a miss")
	}
}
