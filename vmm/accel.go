package vmm

import (
	"context"
	"fmt"
	"time"
)

// executeTimeout is how long a guest under kvm may execute nothing before kvm is found not
// to work. A working guest takes a timer interrupt within milliseconds.
const executeTimeout = 5 * time.Second

// checkExecutes returns an error if a guest under kvm does not execute anything. There are
// implementations of /dev/kvm that open, create a VM, and then spin or report an internal
// error. The registers of the first CPU are compared until they change.
func (vm *VM) checkExecutes(ctx context.Context, c *qmp) error {
	if vm.info.Machine.Accelerator != KVM {
		return nil
	}
	dead := fmt.Errorf("the guest executed nothing for %v under kvm: /dev/kvm opens but cannot run it: use --accel tcg", executeTimeout)
	limit, cancel := context.WithTimeoutCause(ctx, executeTimeout, dead)
	defer cancel()
	first := ""
	err := pollUntil(limit, func() (bool, error) {
		state, err := c.runState(limit)
		if err != nil {
			return false, err
		}
		if state != Running {
			return false, fmt.Errorf("kvm stopped the guest at once (state %s): use --accel tcg", state)
		}
		regs, err := c.human(limit, "info registers")
		if err != nil {
			return false, err
		}
		if first == "" {
			first = regs
		}
		return regs != first, nil
	})
	if err != nil && ctx.Err() == nil && limit.Err() != nil {
		return context.Cause(limit)
	}
	return err
}
