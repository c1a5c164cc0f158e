package vmm

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// The files of a VM's folder. Names are short and fixed: QEMU is given them relative to
// the folder.
const (
	qmpSocket    = "qmp.sock"
	serialSocket = "serial.sock"
	serialLog    = "serial.log"
	stderrFile   = "qemu.stderr"
	launcherLog  = "launcher.log"
	launchFile   = "launch.json"
	processFile  = "qemu.pid.json"
	exitFile     = "exit.json"
	endingFile   = "ending.json"
	vmFile       = "vm.json"
	lockFile     = "capture.lock"
	startFile    = "start.lock"
	stoppedFile  = "capture.json"
	balloonFile  = "balloon.json"
	resumeState  = "resume.state"
	xenState     = "capture.xen"
	topLayer     = "disk.0.qcow2"
	monitorLock  = "monitor.lock"
	saveFile     = "resume.img"
)

// maxJSON bounds the JSON files of a VM's folder in bytes.
const maxJSON = 1 << 20

// readJSON reads a JSON file of a VM's folder. One that is empty, or zeros, is as good as none:
// that is what a power failure leaves of a file just written, and no VM outlives one.
func readJSON(dir, name string, v any) error {
	f, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxJSON+1))
	if err != nil {
		return err
	}
	if len(data) > maxJSON {
		return fmt.Errorf("read %s: more than %d bytes", f.Name(), maxJSON)
	}
	if len(bytes.Trim(data, "\x00")) == 0 {
		return fmt.Errorf("read %s: it is empty: %w", f.Name(), os.ErrNotExist)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("parse %s: %w", f.Name(), err)
	}
	return nil
}

// writeJSON writes a JSON file of a VM's folder, wholly or not at all.
func writeJSON(dir, name string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode %s: %w", name, err)
	}
	path := filepath.Join(dir, name)
	return writeFile(path, func(f *os.File) error {
		_, err := f.Write(append(data, '\n'))
		return err
	})
}

// writeFile makes a file of mode 0600 beside its final name and renames it when fill has
// succeeded.
func writeFile(path string, fill func(f *os.File) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("create %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	if err := fill(f); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), f.Close())
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("close %s: %w", path, err)
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("rename %s: %w", path, err)
	}
	return nil
}
