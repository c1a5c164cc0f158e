package nova

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"

	"cloudlet/api"
	"cloudlet/api/strict"
)

// verb is one of the actions on a server.
type verb struct {
	reads bool // also for those who may only look
	do    func(*Handler, *call, vm, json.RawMessage) error
}

// verbs are the actions, by their keys.
func verbs() map[string]verb {
	return map[string]verb{
		"pause":                   {do: plain((*Handler).pause)},
		"unpause":                 {do: plain((*Handler).unpause)},
		"os-stop":                 {do: plain((*Handler).stop)},
		"os-start":                {do: plain((*Handler).start)},
		"reboot":                  {do: (*Handler).reboot},
		"os-getConsoleOutput":     {reads: true, do: (*Handler).console},
		"cloudlet-base":           {do: (*Handler).captureBase},
		"cloudlet-overlay-finish": {do: (*Handler).captureOverlay},
		"cloudlet-handoff":        {do: (*Handler).handOff},
	}
}

// action does what the one key of the body says.
func (h *Handler) action(c *call) error {
	data, err := c.read()
	if err != nil {
		return err
	}
	var body map[string]json.RawMessage
	if err := strict.Decode(data, &body); err != nil {
		return err
	}
	known := verbs()
	var keys, names []string
	for key := range body {
		keys = append(keys, key)
	}
	for name := range known {
		names = append(names, name)
	}
	slices.Sort(keys)
	slices.Sort(names)
	if len(keys) != 1 {
		return bad("the body has %d actions: %.200q", len(keys), keys).fix("give one")
	}
	v, ok := known[keys[0]]
	if !ok {
		return bad("there is no such action: %.60q", keys[0]).fix("it knows %s", strings.Join(names, ", "))
	}
	if !v.reads {
		if err := c.mayWrite(); err != nil {
			return err
		}
	}
	s, err := h.find(c)
	if err != nil {
		return err
	}
	return v.do(h, c, s, body[keys[0]])
}

// plain is an action without arguments: null, or an empty object, or whatever old clients put
// there that holds nothing.
func plain(do func(*Handler, context.Context, vm) error) func(*Handler, *call, vm, json.RawMessage) error {
	return func(h *Handler, c *call, v vm, args json.RawMessage) error {
		switch string(bytes.TrimSpace(args)) {
		case "null", "{}", `""`:
		default:
			return bad("the action takes no arguments").fix("send null")
		}
		if err := do(h, c.r.Context(), v); err != nil {
			return err
		}
		return c.done(http.StatusAccepted)
	}
}

// only refuses an action in the wrong state.
func (v *vm) only(verb string, allowed ...string) error {
	status := v.status()
	if slices.Contains(allowed, status) {
		return nil
	}
	e := conflict("cannot %s instance %s while it is in vm_state %s (%s)", verb, serverID(v.id), vmStates[status], status)
	if v.in != nil && v.in.Reason != "" {
		e.cause.Detail += ": " + v.in.Reason
	}
	return e
}

func (h *Handler) act(ctx context.Context, v vm, a api.Action) error {
	_, err := h.service.Act(ctx, v.id, a)
	return err
}

func (h *Handler) pause(ctx context.Context, v vm) error {
	if err := v.only("pause", active); err != nil {
		return err
	}
	return h.act(ctx, v, api.ActionPause)
}

// stalled reports whether QEMU has stopped the guest after a disk error, which unpause tries again.
func (v *vm) stalled() bool { return v.op == nil && v.in != nil && v.in.State == api.Stalled }

func (h *Handler) unpause(ctx context.Context, v vm) error {
	if err := v.only("unpause", paused); err != nil && !v.stalled() {
		return err
	}
	return h.act(ctx, v, api.ActionContinue)
}

// stop is what switching off is to a guest: it stands still, forgets its memory and keeps its
// disk. What the instance has of the host it keeps.
func (h *Handler) stop(ctx context.Context, v vm) error {
	if err := v.only("stop", active, paused); err != nil {
		return err
	}
	if err := h.act(ctx, v, api.ActionPause); err != nil {
		return err
	}
	return h.act(context.WithoutCancel(ctx), v, api.ActionReset)
}

// start lets it boot.
func (h *Handler) start(ctx context.Context, v vm) error {
	if err := v.only("start", shutoff); err != nil {
		return err
	}
	if v.in.State != api.Paused {
		return conflict("instance %s has ended for good: %s", serverID(v.id), v.in.Reason).fix("create another; os-stop is what can be started again")
	}
	return h.act(ctx, v, api.ActionContinue)
}

func (h *Handler) reboot(c *call, v vm, args json.RawMessage) error {
	var req struct {
		Type string `json:"type"`
	}
	if err := object(args, &req); err != nil {
		return err
	}
	if req.Type != "HARD" {
		return bad("a reboot of type %.40q is not possible: the guest is not asked, its reset button is pressed", req.Type).fix("use HARD")
	}
	if err := v.only("reboot", active); err != nil {
		return err
	}
	if err := h.act(c.r.Context(), v, api.ActionReset); err != nil {
		return err
	}
	return c.done(http.StatusAccepted)
}

