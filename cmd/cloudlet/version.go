package main

import (
	"runtime"
	"runtime/debug"

	"cloudlet/overlay"
)

type versionInfo struct {
	Version       string `json:"version"`
	Go            string `json:"go"`
	OverlayFormat int    `json:"overlay_format"`
}

// version is this program's, as the Go tool stamped it into the binary.
func version() versionInfo {
	v := versionInfo{Version: "(devel)", Go: runtime.Version(), OverlayFormat: overlay.FormatVersion}
	if info, ok := debug.ReadBuildInfo(); ok {
		if info.Main.Version != "" {
			v.Version = info.Main.Version
		}
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				v.Version += " " + s.Value
			}
		}
	}
	return v
}
