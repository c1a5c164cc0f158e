package main

import (
	"fmt"
	"strings"
)

// tableName is that of the table in the README, and of the file in docs.
const tableName = "bench-handoff"

// markdown is the table as it stands in the README.
func (r *results) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "| residue, guest, link | %s |\n|---|%s\n", strings.Join(columns(), " | "), strings.Repeat("---|", len(columns())))
	for _, c := range r.Cells {
		fmt.Fprintf(&b, "| %s | %s |\n", c.text(), strings.Join(r.row(c), " | "))
	}
	fmt.Fprintf(&b, "\nMedians of %d (least-most), a guest of %d MiB. %s.\n", r.Rounds, r.Memory, r.Host)
	return b.String()
}
