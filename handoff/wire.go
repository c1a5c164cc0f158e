package handoff

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"

	"cloudlet/overlay"
)

// Version is the version of the protocol, in every message and answer.
const Version = 1

// Limits of what is sent.
const (
	MaxMessage  = 64 << 10 // bytes of a message or an answer in JSON
	MaxURL      = 2048     // bytes
	MaxText     = 1024     // bytes of a reason, a remedy, an address, a name
	MaxReasons  = 32
	MaxForwards = 64
	MaxMachine  = 8 << 10 // bytes of a machine configuration
)

// ErrWire is wrapped by every refusal of a message or an answer that breaks the rules.
var ErrWire = errors.New("not a message of the handoff protocol")

// Kind says what a message asks for.
type Kind string

// The kinds of message; the package's documentation says what each does.
const (
	KindOffer     Kind = "offer"
	KindRound     Kind = "round"
	KindPrepare   Kind = "prepare"
	KindGo        Kind = "go"
	KindAsk       Kind = "ask"
	KindAbort     Kind = "abort"
	KindEnd       Kind = "end"
	KindSupersede Kind = "supersede"
)

var kinds = []Kind{KindOffer, KindRound, KindPrepare, KindGo, KindAsk, KindAbort, KindEnd, KindSupersede}

// State is the state of a destination, as its journal and its answers name it.
type State string

// The states of a destination.
const (
	Unknown    State = "unknown" // it has no record of the handoff: this proves nothing
	Refused    State = "refused" // it has said no to the offer, and keeps no record
	Accepted   State = "accepted"
	Prepared   State = "prepared"
	Went       State = "went" // from here on the guest may have run
	Running    State = "running"
	Complete   State = "complete"
	Closed     State = "closed"
	Never      State = "never" // the guest has not run here and never will
	Lost       State = "lost"
	Superseded State = "superseded"
)

var states = []State{Unknown, Refused, Accepted, Prepared, Went, Running, Complete, Closed, Never, Lost, Superseded}

// Message is what a source sends. Handoff, Epoch, Kind and Round together name a step: a
// message that comes again is the same step, and is answered again without being done again.
type Message struct {
	Version int       `json:"version"`
	Handoff string    `json:"handoff"` // 16 to 64 hexadecimal digits, new for every attempt
	Epoch   uint64    `json:"epoch"`   // of the instance, see the package's documentation
	Kind    Kind      `json:"kind"`
	Offer   *Offer    `json:"offer,omitempty"` // of an offer
	Round   int       `json:"round,omitempty"` // of a round and prepare: how many overlays were published
	Chain   []Overlay `json:"chain,omitempty"` // of a round and prepare: the whole chain, the one on the base first
}

// Offer describes the instance that is to move.
type Offer struct {
	Cloudlet    string          `json:"cloudlet"`    // id of the source, so that a handoff to itself is seen
	Lineage     string          `json:"lineage"`     // id that the instance keeps wherever it goes
	Name        string          `json:"name"`        // of the instance, may be empty
	Base        string          `json:"base"`        // id
	Chain       []Overlay       `json:"chain"`       // what it was resumed from, the one on the base first
	Machine     json.RawMessage `json:"machine"`     // machine configuration, opaque here
	Fingerprint string          `json:"fingerprint"` // of the machine
	Memory      int64           `json:"memory"`      // bytes
	Disk        int64           `json:"disk"`        // bytes
	Residue     int64           `json:"residue"`     // bytes that it has changed, about
	Forwards    []Forward       `json:"forwards"`
	Paused      bool            `json:"paused"` // it was paused before and stays so
}

// Forward is a port of the guest that must be reachable at the destination as well. Host is
// the port asked for there, 0 for any. Open: from other hosts, too.
type Forward struct {
	Guest int  `json:"guest"`
	Host  int  `json:"host"`
	Open  bool `json:"open,omitempty"`
}

// Overlay is one published overlay.
type Overlay struct {
	ID     string `json:"id"`
	Digest string `json:"digest"` // of the file that URL serves
	Bytes  int64  `json:"bytes"`
	URL    string `json:"url"`              // at the source, good until the source releases it
	Origin string `json:"origin,omitempty"` // where the source had it from: asked first
}

