package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"
)

func TestReadConfig(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"unknown", "listen = :1\nspeed = 9", `x.conf:2: there is no key "speed"`},
		{"a flag that is no key", "config = y", `there is no key "config"`},
		{"no value", "insecure", `"insecure" is not KEY = VALUE`},
		{"bad value", "insecure = perhaps", "x.conf:1: insecure = perhaps"},
		{"bad size", "\n\nmax-memory = much", "x.conf:3"},
		{"twice", "state = a\nstate = b", "the key state is there twice"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x.conf")
			require.NoError(t, os.WriteFile(path, []byte(tt.text), 0o600))
			code, _, stderr := cli(t, t.TempDir(), "serve", "--config", path)
			require.Equal(t, exitUsage, code)
			require.Contains(t, stderr, tt.want)
		})
	}
	code, _, stderr := cli(t, t.TempDir(), "serve", "--config", "/nowhere")
	require.Equal(t, exitNotFound, code, stderr)

	o := &serve{env: &environment{}}
	f := pflag.NewFlagSet("", pflag.ContinueOnError)
	f.StringVar(&o.env.state, "state", "default", "")
	o.addFlags(f)
	require.NoError(t, f.Parse([]string{"--max-instances", "5", "--listen", "127.0.0.1:1"}))
	path := filepath.Join(t.TempDir(), "x.conf")
	require.NoError(t, os.WriteFile(path, []byte("# all\n state=/s \nmax-instances = 9\nlisten = 127.0.0.1:2\nallow-url = https://a/?b=c\nallow-url = https://d/\ndrain = 3s\nlog-json = true\nmax-memory = 4G"), 0o600))
	require.NoError(t, readConfig(path, f, serveKeys))
	require.Equal(t, "/s", o.env.state)
	require.Equal(t, 5, o.maxInstances, "the command line counts more")
	require.Equal(t, []string{"127.0.0.1:1"}, o.listen)
	require.Equal(t, []string{"https://a/?b=c", "https://d/"}, o.allow)
	require.Equal(t, 3*time.Second, o.drain)
	require.True(t, o.logJSON)
	require.Equal(t, bytesFlag(4<<30), o.maxMemory)
}

// TestExampleConfig: the example is right, with and without its comments.
func TestExampleConfig(t *testing.T) {
	text, err := os.ReadFile("systemd/cloudlet.conf")
	require.NoError(t, err)
	all := regexp.MustCompile(`(?m)^#([a-z-]+ = )`).ReplaceAll(text, []byte("$1"))
	require.NotEqual(t, text, all)
	for _, text := range [][]byte{text, all} {
		env := &environment{getenv: func(string) string { return "" }}
		cmd, _, err := newRoot(env).Find([]string{"serve"})
		require.NoError(t, err)
		require.NoError(t, cmd.ParseFlags(nil))
		path := filepath.Join(t.TempDir(), "x.conf")
		require.NoError(t, os.WriteFile(path, text, 0o600))
		require.NoError(t, readConfig(path, cmd.Flags(), serveKeys))
		require.Equal(t, "/var/lib/cloudlet", env.state)
	}
	env := &environment{getenv: func(string) string { return "" }}
	cmd, _, err := newRoot(env).Find([]string{"serve"})
	require.NoError(t, err)
	require.NoError(t, cmd.ParseFlags(nil))
	for _, key := range serveKeys {
		require.NotNil(t, cmd.Flags().Lookup(key), key)
	}
}

