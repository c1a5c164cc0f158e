package handoff

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

func sampleMessages() []Message {
	offer := sampleOffer
	offer.Chain, offer.Forwards = fakeChain(1), []Forward{{Guest: 80, Host: 8080}}
	base := Message{Version: Version, Handoff: sampleHandoff, Epoch: 3}
	var out []Message
	for _, k := range kinds {
		m := base
		m.Kind = k
		switch k {
		case KindOffer:
			m.Offer = &offer
		case KindRound, KindPrepare:
			m.Round, m.Chain = 1, fakeChain(1)
		}
		out = append(out, m)
	}
	return out
}

func sampleAnswer() Answer {
	return Answer{Version: Version, Handoff: sampleHandoff, Epoch: 3, State: Running, Lacks: []string{strings.Repeat("a", 64)}, Missing: 5,
		Endpoints: []Endpoint{{80, "192.0.2.1:8080"}}, Reasons: []Reason{{"port", "it is in use", "use another"}}}
}

func TestMessagesRoundTrip(t *testing.T) {
	for _, m := range sampleMessages() {
		data, err := json.Marshal(m)
		require.NoError(t, err)
		got, err := ParseMessage(data)
		require.NoError(t, err)
		require.Equal(t, m, got)
		for n := range data {
			_, err := ParseMessage(data[:n])
			require.ErrorIs(t, err, ErrWire, "%s cut at %d", m.Kind, n)
		}
		_, err = ParseMessage(append(data, "{}"...))
		require.ErrorIs(t, err, ErrWire)
	}
	data, err := json.Marshal(sampleAnswer())
	require.NoError(t, err)
	got, err := ParseAnswer(data)
	require.NoError(t, err)
	require.Equal(t, sampleAnswer(), got)
	for n := range data {
		_, err := ParseAnswer(data[:n])
		require.ErrorIs(t, err, ErrWire)
	}
}

func TestMessagesRefused(t *testing.T) {
	long := strings.Repeat("x", MaxURL)
	many := make([]Overlay, 9)
	for i := range many {
		many[i] = fakeChain(1)[0]
	}
	for _, tc := range []struct {
		name string
		kind int // index in kinds
		f    func(*Message)
	}{
		{"version", 4, func(m *Message) { m.Version++ }},
		{"no handoff", 4, func(m *Message) { m.Handoff = "" }},
		{"long handoff", 4, func(m *Message) { m.Handoff = strings.Repeat("a", 66) }},
		{"handoff is a path", 4, func(m *Message) { m.Handoff = "../../../../etc/pass" }},
		{"no epoch", 4, func(m *Message) { m.Epoch = 0 }},
		{"epoch beyond JSON", 4, func(m *Message) { m.Epoch = 1 << 60 }},
		{"kind", 4, func(m *Message) { m.Kind = "stop" }},
		{"offer without offer", 0, func(m *Message) { m.Offer = nil }},
		{"go with offer", 3, func(m *Message) { o := sampleOffer; m.Offer = &o }},
		{"go with chain", 3, func(m *Message) { m.Chain = fakeChain(1) }},
		{"no chain", 1, func(m *Message) { m.Chain = nil }},
		{"no round", 1, func(m *Message) { m.Round = 0 }},
		{"round", 1, func(m *Message) { m.Round = MaxRounds + 1 }},
		{"deep chain", 2, func(m *Message) { m.Chain = many }},
		{"overlay id", 2, func(m *Message) { m.Chain[0].ID = "12" }},
		{"overlay digest", 2, func(m *Message) { m.Chain[0].Digest = "12" }},
		{"overlay bytes", 2, func(m *Message) { m.Chain[0].Bytes = -1 }},
		{"file URL", 2, func(m *Message) { m.Chain[0].URL = "file:///etc/passwd" }},
		{"URL with user", 2, func(m *Message) { m.Chain[0].URL = "http://me:pw@a/b" }},
		{"long URL", 2, func(m *Message) { m.Chain[0].URL = "http://a/" + long }},
		{"origin", 2, func(m *Message) { m.Chain[0].Origin = "ftp://a/b" }},
		{"base", 0, func(m *Message) { m.Offer.Base = "b" }},
		{"lineage", 0, func(m *Message) { m.Offer.Lineage = "b" }},
		{"machine", 0, func(m *Message) { m.Offer.Machine = nil }},
		{"large machine", 0, func(m *Message) { m.Offer.Machine = []byte(`"` + strings.Repeat("x", MaxMachine) + `"`) }},
		{"memory", 0, func(m *Message) { m.Offer.Memory = 0 }},
		{"disk", 0, func(m *Message) { m.Offer.Disk = -1 }},
		{"port", 0, func(m *Message) { m.Offer.Forwards = []Forward{{Guest: 70000}} }},
		{"forwards", 0, func(m *Message) { m.Offer.Forwards = make([]Forward, MaxForwards+1) }},
		{"name", 0, func(m *Message) { m.Offer.Name = long }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := sampleMessages()[tc.kind]
			require.NoError(t, m.Validate())
			tc.f(&m)
			require.ErrorIs(t, m.Validate(), ErrWire)
		})
	}
	_, err := ParseMessage([]byte(`{"version":1,"handoff":"` + sampleHandoff + `","epoch":1,"kind":"ask","force":true}`))
	require.ErrorIs(t, err, ErrWire)
	require.ErrorContains(t, err, "force")
	_, err = ParseMessage(make([]byte, MaxMessage+1))
	require.ErrorContains(t, err, "limit")
}

