package source

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// httpHead is how much the first request asks for and keeps: an overlay's head is read at
// once, by several small reads.
const httpHead = 64 << 10

// beginningMost is the most bytes of a file's beginning that are kept for [HTTP.Beginning].
const beginningMost = 2 << 20

const maxRedirects = 5

// dialTimeout bounds the waits for a connection: after an outage a new one works at once,
// while one that has asked for long asks rarely.
const dialTimeout = 5 * time.Second

// enough is how many bytes of a broken answer make it worth to ask on at once.
const enough = 16 << 10

// HTTPOptions says how to read from a web server. Its zero value works.
type HTTPOptions struct {
	Client     *http.Client  // nil: one of its own, with connections enough for many readers
	Header     http.Header   // sent with every request, not to another host after a redirect
	Timeout    time.Duration // longest silence of the server within an attempt; 0: 15 s
	Retries    int           // attempts after the first that bring no byte; 0: 5, negative: none
	Backoff    time.Duration // before the first retry, doubled each time, with jitter; 0: 100 ms
	MaxBackoff time.Duration // 0: 5 s
	MaxSize    int64         // a larger file is refused; 0: any size
	// Spool, if not empty, is a folder for an unnamed file into which all is downloaded, from
	// the beginning on, where a server does not answer ranges; without it such one is refused.
	Spool string

	// Keep keeps what is read from the start on for [HTTP.Beginning], until that is called.
	Keep bool
	// Beginning, if not nil, is what an earlier opening of the same file has found: the server
	// is not asked until something else is read, and a change of the file is noticed then.
	Beginning *Beginning

	// Check, if not nil, refuses a URL by an error: the one that is opened, and the target of
	// each redirect before it is asked.
	Check func(*url.URL) error
	// Dial, if not nil, makes the connections, and then no proxy is used. It cannot be used
	// together with Client.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
}

func (o HTTPOptions) withDefaults() HTTPOptions {
	if o.Timeout <= 0 {
		o.Timeout = 15 * time.Second
	}
	if o.Retries == 0 {
		o.Retries = 5
	}
	if o.Backoff <= 0 {
		o.Backoff = 100 * time.Millisecond
	}
	if o.MaxBackoff <= 0 {
		o.MaxBackoff = 5 * time.Second
	}
	o.MaxBackoff = max(o.MaxBackoff, o.Backoff)
	return o
}

// HTTP is a file on a web server, read by range requests.
type HTTP struct {
	url    string
	name   string // url without what may be secret
	o      HTTPOptions
	client *http.Client
	own    *http.Transport // nil: the caller's client
	closed atomic.Bool
	spool  *spool // nil: the server answers ranges

	size      int64 // -1 until the first answer
	validator validator

	mu     sync.Mutex
	head   []byte // of the file, as far as it is kept
	opened int    // bytes of head that are kept for good
	keeps  bool   // head grows
}

// Beginning is what one process has found when it opened a file and read it from the start,
// for another one to open it with.
type Beginning struct {
	Size     int64  `json:"size"`
	ETag     string `json:"etag,omitempty"`
	Modified string `json:"last_modified,omitempty"`
	Head     []byte `json:"head"` // the first bytes of the file
}

// Beginning returns what has been read of the file from its start on, without a gap, up to
// 2 MiB; nil where the server does not answer ranges. Whoever hands it on has checked it: it is
// as right as what the server sent.
func (h *HTTP) Beginning() *Beginning {
	if h.spool != nil {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	b := &Beginning{h.size, h.validator.etag, h.validator.modified, h.head}
	h.keeps, h.head = false, h.head[:h.opened:h.opened]
	return b
}

func (h *HTTP) kept() []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.head
}

// keep adds what was read at off to the head, if it continues it.
func (h *HTTP) keep(p []byte, off int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.keeps && off == int64(len(h.head)) {
		h.head = append(h.head, p[:min(len(p), beginningMost-len(h.head))]...)
	}
}

// validator is what a server says to tell one version of a file from another.
type validator struct{ etag, modified string }

func validatorOf(h http.Header) validator {
	return validator{etag: h.Get("ETag"), modified: h.Get("Last-Modified")}
}

// is reports whether an answer with the validator now is of the file that v is of. An answer
// to If-Range need not repeat what its ETag says better (RFC 9110, 15.3.7).
func (v validator) is(now validator) bool {
	if v.etag != "" && v.etag == now.etag && now.modified == "" {
		return true
	}
	return v == now
}

// strong returns what may stand in If-Range, or "".
func (v validator) strong() string {
	if v.etag != "" && !strings.HasPrefix(v.etag, "W/") {
		return v.etag
	}
	if v.etag == "" {
		return v.modified
	}
	return ""
}

