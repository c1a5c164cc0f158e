package guest

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// wanted are the modules that the guest's machine needs: its disk, its network card, its
// balloon, and the bus of them. The cloud kernel has ext4 and the serial port built in.
var wanted = []string{"virtio_pci", "virtio_blk", "virtio_net", "virtio_balloon"}

var (
	errModuleMissing = errors.New("neither a file nor built into the kernel")
	errModuleCycle   = errors.New("depends on itself")
)

// moduleSet knows the modules of one kernel by name. A kernel package carries no
// modules.dep (depmod makes it at installation), so dependencies come from the modules.
type moduleSet struct {
	files   map[string]string // name to path
	builtin map[string]bool
	depends func(path string) ([]string, error)
}

// openModules reads the folder lib/modules/VERSION of an unpacked kernel package.
func openModules(dir string) (moduleSet, error) {
	m := moduleSet{files: map[string]string{}, builtin: map[string]bool{}, depends: moduleDepends}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.HasSuffix(path, ".ko") {
			m.files[moduleName(path)] = path
		}
		return err
	})
	if err != nil {
		return moduleSet{}, fmt.Errorf("list modules: %w", err)
	}
	list, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return moduleSet{}, fmt.Errorf("list built-in modules: %w", err)
	}
	for line := range strings.Lines(string(list)) {
		m.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	return m, nil
}

// order returns the paths of the named modules and of all they depend on, each after its
// dependencies and once.
func (m moduleSet) order(names []string) ([]string, error) {
	var paths []string
	done := map[string]bool{}
	var visit func(name string, above []string) error
	visit = func(name string, above []string) error {
		if done[name] || m.builtin[name] {
			return nil
		}
		if slices.Contains(above, name) {
			return fmt.Errorf("module %s: %w", name, errModuleCycle)
		}
		path, ok := m.files[name]
		if !ok {
			return fmt.Errorf("module %s: %w", name, errModuleMissing)
		}
		below, err := m.depends(path)
		if err != nil {
			return err
		}
		for _, dep := range below {
			if err := visit(dep, append(above, name)); err != nil {
				return err
			}
		}
		done[name] = true
		paths = append(paths, path)
		return nil
	}
	for _, name := range names {
		if err := visit(moduleName(name), nil); err != nil {
			return nil, err
		}
	}
	return paths, nil
}

// moduleName is the kernel's name for the module in a file: virtio-rng.ko is virtio_rng.
func moduleName(path string) string {
	return strings.ReplaceAll(strings.TrimSuffix(filepath.Base(path), ".ko"), "-", "_")
}

// moduleDepends reads what a module says of its dependencies in its section .modinfo.
func moduleDepends(path string) ([]string, error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open module %s: %w", path, err)
	}
	defer f.Close() // read only: nothing is lost
	s := f.Section(".modinfo")
	if s == nil {
		return nil, fmt.Errorf("read module %s: no section .modinfo", path)
	}
	info, err := s.Data()
	if err != nil {
		return nil, fmt.Errorf("read module %s: %w", path, err)
	}
	return parseDepends(info), nil
}

// parseDepends finds the entry "depends=a,b" among entries that each end with a NUL.
func parseDepends(info []byte) []string {
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		if list, ok := bytes.CutPrefix(entry, []byte("depends=")); ok && len(list) > 0 {
			var names []string
			for name := range strings.SplitSeq(string(list), ",") {
				names = append(names, moduleName(name))
			}
			return names
		}
	}
	return nil
}
