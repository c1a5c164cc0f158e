package nova

import (
	"net/http"
	"slices"
	"strconv"
	"time"
)

// stamp writes a time as Nova and Glance do.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// glance is an image as the image service shows it: properties stand beside its fields.
func (p picture) glance(root string) map[string]any {
	out := map[string]any{
		"id": p.id, "name": p.name, "status": p.status, "visibility": "public", "protected": false, "owner": project,
		"container_format": "bare", "disk_format": "raw", "size": p.size, "virtual_size": nil, "checksum": nil,
		"min_disk": p.minDisk, "min_ram": p.minRAM, "tags": []string{}, "os_hidden": false,
		"created_at": stamp(p.created), "updated_at": stamp(p.created),
		"self": root + "/images/" + p.id, "file": root + "/images/" + p.id + "/file", "schema": root + "/schemas/image",
	}
	for k, v := range p.props {
		out[k] = v
	}
	return out
}

// novaStatus translates a status of Glance.
var novaStatus = map[string]string{"active": "ACTIVE", "saving": "SAVING", "queued": "SAVING", "killed": "ERROR"}

// nova is an image as Nova's own proxy shows it.
func (p picture) nova(c *call) map[string]any {
	progress := 100
	if p.status != "active" {
		progress = 0
	}
	return map[string]any{
		"id": p.id, "name": p.name, "status": novaStatus[p.status], "progress": progress, "metadata": p.props,
		"minDisk": p.minDisk, "minRam": p.minRAM, "created": stamp(p.created), "updated": stamp(p.created),
		"OS-EXT-IMG-SIZE:size": p.size, "links": c.links("/images/" + p.id),
	}
}

// links say where a thing is.
func (c *call) links(path string) []link {
	return []link{{"self", c.url("/v2.1" + path)}, {"bookmark", c.url(path)}}
}

// show is an image for a list. Clients with a single endpoint for all services read this path as
// Glance's, so Nova's list is Glance's with more in each element. Only in /v2.1/images/detail
// the two differ in meaning (status), and there Nova's counts.
func (c *call) show(p picture) map[string]any {
	if c.route.image {
		return p.glance("/v2")
	}
	out := p.glance("/v2.1")
	if c.route.path == "/v2.1/images/detail" {
		for k, v := range p.nova(c) {
			out[k] = v
		}
	}
	out["links"] = c.links("/images/" + p.id)
	return out
}

// images lists the images that fit the query.
func (h *Handler) images(c *call) error {
	store, err := h.catalog(c.r.Context())
	if err != nil {
		return err
	}
	list := store.pictures()
	making, err := h.pendings(c.r.Context(), &store)
	if err != nil {
		return err
	}
	query := c.r.URL.Query()
	list = slices.DeleteFunc(append(list, making...), func(p picture) bool { return !p.fits(query.Get) })
	list, next, err := page(c, list, func(p picture) string { return p.id })
	if err != nil {
		return err
	}
	out := map[string]any{"first": c.r.URL.Path, "schema": "/v2/schemas/images"}
	shown := make([]map[string]any, len(list))
	for i, p := range list {
		shown[i] = c.show(p)
	}
	out["images"] = shown
	if next != "" {
		out["next"] = next
		out["images_links"] = []link{{"next", c.url(next)}}
	}
	return c.answer(http.StatusOK, out)
}

// fits reports whether an image is what a query asks for.
func (p picture) fits(get func(string) string) bool {
	for name, is := range map[string]string{
		"name": p.name, "visibility": "public", "owner": project, "os_hidden": "false",
		"cloudlet_type": p.props["cloudlet_type"], "is_cloudlet": p.props["is_cloudlet"], "base_sha256_uuid": p.props["base_sha256_uuid"],
	} {
		if want := get(name); want != "" && want != is && !(name == "os_hidden" && want == "False") {
			return false
		}
	}
	want := get("status")
	return want == "" || want == p.status || want == novaStatus[p.status]
}

