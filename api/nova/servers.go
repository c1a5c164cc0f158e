package nova

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"cloudlet/api"
)

// project is whose everything is: there are no others.
const project = "cloudlet"

// The words for what a server does.
const (
	active    = "ACTIVE"
	build     = "BUILD"
	paused    = "PAUSED"
	shutoff   = "SHUTOFF"
	failed    = "ERROR"
	migrating = "MIGRATING"
	deleted   = "DELETED" // handed off: it runs elsewhere, and its record is kept here
)

// vmStates are Nova's inner words for them.
var vmStates = map[string]string{
	active: "active", build: "building", paused: "paused", shutoff: "stopped", failed: "error", migrating: "active", deleted: "deleted",
}

// powerStates are the numbers of what the VM does.
var powerStates = map[string]int{active: 1, build: 0, paused: 3, shutoff: 4, failed: 0, migrating: 1, deleted: 4}

// vm is a server: an instance, the run that makes one, or both.
type vm struct {
	id   string // of the instance
	in   *api.Instance
	op   *api.Operation // the run, while it goes on or where it has failed
	req  api.Run        // of op
	base string         // id; "": not known yet
}

// find finds a server.
func (h *Handler) find(c *call) (v vm, err error) {
	ctx := c.r.Context()
	name := c.r.PathValue("id")
	id, ok := instanceOf(name)
	if !ok {
		return v, noServer(name)
	}
	in, ierr := h.service.Instance(ctx, id)
	if ierr != nil && api.CodeOf(ierr) != api.NotFound {
		return v, ierr
	}
	op, oerr := h.service.Operation(ctx, id)
	if oerr != nil && api.CodeOf(oerr) != api.NotFound {
		return v, oerr
	}
	v = vm{id: id}
	if ierr == nil && in.ID == id {
		v.in = &in
	}
	if oerr == nil && op.ID == id {
		v.with(op)
	}
	if v.in == nil && v.op == nil {
		return v, noServer(name)
	}
	v.settle()
	return v, nil
}

func noServer(id string) error {
	return missing("instance %.60q could not be found", id).fix("list the servers to see what there is")
}

// with adds the operation of a server, if it says anything that an instance does not.
func (v *vm) with(op api.Operation) {
	going := !op.State.Ended()
	if op.Kind != api.KindRun || !going && (v.in != nil || op.State != api.OperationFailed) {
		return
	}
	v.op = &op
	_ = json.Unmarshal(op.Request, &v.req) // the service's own
}

// settle finds the base.
func (v *vm) settle() {
	switch {
	case v.in != nil:
		v.base = v.in.Base
	case v.op != nil:
		v.base = v.req.Base
	}
}

// all lists the servers, the oldest first.
func (h *Handler) all(ctx context.Context) ([]vm, error) {
	// Operations first: a run that ends in between has its instance.
	ops, err := h.service.Operations(ctx)
	if err != nil {
		return nil, err
	}
	list, err := h.service.Instances(ctx, true)
	if err != nil {
		return nil, err
	}
	var out []vm
	known := map[string]int{}
	for i := range list {
		known[list[i].ID] = len(out)
		out = append(out, vm{id: list[i].ID, in: &list[i]})
	}
	for _, op := range ops {
		i, ok := known[op.ID]
		if !ok {
			v := vm{id: op.ID}
			if v.with(op); v.op != nil {
				out = append(out, v)
			}
			continue
		}
		out[i].with(op)
	}
	for i := range out {
		out[i].settle()
	}
	slices.SortStableFunc(out, func(a, b vm) int { return a.created().Compare(b.created()) })
	return out, nil
}

func (v *vm) created() time.Time {
	if v.in != nil {
		return v.in.Created
	}
	return v.op.Created
}

func (v *vm) name() string {
	name := v.req.Name
	if v.in != nil {
		name = v.in.Name
	}
	if name == "" {
		return v.id
	}
	return name
}

// status is the word for what the server does.
func (v *vm) status() string {
	switch {
	case v.op != nil && v.op.State.Ended():
		return failed
	case v.op != nil || v.in.State == api.Starting && v.in.Handoff == "":
		return build
	case v.in.Moved != nil && v.in.State == api.Stopped:
		return deleted
	case v.in.Handoff != "":
		return migrating
	}
	switch v.in.State {
	case api.Running:
		return active
	case api.Paused:
		if v.in.Reset {
			return shutoff
		}
		return paused
	case api.Stopped:
		return shutoff
	}
	return failed // lost, io-error, guest-panicked
}

// task is what goes on with the server; nil: nothing.
func (v *vm) task(status string) *string {
	word := map[string]string{build: "spawning", migrating: "migrating"}[status]
	if word == "" {
		return nil
	}
	return &word
}

// trouble is why the server has failed.
func (v *vm) trouble() *fault {
	if v.op != nil && v.op.Error != nil {
		return &fault{Code: statusOf(v.op.Error), Message: v.op.Error.Error(), Created: stamp(v.op.Ended)}
	}
	when := v.in.Ended
	if when.IsZero() {
		when = v.in.Created
	}
	words := string(v.in.State)
	if v.in.Reason != "" {
		words += ": " + v.in.Reason
	}
	return &fault{Code: http.StatusInternalServerError, Message: words, Created: stamp(when)}
}

