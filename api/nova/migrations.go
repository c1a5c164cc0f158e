package nova

import (
	"encoding/json"
	"net/http"
	"slices"
	"strconv"
	"time"

	"cloudlet/api"
)

// migration is a handoff as Nova shows it. Its id is that of the operation, as a number.
type migration struct {
	op api.Operation
	id int64
	to api.Handoff
	of string // instance
}

// moves are the handoffs of an instance, the newest last; "": of all.
func (h *Handler) moves(c *call, instance string) ([]migration, error) {
	ops, err := h.service.Operations(c.r.Context())
	if err != nil {
		return nil, err
	}
	var out []migration
	for _, op := range ops {
		if op.Kind != api.KindHandoff || op.Target == nil {
			continue
		}
		m := migration{op: op}
		if m.id, err = strconv.ParseInt(op.ID, 16, 64); err != nil {
			continue // not an id of ours
		}
		var req api.HandOff
		if json.Unmarshal(op.Request, &req) == nil {
			m.of = req.Instance
		}
		// One that was refused before it began has no handoff.
		if m.to, err = h.service.Handoff(c.r.Context(), op.Target.ID); err == nil {
			m.of = m.to.Instance
		} else if api.CodeOf(err) != api.NotFound {
			return nil, err
		}
		if instance == "" || m.of == instance {
			out = append(out, m)
		}
	}
	return out, nil
}

// status is the word for how far the handoff has come.
func (m *migration) status() string {
	switch m.op.State {
	case api.OperationDone:
		return "completed"
	case api.OperationFailed:
		return "failed"
	case api.OperationCancelled:
		return "cancelled"
	}
	if len(m.to.Rounds) == 0 {
		return "preparing"
	}
	return "running"
}

// shape is the migration as it is shown. What a handoff sends are overlays, in which memory and
// disk are one: all their bytes stand under memory.
func (m *migration) shape() map[string]any {
	peer := m.to.Peer
	ended := m.op.Ended
	if ended.IsZero() {
		ended = time.Now()
	}
	remaining := min(m.to.Missing, m.to.Bytes)
	if m.op.State == api.OperationDone {
		remaining = 0
	}
	return map[string]any{
		"id": m.id, "status": m.status(), "server_uuid": serverID(m.of),
		"source_compute": project, "source_node": project, "dest_compute": peer, "dest_host": peer, "dest_node": peer,
		"created_at": m.op.Created.UTC().Format(micros), "updated_at": ended.UTC().Format(micros),
		"memory_total_bytes": m.to.Bytes, "memory_processed_bytes": m.to.Bytes - remaining, "memory_remaining_bytes": remaining,
		"disk_total_bytes": 0, "disk_processed_bytes": 0, "disk_remaining_bytes": 0,
	}
}

// micros is how Nova writes the times of migrations.
const micros = "2006-01-02T15:04:05.000000"

func (h *Handler) migrations(c *call) error {
	v, err := h.find(c)
	if err != nil {
		return err
	}
	list, err := h.moves(c, v.id)
	if err != nil {
		return err
	}
	shown := make([]map[string]any, len(list))
	for i := range list {
		shown[i] = list[i].shape()
	}
	return c.answer(http.StatusOK, map[string]any{"migrations": shown})
}

// findMigration finds the migration of the path.
func (h *Handler) findMigration(c *call) (m migration, err error) {
	v, err := h.find(c)
	if err != nil {
		return m, err
	}
	list, err := h.moves(c, v.id)
	if err != nil {
		return m, err
	}
	id := c.r.PathValue("migration")
	i := slices.IndexFunc(list, func(m migration) bool { return strconv.FormatInt(m.id, 10) == id })
	if i < 0 {
		return m, missing("migration %.40q of instance %s could not be found", id, serverID(v.id))
	}
	return list[i], nil
}

func (h *Handler) migration(c *call) error {
	m, err := h.findMigration(c)
	if err != nil {
		return err
	}
	return c.answer(http.StatusOK, map[string]any{"migration": m.shape()})
}

// abortMigration cancels a handoff: the guest goes on here.
func (h *Handler) abortMigration(c *call) error {
	m, err := h.findMigration(c)
	if err != nil {
		return err
	}
	if m.op.State.Ended() {
		return bad("migration %d is %s: it cannot be aborted any more", m.id, m.status())
	}
	if _, err := h.service.CancelOperation(c.r.Context(), m.op.ID); err != nil {
		return err
	}
	return c.done(http.StatusAccepted)
}

// allMigrations lists the handoffs of all servers, the newest first.
func (h *Handler) allMigrations(c *call) error {
	list, err := h.moves(c, "")
	if err != nil {
		return err
	}
	slices.Reverse(list)
	query := c.r.URL.Query()
	fits := func(name, is string) bool { return query.Get(name) == "" || query.Get(name) == is }
	list = slices.DeleteFunc(list, func(m migration) bool {
		return !fits("status", m.status()) || !fits("instance_uuid", serverID(m.of)) || !fits("migration_type", "live-migration") ||
			!fits("source_compute", project) || !fits("host", project) && !fits("host", m.to.Peer)
	})
	list, _, err = page(c, list, func(m migration) string { return strconv.FormatInt(m.id, 10) })
	if err != nil {
		return err
	}
	shown := make([]map[string]any, len(list))
	for i := range list {
		m := list[i].shape()
		shown[i] = map[string]any{"instance_uuid": m["server_uuid"], "old_instance_type_id": 0, "new_instance_type_id": 0}
		for _, k := range []string{"id", "status", "source_compute", "source_node", "dest_compute", "dest_host", "dest_node", "created_at", "updated_at"} {
			shown[i][k] = m[k]
		}
		if c.micro >= withMigrations {
			shown[i]["migration_type"] = "live-migration"
		}
	}
	return c.answer(http.StatusOK, map[string]any{"migrations": shown})
}
