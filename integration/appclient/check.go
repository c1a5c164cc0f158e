package appclient

import (
	"fmt"
	"slices"

	"cloudlet/integration/guest/table"
)

// faultsMost is how many faults of a worker are kept.
const faultsMost = 10

// answer is that of /append.
type answer struct {
	Token    string `json:"token"`
	Requests int64  `json:"requests"`
	Client   string `json:"client"`
	Count    int64  `json:"count"`
	Memory   string `json:"memory"`
	File     string `json:"file"`
}

// journal is the answer of /journal.
type journal struct {
	Client string `json:"client"`
	Memory listed `json:"memory"`
	File   listed `json:"file"`
}

type listed struct {
	Records []int64 `json:"records"`
	Sum     string  `json:"sum"`
}

// checker knows what a worker has been told and compares each answer with it.
type checker struct {
	client   string
	last     answer    // zero: none yet
	sum      table.Sum // of what was acknowledged
	sent     bool      // the record after last.Count has been sent
	faults   []string
	overflow int // faults that are not kept
}

func (k *checker) fault(format string, args ...any) {
	if len(k.faults) == faultsMost {
		k.overflow++
		return
	}
	k.faults = append(k.faults, fmt.Sprintf("client %s: ", k.client)+fmt.Sprintf(format, args...))
}

// acknowledged is a right answer to record n: from now on it must be there.
func (k *checker) acknowledged(n int64, a answer) {
	k.sum = k.sum.Next(k.client, n)
	want := k.sum.String()
	if k.last.Token != "" && a.Token != k.last.Token {
		k.fault("record %d was answered by application %s, the one before by %s", n, a.Token, k.last.Token)
	}
	if a.Client != k.client {
		k.fault("record %d was answered as one of client %s", n, a.Client)
	}
	if a.Requests <= k.last.Requests {
		k.fault("with record %d the application has answered %d requests, with the one before %d: it went back", n, a.Requests, k.last.Requests)
	}
	if a.Count != n {
		k.fault("with record %d there are %d records", n, a.Count)
	}
	if a.Memory != want {
		k.fault("with record %d the checksum in memory is %s, want %s", n, a.Memory, want)
	}
	if a.File != want {
		k.fault("with record %d the checksum in the file is %s, want %s", n, a.File, want)
	}
	a.Count = n
	k.last, k.sent = a, false
}

// refused is the answer to record n that the one before is missing.
func (k *checker) refused(n int64, text string) {
	k.fault("record %d was refused, the one before has been acknowledged: %s", n, text)
}

// journal compares all that is there with what was acknowledged. What was sent last may be
// there without an acknowledgement.
func (k *checker) journal(j journal) {
	if j.Client != k.client {
		k.fault("the journal is that of client %s", j.Client)
	}
	for _, l := range []struct {
		where string
		listed
	}{{"memory", j.Memory}, {"the file", j.File}} {
		n := k.last.Count
		want := k.sum
		if k.sent && int64(len(l.Records)) == n+1 {
			n++
			want = want.Next(k.client, n)
		}
		if !slices.Equal(l.Records, upTo(n)) {
			k.fault("%s has %d records, %s; %d were acknowledged", l.where, len(l.Records), oddOf(l.Records), n)
		} else if l.Sum != want.String() {
			k.fault("the checksum in %s is %s, want %s", l.where, l.Sum, want)
		}
	}
	if !slices.Equal(j.Memory.Records, j.File.Records) || j.Memory.Sum != j.File.Sum {
		k.fault("memory has %d records with checksum %s, the file %d with %s", len(j.Memory.Records), j.Memory.Sum, len(j.File.Records), j.File.Sum)
	}
}

func upTo(n int64) []int64 {
	list := make([]int64, n)
	for i := range list {
		list[i] = int64(i + 1)
	}
	return list
}

// oddOf says where a list is not 1, 2, 3 and so on.
func oddOf(list []int64) string {
	for i, n := range list {
		if n != int64(i+1) {
			return fmt.Sprintf("the %dth is %d", i+1, n)
		}
	}
	return "in order"
}
