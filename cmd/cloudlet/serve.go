package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"cloudlet/api"
	"cloudlet/api/nova"
	"cloudlet/api/rest"
	"cloudlet/api/service"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

// serve is the daemon.
type serve struct {
	env          *environment
	config       string
	listen       []string
	advertise    string
	cert, key    string
	insecure     bool
	allow        []string
	maxInstances int
	maxMemory    bytesFlag
	minFree      bytesFlag
	stop         bool
	drain        time.Duration
	logJSON      bool
}

func newServe(env *environment) *cobra.Command {
	o := &serve{env: env}
	cmd := &cobra.Command{
		Use: "serve", Short: "Run the service: the REST API over a unix socket and TCP", Args: args(0),
		Long: `Serves /v1 on the unix socket cloudlet.sock of the state folder, for its own user and root,
and with --listen over TCP, where each request needs a token of the file "tokens" of the
state folder. The first start makes that file with one token of the role operate. Stock
OpenStack clients use the same tokens at /v2.1. Other
commands on this host use the daemon by themselves. Other cloudlets, to and from which
instances are handed off, reach it at --advertise.

Ctrl-C or SIGTERM ends it: no new requests, operations are awaited for --drain and then
cancelled. Instances go on, and the next start finds them, unless --stop-instances is set.

--config names a file of lines "KEY = VALUE", where a key is a flag without its dashes and
# begins a comment. A flag on the command line counts more.`,
		Example: "  cloudlet serve\n  cloudlet serve --listen 127.0.0.1:7300 --allow-url https://overlays.example.org/\n  cloudlet serve --listen :7300 --tls-cert cert.pem --tls-key key.pem",
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := readConfig(o.config, cmd.Flags(), serveKeys); err != nil {
				return err
			}
			return o.run(cmd.Context())
		},
	}
	o.addFlags(cmd.Flags())
	return cmd
}

// serveKeys are the flags that a configuration file may set.
var serveKeys = []string{
	"state", "mount-memory", "verbose", "listen", "advertise", "tls-cert", "tls-key", "insecure", "allow-url", "max-instances", "max-memory", "min-free", "drain", "stop-instances", "log-json",
}

func (o *serve) addFlags(f *pflag.FlagSet) {
	f.StringVar(&o.config, "config", "", "file with values for these flags")
	f.StringArrayVar(&o.listen, "listen", nil, "also listen on this TCP address, HOST:PORT; may be repeated")
	f.StringVar(&o.advertise, "advertise", "", "http(s)://HOST:PORT at which other cloudlets reach this one, for handoff (default: the first --listen that names a host)")
	f.StringVar(&o.cert, "tls-cert", "", "certificate chain for --listen, PEM")
	f.StringVar(&o.key, "tls-key", "", "private key of --tls-cert, PEM")
	f.BoolVar(&o.insecure, "insecure", false, "allow --listen beyond loopback without TLS: tokens can be read on the way")
	f.StringArrayVar(&o.allow, "allow-url", nil, "URLs below this one may be fetched for callers with a token; may be repeated")
	f.IntVar(&o.maxInstances, "max-instances", 0, "most instances at once (default: no bound)")
	f.Var(&o.maxMemory, "max-memory", "most memory of all guests together (default: what the host has available)")
	f.Var(&o.minFree, "min-free", "space that stays free on the disk of the state folder")
	f.DurationVar(&o.drain, "drain", 10*time.Second, "how long requests and operations may go on at the end")
	f.BoolVar(&o.stop, "stop-instances", false, "end all instances at the end")
	f.BoolVar(&o.logJSON, "log-json", false, "write the log as JSON")
}

// log writes what happens to standard error.
func (o *serve) log() *slog.Logger {
	opts := &slog.HandlerOptions{Level: slog.LevelInfo}
	if o.env.verbose {
		opts.Level = slog.LevelDebug
	}
	if o.logJSON {
		return slog.New(slog.NewJSONHandler(o.env.stderr, opts))
	}
	return slog.New(slog.NewTextHandler(o.env.stderr, opts))
}

