package vmm

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"unsafe"

	"github.com/elastic/go-seccomp-bpf"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// filterQEMU lets some system calls of this process and its children do nothing and succeed, for
// QEMU with these arguments.
//
// madvise(MADV_HUGEPAGE): with the advice the kernel would read 4 MiB of a memory file around
// each first touch, whatever its read-ahead is set to.
//
// In a resumed VM, whose memory is a private mapping of a file that many share, two more, which
// QEMU makes for each page that the guest's balloon takes or gives back:
//   - fallocate, for a hole of one page in the file. It would change the file for everybody. The
//     page is dropped from the mapping by the call after it, and QEMU would leave that out if
//     this one failed. The layers of the disk are another matter, and are not touched: their
//     unit is a cluster of 64 KiB.
//   - madvise(MADV_WILLNEED), by which the kernel would read each page from the file at once,
//     perhaps over a network.
func filterQEMU(argv []string) error {
	call := func(name string, arguments ...seccomp.Condition) seccomp.NameWithConditions {
		return seccomp.NameWithConditions{Name: name, Conditions: arguments}
	}
	argument := func(n uint32, value uint64) seccomp.Condition {
		return seccomp.Condition{Argument: n, Operation: seccomp.Equal, Value: value}
	}
	calls := []seccomp.NameWithConditions{call("madvise", argument(2, unix.MADV_HUGEPAGE))}
	if slices.Contains(argv, "-incoming") {
		calls = append(calls,
			call("madvise", argument(1, pageSize), argument(2, unix.MADV_WILLNEED)),
			call("fallocate", argument(1, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE), argument(3, pageSize)),
		)
	}
	// The library has no action that lets a call succeed: of a bare errno 0 it makes EPERM.
	const succeed = seccomp.ActionErrno | unix.SECCOMP_RET_DATA
	policy := seccomp.Policy{
		DefaultAction: seccomp.ActionAllow,
		Syscalls:      []seccomp.SyscallGroup{{Action: succeed, NamesWithCondtions: calls}},
	}
	program, err := policy.Assemble()
	if err != nil {
		return fmt.Errorf("filter QEMU's system calls: %w", err)
	}
	for i, in := range program {
		if in == (bpf.RetConstant{Val: uint32(succeed)}) {
			program[i] = bpf.RetConstant{Val: unix.SECCOMP_RET_ERRNO}
		}
	}
	if err := installFilter(program); err != nil {
		return fmt.Errorf("filter QEMU's system calls: %w", err)
	}
	return nil
}

// installFilter installs a filter for all threads of this process.
func installFilter(program []bpf.Instruction) error {
	raw, err := bpf.Assemble(program)
	if err != nil {
		return err
	}
	filter := make([]unix.SockFilter, len(raw))
	for i, in := range raw {
		filter[i] = unix.SockFilter{Code: in.Op, Jt: in.Jt, Jf: in.Jf, K: in.K}
	}
	runtime.LockOSThread() // the permission is the thread's
	defer runtime.UnlockOSThread()
	if os.Geteuid() != 0 { // root needs none
		if err := seccomp.SetNoNewPrivs(); err != nil {
			return err
		}
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return errno
	}
	return nil
}
