package rest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"golang.org/x/sync/errgroup"
)

// Server runs a handler on listeners.
type Server struct {
	Handler http.Handler
	// Log takes what goes wrong on connections; nil: nothing.
	Log *slog.Logger
	// Drain is how long requests may go on once the server stops; 0: 10 seconds.
	Drain time.Duration
	// Connections bounds the open connections of each listener, beyond which new ones wait to
	// be taken; 0: 1024.
	Connections int
}

const (
	headerTime  = 10 * time.Second
	idleTime    = 2 * time.Minute
	mostHeader  = 64 << 10
	drainTime   = 10 * time.Second
	connections = 1024
)

// Serve answers what comes over the listeners until ctx ends. Then it takes no more, ends
// long polls and event streams with the present state of their operation, and lets the other
// requests go on for the drain time. It closes the listeners, and returns nil after a stop
// that was asked for, however many requests it had to break off. Wrap a listener in TLS with
// tls.NewListener, with "h2" and "http/1.1" as its protocols.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	log, drain, most := s.Log, s.Drain, s.Connections
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if drain == 0 {
		drain = drainTime
	}
	if most == 0 {
		most = connections
	}
	stop := make(chan struct{})
	// Requests outlive ctx: they end by themselves, or when their connection is closed.
	base := context.WithValue(context.WithoutCancel(ctx), stoppingKey, (<-chan struct{})(stop))
	open := &room{held: map[net.Conn]chan struct{}{}}
	srv := &http.Server{
		Handler:           s.Handler,
		ReadHeaderTimeout: headerTime,
		IdleTimeout:       idleTime,
		MaxHeaderBytes:    mostHeader - 4096, // net/http allows 4096 more
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		BaseContext:       func(net.Listener) context.Context { return base },
		ConnContext:       connContext,
		ConnState:         open.changed,
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, l := range listeners {
		g.Go(func() error {
			if err := srv.Serve(open.bounded(l, most)); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve %s: %w", l.Addr(), err)
			}
			return nil
		})
	}
	g.Go(func() error {
		<-gctx.Done() // a stop, or a listener that failed
		close(stop)
		until, cancel := context.WithTimeout(context.WithoutCancel(ctx), drain)
		defer cancel()
		if err := srv.Shutdown(until); err != nil {
			log.Warn("requests broken off", "after", drain)
			return ignoreClosed(srv.Close())
		}
		return nil
	})
	return g.Wait()
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
