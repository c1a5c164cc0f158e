package vcdiff

// kind is what an instruction does.
type kind uint8

const (
	noop   kind = iota
	add         // bytes of the data section
	run         // one byte of the data section, repeated
	copied      // from the source segment or the target so far
)

// instruction is half of an entry of the code table. Size 0 says that the size follows in
// the instruction section.
type instruction struct {
	kind kind
	size uint8
	mode uint8 // how the address of a copy is encoded
}

// The address caches of the standard code table.
const (
	nearSize = 4
	sameSize = 3
	modeSelf = 0
	modeHere = 1
	modeNear = 2
	modeSame = modeNear + nearSize
	modes    = modeSame + sameSize
)

// standard is the code table of RFC 3284, section 5.6; read only.
var standard = standardTable()

func standardTable() (t [256][2]instruction) {
	n := 0
	put := func(a, b instruction) {
		t[n] = [2]instruction{a, b}
		n++
	}
	put(instruction{kind: run}, instruction{})
	for size := range uint8(18) {
		put(instruction{kind: add, size: size}, instruction{})
	}
	for mode := range uint8(modes) {
		put(instruction{kind: copied, mode: mode}, instruction{})
		for size := uint8(4); size <= 18; size++ {
			put(instruction{kind: copied, size: size, mode: mode}, instruction{})
		}
	}
	for mode := range uint8(modes) {
		most := uint8(6)
		if mode >= modeSame {
			most = 4
		}
		for first := uint8(1); first <= 4; first++ {
			for second := uint8(4); second <= most; second++ {
				put(instruction{kind: add, size: first}, instruction{kind: copied, size: second, mode: mode})
			}
		}
	}
	for mode := range uint8(modes) {
		put(instruction{kind: copied, size: 4, mode: mode}, instruction{kind: add, size: 1})
	}
	return t
}

// addresses decodes the addresses of copies; a window has its own.
type addresses struct {
	in   []byte
	near [nearSize]uint64
	next int
	same [sameSize * 256]uint64
}

// take returns the next address, which lies before here.
func (a *addresses) take(mode uint8, here uint64) (at uint64, err error) {
	if mode >= modeSame {
		if len(a.in) == 0 {
			return 0, errShort
		}
		at = a.same[int(mode-modeSame)*256+int(a.in[0])]
		a.in = a.in[1:]
	} else {
		var v uint64
		if v, a.in, err = number(a.in); err != nil {
			return 0, err
		}
		switch mode {
		case modeSelf:
			at = v
		case modeHere:
			if v > here {
				return 0, corrupt("address is %d before position %d", v, here)
			}
			at = here - v
		default:
			at = a.near[mode-modeNear] + v
		}
	}
	if at >= here {
		return 0, corrupt("copy from %d, not before position %d", at, here)
	}
	a.near[a.next] = at
	a.next = (a.next + 1) % nearSize
	a.same[at%uint64(len(a.same))] = at
	return at, nil
}
