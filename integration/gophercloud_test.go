package integration

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"cloudlet/api"
	"cloudlet/integration/guest"

	"github.com/gophercloud/gophercloud/v2"
	"github.com/gophercloud/gophercloud/v2/openstack"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/flavors"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/migrations"
	"github.com/gophercloud/gophercloud/v2/openstack/compute/v2/servers"
	"github.com/gophercloud/gophercloud/v2/openstack/image/v2/images"
	"github.com/gophercloud/gophercloud/v2/openstack/utils"
	"github.com/stretchr/testify/require"
)

// token returns the daemon's token of the role operate.
func (d *daemon) token() string {
	d.l.t.Helper()
	for line := range strings.Lines(string(read(d.l.t, filepath.Join(d.l.state, "tokens")))) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "operate" {
			return fields[2]
		}
	}
	d.l.t.Fatal("the daemon has no token")
	return ""
}

// cloud is a daemon as gophercloud sees it: a token and an endpoint.
type cloud struct {
	t       *testing.T
	d       *daemon
	compute *gophercloud.ServiceClient
	image   *gophercloud.ServiceClient
	base    images.Image // the disk image of its base
	flavor  string
}

// newCloud looks around: versions, flavors, and the four images of the base.
func newCloud(t *testing.T, d *daemon) *cloud {
	t.Helper()
	p, err := openstack.NewClient(d.address + "/")
	require.NoError(t, err)
	p.TokenID = d.token()
	c := &cloud{t: t, d: d}
	p.EndpointLocator = func(eo gophercloud.EndpointOpts) (string, error) {
		return d.address + map[string]string{"compute": "/v2.1/", "image": "/"}[eo.Type], nil
	}
	c.compute, err = openstack.NewComputeV2(p, gophercloud.EndpointOpts{})
	require.NoError(t, err)
	c.image, err = openstack.NewImageV2(p, gophercloud.EndpointOpts{})
	require.NoError(t, err)

	is, err := utils.GetSupportedMicroversions(t.Context(), c.compute)
	require.NoError(t, err)
	require.Equal(t, utils.SupportedMicroversions{MinMajor: 2, MinMinor: 1, MaxMajor: 2, MaxMinor: 24}, is)
	*c.compute, err = utils.RequireMicroversion(t.Context(), *c.compute, "2.24")
	require.NoError(t, err)

	pages, err := flavors.ListDetail(c.compute, flavors.ListOpts{MinRAM: guest.MemoryMiB}).AllPages(t.Context())
	require.NoError(t, err)
	sizes, err := flavors.ExtractFlavors(pages)
	require.NoError(t, err)
	require.Len(t, sizes, 1)
	require.Equal(t, guest.MemoryMiB, sizes[0].RAM)
	one, err := flavors.Get(t.Context(), c.compute, sizes[0].ID).Extract()
	require.NoError(t, err)
	require.Equal(t, sizes[0], *one)
	c.flavor = one.ID

	kinds := map[string]images.Image{}
	for _, im := range c.images() {
		kinds[im.Properties["cloudlet_type"].(string)] = im
	}
	delete(kinds, "cloudlet_overlay") // what handoffs bring comes with it
	require.Len(t, kinds, 4)
	c.base = kinds["cloudlet_base_disk"]
	require.Equal(t, "base-disk", c.base.Name)
	for _, kind := range []string{"cloudlet_base_memory", "cloudlet_base_disk_hash", "cloudlet_base_memory_hash"} {
		require.Equal(t, kinds[kind].ID, c.base.Properties[kind], "the disk image names its siblings")
		require.Equal(t, d.l.base, kinds[kind].Properties["base_sha256_uuid"])
	}
	return c
}

func (c *cloud) images() []images.Image {
	c.t.Helper()
	pages, err := images.List(c.image, images.ListOpts{}).AllPages(c.t.Context())
	require.NoError(c.t, err)
	list, err := images.ExtractImages(pages)
	require.NoError(c.t, err)
	return list
}