// Answer is what a destination says to a message.
type Answer struct {
	Version   int        `json:"version"`
	Handoff   string     `json:"handoff"`
	Epoch     uint64     `json:"epoch"`
	State     State      `json:"state"`
	Lacks     []string   `json:"lacks,omitempty"`     // ids of overlays that are not there yet
	Missing   int64      `json:"missing"`             // bytes of the chain that are not there yet
	Endpoints []Endpoint `json:"endpoints,omitempty"` // once it runs
	Reasons   []Reason   `json:"reasons,omitempty"`   // of a refusal, of Never and Lost, of what it is stuck at
}

// Endpoint is where a port of the guest can be reached.
type Endpoint struct {
	Guest   int    `json:"guest"`
	Address string `json:"address"` // host:port
}

// Reason names one thing that stands in the way, and what can be done about it. Field is one
// of the names that the package's documentation lists, or empty.
type Reason struct {
	Field  string `json:"field,omitempty"`
	Text   string `json:"text"`
	Remedy string `json:"remedy,omitempty"`
}

// ParseMessage reads a message strictly: unknown fields, trailing bytes, another version and
// whatever breaks a limit are refused with ErrWire.
func ParseMessage(data []byte) (Message, error) {
	var m Message
	if err := parse(data, &m); err != nil {
		return Message{}, fmt.Errorf("read message: %w: %w", ErrWire, err)
	}
	if err := m.Validate(); err != nil {
		return Message{}, fmt.Errorf("read message: %w", err)
	}
	return m, nil
}

// ParseAnswer reads an answer as strictly as ParseMessage does a message.
func ParseAnswer(data []byte) (Answer, error) {
	var a Answer
	if err := parse(data, &a); err != nil {
		return Answer{}, fmt.Errorf("read answer: %w: %w", ErrWire, err)
	}
	if err := a.Validate(); err != nil {
		return Answer{}, fmt.Errorf("read answer: %w", err)
	}
	return a, nil
}

func parse(data []byte, v any) error {
	if len(data) > MaxMessage {
		return fmt.Errorf("it has %d bytes, the limit is %d", len(data), MaxMessage)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("there is more behind it")
	}
	return nil
}

func broken(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrWire, fmt.Errorf(format, args...))
}

// Validate reports the first rule that the message breaks, with ErrWire.
func (m *Message) Validate() error {
	if err := checkHead(m.Version, m.Handoff, m.Epoch); err != nil {
		return err
	}
	if !slices.Contains(kinds, m.Kind) {
		return broken("kind %.40q is not known", m.Kind)
	}
	chained := m.Kind == KindRound || m.Kind == KindPrepare
	switch {
	case m.Kind == KindOffer && m.Offer == nil:
		return broken("an offer without its offer")
	case m.Kind != KindOffer && m.Offer != nil:
		return broken("%s has an offer", m.Kind)
	case chained && (m.Round < 1 || m.Round > MaxRounds):
		return broken("round %d is not in 1 to %d", m.Round, MaxRounds)
	case chained && len(m.Chain) == 0:
		return broken("%s without a chain", m.Kind)
	case !chained && (m.Round != 0 || m.Chain != nil):
		return broken("%s has a chain", m.Kind)
	}
	if err := checkChain(m.Chain); err != nil {
		return err
	}
	if m.Offer != nil {
		return m.Offer.Validate()
	}
	return nil
}

// Validate reports the first rule that the offer breaks, with ErrWire.
func (o *Offer) Validate() error {
	switch {
	case !hexID(o.Cloudlet) || !hexID(o.Lineage):
		return broken("cloudlet %.70q, lineage %.70q: 16 to 64 hexadecimal digits are asked", o.Cloudlet, o.Lineage)
	case !sha256Form(o.Base) || !sha256Form(o.Fingerprint):
		return broken("base %.70q, fingerprint %.70q: 64 hexadecimal digits are asked", o.Base, o.Fingerprint)
	case len(o.Name) > MaxText:
		return broken("the name has %d bytes, the limit is %d", len(o.Name), MaxText)
	case len(o.Machine) == 0 || len(o.Machine) > MaxMachine:
		return broken("the machine has %d bytes, 1 to %d are asked", len(o.Machine), MaxMachine)
	case o.Memory <= 0 || o.Disk < 0 || o.Residue < 0:
		return broken("memory %d, disk %d, residue %d", o.Memory, o.Disk, o.Residue)
	case len(o.Forwards) > MaxForwards:
		return broken("%d forwards, the limit is %d", len(o.Forwards), MaxForwards)
	}
	for _, f := range o.Forwards {
		if f.Guest < 1 || f.Guest > 65535 || f.Host < 0 || f.Host > 65535 {
			return broken("forward %d to %d: ports are 1 to 65535", f.Host, f.Guest)
		}
	}
	return checkChain(o.Chain)
}