// OpenHTTP asks for the beginning of a file, which tells its size and version. The server
// must answer range requests and send an ETag or Last-Modified, or see HTTPOptions.Spool.
func OpenHTTP(ctx context.Context, ref string, o HTTPOptions) (*HTTP, error) {
	u, err := url.Parse(ref)
	if err != nil {
		return nil, errors.New("open URL: it is not a valid one") // the cause holds all of it
	}
	h := &HTTP{url: ref, name: safeName(u), o: o.withDefaults(), size: -1}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, h.fail("open", errors.New("want http://HOST/PATH or https://HOST/PATH"))
	}
	if o.Check != nil {
		if err := o.Check(u); err != nil {
			return nil, h.fail("open", err)
		}
	}
	h.client = &http.Client{}
	if o.Client != nil {
		*h.client = *o.Client
	} else {
		h.own = &http.Transport{
			Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true, DisableCompression: true,
			MaxIdleConnsPerHost: 64, IdleConnTimeout: 90 * time.Second, TLSHandshakeTimeout: 10 * time.Second,
			DialContext: (&net.Dialer{Timeout: dialTimeout}).DialContext,
			HTTP2:       &http.HTTP2Config{SendPingTimeout: dialTimeout, PingTimeout: dialTimeout}, // a dead connection is not used again
		}
		if o.Dial != nil {
			h.own.Proxy, h.own.DialContext = nil, o.Dial
		}
		h.client.Transport = h.own
	}
	h.client.CheckRedirect = h.checkRedirect
	if b := o.Beginning; b != nil {
		if b.Size < int64(len(b.Head)) || len(b.Head) == 0 {
			return nil, h.fail("open", fmt.Errorf("its beginning of %d bytes is not one of a file of %d", len(b.Head), b.Size))
		}
		h.size, h.validator, h.head, h.opened = b.Size, validator{b.ETag, b.Modified}, b.Head, len(b.Head)
		return h, nil
	}
	head := make([]byte, httpHead)
	n, err := h.retry(ctx, head, 0)
	if errors.Is(err, errNoRanges) && o.Spool != "" {
		n, err = 0, h.openSpool(ctx, o.Spool)
	}
	if err != nil {
		return nil, errors.Join(h.fail("open", err), h.Close())
	}
	h.head, h.opened, h.keeps = head[:n:n], n, o.Keep
	return h, nil
}

// safeName returns u without user, password, query and fragment.
func safeName(u *url.URL) string {
	name := u.Scheme + "://" + u.Host + u.EscapedPath()
	if u.RawQuery != "" {
		name += "?..."
	}
	return name
}

// Size returns the size in bytes.
func (h *HTTP) Size() int64 { return h.size }

// String returns the URL without user, password and query.
func (h *HTTP) String() string { return h.name }

// ETag returns the version the server gave when the source was opened, or "".
func (h *HTTP) ETag() string { return h.validator.etag }

// Close ends the source; reads after it are refused.
func (h *HTTP) Close() (err error) {
	if h.closed.Swap(true) {
		return nil
	}
	if h.spool != nil {
		err = h.spool.close()
	}
	if h.own != nil {
		h.own.CloseIdleConnections()
	}
	return err
}

// ReadAt implements Source by one request, or more if the server breaks off.
func (h *HTTP) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	want, err := clamp(h.name, len(p), off, h.size)
	if err != nil {
		return 0, err
	}
	if h.closed.Load() {
		return 0, h.fail("read", ErrClosed)
	}
	if err := ctx.Err(); err != nil {
		return 0, h.fail("read", err)
	}
	if h.spool != nil {
		if want > 0 {
			if err := h.spool.read(ctx, p[:want], off); err != nil {
				return 0, h.fail("read", err)
			}
		}
		return want, atEnd(want, p)
	}
	n := 0
	if head := h.kept(); off < int64(len(head)) {
		n = copy(p[:want], head[off:])
	}
	if n < want {
		k, err := h.retry(ctx, p[n:want], off+int64(n))
		h.keep(p[n:n+k], off+int64(n))
		n += k
		if err != nil {
			return n, h.fail("read", err)
		}
	}
	return n, atEnd(want, p)
}

// atEnd returns io.EOF where only n bytes of p lie within the file.
func atEnd(n int, p []byte) error {
	if n < len(p) {
		return io.EOF
	}
	return nil
}

func (h *HTTP) fail(op string, err error) error {
	var temp temporaryError
	return &Error{Op: op, Name: h.name, Err: err, temp: errors.As(err, &temp)}
}

// temporaryError marks a cause that another attempt may not meet.
type temporaryError struct{ error }

func (e temporaryError) Unwrap() error { return e.error }

