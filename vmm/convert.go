package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
)

// The formats of a disk image that ConvertDisk reads.
var diskFormats = map[string]bool{"raw": true, "qcow2": true}

// diskUnit is what a disk's size is rounded up to, in bytes: a page of an image.
const diskUnit = 4096

// ConvertDisk writes the disk image at path, "raw" or "qcow2", as a sparse raw image to out,
// which must not exist; format "" looks what it is. A size that is no multiple of 4096 is
// rounded up with zeros. On an error nothing is left.
func (q *QEMU) ConvertDisk(ctx context.Context, path, format, out string) error {
	if format != "" && !diskFormats[format] {
		return fmt.Errorf("disk format %q: want raw or qcow2", format)
	}
	img, err := q.img()
	if err != nil {
		return err
	}
	// qemu-img's own words for a missing file are harder to read.
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open disk image: %w", err)
	}
	if err := f.Close(); err != nil {
		return err
	}
	if format == "" {
		var info struct {
			Format string `json:"format"`
		}
		text, err := output(ctx, img, "info", "--output=json", "--", path)
		if err == nil {
			err = json.Unmarshal([]byte(text), &info)
		}
		if err != nil {
			return fmt.Errorf("look at disk image %s: %w", path, err)
		}
		if format = info.Format; !diskFormats[format] {
			return fmt.Errorf("disk image %s has format %s: convert it to raw or qcow2 first", path, format)
		}
	}
	if _, err := os.Lstat(out); err == nil {
		return fmt.Errorf("convert disk image: %s exists", out)
	}
	_, err = output(ctx, img, "convert", "-f", format, "-O", "raw", "-S", "4k", "--", path, out)
	if err == nil {
		err = roundUp(out)
	}
	if err != nil {
		err = fmt.Errorf("convert disk image %s: %w", path, err)
		if rerr := os.Remove(out); rerr != nil && !os.IsNotExist(rerr) {
			err = errors.Join(err, rerr)
		}
	}
	return err
}

func roundUp(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if info.Size() == 0 {
		return errors.New("the disk has no bytes")
	}
	return os.Truncate(path, (info.Size()+diskUnit-1)/diskUnit*diskUnit)
}
