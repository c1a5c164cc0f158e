package source

import (
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
)

const useFile = "download the file and use its path"

var errNoRanges = errors.New("the server does not support ranges")

// checkAnswer holds an answer against the n bytes at off that were asked for and against
// what is known of the file, and returns how many bytes follow. The first right answer says
// size and version.
func (h *HTTP) checkAnswer(resp *http.Response, off, n int64) (int64, error) {
	v := validatorOf(resp.Header)
	switch {
	case resp.StatusCode == http.StatusPartialContent:
	case resp.StatusCode == http.StatusOK:
		if h.size >= 0 && !h.validator.is(v) {
			return 0, fmt.Errorf("%w on the server", ErrChanged)
		}
		if h.size < 0 && resp.ContentLength == 0 {
			return 0, h.accept(v, 0)
		}
		return 0, fmt.Errorf("%w: %s", errNoRanges, useFile)
	case resp.StatusCode == http.StatusRequestedRangeNotSatisfiable:
		if h.size < 0 && resp.Header.Get("Content-Range") == "bytes */0" {
			return 0, h.accept(v, 0)
		}
		return 0, fmt.Errorf("%w on the server: it has no byte %d any more", ErrChanged, off)
	default:
		return 0, statusError(resp.StatusCode)
	}
	if err := checkEncoding(resp.Header); err != nil {
		return 0, err
	}
	first, last, size, err := parseContentRange(resp.Header.Get("Content-Range"))
	if err != nil {
		return 0, err
	}
	if h.size >= 0 && (size != h.size || !h.validator.is(v)) {
		return 0, fmt.Errorf("%w on the server", ErrChanged)
	}
	if first != off || last != min(off+n, size)-1 {
		return 0, fmt.Errorf("the server answers with bytes %d-%d of %d, not with %d-%d: %s", first, last, size, off, off+n-1, useFile)
	}
	length := last - first + 1
	if resp.ContentLength >= 0 && resp.ContentLength != length {
		return 0, fmt.Errorf("the server announces %d bytes for a range of %d: %s", resp.ContentLength, length, useFile)
	}
	if h.size < 0 {
		if err := h.accept(v, size); err != nil {
			return 0, err
		}
	}
	return length, nil
}

// accept takes size and version from the first answer.
func (h *HTTP) accept(v validator, size int64) error {
	if size > 0 && v == (validator{}) {
		return errors.New("the server sends neither ETag nor Last-Modified, so a change would not be seen: " + useFile)
	}
	return h.acceptUnversioned(v, size)
}

// acceptUnversioned is accept for a file that is fetched by one request.
func (h *HTTP) acceptUnversioned(v validator, size int64) error {
	if h.o.MaxSize > 0 && size > h.o.MaxSize {
		return fmt.Errorf("the file has %d bytes, the limit is %d", size, h.o.MaxSize)
	}
	h.size, h.validator = size, v
	return nil
}

func checkEncoding(h http.Header) error {
	if e := h.Get("Content-Encoding"); e != "" && !strings.EqualFold(e, "identity") {
		return fmt.Errorf("the server encodes the file (%.20s) though that was refused: %s", e, useFile)
	}
	return nil
}

// statusError says what a status other than success means, and whether it may pass.
func statusError(code int) error {
	text := fmt.Sprintf("the server answers %d %s", code, http.StatusText(code))
	switch {
	case code == http.StatusNotFound || code == http.StatusGone:
		return errors.New(text + ": check the address")
	case code == http.StatusUnauthorized || code == http.StatusForbidden:
		return errors.New(text + ": check that you are permitted to read it")
	case code >= 500 || code == http.StatusTooManyRequests || code == http.StatusRequestTimeout:
		return temporaryError{errors.New(text)}
	}
	return errors.New(text)
}

// parseContentRange parses "bytes FIRST-LAST/SIZE"; the size must be known.
func parseContentRange(s string) (first, last, size int64, err error) {
	bad := fmt.Errorf("the server's Content-Range %.60q is not bytes FIRST-LAST/SIZE: %s", s, useFile)
	unit, rest, _ := strings.Cut(s, " ")
	span, total, ok := strings.Cut(rest, "/")
	from, to, ok2 := strings.Cut(span, "-")
	if !strings.EqualFold(unit, "bytes") || !ok || !ok2 {
		return 0, 0, 0, bad
	}
	var v [3]int64
	for i, digits := range []string{from, to, total} {
		n, err := strconv.ParseUint(digits, 10, 63)
		if err != nil {
			return 0, 0, 0, bad
		}
		v[i] = int64(n)
	}
	if v[0] > v[1] || v[1] >= v[2] {
		return 0, 0, 0, bad
	}
	return v[0], v[1], v[2], nil
}
