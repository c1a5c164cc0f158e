package vmm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// ErrNoQEMU means that a QEMU program is not installed.
var ErrNoQEMU = errors.New("no QEMU")

// QEMU runs VMs with the QEMU programs of this host. Launcher is required; the zero value
// of the other fields is right. It must not be copied after first use.
type QEMU struct {
	// Binary and ImgBinary are the programs; "" means qemu-system-x86_64 and qemu-img on PATH.
	Binary    string
	ImgBinary string
	// Launcher is the command that runs RunLauncher; the VM's folder is added as its last
	// argument.
	Launcher []string
	// Cache is a file in which Probe keeps its answer for other processes: asking a QEMU
	// program takes 60 ms. "" means none.
	Cache string

	mu    sync.Mutex
	probe map[string]Host // by binary, size and time of change

	conns connections // to libvirt, for its VMs
}

// Close ends the connections that were made for VMs of libvirt. It waits for calls under way.
func (q *QEMU) Close() error { return q.conns.close() }

// Account returns whom QEMU runs as: this process's user.
func (q *QEMU) Account(context.Context) (Account, error) { return own(), nil }

// Examine looks whether VMs can be run, beyond what Probe says.
func (q *QEMU) Examine(context.Context) []Finding { return nil }

// Watch waits for the end of ctx: nobody ends or stops our VMs but through QEMU.
func (q *QEMU) Watch(ctx context.Context, _ func(Event)) error {
	<-ctx.Done()
	return nil
}

// Host is what a host offers to VMs.
type Host struct {
	QEMU         string   `json:"qemu"`   // version, "7.2.22"
	Binary       string   `json:"binary"` // absolute path
	Accelerators []string `json:"accelerators"`
	// Default is what the accelerator "auto" means here.
	Default string `json:"default"`
	// KVM says why kvm is not offered or not the default; "" if it is.
	KVM string `json:"kvm,omitempty"`
	// Types and CPUs are the known machine types and CPU models; empty: not asked.
	Types []string `json:"types,omitempty"`
	CPUs  []string `json:"cpus,omitempty"`
}

// Machine returns the configuration of a new VM on this host, with the default devices.
// accel is "tcg", "kvm", or "auto".
func (h Host) Machine(accel string, memory int64, cpus int) (Machine, error) {
	if accel == Auto || accel == "" {
		accel = h.Default
	}
	major, minor := versionNumbers(h.QEMU)
	m := Machine{
		Accelerator: accel,
		Type:        fmt.Sprintf("pc-q35-%d.%d", major, minor),
		CPU:         "qemu64",
		CPUs:        cpus,
		Memory:      memory,
		Devices:     DefaultDevices(),
		QEMU:        fmt.Sprintf("%d.%d", major, minor),
	}
	if accel == KVM {
		// Every x86 host of the last fifteen years can give what Nehalem has; "host" would
		// tie the capture to one model of CPU.
		m.CPU = "Nehalem"
	}
	if err := m.Runnable(h); err != nil {
		return Machine{}, err
	}
	return m, nil
}

// binary returns the path of the QEMU program.
func (q *QEMU) binary() (string, error) {
	return lookUp(q.Binary, "qemu-system-x86_64", "install qemu-system-x86")
}

// img returns the path of qemu-img.
func (q *QEMU) img() (string, error) {
	return lookUp(q.ImgBinary, "qemu-img", "install qemu-utils")
}

func lookUp(name, byDefault, remedy string) (string, error) {
	if name == "" {
		name = byDefault
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%w: find %s: %w: %s, or name the program", ErrNoQEMU, name, err, remedy)
	}
	return filepath.Abs(path)
}

// Probe asks what this host offers. The answer for an unchanged program is kept, except for
// what /dev/kvm says, which is looked at each time.
func (q *QEMU) Probe(ctx context.Context) (Host, error) {
	bin, err := q.binary()
	if err != nil {
		return Host{}, err
	}
	if _, err := q.img(); err != nil {
		return Host{}, err
	}
	fi, err := os.Stat(bin)
	if err != nil {
		return Host{}, fmt.Errorf("probe QEMU: %w", err)
	}
	key := fmt.Sprintf("%s %d %d", bin, fi.Size(), fi.ModTime().UnixNano())
	q.mu.Lock()
	h, ok := q.probe[key]
	q.mu.Unlock()
	if !ok {
		if h, err = q.cachedProbe(ctx, key, bin); err != nil {
			return Host{}, err
		}
		q.mu.Lock()
		if q.probe == nil {
			q.probe = make(map[string]Host)
		}
		q.probe[key] = h
		q.mu.Unlock()
	}
	return withKVM(h, kvmUsable()), nil
}

