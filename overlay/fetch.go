package overlay

import "context"

// FetchOptions are the settings of [Image.Fetch]; the zero value is fit for use.
type FetchOptions struct {
	Parallel int   // requests at the same time; 0: 8
	Most     int64 // bytes of one request, if a frame is not larger; 0: 256 KiB
}

// Fetch brings the encoded frames of all overlays over a network to this host: those that
// hold pages of profile first, in its order, then the rest in the order of the file.
func (im *Image) Fetch(ctx context.Context, profile []Addr, o FetchOptions) error {
	return nil
}
