package rest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"cloudlet/api"

	"golang.org/x/sys/unix"
)

const (
	tokensCheckEvery = time.Second
	mostTokenBytes   = 1 << 20
	leastToken       = 16 // characters
)

// token is one line of the tokens file; of the token itself only the hash is kept.
type token struct {
	sum [sha256.Size]byte
	who identity
}

// stamp tells whether a file is still the one that was read.
type stamp struct {
	mtime time.Time
	size  int64
	inode uint64
}

// Tokens is a tokens file as it was last understood; it is read again when it changes. It is
// safe for concurrent use.
type Tokens struct {
	path string
	log  *slog.Logger

	mu      sync.Mutex
	checked time.Time
	seen    stamp
	problem string // what was last reported, to report it once
	list    []token
}

// OpenTokens reads the tokens file at path; "" means that nobody has a token. What is wrong
// with it goes to the log; nil: nowhere.
func OpenTokens(path string, log *slog.Logger) *Tokens {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	t := &Tokens{path: path, log: log}
	t.refresh()
	return t
}

// Identify returns the name and the role, "read", "operate" or "peer", of whom a token belongs
// to. Where ctx is that of a request to an Other, it is logged under that name.
func (t *Tokens) Identify(ctx context.Context, token string) (name, role string, ok bool) {
	who, ok := t.find(token)
	if to, known := ctx.Value(callerKey).(*identity); known && ok {
		*to = who
	}
	return who.name, string(who.role), ok
}

// find returns who a token belongs to. It takes the same time for every token.
func (t *Tokens) find(bearer string) (identity, bool) {
	t.refresh()
	t.mu.Lock()
	list := t.list
	t.mu.Unlock()
	sum := sha256.Sum256([]byte(bearer))
	var who identity
	found := false
	for i := range list {
		if subtle.ConstantTimeCompare(sum[:], list[i].sum[:]) == 1 {
			who, found = list[i].who, true
		}
	}
	return who, found
}

// refresh reads the file again if it has changed, looking at most once a second.
func (t *Tokens) refresh() {
	if t.path == "" {
		return
	}
	t.mu.Lock()
	now := time.Now()
	if now.Sub(t.checked) < tokensCheckEvery {
		t.mu.Unlock()
		return
	}
	t.checked = now
	seen := t.seen
	t.mu.Unlock()

	list, is, err := readTokens(t.path, seen)
	t.mu.Lock()
	defer t.mu.Unlock()
	if err != nil {
		// It is looked at again until it is right: a chmod changes nothing that the stamp holds.
		t.seen = stamp{}
		if t.problem != err.Error() {
			t.problem = err.Error()
			t.log.Error("tokens file cannot be used, the tokens stay as they were", "file", t.path, "problem", err)
		}
		return
	}
	t.seen = is
	if is != seen {
		t.list = list
		t.log.Info("tokens file read", "file", t.path, "tokens", len(list))
	}
	if is != seen || is == (stamp{}) {
		t.problem = ""
	}
}

// readTokens reads a tokens file, unless it is the one seen. The stamp is of what was opened.
func readTokens(path string, seen stamp) ([]token, stamp, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, stamp{}, fmt.Errorf("open tokens file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, stamp{}, fmt.Errorf("open tokens file: %w", err)
	}
	is := stamp{mtime: info.ModTime(), size: info.Size()}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err == nil {
		is.inode = st.Ino
	}
	switch {
	case is == seen:
		return nil, is, nil
	case !info.Mode().IsRegular():
		return nil, is, fmt.Errorf("%s is not a regular file", path)
	case info.Mode().Perm()&0o077 != 0:
		return nil, is, fmt.Errorf("%s can be used by others than its owner (mode %04o): chmod 600 it", path, info.Mode().Perm())
	case info.Size() > mostTokenBytes:
		return nil, is, fmt.Errorf("%s has %d bytes, more than %d", path, info.Size(), mostTokenBytes)
	}
	data, err := io.ReadAll(io.LimitReader(f, mostTokenBytes))
	if err != nil {
		return nil, stamp{}, fmt.Errorf("read tokens file: %w", err)
	}
	list, err := parseTokens(data)
	if err != nil {
		return nil, is, fmt.Errorf("%s: %w", path, err)
	}
	return list, is, nil
}

// parseTokens reads lines of ROLE NAME TOKEN. Its errors never hold a token.
func parseTokens(data []byte) ([]token, error) {
	var list []token
	names := map[string]bool{}
	sums := map[[sha256.Size]byte]bool{}
	n := 0
	for line := range bytes.Lines(data) {
		n++
		fields := strings.Fields(string(line))
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		if len(fields) != 3 {
			return nil, fmt.Errorf("line %d is not ROLE NAME TOKEN", n)
		}
		who := identity{role: role(fields[0]), name: fields[1]}
		sum := sha256.Sum256([]byte(fields[2]))
		switch {
		case who.role != roleRead && who.role != roleOperate && who.role != rolePeer:
			return nil, fmt.Errorf("line %d: the role is none of read, operate, peer", n)
		case who.name == localName:
			return nil, fmt.Errorf("line %d: the name %s stands for callers of this host", n, localName)
		case names[who.name]:
			return nil, fmt.Errorf("line %d: the name %s is used twice", n, who.name)
		case len(fields[2]) < leastToken:
			return nil, fmt.Errorf("line %d: the token of %s is shorter than %d characters", n, who.name, leastToken)
		case sums[sum]:
			return nil, fmt.Errorf("line %d: the token of %s is also another's", n, who.name)
		}
		names[who.name], sums[sum] = true, true
		list = append(list, token{sum, who})
	}
	return list, nil
}

// EnsureTokens makes a tokens file with one new token of the role operate if there is none at
// path, and reports whether it did. A file that is there is checked and left alone.
func EnsureTokens(path string) (made bool, err error) {
	if _, err := os.Lstat(path); err == nil {
		if _, _, err := readTokens(path, stamp{}); err != nil {
			return false, api.Errorf(api.Invalid, "%w", err).Fix("put the tokens file right, or remove it to have a new one made")
		}
		return false, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return false, api.Errorf(api.Unavailable, "find tokens file: %w", err)
	}
	made, err = makeTokens(path)
	if err != nil {
		return false, api.Errorf(api.Unavailable, "make tokens file: %w", err).Fix("see that %s can be written to", filepath.Dir(path))
	}
	return made, nil
}

// makeTokens writes a new tokens file beside its place and links it there, so that of two at
// the same time one wins and nobody sees half a file.
func makeTokens(path string) (made bool, err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".tokens-*") // mode 0600
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, os.Remove(f.Name())) }()
	text := "# ROLE NAME TOKEN: read may ask, operate may do everything, peer is for other cloudlets.\n" +
		"# Changes count at once. Keep this file readable by its owner only.\n" +
		string(roleOperate) + " operator " + rand.Text() + "\n"
	_, err = f.WriteString(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return false, err
	}
	if err := os.Link(f.Name(), path); errors.Is(err, fs.ErrExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return true, err
	}
	return true, errors.Join(dir.Sync(), dir.Close())
}
