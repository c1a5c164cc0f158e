package service

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"cloudlet/api"
	"cloudlet/overlay"
	"cloudlet/overlay/source"

	"github.com/stretchr/testify/require"
)

// far is a file that its reader takes for one behind a network.
type far struct{ *source.File }

func (far) Local() bool { return false }

// TestReadAhead: it follows from where the overlay is, whether its frames are packed by a
// profile, and whether prefetch has a profile to go by.
func TestReadAhead(t *testing.T) {
	s := newService(t)
	l, err := s.openLaunch(t.Context(), addBase(t, s, "", 'a').ID)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, l.close()) })
	dir := t.TempDir()
	changes := overlay.Changes{Extents: []overlay.Extent{{Off: 4096, Len: 4096}}, Read: func(p []byte, _ int64) error { p[0] = 1; return nil }}
	for name, profile := range map[string][]overlay.Addr{"plain": nil, "packed": {1}} {
		launch := overlay.Launch{Parent: l.image, Machine: json.RawMessage(`{}`), Memory: changes, Profile: profile}
		_, err := overlay.Create(t.Context(), filepath.Join(dir, name), launch, overlay.CreateOptions{})
		require.NoError(t, err)
	}
	kept := filepath.Join(dir, "profile")
	require.NoError(t, os.WriteFile(kept, overlay.MarshalProfile([]overlay.Addr{0}), 0o600))

	for _, c := range []struct {
		overlay  string
		far      bool
		profile  string
		prefetch api.Prefetch
		want     int
	}{
		{"packed", true, "", api.PrefetchAuto, packedReadAhead},
		{"packed", true, kept, api.PrefetchProfile, packedReadAhead},
		{"packed", true, "", api.PrefetchNone, remoteReadAhead},
		{"packed", false, "", api.PrefetchAuto, profileReadAhead},
		{"plain", true, kept, api.PrefetchAuto, remoteReadAhead},
		{"plain", true, "", api.PrefetchAuto, remoteReadAhead},
		{"plain", false, kept, api.PrefetchAuto, profileReadAhead},
		{"plain", false, "", api.PrefetchAuto, 0},
		{"packed", false, "", api.PrefetchNone, 0},
	} {
		t.Run(fmt.Sprintf("%s far=%t kept=%t %s", c.overlay, c.far, c.profile != "", c.prefetch), func(t *testing.T) {
			f, err := source.OpenFile(filepath.Join(dir, c.overlay))
			require.NoError(t, err)
			var src overlay.Source = f
			if c.far {
				src = far{f}
			}
			r, err := overlay.Open(t.Context(), src)
			require.NoError(t, err)
			defer func() { require.NoError(t, r.Close()) }()
			im, err := overlay.NewImage(l.base, []*overlay.Reader{r}, overlay.ImageOptions{})
			require.NoError(t, err)
			defer func() { require.NoError(t, im.Close()) }()
			require.Equal(t, c.want, readAheadOf(MountSpec{Profile: c.profile, Prefetch: c.prefetch}, im))
		})
	}
}
