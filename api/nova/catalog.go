package nova

import (
	"context"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"slices"
	"strings"
	"time"

	"cloudlet/api"
)

// catalog is what a request sees of the store.
type catalog struct {
	bases    []api.Base
	overlays []api.Overlay
}

func (h *Handler) catalog(ctx context.Context) (c catalog, err error) {
	if c.bases, err = h.service.Bases(ctx); err != nil {
		return c, err
	}
	c.overlays, err = h.service.Overlays(ctx)
	c.bases = slices.DeleteFunc(c.bases, func(b api.Base) bool { return b.Problem != "" })
	c.overlays = slices.DeleteFunc(c.overlays, func(o api.Overlay) bool { return o.Problem != "" })
	return c, err
}

func (c *catalog) base(id string) (api.Base, bool) {
	i := slices.IndexFunc(c.bases, func(b api.Base) bool { return b.ID == id })
	if i < 0 {
		return api.Base{}, false
	}
	return c.bases[i], true
}

// machine is what is asked of a base's machine configuration.
type machine struct {
	Type   string `json:"type"`
	CPUs   int    `json:"cpus"`
	Memory int64  `json:"memory"`
}

func machineOf(raw json.RawMessage) (m machine) {
	_ = json.Unmarshal(raw, &m) // one that cannot be read has no resources, and no flavor fits it
	return m
}

// gib is a size in GiB, rounded up.
func gib(n int64) int64 { return (n + 1<<30 - 1) >> 30 }

// flavor is what a machine needs.
type flavor struct {
	cpus int
	mib  int64
	gib  int64
}

func flavorOf(b api.Base) flavor {
	m := machineOf(b.Machine)
	return flavor{cpus: m.CPUs, mib: m.Memory >> 20, gib: gib(b.DiskSize)}
}

// id is also its name.
func (f flavor) id() string { return fmt.Sprintf("c%d.m%d.d%d", f.cpus, f.mib, f.gib) }

// flavors are those that the bases need, without doubles.
func (c *catalog) flavors() []flavor {
	var out []flavor
	for _, b := range c.bases {
		if f := flavorOf(b); !slices.Contains(out, f) {
			out = append(out, f)
		}
	}
	return out
}

// picture is an image: one of the four of a base, an overlay, or what will be one.
type picture struct {
	id      string
	name    string
	kind    kind
	status  string // in Glance's words
	ref     string // of the base or overlay
	base    string // id
	size    int64
	minDisk int64 // GiB
	minRAM  int64 // MiB
	created time.Time
	props   map[string]string
}

// suffixes of the names of a base's images, as the original gives them.
var suffixes = map[kind]string{baseDisk: "-disk", baseMemory: "-memory", baseDiskHash: "-diskhash", baseMemoryHash: "-memhash"}

const (
	pageSize = 4096
	hashSize = 32
)

func pictureOfBase(b api.Base, k kind) picture {
	name := b.Name
	if name == "" {
		name = b.ID[:12]
	}
	f := flavorOf(b)
	p := picture{
		id: imageID(b.ID, k), name: name + suffixes[k], kind: k, status: "active", ref: b.ID, base: b.ID,
		minDisk: f.gib, minRAM: f.mib, created: b.Created,
		props: map[string]string{
			"is_cloudlet": "True", "cloudlet_type": kindNames[k], "base_sha256_uuid": b.ID,
			"image_type": "snapshot", "image_location": "snapshot",
		},
	}
	switch k {
	case baseDisk:
		p.size = b.DiskSize
		p.props["base_resource_xml_str"] = resourceXML(machineOf(b.Machine))
		for _, other := range []kind{baseMemory, baseDiskHash, baseMemoryHash} {
			p.props[kindNames[other]] = imageID(b.ID, other)
		}
	case baseMemory:
		p.size = b.MemorySize
	case baseDiskHash:
		p.size = b.DiskSize / pageSize * hashSize
	case baseMemoryHash:
		p.size = b.MemorySize / pageSize * hashSize
	}
	return p
}

// resourceXML is what tools of the original read a base's resources from: of libvirt's
// description of a domain, memory and virtual CPUs.
func resourceXML(m machine) string {
	type memory struct {
		Unit string `xml:"unit,attr"`
		KiB  int64  `xml:",chardata"`
	}
	type osType struct {
		Machine string `xml:"machine,attr"`
		Text    string `xml:",chardata"`
	}
	out, err := xml.Marshal(struct {
		XMLName xml.Name `xml:"domain"`
		Type    string   `xml:"type,attr"`
		Memory  memory   `xml:"memory"`
		CPUs    int      `xml:"vcpu"`
		OS      osType   `xml:"os>type"`
	}{Type: "qemu", Memory: memory{"KiB", m.Memory >> 10}, CPUs: m.CPUs, OS: osType{m.Type, "hvm"}})
	if err != nil {
		return "" // of numbers and a text: it cannot be
	}
	return string(out)
}

