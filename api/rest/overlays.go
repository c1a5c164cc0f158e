package rest

import (
	"context"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"time"

	"cloudlet/api"
)

// uploadPrefix tells the id of an upload from that of an overlay.
const uploadPrefix = "upload-"

func (s *server) overlays(w *response, r *http.Request) error {
	list, err := s.service.Overlays(r.Context())
	return writeList(w, list, err)
}

func (s *server) overlay(w *response, r *http.Request) error {
	id := r.PathValue("id")
	if strings.HasPrefix(id, uploadPrefix) {
		u, err := s.service.Upload(r.Context(), id)
		if err == nil {
			w.Header().Set("Upload-Offset", strconv.FormatInt(u.Offset, 10))
		}
		return writeOne(w, u, err)
	}
	caller, err := callerOf(r)
	if err != nil {
		return err
	}
	o, err := s.service.OverlayFor(r.Context(), caller, id)
	return writeOne(w, o, err)
}

func (s *server) deleteOverlay(w *response, r *http.Request) error {
	remove := s.service.DeleteOverlay
	if strings.HasPrefix(r.PathValue("id"), uploadPrefix) {
		remove = s.service.DeleteUpload
	}
	if err := remove(r.Context(), r.PathValue("id")); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// addOverlay makes an entry to upload to, or has an overlay fetched or made.
func (s *server) addOverlay(w *response, r *http.Request) error {
	data, err := s.readJSON(w, r)
	if err != nil {
		return err
	}
	which, err := has(data, "source", "instance", "size")
	if err != nil {
		return err
	}
	switch which {
	case "source":
		return submitAs[api.ImportOverlay](s, w, r, data)
	case "instance":
		return submitAs[api.CreateOverlay](s, w, r, data)
	case "size":
		return s.addUpload(w, r, data)
	}
	return bad("size", "none of source, instance and size is given").fix("give size to upload an overlay, source to import one, instance to create one")
}

func (s *server) addUpload(w *response, r *http.Request, data []byte) error {
	var req api.CreateUpload
	if err := parse(data, &req); err != nil {
		return err
	}
	caller, err := callerOf(r)
	if err != nil {
		return err
	}
	u, err := s.service.CreateUpload(r.Context(), caller, req)
	if err != nil {
		return err
	}
	w.Header().Set("Location", "/v1/overlays/"+u.ID)
	w.Header().Set("Upload-Offset", strconv.FormatInt(u.Offset, 10))
	return writeJSON(w, http.StatusCreated, u)
}

// content sends an overlay, or ranges of it.
func (s *server) content(w *response, r *http.Request) error {
	f, o, err := s.service.OverlayContent(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	defer f.Close() // it was read only
	return sendOverlay(w, r, f, o.Digest)
}

// sendOverlay sends what a request wants of an overlay's file.
func sendOverlay(w *response, r *http.Request, f io.ReadSeeker, digest string) error {
	w.Header().Set("Content-Type", typeZip)
	w.Header().Set("Etag", `"`+digest+`"`)
	http.ServeContent(&ranged{response: w}, r, "", time.Time{}, f)
	return nil
}

// ranged turns what http.ServeContent says of an impossible range into a problem.
type ranged struct {
	*response
	refused bool
}

// WriteHeader passes every other status on.
func (w *ranged) WriteHeader(status int) {
	if status != http.StatusRequestedRangeNotSatisfiable {
		w.response.WriteHeader(status)
		return
	}
	w.refused = true
	writeProblem(w.response, refuse(status, "the range is not within the content").at("Range").with("Content-Range", w.Header().Get("Content-Range")))
}

// Write drops the text for which there is a problem.
func (w *ranged) Write(p []byte) (int, error) {
	if w.refused {
		return len(p), nil
	}
	return w.response.Write(p)
}

// part is what a Content-Range says of a body.
type part struct {
	off, n int64
	total  int64 // -1: not said
}

var contentRange = regexp.MustCompile(`^bytes (?:(\d{1,18})-(\d{1,18})|(\*))/(\d{1,18}|\*)$`)

// partOf reads the Content-Range; without one the body is the whole.
func partOf(r *http.Request) (part, error) {
	values := r.Header.Values("Content-Range")
	if len(values) == 0 {
		if r.ContentLength < 0 {
			return part{}, refuse(http.StatusLengthRequired, "neither the size of the body nor its place is given").fix("send it with a Content-Length, or with a Content-Range").at("Content-Length")
		}
		return part{n: r.ContentLength, total: r.ContentLength}, nil
	}
	m := contentRange.FindStringSubmatch(values[0])
	if len(values) > 1 || m == nil {
		return part{}, bad("Content-Range", "%q is not a range of bytes", values[0]).fix("give it as bytes FIRST-LAST/SIZE")
	}
	p := part{total: -1}
	if m[4] != "*" {
		p.total, _ = strconv.ParseInt(m[4], 10, 64)
	}
	if m[3] == "*" { // nothing is sent: finish what is there
		p.off = -1
	} else {
		p.off, _ = strconv.ParseInt(m[1], 10, 64)
		last, _ := strconv.ParseInt(m[2], 10, 64)
		if p.n = last - p.off + 1; p.n < 1 || p.total >= 0 && last >= p.total {
			return part{}, bad("Content-Range", "%q is not a range of bytes", values[0]).fix("give it as bytes FIRST-LAST/SIZE with FIRST <= LAST < SIZE")
		}
	}
	if r.ContentLength >= 0 && r.ContentLength != p.n {
		return part{}, bad("Content-Range", "the body has %d bytes, its range %q has %d", r.ContentLength, values[0], p.n)
	}
	return p, nil
}

// putContent takes a part of an upload, and with the last one begins to take in the overlay.
func (s *server) putContent(w *response, r *http.Request) error {
	id := r.PathValue("id")
	if !strings.HasPrefix(id, uploadPrefix) {
		return refuse(http.StatusConflict, "%s is not an upload, and overlays do not change", id).fix("make an upload with POST /v1/overlays {\"size\": BYTES}")
	}
	caller, err := callerOf(r)
	if err != nil {
		return err
	}
	u, err := s.service.Upload(r.Context(), id)
	if err != nil {
		return err
	}
	offset := func(u api.Upload) { w.Header().Set("Upload-Offset", strconv.FormatInt(u.Offset, 10)) }
	offset(u)
	p, err := partOf(r)
	if err != nil {
		return err
	}
	if p.total >= 0 && p.total != u.Size {
		return bad("Content-Range", "%s has %d bytes, not %d", id, u.Size, p.total)
	}
	if p.off >= 0 {
		if u, err = s.append(w, r, u, p); err != nil {
			offset(u)
			return err
		}
		offset(u)
	}
	if u.Offset < u.Size {
		return writeJSON(w, http.StatusOK, u)
	}
	op, err := s.service.FinishUpload(r.Context(), caller, id)
	return accepted(w, op, err)
}

// append adds a part. The upload that it returns with an error says where to go on.
func (s *server) append(w *response, r *http.Request, u api.Upload, p part) (api.Upload, error) {
	if p.off != u.Offset {
		return u, refuse(http.StatusConflict, "%s goes on at byte %d, not %d", u.ID, u.Offset, p.off).fix("send the bytes from %d on", u.Offset).at("Content-Range")
	}
	body := &sized{r: r.Body, left: p.n}
	if w.body != nil {
		w.body.stall = s.limits.Stall
	}
	now, err := s.service.Append(r.Context(), u.ID, p.off, body)
	if err == nil {
		return now, nil
	}
	if now.ID == "" {
		// The client may have gone, which ended its context; where the upload stands is
		// still worth saying.
		if is, uerr := s.service.Upload(context.WithoutCancel(r.Context()), u.ID); uerr == nil {
			now = is
		} else {
			now = u
		}
	}
	if body.err != nil {
		err = broken(body.err)
	}
	return now, err
}

// sized reads the bytes that a range announced: fewer are an error, and so are more.
type sized struct {
	r    io.Reader
	left int64
	err  error // what the client did wrong
}

func (b *sized) Read(p []byte) (int, error) {
	if b.err != nil {
		return 0, b.err
	}
	if b.left == 0 {
		return 0, b.end()
	}
	if int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.r.Read(p)
	b.left -= int64(n)
	switch {
	case err == nil || err == io.EOF && b.left == 0:
		return n, nil
	case err == io.EOF:
		err = io.ErrUnexpectedEOF
	}
	b.err = err
	return n, err
}

// end sees to it that nothing follows.
func (b *sized) end() error {
	var one [1]byte
	switch n, err := io.ReadFull(b.r, one[:]); {
	case n > 0:
		b.err = bad("Content-Range", "the body has more bytes than its range")
	case err != io.EOF:
		b.err = err
	default:
		return io.EOF
	}
	return b.err
}
