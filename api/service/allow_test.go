package service

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/overlay/source"

	"github.com/stretchr/testify/require"
)

func TestAllowRules(t *testing.T) {
	a, err := newAllowList([]string{"https://depot.example.org/overlays", "http://plain.example.org:8080/a/", "private+https://10.1.2.3:8443/", "https://all.example.org"})
	require.NoError(t, err)
	for _, tt := range []struct {
		url string
		ok  bool
	}{
		{"https://depot.example.org/overlays/app", true},
		{"https://DEPOT.example.org:443/overlays/app?sig=1", true},
		{"https://depot.example.org./overlays", true},
		{"https://depot.example.org/overlays2/app", false},
		{"https://depot.example.org/", false},
		{"http://depot.example.org/overlays/app", false},
		{"https://depot.example.org:444/overlays/app", false},
		{"https://depot.example.org/overlays/../secret", false},
		{"https://depot.example.org/overlays/%2e%2e/secret", false},
		{"https://depot.example.org/overlays/..%2fsecret", false},
		{"https://depot.example.org/overlays/x%5c..%5csecret", false},
		{"https://depot.example.org/overlays//app", false},
		{"https://user@depot.example.org/overlays/app", false},
		{"https://depot.example.org@evil.org/overlays/app", false},
		{"https://evil.org/https://depot.example.org/overlays/app", false},
		{"https://depot.example.org.evil.org/overlays/app", false},
		{"http://plain.example.org:8080/a/x", true},
		{"http://plain.example.org:8080/a", false},
		{"http://plain.example.org/a/x", false},
		{"https://10.1.2.3:8443/x", true},
		{"https://all.example.org/any/thing", true},
		{"https://all.example.org", true},
		{"file:///etc/passwd", false},
		{"ftp://all.example.org/x", false},
	} {
		u, err := url.Parse(tt.url)
		require.NoError(t, err)
		err = a.check(u)
		require.Equal(t, tt.ok, err == nil, "%s: %v", tt.url, err)
		if err != nil {
			require.Equal(t, api.Invalid, api.CodeOf(err))
		}
	}
	for _, rule := range []string{"", "example.org", "ftp://example.org/", "https://", "https://u@example.org/", "https://example.org/?q", "https://example.org/a/../b", "private+file:///etc"} {
		_, err := newAllowList([]string{rule})
		require.Equal(t, api.Invalid, api.CodeOf(err), rule)
		_, err = Open(t.Context(), Config{Dir: t.TempDir(), AllowURLs: []string{rule}})
		require.Equal(t, api.Invalid, api.CodeOf(err), rule)
	}
}

func TestPublicAddresses(t *testing.T) {
	for addr, want := range map[string]bool{
		"8.8.8.8": true, "2606:4700::1": true, "127.0.0.1": false, "127.8.8.8": false, "::1": false, "0.0.0.0": false, "10.0.0.1": false, "172.16.0.1": false,
		"192.168.1.1": false, "169.254.169.254": false, "fe80::1": false, "fc00::1": false, "224.0.0.1": false, "ff02::1": false,
		"100.64.0.1": false, "::ffff:127.0.0.1": false, "64:ff9b::7f00:1": false, "2002:7f00:1::": false, "255.255.255.255": false, "198.18.0.1": false,
	} {
		require.Equal(t, want, public(netip.MustParseAddr(addr).Unmap()), addr)
	}
}

// TestRebinding: the address that is dialled is the one that was judged, at each connection.
func TestRebinding(t *testing.T) {
	a, err := newAllowList([]string{"http://depot.example.org/", "private+http://inner.example.org/", "http://127.0.0.1:81/"})
	require.NoError(t, err)
	answers := [][]string{{"8.8.8.8"}, {"127.0.0.1"}, {"169.254.169.254", "8.8.8.8"}, {"::ffff:10.0.0.1"}, {}}
	asked := 0
	a.lookup = func(_ context.Context, host string) (out []netip.Addr, err error) {
		for _, s := range answers[asked%len(answers)] {
			out = append(out, netip.MustParseAddr(s))
		}
		asked++
		return out, nil
	}
	var dialled []string
	a.dial = func(_ context.Context, _, addr string) (net.Conn, error) {
		dialled = append(dialled, addr)
		c, _ := net.Pipe()
		return c, nil
	}
	connect := func(addr string) error {
		c, err := a.connect(t.Context(), "tcp", addr)
		if err == nil {
			require.NoError(t, c.Close())
		}
		return err
	}
	require.NoError(t, connect("depot.example.org:80"))
	for range 4 { // the name has come to mean something else
		require.Error(t, connect("depot.example.org:80"))
	}
	require.Equal(t, []string{"8.8.8.8:80"}, dialled)
	require.Equal(t, 5, asked, "resolved once a connection")

	asked = 1
	require.NoError(t, connect("INNER.example.org.:80"), "the rule says private")
	require.NoError(t, connect("127.0.0.1:81"), "the rule names the address")
	require.Error(t, connect("127.0.0.1:82"))
	require.Error(t, connect("inner.example.org:81"), "another port is another rule")
	require.Equal(t, []string{"8.8.8.8:80", "127.0.0.1:80", "127.0.0.1:81"}, dialled)
}

