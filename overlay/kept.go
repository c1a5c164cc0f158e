package overlay

import (
	"os"
	"sync"
	"sync/atomic"
)

// keptPages holds decoded pages in a file that only this process can reach, a slot for each
// frame. What was verified once is read back without a hash.
type keptPages struct {
	file  *os.File
	first []int           // per overlay of the chain: its first stored page in the file
	has   [][]atomic.Bool // per overlay and frame
	count atomic.Int64
	off   atomic.Bool // a write has failed: what is there stays in use

	writes  sync.WaitGroup
	pending atomic.Int64 // bytes that wait to be written
}

// keptPending bounds the decoded bytes that wait for a slow disk: what is over is not kept.
const keptPending = 8 << 20

func newKeptPages(f *os.File, chain []*Reader) *keptPages {
	k := &keptPages{file: f}
	n := 0
	for _, r := range chain {
		k.first = append(k.first, n)
		k.has = append(k.has, make([]atomic.Bool, len(r.index.frames)))
		n += len(r.index.stored)
	}
	return k
}

// keep writes the pages of a frame, which must not change, while their reader goes on; first
// is the number of the frame's first stored page.
func (k *keptPages) keep(key frameKey, first int, pages []byte) {
	has, n := &k.has[key.level][key.frame], int64(len(pages))
	if k.off.Load() || has.Load() {
		return
	}
	if k.pending.Add(n) > keptPending {
		k.pending.Add(-n)
		return
	}
	k.writes.Go(func() {
		defer k.pending.Add(-n)
		if _, err := k.file.WriteAt(pages, int64(k.first[key.level]+first)*PageSize); err != nil {
			k.off.Store(true)
		} else if !has.Swap(true) {
			k.count.Add(1)
		}
	})
}

// holds reports whether the pages of a frame can be read.
func (k *keptPages) holds(key frameKey) bool { return k.has[key.level][key.frame].Load() }

// read fills dst with stored page number entry of an overlay, where its frame is kept.
func (k *keptPages) read(key frameKey, dst []byte, entry int) bool {
	has := &k.has[key.level][key.frame]
	if !has.Load() {
		return false
	}
	if _, err := k.file.ReadAt(dst, int64(k.first[key.level]+entry)*PageSize); err != nil {
		if has.Swap(false) {
			k.count.Add(-1)
		}
		return false
	}
	return true
}