// create asks for a server whose application can be reached, and waits until it is ACTIVE.
func (c *cloud) create(image string, metadata map[string]string) servers.Server {
	c.t.Helper()
	all := map[string]string{"ports": fmt.Sprint(guest.Port), "probe": fmt.Sprintf("%d/healthz", guest.Port)}
	for k, v := range metadata {
		all[k] = v
	}
	s, err := servers.Create(c.t.Context(), c.compute, servers.CreateOpts{
		Name: fmt.Sprintf("s%d", time.Now().UnixNano()), ImageRef: image, FlavorRef: c.flavor, Metadata: all, Networks: "auto",
	}, nil).Extract()
	require.NoError(c.t, err)
	return c.await(s.ID, "ACTIVE")
}

// await waits for a status.
func (c *cloud) await(id, status string) servers.Server {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 2*time.Minute)
	defer cancel()
	err := servers.WaitForStatus(ctx, c.compute, id, status)
	s, gerr := servers.Get(c.t.Context(), c.compute, id).Extract()
	require.NoError(c.t, gerr)
	require.NoError(c.t, err, "want %s: %+v", status, s)
	return *s
}

// at is a server as the other tests' helpers take an instance.
func at(t *testing.T, s servers.Server) api.Instance {
	t.Helper()
	address := s.Metadata[fmt.Sprintf("endpoint_%d", guest.Port)]
	require.NotEmpty(t, address, "%+v", s)
	return api.Instance{Endpoints: []api.Endpoint{{Guest: guest.Port, Address: address}}}
}

// act does what gophercloud has no verb for, with its client.
func (c *cloud) act(id, key string, args any, answer any) error {
	_, err := c.compute.Post(c.t.Context(), c.compute.ServiceURL("servers", id, "action"), map[string]any{key: args}, answer,
		&gophercloud.RequestOpts{OkCodes: []int{http.StatusAccepted}})
	return err
}

// awaitImage waits until an image that was promised is there.
func (c *cloud) awaitImage(id string) images.Image {
	c.t.Helper()
	var im *images.Image
	eventually(c.t, "the image "+id, func() bool {
		var err error
		im, err = images.Get(c.t.Context(), c.image, id).Extract()
		require.NoError(c.t, err)
		require.Contains(c.t, []images.ImageStatus{images.ImageStatusQueued, images.ImageStatusSaving, images.ImageStatusActive}, im.Status)
		return im.Status == images.ImageStatusActive
	})
	return *im
}

func (c *cloud) remove(id string) {
	c.t.Helper()
	require.NoError(c.t, servers.Delete(c.t.Context(), c.compute, id).ExtractErr())
	_, err := servers.Get(c.t.Context(), c.compute, id).Extract()
	require.True(c.t, gophercloud.ResponseCodeIs(err, http.StatusNotFound), "%v", err)
}

