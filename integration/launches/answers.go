package launches

import "fmt"

// Answer is what GET / returns, apart from the record.
type Answer struct {
	Token   string `json:"token"`
	Counter int    `json:"counter"`
}

// Verification is what GET /verify returns.
type Verification struct {
	Answer
	Data string `json:"data"` // hexadecimal SHA-256
}

// check returns an error unless the answers of a synthesised instance go on from what was
// kept at the capture.
func (p Prepared) check(a Answer, v Verification) error {
	switch {
	case a.Token != p.Token || v.Token != p.Token:
		return fmt.Errorf("verify instance: tokens %q and %q, want %q", a.Token, v.Token, p.Token)
	case a.Counter <= p.Counter:
		return fmt.Errorf("verify instance: counter %d, it was %d at the capture", a.Counter, p.Counter)
	case v.Data != p.Data:
		return fmt.Errorf("verify instance: data have the hash %q, it was %q at the capture", v.Data, p.Data)
	}
	return nil
}

// keep takes what must be the same after a synthesis.
func (p *Prepared) keep(v Verification) error {
	if v.Token == "" || len(v.Data) != 64 {
		return fmt.Errorf("ask application: token %q and hash %q are not whole", v.Token, v.Data)
	}
	p.Token, p.Counter, p.Data = v.Token, v.Counter, v.Data
	return nil
}
