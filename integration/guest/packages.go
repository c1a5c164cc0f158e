package guest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// debian is one Debian package that the guest is made from; file is empty for the package
// that only names the kernel's.
type debian struct {
	name, version, arch, file string
}

const (
	kernelMeta     = "linux-image-cloud-amd64"
	busyboxPackage = "busybox-static"
	aptRemedy      = "apt-get update as root, and check that a Debian mirror for amd64 is reachable"
)

// packages resolves the current packages and downloads them, or finds them downloaded.
func (b builder) packages(ctx context.Context) ([]debian, error) {
	meta, kernel, err := b.kernelPackage(ctx)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(b.outDir, "packages")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	all := []debian{meta}
	for _, name := range []string{kernel, busyboxPackage} {
		p, err := b.download(ctx, dir, name)
		if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
	return all, nil
}

// kernelPackage returns the package that names the current cloud kernel, and its name.
func (b builder) kernelPackage(ctx context.Context) (meta debian, kernel string, err error) {
	text, err := b.run(ctx, aptRemedy, "apt-cache", "show", "--no-all-versions", kernelMeta)
	if err != nil {
		return debian{}, "", err
	}
	fields := parseControl(text)
	kernel, _, _ = strings.Cut(fields["Depends"], " ")
	kernel = strings.TrimSuffix(kernel, ",")
	if !strings.HasPrefix(kernel, "linux-image-") {
		return debian{}, "", fmt.Errorf("resolve %s: it depends on %q, want a linux-image package (remedy: %s)",
			kernelMeta, fields["Depends"], aptRemedy)
	}
	return debian{name: kernelMeta, version: fields["Version"], arch: fields["Architecture"]}, kernel, nil
}

// download fetches the newest version of a package into dir; apt-get compares a file that
// is there already with the mirror's hash and keeps it.
func (b builder) download(ctx context.Context, dir, name string) (debian, error) {
	text, err := b.run(ctx, aptRemedy, "apt-cache", "show", "--no-all-versions", name)
	if err != nil {
		return debian{}, err
	}
	fields := parseControl(text)
	p := debian{name: name, version: fields["Version"], arch: fields["Architecture"]}
	fmt.Fprintf(b.log, "test guest: fetching %s %s\n", p.name, p.version)
	// The colon of an epoch is percent-encoded in apt's file names.
	p.file = filepath.Join(dir, fmt.Sprintf("%s_%s_%s.deb", p.name, strings.ReplaceAll(p.version, ":", "%3a"), p.arch))
	if sum, err := hashFile(p.file); err == nil && sum == fields["SHA256"] {
		return p, nil
	}
	// Without the option, apt-get as root downloads as a user who may not enter dir.
	cmd := []string{"apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", "-o", "Dir::Cache::archives=" + b.work,
		p.name + "=" + p.version}
	if _, err := b.run(ctx, aptRemedy, cmd...); err != nil {
		return debian{}, err
	}
	fetched := filepath.Join(b.work, filepath.Base(p.file))
	sum, err := hashFile(fetched)
	if err != nil {
		return debian{}, err
	}
	if sum != fields["SHA256"] {
		return debian{}, fmt.Errorf("verify package %s: SHA-256 %s, want %s (remedy: %s)", p.name, sum, fields["SHA256"], aptRemedy)
	}
	return p, os.Rename(fetched, p.file)
}

// parseControl reads the one-line fields of the first paragraph of a Debian control file.
func parseControl(text string) map[string]string {
	fields := map[string]string{}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if line == "" {
			break
		}
		if name, value, ok := strings.Cut(line, ":"); ok && !strings.HasPrefix(line, " ") {
			fields[name] = strings.TrimSpace(value)
		}
	}
	return fields
}

// writePackages lists the packages, one a line.
func writePackages(name string, packages []debian) error {
	var list strings.Builder
	for _, p := range packages {
		sum := "-"
		if p.file != "" {
			var err error
			if sum, err = hashFile(p.file); err != nil {
				return err
			}
		}
		fmt.Fprintln(&list, p.name, p.version, p.arch, sum)
	}
	return os.WriteFile(name, []byte(list.String()), 0o644)
}

func hashFile(name string) (sum string, err error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("read %s: %w", name, err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
