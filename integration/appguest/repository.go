package appguest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"cloudlet/integration/product"
)

// writeRepository makes dir a flat apt repository of the package files: hard links beside
// an index. It returns lines for the package list.
func writeRepository(ctx context.Context, dir, archives string, packages []debian, use string) (string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	var index, list strings.Builder
	for _, p := range packages {
		from := filepath.Join(archives, p.file)
		control, err := product.Run(ctx, exec.CommandContext(ctx, "dpkg-deb", "-f", from), "remove "+from+", then run the same command again")
		if err != nil {
			return "", err
		}
		sum, size, err := hashFile(from)
		if err != nil {
			return "", err
		}
		name := urlName(p.file)
		if err := os.Link(from, filepath.Join(dir, name)); err != nil {
			return "", err
		}
		fmt.Fprintf(&index, "%s\nFilename: ./%s\nSize: %d\nSHA256: %s\n\n", strings.TrimSpace(control), name, size, sum)
		fmt.Fprintln(&list, field(control, "Package"), field(control, "Version"), field(control, "Architecture"), sum, use)
	}
	// With a Release file apt asks for the index once, not for each way to compress it.
	sum := sha256.Sum256([]byte(index.String()))
	release := fmt.Sprintf("Origin: Debian\nSHA256:\n %x %d Packages\n", sum, index.Len())
	return list.String(), errors.Join(
		os.WriteFile(filepath.Join(dir, "Packages"), []byte(index.String()), 0o644),
		os.WriteFile(filepath.Join(dir, "Release"), []byte(release), 0o644))
}

// urlName returns a package file's name without what apt, a URL and a web server would each
// escape in their own way.
func urlName(file string) string {
	return strings.Map(func(r rune) rune {
		if strings.ContainsRune("%+~=:", r) {
			return '-'
		}
		return r
	}, file)
}

// field returns a one-line field of a Debian control file.
func field(control, name string) string {
	for line := range strings.Lines(control) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func hashFile(name string) (sum string, size int64, err error) {
	f, err := os.Open(name)
	if err != nil {
		return "", 0, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	h := sha256.New()
	if size, err = io.Copy(h, f); err != nil {
		return "", 0, fmt.Errorf("read %s: %w", name, err)
	}
	return hex.EncodeToString(h.Sum(nil)), size, nil
}
