package service

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"testing"

	"cloudlet/api"

	"github.com/stretchr/testify/require"
)

// promise begins an operation that needs n and waits for its cancellation.
func promise(t *testing.T, s *Service, kind api.Kind, n need) (api.Operation, error) {
	op, _, err := s.begin(t.Context(), task{kind: kind, req: api.Run{}, need: n, work: func(ctx context.Context, _ *operation) (any, error) {
		<-ctx.Done()
		return nil, context.Cause(ctx)
	}})
	return op, err
}

func TestAdmission(t *testing.T) {
	const gib = int64(1) << 30
	run := func(memory int64) need { return need{Memory: memory, Instances: 1} }
	for _, tt := range []struct {
		name   string
		limits func(*Config)
		first  []need
		next   need
		words  []string // of the refusal; none: admitted
	}{
		{"no limits", func(*Config) {}, []need{run(1 << 20)}, run(1 << 20), nil},
		{"instances", func(c *Config) { c.MaxInstances = 2 }, []need{run(1), run(1)}, run(1), []string{"2 instances live or start, the limit is 2"}},
		{"a base is no instance", func(c *Config) { c.MaxInstances = 1 }, []need{run(1)}, need{Memory: 1}, nil},
		{"memory of guests", func(c *Config) { c.MaxMemory = 4 * gib }, []need{run(3 * gib)}, run(gib + 1), []string{"needs 1.0 GiB", "3.0 GiB of the 4.0 GiB", "by 1"}},
		{"memory of guests, just enough", func(c *Config) { c.MaxMemory = 4 * gib }, []need{run(3 * gib)}, run(gib), nil},
		{"memory of the host", func(*Config) {}, nil, run(1 << 50), []string{"needs 1048576.0 GiB", "available", "0 bytes of it are promised"}},
		{"memory of the host, promised", func(*Config) {}, []need{run(1 << 29)}, run(1 << 50), []string{"512.0 MiB of it are promised"}},
		{"disk", func(*Config) {}, nil, need{Disk: 1 << 60}, []string{"1073741824.0 GiB are needed", "are free, 0 bytes of them promised"}},
		{"more disk than a sum can hold", func(c *Config) { c.MinFree = 1 }, []need{{Disk: 1}}, need{Disk: math.MaxInt64}, []string{"8589934592.0 GiB are needed"}},
		{"disk that is to stay free", func(c *Config) { c.MinFree = 1 << 60 }, nil, run(1), []string{"1073741824.0 GiB to stay free"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := reopen(t, newService(t), tt.limits)
			for _, n := range tt.first {
				_, err := promise(t, s, api.KindRun, n)
				require.NoError(t, err)
			}
			_, err := promise(t, s, api.KindRun, tt.next)
			if tt.words == nil {
				require.NoError(t, err)
				return
			}
			require.Equal(t, api.Unavailable, api.CodeOf(err))
			for _, w := range tt.words {
				require.ErrorContains(t, err, w)
			}
			ids, err := s.list("operations")
			require.NoError(t, err)
			require.Len(t, ids, len(tt.first), "a refusal leaves nothing")
		})
	}
}

// TestAdmissionTogether: many at once, from two processes, get no more than there is.
func TestAdmissionTogether(t *testing.T) {
	s := reopen(t, newService(t), func(c *Config) { c.MaxInstances, c.MaxMemory = 100, 5<<30 })
	other := reopen(t, s, nil)
	var admitted atomic.Int32
	var wg sync.WaitGroup
	var errs [16]error
	for i := range errs {
		wg.Go(func() {
			on := s
			if i%2 == 1 {
				on = other
			}
			if _, err := promise(t, on, api.KindRun, need{Memory: 1 << 30, Instances: 1}); err == nil {
				admitted.Add(1)
			} else if api.CodeOf(err) != api.Unavailable {
				errs[i] = err
			}
		})
	}
	wg.Wait()
	require.NoError(t, errors.Join(errs[:]...))
	require.EqualValues(t, 5, admitted.Load())
}

// TestAdmissionOfInstances: what lives counts, once, and what has ended does not.
func TestAdmissionOfInstances(t *testing.T) {
	s := reopen(t, newService(t), func(c *Config) { c.MaxMemory = 2 << 30 })
	b := addBase(t, s, "", 'a')
	l, err := s.openLaunch(t.Context(), b.ID)
	require.NoError(t, err)
	defer l.close()
	r, lk, err := s.newRecord(t.Context(), newID(), api.Run{}, l, json.RawMessage(fmt.Sprintf(`{"memory":%d}`, 1<<30)))
	require.NoError(t, err)
	op, err := promise(t, s, api.KindRun, need{Memory: 1 << 30, Instances: 1})
	require.NoError(t, err)
	_, err = promise(t, s, api.KindRun, need{Memory: 1, Instances: 1})
	require.ErrorContains(t, err, "2.0 GiB of the 2.0 GiB")
	s.own(op.ID).aim("instance", r.ID) // the operation's instance is the one that counts already
	_, err = promise(t, s, api.KindRun, need{Memory: 1 << 29, Instances: 1})
	require.NoError(t, err)
	m, err := s.Collect(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 3<<29, m.Guests)
	require.Equal(t, map[api.State]int{api.Starting: 1}, m.Instances)

	_, err = promise(t, s, api.KindRun, need{Memory: 1 << 30, Instances: 1})
	require.Error(t, err)
	lk.unlock() // its process has died: the second look sees that
	_, err = promise(t, s, api.KindRun, need{Memory: 1 << 30, Instances: 1})
	require.NoError(t, err)
}
