package service

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"cloudlet/api"
	"cloudlet/vmm"
)

const (
	probeTimeout  = time.Minute
	probePause    = 5 * time.Millisecond // between tries at a guest that does not answer yet
	probeTry      = 10 * time.Second     // for one answer: the first one of a lazy guest takes its time
	probeBodyMost = 1 << 20
)

// await waits for the first right answer to the probe of req.
func (s *Service) await(ctx context.Context, vm *vmm.VM, req api.Run, t *timeline) error {
	timeout := req.Timeout
	if timeout == 0 {
		timeout = probeTimeout
	}
	return awaitProbe(ctx, vm, req.Probe, timeout)
}

// awaitProbe asks the application of a VM until it answers right, the VM ends, or the time
// is over. What it saw last is part of the error.
func awaitProbe(ctx context.Context, vm *vmm.VM, p *api.Probe, timeout time.Duration) error {
	url := probeURL(probeAddress(vm, p.Port), p.Path)
	if _, err := http.NewRequest(http.MethodGet, url, nil); err != nil {
		return api.Errorf(api.Invalid, "probe path %q: %v", p.Path, err)
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}}
	var last error
	err := await(ctx, vm, timeout, func(ctx context.Context) bool {
		err := ask(ctx, client, url, p)
		if ctx.Err() == nil || last == nil {
			last = err
		}
		return err == nil
	})
	if api.CodeOf(err) == api.TimedOut {
		return api.Errorf(api.TimedOut, "the application did not answer GET %s within %s; last: %v%s", url, timeout, last, serialTail(vm)).
			Fix("see the guest's console above, wait longer with --timeout, or look inside with --keep and `cloudlet logs`")
	}
	return err
}

func probeAddress(vm *vmm.VM, port int) string {
	for _, f := range vm.Forwards() {
		if f.Guest == port {
			addr := f.Addr
			if addr == "" || addr == "0.0.0.0" {
				addr = "127.0.0.1"
			}
			return net.JoinHostPort(addr, strconv.Itoa(f.Host))
		}
	}
	return "" // not reached: the caller has forwarded the port
}

// await calls try until it succeeds, the VM ends, or the time is over.
func await(ctx context.Context, vm *vmm.VM, timeout time.Duration, try func(context.Context) bool) error {
	bound, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	ended := make(chan vmm.Exit, 1)
	go func() { // joined below
		defer close(ended)
		if exit, err := vm.Wait(bound); err == nil {
			ended <- exit
			cancel()
		}
	}()
	ok := try(bound)
	for tick := time.NewTicker(probePause); !ok && bound.Err() == nil; {
		select {
		case <-tick.C:
			ok = try(bound)
		case <-bound.Done():
			tick.Stop()
		}
	}
	cancel()
	exit, gone := <-ended
	switch {
	case ok:
		return nil
	case gone:
		return api.Errorf(api.Internal, "the VM ended: %s%s", exit.Reason, serialTail(vm))
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return api.Errorf(api.TimedOut, "nothing within %s%s", timeout, serialTail(vm))
}

// ask makes one request and judges the answer.
func ask(ctx context.Context, client *http.Client, url string, p *api.Probe) error {
	ctx, cancel := context.WithTimeout(ctx, probeTry)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, probeBodyMost))
	if err != nil {
		return err
	}
	if p.Status != 0 && resp.StatusCode != p.Status || p.Status == 0 && resp.StatusCode >= 400 {
		return fmt.Errorf("status %s", resp.Status)
	}
	if !bytes.Contains(body, []byte(p.Contains)) {
		return fmt.Errorf("the answer does not contain %q", p.Contains)
	}
	return nil
}

// serialTail returns the last lines of the guest's console, for an error message.
func serialTail(vm *vmm.VM) string {
	b, err := os.ReadFile(filepath.Join(vm.Dir(), "serial.log"))
	if err != nil || len(bytes.TrimSpace(b)) == 0 {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	lines = lines[max(0, len(lines)-5):]
	return fmt.Sprintf("; the guest's console ends with %q", lines)
}
