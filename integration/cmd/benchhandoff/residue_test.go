package main

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"cloudlet/integration/need"
)

// pages returns so many pages of random bytes.
func pages(n int) []byte {
	p := make([]byte, n*pageSize)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}

// TestChangedDisk: what differs counts, once it is not zeros.
func TestChangedDisk(t *testing.T) {
	need.Program(t, "zstd")
	old := pages(600) // more than a batch
	now := bytes.Clone(old)
	now[3*pageSize+17]++
	now[599*pageSize]++
	clear(now[5*pageSize:][:2*pageSize])
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "old"), old, 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "now"), now, 0o600))
	z, err := startZstd(t.Context())
	require.NoError(t, err)
	n, err := changedDisk(filepath.Join(dir, "now"), filepath.Join(dir, "old"), z)
	require.NoError(t, err)
	require.EqualValues(t, 2, n)
	var r residue
	require.NoError(t, z.end(&r))
	require.EqualValues(t, 2*pageSize, r.Plain)
	require.EqualValues(t, 2, r.Zero)
	require.InDelta(t, 2*pageSize, r.Zstd, 100, "random bytes stay as they are")
}

// TestChangedMemory takes this process for QEMU: pages of a private mapping that were written
// differently are found, and what was only read, or written as it was, is not.
func TestChangedMemory(t *testing.T) {
	need.Program(t, "zstd")
	dir := t.TempDir()
	old := pages(600)
	path := filepath.Join(dir, "memory")
	require.NoError(t, os.WriteFile(path, old, 0o600))
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	p, err := unix.Mmap(int(f.Fd()), 0, len(old), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	require.NoError(t, err)
	defer func() { require.NoError(t, unix.Munmap(p)) }()
	require.Equal(t, old[:64*pageSize], p[:64*pageSize]) // reads
	p[pageSize] = old[pageSize]
	for _, page := range []int{2, 3, 300, 599} {
		p[page*pageSize+5]++
	}
	clear(p[7*pageSize:][:pageSize])
	z, err := startZstd(t.Context())
	require.NoError(t, err)
	n, err := changedMemory(os.Getpid(), path, z)
	require.NoError(t, err)
	require.EqualValues(t, 4, n)
	var r residue
	require.NoError(t, z.end(&r))
	require.EqualValues(t, 4*pageSize, r.Plain)
	require.EqualValues(t, 1, r.Zero)
}
