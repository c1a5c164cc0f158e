package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"cloudlet/integration/guest/table"
)

// appended and kept hold the fields of the answers of /append and /journal.
type appended struct {
	Requests, Count int64
	Memory, File    string
}

type kept struct{ Memory, File listed }

func decode[T any](t *testing.T, s *server, method, target string) (v T) {
	t.Helper()
	require.NoError(t, json.Unmarshal(send(t, s, method, target, 200).Body.Bytes(), &v))
	return v
}

func TestJournal(t *testing.T) {
	dir := t.TempDir()
	s, err := newServer(dir)
	require.NoError(t, err)
	var sum table.Sum
	requests := int64(0)
	for n := int64(1); n <= 20; n++ {
		sum = sum.Next("a", n)
		for range 1 + n%2 { // a repetition changes nothing
			a := decode[appended](t, s, "POST", fmt.Sprintf("/append?client=a&n=%d", n))
			requests++
			require.Equal(t, appended{requests, n, sum.String(), sum.String()}, a)
		}
	}
	a := decode[appended](t, s, "POST", "/append?client=a&n=7")
	require.EqualValues(t, 20, a.Count, "an early repetition, too")
	_, body := call(t, s, "POST", "/append?client=a&n=22", 409)
	require.Contains(t, body, "there are 20")
	decode[appended](t, s, "POST", "/append?client=b&n=1")

	k := decode[kept](t, s, "GET", "/journal?client=a")
	require.Len(t, k.Memory.Records, 20)
	require.EqualValues(t, 20, k.Memory.Records[19])
	require.Equal(t, sum.String(), k.Memory.Sum)
	require.Equal(t, k.Memory, k.File)

	// Another start finds what was acknowledged; half a record at the end was not.
	name := filepath.Join(dir, "journal-a.log")
	f, err := os.OpenFile(name, os.O_APPEND|os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = f.WriteString("000000000000021 ab")
	require.NoError(t, err)
	require.NoError(t, f.Close())
	s, err = newServer(dir)
	require.NoError(t, err)
	require.Equal(t, k, decode[kept](t, s, "GET", "/journal?client=a"))
	sum = sum.Next("a", 21)
	require.Equal(t, appended{1, 21, sum.String(), sum.String()}, decode[appended](t, s, "POST", "/append?client=a&n=21"))

	// What is answered is what is there.
	require.NoError(t, os.Truncate(name, 5*recordSize))
	k = decode[kept](t, s, "GET", "/journal?client=a")
	require.Len(t, k.Memory.Records, 21)
	require.Len(t, k.File.Records, 5)
	whole, err := os.ReadFile(name)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(name, bytes.Replace(whole, []byte("3 "), []byte("4 "), 1), 0))
	_, body = call(t, s, "GET", "/journal?client=a", 500)
	require.Contains(t, body, "the file's record 3 of client a")
	s.journals.open["a"].records[2].n = 9
	_, body = call(t, s, "GET", "/journal?client=a", 500)
	require.Contains(t, body, "the memory's record 3 of client a")
}

func TestCargo(t *testing.T) {
	s, err := newServer(t.TempDir())
	require.NoError(t, err)
	type verified struct{ Cargo *cargoState }
	held := func() *cargoState {
		return decode[verified](t, s, "GET", "/verify").Cargo
	}
	require.Nil(t, held())
	require.Equal(t, cargoState{Seed: "one", MiB: 2}, decode[cargoState](t, s, "POST", "/fill?mib=2&seed=one"))
	require.Equal(t, &cargoState{Seed: "one", MiB: 2, Sum: table.NewCargo("one", 2).Sum(0)}, held())

	call(t, s, "POST", "/churn?kib_per_s=8192", 200)
	require.Eventually(t, func() bool { return s.cargo.state(false).Steps > 100 }, waitBound, waitTick)
	now := held() // while it goes on
	require.Equal(t, table.NewCargo("one", 2).Sum(now.Steps), now.Sum)
	call(t, s, "POST", "/churn?kib_per_s=4096", 200)
	call(t, s, "POST", "/fill?mib=3&seed=two", 200)
	call(t, s, "POST", "/churn?kib_per_s=0", 200)
	now = held()
	require.Equal(t, "two", now.Seed)
	require.Equal(t, table.NewCargo("two", 3).Sum(now.Steps), now.Sum)
	require.Equal(t, now, held(), "it rests")
	s.cargo.p[12345] ^= 1
	require.NotEqual(t, now, held())

	free, err := freeMiB()
	require.NoError(t, err)
	if free < maxCargoMiB {
		_, body := call(t, s, "POST", fmt.Sprintf("/fill?mib=%d&seed=a", maxCargoMiB), 400)
		require.Contains(t, body, "give the guest more")
	}
}
