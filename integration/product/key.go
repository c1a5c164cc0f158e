package product

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"strings"
)

// Key names what is made from the files below root, and from whatever else prefix tells, by
// a hash: 16 hexadecimal digits. Files of Go tests do not count.
func Key(files fs.FS, root, prefix string) (string, error) {
	h := sha256.New()
	fmt.Fprint(h, prefix)
	err := fs.WalkDir(files, root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasSuffix(path, "_test.go") {
			return err
		}
		p, err := fs.ReadFile(files, path)
		if err != nil {
			return err
		}
		fmt.Fprintf(h, "%s %d\n%s", path, len(p), p)
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("read files of the product's key: %w", err)
	}
	return hex.EncodeToString(h.Sum(nil)[:8]), nil
}
