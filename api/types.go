package api

import (
	"encoding/json"
	"time"
)

// Base is a base VM in the store.
type Base struct {
	ID         string          `json:"id"`
	Name       string          `json:"name,omitempty"`
	Created    time.Time       `json:"created"`
	MemorySize int64           `json:"memory_size"`
	DiskSize   int64           `json:"disk_size"`
	Stored     int64           `json:"stored_bytes"` // what it takes on the host's disk
	Resumable  bool            `json:"resumable"`    // false: no device state
	Machine    json.RawMessage `json:"machine"`
	UsedBy     []string        `json:"used_by,omitempty"` // what keeps it from being removed
	Problem    string          `json:"problem,omitempty"` // why it cannot be used; then only ID and Name are set
}

// Overlay is an overlay, in the store or in a file.
type Overlay struct {
	ID         string          `json:"id"`
	Name       string          `json:"name,omitempty"`
	Created    time.Time       `json:"created,omitzero"` // when it came into the store
	Digest     string          `json:"digest"`
	Base       string          `json:"base"`
	Parent     string          `json:"parent"`
	Depth      int             `json:"depth"`
	Size       int64           `json:"size"` // of the file
	MemorySize int64           `json:"memory_size"`
	DiskSize   int64           `json:"disk_size"`
	Resumable  bool            `json:"resumable"`
	Strategy   json.RawMessage `json:"strategy"`
	Stats      json.RawMessage `json:"stats"`
	Machine    json.RawMessage `json:"machine"`
	UsedBy     []string        `json:"used_by,omitempty"`
	Problem    string          `json:"problem,omitempty"` // as Base.Problem
}

// State is what an instance is doing.
type State string

// The states of an instance.
const (
	Starting State = "starting" // being resumed
	Running  State = "running"
	Paused   State = "paused"
	Stalled  State = "io-error" // QEMU stopped the guest after a disk error; continue tries again
	Panicked State = "guest-panicked"
	Stopped  State = "stopped" // ended: on request, by the guest, or by a failure, see Reason
	Lost     State = "lost"    // ended because what it ran on went away, see Reason
)

// Instance is a VM running on a launch image or on a base.
type Instance struct {
	ID        string     `json:"id"`
	Name      string     `json:"name,omitempty"`
	State     State      `json:"state"`
	Reason    string     `json:"reason,omitempty"` // why it is in this state, where that is not plain
	Reset     bool       `json:"reset,omitempty"`  // paused, and reset since: it boots from its present disk when it goes on
	Image     string     `json:"image"`            // id of the launch image: last overlay, or base
	Base      string     `json:"base"`
	Overlays  []string   `json:"overlays,omitempty"` // ids, the one on the base first
	Source    string     `json:"source,omitempty"`   // file or URL, without user and query, of the last overlay where it is not in the store
	Created   time.Time  `json:"created"`
	Ended     time.Time  `json:"ended,omitzero"`
	PID       int        `json:"pid,omitempty"` // of QEMU
	Endpoints []Endpoint `json:"endpoints,omitempty"`
	Timeline  []Event    `json:"timeline,omitempty"`
	Mount     *Mount     `json:"mount,omitempty"`   // while it lives
	Lineage   string     `json:"lineage"`           // id that it keeps wherever it is handed off to
	Epoch     uint64     `json:"epoch"`             // grows with every handoff of the lineage
	Handoff   string     `json:"handoff,omitempty"` // id of the one under way
	Moved     *Moved     `json:"moved,omitempty"`   // where it runs now, if it was handed off
}

// Endpoint is a port of the guest that can be reached on the host.
type Endpoint struct {
	Guest   int    `json:"guest"`   // port in the guest
	Address string `json:"address"` // host:port on the host
}

// Event is a step of a synthesis, by its time since the request.
type Event struct {
	Name    string  `json:"name"`
	Seconds float64 `json:"seconds"`
}

// Mount is the launch image that an instance runs on.
type Mount struct {
	Dir          string `json:"dir"`
	PID          int    `json:"pid"`
	MemoryReads  int64  `json:"memory_reads"`
	MemoryBytes  int64  `json:"memory_bytes"`        // read by all instances since the mount began
	MemoryPushed int64  `json:"memory_pushed_bytes"` // given to the kernel before it was asked for
	DiskReads    int64  `json:"disk_reads"`
	DiskBytes    int64  `json:"disk_bytes"`
	Fetched      int64  `json:"overlay_bytes"` // read from the overlays' sources
	Complete     bool   `json:"complete"`      // all of the overlays is on this host
	Held         []Held `json:"held,omitempty"`
}

// Held is a read that waits for its source.
type Held struct {
	Image  string    `json:"image"` // "memory" or "disk"
	Offset int64     `json:"offset"`
	Since  time.Time `json:"since"`
	Error  string    `json:"error,omitempty"`
}

// Forward asks for a port of the guest to be reachable on the host.
type Forward struct {
	Address string `json:"address,omitempty"` // IPv4 address to listen on; "" is 127.0.0.1
	Host    int    `json:"host,omitempty"`    // 0: a free port
	Guest   int    `json:"guest"`
}

