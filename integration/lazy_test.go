package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/api/client"
	"cloudlet/integration/guest"

	"github.com/stretchr/testify/require"
)

// profiled captures an instance that has 24 MiB of its own and packs it by a profile.
func (l *lab) profiled() (file, token string, o api.CreatedOverlay) {
	l.t.Helper()
	work := l.start(l.base)
	token = ask(l.t, work, "GET", "/").Token
	ask(l.t, work, "POST", "/dirty?mib=24")
	ask(l.t, work, "POST", "/write?mib=24&seed=cold")
	file = filepath.Join(l.t.TempDir(), "app.overlay")
	o = l.capture(work.ID, "-o", file, "--strategy", "fast", "--profile", fmt.Sprintf("%d/?window=7", guest.Port))
	l.ok("rm", "--force", work.ID)
	return file, token, o
}

// TestLazyRemote runs an overlay from a web server: what the profile lists comes first, the
// rest when the guest is at rest, and from then on neither the guest nor another instance
// needs the server for it.
func TestLazyRemote(t *testing.T) {
	l := newLab(t)
	file, token, o := l.profiled()
	l.ok("overlay", "rm", o.ID)
	w := newWeb(t, file)

	in := l.start(w.url(), "--probe", fmt.Sprintf("%d/?window=7", guest.Port))
	t.Logf("%d of %d bytes before the first answer", w.sent.Load(), o.Size)
	eventually(t, "all of the overlay is here", func() bool { return l.inspect(in.ID).Mount.Complete })
	require.Less(t, w.sent.Load(), o.Size+o.Size/20, "every frame is fetched once")
	w.down()
	requireWhole(t, in, token)
	ask(t, in, "GET", "/verify?seed=cold")
	l.ok("rm", "--force", in.ID)

	w.up()
	before := w.sent.Load()
	in = l.start(w.url())
	requireWhole(t, in, token)
	require.Less(t, w.sent.Load()-before, o.Size/10, "the frames are on this host's disk")
	l.ok("rm", "--force", in.ID)

	// What is read back is checked: a cache that was changed is fetched anew.
	kept, err := filepath.Glob(filepath.Join(l.state, "cache", o.ID+"-*"))
	require.NoError(t, err)
	require.Len(t, kept, 1)
	info, err := os.Stat(kept[0])
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(kept[0], bytes.Repeat([]byte{7}, int(info.Size())), 0o600))
	in = l.start(w.url())
	requireWhole(t, in, token)
	l.ok("rm", "--force", in.ID)
	in = l.start(w.url(), "--cache-size", "0")
	requireWhole(t, in, token)
	l.ok("rm", "--force", in.ID)

	w.inOrder.Store(true) // a server without ranges: everything in order
	in = l.start(w.url())
	requireWhole(t, in, token)
}

// TestLazyUpload starts an instance of an upload whose end has not arrived: it runs on
// the part that is here, waits for the rest, and is an ordinary one afterwards.
func TestLazyUpload(t *testing.T) {
	l := newLab(t)
	file, token, o := l.profiled()
	l.ok("overlay", "rm", o.ID)
	content := read(t, file)
	l.serve()
	c, err := client.New(client.Options{Server: "unix:" + filepath.Join(l.state, "cloudlet.sock")})
	require.NoError(t, err)
	defer c.Close()
	up, err := c.CreateUpload(t.Context(), api.CreateUpload{Name: "app", Size: int64(len(content))})
	require.NoError(t, err)
	half := len(content) / 2
	l.append(up, content, 0, half)

	var in api.Instance
	l.json(&in, "run", up.ID, "-p", fmt.Sprint(guest.Port), "--paused")
	require.NotNil(t, l.inspect(in.ID).Mount)
	l.ok("continue", in.ID)
	p := request(t, in, "GET", "/verify")
	eventually(t, "the guest waits for what has not arrived", func() bool { return l.inspect(in.ID).Reason != "" })
	require.Regexp(t, `waits for \d+ pages: \w`, l.inspect(in.ID).Reason)
	require.Error(t, c.DeleteUpload(t.Context(), up.ID), "an instance uses it")
	l.append(up, content, half, len(content))
	require.NoError(t, <-p)
	requireWhole(t, in, token)
	eventually(t, "the overlay is in the store", func() bool { return l.run("overlay", "show", o.ID).code == 0 })

	l.fails(4, "taken into the store", "run", up.ID)
	next := l.capture(in.ID)
	require.Equal(t, o.ID, next.Parent)
	again := l.start(next.ID)
	requireWhole(t, again, token)
}

// append sends bytes from..to of an upload.
func (l *lab) append(up api.Upload, content []byte, from, to int) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), time.Minute)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://local/v1/overlays/"+up.ID+"/content", bytes.NewReader(content[from:to]))
	require.NoError(l.t, err)
	req.Header.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(content)))
	resp, err := overUnix(filepath.Join(l.state, "cloudlet.sock")).Do(req)
	require.NoError(l.t, err)
	defer resp.Body.Close()
	var out json.RawMessage
	require.NoError(l.t, json.NewDecoder(resp.Body).Decode(&out))
	require.Less(l.t, resp.StatusCode, 300, "%s", out)
}

// overUnix returns an HTTP client of a unix socket.
func overUnix(path string) *http.Client {
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}}
}
