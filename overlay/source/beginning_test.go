package source_test

import (
	"encoding/json"
	"testing"

	"cloudlet/overlay/source"

	"github.com/stretchr/testify/require"
)

// TestBeginning: what one process has read from the start of a file another one need not ask
// for; a file that was changed meanwhile is noticed.
func TestBeginning(t *testing.T) {
	s := newBadServer(t, nil)
	o := patient
	o.Keep = true
	first := openBad(t, s, o)
	for _, r := range [][2]int{{0, 1000}, {65000, 100000}, {150000, 200000}, {250000, 260000}} { // the last leaves a gap
		_, err := first.ReadAt(t.Context(), make([]byte, r[1]-r[0]), int64(r[0]))
		require.NoError(t, err)
	}
	text, err := json.Marshal(first.Beginning())
	require.NoError(t, err)
	var b source.Beginning
	require.NoError(t, json.Unmarshal(text, &b))
	require.Equal(t, badData[:100000], b.Head)

	require.Less(t, len(first.Beginning().Head), 100000, "it is not kept longer")
	p := make([]byte, 30000)
	s.set(`"v1"`, raw("bytes 70000-99999/320000", 30000))
	_, err = first.ReadAt(t.Context(), p, 70000)
	require.NoError(t, err)
	require.NotEqual(t, badData[70000:100000], p)
	s.set(`"v1"`, nil)
	_, err = first.ReadAt(t.Context(), p, 70000)
	require.NoError(t, err)
	require.Equal(t, badData[70000:100000], p, "what was damaged on its way is asked for again")

	o = patient
	o.Beginning = &b
	before := s.requests.Load()
	again := openBad(t, s, o)
	require.EqualValues(t, len(badData), again.Size())
	p = make([]byte, len(b.Head))
	_, err = again.ReadAt(t.Context(), p, 0)
	require.NoError(t, err)
	require.Equal(t, b.Head, p)
	require.Equal(t, before, s.requests.Load(), "nothing is asked for")
	p = make([]byte, 50000)
	_, err = again.ReadAt(t.Context(), p, 90000)
	require.NoError(t, err)
	require.Equal(t, badData[90000:140000], p)
	require.Equal(t, before+1, s.requests.Load())
	require.Equal(t, first.ETag(), again.ETag())

	s.set(`"v2"`, nil)
	_, err = openBad(t, s, o).ReadAt(t.Context(), p, 100000)
	require.ErrorIs(t, err, source.ErrChanged)
	for _, bad := range []source.Beginning{{}, {Size: 10, ETag: `"v1"`, Head: make([]byte, 11)}, {Size: -1, Head: []byte{1}}} {
		o.Beginning = &bad
		_, err = source.OpenHTTP(t.Context(), s.URL, o)
		require.ErrorContains(t, err, "beginning")
	}
}
