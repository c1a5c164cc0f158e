package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// A resumed VM's disk is a stack: the raw image, which never changes, below topLayer. A round
// freezes the layer that the VM writes to by putting a new one on top of it. Once a frozen
// layer is needed no more it is committed into topLayer and removed, also by another process
// than the one that made it.

// layerName returns the name of the n-th layer above topLayer, n from 1.
func layerName(n int) string { return fmt.Sprintf("disk.%d.qcow2", n) }

// layerNames lists the layers above topLayer in a VM's folder, whether in use or not.
func layerNames(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list disk layers: %w", err)
	}
	var out []string
	for _, e := range entries {
		if is, _ := filepath.Match("disk.*.qcow2", e.Name()); is && e.Name() != topLayer {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// nodePrefix begins the names of the nodes of layers, where a node must have a name.
const nodePrefix = "cloudlet-"

// freeze makes the layer that the VM writes to immutable: it goes on in another one, which
// exists already.
func freeze(ctx context.Context, c *qmp, layer string) error {
	args := map[string]any{"snapshot-file": c.file(layer), "format": "qcow2", "mode": "existing"}
	if c.folder == "" {
		args["device"] = diskID
	} else {
		disk, err := findDisk(ctx, c)
		if err != nil {
			return err
		}
		args["node-name"], args["snapshot-node-name"] = disk.node, nodePrefix+layer
	}
	if err := c.execute(ctx, "blockdev-snapshot-sync", args, nil); err != nil {
		return fmt.Errorf("freeze disk layer: %w", err)
	}
	return nil
}

// stackImage is a file of the disk's stack in the monitor's answer.
type stackImage struct {
	Filename string      `json:"filename"`
	Backing  *stackImage `json:"backing-image"`
}

// diskState is the VM's disk as the monitor shows it.
type diskState struct {
	node  string   // name of the node written to
	stack []string // names of the files that the disk consists of, the one written to first
}

// findDisk finds the VM's disk: by the name of its drive, or by that of its device where it has
// nodes only, as under libvirt.
func findDisk(ctx context.Context, c *qmp) (diskState, error) {
	var blocks []struct {
		Device   string `json:"device"`
		QDev     string `json:"qdev"`
		Inserted struct {
			Node  string      `json:"node-name"`
			Image *stackImage `json:"image"`
		} `json:"inserted"`
	}
	if err := c.execute(ctx, "query-block", nil, &blocks); err != nil {
		return diskState{}, err
	}
	for _, b := range blocks {
		if b.Device != diskID && !strings.Contains(b.QDev, "/"+aliasPrefix+diskID+"/") {
			continue
		}
		d := diskState{node: b.Inserted.Node}
		for image := b.Inserted.Image; image != nil; image = image.Backing {
			d.stack = append(d.stack, filepath.Base(image.Filename))
		}
		if len(d.stack) > 0 {
			return d, nil
		}
	}
	return diskState{}, fmt.Errorf("find disk layers: the monitor does not list %s", diskID)
}

// diskStack returns the names of the files that the VM's disk consists of, the one it writes
// to first.
func diskStack(ctx context.Context, c *qmp) ([]string, error) {
	d, err := findDisk(ctx, c)
	return d.stack, err
}

// commitJob is the id of the job that commits a layer.
const commitJob = "release"

// commit merges the layers from top down to the one above base into base, while the VM
// lives, and removes the file of top. It also ends what an interrupted commit has begun, and
// does nothing where there is nothing to do.
func commit(ctx context.Context, c *qmp, dir, top, base string) error {
	for try := range 2 {
		if err := commitEnd(ctx, c); err != nil {
			return fmt.Errorf("merge disk layer %s: %w", top, err)
		}
		disk, err := findDisk(ctx, c)
		if err != nil {
			return err
		}
		if !slices.Contains(disk.stack, top) {
			return removeLayer(dir, top)
		}
		if try > 0 {
			break
		}
		args := map[string]any{"job-id": commitJob, "device": diskID, "base": c.file(base)}
		if c.folder != "" {
			args["device"] = disk.node
		}
		if top != disk.stack[0] {
			args["top"] = c.file(top)
		}
		if err := beginCommit(ctx, c, args); err != nil {
			return fmt.Errorf("merge disk layer %s: %w", top, err)
		}
	}
	return fmt.Errorf("merge disk layer %s: QEMU has given up: see that the file system of %s has room", top, dir)
}

// lockWait is how long a layer may be in use elsewhere: the qemu-img of a process that was
// killed goes on until it is done.
const lockWait = 10 * time.Second

func beginCommit(ctx context.Context, c *qmp, args map[string]any) error {
	end := time.Now().Add(lockWait)
	return pollUntil(ctx, func() (bool, error) {
		err := c.execute(ctx, "block-commit", args, nil)
		if usedElsewhere(err) && time.Now().Before(end) {
			return false, nil
		}
		return true, err
	})
}

// usedElsewhere reports whether QEMU has refused because another process has opened an image:
// its block/file-posix.c says `Failed to get "write" lock`, or `shared "consistent read"`, and
// so on, for whichever permission it misses.
func usedElsewhere(err error) bool {
	var refused *QMPError
	return errors.As(err, &refused) && strings.HasPrefix(refused.Desc, "Failed to get ") && strings.HasSuffix(refused.Desc, `" lock`)
}

// melt commits all layers into topLayer, whoever made them, and removes their files.
func melt(ctx context.Context, c *qmp, dir string) error {
	if err := commitEnd(ctx, c); err != nil {
		return fmt.Errorf("merge disk layers: %w", err)
	}
	stack, err := diskStack(ctx, c)
	if err != nil {
		return err
	}
	if !slices.Contains(stack, topLayer) {
		return fmt.Errorf("merge disk layers: the disk consists of %s, want %s among them", strings.Join(stack, ", "), topLayer)
	}
	if stack[0] != topLayer {
		if err := commit(ctx, c, dir, stack[0], topLayer); err != nil {
			return err
		}
	}
	names, err := layerNames(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := removeLayer(dir, name); err != nil {
			return err
		}
	}
	return nil
}

func removeLayer(dir, name string) error {
	if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove disk layer: %w", err)
	}
	return nil
}

// commitEnd waits until no commit job runs. The job of a layer that the VM writes to must be
// told to end once it has caught up.
func commitEnd(ctx context.Context, c *qmp) error {
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
