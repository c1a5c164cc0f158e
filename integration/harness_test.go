package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/integration/cloudlets"
	"cloudlet/integration/guest"
	"cloudlet/integration/need"

	"github.com/stretchr/testify/require"
)

var guestDir = flag.String("guest", "../build/guest", "folder of the test guest; it is built if missing")

// fixture is what all tests share: the program, and a store with one base of the test guest.
// Bases are immutable, so each test's store has its files as hard links.
type fixture struct {
	bin  string // the program under test
	dir  string // of the shared store
	base string // id
	err  error
}

var (
	shared     fixture
	sharedOnce sync.Once
)

func TestMain(m *testing.M) {
	flag.Parse()
	code := runTests(m)
	if shared.dir != "" {
		if err := os.RemoveAll(filepath.Dir(shared.dir)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// setUp builds the program, the guest and the base, once.
func setUp() {
	tmp, err := os.MkdirTemp("", "cloudlet-it-")
	if err != nil {
		shared.err = err
		return
	}
	if err := os.Chmod(tmp, 0o711); err != nil { // libvirt's QEMU is another user
		shared.err = err
		return
	}
	shared.bin, shared.dir = filepath.Join(tmp, "cloudlet"), filepath.Join(tmp, "state")
	shared.err = func() error {
		if out, err := exec.Command("go", "build", "-o", shared.bin, "../cmd/cloudlet").CombinedOutput(); err != nil {
			return fmt.Errorf("build the program: %w: %s", err, out)
		}
		g, err := guest.Build(context.Background(), *guestDir, os.Stderr)
		if err != nil {
			return err
		}
		cmd := exec.Command(shared.bin, "--state", shared.dir, "base", "create", g.Disk, "--kernel", g.Kernel, "--initrd", g.Initrd,
			"--append", guest.Append, "--memory", fmt.Sprintf("%dM", guest.MemoryMiB), "--probe", fmt.Sprintf("%d/healthz", guest.Port), "--name", "base")
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			return fmt.Errorf("create the base: %w: %s", err, stderr.Bytes())
		}
		shared.base = strings.TrimSpace(string(out))
		return nil
	}()
}

// needVMs skips the test where the machine lacks what these tests stand on.
func needVMs(t *testing.T) {
	t.Helper()
	var missing []string
	for _, program := range []string{"qemu-system-x86_64", "qemu-img"} {
		if _, err := exec.LookPath(program); err != nil {
			missing = append(missing, program)
		}
	}
	if f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0); err != nil {
		missing = append(missing, err.Error())
	} else {
		f.Close()
	}
	if len(missing) > 0 {
		need.Skip(t, fmt.Sprintf("this machine lacks %s: run make deps", strings.Join(missing, ", ")))
	}
}

// lab is a store of a test's own and the program over it. Its end is part of the test: no
// process, mount or file may be left.
type lab struct {
	t     *testing.T
	state string
	base  string
}

func newLab(t *testing.T) *lab {
	t.Helper()
	needVMs(t)
	sharedOnce.Do(setUp)
	require.NoError(t, shared.err)
	l := newEmptyLab(t)
	l.base = shared.base
	from, to := filepath.Join(shared.dir, "bases"), filepath.Join(l.state, "bases")
	require.NoError(t, os.MkdirAll(filepath.Join(to, l.base), 0o700))
	for _, pattern := range []string{"*.json", l.base + "/*"} {
		files, err := filepath.Glob(filepath.Join(from, pattern))
		require.NoError(t, err)
		for _, f := range files {
			rel, err := filepath.Rel(from, f)
			require.NoError(t, err)
			require.NoError(t, os.Link(f, filepath.Join(to, rel)))
		}
	}
	return l
}

// newEmptyLab makes a lab whose store holds nothing.
func newEmptyLab(t *testing.T) *lab {
	t.Helper()
	needVMs(t)
	sharedOnce.Do(setUp)
	require.NoError(t, shared.err)
	state, err := os.MkdirTemp(filepath.Dir(shared.dir), "s")
	require.NoError(t, err)
	l := &lab{t: t, state: state}
	t.Cleanup(l.end)
	return l
}

// end removes all instances and fails the test if anything is left.
func (l *lab) end() {
	t := l.t
	if t.Failed() {
		t.Logf("instances: %s", l.run("ps", "-a").stdout)
	}
	out, err := exec.Command(shared.bin, "--state", l.state, "ps", "-a", "--json").Output()
	if err != nil {
		t.Errorf("list instances at the end: %v", err)
	}
	var list []api.Instance
	if err := json.Unmarshal(out, &list); err != nil {
		t.Errorf("list instances at the end: %v", err)
	}
	for _, in := range list {
		if out, err := exec.Command(shared.bin, "--state", l.state, "rm", "--force", in.ID).CombinedOutput(); err != nil {
			t.Errorf("remove instance %s at the end: %v: %s", in.ID, err, out)
		}
	}
	for _, left := range l.leftovers() {
		t.Errorf("left behind: %s", left)
	}
	if err := os.RemoveAll(l.state); err != nil {
		t.Errorf("remove the state folder: %v", err)
	}
}

// leftovers lists mounts and processes of this lab, and files in the parts of its store that
// are empty when nothing runs.
func (l *lab) leftovers() []string { return cloudlets.Leftovers(l.state) }

// result is what a command printed and how it ended.
type result struct {
	stdout, stderr string
	code           int
}

// command prepares a run of the program on the lab's store.
func (l *lab) command(args ...string) *exec.Cmd {
	return exec.CommandContext(l.t.Context(), shared.bin, append([]string{"--state", l.state}, args...)...)
}

func (l *lab) run(args ...string) result {
	l.t.Helper()
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(shared.bin, append([]string{"--state", l.state}, args...)...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		l.t.Fatalf("run cloudlet %v: %v", args, err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// ok runs a command that must succeed and returns its standard output.
func (l *lab) ok(args ...string) string {
	l.t.Helper()
	r := l.run(args...)
	require.Zero(l.t, r.code, "cloudlet %v: %s", args, r.stderr)
	return strings.TrimSpace(r.stdout)
}

// fails runs a command that must end with this exit code and say these words.
func (l *lab) fails(code int, words string, args ...string) result {
	l.t.Helper()
	r := l.run(args...)
	require.Equal(l.t, code, r.code, "cloudlet %v: %s%s", args, r.stdout, r.stderr)
	require.Contains(l.t, r.stderr, words, "cloudlet %v", args)
	return r
}

// json runs a command that must succeed and decodes what it prints into v.
func (l *lab) json(v any, args ...string) {
	l.t.Helper()
	out := l.ok(append(args, "--json")...)
	require.NoError(l.t, json.Unmarshal([]byte(out), v), "cloudlet %v: %s", args, out)
}

// start runs an instance of ref and waits until its application answers.
func (l *lab) start(ref string, args ...string) api.Instance {
	l.t.Helper()
	var in api.Instance
	l.json(&in, append([]string{"run", ref, "--probe", fmt.Sprintf("%d/healthz", guest.Port), "--timeout", "2m"}, args...)...)
	require.Equal(l.t, api.Running, in.State)
	return in
}

// inspect returns an instance as ps lists it.
func (l *lab) inspect(id string) api.Instance {
	l.t.Helper()
	var list []api.Instance
	l.json(&list, "ps", "--all")
	for _, in := range list {
		if in.ID == id {
			return in
		}
	}
	l.t.Fatalf("no instance %s", id)
	return api.Instance{}
}

// capture makes an overlay of an instance and returns it.
func (l *lab) capture(id string, args ...string) api.CreatedOverlay {
	l.t.Helper()
	var o api.CreatedOverlay
	l.json(&o, append([]string{"overlay", "create", id}, args...)...)
	return o
}

// answer is what the guest's application says.
type answer struct {
	Token   string `json:"token"`
	Counter int64  `json:"counter"`
	Window  int    `json:"window"`
	SHA256  string `json:"sha256"`
	Table   string `json:"table"`
	File    string `json:"file"`
	Extra   string `json:"extra"`
	On      bool   `json:"on"`     // of /load
	Rounds  int64  `json:"rounds"` // of /load
}

// ask makes a request to the application of an instance.
func ask(t *testing.T, in api.Instance, method, path string) answer {
	t.Helper()
	require.NotEmpty(t, in.Endpoints)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+in.Endpoints[0].Address+path, nil)
	require.NoError(t, err)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, resp.StatusCode, "%s %s: %s", method, path, body)
	var a answer
	require.NoError(t, json.Unmarshal(body, &a), "%s", body)
	return a
}

// eventually waits until f is true; what says for what.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	require.Eventually(t, f, time.Minute, 20*time.Millisecond, what)
}

// try asks the application of an instance without insisting on an answer.
func try(t *testing.T, in api.Instance, path string) (code int, body []byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+in.Endpoints[0].Address+path, nil)
	require.NoError(t, err)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Do(req)
	if err != nil {
		return 0, nil
	}
	defer resp.Body.Close()
	if body, err = io.ReadAll(resp.Body); err != nil {
		return 0, nil
	}
	return resp.StatusCode, body
}
