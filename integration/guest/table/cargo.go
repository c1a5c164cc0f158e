package table

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"strings"
)

// BlockSize is what one step of churn rewrites.
const BlockSize = 4096

// Cargo is data of a guest's application, some of which it rewrites at random: blocks, half of
// them random bytes, half of them text. Seed and size say what it is, and the number of
// steps since says what has become of it.
type Cargo struct {
	Seed string
	MiB  int
	key  uint64
}

// NewCargo returns the cargo of mib MiB for seed.
func NewCargo(seed string, mib int) Cargo {
	sum := sha256.Sum256([]byte("cargo/" + seed))
	return Cargo{Seed: seed, MiB: mib, key: binary.LittleEndian.Uint64(sum[:])}
}

// Size returns its bytes.
func (c Cargo) Size() int { return c.MiB << 20 }

// Fill makes p, of Size bytes, the cargo as it is before the first step.
func (c Cargo) Fill(p []byte) {
	for b := 0; b*BlockSize < len(p); b++ {
		c.block(p[b*BlockSize:][:BlockSize], int64(b), 0)
	}
}

// Step makes the change of a step, the first of which is 1, in p.
func (c Cargo) Step(p []byte, step int64) {
	b := c.at(step)
	c.block(p[b*BlockSize:][:BlockSize], b, step)
}

// at returns the block that a step rewrites.
func (c Cargo) at(step int64) int64 {
	return int64(mix(c.key+gamma*uint64(step)) % uint64(c.Size()/BlockSize))
}

// block makes p block b as a step has left it, 0 for as it was filled.
func (c Cargo) block(p []byte, b, step int64) {
	state := mix(c.key ^ mix(uint64(b)<<1|1) ^ mix(uint64(step)<<1))
	if b/textRun%2 == 0 {
		stream(p, state)
		return
	}
	for len(p) > 0 {
		state += gamma
		for z := mix(state); z != 0 && len(p) > 0; z >>= 8 {
			p = p[copy(p, words[z%uint64(len(words))]):]
		}
	}
}

// textRun is how many blocks in a row are of one kind.
const textRun = 4

// words are what text is made of.
var words = strings.SplitAfter("the of and to in a is that for it as was with be by on not he his but at are this have from "+
	"which or had they you were there been one all her she would their will when who him more if no out so said what up "+
	"its about into than them can only other new some could time these two may then do first any my now such like our "+
	"over man me even most made after also did many before must through back years where much your way well down should "+
	"because each just those people how too little state good very make world still own see men work long get here between ", " ")

// Sum returns the checksum of the cargo after so many steps.
func (c Cargo) Sum(steps int64) string {
	p := make([]byte, c.Size())
	c.Fill(p)
	for step := int64(1); step <= steps; step++ {
		c.Step(p, step)
	}
	return WordSum(p)
}

// WordSum returns a checksum of p, whose length is a multiple of 8, that costs an emulated CPU
// little. It notices what a faulty copy does, not what somebody does on purpose.
func WordSum(p []byte) string {
	h := uint64(len(p))
	for len(p) >= 8 {
		h = (h ^ binary.LittleEndian.Uint64(p)) * gamma
		h ^= h >> 29
		p = p[8:]
	}
	return fmt.Sprintf("%016x", mix(h))
}
