package figures

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestExitCode(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		code int
		says string
	}{
		{"well", nil, 0, ""},
		{"help", fmt.Errorf("parse: %w", flag.ErrHelp), 0, ""},
		{"missed", errors.Join(ErrMissed, nil), 1, ""},
		{"missed, and more", errors.Join(ErrMissed, errors.New("no luck")), 1, "bench: a target was missed\nno luck\n"},
		{"error", errors.New("no luck"), 2, "bench: no luck\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var stderr bytes.Buffer
			require.Equal(t, tt.code, exitCode("bench", tt.err, &stderr))
			require.Equal(t, tt.says, stderr.String())
		})
	}
}

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		says string
	}{
		{"flag", []string{"-n", "3"}, ""},
		{"unknown", []string{"-m", "3"}, "not defined"},
		{"stray", []string{"-n", "3", "more"}, `unexpected argument "more"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			flags := flag.NewFlagSet("bench", flag.ContinueOnError)
			flags.SetOutput(io.Discard)
			n := flags.Int("n", 0, "")
			err := Parse(flags, tt.args)
			if tt.says != "" {
				require.ErrorContains(t, err, tt.says)
				return
			}
			require.NoError(t, err)
			require.Equal(t, 3, *n)
		})
	}
}
