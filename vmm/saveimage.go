package vmm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"slices"
)

// An image of libvirt's save, little-endian:
//
//	magic "LibvirtQemudSave", u32 version 2, u32 n, u32 whether the VM ran, u32 compression (0:
//	none), u32 offset of the cookie (0: none), 14 times u32 0
//	n bytes of the domain's XML with a zero at the end
//	QEMU's stream
const (
	saveMagic   = "LibvirtQemudSave"
	saveVersion = 2
	saveWords   = 19
)

// saveImage writes an image from which libvirt restores a domain with a device state. Its
// stream holds no page of the guest's memory, which is where the XML says.
func saveImage(w io.Writer, xml string, state []byte) error {
	var words [saveWords]uint32
	words[0], words[1] = saveVersion, uint32(len(xml)+1)
	var head bytes.Buffer
	head.WriteString(saveMagic)
	_ = binary.Write(&head, binary.LittleEndian, words) // a buffer takes everything
	head.WriteString(xml)
	head.WriteByte(0)
	if _, err := w.Write(head.Bytes()); err != nil {
		return err
	}
	return plainState(w, state)
}

// cut is a range of a device state, from its first byte to the one after its last.
type cut struct{ from, to int64 }

// plainState writes a device state that was saved without shared memory in the form that a
// QEMU loads which was not told of shared memory, as libvirt's are not: without the
// capability and the addresses of the blocks of memory. That there are no pages of the main
// block is nothing that QEMU notices.
func plainState(w io.Writer, state []byte) error {
	s := newStream(bytes.NewReader(state))
	s.prefix()
	if s.err != nil {
		return fmt.Errorf("read device state: %w: capture it again", s.err)
	}
	if i := slices.IndexFunc(s.capable, func(name string) bool { return name != capIgnoreShared }); i >= 0 {
		return fmt.Errorf("read device state: %w: it needs the capability %.80q of QEMU", errState, s.capable[i])
	}
	var at int64
	for _, c := range append(s.cuts, cut{int64(len(state)), 0}) {
		if _, err := w.Write(state[at:c.from]); err != nil {
			return err
		}
		at = c.to
	}
	return nil
}
