package main

import (
	"fmt"
	"runtime"
	"slices"
	"strings"

	"cloudlet/integration/figures"
)

// tableName is that of the table in the README.
const tableName = "demo"

// publish puts figures, picture and table of a demo into the project's documents.
func publish(root string, d *demo, r *results) error {
	rows := d.rows()
	return figures.Publication{Name: tableName, Results: r, Picture: picture(rows, r), Table: markdown(rows, r)}.Put(root)
}

// markdown is the table of a demo as it stands in the README.
func markdown(rows []way, r *results) string {
	var b strings.Builder
	fmt.Fprintf(&b, "| seconds to the first right answer | median of %d | least to most |\n|---|---|---|\n", r.Rounds)
	for _, w := range rows {
		v := r.All[w.key]
		fmt.Fprintf(&b, "| %s | %.2f | %.2f to %.2f |\n", w.text, figures.Median(v), slices.Min(v), slices.Max(v))
	}
	fmt.Fprintf(&b, "\nThe overlay has %.1f MiB, the eager way's files %.1f MiB. Soon after the first answer the mount had pushed %.1f MiB\n"+
		"of memory before it was asked for, and served %.1f MiB of memory and %.1f MiB of disk on demand; a second instance read %.2f MiB more. %s.\n",
		figures.MiB(r.OverlayBytes), figures.MiB(r.EagerBytes), figures.MiB(r.MemoryPushed), figures.MiB(r.MemoryRead), figures.MiB(r.DiskRead), figures.MiB(r.SecondRead), r.Host)
	return b.String()
}

// host describes the machine that a demo ran on.
func host(qemu, accelerator string) string {
	return fmt.Sprintf("Measured on %d cores, %s, QEMU %s with %s", runtime.NumCPU(), runtime.GOARCH, qemu, accelerator)
}
