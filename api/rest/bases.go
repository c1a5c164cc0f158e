package rest

import (
	"net/http"
	"strconv"

	"cloudlet/api"
)

func (s *server) bases(w *response, r *http.Request) error {
	list, err := s.service.Bases(r.Context())
	return writeList(w, list, err)
}

func (s *server) base(w *response, r *http.Request) error {
	b, err := s.service.Base(r.Context(), r.PathValue("id"))
	return writeOne(w, b, err)
}

func (s *server) deleteBase(w *response, r *http.Request) error {
	if err := s.service.DeleteBase(r.Context(), r.PathValue("id")); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// addBase takes a package that is sent, or a request for one to be fetched or made.
func (s *server) addBase(w *response, r *http.Request) error {
	kind, err := mediaType(r, typeJSON, typeZip)
	if err != nil {
		return err
	}
	if kind == typeZip {
		return s.receiveBase(w, r)
	}
	if r.URL.Query().Has("name") {
		return bad("name", "the parameter name goes with a package only").fix("give the name in the body")
	}
	data, err := s.readJSON(w, r)
	if err != nil {
		return err
	}
	which, err := has(data, "source", "disk", "instance")
	if err != nil {
		return err
	}
	switch which {
	case "source":
		return submitAs[api.ImportBase](s, w, r, data)
	case "disk":
		return submitAs[api.CreateBase](s, w, r, data)
	case "instance":
		return submitAs[api.CaptureBase](s, w, r, data)
	}
	return bad("source", "none of source, disk and instance is given").fix("give source to import a base, disk to create one, instance to make one of what that is now")
}

// submitAs decodes a body that was read and begins its operation.
func submitAs[T any](s *server, w *response, r *http.Request, data []byte) error {
	var req T
	if err := parse(data, &req); err != nil {
		return err
	}
	return s.submit(w, r, req)
}

func (s *server) receiveBase(w *response, r *http.Request) error {
	caller, err := callerOf(r)
	if err != nil {
		return err
	}
	if r.ContentLength < 0 {
		return refuse(http.StatusLengthRequired, "the package's size is not given").fix("send it with a Content-Length").at("Content-Length")
	}
	if r.ContentLength == 0 {
		return bad("", "the body is empty").fix("send a package as cloudlet base export makes it")
	}
	w.body.stall = s.limits.Stall
	b, err := s.service.ReceiveBase(r.Context(), caller, r.URL.Query().Get("name"), r.Body, r.ContentLength)
	if err != nil {
		if w.body.err != nil {
			return broken(w.body.err)
		}
		return err
	}
	w.Header().Set("Location", "/v1/bases/"+b.ID)
	return writeJSON(w, http.StatusCreated, b)
}

func (s *server) basePackage(w *response, r *http.Request) error {
	write, size, err := s.service.BasePackage(r.Context(), r.PathValue("id"))
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", typeZip)
	if size >= 0 {
		w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
	}
	if r.Method == http.MethodHead {
		w.WriteHeader(http.StatusOK)
		return nil
	}
	return write(r.Context(), w)
}
