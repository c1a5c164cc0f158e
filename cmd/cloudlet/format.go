package main

import (
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"cloudlet/api"
)

// table writes rows in columns, the first row being the heads.
func table(w io.Writer, rows [][]string) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		fmt.Fprintln(t, strings.Join(r, "\t"))
	}
	t.Flush() // errors of w show at the next write to it, and nobody reads half a table
}

// size writes a number of bytes for people.
func size(n int64) string {
	v, units := float64(n), []string{"B", "KiB", "MiB", "GiB", "TiB"}
	for v >= 1024 && len(units) > 1 {
		v, units = v/1024, units[1:]
	}
	if v >= 100 || units[0] == "B" {
		return fmt.Sprintf("%.0f %s", v, units[0])
	}
	return fmt.Sprintf("%.1f %s", v, units[0])
}

// parseBytes reads a size with an optional unit: 256M, 1G, 1073741824.
func parseBytes(text string) (int64, error) {
	digits := strings.TrimRight(text, "KMGTiB")
	unit := int64(1)
	switch strings.TrimSuffix(strings.TrimSuffix(text[len(digits):], "B"), "i") {
	case "":
	case "K":
		unit = 1 << 10
	case "M":
		unit = 1 << 20
	case "G":
		unit = 1 << 30
	case "T":
		unit = 1 << 40
	default:
		unit = 0
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || unit == 0 || n < 0 || n > (1<<62)/unit {
		return 0, fmt.Errorf("size %q: want a number with K, M, G or T, like 512M", text)
	}
	return n * unit, nil
}

// bytesFlag is a size as a flag.
type bytesFlag int64

func (b *bytesFlag) String() string {
	return strings.ReplaceAll(strings.TrimSuffix(size(int64(*b)), "iB"), " ", "")
}
func (b *bytesFlag) Type() string { return "size" }
func (b *bytesFlag) Set(text string) error {
	n, err := parseBytes(text)
	*b = bytesFlag(n)
	return err
}

// forwardsFlag is a list of [[ADDR:]HOST:]GUEST.
type forwardsFlag []api.Forward

func (f *forwardsFlag) String() string { return "" }
func (f *forwardsFlag) Type() string   { return "[[ADDR:]HOST:]GUEST" }
func (f *forwardsFlag) Set(text string) error {
	bad := fmt.Errorf("port %q: want GUEST, HOST:GUEST or ADDR:HOST:GUEST, ports 1 to 65535 (HOST 0 or empty: a free one)", text)
	parts := strings.Split(text, ":")
	if len(parts) > 3 {
		return bad
	}
	var out api.Forward
	var err error
	if out.Guest, err = strconv.Atoi(parts[len(parts)-1]); err != nil || out.Guest < 1 || out.Guest > 65535 {
		return bad
	}
	if len(parts) > 1 && parts[len(parts)-2] != "" {
		if out.Host, err = strconv.Atoi(parts[len(parts)-2]); err != nil || out.Host < 0 || out.Host > 65535 {
			return bad
		}
	}
	if len(parts) == 3 {
		if ip := net.ParseIP(parts[0]); ip == nil || ip.To4() == nil {
			return fmt.Errorf("port %q: %q is not an IPv4 address", text, parts[0])
		}
		out.Address = parts[0]
	}
	*f = append(*f, out)
	return nil
}

// probeFlag is PORT/PATH.
type probeFlag struct{ *api.Probe }

func (p *probeFlag) String() string { return "" }
func (p *probeFlag) Type() string   { return "PORT/PATH" }
func (p *probeFlag) Set(text string) error {
	port, path, _ := strings.Cut(text, "/")
	n, err := strconv.Atoi(port)
	if err != nil || n < 1 || n > 65535 {
		return fmt.Errorf("probe %q: want PORT/PATH, like 8080/healthz", text)
	}
	p.Probe = &api.Probe{Port: n, Path: "/" + path}
	return nil
}

func short(id string) string { return id[:min(12, len(id))] }

func age(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	d := time.Since(t)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}