func TestServeRefuses(t *testing.T) {
	for _, tt := range []struct {
		want string
		args []string
	}{
		{"open to other hosts", []string{"--listen", ":7300"}},
		{"open to other hosts", []string{"--listen", "0.0.0.0:7300"}},
		{"open to other hosts", []string{"--listen", "example.org:7300"}},
		{"open to other hosts", []string{"--listen", "[::]:7300"}},
		{"want HOST:PORT", []string{"--listen", "7300"}},
		{"want http://HOST:PORT", []string{"--advertise", "edge:7300"}},
		{"want http://HOST:PORT", []string{"--advertise", "ftp://edge:7300"}},
		{"want http://HOST:PORT", []string{"--advertise", "http://edge:7300/"}},
		{"want http://HOST:PORT", []string{"--advertise", "http://edge:7300?x"}},
		{"want http://HOST:PORT", []string{"--advertise", "http://me@edge:7300"}},
		{"want http://HOST:PORT", []string{"--advertise", "http://:7300"}},
		{"want http://HOST:PORT", []string{"--advertise", "http://edge:x"}},
		{"want a port", []string{"--advertise", "http://edge"}},
		{"want a port", []string{"--advertise", "http://edge:"}},
		{"want a port", []string{"--advertise", "http://edge:0"}},
		{"want a port", []string{"--advertise", "http://edge:70000"}},
		{"nobody can be reached at 0.0.0.0", []string{"--advertise", "http://0.0.0.0:7300"}},
		{"nobody can be reached at ::", []string{"--advertise", "http://[::]:7300"}},
		{"go together", []string{"--tls-cert", "x"}},
		{"cannot be negative", []string{"--max-instances", "-1"}},
		{"allow", []string{"--allow-url", "nonsense"}},
		{"leave --server", []string{"--server", "http://127.0.0.1:1"}},
	} {
		code, _, stderr := cli(t, t.TempDir(), append([]string{"serve"}, tt.args...)...)
		require.Equal(t, exitUsage, code, tt.args)
		require.Contains(t, stderr, tt.want)
	}
	for _, address := range []string{"127.0.0.1:0", "[::1]:0", "localhost:0", "127.9.9.9:1"} {
		require.NoError(t, (&serve{env: &environment{}, listen: []string{address}}).check())
	}
	require.NoError(t, (&serve{env: &environment{}, listen: []string{":1"}, insecure: true}).check())
	require.NoError(t, (&serve{env: &environment{}, listen: []string{":1"}, cert: "c", key: "k"}).check())
}

// TestReached: other cloudlets are told the first address that names a host, with the port
// that was opened, unless one is given.
func TestReached(t *testing.T) {
	for _, row := range []struct {
		name   string
		serve  serve
		want   string
		opened bool // want lacks the port that was opened
	}{
		{"nothing", serve{}, "", false},
		{"given", serve{advertise: "https://edge:1", listen: []string{"127.0.0.1:0"}}, "https://edge:1", false},
		{"given beside nothing", serve{advertise: "http://[2001:db8::1]:1"}, "http://[2001:db8::1]:1", false},
		{"no host", serve{listen: []string{":0", "0.0.0.0:0", "[::]:0"}, insecure: true}, "", false},
		{"the first host", serve{listen: []string{":0", "127.0.0.2:0", "127.0.0.1:0"}, insecure: true}, "http://127.0.0.2:", true},
		{"a name", serve{listen: []string{"localhost:0"}}, "http://localhost:", true},
	} {
		t.Run(row.name, func(t *testing.T) {
			row.serve.env = &environment{}
			require.NoError(t, row.serve.check())
			list, err := row.serve.open()
			require.NoError(t, err)
			defer closeAll(list)
			got := row.serve.reached(list)
			if row.opened {
				host, port, err := net.SplitHostPort(strings.TrimPrefix(got, "http://"))
				require.NoError(t, err)
				require.NotEqual(t, "0", port)
				got = "http://" + host + ":"
			}
			require.Equal(t, row.want, got)
		})
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	require.Equal(t, "https://"+l.Addr().String(), (&serve{cert: "c", listen: []string{"127.0.0.1:0"}}).reached([]net.Listener{l}))
}

// said is a buffer that a daemon writes while a test reads.
type said struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (s *said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

// daemon runs `cloudlet serve` on dir until the test's end, or stop, which returns its code.
func daemon(t *testing.T, dir string, more map[string]string, args ...string) (log *said, stop func() int) {
	t.Helper()
	log = &said{}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan int, 1)
	notify := filepath.Join(t.TempDir(), "n")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: notify, Net: "unixgram"})
	require.NoError(t, err)
	defer c.Close()
	go func() {
		ended <- run(ctx, &environment{
			args: append([]string{"serve"}, args...), stdin: &bytes.Buffer{}, stdout: log, stderr: log,
			getenv: func(name string) string {
				if v, ok := more[name]; ok {
					return v
				}
				return map[string]string{"CLOUDLET_STATE": dir, "NOTIFY_SOCKET": notify}[name]
			},
		})
	}()
	stop = sync.OnceValue(func() int { cancel(); return <-ended })
	t.Cleanup(func() { stop() })
	if _, own := more["NOTIFY_SOCKET"]; own {
		return log, stop
	}
	require.NoError(t, c.SetReadDeadline(time.Now().Add(20*time.Second)))
	buf := make([]byte, 256)
	n, err := c.Read(buf)
	require.NoError(t, err, "not ready: %s", log)
	require.Contains(t, string(buf[:n]), "READY=1\n")
	return log, stop
}