// page is the part of a list that limit and marker ask for, and the path of the one after it.
func page[T any](c *call, list []T, id func(T) string) (part []T, next string, err error) {
	query := c.r.URL.Query()
	if marker := query.Get("marker"); marker != "" {
		i := slices.IndexFunc(list, func(v T) bool { return id(v) == marker })
		if i < 0 {
			return nil, "", bad("marker %.60q could not be found", marker)
		}
		list = list[i+1:]
	}
	text := query.Get("limit")
	if text == "" {
		return list, "", nil
	}
	limit, err := strconv.Atoi(text)
	if err != nil || limit < 0 {
		return nil, "", bad("limit %.40q is not a whole number from 0 on", text)
	}
	if limit == 0 || limit >= len(list) {
		return list, "", nil
	}
	query.Set("marker", id(list[limit-1]))
	return list[:limit], c.r.URL.Path + "?" + query.Encode(), nil
}

// image shows an image. Under /v2.1 it has Nova's form and Glance's in one, see show.
func (h *Handler) image(c *call) error {
	p, err := h.picture(c.r.Context(), c.r.PathValue("id"))
	if err != nil {
		return err
	}
	out := c.show(p)
	if !c.route.image {
		out["image"] = p.nova(c)
	}
	return c.answer(http.StatusOK, out)
}

// deleteImage removes an overlay. The images of a base stay: they are one, and others are made
// on them.
func (h *Handler) deleteImage(c *call) error {
	p, err := h.picture(c.r.Context(), c.r.PathValue("id"))
	if err != nil {
		return err
	}
	switch {
	case p.kind != overlayImage:
		return refuse(http.StatusForbidden, "invalid", "image %s is a part of base %.12s, and is not removed on its own", p.id, p.base).fix("remove the base with DELETE /v1/bases/%s", p.base)
	case p.ref == "":
		return conflict("image %s is %s", p.id, p.status)
	}
	if err := h.service.DeleteOverlay(c.r.Context(), p.ref); err != nil {
		return err
	}
	return c.done(http.StatusNoContent)
}

// shape is a flavor as it is shown.
func (f flavor) shape(c *call, detail bool) map[string]any {
	out := map[string]any{"id": f.id(), "name": f.id(), "links": c.links("/flavors/" + f.id())}
	if detail {
		for k, v := range map[string]any{
			"vcpus": f.cpus, "ram": f.mib, "disk": f.gib, "swap": "", "rxtx_factor": 1.0,
			"OS-FLV-EXT-DATA:ephemeral": 0, "OS-FLV-DISABLED:disabled": false, "os-flavor-access:is_public": true,
		} {
			out[k] = v
		}
	}
	return out
}

// flavors lists the flavors that the bases need.
func (h *Handler) flavors(c *call) error {
	store, err := h.catalog(c.r.Context())
	if err != nil {
		return err
	}
	query := c.r.URL.Query()
	least := func(name string) (int64, error) {
		text := query.Get(name)
		if text == "" {
			return 0, nil
		}
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return 0, bad("%s %.40q is not a whole number", name, text)
		}
		return n, nil
	}
	disk, err := least("minDisk")
	if err != nil {
		return err
	}
	ram, err := least("minRam")
	if err != nil {
		return err
	}
	list := slices.DeleteFunc(store.flavors(), func(f flavor) bool { return f.gib < disk || f.mib < ram })
	list, next, err := page(c, list, flavor.id)
	if err != nil {
		return err
	}
	out := map[string]any{}
	shown := make([]map[string]any, len(list))
	for i, f := range list {
		shown[i] = f.shape(c, c.route.path == "/v2.1/flavors/detail")
	}
	out["flavors"] = shown
	if next != "" {
		out["flavors_links"] = []link{{"next", c.url(next)}}
	}
	return c.answer(http.StatusOK, out)
}

// findFlavor finds a flavor of the store.
func (c *catalog) findFlavor(id string) (flavor, bool) {
	list := c.flavors()
	i := slices.IndexFunc(list, func(f flavor) bool { return f.id() == id })
	if i < 0 {
		return flavor{}, false
	}
	return list[i], true
}

func (h *Handler) flavor(c *call) error {
	store, err := h.catalog(c.r.Context())
	if err != nil {
		return err
	}
	f, ok := store.findFlavor(c.r.PathValue("id"))
	if !ok {
		return missing("flavor %.60q could not be found", c.r.PathValue("id")).fix("list the flavors: there is one for each size of base")
	}
	return c.answer(http.StatusOK, map[string]any{"flavor": f.shape(c, true)})
}

// extraSpecs are none.
func (h *Handler) extraSpecs(c *call) error {
	return c.answer(http.StatusOK, map[string]any{"extra_specs": map[string]string{}})
}
