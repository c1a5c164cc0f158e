package main

import (
	"fmt"
	"strings"

	"cloudlet/integration/figures"
)

// tableName is that of the table in the README, and of the files in docs.
const tableName = "bench-lazy"

// put puts table, figures and picture into the documents of the project.
func (r *results) put(root string) error {
	return figures.Publication{Name: tableName, Results: r, Picture: picture(r), Table: r.markdown()}.Put(root)
}

// markdown is the table as it stands in the README.
func (r *results) markdown() string {
	var b strings.Builder
	b.WriteString("| link | way | first response, s | MiB before it | complete, s | waits of the guest: count, p50, p99, over 10 ms |\n|---|---|---|---|---|---|\n")
	for _, n := range networks() {
		for _, w := range r.ways() {
			if c := r.find(n.name, w.name); c != nil {
				fmt.Fprintf(&b, "| %s | %s | %s |\n", n.text, w.text, strings.Join(r.columns(c), " | "))
			}
		}
	}
	fmt.Fprintf(&b, "\nMedians (least-most) of up to %d rounds; > %.0f: given up. The overlay has %.1f MiB (%.1f MiB without its profile), the eager way's\nfiles %.1f MiB. %s.\n",
		r.Rounds, r.Bound, figures.MiB(r.OverlayBytes), figures.MiB(r.PlainBytes), figures.MiB(r.EagerBytes), strings.TrimSuffix(r.Host, "."))
	for i, p := range r.Peer {
		if i == 0 {
			fmt.Fprintf(&b, "\n%d reads of 4 KiB of the disk, one after the other, until the last is answered:\n\n", peerReads)
		}
		fmt.Fprintf(&b, "- %s\n", p)
	}
	return b.String()
}