// TestDaemon: commands find the daemon by its socket, others by TCP and a token; a second one
// is refused; its end and start leave all in place.
func TestDaemon(t *testing.T) {
	dir := t.TempDir()
	log, stop := daemon(t, dir, nil, "--listen", "127.0.0.1:0", "-v")
	address := "http://" + regexp.MustCompile(`address=(127\.0\.0\.1:\d+)`).FindStringSubmatch(log.String())[1]

	info, err := os.Stat(filepath.Join(dir, "tokens"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode())
	require.Contains(t, log.String(), filepath.Join(dir, "tokens"))
	info, err = os.Stat(filepath.Join(dir, socketName))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
	text, err := os.ReadFile(filepath.Join(dir, "tokens"))
	require.NoError(t, err)
	token := regexp.MustCompile(`(?m)^operate \S+ (\S+)$`).FindSubmatch(text)
	require.NotEmpty(t, token)
	require.NotContains(t, log.String(), string(token[1]), "no token in the log")

	code, stdout, stderr := cli(t, dir, "ps", "--json")
	require.Zero(t, code, stderr)
	require.Equal(t, "[]\n", stdout)
	code, _, stderr = cli(t, dir, "base", "show", "x")
	require.Equal(t, exitNotFound, code, stderr)
	require.Contains(t, stderr, `no base "x"`)

	code, stdout, stderr = cli(t, t.TempDir(), "ps", "--json", "--server", address, "--token-file", filepath.Join(dir, "tokens"))
	require.Zero(t, code, stderr)
	require.Equal(t, "[]\n", stdout)
	code, _, stderr = cli(t, t.TempDir(), "ps", "--server", address)
	require.NotZero(t, code)
	require.Contains(t, stderr, "token")
	code, _, stderr = cli(t, t.TempDir(), "ps", "--server", "unix:"+filepath.Join(dir, socketName))
	require.Zero(t, code, stderr)

	for _, args := range [][]string{
		{"run", "./serve.go"}, {"base", "create", "disk", "--settle", "1s"}, {"overlay", "verify", "./serve.go"},
	} {
		code, _, stderr = cli(t, t.TempDir(), append(args, "--server", address, "--token-file", filepath.Join(dir, "tokens"))...)
		require.Equal(t, exitUsage, code, stderr)
		require.Contains(t, stderr, "does not see")
	}
	for _, args := range [][]string{{"doctor"}, {"mount", "x", "y"}} {
		code, _, stderr = cli(t, t.TempDir(), append(args, "--server", address)...)
		require.Equal(t, exitUsage, code, stderr)
		require.Contains(t, stderr, "this host only")
	}

	code, _, stderr = cli(t, dir, "serve")
	require.Equal(t, exitConflict, code, stderr)
	require.FileExists(t, filepath.Join(dir, socketName))
	code, _, stderr = cli(t, dir, "ps")
	require.Zero(t, code, stderr)

	require.Zero(t, stop(), log)
	require.NoFileExists(t, filepath.Join(dir, socketName))
	code, _, stderr = cli(t, dir, "ps")
	require.Zero(t, code, stderr)

	// The socket of a daemon that was killed is replaced.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, socketName), Net: "unix"})
	require.NoError(t, err)
	l.SetUnlinkOnClose(false)
	require.NoError(t, l.Close())
	code, _, stderr = cli(t, dir, "ps")
	require.Zero(t, code, stderr)
	log, stop = daemon(t, dir, nil)
	require.Zero(t, stop(), log)
	again, err := os.ReadFile(filepath.Join(dir, "tokens"))
	require.NoError(t, err)
	require.Equal(t, text, again)
}

// TestServeTLS serves TCP with a certificate, and nothing without TLS there.
func TestServeTLS(t *testing.T) {
	dir := t.TempDir()
	cert, key, pool := certificate(t)
	log, stop := daemon(t, dir, nil, "--listen", "0.0.0.0:0", "--tls-cert", cert, "--tls-key", key, "-v")
	port := regexp.MustCompile(`network=tcp address=\S*:(\d+)`).FindStringSubmatch(log.String())[1]
	token, err := readToken(filepath.Join(dir, "tokens"))
	require.NoError(t, err)
	for _, h2 := range []bool{false, true} {
		transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, ForceAttemptHTTP2: h2}
		c, err := client.New(client.Options{Server: "https://127.0.0.1:" + port, Token: token, Transport: transport})
		require.NoError(t, err)
		list, err := c.Bases(t.Context())
		require.NoError(t, err)
		require.Empty(t, list)
		resp, err := transport.RoundTrip(httptest.NewRequestWithContext(t.Context(), "GET", "https://127.0.0.1:"+port+"/healthz", nil))
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		require.Equal(t, h2, resp.ProtoMajor == 2)
		c.Close()
		transport.CloseIdleConnections()
	}
	code, _, stderr := cli(t, t.TempDir(), "ps", "--server", "https://127.0.0.1:"+port, "--token-file", filepath.Join(dir, "tokens"))
	require.Equal(t, exitUnavailable, code)
	require.Contains(t, stderr, "certificate")
	code, _, _ = cli(t, t.TempDir(), "ps", "--server", "http://127.0.0.1:"+port, "--token-file", filepath.Join(dir, "tokens"))
	require.NotZero(t, code)
	require.Zero(t, stop(), log)

	code, _, stderr = cli(t, dir, "serve", "--listen", "127.0.0.1:0", "--tls-cert", key, "--tls-key", cert)
	require.NotZero(t, code)
	require.Contains(t, stderr, "load the certificate")
	require.NoFileExists(t, filepath.Join(dir, socketName))
}