// check refuses what must not be served.
func (o *serve) check() error {
	if (o.cert == "") != (o.key == "") {
		return usageError{errors.New("--tls-cert and --tls-key go together")}
	}
	if o.env.server != "" {
		return usageError{errors.New("serve runs a service; leave --server and CLOUDLET_SERVER out")}
	}
	if o.maxInstances < 0 || o.drain < 0 {
		return usageError{errors.New("--max-instances and --drain cannot be negative")}
	}
	for _, address := range o.listen {
		host, _, err := net.SplitHostPort(address)
		if err != nil {
			return usageError{fmt.Errorf("--listen %s: want HOST:PORT", address)}
		}
		if ip := net.ParseIP(host); o.cert == "" && !o.insecure && host != "localhost" && (ip == nil || !ip.IsLoopback()) {
			return usageError{fmt.Errorf("--listen %s is open to other hosts: give --tls-cert and --tls-key, or --insecure", address)}
		}
	}
	return checkAdvertise(o.advertise)
}

// checkAdvertise refuses what cannot be where other cloudlets reach this one.
func checkAdvertise(text string) error {
	if text == "" {
		return nil
	}
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || text != u.Scheme+"://"+u.Host {
		return usageError{fmt.Errorf("--advertise %s: want http://HOST:PORT or https://HOST:PORT, and nothing else", text)}
	}
	if port, err := strconv.Atoi(u.Port()); err != nil || port < 1 || port > 65535 {
		return usageError{fmt.Errorf("--advertise %s: want a port from 1 to 65535 behind the host", text)}
	}
	if ip := net.ParseIP(u.Hostname()); ip != nil && ip.IsUnspecified() {
		return usageError{fmt.Errorf("--advertise %s: nobody can be reached at %s; name an address of this host", text, ip)}
	}
	return nil
}

// reached is where other cloudlets reach this one, "" if that is not known: an address on
// which it listens for all interfaces does not tell.
func (o *serve) reached(listeners []net.Listener) string {
	if o.advertise != "" {
		return o.advertise
	}
	scheme := "http://"
	if o.cert != "" {
		scheme = "https://"
	}
	for i, l := range listeners {
		host, _, err := net.SplitHostPort(o.listen[i])
		if ip := net.ParseIP(host); err != nil || host == "" || ip != nil && ip.IsUnspecified() {
			continue
		}
		if tcp, ok := l.Addr().(*net.TCPAddr); ok {
			return scheme + net.JoinHostPort(host, strconv.Itoa(tcp.Port)) // what it is when 0 was asked for
		}
	}
	return ""
}

func (o *serve) run(ctx context.Context) (err error) {
	if err := o.check(); err != nil {
		return err
	}
	// Neither the end of a terminal nor that of whoever reads the log ends the daemon.
	signal.Ignore(syscall.SIGHUP, syscall.SIGPIPE)
	log := o.log()
	c, err := o.env.config()
	if err != nil {
		return err
	}
	// What cannot be listened on is said after what is wrong with the store.
	listeners, lerr := o.open()
	defer func() {
		if err != nil {
			closeAll(listeners)
		}
	}()
	c.Daemon, c.Log, c.AllowURLs, c.Advertise = true, log, o.allow, o.reached(listeners)
	c.MaxInstances, c.MaxMemory, c.MinFree = o.maxInstances, int64(o.maxMemory), int64(o.minFree)
	s, err := service.Open(ctx, c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, o.end(context.WithoutCancel(ctx), s, log)) }()
	tokens := filepath.Join(s.Dir(), "tokens")
	made, err := rest.EnsureTokens(tokens)
	if err != nil {
		return err
	}
	if made {
		log.Info("made a token of the role operate", "file", tokens)
	}
	if lerr != nil {
		return lerr
	}
	socket, err := listenUnix(filepath.Join(s.Dir(), socketName))
	if err != nil {
		return err
	}
	listeners = append([]net.Listener{socket}, listeners...)
	for _, l := range listeners {
		log.Info("listening", "network", l.Addr().Network(), "address", l.Addr().String())
	}
	if c.Advertise != "" {
		log.Info("other cloudlets reach this one", "at", c.Advertise)
	}
	known := rest.OpenTokens(tokens, log)
	handler := rest.New(rest.Config{
		Service: s, Log: log, Tokens: known,
		Others: []rest.Other{nova.New(nova.Config{Service: s, Auth: authenticator{known}, Log: log})},
	})
	n := &notifier{socket: o.env.getenv("NOTIFY_SOCKET"), log: log}
	n.tell("READY=1\nSTATUS=serving " + s.Dir())
	stopBeating := n.beat(o.env.getenv("WATCHDOG_USEC"), o.env.getenv("WATCHDOG_PID"), handler)
	stopTelling := context.AfterFunc(ctx, func() {
		log.Info("stopping")
		n.tell("STOPPING=1\nSTATUS=waiting for requests and operations")
	})
	defer stopTelling()
	defer stopBeating()
	server := &rest.Server{Handler: handler, Log: log, Drain: max(o.drain, time.Millisecond)} // 0 would mean its own
	return server.Serve(ctx, listeners...)
}

