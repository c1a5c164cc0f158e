package overlay

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func testBaseManifest() *BaseManifest {
	return &BaseManifest{
		Format: baseFormat, Version: baseVersion, Machine: json.RawMessage(`{"cpu":"qemu64","n":1e400}`),
		Memory: BaseImage{Size: 4096, HashList: Sum([]byte("a")), HashRoot: Sum([]byte("b"))},
		Disk:   BaseImage{Size: MaxImageSize, HashList: Sum([]byte("c")), HashRoot: Sum([]byte("d"))},
		State:  &BasePart{Size: 1, SHA256: Sum([]byte("e"))},
	}
}

func TestBaseManifest(t *testing.T) {
	good, err := encodeBaseManifest(testBaseManifest())
	require.NoError(t, err)
	m, err := parseBaseManifest(good)
	require.NoError(t, err)
	require.Equal(t, testBaseManifest(), m)
	for _, c := range []struct{ name, old, new, want string }{
		{"not ours", `"cloudlet-base"`, `"other"`, "not a base VM"},
		{"newer", `"version":1`, `"version":2`, "version is 2"},
		{"unknown field", `"machine"`, `"extra":1,"machine"`, "unknown field"},
		{"trailing line", "}\n", "}\n\n", "canonical"},
		{"trailing object", "}\n", "}\n{}", "after top-level"},
		{"truncated", "}\n", "", "unexpected end"},
		{"no newline", "}\n", "}", "canonical"},
		{"duplicate field", `"version":1`, `"version":1,"version":1`, "canonical"},
		{"other case", `"disk"`, `"Disk"`, "canonical"},
		{"machine spaced", `{"cpu"`, `{ "cpu"`, "canonical"},
		{"machine unsorted", `{"cpu":"qemu64","n":1e400}`, `{"n":1,"cpu":2}`, "canonical"},
		{"machine list", `{"cpu":"qemu64","n":1e400}`, `[]`, "machine"},
		{"machine missing", `"machine":{"cpu":"qemu64","n":1e400},`, ``, "canonical"},
		{"odd memory", `"size":4096`, `"size":4097`, "memory: size 4097"},
		{"no memory", `"size":4096`, `"size":0`, "memory: size 0"},
		{"negative", `"size":4096`, `"size":-4096`, "memory: size -4096"},
		{"disk over the cap", `8796093022208`, `8796093026304`, "disk: size"},
		{"empty state", `"state":{"size":1`, `"state":{"size":0`, "state: size 0"},
		{"large state", `"state":{"size":1`, `"state":{"size":4294967297`, "state: size"},
		{"hash upper case", Sum([]byte("a")).String(), strings.ToUpper(Sum([]byte("a")).String()), "hexadecimal"},
		{"hash short", Sum([]byte("a")).String(), "00", "hexadecimal"},
		{"too large", "}\n", "}" + strings.Repeat("\n", MaxBaseManifest), "larger than"},
	} {
		t.Run(c.name, func(t *testing.T) {
			i := bytes.LastIndex(good, []byte(c.old))
			if c.old != "}\n" {
				i = bytes.Index(good, []byte(c.old))
			}
			require.GreaterOrEqual(t, i, 0)
			bad := string(good[:i]) + c.new + string(good[i+len(c.old):])
			_, err := parseBaseManifest([]byte(bad))
			require.ErrorContains(t, err, c.want)
		})
	}
	for n := range good {
		_, err := parseBaseManifest(good[:n])
		require.Error(t, err, "cut to %d bytes", n)
	}
}

func FuzzBaseManifest(f *testing.F) {
	good, err := encodeBaseManifest(testBaseManifest())
	require.NoError(f, err)
	f.Add(good)
	f.Add([]byte(`{"format":"cloudlet-base","version":1,"machine":{}}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := parseBaseManifest(data)
		if err != nil {
			return
		}
		again, err := encodeBaseManifest(m)
		require.NoError(t, err)
		require.Equal(t, data, again)
	})
}
