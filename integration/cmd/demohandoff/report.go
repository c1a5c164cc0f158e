package main

import (
	"fmt"
	"strings"

	"cloudlet/api"
	"cloudlet/integration/appclient"
	"cloudlet/integration/figures"
)

// results are the figures of a demo: times in seconds, sizes in bytes.
type results struct {
	Network  string           `json:"network"`
	Fill     int              `json:"fill_mib"`
	Churn    int              `json:"churn_kib_per_s"`
	Clients  int              `json:"clients"`
	Hops     []hop            `json:"handoffs"`
	Client   appclient.Report `json:"client"`
	Captured bool             `json:"captured_afterwards"`
	Reset    bool             `json:"reset_afterwards"`
	Deleted  bool             `json:"deleted_afterwards"`
	Failure  string           `json:"failure,omitempty"` // why it ended early
	Host     string           `json:"host"`
}

// hop is one handoff.
type hop struct {
	From     string             `json:"from"`
	To       string             `json:"to"`
	Gap      float64            `json:"client_gap_s"`
	Quiet    float64            `json:"client_gap_before_s"`  // the longest of the seconds before
	Silent   float64            `json:"client_last_answer_s"` // since the begin of the handoff
	Found    float64            `json:"client_found_s"`       // when it was told where the application is now
	Answered float64            `json:"client_next_answer_s"`
	Pause    float64            `json:"pause_s"`
	Bytes    int64              `json:"bytes"`      // of the rounds' overlays
	Carried  int64              `json:"link_bytes"` // between them, with headers
	Took     float64            `json:"total_s"`
	Rounds   []api.HandoffRound `json:"rounds"` // the last is of the paused guest
	Phases   []api.Event        `json:"phases"`
}

// String is what is printed of a handoff.
func (h hop) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "          client gap %.3f s (%.3f s before), pause %.3f s, %.1f MiB, total %.2f s\n", h.Gap, h.Quiet, h.Pause, figures.MiB(h.Bytes), h.Took)
	for i, r := range h.Rounds {
		name := fmt.Sprintf("round %d", i+1)
		if i == len(h.Rounds)-1 {
			name = "paused"
		}
		fmt.Fprintf(&b, "            %-8s %8.1f MiB changed, %8.1f MiB sent, made in %.3f s, there after %.3f s, guest stood still %.3f s\n", name, figures.MiB(r.Dirty), figures.MiB(r.Bytes), r.Made, r.Sent, r.Pause)
	}
	b.WriteString("            ")
	for _, p := range h.Phases {
		fmt.Fprintf(&b, "%s at %.2f s, ", p.Name, p.Seconds)
	}
	fmt.Fprintf(&b, "whole at %.2f s\n            the client's last answer was at %.2f s, it found the new place at %.2f s, the next answer came at %.2f s\n", h.Took, h.Silent, h.Found, h.Answered)
	return b.String()
}

// targets are those of the network and of what is carried over it.
func (r *results) targets() (list []figures.Target) {
	var gap, pause float64
	for _, h := range r.Hops {
		gap, pause = max(gap, h.Gap), max(pause, h.Pause)
	}
	switch {
	case r.Network != "38m":
		list = append(list,
			figures.Target{What: "pause, the longest", Bound: 0.3, Value: pause, Unit: "s", Decimals: 3},
			figures.Target{What: "client gap, the longest", Bound: 0.7, Value: gap, Unit: "s", Decimals: 3})
	case r.Churn == 0:
		list = append(list, figures.Target{What: "client gap at 38 Mbit/s, the longest", Bound: 2, Value: gap, Unit: "s", Decimals: 3})
	}
	return list
}

// report prints the targets and writes the file.
func (d *demo) report() error {
	missed := false
	fmt.Println()
	for _, t := range d.r.targets() {
		missed = missed || !t.Met()
		fmt.Printf("  %s\n", t)
	}
	if err := figures.WriteJSON(d.out, d.r); err != nil {
		return err
	}
	fmt.Printf("figures: %s\n", d.out)
	if missed {
		return figures.ErrMissed
	}
	return nil
}
