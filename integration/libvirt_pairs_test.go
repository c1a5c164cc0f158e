//go:build pairs

package integration

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"cloudlet/api"
	"cloudlet/integration/appguest"
	"cloudlet/integration/figures"
	"cloudlet/integration/need"

	"github.com/stretchr/testify/require"
)

var pairsOf = flag.String("pairs", "", "folder of a demo that is prepared: compare first responses through libvirt and without")

// pairBound is how much later the first response may come through libvirt, in seconds, and pairs
// how often it is looked at.
const (
	pairBound = 0.6
	pairs     = 5
)

// TestLibvirtPairs compares first responses of the demo's application, resumed through libvirt
// and without, one after the other. It is a measurement, which wants the machine for itself, and
// so behind a build tag: make bench-libvirt.
func TestLibvirtPairs(t *testing.T) {
	require.NotEmpty(t, *pairsOf, "-pairs is missing")
	if !onLibvirtHost() {
		need.Root(t, "start a libvirt for the system")
		needLibvirt(t)
		dir, err := filepath.Abs(*pairsOf)
		require.NoError(t, err)
		bin, err := os.Executable()
		require.NoError(t, err)
		cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "--propagation", "slave", bin,
			"-test.run", "^TestLibvirtPairs$", "-test.v", "-test.timeout", "15m", "-guest", *guestDir, "-pairs", dir)
		cmd.Env = append(os.Environ(), hostEnv+"=1")
		out, err := cmd.CombinedOutput()
		t.Logf("%s", out)
		require.NoError(t, err)
		return
	}
	l := newEmptyLab(t)
	for _, sub := range []string{"bases", "overlays", "profiles"} {
		out, err := exec.CommandContext(t.Context(), "cp", "-a", "--sparse=always", filepath.Join(*pairsOf, "state", sub), l.state).CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	var made struct{ Overlay string }
	text, err := os.ReadFile(filepath.Join(*pairsOf, "prepared.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &made))
	once := func(vmm string) float64 {
		var in api.Instance
		l.json(&in, "run", made.Overlay, "--vmm", vmm, "--probe", fmt.Sprintf("%d/", appguest.Port), "--timeout", "2m")
		defer l.ok("rm", "-f", in.ID)
		last := in.Timeline[len(in.Timeline)-1]
		require.Equal(t, "first answer", last.Name)
		return last.Seconds
	}
	once("libvirt") // libvirt looks at a new emulator for some seconds
	once("qemu")
	var later, direct, through []float64
	for range pairs {
		q, v := once("qemu"), once("libvirt")
		direct, through, later = append(direct, q), append(through, v), append(later, v-q)
	}
	for _, s := range []struct {
		name  string
		times []float64
	}{{"qemu", direct}, {"libvirt", through}} {
		t.Logf("first response, %s: %.2f s (%.2f to %.2f)", s.name, figures.Median(s.times), slices.Min(s.times), slices.Max(s.times))
	}
	more := figures.Target{What: "first response through libvirt, later", Bound: pairBound, Value: figures.Median(later), Unit: "s", Decimals: 2}
	t.Log(more)
	if !more.Met() {
		t.Fail()
	}
}
