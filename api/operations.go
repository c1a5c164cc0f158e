package api

import (
	"encoding/json"
	"time"
)

// Kind is what an operation does.
type Kind string

// The kinds of operation, each with the request that begins it and the result it has.
const (
	KindCreateBase    Kind = "create-base"    // CreateBase or CaptureBase, Base
	KindImportBase    Kind = "import-base"    // ImportBase, Base
	KindVerifyBase    Kind = "verify-base"    // Verify, Base
	KindCreateOverlay Kind = "create-overlay" // CreateOverlay, CreatedOverlay
	KindImportOverlay Kind = "import-overlay" // ImportOverlay, Overlay
	KindVerifyOverlay Kind = "verify-overlay" // Verify, VerifiedOverlay
	KindProfile       Kind = "profile"        // Profile, ProfiledOverlay
	KindRun           Kind = "run"            // Run, Instance: VM synthesis, or the resume of a base
	KindHandoff       Kind = "handoff"        // HandOff, HandedOff
)

// OperationState is how far an operation has come.
type OperationState string

// The states of an operation; the last three are final.
const (
	OperationRunning   OperationState = "running"
	OperationWaiting   OperationState = "waiting" // for a person to say that the guest is ready
	OperationDone      OperationState = "done"
	OperationFailed    OperationState = "failed"
	OperationCancelled OperationState = "cancelled"
)

// Ended reports whether the state is final.
func (s OperationState) Ended() bool {
	return s == OperationDone || s == OperationFailed || s == OperationCancelled
}

// Operation is long work that goes on after its request was answered.
type Operation struct {
	ID      string          `json:"id"`
	Kind    Kind            `json:"kind"`
	State   OperationState  `json:"state"`
	Version int64           `json:"version"` // grows with every change; the id of its event
	Phase   string          `json:"phase,omitempty"`
	Done    int64           `json:"done,omitempty"`  // bytes, of the phase
	Total   int64           `json:"total,omitempty"` // 0: not known
	Target  *Target         `json:"target,omitempty"`
	Created time.Time       `json:"created"`
	Ended   time.Time       `json:"ended,omitzero"`
	Request json.RawMessage `json:"request"`
	Result  json.RawMessage `json:"result,omitempty"` // once done
	Error   *Error          `json:"error,omitempty"`  // once failed or cancelled
}

// Target is the resource that an operation makes or works on.
type Target struct {
	Type string `json:"type"` // base, overlay, instance, handoff
	ID   string `json:"id"`
}

// ImportBase asks for a base package to be taken into the store.
type ImportBase struct {
	Name   string `json:"name,omitempty"`
	Source string `json:"source"` // URL; over a local connection also the absolute path of a file
}

// ImportOverlay asks for an overlay to be taken into the store.
type ImportOverlay struct {
	Name   string `json:"name,omitempty"`
	Source string `json:"source"` // as ImportBase.Source
}

// Verify asks for every byte of a base or an overlay to be read and checked.
type Verify struct {
	Ref string `json:"ref"`
}

// VerifiedOverlay says how much of an overlay could be checked.
type VerifiedOverlay struct {
	Overlay
	// Pages: every page was decoded and matches the id. False: base or a parent is not in
	// the store, so only the encoded bytes were checked against their hashes.
	Pages bool `json:"pages_verified"`
}

// Profile asks for trial runs of an overlay, one for each probe, that record which pages the
// guest touches until it answers, and in the 3 seconds behind that: over a slow link they come
// before the answer. The profile is kept beside what earlier trials found.
type Profile struct {
	Ref     string        `json:"ref"`
	Probes  []Probe       `json:"probes"`
	Timeout time.Duration `json:"timeout,omitempty"` // for each probe; 0: 1 minute
	Fresh   bool          `json:"fresh,omitempty"`   // forget what earlier trials found
	// Repack also writes the overlay in the store anew, the pages of the profile first, in
	// small frames. Its id stays; its digest does not.
	Repack   bool   `json:"repack,omitempty"`
	Strategy string `json:"strategy,omitempty"` // of the repacked overlay; "": the one that it has
}

// ProfiledOverlay is an overlay with its touch profile.
type ProfiledOverlay struct {
	Overlay
	MemoryPages int `json:"profile_memory_pages"`
	DiskPages   int `json:"profile_disk_pages"`
}

// Upload is an overlay whose content is being sent. When the last byte is there, an
// operation of KindImportOverlay takes it into the store.
type Upload struct {
	ID      string    `json:"id"` // begins with "upload-"
	Name    string    `json:"name,omitempty"`
	Size    int64     `json:"size"`
	Offset  int64     `json:"offset"` // bytes received: where to go on
	Created time.Time `json:"created"`
}

// CreateUpload asks for an Upload.
type CreateUpload struct {
	Name string `json:"name,omitempty"`
	Size int64  `json:"size"` // bytes of the overlay file
}

// Action is what can be done to an instance.
type Action string

// The actions on an instance. Ready says that the guest of a CreateBase without probe and
// console text can be captured. ResumeHere and DiscardHere decide about an instance whose
// handoff is in doubt, and accept the loss that the handoff tells of.
const (
	ActionPause    Action = "pause"
	ActionContinue Action = "continue"
	ActionReset    Action = "reset"
	ActionStop     Action = "stop"
	ActionAbort    Action = "abort"
	ActionReady    Action = "ready"

	ActionResumeHere  Action = "resume-here"
	ActionDiscardHere Action = "discard-here"
)
