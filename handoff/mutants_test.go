//go:build mutants

package handoff

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestMutants changes the machines' source, one place at a time, and sees that TestEveryFault
// notices. Each needs a build, two minutes in all, so it has a tag: make mutants.
func TestMutants(t *testing.T) {
	for _, tc := range []struct{ name, file, old, new string }{
		{"go without a record", "steps.go", "		err := store(context.WithoutCancel(ctx), s.cfg.Journal, rec)\n		switch {", "		var err error\n		switch {"},
		{"an error of the journal is taken for the old record", "record.go", "	case loadErr == nil && bytes.Equal(got, data):", "	case loadErr == nil && bytes.Equal(got, nil):"},
		{"unsettled is taken for the old record", "record.go", "case loadErr != nil && !errors.Is(loadErr, fs.ErrNotExist):", "case false:"},
		{"a restart goes on with go unsent", "source.go", `s.cancelled = []Reason{{Text: "the source was restarted before go"}}`, `s.rec.State = SourceGoing`},
		{"a restart after go aborts", "source.go", "	default:\n		s.phase, s.committed = continuing, true\n	}", "	default:\n		s.rec.State, s.committed = SourceAborting, true\n	}"},
		{"cancel is possible while go is written", "steps.go", "s.committed = s.cancelled == nil", "s.committed = false"},
		{"unknown is taken for never", "steps.go", "	case Never:\n		rec := s.record(SourceAborting)", "	case Never, Unknown:\n		rec := s.record(SourceAborting)"},
		{"prepared is taken for never", "steps.go", "	case Never:\n		rec := s.record(SourceAborting)", "	case Never, Prepared:\n		rec := s.record(SourceAborting)"},
		{"lost is taken for never", "steps.go", "	case Never:\n		rec := s.record(SourceAborting)", "	case Never, Lost:\n		rec := s.record(SourceAborting)"},
		{"discarded while pages are missing", "steps.go", "	case Complete, Closed:\n		return s.enter(ctx, SourceDiscarding)\n	case Running:", "	case Complete, Closed, Running:\n		return s.enter(ctx, SourceDiscarding)\n	case Went:"},
		{"discarded when the destination has lost it", "steps.go", "	case Complete, Closed:\n		return s.enter(ctx, SourceDiscarding)", "	case Complete, Closed, Lost:\n		return s.enter(ctx, SourceDiscarding)"},
		{"released before it runs on", "steps.go", "	switch s.phase {\n	default:\n		if s.rec.Stopped && !s.rec.Offer.Paused {", "	switch s.phase {\n	default:\n		s.cfg.VM.Release(ctx)\n		if s.rec.Stopped && !s.rec.Offer.Paused {"},
		{"not released at the end", "steps.go", "	case releasing:\n		if err := s.cfg.VM.Release(ctx); err != nil {\n			return s.stuck(err)\n		}\n		s.phase, s.wait, s.began = telling, 0, s.cfg.Clock.Now()\n	case telling:\n		return s.tell(ctx, k,", "	case releasing:\n		s.phase, s.wait, s.began = telling, 0, s.cfg.Clock.Now()\n	case telling:\n		return s.tell(ctx, k,"},
		{"does not run on after a failure", "steps.go", "if s.rec.Stopped && !s.rec.Offer.Paused {", "if false {"},
		{"an error of continue is taken for done", "steps.go", "err := s.cfg.VM.Continue(ctx); err != nil && !errors.Is(err, ErrEnded) {\n				return s.stuck(err)\n			}\n		}\n		s.phase = settling\n	case settling, rel", "err := s.cfg.VM.Continue(ctx); err != nil && !errors.Is(err, ErrEnded) {\n				s.stuck(err)\n			}\n		}\n		s.phase = settling\n	case settling, rel"},
		{"the last round without a pause", "steps.go", "if err := s.cfg.VM.Pause(sub); err != nil {", "if err := error(nil); err != nil {"},
		{"an error of pause is ignored", "steps.go", "			s.giveUp(Reason{Text: cut(fmt.Sprintf(\"pause: %v\", err))})\n			return 0", ""},
		{"the operator's word is not on record", "steps.go", "		if next := s.chosen(); next != \"\" {\n			return s.enter(ctx, next), false", "		if next := s.chosen(); next != \"\" {\n			s.rec.State, s.phase = next, continuing\n			return 0, false"},
		{"a restart touches an ordinary instance", "source.go", "		s.phase, s.committed = telling, true\n", "		s.rec.State, s.phase, s.committed = SourceResuming, continuing, true\n"},
		{"an ordinary instance too soon", "steps.go", "	case settling:\n		if err := s.settle(ctx); err != nil {\n			return s.stuck(err)\n		}\n		s.phase = ending\n	case ending: // the", "	case settling:\n		s.phase = ending\n	case ending: // the"},
		{"superseding is not told", "steps.go", "		return s.tell(ctx, KindSupersede, s.cfg.Limits.Farewell)", "		s.phase = ending"},
		{"it runs before that is on record", "destination.go", "		rec := d.rec\n		rec.State = Went\n		if err := d.write(ctx, rec); err != nil {", "		rec := d.rec\n		rec.State = Went\n		d.cfg.Site.Run(ctx, d.rec.Offer)\n		if err := d.write(ctx, rec); err != nil {"},
		{"prepared again after it has run", "destination.go", "		case errors.Is(err, ErrEnded):\n			d.move(ctx, Lost, Reason{Text: cut(err.Error())})", "		case errors.Is(err, ErrEnded):\n			d.cfg.Site.Prepare(ctx, d.rec.Offer, d.rec.Chain)"},
		{"never after it has run", "destination.go", "		case errors.Is(err, ErrEnded):\n			d.move(ctx, Lost, Reason", "		case errors.Is(err, ErrEnded):\n			d.move(ctx, Never, Reason"},
		{"there is no lease", "destination.go", "d.cfg.Clock.Now().Sub(d.heard) > d.cfg.Lease", "false"},
		{"never is not carried out", "destination.go", "		err = d.cfg.Site.Destroy(ctx)\n	case Superseded", "	case Superseded"},
		{"superseded and running on", "destination.go", "		err = d.cfg.Site.Pause(ctx)\n		if errors", "		if errors"},
		{"complete too soon", "destination.go", "		case d.look.Missing == 0:\n", "		default:\n"},
		{"go after never runs", "destination.go", "	case Accepted:\n		return d.refuse(ctx, Reason{Text: \"it was not prepared\"})\n	case Prepared:", "	case Accepted:\n		return d.refuse(ctx, Reason{Text: \"it was not prepared\"})\n	case Prepared, Never:"},
		{"unsettled is withdrawn at once", "steps.go", "			if a, sent := s.send(ctx, KindAbort); sent != nil || a.State != Never {\n				return s.stuck(err)\n			}\n", ""},
		{"stale epochs are taken", "destination.go", "	case m.Kind != KindSupersede && m.Epoch == d.rec.Epoch:\n	default:", "	case true:\n	default:"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			path, err := filepath.Abs(tc.file)
			require.NoError(t, err)
			text, err := os.ReadFile(path)
			require.NoError(t, err)
			require.Equal(t, 1, strings.Count(string(text), tc.old), "the place to change must be there once")
			mutant := filepath.Join(dir, tc.file)
			require.NoError(t, os.WriteFile(mutant, []byte(strings.Replace(string(text), tc.old, tc.new, 1)), 0o600))
			overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{path: mutant}})
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(dir, "overlay.json"), overlay, 0o600))
			out, err := exec.CommandContext(t.Context(), "go", "test", "-vet=off", "-timeout", "60s", "-overlay", filepath.Join(dir, "overlay.json"), "-run", "TestNoFault|TestEveryFault|TestRareFaults|TestStale", ".").CombinedOutput()
			require.Error(t, err, "nobody noticed")
			require.NotContains(t, string(out), "[build failed]", string(out))
			require.Contains(t, string(out), "--- FAIL", string(out))
		})
	}
}
