package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// A resumed VM's disk is a stack: the raw image, which never changes, below topLayer. For a
// capture newLayer is put on top, so topLayer is frozen; afterwards newLayer is committed
// into it and deleted. So there are never more than two.

// freeze makes topLayer immutable: the VM goes on in newLayer, which exists already.
func freeze(ctx context.Context, c *qmp) error {
	err := c.execute(ctx, "blockdev-snapshot-sync", map[string]any{
		"device": diskID, "snapshot-file": newLayer, "format": "qcow2", "mode": "existing",
	}, nil)
	if err != nil {
		return fmt.Errorf("freeze disk layer: %w", err)
	}
	return nil
}

// activeLayer returns the name of the layer that the VM writes to.
func activeLayer(ctx context.Context, c *qmp) (string, error) {
	var blocks []struct {
		Device   string `json:"device"`
		Inserted struct {
			File string `json:"file"`
		} `json:"inserted"`
	}
	if err := c.execute(ctx, "query-block", nil, &blocks); err != nil {
		return "", err
	}
	for _, b := range blocks {
		if b.Device == diskID {
			return filepath.Base(b.Inserted.File), nil
		}
	}
	return "", fmt.Errorf("find disk layers: the monitor does not list %s", diskID)
}

// commitJob is the id of the job that melts the layers.
const commitJob = "release"

// melt commits newLayer into topLayer while the VM lives, and removes it. It also ends what
// an interrupted melt has begun, and does nothing where there is nothing to do.
func melt(ctx context.Context, c *qmp, dir string) error {
	active, err := activeLayer(ctx, c)
	if err != nil {
		return err
	}
	if active == newLayer {
		if err := commit(ctx, c); err != nil {
			return fmt.Errorf("merge disk layers: %w", err)
		}
		if active, err = activeLayer(ctx, c); err != nil {
			return err
		}
	}
	if active != topLayer {
		return fmt.Errorf("merge disk layers: the VM writes to %s, want %s", active, topLayer)
	}
	if err := os.Remove(filepath.Join(dir, newLayer)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove disk layer: %w", err)
	}
	return nil
}

// commit runs a block-commit job to its end.
func commit(ctx context.Context, c *qmp) error {
	_, running, err := commitReady(ctx, c)
	if err != nil {
		return err
	}
	if !running {
		err := c.execute(ctx, "block-commit", map[string]any{"job-id": commitJob, "device": diskID, "base": topLayer}, nil)
		if err != nil {
			return err
		}
	}
	completing := false
	return pollUntil(ctx, func() (bool, error) {
		ready, running, err := commitReady(ctx, c)
		if err != nil || !running {
			return true, err
		}
		if !ready || completing {
			return false, nil
		}
		completing = true
		return false, c.execute(ctx, "block-job-complete", map[string]any{"device": commitJob}, nil)
	})
}

// commitReady reports whether the commit job exists and waits for its completion.
func commitReady(ctx context.Context, c *qmp) (ready, running bool, err error) {
	var jobs []struct {
		Device string `json:"device"`
		Ready  bool   `json:"ready"`
	}
	if err := c.execute(ctx, "query-block-jobs", nil, &jobs); err != nil {
		return false, false, err
	}
	for _, j := range jobs {
		if j.Device == commitJob {
			return j.Ready, true, nil
		}
	}
	return false, false, nil
}

// mapEntry is a line of qemu-img's map.
type mapEntry struct {
	Start   int64  `json:"start"`
	Length  int64  `json:"length"`
	Depth   int    `json:"depth"`
	Present bool   `json:"present"`
	Zero    bool   `json:"zero"`
	Data    bool   `json:"data"`
	Offset  *int64 `json:"offset"`
}

// mapTimeout bounds reading the map of a frozen layer, a local file.
const mapTimeout = 2 * time.Minute

// mapLayer lists what a frozen layer holds. The layer is opened without what is below it,
// so the image there is not touched, and blocks that are not here are told from zeros.
func (q *QEMU) mapLayer(ctx context.Context, path string, size int64) (segments, error) {
	img, err := q.img()
	if err != nil {
		return nil, err
	}
	ref, err := json.Marshal(map[string]any{
		"driver": "qcow2", "backing": nil,
		"file": map[string]any{"driver": "file", "filename": path},
	})
	if err != nil {
		return nil, fmt.Errorf("map disk layer: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, mapTimeout)
	defer cancel()
	out, err := output(ctx, img, "map", "--output=json", "json:"+string(ref))
	if err != nil {
		return nil, fmt.Errorf("map disk layer: %w", err)
	}
	return parseMap([]byte(out), size)
}

// parseMap turns qemu-img's map of one layer into segments.
func parseMap(data []byte, size int64) (segments, error) {
	var entries []mapEntry
	if err := json.Unmarshal(data, &entries); err != nil {
		return nil, fmt.Errorf("parse map of disk layer: %w", err)
	}
	var out segments
	var next int64
	for _, e := range entries {
		if e.Start != next || e.Length <= 0 || e.Length > size-e.Start || e.Start%pageSize != 0 || e.Length%pageSize != 0 {
			return nil, fmt.Errorf("parse map of disk layer: extent of %d bytes at %d is out of order or range", e.Length, e.Start)
		}
		next = e.Start + e.Length
		if !e.Present {
			continue
		}
		s := segment{Extent: Extent{Off: e.Start, Len: e.Length, Zero: e.Zero}}
		if !e.Zero {
			if !e.Data || e.Offset == nil || *e.Offset < 0 {
				return nil, fmt.Errorf("parse map of disk layer: extent at %d has no place in the file: it may be compressed or encrypted", e.Start)
			}
			s.at = *e.Offset
		}
		out = out.add(s)
	}
	if next != size {
		return nil, fmt.Errorf("parse map of disk layer: it ends at %d, the disk at %d", next, size)
	}
	return out, nil
}