// address is one address of a server.
type address struct {
	Version int    `json:"version"`
	Addr    string `json:"addr"`
	Type    string `json:"OS-EXT-IPS:type"`
	MAC     string `json:"OS-EXT-IPS-MAC:mac_addr"`
}

// guestMAC is the address that QEMU gives the guest's only interface.
const guestMAC = "52:54:00:12:34:56"

// network is the name under which the addresses stand.
const network = "cloudlet"

// endpoints are where the guest's ports can be reached: here, or where it has moved.
func (v *vm) endpoints() []api.Endpoint {
	switch {
	case v.in == nil:
		return nil
	case v.in.Moved != nil:
		return v.in.Moved.Endpoints
	}
	return v.in.Endpoints
}

// addresses are the hosts of the endpoints. Nova has no place for ports: metadata have.
func (v *vm) addresses() map[string][]address {
	out := map[string][]address{}
	for _, e := range v.endpoints() {
		host, _, err := net.SplitHostPort(e.Address)
		if err != nil || slices.ContainsFunc(out[network], func(a address) bool { return a.Addr == host }) {
			continue
		}
		version := 4
		if strings.Contains(host, ":") {
			version = 6
		}
		out[network] = append(out[network], address{version, host, "floating", guestMAC})
	}
	return out
}

// ips answers with the addresses alone, of all networks or of one.
func (h *Handler) ips(c *call) error {
	v, err := h.find(c)
	if err != nil {
		return err
	}
	all := map[string][]listed{}
	for name, list := range v.addresses() {
		for _, a := range list {
			all[name] = append(all[name], listed{a.Version, a.Addr})
		}
	}
	name := c.r.PathValue("network")
	if name == "" {
		return c.answer(http.StatusOK, map[string]any{"addresses": all})
	}
	if all[name] == nil {
		return missing("instance has no network %.60q", name)
	}
	return c.answer(http.StatusOK, map[string]any{name: all[name]})
}

// listed is an address in a list of addresses.
type listed struct {
	Version int    `json:"version"`
	Addr    string `json:"addr"`
}

// metadata say what the server is made of and where it can be reached.
func (v *vm) metadata() map[string]string {
	out := map[string]string{}
	if v.in == nil {
		if strings.Contains(v.req.Ref, "://") {
			out[keyOverlay] = v.req.Ref
		}
		return out
	}
	if strings.Contains(v.in.Source, "://") {
		out[keyOverlay] = v.in.Source
	}
	for _, e := range v.endpoints() {
		out["endpoint_"+strconv.Itoa(e.Guest)] = e.Address
	}
	if m := v.in.Moved; m != nil {
		out["moved_to"], out["moved_server"] = m.To, serverID(m.Instance)
	}
	return out
}

// image is the id of the image that the server was made from; "": it is not there any more.
func (v *vm) image(store *catalog) string {
	ref := v.req.Ref
	if v.in != nil {
		ref = v.in.Image
	}
	for _, o := range store.overlays {
		if o.ID == ref && (v.in == nil || v.in.Source == "") {
			return imageID(o.ID, overlayImage)
		}
	}
	if _, ok := store.base(v.base); ok {
		return imageID(v.base, baseDisk)
	}
	return ""
}

// flavor is the id of the server's flavor.
func (v *vm) flavor(store *catalog) string {
	if b, ok := store.base(v.base); ok {
		return flavorOf(b).id()
	}
	return "unknown"
}

// brief is a server in a list without details.
func (v *vm) brief(c *call) map[string]any {
	id := serverID(v.id)
	return map[string]any{"id": id, "name": v.name(), "links": c.links("/servers/" + id)}
}

// detail is a server with all of it.
func (v *vm) detail(c *call, store *catalog) map[string]any {
	status := v.status()
	out := v.brief(c)
	for k, value := range map[string]any{
		"status": status, "tenant_id": project, "user_id": project, "hostId": project, "key_name": nil, "config_drive": "",
		"created": stamp(v.created()), "updated": stamp(v.created()), "accessIPv4": "", "accessIPv6": "",
		"addresses": v.addresses(), "metadata": v.metadata(), "image": "", "security_groups": []map[string]string{},
		"flavor":              map[string]any{"id": v.flavor(store), "links": c.links("/flavors/" + v.flavor(store))[1:]},
		"OS-DCF:diskConfig":   "MANUAL",
		"OS-EXT-STS:vm_state": vmStates[status], "OS-EXT-STS:power_state": powerStates[status], "OS-EXT-STS:task_state": v.task(status),
		"OS-EXT-AZ:availability_zone": "nova", "OS-SRV-USG:launched_at": nil, "OS-SRV-USG:terminated_at": nil,
		"os-extended-volumes:volumes_attached": []string{},
	} {
		out[k] = value
	}
	if id := v.image(store); id != "" {
		out["image"] = map[string]any{"id": id, "links": c.links("/images/" + id)[1:]}
	}
	switch status {
	case failed:
		out["fault"] = v.trouble()
	case active, paused, build:
		out["progress"] = 100
		if status == build {
			out["progress"] = 0
		}
	}
	const inner = "2006-01-02T15:04:05.000000"
	if v.in != nil {
		out["OS-SRV-USG:launched_at"] = v.in.Created.UTC().Format(inner)
		if !v.in.Ended.IsZero() {
			out["updated"], out["OS-SRV-USG:terminated_at"] = stamp(v.in.Ended), v.in.Ended.UTC().Format(inner)
		}
	}
	v.later(c.micro, out)
	return out
}

