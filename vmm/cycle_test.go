package vmm

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// guestFiles finds the test guest, or skips.
func guestFiles(t *testing.T) (kernel, initrd, disk string) {
	t.Helper()
	dir := os.Getenv("CLOUDLET_GUEST")
	if dir == "" {
		dir = "../build/guest"
	}
	kernel, initrd, disk = filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "initrd"), filepath.Join(dir, "disk.raw")
	for _, f := range []string{kernel, initrd, disk} {
		if _, err := os.Stat(f); err != nil {
			skip(t, "no test guest: "+err.Error())
		}
	}
	return kernel, initrd, disk
}

// skip skips a test for a probed reason, or fails it where skips are not allowed.
func skip(t *testing.T, reason string) {
	t.Helper()
	if os.Getenv("CLOUDLET_NO_SKIP") == "1" {
		t.Fatal(reason)
	}
	t.Skip(reason)
}

const guestAppend = "console=ttyS0 quiet panic=-1"

// answer is what the guest's application says.
type answer struct {
	Token   string `json:"token"`
	Counter int    `json:"counter"`
	SHA256  string `json:"sha256"`
	Table   string `json:"table"`
	File    string `json:"file"`
}

// ask asks the guest's application, again until it answers.
func ask(t *testing.T, vm *VM, method, path string) answer {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 20 * time.Second}
	url := fmt.Sprintf("http://127.0.0.1:%d%s", vm.Forwards()[0].Host, path)
	var a answer
	err := pollUntil(ctx, func() (bool, error) {
		req, err := http.NewRequestWithContext(ctx, method, url, nil)
		if err != nil {
			return false, err
		}
		resp, err := client.Do(req)
		if err != nil {
			return false, nil
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			return false, nil
		}
		if resp.StatusCode != http.StatusOK {
			return false, fmt.Errorf("%s: %s: %s", url, resp.Status, body)
		}
		_ = json.Unmarshal(body, &a)
		return true, nil
	})
	require.NoError(t, err)
	return a
}

func newDir(t *testing.T, name string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.Mkdir(dir, 0o700))
	return dir
}

func copyTo(t *testing.T, to, from string) {
	t.Helper()
	require.NoError(t, copyFile(to, from, 1<<40))
}

func TestCycle(t *testing.T) {
	kernel, initrd, disk := guestFiles(t)
	q := testQEMU(t, "")
	host, err := q.Probe(t.Context())
	if err != nil {
		skip(t, err.Error())
	}
	m, err := host.Machine(TCG, 256<<20, 1)
	require.NoError(t, err)
	m.Kernel, m.Initrd, m.Append = true, true, guestAppend
	base := t.TempDir()
	baseMem, baseDisk, baseState := filepath.Join(base, "memory"), filepath.Join(base, "disk"), filepath.Join(base, "state")
	copyTo(t, baseDisk, disk)

	start := time.Now()
	vm, err := q.Boot(t.Context(), newDir(t, "boot"), BootSpec{Machine: m, Memory: baseMem, Disk: baseDisk, DiskFormat: "raw",
		Kernel: kernel, Initrd: initrd, Forwards: []Forward{{Guest: 8080}}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, vm.Destroy(context.Background())) })
	t.Logf("monitor after %v, %v", time.Since(start), vm.Forwards())
	booted := ask(t, vm, "GET", "/")
	t.Logf("first answer after %v: %+v", time.Since(start), booted)
	start = time.Now()
	require.NoError(t, vm.SaveBase(t.Context(), baseState))
	t.Logf("saved in %v", time.Since(start))
	exit, err := vm.Wait(t.Context())
	require.NoError(t, err)
	require.Equal(t, "QEMU ended on request (quit)", exit.Reason)

	start = time.Now()
	vm2, err := q.Resume(t.Context(), newDir(t, "resume"), ResumeSpec{Machine: m, Memory: baseMem, Disk: baseDisk, State: baseState,
		Kernel: kernel, Initrd: initrd, Forwards: []Forward{{Guest: 8080}}},
		func(e string) { t.Logf("%s after %v", e, time.Since(start)) })
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, vm2.Destroy(context.Background())) })
	again := ask(t, vm2, "GET", "/")
	t.Logf("first answer after %v", time.Since(start))
	require.Equal(t, booted.Token, again.Token)
	require.Equal(t, booted.Counter+1, again.Counter)
}