// TestCutReasons: whatever a reason holds, it arrives.
func TestCutReasons(t *testing.T) {
	for _, text := range []string{"", "short", strings.Repeat("a", 1020) + "ü" + strings.Repeat("b", 100), "write \xff" + strings.Repeat("\xfc", 500), strings.Repeat("ü", 2000)} {
		a := Answer{Version: Version, Handoff: strings.Repeat("a", 16), Epoch: 1, State: Never, Reasons: []Reason{{Text: cut(text)}}}
		b, err := json.Marshal(a)
		require.NoError(t, err)
		got, err := ParseAnswer(b)
		require.NoError(t, err)
		require.Equal(t, a, got)
		require.True(t, !utf8.ValidString(text) || len(got.Reasons[0].Text) >= min(len(text), MaxText-4))
	}
}

func TestAnswersRefused(t *testing.T) {
	for _, tc := range []struct {
		name string
		f    func(*Answer)
	}{
		{"version", func(a *Answer) { a.Version = 0 }},
		{"state", func(a *Answer) { a.State = "" }},
		{"lacks", func(a *Answer) { a.Lacks = []string{"x"} }},
		{"many lack", func(a *Answer) { a.Lacks = make([]string, 9) }},
		{"missing", func(a *Answer) { a.Missing = -1 }},
		{"endpoint", func(a *Answer) { a.Endpoints[0].Address = "" }},
		{"endpoints", func(a *Answer) { a.Endpoints = make([]Endpoint, MaxForwards+1) }},
		{"reason", func(a *Answer) { a.Reasons[0].Text = "" }},
		{"long reason", func(a *Answer) { a.Reasons[0].Remedy = strings.Repeat("x", MaxText+1) }},
		{"reasons", func(a *Answer) { a.Reasons = make([]Reason, MaxReasons+1) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			a := sampleAnswer()
			tc.f(&a)
			require.ErrorIs(t, a.Validate(), ErrWire)
		})
	}
}

func FuzzParseMessage(f *testing.F) {
	for _, m := range sampleMessages() {
		data, _ := json.Marshal(m)
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := ParseMessage(data)
		if err != nil {
			require.ErrorIs(t, err, ErrWire)
			return
		}
		again, err := json.Marshal(m)
		require.NoError(t, err)
		if len(again) > MaxMessage {
			return
		}
		_, err = ParseMessage(again)
		require.NoError(t, err)
	})
}
