package service

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path"
	"slices"
	"strings"
	"time"

	"cloudlet/api"
	"cloudlet/overlay/source"
)

// allowRule is one of Config.AllowURLs, parsed.
type allowRule struct {
	scheme, host string // host with its port
	path         string // this path, and what is below it
	private      bool   // also at private addresses
}

// allowList says which URLs may be read. A nil list allows all, an empty one none.
type allowList struct {
	rules  []allowRule
	lookup func(ctx context.Context, host string) ([]netip.Addr, error)
	dial   func(ctx context.Context, network, addr string) (net.Conn, error)
}

// newAllowList parses rules; nil ones give a nil list.
func newAllowList(rules []string) (*allowList, error) {
	if rules == nil {
		return nil, nil
	}
	dialer := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
	a := &allowList{dial: dialer.DialContext, lookup: func(ctx context.Context, host string) ([]netip.Addr, error) {
		return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	}}
	for _, text := range rules {
		r, err := parseRule(text)
		if err != nil {
			return nil, err
		}
		a.rules = append(a.rules, r)
	}
	return a, nil
}

func parseRule(text string) (r allowRule, err error) {
	bad := func(why string) error {
		return api.Errorf(api.Invalid, "allow rule %q: %s", text, why).Fix("write https://HOST[:PORT]/PATH, or private+https://... for hosts at private addresses")
	}
	rest, private := strings.CutPrefix(text, "private+")
	u, err := url.Parse(rest)
	switch {
	case err != nil:
		return r, bad("it is no URL")
	case u.Scheme != "http" && u.Scheme != "https":
		return r, bad("its scheme is neither http nor https")
	case u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "":
		return r, bad("it must have a host and no user, query or fragment")
	}
	p, err := plainPath(u)
	if err != nil {
		return r, bad(err.Error())
	}
	return allowRule{scheme: u.Scheme, host: hostPort(u), path: p, private: private}, nil
}

// hostPort returns the host in lower case, with its port.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return net.JoinHostPort(strings.TrimSuffix(strings.ToLower(u.Hostname()), "."), port)
}

// plainPath returns the path of a URL, and an error if a server might take it for another:
// with dot segments, encoded separators or double slashes.
func plainPath(u *url.URL) (string, error) {
	p := u.Path
	if p == "" {
		p = "/"
	}
	raw := strings.ToLower(u.EscapedPath())
	if strings.Contains(raw, "%2f") || strings.Contains(raw, "%5c") || strings.ContainsAny(p, "\\\x00") {
		return "", errors.New("its path has encoded separators")
	}
	if clean := path.Clean(p); clean != p && clean+"/" != p {
		return "", errors.New("its path has dot segments or empty ones")
	}
	return p, nil
}

// covers reports whether the rule's path is p or a folder that p lies in.
func (r allowRule) covers(p string) bool {
	if strings.HasSuffix(r.path, "/") {
		return strings.HasPrefix(p, r.path)
	}
	return p == r.path || strings.HasPrefix(p, r.path+"/")
}

// check returns an error for a URL that no rule allows.
func (a *allowList) check(u *url.URL) error {
	shown := u.Scheme + "://" + u.Host + u.EscapedPath()
	refuse := func(why string) error {
		return api.Errorf(api.Invalid, "the URL %.200q is not allowed: %s", shown, why).Fix("use one that the operator allows with --allow-url, or upload the file")
	}
	if u.User != nil {
		return refuse("it has a user name")
	}
	p, err := plainPath(u)
	if err != nil {
		return refuse(err.Error())
	}
	host := hostPort(u)
	for _, r := range a.rules {
		if r.scheme == u.Scheme && r.host == host && r.covers(p) {
			return nil
		}
	}
	return refuse("no rule covers it")
}

