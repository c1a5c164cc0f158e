package cloudlets

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"cloudlet/integration/guest/table"
)

// askGuestBound is how long the application may take for one answer; some are about all that
// it holds.
const askGuestBound = 5 * time.Minute

// Cargo is what the application says of its cargo.
type Cargo struct {
	Seed  string `json:"seed"`
	MiB   int    `json:"mib"`
	Steps int64  `json:"steps"`
	Sum   string `json:"sum"`
}

// Verified is what the application answers to /verify.
type Verified struct {
	Token string `json:"token"`
	Table string `json:"table"`
	File  string `json:"file"`
	Cargo *Cargo `json:"cargo"`
}

// Ask makes a request to the application at an address, from the clients' namespace, and
// decodes its answer into v, if not nil. It is safe for concurrent use.
func (l *Lab) Ask(ctx context.Context, v any, method, address, path string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, askGuestBound)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+address+path, nil)
	if err != nil {
		return err
	}
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: l.Dial}}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s %s: %s: %s", method, path, resp.Status, body)
	}
	if v == nil {
		return nil
	}
	return json.Unmarshal(body, v)
}

// Verify compares what the application at an address holds, in memory and on its disk, with
// what it must be, and returns what it said. token is whose it must be; "" takes any.
func (l *Lab) Verify(ctx context.Context, address, token string) (v Verified, err error) {
	if err := l.Ask(ctx, &v, http.MethodGet, address, "/verify"); err != nil {
		return v, err
	}
	return v, v.check(token, table.Hash(v.Token), table.FileHash(v.Token))
}

// check compares an answer with the token and the two hashes that it must have.
func (v Verified) check(token, memory, file string) error {
	var errs []error
	if token != "" && v.Token != token {
		errs = append(errs, fmt.Errorf("the application is %s, want %s: it was started anew", v.Token, token))
	}
	if v.Table != memory {
		errs = append(errs, fmt.Errorf("the table in the guest's memory is %s, want %s", v.Table, memory))
	}
	if v.File != file {
		errs = append(errs, fmt.Errorf("the file on the guest's disk is %s, want %s", v.File, file))
	}
	if v.Cargo != nil {
		if want := table.NewCargo(v.Cargo.Seed, v.Cargo.MiB).Sum(v.Cargo.Steps); v.Cargo.Sum != want {
			errs = append(errs, fmt.Errorf("the cargo %q after %d steps is %s, want %s", v.Cargo.Seed, v.Cargo.Steps, v.Cargo.Sum, want))
		}
	}
	return errors.Join(errs...)
}
