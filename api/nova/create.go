package nova

import (
	"encoding/json"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"cloudlet/api"
)

// The metadata that a new server may have.
const (
	keyOverlay = "overlay_url"  // synthesise this overlay on the base
	keyPorts   = "ports"        // of the guest to be reachable: [[ADDRESS:]HOST:]GUEST, with commas between
	keyProbe   = "probe"        // PORT/PATH: the server is ACTIVE once this answers
	keyHandoff = "handoff_info" // the original's way to receive a handoff
)

// newServer is what a request for a server may hold.
type newServer struct {
	Name        string            `json:"name"`
	Image       string            `json:"imageRef"`
	Flavor      string            `json:"flavorRef"`
	Metadata    map[string]string `json:"metadata"`
	Min         json.RawMessage   `json:"min_count"`
	Max         json.RawMessage   `json:"max_count"`
	Networks    json.RawMessage   `json:"networks"`
	Groups      []securityGroup   `json:"security_groups"`
	DiskConfig  string            `json:"OS-DCF:diskConfig"`
	Config      json.RawMessage   `json:"config_drive"`
	Devices     []json.RawMessage `json:"block_device_mapping_v2"`
	Zone        string            `json:"availability_zone"`
	Description *string           `json:"description"`
}

type securityGroup struct {
	Name string `json:"name"`
}

type createRequest struct {
	Server newServer `json:"server"`
}

// createServer begins to synthesise an overlay, or to resume a base.
func (h *Handler) createServer(c *call) error {
	var req createRequest
	if err := c.decode(&req); err != nil {
		return err
	}
	s := &req.Server
	if err := s.check(c); err != nil {
		return err
	}
	run := api.Run{Name: s.Name}
	if err := readMetadata(&run, s.Metadata); err != nil {
		return err
	}
	p, err := h.picture(c.r.Context(), s.Image)
	if statusOf(err) == http.StatusNotFound {
		return bad("the image %.60q of the server could not be found", s.Image).fix("give imageRef the id of a base's disk image or of an overlay's image")
	}
	if err != nil {
		return err
	}
	store, err := h.catalog(c.r.Context())
	if err != nil {
		return err
	}
	if err := s.checkImage(p, run.Ref != ""); err != nil {
		return err
	}
	if err := s.checkFlavor(&store, p); err != nil {
		return err
	}
	run.Base = p.base
	if run.Ref == "" {
		run.Ref = p.ref
	}
	op, err := h.service.Submit(c.r.Context(), c.caller(), run)
	if err != nil {
		return err
	}
	id := serverID(op.ID)
	links := c.links("/servers/" + id)
	c.Header().Set("Location", links[0].Href)
	return c.answer(http.StatusAccepted, map[string]any{"server": map[string]any{
		"id": id, "links": links, "adminPass": "", "OS-DCF:diskConfig": "MANUAL", "security_groups": []securityGroup{{"default"}},
	}})
}

// check refuses what cannot be had here. What stock clients send by themselves is taken where
// it asks for nothing.
func (s *newServer) check(c *call) error {
	one := func(raw json.RawMessage) bool {
		text := strings.Trim(string(raw), `"`)
		return text == "" || text == "1" || text == "null"
	}
	switch {
	case s.Image == "":
		return bad("the server has no imageRef").fix("give the id of a base's disk image or of an overlay's image; volumes are not known here")
	case s.Flavor == "":
		return bad("the server has no flavorRef").fix("list the flavors: there is one for each size of base")
	case !one(s.Min) || !one(s.Max):
		return bad("min_count and max_count: one server is made for each request").fix("ask again for each of the others")
	case len(s.Devices) > 0 && !onlyImage(s.Devices):
		return bad("block_device_mapping_v2: volumes are not known here").fix("leave it out")
	case s.DiskConfig != "" && s.DiskConfig != "AUTO" && s.DiskConfig != "MANUAL":
		return bad("OS-DCF:diskConfig %.40q is neither AUTO nor MANUAL", s.DiskConfig)
	case s.Zone != "" && s.Zone != "nova":
		return bad("there is no availability zone %.60q", s.Zone).fix("leave it out, or use nova")
	case s.Description != nil && c.micro < withDescription:
		return bad("there is no field %q before microversion %s", "server.description", withDescription)
	case s.Description != nil && *s.Description != "":
		return bad("descriptions are not kept here").fix("leave the description out")
	}
	switch strings.Trim(string(s.Config), `"`) {
	case "", "false", "False", "null":
	default:
		return bad("config_drive: the guest goes on from where it was captured, and reads no configuration").fix("leave it out")
	}
	switch string(s.Networks) {
	case "", "null", "[]", `"auto"`, `"none"`:
	default:
		return bad("networks: every guest has one network of its own, behind its host").fix("leave it out, and name the guest's ports in the metadata %s", keyPorts)
	}
	for _, g := range s.Groups {
		if g.Name != "default" {
			return bad("there is no security group %.60q", g.Name).fix("leave security_groups out: only the guest's ports that the metadata %s name can be reached", keyPorts)
		}
	}
	return nil
}

