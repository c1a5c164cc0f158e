package rest

import (
	"context"
	"net"
	"net/http"
	"os"
	"strings"

	"cloudlet/api/service"

	"golang.org/x/sys/unix"
)

// role is what a caller may do.
type role string

const (
	roleRead    role = "read"
	roleOperate role = "operate"
	rolePeer    role = "peer"
)

// identity is who sends a request.
type identity struct {
	name  string
	role  role
	local bool // may name files of this host
}

// localName is the name of callers that need no token.
const localName = "local"

const mostKey = 255 // characters of an idempotency key

type contextKey int

const (
	peerKey     contextKey = iota // *peer: who is on the other end, where the host knows
	stoppingKey                   // <-chan struct{}: closed when Serve begins to stop
	whoKey                        // identity: who sends the request
	callerKey                     // *identity: takes who sends the request, for the log
)

// peer is a process of this host.
type peer struct {
	uid     uint32
	allowed bool
}

// Local returns a context that makes its request one of this very process, which needs no
// token. It is for a transport that calls the handler without a network.
func Local(ctx context.Context) context.Context {
	return context.WithValue(ctx, peerKey, &peer{uid: uint32(os.Geteuid()), allowed: true})
}

// connContext notes who is at the other end of a unix socket.
func connContext(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	p := &peer{uid: ^uint32(0)}
	if raw, err := u.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) {
			if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
				p.uid = cred.Uid
				p.allowed = cred.Uid == 0 || cred.Uid == uint32(os.Geteuid())
			}
		})
	}
	return context.WithValue(ctx, peerKey, p)
}

// stopping is closed when the server begins to stop; nil where there is no server.
func stopping(ctx context.Context) <-chan struct{} {
	ch, _ := ctx.Value(stoppingKey).(<-chan struct{})
	return ch
}

// identify finds out who sends a request.
func (s *server) identify(r *http.Request) (identity, error) {
	if p, ok := r.Context().Value(peerKey).(*peer); ok {
		if !p.allowed {
			return identity{}, refuse(http.StatusForbidden, "user %d may not use this socket", p.uid).fix("ask as the user of the daemon or as root, or over TCP with a token")
		}
		return identity{name: localName, role: roleOperate, local: true}, nil
	}
	values := r.Header.Values("Authorization")
	if len(values) == 0 {
		return identity{}, unauthorised("no token was sent", "")
	}
	scheme, token, _ := strings.Cut(values[0], " ")
	if len(values) > 1 || !strings.EqualFold(scheme, "Bearer") || token == "" {
		return identity{}, unauthorised("the Authorization header is not one bearer token", ` error="invalid_request"`)
	}
	who, ok := s.tokens.find(token)
	if !ok {
		return identity{}, unauthorised("the token is not known", ` error="invalid_token"`)
	}
	return who, nil
}

func unauthorised(detail, attribute string) error {
	return refuse(http.StatusUnauthorized, "%s", detail).fix("send the header Authorization: Bearer TOKEN (the command: --token-file) with a token of the daemon's tokens file").at("Authorization").with("WWW-Authenticate", strings.TrimSuffix(`Bearer realm="cloudlet",`+attribute, ","))
}

// callerOf is on whose behalf a verb works.
func callerOf(r *http.Request) (service.Caller, error) {
	who, _ := r.Context().Value(whoKey).(identity)
	c := service.Caller{Name: who.name, Local: who.local}
	keys := r.Header.Values("Idempotency-Key")
	switch {
	case len(keys) == 0:
		return c, nil
	case len(keys) > 1 || keys[0] == "" || len(keys[0]) > mostKey:
		return c, bad("Idempotency-Key", "an idempotency key is one text of 1 to %d characters", mostKey)
	}
	for _, b := range []byte(keys[0]) {
		if b < ' ' || b > '~' {
			return c, bad("Idempotency-Key", "an idempotency key holds only printable ASCII")
		}
	}
	c.Key = keys[0]
	return c, nil
}

// permit says whether a caller may use a route.
func (who identity) permit(rt *route) error {
	switch {
	case who.role == roleOperate, who.role == roleRead && !rt.operates, who.role == rolePeer && rt.peer:
		return nil
	}
	return refuse(http.StatusForbidden, "%s has the role %s, which may not %s %s", who.name, who.role, rt.method, rt.path).fix("use a token of the role %s", roleOperate)
}
