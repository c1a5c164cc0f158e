package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"cloudlet/api"
	"cloudlet/overlay"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// cli runs one command line on a store in dir.
func cli(t *testing.T, dir string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	env := &environment{
		args: args, stdin: &bytes.Buffer{}, stdout: &out, stderr: &errs,
		getenv: func(name string) string { return map[string]string{"CLOUDLET_STATE": dir}[name] },
	}
	code = run(t.Context(), env)
	return code, out.String(), errs.String()
}

func TestWrongWords(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, []byte("nothing of ours"), 0o600))
	for _, tt := range []struct {
		code int
		want string
		args []string
	}{
		{exitUsage, `did you mean run`, []string{"rnu"}},
		{exitUsage, `unknown command "creat"`, []string{"base", "creat"}},
		{exitUsage, "unknown flag: --speed", []string{"run", "x", "--speed"}},
		{exitUsage, "the form is: cloudlet run REF", []string{"run"}},
		{exitUsage, "the form is: cloudlet rm INSTANCE...", []string{"rm"}},
		{exitUsage, "GUEST, HOST:GUEST or ADDR:HOST:GUEST", []string{"run", "x", "-p", "http"}},
		{exitUsage, "want PORT/PATH", []string{"run", "x", "--probe", "/healthz"}},
		{exitUsage, "a paused guest does not answer", []string{"run", "x", "--probe", "80/", "--paused"}},
		{exitUsage, "go with --probe", []string{"run", "x", "--probe-status", "200"}},
		{exitUsage, "--keep goes with --probe", []string{"run", "x", "--keep"}},
		{exitUsage, "goes with --probe", []string{"base", "create", file, "--console", "login:", "--probe-contains", "ok"}},
		{exitUsage, "--vmm says how a service in this process works", []string{"--server", "http://127.0.0.1:1", "--vmm", "libvirt", "ps"}},
		{exitUsage, "--mount-memory says", []string{"--server", "http://127.0.0.1:1", "--mount-memory", "1G", "ps"}},
		{exitUsage, "--cache-size says", []string{"--server", "http://127.0.0.1:1", "--cache-size", "0", "ps"}},
		{exitUsage, "go with --kernel", []string{"base", "create", file, "--initrd", file}},
		{exitUsage, "-o FILE", []string{"base", "export", "x"}},
		{exitUsage, "like 512M", []string{"base", "create", file, "--memory", "much"}},
		{exitNotFound, "no base or overlay", []string{"run", "x"}},
		{exitNotFound, `no base "x"`, []string{"base", "show", "x"}},
		{exitNotFound, `no overlay "x"`, []string{"overlay", "show", "x"}},
		{exitNotFound, `no instance "x"`, []string{"stop", "x"}},
		{exitNotFound, "no such file", []string{"base", "import", "x"}},
		{exitUsage, `name "A B" is not allowed`, []string{"base", "import", file, "--name", "A B"}},
		{exitDamaged, "not a base zip", []string{"base", "import", file}},
		{exitDamaged, "not a valid overlay", []string{"overlay", "show", file}},
		{exitDamaged, "not a valid overlay", []string{"run", file}},
		{exitUnavailable, "state folder", []string{"--state", "/proc/no", "ps"}},
	} {
		t.Run(fmt.Sprint(tt.args), func(t *testing.T) {
			code, stdout, stderr := cli(t, dir, tt.args...)
			require.Equal(t, tt.code, code, stderr)
			require.Contains(t, stderr, tt.want)
			require.Empty(t, stdout)
		})
	}
	left, err := os.ReadDir(filepath.Join(dir, "tmp"))
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestErrorsAsJSON(t *testing.T) {
	code, _, stderr := cli(t, t.TempDir(), "--json", "base", "show", "x")
	require.Equal(t, exitNotFound, code)
	var e api.Error
	require.NoError(t, json.Unmarshal([]byte(stderr), &e))
	require.Equal(t, api.NotFound, e.Code)
	require.NotEmpty(t, e.Remedy)
}

// TestErrorsInOthers: what commands add to an error of the service is said, and its remedy once.
func TestErrorsInOthers(t *testing.T) {
	err := fmt.Errorf("write x: %w", api.Errorf(api.Unavailable, "no space").Fix("make some"))
	var out bytes.Buffer
	(&environment{stderr: &out}).fail(err)
	require.Equal(t, "cloudlet: write x: no space\n  remedy: make some\n", out.String())
	out.Reset()
	(&environment{stderr: &out, json: true}).fail(err)
	require.JSONEq(t, `{"code":"unavailable","detail":"write x: no space","remedy":"make some"}`, out.String())
}