// retry fills p, and goes on behind what a broken attempt brought. An attempt that brings
// bytes starts the count of retries again. Before the size is known p may stay short.
func (h *HTTP) retry(ctx context.Context, p []byte, off int64) (n int, err error) {
	for try := 0; ; try++ {
		first := h.size < 0
		k, err := h.attempt(ctx, p[n:], off+int64(n))
		n += k
		if h.size >= 0 && off+int64(len(p)) > h.size { // the first answer says where the file ends
			p = p[:max(0, h.size-off)]
		}
		if err == nil && n == len(p) {
			return n, nil
		}
		if ctx.Err() != nil {
			return n, ctx.Err()
		}
		var temp temporaryError
		if !errors.As(err, &temp) {
			return n, err
		}
		if k >= enough { // a server that closes after every piece
			try = -1
			continue
		}
		if k > 0 || first && h.size >= 0 {
			try = 0
		}
		if try >= h.o.Retries {
			return n, fmt.Errorf("gave up after %d attempts: %w", try+1, err)
		}
		if err := h.pause(ctx, try); err != nil {
			return n, err
		}
	}
}

// pause waits before retry number try, for between a half and the whole of its back-off.
func (h *HTTP) pause(ctx context.Context, try int) error {
	d := h.o.MaxBackoff
	if try < 20 {
		d = min(d, h.o.Backoff<<try)
	}
	timer := time.NewTimer(d/2 + rand.N(d/2+1))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

var errSilent = errors.New("the server sends nothing")

// attempt makes one request for p and returns how much of it came.
func (h *HTTP) attempt(ctx context.Context, p []byte, off int64) (n int, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(h.o.Timeout, func() { cancel(fmt.Errorf("%w for %s", errSilent, h.o.Timeout)) })
	defer silence.Stop()
	req, err := h.request(ctx)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+int64(len(p))-1))
	if v := h.validator.strong(); v != "" {
		req.Header.Set("If-Range", v)
	}
	resp, err := h.client.Do(req)
	if err != nil {
		return 0, requestError(ctx, err)
	}
	defer resp.Body.Close()
	length, err := h.checkAnswer(resp, off, int64(len(p)))
	if err != nil || length == 0 {
		return 0, err
	}
	for n < int(length) {
		k, err := resp.Body.Read(p[n:length])
		n += k
		if k > 0 {
			silence.Reset(h.o.Timeout)
		}
		if err != nil && n < int(length) {
			return n, requestError(ctx, fmt.Errorf("the answer ends after %d of %d bytes: %w", n, length, noEOF(err)))
		}
	}
	var one [1]byte
	if k, _ := io.ReadFull(resp.Body, one[:]); k > 0 {
		return n, errors.New("the server sends more bytes than were asked for")
	}
	return n, nil
}

func (h *HTTP) request(ctx context.Context) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, h.url, nil)
	if err != nil {
		return nil, errors.New("not a valid URL")
	}
	for key, values := range h.o.Header {
		req.Header[http.CanonicalHeaderKey(key)] = values
	}
	req.Header.Set("Accept-Encoding", "identity")
	return req, nil
}

// requestError makes of a failed request a temporary error, unless it can never succeed.
func requestError(ctx context.Context, err error) error {
	var outer *url.Error
	if errors.As(err, &outer) {
		err = outer.Err // without the URL
	}
	var cert *tls.CertificateVerificationError
	var redirect redirectError
	var permanent permanentError
	if errors.As(err, &cert) || errors.As(err, &redirect) || errors.As(err, &permanent) {
		return err
	}
	if cause := context.Cause(ctx); errors.Is(cause, errSilent) {
		err = cause
	}
	return temporaryError{err}
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// permanentError marks a cause that every attempt will meet.
type permanentError struct{ error }

func (e permanentError) Unwrap() error { return e.error }

// Permanent marks an error of HTTPOptions.Dial after which no other attempt is made.
func Permanent(err error) error { return permanentError{err} }

// redirectError is a redirect that is not followed.
type redirectError string

func (e redirectError) Error() string { return string(e) }

func (h *HTTP) checkRedirect(req *http.Request, via []*http.Request) error {
	last := via[len(via)-1].URL
	switch {
	case len(via) > maxRedirects:
		return redirectError(fmt.Sprintf("more than %d redirects", maxRedirects))
	case req.URL.Scheme != "http" && req.URL.Scheme != "https":
		return redirectError("redirected to neither http nor https")
	case last.Scheme == "https" && req.URL.Scheme == "http":
		return redirectError("redirected from https to http on " + req.URL.Host)
	}
	if h.o.Check != nil {
		if err := h.o.Check(req.URL); err != nil {
			return permanentError{fmt.Errorf("redirected: %w", err)}
		}
	}
	if req.URL.Host != via[0].URL.Host {
		for key := range h.o.Header {
			req.Header.Del(key)
		}
	}
	return nil
}