// object decodes the arguments of an action; a field that is wrong is named by itself.
func object(args json.RawMessage, v any) error {
	if trimmed := bytes.TrimSpace(args); len(trimmed) == 0 || trimmed[0] != '{' {
		return bad("the action takes an object")
	}
	return strict.Decode(args, v)
}

// console answers with the end of what the guest has written to its serial console.
func (h *Handler) console(c *call, v vm, args json.RawMessage) error {
	var req struct {
		Length json.RawMessage `json:"length"`
	}
	if err := object(args, &req); err != nil {
		return err
	}
	length := -1
	if text := strings.Trim(string(req.Length), `"`); text != "" && text != "null" {
		if err := json.Unmarshal([]byte(text), &length); err != nil || length < -1 {
			return bad("length %.40s is not a number of lines", text).fix("leave it out to have all")
		}
	}
	if v.in == nil {
		return conflict("instance %s is not ready", serverID(v.id)).fix("wait until it is ACTIVE")
	}
	tail := &lastBytes{most: mostConsole}
	if err := h.service.Log(c.r.Context(), v.id, tail); err != nil {
		return err
	}
	return c.answer(http.StatusOK, map[string]string{"output": lastLines(string(tail.last()), length)})
}

// mostConsole bounds the console's output in an answer.
const mostConsole = 1 << 20

// lastBytes keeps the end of what is written.
type lastBytes struct {
	most int
	data []byte
}

// Write keeps the last bytes.
func (b *lastBytes) Write(p []byte) (int, error) {
	b.data = append(b.data, p...)
	if len(b.data) > 2*b.most { // not at every write
		b.data = append(b.data[:0], b.last()...)
	}
	return len(p), nil
}

func (b *lastBytes) last() []byte { return b.data[max(0, len(b.data)-b.most):] }

// lastLines is the end of a text, of so many lines; less than 0: all.
func lastLines(text string, n int) string {
	if n < 0 {
		return text
	}
	lines := strings.SplitAfter(text, "\n")
	if len(lines) > 0 && lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	}
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

// captureBase begins to make a base of what the server is now.
func (h *Handler) captureBase(c *call, v vm, args json.RawMessage) error {
	var req struct {
		Name string `json:"name"`
	}
	if err := object(args, &req); err != nil {
		return err
	}
	if req.Name == "" {
		return bad("cloudlet-base has no name").fix("give the new base one")
	}
	if err := v.only("capture", active, paused); err != nil {
		return err
	}
	op, err := h.service.Submit(c.r.Context(), c.caller(), api.CaptureBase{Instance: v.id, Name: req.Name})
	if err != nil {
		return err
	}
	return c.answer(http.StatusAccepted, map[string]string{"base-disk": promisedID(op.ID, baseDisk), "base-memory": promisedID(op.ID, baseMemory)})
}

// captureOverlay begins to make an overlay of what the server has changed.
func (h *Handler) captureOverlay(c *call, v vm, args json.RawMessage) error {
	var req struct {
		Name      string `json:"overlay-name"`
		Terminate bool   `json:"terminate"`
	}
	if err := object(args, &req); err != nil {
		return err
	}
	if req.Name == "" {
		return bad("cloudlet-overlay-finish has no overlay-name").fix("give the new overlay one")
	}
	if err := v.only("capture", active, paused); err != nil {
		return err
	}
	op, err := h.service.Submit(c.r.Context(), c.caller(), api.CreateOverlay{Instance: v.id, Name: req.Name, Stop: req.Terminate})
	if err != nil {
		return err
	}
	return c.answer(http.StatusAccepted, map[string]string{"overlay-id": promisedID(op.ID, overlayImage)})
}

// handOff begins to move the server to another cloudlet.
func (h *Handler) handOff(c *call, v vm, args json.RawMessage) error {
	var req struct {
		URL   string `json:"handoff_url"`
		Token string `json:"dest_token"`
		Name  string `json:"dest_vmname"`
	}
	if err := object(args, &req); err != nil {
		return err
	}
	switch {
	case req.URL == "":
		return bad("cloudlet-handoff has no handoff_url").fix("give the address of the other cloudlet, http(s)://HOST:PORT")
	case req.Token == "":
		return bad("cloudlet-handoff has no dest_token").fix("give a token of the role peer or operate that the other cloudlet accepts")
	case strings.HasPrefix(req.URL, "file:"):
		return bad("handoff_url %.100q is a file", req.URL).fix("capture an overlay with cloudlet-overlay-finish for that, or give http(s)://HOST:PORT")
	}
	if err := v.only("hand off", active, paused); err != nil {
		return err
	}
	op, err := h.service.Submit(c.r.Context(), c.caller(), api.HandOff{Instance: v.id, To: req.URL, Token: req.Token, Name: req.Name})
	if err != nil {
		return inWords(err, map[string]string{"to": "handoff_url", "token": "dest_token", "name": "dest_vmname"})
	}
	if op.Target == nil {
		return errors.New("a handoff has no id")
	}
	return c.answer(http.StatusAccepted, map[string]string{"handoff": op.Target.ID})
}

// inWords says of an error which field of the request it is about.
func inWords(err error, fields map[string]string) error {
	var known *api.Error
	if errors.As(err, &known) && fields[known.Field] != "" {
		e := *known
		e.Detail = fields[known.Field] + ": " + e.Detail
		return &e
	}
	return err
}
