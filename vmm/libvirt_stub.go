//go:build !cgo || !libvirt_dlopen

package vmm

import "fmt"

// openLibvirt stands in for the library where the program is built without it.
func openLibvirt(uri) (library, error) {
	return nil, fmt.Errorf("%w: this program is built without libvirt: build it with cgo and -tags libvirt_dlopen, as make build does where a C compiler is, or use --vmm qemu", ErrNoLibvirt)
}
