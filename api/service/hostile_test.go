package service

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestSecretsOfURLs: what gives access to a URL is kept for the next daemon, and shown to nobody.
func TestSecretsOfURLs(t *testing.T) {
	broken := false
	content := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if broken {
			http.Error(w, "gone", http.StatusGone)
			return
		}
		broken = true
		w.Header().Set("ETag", `"1"`)
		http.ServeContent(w, r, "o", time.Time{}, strings.NewReader(strings.Repeat("x", 1<<20)))
	}))
	defer content.Close()
	s := newService(t)
	source := content.URL + "/overlay?signature=secret"
	op, err := s.Submit(t.Context(), Caller{Local: true}, api.ImportOverlay{Name: "app", Source: source})
	require.NoError(t, err)
	require.JSONEq(t, `{"name": "app", "source": "`+content.URL+`/overlay?..."}`, string(op.Request))
	ended := awaitEnd(t, s, op.ID)
	require.Equal(t, api.OperationFailed, ended.State)
	list, err := s.Operations(t.Context())
	require.NoError(t, err)
	other, err := reopen(t, s, nil).Operation(t.Context(), op.ID)
	require.NoError(t, err)
	in := (&record{Links: []link{{Source: "http://user:secret@host/overlay?secret#secret"}}}).describe()
	shown, err := json.Marshal([]any{ended, list, other, in})
	require.NoError(t, err)
	require.NotContains(t, string(shown), "secret")
	require.Equal(t, "http://host/overlay?...", in.Source)
	kept, err := os.ReadFile(s.operationPath(op.ID, "record.json"))
	require.NoError(t, err)
	require.Contains(t, string(kept), "secret")
	for _, ref := range []string{"app", "/a file?x", "http://host/overlay", "file:///overlay"} {
		require.Equal(t, ref, shownRef(ref))
	}
}

// TestOddNames: what cannot be the name of a file is not found, or refused, and no fault.
func TestOddNames(t *testing.T) {
	s := newService(t)
	file := t.TempDir() + "/file"
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	local := Caller{Local: true}
	for name, ref := range map[string]string{"too long": strings.Repeat("z", 300), "below a file": file + "/x", "zero byte": "a\x00b"} {
		_, err := s.OverlayFor(t.Context(), local, ref)
		require.Equal(t, api.NotFound, api.CodeOf(err), name)
		_, err = s.Submit(t.Context(), local, api.Run{Ref: ref})
		require.Equal(t, api.NotFound, api.CodeOf(err), name)
	}
	for name, path := range map[string]string{"too long": "/" + strings.Repeat("z", 300), "below a file": file + "/x"} {
		_, err := s.Submit(t.Context(), local, api.ImportOverlay{Source: path})
		require.Equal(t, api.NotFound, api.CodeOf(err), name)
	}
	_, err := s.Submit(t.Context(), local, api.ImportBase{Source: "/a\x00b"})
	require.Equal(t, api.Invalid, api.CodeOf(err))
}

// TestFilesOfABase: what no base can be made of is refused at once, a pipe above all, whose
// opening nothing could end.
func TestFilesOfABase(t *testing.T) {
	s := newService(t)
	dir := t.TempDir()
	pipe, file := dir+"/pipe", dir+"/file"
	require.NoError(t, unix.Mkfifo(pipe, 0o600))
	require.NoError(t, os.WriteFile(file, make([]byte, 4096), 0o600))
	for name, tt := range map[string]struct {
		req   api.CreateBase
		field string
		code  api.Code
	}{
		"a pipe as disk":      {api.CreateBase{Disk: pipe}, "disk", api.Invalid},
		"a terminal as disk":  {api.CreateBase{Disk: "/dev/null"}, "disk", api.Invalid},
		"a folder as disk":    {api.CreateBase{Disk: dir}, "disk", api.Invalid},
		"no disk":             {api.CreateBase{Disk: dir + "/none"}, "disk", api.NotFound},
		"a pipe as kernel":    {api.CreateBase{Disk: file, Kernel: pipe}, "kernel", api.Invalid},
		"a folder as initrd":  {api.CreateBase{Disk: file, Kernel: file, Initrd: dir}, "initrd", api.Invalid},
		"fewer CPUs than one": {api.CreateBase{Disk: file, CPUs: -1}, "cpus", api.Invalid},
	} {
		tt.req.Memory = 64 << 20
		_, err := s.Submit(t.Context(), Caller{Local: true}, tt.req)
		var e *api.Error
		require.ErrorAs(t, err, &e, name)
		require.Equal(t, tt.code, e.Code, name)
		require.Equal(t, tt.field, e.Field, name)
	}
}

// TestInstanceEndsOnFullDisk: an instance can be ended where no byte can be written, and what its guest
// has changed makes room for its record.
func TestInstanceEndsOnFullDisk(t *testing.T) {
	s := smallStore(t, "1m")
	r := &record{ID: "0123456789ab", State: api.Running, Mount: "none"}
	require.NoError(t, os.MkdirAll(s.instancePath(r.ID, "vm"), 0o700))
	require.NoError(t, s.writeRecord(r))
	layer := s.instancePath(r.ID, "vm", "disk.0.qcow2")
	require.ErrorIs(t, os.WriteFile(layer, make([]byte, 2<<20), 0o600), unix.ENOSPC)
	in, err := s.end(t.Context(), r, api.Stopped, "stopped by request")
	require.NoError(t, err)
	require.Equal(t, api.Stopped, in.State)
	require.NoFileExists(t, layer)
	kept, err := s.readRecord(r.ID)
	require.NoError(t, err)
	require.Equal(t, api.Stopped, kept.State)
}
