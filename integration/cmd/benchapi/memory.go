package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

const (
	rssWindow  = 15          // samples, one a second, of which the median counts
	rssGrowth  = 0.1         // that is allowed, of the early one,
	rssLeast   = 8 << 20     // or these bytes where they are more
	rssSettled = time.Minute // when the early window begins
)

// watch takes the resident size of a process each second for some time.
func watch(ctx context.Context, pid int, long time.Duration) (out []int64, err error) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	end := time.NewTimer(long)
	defer end.Stop()
	for {
		n, err := resident(pid)
		if err != nil {
			return out, err
		}
		out = append(out, n)
		select {
		case <-tick.C:
		case <-end.C:
			return out, nil
		case <-ctx.Done():
			return out, nil
		}
	}
}

// resident returns the resident size of a process in bytes.
func resident(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			var kib int64
			_, err := fmt.Sscan(rest, &kib)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("process %d has no VmRSS", pid)
}

// descriptors counts the open files of a process.
func descriptors(pid int) (int, error) {
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	return len(list), err
}

// flatness returns the median resident sizes early, once all is under way, and at the end.
// Where samples are few, early is after a fifth of them.
func flatness(rss []int64) (early, late int64) {
	n := min(rssWindow, (len(rss)+3)/4)
	from := min(int(rssSettled/time.Second), len(rss)/5)
	middle := func(v []int64) int64 { return slices.Sorted(slices.Values(v))[len(v)/2] }
	return middle(rss[from : from+n]), middle(rss[len(rss)-n:])
}