// later adds what microversions have added.
func (v *vm) later(micro microversion, out map[string]any) {
	if micro >= withAttributes {
		for k, value := range map[string]any{"hostname": v.name(), "reservation_id": "r-" + v.id, "launch_index": 0, "kernel_id": "", "ramdisk_id": "", "root_device_name": "/dev/vda", "user_data": nil} {
			out["OS-EXT-SRV-ATTR:"+k] = value
		}
	}
	if micro >= withLocked {
		out["locked"] = false
	}
	if micro >= withDescription {
		out["description"] = nil
	}
}

// servers lists the servers that fit the query.
func (h *Handler) servers(c *call) error {
	list, err := h.all(c.r.Context())
	if err != nil {
		return err
	}
	store, err := h.catalog(c.r.Context())
	if err != nil {
		return err
	}
	query := c.r.URL.Query()
	name, err := regexp.Compile(query.Get("name"))
	if err != nil {
		return bad("the parameter name %.60q is not a regular expression", query.Get("name"))
	}
	gone := query.Get("deleted")
	list = slices.DeleteFunc(list, func(v vm) bool {
		status := v.status()
		return (status == deleted) != (gone == "1" || strings.EqualFold(gone, "true")) && query.Get("status") != deleted ||
			query.Get("status") != "" && query.Get("status") != status ||
			query.Get("image") != "" && query.Get("image") != v.image(&store) ||
			query.Get("flavor") != "" && query.Get("flavor") != v.flavor(&store) || !name.MatchString(v.name())
	})
	list, next, err := page(c, list, func(v vm) string { return serverID(v.id) })
	if err != nil {
		return err
	}
	out := map[string]any{}
	shown := make([]map[string]any, len(list))
	for i, v := range list {
		if c.route.path == "/v2.1/servers" {
			shown[i] = v.brief(c)
		} else {
			shown[i] = v.detail(c, &store)
		}
	}
	out["servers"] = shown
	if next != "" {
		out["servers_links"] = []link{{"next", c.url(next)}}
	}
	return c.answer(http.StatusOK, out)
}

func (h *Handler) server(c *call) error {
	v, err := h.find(c)
	if err != nil {
		return err
	}
	store, err := h.catalog(c.r.Context())
	if err != nil {
		return err
	}
	return c.answer(http.StatusOK, map[string]any{"server": v.detail(c, &store)})
}

func (h *Handler) metadata(c *call) error {
	v, err := h.find(c)
	if err != nil {
		return err
	}
	return c.answer(http.StatusOK, map[string]any{"metadata": v.metadata()})
}

func (h *Handler) metadatum(c *call) error {
	v, err := h.find(c)
	if err != nil {
		return err
	}
	key := c.r.PathValue("key")
	value, ok := v.metadata()[key]
	if !ok {
		return missing("metadata item %.60q was not found", key)
	}
	return c.answer(http.StatusOK, map[string]any{"meta": map[string]string{key: value}})
}

// fixedMetadata refuses changes: nothing is kept here.
func (h *Handler) fixedMetadata(c *call) error {
	if _, err := h.find(c); err != nil {
		return err
	}
	return refuse(http.StatusForbidden, api.Invalid, "the metadata of a server say what it is made of and where it is, and cannot be changed").fix("give overlay_url, ports and probe when it is created")
}

// deleteServer ends a server, or the making of one, and removes what is left of it.
func (h *Handler) deleteServer(c *call) error {
	v, err := h.find(c)
	if err != nil {
		return err
	}
	ctx := context.WithoutCancel(c.r.Context()) // half of it must not be left
	if v.op != nil && !v.op.State.Ended() {
		_, err := h.service.CancelOperation(ctx, v.id)
		if code := api.CodeOf(err); err != nil && code != api.Conflict && code != api.NotFound {
			return err
		}
	}
	derr := h.service.Delete(ctx, v.id, true)
	if derr != nil && api.CodeOf(derr) != api.NotFound {
		return derr
	}
	if derr != nil || v.op != nil {
		// What has failed leaves its record only.
		if err := h.service.ForgetOperation(ctx, v.id); err != nil && api.CodeOf(err) != api.NotFound {
			return err
		}
	}
	return c.done(http.StatusNoContent)
}