// certificate makes a certificate for 127.0.0.1, its key, and a pool that trusts it.
func certificate(t *testing.T) (cert, key string, pool *x509.CertPool) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	require.NoError(t, err)
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	require.NoError(t, err)
	cert, key = filepath.Join(t.TempDir(), "cert"), filepath.Join(t.TempDir(), "key")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	require.NoError(t, os.WriteFile(cert, text, 0o600))
	require.NoError(t, os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600))
	pool = x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM(text))
	return cert, key, pool
}

func TestServeLongPath(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("x", 110))
	code, _, stderr := cli(t, dir, "serve")
	require.Equal(t, exitUnavailable, code, stderr)
	require.Contains(t, stderr, "--state")
	code, _, stderr = cli(t, dir, "ps")
	require.Zero(t, code, stderr)
}

// TestNotify: the service manager hears of start, life and end, in this order.
func TestNotify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "n")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	require.NoError(t, err)
	defer c.Close()
	log, stop := daemon(t, t.TempDir(), map[string]string{"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "20000"})
	hear := func() string {
		require.NoError(t, c.SetReadDeadline(time.Now().Add(20*time.Second)))
		buf := make([]byte, 256)
		n, err := c.Read(buf)
		require.NoError(t, err, log)
		return string(buf[:n])
	}
	require.Contains(t, hear(), "READY=1")
	require.Equal(t, "WATCHDOG=1", hear())
	require.Equal(t, "WATCHDOG=1", hear())
	require.Zero(t, stop())
	for said := ""; !strings.Contains(said, "STOPPING=1"); {
		said = hear()
	}

	var out bytes.Buffer
	n := &notifier{socket: "@nobody-listens-" + filepath.Base(t.TempDir()), log: slog.New(slog.NewTextHandler(&out, nil))}
	n.tell("READY=1")
	require.Contains(t, out.String(), "refused", "it is reported, and no failure")
	require.False(t, answers(http.NotFoundHandler()))
}

func TestReadToken(t *testing.T) {
	for text, want := range map[string]string{"abc": "abc", "abc\n": "abc", "# x\n\noperate me abc\nread you def\n": "abc"} {
		path := filepath.Join(t.TempDir(), "t")
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		token, err := readToken(path)
		require.NoError(t, err)
		require.Equal(t, want, token)
	}
	_, err := readToken("/nowhere")
	require.Equal(t, api.NotFound, api.CodeOf(err))
	_, err = readToken("/dev/null")
	require.Equal(t, api.Invalid, api.CodeOf(err))
}

func TestOutput(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "o")
	require.NoError(t, os.WriteFile(path, []byte("old"), 0o600))
	f, err := newOutput(path)
	require.NoError(t, err)
	fmt.Fprint(f, "half")
	require.ErrorIs(t, f.finish(context.Canceled), context.Canceled)
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "old", string(text))

	f, err = newOutput(path)
	require.NoError(t, err)
	fmt.Fprint(f, "new")
	require.NoError(t, f.finish(nil))
	text, err = os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "new", string(text))
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 1)

	_, err = newOutput(filepath.Join(dir, "none", "o"))
	require.Equal(t, api.NotFound, api.CodeOf(err))
}

