package handoff

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// MaxRecord is the size of the largest record of a FileJournal, in bytes.
const MaxRecord = 128 << 10

const (
	journalMagic = "cloudlet handoff 1\n"
	slotHead     = 32 + len(journalMagic) + 8 + 8 // SHA-256 of what follows, magic, sequence, length
	slotSize     = MaxRecord + 4096
)

// FileJournal keeps a record in a file of two slots, written in turn, whose blocks are all
// allocated before the first record counts. So a disk that fills up during a handoff fails
// nothing but its beginning, on file systems that write in place. A slot is the SHA-256 of
// what follows, a magic line, the sequence number and the length of the record (8 bytes each,
// little-endian), the record. The valid slot with the higher number counts. One process uses
// the file at a time; its methods are not safe for concurrent use.
type FileJournal struct {
	// Path is the file; its folder must exist. Removing the file forgets the record.
	Path string
}

// Load returns the record; fs.ErrNotExist if there is none.
func (j FileJournal) Load(context.Context) ([]byte, error) {
	f, err := os.Open(j.Path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	record, _, err := newest(f)
	return record, err
}

// Store replaces the record.
func (j FileJournal) Store(_ context.Context, record []byte) (err error) {
	if len(record) > MaxRecord {
		return fmt.Errorf("write %s: the record has %d bytes, the limit is %d", j.Path, len(record), MaxRecord)
	}
	f, err := os.OpenFile(j.Path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return j.create(record)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, seq, err := newest(f)
	if err != nil {
		return err
	}
	if err := writeSlot(f, seq+1, record); err != nil {
		return err
	}
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", j.Path, err)
	}
	return nil
}

// create makes the file with all its blocks and the first record.
func (j FileJournal) create(record []byte) (err error) {
	dir := filepath.Dir(j.Path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(j.Path)+"-*")
	if err != nil {
		return err
	}
	renamed := false
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil && !renamed {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	// Zeros are written, not only reserved: what is reserved may need blocks once more when it
	// is written.
	if _, err := f.Write(make([]byte, 2*slotSize)); err != nil {
		return err
	}
	if err := writeSlot(f, 1, record); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", f.Name(), err)
	}
	if err := os.Rename(f.Name(), j.Path); err != nil {
		return err
	}
	renamed = true
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func writeSlot(f *os.File, seq uint64, record []byte) error {
	data := make([]byte, 32, slotHead+len(record))
	data = append(data, journalMagic...)
	data = binary.LittleEndian.AppendUint64(data, seq)
	data = binary.LittleEndian.AppendUint64(data, uint64(len(record)))
	data = append(data, record...)
	sum := sha256.Sum256(data[32:])
	copy(data, sum[:])
	if _, err := f.WriteAt(data, int64(seq%2)*slotSize); err != nil {
		return fmt.Errorf("write handoff record: %w", err)
	}
	return nil
}

// newest returns the record that counts and its number.
func newest(f *os.File) (record []byte, seq uint64, err error) {
	for slot := range int64(2) {
		data := make([]byte, slotSize)
		if _, err := f.ReadAt(data, slot*slotSize); err != nil {
			return nil, 0, fmt.Errorf("read %s: it is cut short: %w", f.Name(), err)
		}
		body := data[32:]
		if string(body[:len(journalMagic)]) != journalMagic {
			continue
		}
		numbers := body[len(journalMagic):]
		number, n := binary.LittleEndian.Uint64(numbers), binary.LittleEndian.Uint64(numbers[8:])
		if n > MaxRecord || number <= seq {
			continue
		}
		sum := sha256.Sum256(data[32 : uint64(slotHead)+n])
		if slices.Equal(sum[:], data[:32]) {
			record, seq = data[slotHead:uint64(slotHead)+n], number
		}
	}
	if seq == 0 {
		return nil, 0, fmt.Errorf("read %s: no record in it is whole", f.Name())
	}
	return record, seq, nil
}
