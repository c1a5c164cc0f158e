package main

import (
	"runtime"

	"cloudlet/overlay"
)

// release is set by the linker: what `git describe` says of the sources.
var release = "(devel)"

type versionInfo struct {
	Version       string `json:"version"`
	Go            string `json:"go"`
	OverlayFormat int    `json:"overlay_format"`
}

func version() versionInfo {
	return versionInfo{Version: release, Go: runtime.Version(), OverlayFormat: overlay.FormatVersion}
}
