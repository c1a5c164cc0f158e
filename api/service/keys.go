package service

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"cloudlet/api"
)

// keyLife is for how long an idempotency key is known.
const (
	keyLife    = 24 * time.Hour
	maxKeySize = 255
)

// keyRecord is what the store keeps of an idempotency key.
type keyRecord struct {
	Operation string    `json:"operation"`
	Request   string    `json:"request"` // SHA-256 of kind and request
	Created   time.Time `json:"created"`
}

func requestHash(kind api.Kind, request []byte) string {
	sum := sha256.Sum256(append([]byte(kind+"\n"), request...))
	return hex.EncodeToString(sum[:])
}

func (s *Service) keyPath(c Caller) string {
	sum := sha256.Sum256([]byte(c.Name + "\x00" + c.Key))
	return s.path("keys", hex.EncodeToString(sum[:])+".json")
}

func checkKey(key string) error {
	if len(key) <= maxKeySize {
		return nil
	}
	err := api.Errorf(api.Invalid, "the idempotency key has %d characters", len(key)).Fix("use up to %d", maxKeySize)
	err.Field = "Idempotency-Key"
	return err
}

// keyed returns the id of the operation that the caller has begun under the same key, "" if
// there is none, and a Conflict if it was for another request.
func (s *Service) keyed(c Caller, kind api.Kind, request []byte) (string, error) {
	if c.Key == "" {
		return "", nil
	}
	var k keyRecord
	err := readJSON(s.keyPath(c), &k)
	if err != nil || time.Since(k.Created) > keyLife {
		return "", ignoreMissing(err)
	}
	if _, err := os.Stat(s.operationPath(k.Operation, "record.json")); errors.Is(err, fs.ErrNotExist) {
		return "", nil // a crash lost it, or it was pruned
	}
	if k.Request != requestHash(kind, request) {
		err := api.Errorf(api.Conflict, "the idempotency key %q was used for another request, operation %s", c.Key, k.Operation).Fix("choose a new key for a new request")
		err.Field = "Idempotency-Key"
		return "", err
	}
	return k.Operation, nil
}

func (s *Service) keepKey(c Caller, op api.Operation) error {
	if c.Key == "" {
		return nil
	}
	return replaceJSON(s.keyPath(c), keyRecord{op.ID, requestHash(op.Kind, op.Request), op.Created}, true)
}

// pruneKeys removes the keys that have expired.
func (s *Service) pruneKeys(ctx context.Context) error {
	entries, err := os.ReadDir(s.path("keys"))
	for _, e := range entries {
		path := filepath.Join(s.path("keys"), e.Name())
		if !expired(path) {
			continue
		}
		err = errors.Join(err, s.locked(ctx, func() error {
			if !expired(path) {
				return nil // used again since
			}
			return ignoreMissing(os.Remove(path))
		}))
	}
	return err
}

func expired(path string) bool {
	info, err := os.Stat(path)
	return err == nil && time.Since(info.ModTime()) > keyLife
}