// TestRef: the store counts before a file of the same name, ./NAME means the file.
func TestRef(t *testing.T) {
	t.Chdir(t.TempDir())
	here, err := os.Getwd()
	require.NoError(t, err)
	require.NoError(t, os.WriteFile("app", nil, 0o600))
	require.NoError(t, os.Mkdir("folder", 0o700))
	stored := func(names ...string) func(context.Context, string) error {
		return func(_ context.Context, ref string) error {
			if slices.Contains(names, ref) {
				return nil
			}
			return api.Errorf(api.NotFound, "no %s", ref)
		}
	}
	s := &session{}
	for _, tt := range []struct{ ref, want string }{
		{"app", here + "/app"}, {"./app", here + "/app"}, {"folder", "folder"}, {"none", "none"}, {"./none", here + "/none"},
		{"/a/b", "/a/b"}, {"http://h/app", "http://h/app"}, {"file:///app", "file:///app"},
	} {
		got, err := s.ref(t.Context(), tt.ref, stored(), stored())
		require.NoError(t, err)
		require.Equal(t, tt.want, got)
	}
	got, err := s.ref(t.Context(), "app", stored(), stored("app"))
	require.NoError(t, err)
	require.Equal(t, "app", got)
	got, err = s.ref(t.Context(), "app", func(context.Context, string) error { return api.Errorf(api.Damaged, "broken") })
	require.NoError(t, err)
	require.Equal(t, "app", got, "it is in the store, whatever is wrong with it")

	s.remote = "http://elsewhere"
	_, err = s.ref(t.Context(), "app", stored())
	require.ErrorContains(t, err, "does not see app")
	got, err = s.ref(t.Context(), "none", stored())
	require.NoError(t, err)
	require.Equal(t, "none", got)
}