// TestGophercloud drives every shape with gophercloud as it is: a base is resumed, changed and
// captured, the overlay synthesised from a URL, paused, stopped, captured as a base, handed off
// to another daemon, and answers there.
func TestGophercloud(t *testing.T) {
	ctx := t.Context()
	b := newLab(t)
	db := b.serve()
	l := newLab(t)
	file := filepath.Join(t.TempDir(), "app.overlay")
	w := newWeb(t, file)
	depot := "http://" + w.address + "/"
	c := newCloud(t, l.serve("--allow-url", depot, "--allow-url", db.address+"/"))

	// A base, resumed without metadata of an overlay, and what it has changed as an image.
	work := c.create(c.base.ID, nil)
	require.Equal(t, c.base.ID, work.Image["id"])
	require.Equal(t, servers.RUNNING, int(work.PowerState))
	token := ask(t, at(t, work), "GET", "/").Token
	ask(t, at(t, work), "POST", "/write?mib=4&seed=a")
	var made map[string]string
	require.NoError(t, c.act(work.ID, "cloudlet-overlay-finish", map[string]string{"overlay-name": "app"}, &made))
	ov := c.awaitImage(made["overlay-id"])
	require.Equal(t, "cloudlet_overlay", ov.Properties["cloudlet_type"])
	require.Equal(t, token, ask(t, at(t, work), "GET", "/").Token, "it goes on")
	id := ov.Properties["cloudlet_overlay_id"].(string)
	copyFile(t, filepath.Join(l.state, "overlays", id, "overlay"), file)
	c.remove(work.ID)

	// VM synthesis, from a URL and from the image of the overlay.
	app := c.create(c.base.ID, map[string]string{"overlay_url": depot + "app.overlay"})
	require.Equal(t, depot+"app.overlay", app.Metadata["overlay_url"])
	require.Equal(t, token, ask(t, at(t, app), "GET", "/").Token)
	second := c.create(ov.ID, nil)
	require.Equal(t, token, ask(t, at(t, second), "GET", "/").Token)
	pages, err := servers.List(c.compute, servers.ListOpts{Limit: 1}).AllPages(ctx)
	require.NoError(t, err)
	list, err := servers.ExtractServers(pages)
	require.NoError(t, err)
	require.Equal(t, []string{app.ID, second.ID}, []string{list[0].ID, list[1].ID})
	meta, err := servers.Metadata(ctx, c.compute, app.ID).Extract()
	require.NoError(t, err)
	require.Equal(t, app.Metadata, meta)
	pages, err = servers.ListAddresses(c.compute, app.ID).AllPages(ctx)
	require.NoError(t, err)
	addresses, err := servers.ExtractAddresses(pages)
	require.NoError(t, err)
	require.Equal(t, "127.0.0.1", addresses["cloudlet"][0].Address)

	// Actions. Stopped it keeps its disk and forgets its memory.
	require.NoError(t, servers.Pause(ctx, c.compute, second.ID).ExtractErr())
	c.await(second.ID, "PAUSED")
	require.NoError(t, servers.Unpause(ctx, c.compute, second.ID).ExtractErr())
	c.await(second.ID, "ACTIVE")
	require.Equal(t, token, ask(t, at(t, second), "GET", "/").Token)
	require.NoError(t, servers.Stop(ctx, c.compute, second.ID).ExtractErr())
	c.await(second.ID, "SHUTOFF")
	require.NoError(t, servers.Start(ctx, c.compute, second.ID).ExtractErr())
	c.await(second.ID, "ACTIVE")
	eventually(t, "the guest has booted", func() bool { code, _ := try(t, at(t, second), "/healthz"); return code == 200 })
	require.NotEqual(t, token, ask(t, at(t, second), "GET", "/").Token, "it has booted")
	console, err := servers.ShowConsoleOutput(ctx, c.compute, second.ID, servers.ShowConsoleOutputOpts{Length: 3}).Extract()
	require.NoError(t, err)
	require.Contains(t, console, "guest: ready")

	// What it is now as a base of its own: the memory is that of the boot.
	booted := ask(t, at(t, second), "GET", "/").Token
	require.NoError(t, c.act(second.ID, "cloudlet-base", map[string]string{"name": "own"}, &made))
	own := c.awaitImage(made["base-disk"])
	require.Equal(t, "cloudlet_base_memory", c.awaitImage(made["base-memory"]).Properties["cloudlet_type"])
	require.Equal(t, "own-disk", own.Name)
	c.remove(second.ID)
	fresh := c.create(own.ID, nil)
	require.Equal(t, booted, ask(t, at(t, fresh), "GET", "/").Token)
	require.NoError(t, c.act(fresh.ID, "cloudlet-overlay-finish", map[string]any{"overlay-name": "last", "terminate": true}, &made))
	c.awaitImage(made["overlay-id"])
	c.await(fresh.ID, "SHUTOFF")
	c.remove(fresh.ID)

	// Handoff to the other daemon, where it answers.
	var moved map[string]string
	require.NoError(t, c.act(app.ID, "cloudlet-handoff", map[string]string{"handoff_url": db.address, "dest_token": db.token(), "dest_vmname": "there"}, &moved))
	require.Len(t, moved["handoff"], 32)
	gone := c.await(app.ID, "DELETED")
	require.Equal(t, db.address, gone.Metadata["moved_to"])
	there := newCloud(t, db)
	arrived := there.await(gone.Metadata["moved_server"], "ACTIVE")
	require.Equal(t, "there", arrived.Name)
	require.Equal(t, token, ask(t, at(t, arrived), "GET", "/").Token)
	c.requireMoved(app.ID)
	c.remove(app.ID)

	c.requireRefusals(db)
	there.remove(arrived.ID)
	for _, im := range c.images() {
		if im.Properties["cloudlet_type"] == "cloudlet_overlay" {
			require.NoError(t, images.Delete(ctx, c.image, im.ID).ExtractErr())
		}
	}
	c.d.end(syscall.SIGTERM)
	db.end(syscall.SIGTERM)
}

