package overlay

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Strategy says how pages become frames. It is data: it stands in the manifest, and readers
// need none of it. The zero value is not valid; see [ParseStrategy].
type Strategy struct {
	Name      string `json:"name"`
	Delta     Delta  `json:"delta"`
	Codec     Codec  `json:"codec"`
	Level     int    `json:"level"`      // zstd: 1 fastest, 2 default, 3 better, 4 best, or 10 to 22 by the program zstd; 0 for the others
	FrameSize int    `json:"frame_size"` // bytes of pages in a frame; a multiple of PageSize, at most MaxFramePages pages
	HotSize   int    `json:"hot_size"`   // the same for frames of pages in the touch profile
	Order     Order  `json:"order,omitzero"`
	// Stride puts pages that are arrays of records, of the same size, into frames of their own,
	// as differences from record to record. It is part of the order by similarity, and nothing
	// where pages are in another one.
	Stride  bool   `json:"stride,omitzero"`
	Encoder string `json:"encoder"` // libraries and programs that encoded, with versions; set by Create
}

// Order is how the pages outside of the touch profile are put into frames.
type Order uint8

// The orders.
const (
	OrderAddress Order = iota
	// OrderCold is OrderSimilar where there is a touch profile, which tells that these pages
	// are wanted late or never, and OrderAddress where there is none: whoever reads a page is
	// likely to read those beside it.
	OrderCold
	// OrderSimilar puts pages that resemble one another into the same frame, which makes them
	// smaller.
	OrderSimilar
)

var orderNames = []string{"address", "cold", "similar"}

// String returns "address", "cold" or "similar".
func (o Order) String() string { return nameOf(orderNames, uint8(o)) }

// MarshalText implements encoding.TextMarshaler.
func (o Order) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (o *Order) UnmarshalText(b []byte) (err error) {
	*o, err = named[Order](orderNames, "order", string(b))
	return err
}

// presets are the named strategies. Frame sizes: larger frames compress better, smaller
// ones cost less to decode on demand.
var presets = map[string]Strategy{
	"none":     {Delta: DeltaNone, Codec: CodecNone, FrameSize: 64 << 10, HotSize: 64 << 10},
	"fast":     {Delta: DeltaXOR, Codec: CodecZstd, Level: 1, FrameSize: 128 << 10, HotSize: 64 << 10},
	"balanced": {Delta: DeltaXOR, Codec: CodecZstd, Level: 2, FrameSize: 192 << 10, HotSize: 64 << 10, Order: OrderCold, Stride: true},
	// What the seeds of this field did: xdelta3, then LZMA.
	"elijah": {Delta: DeltaVCDIFF, Codec: CodecXZ, FrameSize: 1 << 20, HotSize: 64 << 10},
	// Larger frames are smaller, but a guest far away waits for more of what it does not want.
	"small": {Delta: DeltaXOR, Codec: CodecXZ, FrameSize: 1 << 20, HotSize: 64 << 10, Order: OrderSimilar, Stride: true},
}

// Strategies lists the names of the presets.
func Strategies() []string { return slices.Sorted(maps.Keys(presets)) }

// ParseStrategy parses a preset's name, optionally with changes: "balanced" or
// "balanced,codec=xz,frame=1M,hot=64K,delta=none,level=3,order=cold,stride=no". The empty string
// is "balanced". Orders are address, cold and similar, see [Order]; stride is yes or no. Deltas
// are none, xor, vcdiff and dict, codecs none, zstd and xz. Levels of zstd are 1 to 4, and 10 to
// 22, as those of its program. Who encodes needs the program xdelta3 for vcdiff, xz for xz and
// zstd for the high levels, see [Strategy.CheckPrograms].
func ParseStrategy(text string) (Strategy, error) {
	name, rest, changed := strings.Cut(text, ",")
	if name == "" {
		name = "balanced"
	}
	s, ok := presets[name]
	if !ok {
		return s, fmt.Errorf("unknown overlay strategy %q: the strategies are %s", name, strings.Join(Strategies(), ", "))
	}
	s.Name = name
	if !changed {
		return s, s.Validate()
	}
	s.Name = text
	for _, item := range strings.Split(rest, ",") {
		key, value, _ := strings.Cut(item, "=")
		if err := s.set(key, value); err != nil {
			return s, fmt.Errorf("overlay strategy %q: %w", text, err)
		}
	}
	if s.Codec != CodecZstd {
		s.Level = 0
	} else if s.Level == 0 {
		s.Level = presets["balanced"].Level
	}
	return s, s.Validate()
}

