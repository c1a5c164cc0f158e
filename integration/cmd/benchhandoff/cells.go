package main

import (
	"fmt"
	"slices"
	"strings"

	"cloudlet/integration/cloudlets"
)

// Names of links and conditions that the targets speak of.
const (
	fast  = "1g"
	slow  = "38m"
	idle  = "idle"
	churn = "churn"
)

// churnKiB is what the application rewrites a second, in KiB, where a cell says churn.
const churnKiB = 1024

// condition is that of the guest in a cell.
type condition struct {
	Fill  int    `json:"residue_mib"`     // of application data, written just before
	Churn int    `json:"churn_kib_per_s"` // of it that the application rewrites
	Link  string `json:"link"`
}

// name names the cell.
func (c condition) name() string {
	does := idle
	if c.Churn > 0 {
		does = churn
	}
	return fmt.Sprintf("%d-%s-%s", c.Fill, does, c.Link)
}

func (c condition) text() string {
	does := "idle"
	if c.Churn > 0 {
		does = fmt.Sprintf("%d KiB/s", c.Churn)
	}
	n, err := cloudlets.FindNetwork(c.Link)
	if err != nil {
		return c.name()
	}
	return fmt.Sprintf("%d MiB, %s, %s", c.Fill, does, n.Text)
}

// conditions returns those of all cells, by link.
func conditions() (list []condition) {
	for _, link := range []string{fast, slow} {
		for _, fill := range []int{16, 128} {
			for _, churn := range []int{0, churnKiB} {
				list = append(list, condition{Fill: fill, Churn: churn, Link: link})
			}
		}
	}
	return list
}

func cellNames() (names []string) {
	for _, c := range conditions() {
		names = append(names, c.name())
	}
	return names
}

// choose takes the cells to measure from a list of names.
func (b *bench) choose(names string) error {
	chosen := map[string]bool{}
	for name := range strings.SplitSeq(names, ",") {
		if !slices.Contains(cellNames(), name) {
			return fmt.Errorf("there is no cell %q: choose from %s", name, strings.Join(cellNames(), ","))
		}
		chosen[name] = true
	}
	for _, c := range conditions() {
		if chosen[c.name()] {
			b.r.Cells = append(b.r.Cells, &cell{Name: c.name(), condition: c})
		}
	}
	if b.rounds < 1 {
		return fmt.Errorf("%d rounds: make it 1 at least", b.rounds)
	}
	return nil
}