// Probe is a request to the application that tells when it answers: GET http path on a
// forwarded guest port. The answer is right with this status (0: any below 400) and this text.
type Probe struct {
	Port     int    `json:"port"`
	Path     string `json:"path"`
	Status   int    `json:"status,omitempty"`
	Contains string `json:"contains,omitempty"`
}

// CaptureBase asks for a base VM to be made of a running instance, which goes on: its disk
// and memory as they are, on no other base.
type CaptureBase struct {
	Instance string `json:"instance"`
	Name     string `json:"name,omitempty"`
}

// CreateBase asks for a base VM to be booted and captured.
type CreateBase struct {
	Name        string        `json:"name,omitempty"`
	Disk        string        `json:"disk"`             // path of the disk image, which is not changed
	Format      string        `json:"format,omitempty"` // raw or qcow2; "" looks
	Kernel      string        `json:"kernel,omitempty"`
	Initrd      string        `json:"initrd,omitempty"`
	Append      string        `json:"append,omitempty"`
	Memory      int64         `json:"memory"` // bytes
	CPUs        int           `json:"cpus,omitempty"`
	Accelerator string        `json:"accelerator,omitempty"`
	Forwards    []Forward     `json:"forwards,omitempty"`
	Probe       *Probe        `json:"probe,omitempty"`   // capture when this answers,
	Console     string        `json:"console,omitempty"` // or when the serial console shows this text,
	Settle      time.Duration `json:"settle,omitempty"`  // and then this much later
	Timeout     time.Duration `json:"timeout,omitempty"` // for the probe or the text; 0: 5 minutes
}

// Run asks for an instance.
type Run struct {
	Ref      string        `json:"ref"`            // base or overlay: id, the beginning of one, name; overlay: file or URL
	Base     string        `json:"base,omitempty"` // that Ref must be, or be made on: id, the beginning of one, name; "": any
	Name     string        `json:"name,omitempty"`
	Forwards []Forward     `json:"forwards,omitempty"`
	Probe    *Probe        `json:"probe,omitempty"`   // wait for its first right answer
	Timeout  time.Duration `json:"timeout,omitempty"` // for the probe; 0: 1 minute
	Keep     bool          `json:"keep,omitempty"`    // keep the instance if the probe times out
	Paused   bool          `json:"paused,omitempty"`  // resume without letting the guest run
	// Record keeps the order in which the guest touches pages until the probe's answer, and in
	// the 3 seconds behind it, for which the run goes on, as the image's touch profile: later
	// instances get these pages first. The instance has a
	// mount of its own, where reads take longer. It needs a probe.
	Record bool `json:"record,omitempty"`
	// Prefetch says what the mount gives the guest before it is asked for, where this run
	// begins the mount.
	Prefetch Prefetch `json:"prefetch,omitempty"`
}

// Prefetch names the pages that a mount gives the guest before it is asked for them.
type Prefetch string

// The choices for Run.Prefetch.
const (
	PrefetchAuto    Prefetch = ""        // by profile, else the overlays' memory if they are on this host
	PrefetchNone    Prefetch = "none"    // nothing
	PrefetchOverlay Prefetch = "overlay" // what the overlays hold of memory, whatever a profile says
	PrefetchProfile Prefetch = "profile" // by profile; without one nothing
)

// CreateOverlay asks for an overlay of a running instance. What stands in memory that its
// guest does not use is left out, unless KeepFree.
type CreateOverlay struct {
	Instance string `json:"instance"`
	Name     string `json:"name,omitempty"`
	Strategy string `json:"strategy,omitempty"` // "" is "balanced"
	Output   string `json:"output,omitempty"`   // also write the overlay to this file
	Stop     bool   `json:"stop,omitempty"`     // end the instance with it: nothing is lost that it did since
	KeepFree bool   `json:"keep_free_memory,omitempty"`
}

// CreatedOverlay is a new overlay and what making it cost.
type CreatedOverlay struct {
	Overlay
	Output string `json:"output,omitempty"`
	// Needs are overlays under it that are not in the store, since the instance ran from a
	// file or URL: they must be imported before this one can be run.
	Needs []string `json:"needs,omitempty"`
	// Freed are the bytes that the guest did not use: they are as in the parent. FreeKept says why
	// there are none, where that could be otherwise.
	Freed    int64  `json:"free_memory"`
	FreeKept string `json:"free_memory_kept,omitempty"`

	Pause float64 `json:"pause_seconds"` // for which the guest stood still
	Took  float64 `json:"seconds"`
}

// Check is one thing that a host must have, and whether it does.
type Check struct {
	Name   string `json:"name"`
	OK     bool   `json:"ok"`
	Detail string `json:"detail"`
	Remedy string `json:"remedy,omitempty"`
}

// Progress is told how far a long call has come: phase, and done of total bytes (0: not
// known). Calls come one at a time. It may be nil.
type Progress func(phase string, done, total int64)