// Validate reports the first rule that the answer breaks, with ErrWire.
func (a *Answer) Validate() error {
	if err := checkHead(a.Version, a.Handoff, a.Epoch); err != nil {
		return err
	}
	switch {
	case !slices.Contains(states, a.State):
		return broken("state %.40q is not known", a.State)
	case len(a.Lacks) > overlay.MaxDepth:
		return broken("%d overlays are lacking, the limit is %d", len(a.Lacks), overlay.MaxDepth)
	case a.Missing < 0:
		return broken("%d bytes are missing", a.Missing)
	case len(a.Endpoints) > MaxForwards:
		return broken("%d endpoints, the limit is %d", len(a.Endpoints), MaxForwards)
	case len(a.Reasons) > MaxReasons:
		return broken("%d reasons, the limit is %d", len(a.Reasons), MaxReasons)
	}
	for _, id := range a.Lacks {
		if !sha256Form(id) {
			return broken("overlay %.70q: 64 hexadecimal digits are asked", id)
		}
	}
	for _, e := range a.Endpoints {
		if e.Guest < 1 || e.Guest > 65535 || e.Address == "" || len(e.Address) > MaxText {
			return broken("endpoint %.80q of port %d", e.Address, e.Guest)
		}
	}
	for _, r := range a.Reasons {
		if r.Text == "" || len(r.Field) > MaxText || len(r.Text) > MaxText || len(r.Remedy) > MaxText {
			return broken("a reason without text, or of more than %d bytes", MaxText)
		}
	}
	return nil
}

func checkHead(version int, handoff string, epoch uint64) error {
	switch {
	case version != Version:
		return broken("version %d, this is %d: update the older of the two cloudlets", version, Version)
	case !hexID(handoff):
		return broken("handoff %.70q: 16 to 64 hexadecimal digits are asked", handoff)
	case epoch == 0 || epoch > 1<<53:
		return broken("epoch %d is not in 1 to %d", epoch, uint64(1)<<53)
	}
	return nil
}

func checkChain(chain []Overlay) error {
	if len(chain) > overlay.MaxDepth {
		return broken("the chain is %d deep, the limit is %d", len(chain), overlay.MaxDepth)
	}
	for _, o := range chain {
		if !sha256Form(o.ID) || !sha256Form(o.Digest) {
			return broken("overlay %.70q, digest %.70q: 64 hexadecimal digits are asked", o.ID, o.Digest)
		}
		if o.Bytes <= 0 {
			return broken("overlay %.12s has %d bytes", o.ID, o.Bytes)
		}
		if !webURL(o.URL) || o.Origin != "" && !webURL(o.Origin) {
			return broken("overlay %.12s: its URLs must be http or https, absolute, without a user, %d bytes at most", o.ID, MaxURL)
		}
	}
	return nil
}

func webURL(s string) bool {
	u, err := url.Parse(s)
	return err == nil && len(s) <= MaxURL && (u.Scheme == "http" || u.Scheme == "https") && u.Host != "" && u.User == nil
}

func hexID(s string) bool {
	_, err := hex.DecodeString(s)
	return err == nil && len(s) >= 16 && len(s) <= 64
}

func sha256Form(s string) bool { return len(s) == 64 && hexID(s) }

// cut bounds a text for the wire.
func cut(s string) string {
	if s == "" {
		return "no reason was given"
	}
	s = strings.ToValidUTF8(s, "?") // JSON would make three bytes of each that is none
	if len(s) > MaxText {
		return strings.ToValidUTF8(s[:MaxText-3], "") + "..."
	}
	return s
}
