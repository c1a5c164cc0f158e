package fusefs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// maxSocketLen is the longest path in bytes that a unix socket can have.
const maxSocketLen = 107

const (
	controlTimeout  = 10 * time.Second
	controlShutdown = 2 * time.Second
)

// Status is what a control socket tells: the mount's statistics, and under "image" what
// Options.Status returned.
type Status struct {
	Stats
	Image json.RawMessage `json:"image,omitempty"`
}

// control serves GET /status, GET /touches, POST /begin, POST /abort and POST /unmount?force=1
// to root and the own user.
type control struct {
	server   *Server
	listener net.Listener
	http     *http.Server
	ended    chan error
}

// peerKey is the context key of a connection's user id, an int64, -1 if unknown.
type peerKey struct{}

func listenControl(s *Server, path string) (*control, error) {
	if conn, err := net.Dial("unix", path); err == nil {
		conn.Close()
		return nil, fmt.Errorf("control socket %s: %w: another mount listens there", path, unix.EADDRINUSE)
	} else if errors.Is(err, unix.ECONNREFUSED) {
		// Left behind by a process that was killed.
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("control socket %s: %w", path, err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("control socket %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("control socket %s: %w", path, err), l.Close())
	}
	c := &control{server: s, listener: l, ended: make(chan error, 1)}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", c.status)
	mux.HandleFunc("GET /touches", c.touches)
	mux.HandleFunc("POST /begin", c.begin)
	mux.HandleFunc("POST /abort", c.abort)
	mux.HandleFunc("POST /unmount", c.unmount)
	c.http = &http.Server{
		Handler: onlyOwner(mux), ReadTimeout: controlTimeout, WriteTimeout: 2 * unmountWait, MaxHeaderBytes: 16 << 10,
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, peerKey{}, peerUID(conn))
		},
	}
	return c, nil
}

func (c *control) start() {
	go func() { c.ended <- c.http.Serve(c.listener) }() // stop joins it
}

// stop lets requests in progress finish, then removes the socket.
func (c *control) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), controlShutdown)
	defer cancel()
	err := c.http.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, c.http.Close())
	}
	if e := <-c.ended; !errors.Is(e, http.ErrServerClosed) {
		err = errors.Join(err, e)
	}
	if err != nil {
		return fmt.Errorf("close control socket: %w", err)
	}
	return nil
}

// peerUID is the user id of the process at the other end, -1 if it cannot be had.
func peerUID(conn net.Conn) int64 {
	u, ok := conn.(*net.UnixConn)
	if !ok {
		return -1
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return -1
	}
	uid := int64(-1)
	if err := raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			uid = int64(cred.Uid)
		}
	}); err != nil {
		return -1
	}
	return uid
}

// allowed says whether a user may control a mount of user own.
func allowed(uid, own int64) bool { return uid == 0 || uid >= 0 && uid == own }

func onlyOwner(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		uid, ok := r.Context().Value(peerKey{}).(int64)
		if !ok || !allowed(uid, int64(os.Geteuid())) {
			reply(w, http.StatusForbidden, problem{Error: fmt.Sprintf("user %d may not control this mount", uid)})
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (c *control) status(w http.ResponseWriter, r *http.Request) {
	st := Status{Stats: c.server.Stats()}
	if c.server.status != nil {
		image, err := json.Marshal(c.server.status())
		if err != nil {
			reply(w, http.StatusInternalServerError, problem{Error: fmt.Sprintf("encode image status: %v", err)})
			return
		}
		st.Image = image
	}
	reply(w, http.StatusOK, st)
}

func (c *control) touches(w http.ResponseWriter, r *http.Request) {
	reply(w, http.StatusOK, c.server.Touches())
}

func (c *control) begin(w http.ResponseWriter, r *http.Request) {
	c.server.Begin()
	reply(w, http.StatusOK, struct{}{})
}

func (c *control) abort(w http.ResponseWriter, r *http.Request) {
	c.server.Abort()
	reply(w, http.StatusOK, struct{}{})
}

func (c *control) unmount(w http.ResponseWriter, r *http.Request) {
	end := c.server.unmount
	switch force := r.URL.Query().Get("force"); force {
	case "", "0":
	case "1":
		end = c.server.forceUnmount
	default:
		reply(w, http.StatusBadRequest, problem{Error: fmt.Sprintf("force %q: want 0 or 1", force)})
		return
	}
	switch err := end(r.Context()); {
	case errors.Is(err, ErrBusy):
		reply(w, http.StatusConflict, problem{Error: err.Error()})
	case err != nil:
		reply(w, http.StatusInternalServerError, problem{Error: err.Error()})
	default:
		reply(w, http.StatusOK, struct{}{})
	}
}

// problem is the body of every answer that is no success.
type problem struct {
	Error string `json:"error"`
}

func reply(w http.ResponseWriter, code int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	// A client that has gone away needs no answer.
	_ = json.NewEncoder(w).Encode(body)
}
