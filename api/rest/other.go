package rest

import (
	"context"
	"net/http"
)

// Other is an API that is served beside /v1, under the same limits and with the same metrics
// and log. It authenticates its callers itself.
type Other interface {
	http.Handler
	// Patterns are the paths that it answers, in the form of http.ServeMux.
	Patterns() []string
	// Label names the route of a request for metrics: one of few.
	Label(r *http.Request) string
	// Refuse says in its own form that a request is not answered.
	Refuse(w http.ResponseWriter, r *http.Request, err error)
}

// other makes an Other known among the handlers of a ServeMux.
type other struct{ Other }

// serveOther answers a request to another API: its body must come in time, and it takes one of
// the places for callers with a token.
func (s *server) serveOther(o Other, w *response, r *http.Request, who *identity) {
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	default:
		o.Refuse(w, r, s.crowded())
		return
	}
	if w.body != nil {
		r.Body = http.MaxBytesReader(w.ResponseWriter, w.body, s.limits.Body)
	}
	o.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), callerKey, who)))
}