// cachedProbe answers from the cache file if it is of this very program, else asks the
// program and keeps what it says. A cache that cannot be read or written is none.
func (q *QEMU) cachedProbe(ctx context.Context, key, bin string) (Host, error) {
	type cached struct {
		Key  string `json:"key"`
		Host Host   `json:"host"`
	}
	dir, name := filepath.Split(q.Cache)
	var c cached
	if q.Cache != "" && readJSON(dir, name, &c) == nil && c.Key == key {
		return c.Host, nil
	}
	h, err := probeBinary(ctx, bin)
	if err == nil && q.Cache != "" {
		_ = writeJSON(dir, name, cached{key, h})
	}
	return h, err
}

// probeTimeout bounds one question to a QEMU program, which answers in tens of milliseconds.
const probeTimeout = 20 * time.Second

var versionLine = regexp.MustCompile(`version ([0-9]{1,3}\.[0-9]{1,3}(\.[0-9]{1,3})?)`)

func probeBinary(ctx context.Context, bin string) (Host, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	questions := [][]string{{"--version"}, {"-accel", "help"}, {"-machine", "help"}, {"-cpu", "help"}}
	answers := make([]string, len(questions))
	g, gctx := errgroup.WithContext(ctx)
	for i, args := range questions {
		g.Go(func() error {
			out, err := output(gctx, bin, args...)
			answers[i] = out
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return Host{}, fmt.Errorf("probe QEMU: %w", err)
	}
	v := versionLine.FindStringSubmatch(answers[0])
	if v == nil {
		return Host{}, fmt.Errorf("probe QEMU: %s does not tell its version: %.80q", bin, answers[0])
	}
	h := Host{QEMU: v[1], Binary: bin}
	for _, a := range []string{TCG, KVM} {
		if slices.Contains(strings.Fields(answers[1]), a) {
			h.Accelerators = append(h.Accelerators, a)
		}
	}
	h.Types = fieldsMatching(answers[2], 0, machineType)
	h.CPUs = append(fieldsMatching(answers[3], 0, cpuModel), fieldsMatching(answers[3], 1, cpuModel)...)
	return h, nil
}

// fieldsMatching returns the n-th word of every line where it matches; help texts of QEMU
// are tables, before some versions "x86 NAME", then "  NAME".
func fieldsMatching(text string, n int, re *regexp.Regexp) []string {
	var out []string
	for line := range strings.Lines(text) {
		if f := strings.Fields(line); len(f) > n && re.MatchString(f[n]) {
			out = append(out, f[n])
		}
	}
	return out
}

// output runs a program and returns its standard output; the error quotes its standard
// error.
func output(ctx context.Context, bin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, bin, args...)
	cmd.WaitDelay = time.Second
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return "", fmt.Errorf("run %s %s: %w: %s", filepath.Base(bin), args[0], err, tail(stderr.String(), 500))
	}
	return stdout.String(), nil
}

// tail returns the trimmed end of s, n bytes at most.
func tail(s string, n int) string {
	s = strings.TrimSpace(s)
	if len(s) > n {
		s = "..." + s[len(s)-n:]
	}
	return s
}

// kvmState is what can be learned about KVM without running a guest.
type kvmState struct {
	open   error // of /dev/kvm
	vendor bool  // a module of the CPU's own virtualization is loaded
}

func kvmUsable() kvmState {
	var s kvmState
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if s.open = err; err == nil {
		s.open = f.Close()
	}
	for _, module := range []string{"kvm_intel", "kvm_amd"} {
		if _, err := os.Stat("/sys/module/" + module); err == nil {
			s.vendor = true
		}
	}
	return s
}

// withKVM completes a Host: kvm is offered where /dev/kvm opens, and is the default only
// where it rests on the CPU's virtualization. Other implementations of /dev/kvm exist that
// open and cannot run an ordinary guest.
func withKVM(h Host, s kvmState) Host {
	h.Default = TCG
	switch built := slices.Contains(h.Accelerators, KVM); {
	case !built:
		h.KVM = "this QEMU is built without kvm: use --accel tcg"
	case s.open != nil:
		h.KVM = fmt.Sprintf("kvm cannot be used (%v): use --accel tcg, or give access to /dev/kvm", s.open)
		h.Accelerators = slices.DeleteFunc(slices.Clone(h.Accelerators), func(a string) bool { return a == KVM })
	case !s.vendor:
		h.KVM = "neither kvm_intel nor kvm_amd is loaded, so /dev/kvm may be unable to run an ordinary guest: use --accel tcg, or ask for kvm explicitly"
	default:
		h.Default = KVM
	}
	return h
}
