package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"
)

const (
	busyLook = 2 * time.Second
	busyMost = 0.15 // of all processors, above which the figures say more of the others
)

// busy returns which share of the host's processors other work takes.
func busy(ctx context.Context) (float64, error) {
	idle, all, err := processorTime()
	if err != nil || !pause(ctx, busyLook) {
		return 0, err
	}
	idleLater, allLater, err := processorTime()
	if err != nil || allLater == all {
		return 0, err
	}
	return 1 - float64(idleLater-idle)/float64(allLater-all), nil
}

// processorTime returns the time that the processors were idle, and all of it, in ticks.
func processorTime() (idle, all int64, err error) {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0, err
	}
	first, _, _ := strings.Cut(string(b), "\n")
	var t [8]int64 // user, nice, system, idle, iowait, irq, softirq, steal
	if _, err := fmt.Sscanf(first, "cpu %d %d %d %d %d %d %d %d", &t[0], &t[1], &t[2], &t[3], &t[4], &t[5], &t[6], &t[7]); err != nil {
		return 0, 0, fmt.Errorf("read /proc/stat: %w", err)
	}
	for _, n := range t {
		all += n
	}
	return t[3] + t[4], all, nil
}
