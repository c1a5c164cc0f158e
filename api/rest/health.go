package rest

import (
	"context"
	_ "embed"
	"net/http"
	"time"

	"cloudlet/api"
)

// openAPIDocument describes every route; a test holds the two against each other.
//
//go:embed openapi.json
var openAPIDocument []byte

func (s *server) openAPI(w *response, r *http.Request) error {
	w.Header().Set("Content-Type", typeJSON)
	_, err := w.Write(openAPIDocument)
	return err
}

// health is what /healthz and /readyz say.
type health struct {
	Status string `json:"status"`
}

// healthy answers as long as the process does.
func (s *server) healthy(w *response, r *http.Request) error {
	return writeJSON(w, http.StatusOK, health{"ok"})
}

// readyTime bounds the look at the store.
const readyTime = 5 * time.Second

// ready answers while requests are taken and the store can be read.
func (s *server) ready(w *response, r *http.Request) error {
	select {
	case <-stopping(r.Context()):
		return api.Errorf(api.Unavailable, "the daemon is stopping")
	default:
	}
	ctx, cancel := context.WithTimeout(r.Context(), readyTime)
	defer cancel()
	if _, err := s.service.Instances(ctx, false); err != nil {
		return api.Errorf(api.Unavailable, "the store cannot be read: %w", err)
	}
	return writeJSON(w, http.StatusOK, health{"ready"})
}
