package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"
	"cloudlet/api/rest"
	"cloudlet/api/service"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// socketName is the daemon's unix socket in the state folder.
const socketName = "cloudlet.sock"

// session is the service that a command talks to: a daemon, or, where none runs, the same
// handler in this process.
type session struct {
	*client.Client
	remote string // address, if the service is perhaps on another host; paths mean nothing there
	end    func(context.Context) error
}

// dial finds the service: the one that --server names, else the daemon of the state folder,
// else one of this process over that folder.
func (env *environment) dial(ctx context.Context) (*session, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if env.server != "" {
		token, err := readToken(env.tokenFile)
		if err != nil {
			return nil, err
		}
		remote := env.server
		if strings.HasPrefix(remote, "unix:") {
			remote = "" // the socket of a daemon of this host
		}
		if err := env.ownFlags(env.server); err != nil {
			return nil, err
		}
		return newSession(client.Options{Server: env.server, Token: token}, remote, nil)
	}
	socket, err := filepath.Abs(filepath.Join(env.state, socketName))
	if err != nil {
		return nil, err
	}
	if c, err := new(net.Dialer).DialContext(ctx, "unix", socket); err == nil {
		if err := c.Close(); err != nil {
			return nil, err
		}
		if err := env.ownFlags(socket); err != nil {
			return nil, err
		}
		return newSession(client.Options{Server: "unix:" + socket}, "", nil)
	}
	svc, err := env.service(ctx)
	if err != nil {
		return nil, err
	}
	handler := rest.New(rest.Config{Service: svc})
	local := client.NewLocal(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handler.ServeHTTP(w, r.WithContext(rest.Local(r.Context())))
	}))
	return newSession(client.Options{Server: "http://this.process", Transport: local}, "", func(ctx context.Context) error {
		err := svc.Close(ctx)
		local.Close()
		return err
	})
}

// ownFlags refuses flags of a service in this process where another one does the work.
func (env *environment) ownFlags(other string) error {
	for _, name := range []string{"vmm", "mount-memory", "cache-size"} {
		if env.flags.Changed(name) {
			return usageError{fmt.Errorf("--%s says how a service in this process works, but the one at %s does the work: give the flag to its `cloudlet serve`", name, other)}
		}
	}
	return nil
}

func newSession(o client.Options, remote string, end func(context.Context) error) (*session, error) {
	c, err := client.New(o)
	return &session{Client: c, remote: remote, end: end}, err
}

// close ends the session. Work of this process that nobody waits for any more is cancelled
// when ctx has ended.
func (s *session) close(ctx context.Context) error {
	s.Close()
	if s.end == nil {
		return nil
	}
	return s.end(ctx)
}

// with makes the body of a command of one that needs a service.
func (env *environment) with(f func(context.Context, *session, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		s, err := env.dial(cmd.Context())
		if err != nil {
			return err
		}
		err = f(cmd.Context(), s, args)
		if cerr := s.close(cmd.Context()); err == nil {
			err = cerr
		}
		return err
	}
}

// withStore makes the body of a command of one that works on the store in this process.
func (env *environment) withStore(f func(context.Context, *service.Service, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if env.server != "" {
			return usageError{fmt.Errorf("%s works on this host only; leave --server and CLOUDLET_SERVER out", cmd.CommandPath())}
		}
		s, err := env.service(cmd.Context())
		if err != nil {
			return err
		}
		err = f(cmd.Context(), s, args)
		if cerr := s.Close(cmd.Context()); err == nil {
			err = cerr
		}
		return err
	}
}

// service opens the store.
func (env *environment) service(ctx context.Context) (*service.Service, error) {
	c, err := env.config()
	if err != nil {
		return nil, err
	}
	return service.Open(ctx, c)
}

func (env *environment) config() (service.Config, error) {
	exe, err := os.Executable()
	if err != nil {
		return service.Config{}, fmt.Errorf("find this program: %w", err)
	}
	cache := int64(env.cacheSize)
	if cache == 0 {
		cache = -1
	}
	return service.Config{Dir: env.state, Program: []string{exe}, MountMemory: int64(env.mountMemory), CacheLimit: cache, VMM: env.vmm, Log: env.log()}, nil
}

