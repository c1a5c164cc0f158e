package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"

	"cloudlet/integration/figures"
)

// firstResponse are the first responses of a guest over a link, by its touch profile, where a
// strategy has packed its overlay: measured by benchlazy, in a real VM.
type firstResponse struct {
	Link     string    `json:"link"`
	Strategy string    `json:"strategy"`
	Seconds  []float64 `json:"first_response_s,omitempty"`
	Bytes    []int64   `json:"bytes_before,omitempty"`     // came over the link until then; without a link, were read of the overlay
	GivenUp  float64   `json:"given_up_after_s,omitempty"` // the last attempt, which took longer; 0: none did
}

// responses are the first responses of a guest, and where they were measured.
type responses struct {
	Host string          `json:"host"`
	List []firstResponse `json:"list"`
}

// lazyResults are what is wanted of the results of benchlazy -strategies.
type lazyResults struct {
	path       string
	Host       string   `json:"host"`
	Overlay    string   `json:"overlay"`
	Strategies []string `json:"strategies"`
	Bound      float64  `json:"given_up_after_s"`
	Cells      []struct {
		Text    string `json:"link_text"`
		Way     string `json:"way"`
		GivenUp bool   `json:"given_up"`
		Samples []struct {
			Seconds float64 `json:"first_response_s"`
			Bytes   int64   `json:"bytes_before"`
		} `json:"samples"`
	} `json:"cells"`
}

// readLazy reads them; nil where there is no path.
func readLazy(path string) (*lazyResults, error) {
	if path == "" {
		return nil, nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	l := &lazyResults{path: path}
	if err := json.Unmarshal(b, l); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if l.Overlay == "" || len(l.responses().List) == 0 {
		return nil, fmt.Errorf("read %s: it has no first responses of a named overlay by strategies: make it with benchlazy -strategies", path)
	}
	return l, nil
}

func (l *lazyResults) responses() *responses {
	r := &responses{Host: l.Host}
	for _, c := range l.Cells {
		if !slices.Contains(l.Strategies, c.Way) {
			continue
		}
		f := firstResponse{Link: c.Text, Strategy: c.Way}
		for _, s := range c.Samples {
			f.Seconds, f.Bytes = append(f.Seconds, s.Seconds), append(f.Bytes, s.Bytes)
		}
		if c.GivenUp {
			f.GivenUp = l.Bound
		}
		r.List = append(r.List, f)
	}
	return r
}

// give gives the first responses to the guest if its overlay is the one that was measured.
func (l *lazyResults) give(g *guestResult) bool {
	if l == nil || g.ID.String() != l.Overlay {
		return false
	}
	g.Responses = l.responses()
	return true
}

// columns are the link, the strategy, the seconds, and the MiB that came until then.
func (f *firstResponse) columns() []any {
	var times []string
	bytes := make([]float64, len(f.Bytes))
	for i, n := range f.Bytes {
		bytes[i] = figures.MiB(n)
	}
	came := "-"
	if len(f.Seconds) > 0 {
		times, came = append(times, newSpread(f.Seconds).format(2)), newSpread(bytes).format(1)
	}
	if f.GivenUp > 0 {
		times = append(times, fmt.Sprintf("> %.0f", f.GivenUp))
	}
	return []any{f.Link, f.Strategy, strings.Join(times, ", once "), came}
}

func (g *guestResult) printResponses(out io.Writer) {
	if g.Responses == nil {
		return
	}
	fmt.Fprintln(out)
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "first response over\tpacked by\ts\tMiB until then")
	for i := range g.Responses.List {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", g.Responses.List[i].columns()...)
	}
	t.Flush()
}

func (g *guestResult) documentResponses(out io.Writer) {
	if g.Responses == nil {
		return
	}
	fmt.Fprint(out, "\nWhat large frames cost a guest that waits: the first response by the touch profile, in a real VM\n"+
		"whose overlay comes over a link, measured by `benchlazy -strategies`:\n\n"+
		"| link | packed by | first response, s | MiB until then |\n|---|---|--:|--:|\n")
	for i := range g.Responses.List {
		fmt.Fprintf(out, "| %s | %s | %s | %s |\n", g.Responses.List[i].columns()...)
	}
	fmt.Fprintf(out, "\n%s.\n", g.Responses.Host)
}
