// Package overlay holds base VMs and the compressed differences between them and the VMs
// launched from them.
//
// A base is a folder: the disk, memory and device state of a booted guest with a SHA-256
// of every page ([Base]). An overlay is one file: what a launch VM holds that its parent,
// a base or another overlay, does not ([Create], [Open]). A base and a chain of overlays
// merge into a launch image ([Image]), whose pages are decoded when they are asked for.
// Bases and overlays are immutable. Readers, images and bases are safe for concurrent use;
// the buffers handed to them are not retained.
//
// An overlay may be far away. Its frames are then fetched when a page of theirs is read, or
// before that, in the order of a touch profile ([Image.Fetch]), and kept encoded in a file
// ([OpenOptions]). What a guest waits for goes ahead: all else has half of the link at most
// meanwhile, nothing is fetched twice at the same time, and what is under way is bounded by the
// measured rate of the link. [Image.Prefetch] decodes what has come and hands it on, in the same order.
// Nothing in that file is believed: every frame is hashed when it is read back, so a crash, a
// full disk or a stranger's hand in it costs a fetch, never a wrong byte. Decoded pages may be
// kept too ([ImageOptions]), in a file that nobody else can reach. Readers wait through an
// outage with a [Hold].
//
// The package refuses, with an error that names the thing: unknown versions, kinds and
// codecs, counts over their caps, bytes left over, overlays of another parent, and any
// byte whose hash is wrong. It never panics on bytes from outside.
//
// # Base, version 1 (normative)
//
// A base is a folder, and to travel a zip (stored or deflated) of the same members except
// the derived ones:
//
//	manifest.json                 see BaseManifest: sizes, hashes, machine configuration
//	disk, memory                  raw images; pages of zeros are holes in the folder
//	disk.sha256, memory.sha256    hash lists: 32 bytes of SHA-256 for each 4096-byte page
//	state                         device state; without it the base cannot be resumed
//	kernel, initrd                where the guest was booted from them
//	disk.sums, memory.sums        derived: SHA-256 of each 16 KiB block of a hash list
//	fingerprints                  derived: the pages' hashes, sorted, to find equal pages
//
// The id of a base is the SHA-256 of manifest.json, whose spelling is canonical: one line of
// compact JSON with the fields in the order of BaseManifest. It holds for each image the
// SHA-256 of its hash list, and the hash root: the SHA-256 of the concatenated SHA-256 hashes
// of the list's 16 KiB blocks, so that a part of a list can be believed without reading all.
//
// # Overlay format, version 1 (normative)
//
// Words: a page is 4096 bytes of disk or memory. A page address is a uint32: bit 31 is 0
// for memory and 1 for disk, bits 0 to 30 are the page number. A frame is a group of 1 to
// 1024 pages encoded together. All integers are little endian. Hashes are SHA-256.
//
// An overlay is a zip archive of five stored (method 0) members in this order, so that a
// prefix of the file is enough to resume from, and unzip, jq and any zip library can take
// it apart:
//
//	+---------------+-------+-------+---------+---------------------+-----------+
//	| manifest.json | index | state | profile | frame 0 | frame 1.. | directory |
//	+---------------+-------+-------+---------+---------------------+-----------+
//	  what it is      where   device  order     member "frames",      zip central
//	  (this first)    pages   state   of first  data begins at a      directory
//	                  are     (zstd)  touches   multiple of 4096
//
// Each member has the 30-byte local header of the zip specification (APPNOTE 4.3.7) with:
// version needed 20 (45 where a size is 0xFFFFFFFE or more), flags 0, method 0, time 0,
// date 0x0021 (1 January 1980), CRC-32, sizes, and no data descriptor. A member too large
// for 32 bits has the zip64 extra field (id 1, 16 bytes: both sizes) first in its extra
// data. "frames" has one more extra field, id 0x4C43, whose zero bytes bring its data to a
// multiple of 4096. The central directory repeats the same values (made by version 45 on
// Unix, mode 0644) and ends the file: with the zip64 records where a value needs them, and
// no comment. These bytes follow wholly from the members, so a reader compares rather than
// parses them: any other byte is an error.
//
// # manifest.json
//
// JSON as [Manifest] marshals it with an indent of one space and a final newline; any other
// spelling of the same value is refused. At most 1 MiB. Its SHA-256 is the overlay's
// digest: it covers every member, through the hashes below, and so names this encoding.
//
//	format, version    "cloudlet-overlay", 1
//	id                 content identity, see below
//	parent, base       id of the parent (a base or an overlay) and of the base under all
//	depth              1 on a base, parent's depth + 1 otherwise; at most 8
//	memory_size,       bytes, multiples of 4096, equal to the base's
//	disk_size
//	machine            machine configuration, opaque here, JSON of at most 64 KiB when it is
//	                   compact and <, >, &, U+2028 and U+2029 are \u escapes; at most 16
//	                   arrays or objects within one another
//	strategy           how the frames were encoded, see [Strategy]; encoder and version
//	members            per member: size as stored, SHA-256 as stored and, for index, state
//	                   and profile, the decoded size; "frames" has a size only, its bytes
//	                   are covered by the hashes of the frames
//	state_sha256       SHA-256 of the decoded device state; absent without a state
//	stats              pages by class, for people
//
// # index
//
// One zstd frame (empty is not allowed) of this table, at most 256 MiB decoded:
//
//	offset       size   field
//	0            8      magic "CLOVIDX1"
//	8            4      F, number of frames
//	12           4      S, number of stored pages: pages inside frames
//	16           4      R, number of references
//	20           4      0
//	24           32*F   frames: SHA-256 of the encoded bytes
//	24+32F       4*F    frames: encoded size in bytes
//	24+36F       2*F    frames: number of pages, 1 to 1024
//	24+38F       1*F    frames: codec: 0 none, 1 zstd, 2 xz
//	24+39F       1*F    frames: delta: 0 plain, 1 XOR, 2 VCDIFF, 3 dictionary,
//	                    4 stride
//	24+40F       4*S    addresses of the stored pages, frame by frame
//	24+40F+4S    4*R    references: addresses, strictly ascending
//	24+40F+4S+4R 4*R    references: targets
//	24+40F+4S+8R 1*R    references: kind
//
// The three columns of addresses are delta coded: each value is the difference to the one
// before it, modulo 2^32, the first to 0. Frames lie in "frames" without gaps in the order
// of the table. The pages of a frame are the concatenated 4096-byte pages, in the order of
// their addresses' column. An encoded frame is never larger than its pages. An address
// stands at most once in the whole index; an address that does not stand there is a page
// equal to the parent's. Kinds of reference:
//
//	0  zero    the page is all zero; target 0
//	1  base    equal to the base's page at target, in memory or disk, at any offset
//	2  parent  equal to the parent image's page at target; only where the parent is an overlay
//	3  self    equal to the page at target, which is a stored page of this overlay
//
// # Frames
//
// The base pages of a frame are the base's pages of the frame's addresses, in the same order,
// concatenated. Deltas relate the frame's pages to them:
//
//	0  plain       the codec encodes the pages
//	1  XOR         the codec encodes the pages XOR the base pages
//	2  VCDIFF      4 bytes: D, 1 to the size of the pages; then the codec encodes D bytes: an
//	               RFC 3284 delta whose source are the base pages and whose target the pages,
//	               with the standard code table and no secondary compression
//	3  dictionary  the codec is zstd; the frame's history begins with the base pages (a raw
//	               content dictionary, without an id)
//	4  stride      2 bytes: N, 4 to 4092, a multiple of 4; then the codec encodes the pages,
//	               in which each 32-bit word from byte N on is less the word N bytes before
//	               it, modulo 2^32 (across the ends of pages); the codec is not none
//
// A delta refers to base pages only, or to none, and self targets are stored pages, so a page
// costs one frame at most, whatever the depth of the chain. Deltas 2 to 4 came after 0 and 1:
// readers from before refuse them, in the manifest's strategy, by name.
//
// Codec none is the bytes as they are. A zstd frame is RFC 8878, with a content size and a
// window of at most what it decodes to (rounded up to the format's steps). An xz frame is one .xz stream of one block with the
// LZMA2 filter alone and a dictionary of at most 4 MiB.
//
// # state and profile
//
// state is the device state as QEMU's migration stream, as one zstd frame, at most 64 MiB
// decoded; a member of size 0 means that there is none and the overlay cannot be resumed.
// profile is one zstd frame of page addresses (uint32, not delta coded) in the order of
// their first touch, each at most once, 16 MiB decoded at most; size 0 means none.
//
// # Identity
//
// The id is the SHA-256 of the concatenation of
//
//	"cloudlet-overlay-1\n"
//	parent id                        32 bytes
//	SHA-256 of machine, compact      32 bytes
//	SHA-256 of the decoded state     32 bytes, zero without a state
//	memory size, disk size           2 * 8 bytes
//	for each page in the index, by ascending address (those that differ from the parent's;
//	those of a handoff's round may be equal, see CreateOptions.Quick):
//	    address (4 bytes), SHA-256 of the page (32 bytes)
//
// so it does not depend on frames, codecs, order or profile: an overlay that is packed again
// keeps its id and gets another digest.
//
// # What Create does, not normative
//
// Pages equal to one that is there already become references, by their hashes. Of the others
// those of the profile are put into frames in its order; the rest by address, or where the
// strategy says so by similarity (see [Order]), with a delta to the base only for pages that
// resemble its page at the same address, and with a stride for pages of records of one size. A
// reader needs to know none of it.
package overlay