// authenticator lets the holders of the daemon's tokens use Nova's shapes.
type authenticator struct{ tokens *rest.Tokens }

// Authenticate implements nova.Authenticator.
func (a authenticator) Authenticate(ctx context.Context, token string) (nova.Identity, error) {
	name, role, ok := a.tokens.Identify(ctx, token)
	switch {
	case !ok:
		return nova.Identity{}, nova.ErrUnknownToken
	case role == "peer":
		return nova.Identity{}, nova.ErrForbidden
	}
	return nova.Identity{Name: name, Write: role == "operate"}, nil
}

// end finishes the work of the service; instances go on unless told otherwise.
func (o *serve) end(ctx context.Context, s *service.Service, log *slog.Logger) error {
	bound, cancel := context.WithTimeout(ctx, o.drain)
	defer cancel()
	err := s.Close(bound)
	if o.stop {
		living, lerr := s.Instances(ctx, false)
		err = errors.Join(err, lerr)
		for _, in := range living {
			_, serr := s.Act(ctx, in.ID, api.ActionStop)
			err = errors.Join(err, serr)
		}
	}
	log.Info("stopped")
	return err
}

// closeAll closes listeners of a daemon that does not start: what stopped it counts.
func closeAll(list []net.Listener) {
	for _, l := range list {
		l.Close()
	}
}

// open listens on the TCP addresses. With an error it returns those that it could open.
func (o *serve) open() (list []net.Listener, err error) {
	var config *tls.Config
	if o.cert != "" {
		pair, err := tls.LoadX509KeyPair(o.cert, o.key)
		if err != nil {
			return list, hostError(fmt.Errorf("load the certificate: %w", err))
		}
		config = &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}}
	}
	for _, address := range o.listen {
		l, err := net.Listen("tcp", address)
		if errors.Is(err, unix.EADDRINUSE) {
			return list, api.Errorf(api.Conflict, "listen on %s: %w", address, err).Fix("choose another address with --listen")
		}
		if err != nil {
			return list, api.Errorf(api.Unavailable, "listen on %s: %w", address, err).Fix("use an address of this host with --listen")
		}
		if config != nil {
			l = tls.NewListener(l, config)
		}
		list = append(list, l)
	}
	return list, nil
}

// listenUnix listens on a socket that only its owner, and root, can connect to. What is at
// path is the socket of a daemon that has died: a living one holds the store's lock.
func listenUnix(path string) (net.Listener, error) {
	if len(path) > 107 {
		return nil, api.Errorf(api.Unavailable, "listen on %s: the path of a unix socket has 107 bytes at most", path).Fix("choose a shorter folder with --state")
	}
	if info, err := os.Lstat(path); err == nil && info.Mode()&os.ModeSocket != 0 {
		if err := os.Remove(path); err != nil {
			return nil, hostError(err)
		}
	}
	// The state folder is its owner's alone, so the socket is never open to others.
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, hostError(fmt.Errorf("listen on the unix socket: %w", err))
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}
