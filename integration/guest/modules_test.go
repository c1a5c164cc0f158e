package guest

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestModuleOrder(t *testing.T) {
	errUnreadable := errors.New("unreadable")
	for _, test := range []struct {
		name    string
		graph   map[string][]string // what a module depends on
		wanted  []string
		order   []string
		wantErr error
	}{
		{"nothing", nil, nil, nil, nil},
		{"one", map[string][]string{"a": nil}, []string{"a"}, []string{"a"}, nil},
		{"chain", map[string][]string{"a": {"b"}, "b": {"c"}, "c": nil}, []string{"a"}, []string{"c", "b", "a"}, nil},
		{"diamond", map[string][]string{"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": nil},
			[]string{"a"}, []string{"d", "b", "c", "a"}, nil},
		{"dependency wanted too", map[string][]string{"a": {"b"}, "b": nil}, []string{"a", "b", "a"}, []string{"b", "a"}, nil},
		{"built in", map[string][]string{"a": {"inside"}}, []string{"inside", "a"}, []string{"a"}, nil},
		{"dash for underscore", map[string][]string{"virtio_rng": nil}, []string{"virtio-rng"}, []string{"virtio_rng"}, nil},
		{"missing", map[string][]string{"a": {"b"}}, []string{"a"}, nil, errModuleMissing},
		{"cycle", map[string][]string{"a": {"b"}, "b": {"a"}}, []string{"a"}, nil, errModuleCycle},
		{"unreadable", map[string][]string{"a": nil, "bad": nil}, []string{"a", "bad"}, nil, errUnreadable},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := moduleSet{files: map[string]string{}, builtin: map[string]bool{"inside": true}}
			for name := range test.graph {
				m.files[name] = name
			}
			m.depends = func(path string) ([]string, error) {
				if path == "bad" {
					return nil, errUnreadable
				}
				return test.graph[path], nil
			}
			order, err := m.order(test.wanted)
			require.ErrorIs(t, err, test.wantErr)
			require.Equal(t, test.order, order)
		})
	}
}

func TestParseDepends(t *testing.T) {
	for _, test := range []struct {
		name, info string
		want       []string
	}{
		{"empty section", "", nil},
		{"no entry", "license=GPL\x00alias=x\x00", nil},
		{"none", "license=GPL\x00depends=\x00retpoline=Y\x00", nil},
		{"two", "license=GPL\x00depends=virtio_ring,net-failover\x00", []string{"virtio_ring", "net_failover"}},
		{"not terminated", "depends=a", []string{"a"}},
		{"within another entry", "description=depends=a\x00", nil},
	} {
		t.Run(test.name, func(t *testing.T) { require.Equal(t, test.want, parseDepends([]byte(test.info))) })
	}
}

func TestOpenModules(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "kernel", "net"), 0o755))
	ko := filepath.Join(dir, "kernel", "net", "some-net.ko")
	require.NoError(t, os.WriteFile(ko, []byte("no ELF"), 0o644))
	_, err := openModules(dir)
	require.ErrorIs(t, err, os.ErrNotExist, "without modules.builtin")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "modules.builtin"), []byte("kernel/fs/ext4/ext4.ko\n"), 0o644))
	m, err := openModules(dir)
	require.NoError(t, err)
	require.Equal(t, map[string]string{"some_net": ko}, m.files)
	require.Equal(t, map[string]bool{"ext4": true}, m.builtin)
	_, err = m.order([]string{"some_net"})
	require.ErrorContains(t, err, "open module "+ko)
}
