package service

import (
	"context"
	"os"
	"sync"
	"testing"
	"time"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

func TestHistogram(t *testing.T) {
	h := newHistogram([]float64{1, 2})
	for _, v := range []float64{0.5, 1, 1.5, 3} {
		h.observe(v)
	}
	want := Histogram{Buckets: []Bucket{{1, 2}, {2, 3}}, Count: 4, Sum: 6}
	require.Equal(t, want, h)
	var sum Histogram
	sum.add(h)
	sum.add(h)
	require.Equal(t, Histogram{Buckets: []Bucket{{1, 4}, {2, 6}}, Count: 8, Sum: 12}, sum)
	require.Equal(t, want, h, "adding to one does not change the other")
}

// slowFile answers after a while.
type slowFile struct{ after time.Duration }

func (slowFile) Size() int64 { return 1 }

func (f slowFile) ReadAt(context.Context, []byte, int64) (int, error) {
	time.Sleep(f.after) // what is measured
	return 1, nil
}

func TestWaits(t *testing.T) {
	w := newWaits()
	fast, slow := w.file(slowFile{}), w.file(slowFile{30 * time.Millisecond})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 100 {
				_, _ = fast.ReadAt(t.Context(), nil, 0)
			}
			_, _ = slow.ReadAt(t.Context(), nil, 0)
		})
	}
	wg.Wait()
	h := w.histogram()
	require.EqualValues(t, 404, h.Count)
	require.Greater(t, h.Sum, 0.12)
	require.LessOrEqual(t, h.Buckets[7].Count, uint64(400), "of at most 20 ms")
	require.EqualValues(t, 404, h.Buckets[len(h.Buckets)-1].Count)
	for i := 1; i < len(h.Buckets); i++ {
		require.GreaterOrEqual(t, h.Buckets[i].Count, h.Buckets[i-1].Count)
	}
}

// TestCounts: what was counted survives, from several processes at once.
func TestCounts(t *testing.T) {
	s := newService(t)
	b := addBase(t, s, "", 'a')
	addOverlay(t, s, b.ID, "", 'x')
	other := reopen(t, s, nil)
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Go(func() {
			on := s
			if i%2 == 1 {
				on = other
			}
			_, _, err := on.begin(t.Context(), task{kind: api.KindRun, req: api.Run{}, work: func(context.Context, *operation) (any, error) {
				if i == 0 {
					return nil, api.Errorf(api.Invalid, "no")
				}
				return api.Instance{ID: "i", Timeline: []api.Event{{Name: "accepted"}, {Name: eventFirstAnswer, Seconds: 0.25}}}, nil
			}})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	require.NoError(t, s.Close(t.Context()))
	require.NoError(t, other.Close(t.Context()))
	again := reopen(t, s, nil)
	m, err := again.Collect(t.Context())
	require.NoError(t, err)
	require.ElementsMatch(t, []OperationCount{{api.KindRun, api.OperationDone, 9}, {api.KindRun, api.OperationFailed, 1}}, m.Operations)
	require.Empty(t, m.Active)
	require.EqualValues(t, 9, m.FirstResponse.Count)
	require.InDelta(t, 9*0.25, m.FirstResponse.Sum, 1e-9)
	for _, bucket := range m.FirstResponse.Buckets {
		want := uint64(0)
		if bucket.Upper >= 0.25 {
			want = 9
		}
		require.Equal(t, want, bucket.Count, bucket.Upper)
	}
	require.Equal(t, 1, m.Bases)
	require.Equal(t, 1, m.Overlays)
	require.Positive(t, m.StoreBytes)
	require.Positive(t, m.FreeBytes)
	since := m.Since
	m, err = again.Collect(t.Context())
	require.NoError(t, err)
	require.Equal(t, since, m.Since)

	require.NoError(t, os.WriteFile(s.countsPath(), []byte("{"), 0o600))
	m, err = again.Collect(t.Context())
	require.NoError(t, err, "damaged counts begin anew")
	require.Zero(t, m.FirstResponse.Count)
	require.True(t, m.Since.After(since))
}