// requireMoved looks at the handoff of a server as a migration.
func (c *cloud) requireMoved(id string) {
	c.t.Helper()
	var moves struct {
		Migrations []struct {
			ID        int64
			Status    string
			Total     int64 `json:"memory_total_bytes"`
			Processed int64 `json:"memory_processed_bytes"`
			Remaining int64 `json:"memory_remaining_bytes"`
		}
	}
	_, err := c.compute.Get(c.t.Context(), c.compute.ServiceURL("servers", id, "migrations"), &moves, nil)
	require.NoError(c.t, err)
	require.Len(c.t, moves.Migrations, 1)
	m := moves.Migrations[0]
	require.Equal(c.t, "completed", m.Status)
	require.Positive(c.t, m.Total)
	require.Equal(c.t, m.Total, m.Processed)
	require.Zero(c.t, m.Remaining)
	pages, err := migrations.List(c.compute, migrations.ListOpts{}).AllPages(c.t.Context())
	require.NoError(c.t, err)
	all, err := migrations.ExtractMigrations(pages)
	require.NoError(c.t, err)
	require.Len(c.t, all, 1)
	require.Equal(c.t, id, all[0].InstanceID)
	_, err = c.compute.Delete(c.t.Context(), c.compute.ServiceURL("servers", id, "migrations", fmt.Sprint(m.ID)), nil)
	require.True(c.t, gophercloud.ResponseCodeIs(err, http.StatusBadRequest), "%v", err)
}

// requireRefusals: what is wrong is refused with a status and words, or ends in ERROR with them.
func (c *cloud) requireRefusals(db *daemon) {
	t, ctx := c.t, c.t.Context()
	create := func(image string, metadata map[string]string) (*servers.Server, error) {
		return servers.Create(ctx, c.compute, servers.CreateOpts{Name: "n", ImageRef: image, FlavorRef: c.flavor, Metadata: metadata}, nil).Extract()
	}
	refused := func(err error, status int, words string) {
		t.Helper()
		var answer gophercloud.ErrUnexpectedResponseCode
		require.True(t, errors.As(err, &answer), "%v", err)
		require.Equal(t, status, answer.Actual, "%s", answer.Body)
		require.Contains(t, string(answer.Body), words)
	}
	_, err := create(c.base.ID, map[string]string{"overlay_url": "http://192.0.2.1/app.overlay"})
	refused(err, 400, "allow")
	_, err = create("debian", nil)
	refused(err, 400, "debian")
	s, err := create(c.base.ID, nil)
	require.NoError(t, err)
	c.await(s.ID, "ACTIVE")
	refused(c.act(s.ID, "cloudlet-handoff", map[string]string{"handoff_url": db.address}, nil), 400, "dest_token")
	refused(c.act(s.ID, "os-start", nil, nil), 409, "active")
	refused(c.act(s.ID, "evacuate", nil, nil), 400, "evacuate")
	c.remove(s.ID)

	// What shows only when the overlay is looked at.
	s, err = create(c.base.ID, map[string]string{"overlay_url": db.address + "/missing"})
	require.NoError(t, err)
	require.Contains(t, c.await(s.ID, "ERROR").Fault.Message, "missing")
	c.remove(s.ID)
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	require.NoError(t, os.WriteFile(to, read(t, from), 0o600))
}