// TestHelp: every command explains itself and none panics.
func TestHelp(t *testing.T) {
	env := &environment{getenv: func(string) string { return "" }, stdout: &bytes.Buffer{}, stderr: &bytes.Buffer{}}
	var paths [][]string
	for _, cmd := range newRoot(env).Commands() {
		paths = append(paths, []string{cmd.Name()})
		for _, sub := range cmd.Commands() {
			paths = append(paths, []string{cmd.Name(), sub.Name()})
		}
	}
	require.Greater(t, len(paths), 20)
	for _, path := range paths {
		code, stdout, stderr := cli(t, t.TempDir(), append(path, "--help")...)
		require.Zero(t, code, stderr)
		require.Contains(t, stdout, "Usage:", path)
	}
}

func TestEmptyStore(t *testing.T) {
	dir := t.TempDir()
	for _, path := range [][]string{{"ps"}, {"base", "list"}, {"overlay", "list"}} {
		code, stdout, _ := cli(t, dir, path...)
		require.Zero(t, code)
		require.Contains(t, stdout, "ID")
		code, stdout, _ = cli(t, dir, append(path, "--json")...)
		require.Zero(t, code)
		require.Equal(t, "[]\n", stdout)
	}
}

func TestExitCodes(t *testing.T) {
	for code, want := range exitCodes {
		err := fmt.Errorf("wrapped: %w", api.Errorf(code, "x"))
		require.Equal(t, want, exitCode(err))
	}
	require.Equal(t, exitOK, exitCode(nil))
	require.Equal(t, exitError, exitCode(errors.New("x")))
	require.Equal(t, exitError, exitCode(fs.ErrNotExist))
	require.Equal(t, exitError, exitCode(api.Errorf("rate_limited", "of a service that knows more codes")))
	require.Equal(t, exitUsage, exitCode(fmt.Errorf("x: %w", usageError{errors.New("y")})))

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var errs bytes.Buffer
	dir := t.TempDir()
	env := &environment{args: []string{"overlay", "import", "http://127.0.0.1:9/x"}, getenv: func(string) string { return dir }, stdout: &bytes.Buffer{}, stderr: &errs}
	require.Equal(t, exitInterrupted, run(ctx, env), errs.String())
}

func TestParse(t *testing.T) {
	for text, want := range map[string]int64{"0": 0, "1": 1, "4K": 4096, "256M": 256 << 20, "1G": 1 << 30, "2GiB": 2 << 30, "1T": 1 << 40} {
		n, err := parseBytes(text)
		require.NoError(t, err, text)
		require.Equal(t, want, n, text)
	}
	for _, text := range []string{"", "M", "-1", "1.5G", "1X", "9999999999T", "1MG"} {
		_, err := parseBytes(text)
		require.Error(t, err, text)
	}
	for text, want := range map[string]api.Forward{
		"80": {Guest: 80}, "8080:80": {Host: 8080, Guest: 80}, ":80": {Guest: 80}, "0.0.0.0:1:2": {Address: "0.0.0.0", Host: 1, Guest: 2}, "127.0.0.1::2": {Address: "127.0.0.1", Guest: 2},
	} {
		var f forwardsFlag
		require.NoError(t, f.Set(text), text)
		require.Equal(t, want, f[0], text)
	}
	for _, text := range []string{"", "0", "70000", "a:80", "host:1:2", "::1:80", "1:2:3:4", "127.0.0.1:80:x", "1.2.3:1:2"} {
		var f forwardsFlag
		require.Error(t, f.Set(text), text)
	}
	var p probeFlag
	require.NoError(t, p.Set("8080/a/b?c=d"))
	require.Equal(t, api.Probe{Port: 8080, Path: "/a/b?c=d"}, *p.Probe)
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 200 << 20: "200 MiB", 3 << 29: "1.5 GiB"} {
		require.Equal(t, want, size(n))
	}
}

// TestStrategiesInHelp: the help names every strategy.
func TestStrategiesInHelp(t *testing.T) {
	_, out, _ := cli(t, t.TempDir(), "overlay", "create", "--help")
	for _, name := range overlay.Strategies() {
		require.Contains(t, out, name)
	}
}
