package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"time"
)

const (
	listenAddr = ":8080"
	dataDir    = "/data"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "guest: application:", err)
		os.Exit(1)
	}
}

func run() error {
	s, err := newServer(dataDir)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", listenAddr)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", listenAddr, err)
	}
	fmt.Println("guest: ready", s.token)
	srv := http.Server{Handler: s.handler(), ReadHeaderTimeout: time.Minute}
	return srv.Serve(l)
}

// badRequest is an error of the caller's making; it is answered with 400, a missing file
// with 404, a missing record with 409, any other error with 500.
type badRequest struct{ error }

// answer serves f's result as JSON, or its error.
func answer(f func(r *http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		v, err := f(r)
		var bad badRequest
		var gap gapError
		switch {
		case errors.As(err, &bad):
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		case errors.Is(err, fs.ErrNotExist):
			http.Error(w, err.Error(), http.StatusNotFound)
			return
		case errors.As(err, &gap):
			http.Error(w, err.Error(), http.StatusConflict)
			return
		case err != nil:
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		p, err := json.Marshal(v)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		// The client sees a failed write as a short body; there is nobody else to tell.
		_, _ = w.Write(append(p, '\n'))
	}
}