func (s *Strategy) set(key, value string) (err error) {
	switch key {
	case "delta":
		err = s.Delta.UnmarshalText([]byte(value))
	case "codec":
		s.Codec, err = named[Codec](codecNames, "codec", value)
	case "level":
		s.Level, err = strconv.Atoi(value)
	case "frame":
		s.FrameSize, err = parseSize(value)
	case "hot":
		s.HotSize, err = parseSize(value)
	case "order":
		s.Order, err = named[Order](orderNames, "order", value)
	case "stride":
		var yes uint8
		yes, err = named[uint8]([]string{"no", "yes"}, "stride", value)
		s.Stride = yes == 1
	default:
		return fmt.Errorf("unknown parameter %q: the parameters are delta, codec, level, frame, hot, order, stride", key)
	}
	return err
}

func parseSize(value string) (int, error) {
	unit := 1
	if v, ok := strings.CutSuffix(value, "K"); ok {
		value, unit = v, 1<<10
	} else if v, ok := strings.CutSuffix(value, "M"); ok {
		value, unit = v, 1<<20
	}
	n, err := strconv.Atoi(value)
	if err != nil || n < 0 || n > MaxFramePages*PageSize {
		return 0, fmt.Errorf("size %q: want a number of bytes, or of K or M, up to 4M", value)
	}
	return n * unit, nil
}

// Validate says which parameter is out of range.
func (s *Strategy) Validate() error {
	for _, f := range []struct {
		name string
		size int
	}{{"frame", s.FrameSize}, {"hot", s.HotSize}} {
		if f.size < PageSize || f.size > MaxFramePages*PageSize || f.size%PageSize != 0 {
			return fmt.Errorf("overlay strategy %q: %s size %d: want a multiple of %d from %d to %d",
				s.Name, f.name, f.size, PageSize, PageSize, MaxFramePages*PageSize)
		}
	}
	if s.Codec == CodecZstd && (s.Level < 1 || s.Level > 4) && !s.zstdProgram() || s.Codec != CodecZstd && s.Level != 0 {
		return fmt.Errorf("overlay strategy %q: level %d: codec zstd takes 1 to 4, and %d to %d by its program, the others 0", s.Name, s.Level, leastProgramLevel, maxProgramLevel)
	}
	if int(s.Codec) >= len(codecNames) || int(s.Delta) >= strategyDeltas || int(s.Order) >= len(orderNames) || len(s.Name) > 200 {
		return fmt.Errorf("overlay strategy %.80q: unknown codec %d, delta %d or order %d", s.Name, s.Codec, s.Delta, s.Order)
	}
	if s.Delta == DeltaDict && s.Codec != CodecZstd {
		return fmt.Errorf("overlay strategy %q: delta dict needs codec zstd, not %s", s.Name, s.Codec)
	}
	if s.Delta == DeltaDict && s.zstdProgram() {
		return fmt.Errorf("overlay strategy %q: delta dict needs a level of 1 to 4, not %d", s.Name, s.Level)
	}
	return nil
}

// Levels of the zstd program: those that compress more than the library's 4.
const (
	leastProgramLevel = 10
	maxProgramLevel   = 22
)

// zstdProgram reports whether the program zstd encodes: slowly, what decodes nearly as
// fast as what the library encodes.
func (s *Strategy) zstdProgram() bool {
	return s.Codec == CodecZstd && s.Level >= leastProgramLevel && s.Level <= maxProgramLevel
}

// named finds value among names and returns its number.
func named[T ~uint8](names []string, what, value string) (T, error) {
	i := slices.Index(names, value)
	if i < 0 {
		return 0, fmt.Errorf("unknown %s %q: there are %s", what, value, strings.Join(names, ", "))
	}
	return T(i), nil
}