// onlyImage reports whether devices are the image's disk and nothing else, which some clients
// write out.
func onlyImage(devices []json.RawMessage) bool {
	var d struct {
		Source      string `json:"source_type"`
		Destination string `json:"destination_type"`
	}
	return len(devices) == 1 && json.Unmarshal(devices[0], &d) == nil && d.Source == "image" && d.Destination == "local"
}

// checkImage refuses images from which nothing can be started.
func (s *newServer) checkImage(p picture, overlay bool) error {
	switch {
	case p.ref == "" && p.status == "killed":
		return bad("image %s could not be made: %s", p.id, p.props["cloudlet_error"])
	case p.ref == "":
		return conflict("image %s is %s", p.id, p.status).fix("wait until it is active")
	case p.kind != baseDisk && p.kind != overlayImage:
		return bad("image %s is a %s", p.id, p.props["cloudlet_type"]).fix("use the disk image of that base, %s", imageID(p.base, baseDisk))
	case p.kind == overlayImage && overlay:
		return bad("image %s is an overlay itself", p.id).fix("give either this image, or with %s the disk image of its base", keyOverlay)
	}
	return nil
}

// checkFlavor refuses a flavor that is not what the base needs.
func (s *newServer) checkFlavor(store *catalog, p picture) error {
	b, ok := store.base(p.base)
	if !ok {
		return bad("image %s is made on base %.12s, which is not here", p.id, p.base).fix("import that base")
	}
	f, ok := store.findFlavor(s.Flavor)
	needs := flavorOf(b)
	if !ok {
		return bad("flavor %.60q could not be found", s.Flavor).fix("use %s, which the image needs", needs.id())
	}
	if f != needs {
		return bad("the image needs flavor %s: a guest that was captured cannot be given other resources", needs.id()).fix("use that instead of %s", f.id())
	}
	return nil
}

// readMetadata reads the metadata of a new server.
func readMetadata(run *api.Run, metadata map[string]string) error {
	for key, value := range metadata {
		switch key {
		case keyOverlay:
			if !strings.Contains(value, "://") {
				return bad("the metadata %s %.60q is not a URL", key, value).fix("for an overlay of the store give its image as imageRef")
			}
			run.Ref = value
		case keyPorts:
			for one := range strings.SplitSeq(value, ",") {
				f, ok := forward(strings.TrimSpace(one))
				if !ok {
					return bad("the metadata %s: %.60q is not [[ADDRESS:]HOST:]GUEST", key, one).fix("for example 8080, or 18080:8080")
				}
				run.Forwards = append(run.Forwards, f)
			}
		case keyProbe:
			port, path, ok := strings.Cut(value, "/")
			n, err := strconv.Atoi(port)
			if !ok || err != nil {
				return bad("the metadata %s %.60q is not PORT/PATH", key, value).fix("for example 8080/healthz")
			}
			run.Probe = &api.Probe{Port: n, Path: "/" + path}
			run.Timeout = probeTime
		case keyHandoff:
			return bad("the metadata %s: a handoff is received without a request for a server", key).fix("hand the instance off to this cloudlet: its address is the handoff_url")
		default:
			return bad("there is no metadata %.60q that counts here", key).fix("it knows %s, %s and %s", keyOverlay, keyPorts, keyProbe)
		}
	}
	return nil
}

// probeTime is how long a server may be in BUILD.
const probeTime = 5 * time.Minute

// forward reads [[ADDRESS:]HOST:]GUEST.
func forward(text string) (f api.Forward, ok bool) {
	parts := strings.Split(text, ":")
	number := func(s string) int {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > 65535 {
			return -1
		}
		return n
	}
	f.Guest = number(parts[len(parts)-1])
	switch len(parts) {
	case 3:
		a, err := netip.ParseAddr(parts[0])
		if err != nil || !a.Is4() {
			return f, false
		}
		f.Address = parts[0]
		if parts[1] == "" {
			break
		}
		fallthrough
	case 2:
		f.Host = number(parts[len(parts)-2])
	case 1:
	default:
		return f, false
	}
	return f, f.Guest > 0 && f.Host >= 0
}
