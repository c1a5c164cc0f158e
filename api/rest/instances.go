package rest

import (
	"net/http"

	"cloudlet/api"
)

func (s *server) instances(w *response, r *http.Request) error {
	all, err := flag(r, "all")
	if err != nil {
		return err
	}
	list, err := s.service.Instances(r.Context(), all)
	return writeList(w, list, err)
}

func (s *server) addInstance(w *response, r *http.Request) error {
	var req api.Run
	if err := s.decode(w, r, &req); err != nil {
		return err
	}
	return s.submit(w, r, req)
}

func (s *server) instance(w *response, r *http.Request) error {
	in, err := s.service.Instance(r.Context(), r.PathValue("id"))
	return writeOne(w, in, err)
}

func (s *server) deleteInstance(w *response, r *http.Request) error {
	force, err := flag(r, "force")
	if err != nil {
		return err
	}
	if err := s.service.Delete(r.Context(), r.PathValue("id"), force); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// action is the body of a request to do something to an instance.
type action struct {
	Action api.Action `json:"action"`
}

func (s *server) act(w *response, r *http.Request) error {
	var req action
	if err := s.decode(w, r, &req); err != nil {
		return err
	}
	if !known(req.Action) {
		return bad("action", "there is no action %q", req.Action).fix("use one of pause, continue, reset, stop, abort, ready, resume-here, discard-here")
	}
	in, err := s.service.Act(r.Context(), r.PathValue("id"), req.Action)
	return writeOne(w, in, err)
}

// instanceLog sends the serial console's output.
func (s *server) instanceLog(w *response, r *http.Request) error {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	if err := s.service.Log(r.Context(), r.PathValue("id"), w); err != nil {
		return err
	}
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	return nil
}
