package api

import "time"

// HandOff asks for an instance to be moved to another cloudlet, while it runs.
type HandOff struct {
	Instance  string `json:"instance"`
	To        string `json:"to"`                   // http://HOST:PORT or https://HOST:PORT of the other cloudlet
	Token     string `json:"token,omitempty"`      // that it accepts, of the role peer or operate
	Rounds    int    `json:"rounds,omitempty"`     // at most so many while the guest runs; 0: 4; less than 0: none
	Name      string `json:"name,omitempty"`       // there; "": the one that it has
	KeepPorts bool   `json:"keep_ports,omitempty"` // the guest's ports are to be reachable by the same numbers
}

// HandedOff is an instance that runs elsewhere now.
type HandedOff struct {
	Handoff   string         `json:"handoff"`
	To        string         `json:"to"`
	Instance  string         `json:"instance"`  // its id there: the first 12 digits of the handoff's
	Endpoints []Endpoint     `json:"endpoints"` // there
	Rounds    []HandoffRound `json:"rounds"`    // the last is of the paused guest
	Bytes     int64          `json:"bytes"`     // of the overlays of the rounds
	Pause     float64        `json:"pause_seconds"`
	Took      float64        `json:"seconds"`
}

// HandoffRound is one overlay of a handoff.
type HandoffRound struct {
	Dirty int64   `json:"dirty_bytes"`   // that the guest had changed since the round before
	Bytes int64   `json:"bytes"`         // of the overlay made of them
	Made  float64 `json:"made_seconds"`  // to copy them and make the overlay
	Sent  float64 `json:"sent_seconds"`  // then, until the other cloudlet had it
	Pause float64 `json:"pause_seconds"` // for which the guest stood still
}

// HandoffSide is which part a cloudlet has in a handoff.
type HandoffSide string

// The sides of a handoff.
const (
	HandoffSource      HandoffSide = "source"
	HandoffDestination HandoffSide = "destination"
)

// Handoff is a handoff as one of its sides sees it. Both keep it for a day after its end.
type Handoff struct {
	ID        string          `json:"id"`
	Side      HandoffSide     `json:"side"`
	Instance  string          `json:"instance,omitempty"`  // id here
	Operation string          `json:"operation,omitempty"` // at the source
	Peer      string          `json:"peer,omitempty"`      // URL of the other side, at the source
	Lineage   string          `json:"lineage"`
	Epoch     uint64          `json:"epoch"`
	State     string          `json:"state"`            // of this side; package handoff says what each means
	Theirs    string          `json:"theirs,omitempty"` // at the source: what the destination last said
	Rounds    []HandoffRound  `json:"rounds,omitempty"`
	Bytes     int64           `json:"bytes,omitempty"`         // published
	Missing   int64           `json:"missing_bytes,omitempty"` // of these, not at the destination yet
	Pause     float64         `json:"pause_seconds,omitempty"`
	Why       string          `json:"why,omitempty"` // the last decision about rounds
	Endpoints []Endpoint      `json:"endpoints,omitempty"`
	InDoubt   bool            `json:"in_doubt,omitempty"` // it is not known whether the guest runs at the destination
	Loss      string          `json:"loss,omitempty"`     // what ActionResumeHere or ActionDiscardHere would give up
	Stuck     string          `json:"stuck,omitempty"`    // what the last step failed at; it is tried again
	Reasons   []HandoffReason `json:"reasons,omitempty"`  // why it ended without the instance having moved
	Created   time.Time       `json:"created"`
}

// HandoffReason is one thing that stands in the way of a handoff.
type HandoffReason struct {
	Field  string `json:"field,omitempty"` // base, chain, cloudlet, disk, epoch, fingerprint, lineage, machine, memory, port, token or version
	Text   string `json:"text"`
	Remedy string `json:"remedy,omitempty"`
}

// Moved says where an instance went.
type Moved struct {
	To        string     `json:"to"`       // URL of the other cloudlet
	Instance  string     `json:"instance"` // id there
	Endpoints []Endpoint `json:"endpoints,omitempty"`
}
