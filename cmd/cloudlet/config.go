package main

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"cloudlet/api"

	"github.com/spf13/pflag"
)

// readConfig sets flags by the lines KEY = VALUE of a file, where the command line has not
// set them. Only a flag that is a list may be there more than once.
func readConfig(path string, flags *pflag.FlagSet, keys []string) error {
	if path == "" {
		return nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return hostError(fmt.Errorf("read the configuration: %w", err))
	}
	given := map[string]bool{}
	flags.Visit(func(f *pflag.Flag) { given[f.Name] = true })
	seen := map[string]bool{}
	n := 0
	for line := range strings.Lines(string(b)) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		bad := func(format string, args ...any) *api.Error {
			e := api.Errorf(api.Invalid, "%s:%d: %w", path, n, fmt.Errorf(format, args...))
			e.Field = line
			return e
		}
		key, value, ok := strings.Cut(line, "=")
		key, value = strings.TrimSpace(key), strings.TrimSpace(value)
		if !ok {
			return bad("%q is not KEY = VALUE", line)
		}
		f := flags.Lookup(key)
		if f == nil || !slices.Contains(keys, key) {
			return bad("there is no key %q", key).Fix("the keys are %s", strings.Join(keys, ", "))
		}
		if seen[key] && f.Value.Type() != "stringArray" {
			return bad("the key %s is there twice", key)
		}
		seen[key] = true
		if given[key] {
			continue
		}
		if err := flags.Set(key, value); err != nil {
			return bad("%s = %s: %w", key, value, err)
		}
	}
	return nil
}
