package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"text/tabwriter"

	"cloudlet/integration/figures"
)

// firstResponse are the first responses of a guest over a link, by its touch profile, where a
// strategy has packed its overlay: measured by benchlazy, in a real VM.
type firstResponse struct {
	Link     string    `json:"link"`
	Strategy string    `json:"strategy"`
	Seconds  []float64 `json:"first_response_s"`
	Bytes    []int64   `json:"bytes_before"` // came over the link until then
}

// lazyResults are what is wanted of the results of benchlazy -strategies.
type lazyResults struct {
	path       string
	Overlay    string   `json:"overlay"`
	Strategies []string `json:"strategies"`
	Cells      []struct {
		Text    string `json:"link_text"`
		Way     string `json:"way"`
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
	if len(l.responses()) == 0 {
		return nil, fmt.Errorf("read %s: it has no first response by a strategy: make it with benchlazy -strategies", path)
	}
	return l, nil
}

func (l *lazyResults) responses() (list []firstResponse) {
	for _, c := range l.Cells {
		if !slices.Contains(l.Strategies, c.Way) || len(c.Samples) == 0 {
			continue
		}
		f := firstResponse{Link: c.Text, Strategy: c.Way}
		for _, s := range c.Samples {
			f.Seconds, f.Bytes = append(f.Seconds, s.Seconds), append(f.Bytes, s.Bytes)
		}
		list = append(list, f)
	}
	return list
}

// addResponses adds the first responses to the guest whose overlay was measured.
func (r *results) addResponses(l *lazyResults) error {
	i := slices.IndexFunc(r.Guests, func(g *guestResult) bool { return g.ID.String() == l.Overlay })
	if i < 0 {
		return fmt.Errorf("read %s: it measured overlay %.12s, which is none of the guests'", l.path, l.Overlay)
	}
	r.Guests[i].Responses = l.responses()
	return nil
}

// columns are the link, the strategy, the seconds, and the MiB that came until then.
func (f *firstResponse) columns() []any {
	bytes := make([]float64, len(f.Bytes))
	for i, n := range f.Bytes {
		bytes[i] = figures.MiB(n)
	}
	return []any{f.Link, f.Strategy, newSpread(f.Seconds).format(2), newSpread(bytes).format(1)}
}

func (g *guestResult) printResponses(out io.Writer) {
	if len(g.Responses) == 0 {
		return
	}
	fmt.Fprintln(out)
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "first response over\tpacked by\ts\tMiB until then")
	for i := range g.Responses {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", g.Responses[i].columns()...)
	}
	t.Flush()
}

func (g *guestResult) documentResponses(out io.Writer) {
	if len(g.Responses) == 0 {
		return
	}
	fmt.Fprint(out, "\n| first response by the touch profile, over | packed by | s | MiB until then |\n|---|---|--:|--:|\n")
	for i := range g.Responses {
		fmt.Fprintf(out, "| %s | %s | %s | %s |\n", g.Responses[i].columns()...)
	}
}
