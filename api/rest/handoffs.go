package rest

import (
	"context"
	"io"
	"net/http"
	"net/netip"

	"cloudlet/api"
	"cloudlet/api/service"
)

// mostMessage bounds a message of the handoff protocol, as package handoff does.
const mostMessage = 64 << 10

// handOff begins to move an instance to another cloudlet.
func (s *server) handOff(w *response, r *http.Request) error {
	var req api.HandOff
	if err := s.decode(w, r, &req); err != nil {
		return err
	}
	id := r.PathValue("id")
	if req.Instance != "" && req.Instance != id {
		return bad("instance", "the body names the instance %q, the path %q", req.Instance, id).fix("leave it out of the body")
	}
	req.Instance = id
	return s.submit(w, r, req)
}

func (s *server) handoff(w *response, r *http.Request) error {
	h, err := s.service.Handoff(r.Context(), r.PathValue("id"))
	return writeOne(w, h, err)
}

// handoffMessage takes a message of another cloudlet, and sends the answer to it as it is.
// What it asks for goes on when the sender has left: it will ask again, and must not find
// half of it undone.
func (s *server) handoffMessage(w *response, r *http.Request) error {
	if _, err := mediaType(r, typeJSON); err != nil {
		return err
	}
	message, err := io.ReadAll(http.MaxBytesReader(w.ResponseWriter, r.Body, mostMessage))
	if err != nil {
		return broken(err)
	}
	who, _ := r.Context().Value(whoKey).(identity)
	caller := service.Caller{Name: who.name, Local: who.local} // a message is a step of its own: no key makes it one
	answer, err := s.service.HandoffMessage(context.WithoutCancel(r.Context()), caller, senderOf(r), message)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", typeJSON)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	_, err = w.Write(answer)
	return err
}

// senderOf is the address that a request comes from; the zero Addr where there is none, as on
// a unix socket.
func senderOf(r *http.Request) netip.Addr {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return from.Addr().Unmap()
}

// handoffContent sends an overlay that a handoff has published, or ranges of it, to whoever
// brings its key. Others are not told whether there is anything.
func (s *server) handoffContent(w *response, r *http.Request) error {
	f, digest, err := s.service.HandoffContent(r.Context(), r.PathValue("id"), r.PathValue("overlay"), r.URL.Query().Get("key"))
	switch api.CodeOf(err) {
	case api.NotFound, api.Invalid, api.Conflict:
		return refuse(http.StatusNotFound, "there is no such overlay of a handoff, or this is not its key").fix("ask the cloudlet that handed out the URL whether the handoff goes on")
	}
	if err != nil {
		return err
	}
	defer f.Close() // it was read only
	w.Header().Set("Cache-Control", "no-store")
	return sendOverlay(w, r, f, digest)
}