// submitGrace is how long the answer to a request that begins work is awaited after Ctrl-C:
// it brings the id by which the work is cancelled.
const submitGrace = 10 * time.Second

// begin asks for an operation.
func begin(ctx context.Context, ask func(context.Context) (api.Operation, error)) (api.Operation, error) {
	if err := ctx.Err(); err != nil {
		return api.Operation{}, err
	}
	bound, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() {
		timer := time.AfterFunc(submitGrace, cancel)
		context.AfterFunc(bound, func() { timer.Stop() })
	})()
	op, err := ask(bound)
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return op, err
}

// work begins an operation, shows how far it is, and returns its result. If ctx ends first,
// the operation is cancelled, and what it did is undone before work returns.
func work[T any](ctx context.Context, env *environment, s *session, ask func(context.Context) (api.Operation, error)) (T, error) {
	return follow[T](ctx, env, s, func(api.Progress) (api.Operation, error) { return begin(ctx, ask) })
}

// follow is work for an operation that has a progress before it begins.
func follow[T any](ctx context.Context, env *environment, s *session, start func(api.Progress) (api.Operation, error)) (out T, err error) {
	report, done := env.progress()
	op, err := start(report)
	if err == nil {
		op, err = s.Wait(ctx, op, show(report))
	}
	done()
	if err != nil {
		return out, err
	}
	return client.Result[T](op)
}

// show tells the progress of the states of an operation.
func show(report api.Progress) func(api.Operation) {
	return func(op api.Operation) {
		if report != nil && op.Phase != "" && !op.State.Ended() {
			report(op.Phase, op.Done, op.Total)
		}
	}
}

func isURL(ref string) bool {
	return strings.HasPrefix(ref, "http://") || strings.HasPrefix(ref, "https://") || strings.HasPrefix(ref, "file://")
}

// ref returns what the service calls that which a person calls ref: an id or a name as it
// is, a file by its whole path. The store counts before a file of the same name; ./NAME means
// the file. lookups ask the store.
func (s *session) ref(ctx context.Context, ref string, lookups ...func(context.Context, string) error) (string, error) {
	if isURL(ref) {
		return ref, nil
	}
	if !strings.Contains(ref, "/") {
		if info, err := os.Stat(ref); err != nil || !info.Mode().IsRegular() {
			return ref, nil
		}
		for _, ask := range lookups {
			if err := ask(ctx, ref); api.CodeOf(err) != api.NotFound {
				return ref, nil
			}
		}
	}
	return s.path(ref)
}

// path returns the whole path of a file of this host, if the service can see it.
func (s *session) path(name string) (string, error) {
	if name == "" {
		return "", nil
	}
	if s.remote != "" {
		return "", usageError{fmt.Errorf("the service at %s does not see %s, a file of this host; import it first", s.remote, name)}
	}
	return filepath.Abs(name)
}

func (s *session) isBase(ctx context.Context, ref string) error {
	_, err := s.Base(ctx, ref)
	return err
}

func (s *session) isOverlay(ctx context.Context, ref string) error {
	_, err := s.Overlay(ctx, ref)
	return err
}

// readToken reads a token: the last word of the first line that is no comment, so that a line
// of a daemon's tokens file will do.
func readToken(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return "", hostError(fmt.Errorf("read token: %w", err))
	}
	for line := range strings.Lines(string(b)) {
		if words := strings.Fields(line); len(words) > 0 && !strings.HasPrefix(words[0], "#") {
			return words[len(words)-1], nil
		}
	}
	return "", api.Errorf(api.Invalid, "read token: %s holds none", path).Fix("put a token of the daemon's tokens file into it")
}

// hostError gives the errors of files of this host the codes that the service gives its own.
func hostError(err error) error {
	var known *api.Error
	var code api.Code
	remedy := ""
	switch {
	case err == nil, errors.As(err, &known), errors.Is(err, context.Canceled):
		return err
	case errors.Is(err, fs.ErrNotExist):
		code = api.NotFound
	case errors.Is(err, fs.ErrPermission):
		code, remedy = api.Unavailable, "run as a user who may, or as root"
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		code, remedy = api.Unavailable, "free some disk space, or write elsewhere"
	default:
		return err
	}
	return &api.Error{Code: code, Detail: err.Error(), Remedy: remedy, Err: err}
}