// connect dials a host and port of a checked URL. The name is resolved here, once, and what
// is dialled is the address that was judged, so that a name cannot point elsewhere later.
func (a *allowList) connect(ctx context.Context, network, addr string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, err
	}
	private := slices.ContainsFunc(a.rules, func(r allowRule) bool {
		ruleHost, _, _ := net.SplitHostPort(r.host)
		_, literal := netip.ParseAddr(ruleHost)
		return r.host == net.JoinHostPort(strings.TrimSuffix(strings.ToLower(host), "."), port) && (r.private || literal == nil)
	})
	addrs := []netip.Addr{}
	if ip, perr := netip.ParseAddr(host); perr == nil {
		addrs = append(addrs, ip)
	} else if addrs, err = a.lookup(ctx, host); err != nil {
		return nil, err
	}
	err = fmt.Errorf("%s has no address", host)
	for _, ip := range addrs {
		ip = ip.Unmap()
		if !private && !public(ip) {
			return nil, source.Permanent(api.Errorf(api.Invalid, "%s is at %s, which is not a public address", host, ip).Fix("the operator can allow it with a rule that begins with private+"))
		}
		var conn net.Conn
		if conn, err = a.dial(ctx, network, netip.AddrPortFrom(ip, portNumber(port)).String()); err == nil {
			return conn, nil
		}
	}
	return nil, err
}

func portNumber(port string) uint16 {
	n, err := net.LookupPort("tcp", port) // digits: nothing is looked up
	if err != nil {
		return 0
	}
	return uint16(n)
}

// closed are the ranges that netip has no word for: carrier-grade NAT, protocol assignments,
// documentation, benchmarks, reserved, and IPv6 prefixes in which IPv4 addresses hide.
var closed = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("100.64.0.0/10"), netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("198.51.100.0/24"),
	netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("240.0.0.0/4"), netip.MustParsePrefix("64:ff9b::/96"),
	netip.MustParsePrefix("64:ff9b:1::/48"), netip.MustParsePrefix("2002::/16"), netip.MustParsePrefix("2001::/32"), netip.MustParsePrefix("::/96"),
}

// public reports whether an address is one of the open internet.
func public(ip netip.Addr) bool {
	if !ip.IsGlobalUnicast() || ip.IsPrivate() || ip.IsLoopback() || ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip.Zone() != "" {
		return false
	}
	return !slices.ContainsFunc(closed, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// rules returns what a caller's URLs must pass: nil for a local one, who may name any.
func (s *Service) rules(c Caller) []string {
	if c.Local {
		return nil
	}
	return append([]string{}, s.cfg.AllowURLs...)
}

// checkURL refuses a URL of a caller's request at once.
func (s *Service) checkURL(c Caller, field, ref string) error {
	a, err := newAllowList(s.rules(c))
	if err != nil || a == nil {
		return err
	}
	u, err := url.Parse(ref)
	if err != nil {
		return invalid(field, "the URL %.200q cannot be read", ref)
	}
	var e *api.Error
	if errors.As(a.check(u), &e) {
		e.Field = field
		return e
	}
	return nil
}

// openSource opens a path or URL. With rules (not nil) it must be a URL that they allow. spool
// is a folder for what a server without ranges sends.
func openSource(ctx context.Context, ref string, rules []string, spool string) (source.Source, error) {
	return link{Source: ref, Allow: rules}.open(ctx, spool)
}

// open opens the overlay of a link. A file of the store needs no rule.
func (l link) open(ctx context.Context, spool string) (source.Source, error) {
	if l.Upload > 0 {
		return source.OpenGrowing(l.Source, l.Upload)
	}
	a, err := newAllowList(l.Allow)
	if err != nil {
		return nil, err
	}
	if !isRemote(l.Source) && a == nil {
		return source.Open(ctx, l.Source)
	}
	o := source.HTTPOptions{Spool: spool, Keep: l.keep, Beginning: l.Beginning}
	if a != nil {
		o.Check, o.Dial = a.check, a.connect
	}
	h, err := source.OpenHTTP(ctx, l.Source, o)
	if err != nil {
		return nil, err
	}
	return h, nil
}

// invalid is an error about a field of a request.
func invalid(field, format string, args ...any) *api.Error {
	err := api.Errorf(api.Invalid, format, args...)
	err.Field = field
	return err
}