func (c *catalog) pictureOfOverlay(o api.Overlay) picture {
	name := o.Name
	if name == "" {
		name = o.ID[:12]
	}
	p := picture{
		id: imageID(o.ID, overlayImage), name: name, kind: overlayImage, status: "active", ref: o.ID, base: o.Base,
		size: o.Size, minDisk: gib(o.DiskSize), minRAM: o.MemorySize >> 20, created: o.Created,
		props: map[string]string{
			"is_cloudlet": "True", "cloudlet_type": kindNames[overlayImage], "base_sha256_uuid": o.Base,
			"image_type": "snapshot", "image_location": "snapshot",
			"cloudlet_overlay_id": o.ID, "cloudlet_overlay_path": "/v1/overlays/" + o.ID + "/content",
		},
	}
	if o.Parent != o.Base {
		p.props["cloudlet_parent"] = imageID(o.Parent, overlayImage)
	}
	return p
}

// pictures are all images, the bases' first.
func (c *catalog) pictures() []picture {
	var out []picture
	for _, b := range c.bases {
		for k := baseDisk; k <= baseMemoryHash; k++ {
			out = append(out, pictureOfBase(b, k))
		}
	}
	for _, o := range c.overlays {
		out = append(out, c.pictureOfOverlay(o))
	}
	return out
}

// picture finds the image of an id.
func (h *Handler) picture(ctx context.Context, id string) (picture, error) {
	n, ok := imageOf(id)
	if !ok {
		return picture{}, noImage(id)
	}
	c, err := h.catalog(ctx)
	if err != nil {
		return picture{}, err
	}
	if n.operation != "" {
		return h.promised(ctx, id, n, &c)
	}
	for _, p := range c.pictures() {
		if p.id == id {
			return p, nil
		}
	}
	return picture{}, noImage(id)
}

func noImage(id string) error {
	return missing("image %.60q could not be found", id).fix("list the images to see what there is")
}

// promised is the image that an operation makes, or has made: then it is the other one of the
// store, under the id that was promised.
func (h *Handler) promised(ctx context.Context, id string, n imageName, c *catalog) (p picture, err error) {
	op, err := h.service.Operation(ctx, n.operation)
	if api.CodeOf(err) == api.NotFound {
		return p, noImage(id)
	}
	if err != nil {
		return p, err
	}
	makes := api.KindCreateBase
	if n.kind == overlayImage {
		makes = api.KindCreateOverlay
	}
	if op.ID != n.operation || op.Kind != makes {
		return p, noImage(id)
	}
	if op.State == api.OperationDone && op.Target != nil {
		for _, other := range c.pictures() {
			if other.ref == op.Target.ID && other.kind == n.kind {
				other.id = id
				return other, nil
			}
		}
		return p, noImage(id) // removed since
	}
	return c.pending(op, n.kind), nil
}

// pending is an image that is not there yet, or never will be.
func (c *catalog) pending(op api.Operation, k kind) picture {
	var req struct {
		Name string `json:"name"`
	}
	_ = json.Unmarshal(op.Request, &req) // a request has a name, or none
	p := picture{
		id: promisedID(op.ID, k), name: req.Name + suffixes[k], kind: k, status: "saving", created: op.Created,
		props: map[string]string{"is_cloudlet": "True", "cloudlet_type": kindNames[k]},
	}
	switch {
	case op.State.Ended():
		p.status = "killed"
		if op.Error != nil {
			p.props["cloudlet_error"] = op.Error.Error()
		}
	case op.Phase == "":
		p.status = "queued"
	default:
		p.props["cloudlet_progress"] = strings.TrimSpace(fmt.Sprintf("%s %d of %d", op.Phase, op.Done, op.Total))
	}
	return p
}

// pendings are the images that are being made.
func (h *Handler) pendings(ctx context.Context, c *catalog) ([]picture, error) {
	ops, err := h.service.Operations(ctx)
	var out []picture
	for _, op := range ops {
		switch {
		case op.State.Ended():
		case op.Kind == api.KindCreateOverlay:
			out = append(out, c.pending(op, overlayImage))
		case op.Kind == api.KindCreateBase:
			for k := baseDisk; k <= baseMemoryHash; k++ {
				out = append(out, c.pending(op, k))
			}
		}
	}
	return out, err
}
