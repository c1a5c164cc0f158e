package vmm

import (
	"context"
	"fmt"
	"time"
)

// executeTimeout bounds the observation of a guest under a KVM that is not known to work.
const executeTimeout = 3 * time.Second

// checkExecutes returns an error if kvm does not run the guest on the CPU. Where kvm_intel
// or kvm_amd is loaded it looks no further. Other implementations of /dev/kvm open, create a
// VM, and then emulate every instruction, a thousand times slower, or execute nothing.
func (vm *VM) checkExecutes(ctx context.Context, c *qmp) error {
	if vm.info.Machine.Accelerator != KVM || kvmUsable().vendor {
		return nil
	}
	limit, cancel := context.WithTimeout(ctx, executeTimeout)
	defer cancel()
	var o observation
	err := pollUntil(limit, func() (bool, error) {
		if err := o.look(limit, c); err != nil {
			return false, err
		}
		return o.judge()
	})
	if err == nil || ctx.Err() != nil || limit.Err() == nil {
		return err
	}
	if !o.moved {
		return fmt.Errorf("the guest executed nothing for %v: kvm does not work here: use --accel tcg", executeTimeout)
	}
	return nil
}

// observation is what was seen of the first CPU.
type observation struct {
	state     string
	registers string
	moved     bool   // the registers changed
	emulated  uint64 // instructions that kvm emulated
	exits     uint64 // returns from the guest to kvm
}

// look observes once. Statistics that a QEMU or kernel does not have stay 0.
func (o *observation) look(ctx context.Context, c *qmp) (err error) {
	if o.state, err = c.runState(ctx); err != nil {
		return err
	}
	regs, err := c.human(ctx, "info registers")
	if err != nil {
		return err
	}
	o.moved = o.moved || o.registers != "" && regs != o.registers
	o.registers = regs
	var answer []struct {
		Stats []struct {
			Name  string `json:"name"`
			Value any    `json:"value"` // a number for the names asked
		} `json:"stats"`
	}
	args := map[string]any{"target": "vcpu", "providers": []map[string]any{
		{"provider": "kvm", "names": []string{"insn_emulation", "exits"}},
	}}
	if err := c.execute(ctx, "query-stats", args, &answer); err != nil {
		return ignoreRefusal(err)
	}
	if len(answer) == 0 {
		return nil
	}
	for _, s := range answer[0].Stats {
		v, _ := s.Value.(float64)
		switch s.Name {
		case "insn_emulation":
			o.emulated = uint64(v)
		case "exits":
			o.exits = uint64(v)
		}
	}
	return nil
}

const (
	// A real KVM emulates at most about one instruction for each exit.
	maxEmulatedPerExit = 16
	manyEmulated       = 100_000
	enoughExits        = 50
)

// judge reports whether the guest was seen to run, or an error if it cannot.
func (o *observation) judge() (bool, error) {
	switch {
	case o.state != Running:
		return false, fmt.Errorf("kvm stopped the guest (state %s): it does not work here: use --accel tcg", o.state)
	case o.emulated > manyEmulated && o.emulated/maxEmulatedPerExit > o.exits:
		return false, fmt.Errorf("kvm does not run the guest on the CPU, it has emulated %d instructions in %d exits: use --accel tcg", o.emulated, o.exits)
	}
	return o.moved && o.exits >= enoughExits && o.emulated <= 4*o.exits, nil
}