// TestRedirects: rules are held against the target of a redirect before it is asked, and a
// refusal is not tried again.
func TestRedirects(t *testing.T) {
	var asked []string
	content := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Host+r.URL.Path)
		if to := r.URL.Query().Get("to"); to != "" {
			http.Redirect(w, r, to, http.StatusFound)
			return
		}
		w.Header().Set("ETag", `"1"`)
		http.ServeContent(w, r, "o", time.Time{}, strings.NewReader("content"))
	}))
	defer content.Close()
	addr := content.Listener.Addr().String()
	_, port, err := net.SplitHostPort(addr)
	require.NoError(t, err)

	a, err := newAllowList([]string{"private+http://a.example.org:" + port + "/ok", "http://b.example.org:" + port + "/", "http://127.0.0.1:" + port + "/ok"})
	require.NoError(t, err)
	a.lookup = func(context.Context, string) ([]netip.Addr, error) {
		return []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil
	}
	open := func(ref string) error {
		asked = nil
		src, err := source.OpenHTTP(t.Context(), ref, source.HTTPOptions{Check: a.check, Dial: a.connect})
		if err == nil {
			require.NoError(t, src.Close())
		}
		return err
	}
	at := func(host, path, to string) string {
		u := "http://" + host + ":" + port + path
		if to != "" {
			u += "?to=" + url.QueryEscape(to)
		}
		return u
	}
	require.NoError(t, open(at("a.example.org", "/ok", "")))
	require.NoError(t, open(at("a.example.org", "/ok", at("127.0.0.1", "/ok/x", ""))))
	require.Len(t, asked, 2)
	for name, ref := range map[string]string{
		"a path without a rule":       at("a.example.org", "/ok", at("a.example.org", "/secret", "")),
		"a host without a rule":       at("a.example.org", "/ok", "http://169.254.169.254/latest/meta-data"),
		"another scheme":              at("a.example.org", "/ok", "file:///etc/passwd"),
		"a host at a private address": at("a.example.org", "/ok", at("b.example.org", "/", "")),
	} {
		err := open(ref)
		require.Error(t, err, name)
		require.Len(t, asked, 1, "%s: refused at once: %v", name, asked)
	}
	require.Equal(t, api.Invalid, api.CodeOf(fail(open(at("b.example.org", "/", "")))))
	require.Empty(t, asked)
	require.Equal(t, api.Invalid, api.CodeOf(fail(open(at("c.example.org", "/", "")))))
}

// TestAllowInMount: the rules reach the mount process, by its spec, and the instance's record.
func TestAllowInMount(t *testing.T) {
	s := newService(t)
	id, content := overlayBytes(t, s)
	var asked []string
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.Path)
		if r.URL.Path == "/ok/away" {
			http.Redirect(w, r, "/secret", http.StatusFound)
			return
		}
		w.Header().Set("ETag", `"1"`)
		http.ServeContent(w, r, "o", time.Time{}, strings.NewReader(string(content)))
	}))
	defer web.Close()
	remote := Caller{Name: "peer"}
	s = reopen(t, s, func(c *Config) { c.AllowURLs = []string{web.URL + "/ok"} })
	base, at, err := s.findLaunchFor(remote, web.URL+"/ok/o")
	require.NoError(t, err)
	l, err := s.openFound(t.Context(), base, at)
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "spec.json")
	require.NoError(t, writeJSON(path, l.spec("/nowhere", 0)))
	r, lk, err := s.newRecord(t.Context(), newID(), api.Run{}, l, nil)
	require.NoError(t, err)
	lk.unlock()
	require.NoError(t, l.close())

	spec, err := ReadMountSpec(path)
	require.NoError(t, err)
	require.Equal(t, id, spec.Links[0].ID)
	require.Equal(t, s.cfg.AllowURLs, spec.Links[0].Allow)
	require.EqualValues(t, len(content), spec.Links[0].Size)
	var closers []func() error
	im, err := openSpec(t.Context(), spec, func(f func() error) { closers = append(closers, f) })
	require.NoError(t, err)
	require.Equal(t, id, im.ID().String())
	spec.Links[0].Allow = []string{} // not nil: nothing is allowed
	require.NoError(t, writeJSON(path, spec))
	spec, err = ReadMountSpec(path)
	require.NoError(t, err)
	_, err = openSpec(t.Context(), spec, func(f func() error) { closers = append(closers, f) })
	require.Equal(t, api.Invalid, api.CodeOf(err))
	for i := len(closers) - 1; i >= 0; i-- {
		require.NoError(t, closers[i]())
	}
	kept, err := s.readRecord(r.ID)
	require.NoError(t, err)
	require.Equal(t, s.cfg.AllowURLs, kept.Links[0].Allow)

	op, err := s.Submit(t.Context(), remote, api.ImportOverlay{Source: web.URL + "/ok/o"})
	require.NoError(t, err)
	require.Equal(t, api.OperationDone, awaitEnd(t, s, op.ID).State)
	_, err = s.Submit(t.Context(), remote, api.ImportOverlay{Source: web.URL + "/other"})
	require.Equal(t, api.Invalid, api.CodeOf(err))
	// What is allowed leads to what is not: every kind of operation stops there.
	ref := web.URL + "/ok/away"
	for _, req := range []any{
		api.ImportOverlay{Source: ref}, api.ImportBase{Source: ref}, VerifyOverlay{api.Verify{Ref: ref}},
		api.Run{Ref: ref}, api.Profile{Ref: ref, Probes: []api.Probe{{Port: 80}}},
	} {
		op, err := s.Submit(t.Context(), remote, req)
		require.NoError(t, err)
		end := awaitEnd(t, s, op.ID)
		require.Equal(t, api.OperationFailed, end.State, "%T", req)
		require.Equal(t, api.Invalid, end.Error.Code, "%T: %v", req, end.Error)
		require.Contains(t, end.Error.Detail, "/secret", "%T", req)
	}
	_, err = s.OverlayFor(t.Context(), remote, ref)
	require.Equal(t, api.Invalid, api.CodeOf(err))
	require.NotContains(t, asked, "/secret")
}
