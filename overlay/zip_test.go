package overlay

import (
	"archive/zip"
	"bytes"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"cloudlet/integration/need"
)

// TestArchive: what Create writes is a zip to libraries that we did not write.
func TestArchive(t *testing.T) {
	b, l := sample(t)
	z, err := zip.NewReader(bytes.NewReader(b), int64(len(b)))
	require.NoError(t, err)
	require.Empty(t, z.Comment)
	bodies := map[string][]byte{}
	for i, f := range z.File {
		require.Equal(t, memberNames[i], f.Name)
		require.Equal(t, zip.Store, f.Method)
		r, err := f.Open()
		require.NoError(t, err)
		body, err := io.ReadAll(r) // checks the CRC
		require.NoError(t, err)
		bodies[f.Name] = body
		off, err := f.DataOffset()
		require.NoError(t, err)
		if f.Name == "frames" {
			require.Zero(t, off%PageSize, "frames are aligned")
		}
		require.Equal(t, body, b[off:off+int64(len(body))])
	}
	require.Len(t, bodies, memberCount)
	m, err := parseManifest(bodies["manifest.json"])
	require.NoError(t, err)
	require.Equal(t, openBytes(t, b).Manifest(), m)
	require.Equal(t, m.Members.Frames.Size, int64(len(bodies["frames"])))
	require.NotNil(t, l.Parent)

	for _, program := range [][]string{{"unzip", "-tq"}, {"python3", "-m", "zipfile", "-t"}} {
		t.Run(program[0], func(t *testing.T) {
			need.Program(t, program[0])
			path := filepath.Join(t.TempDir(), "o.zip")
			require.NoError(t, os.WriteFile(path, b, 0o600))
			out, err := exec.CommandContext(t.Context(), program[0], append(program[1:], path)...).CombinedOutput()
			require.NoError(t, err, "%s", out)
		})
	}
}

// sparse is a file of mostly zeros, for archives larger than memory.
type sparse struct {
	size   int64
	pieces map[int64][]byte
}

func (s *sparse) ReadAt(p []byte, off int64) (int, error) {
	n := int(min(int64(len(p)), max(s.size-off, 0)))
	clear(p[:n])
	for at, b := range s.pieces {
		if from, to := max(at, off), min(at+int64(len(b)), off+int64(n)); from < to {
			copy(p[from-off:to-off], b[from-at:])
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// TestArchiveZip64: headers around and over 4 GiB, read by archive/zip and by our parser.
func TestArchiveZip64(t *testing.T) {
	for _, size := range []int64{zipMax32 - 1, zipMax32, zipMax32 + 1, 1<<32 - 1, 1 << 32, 5 << 30} {
		for _, big := range []int{memberFrames, memberState} {
			s := &sparse{pieces: map[int64][]byte{}}
			var members []zipMember
			var off int64
			for i, name := range memberNames {
				n, crc := int64(5), crc32.ChecksumIEEE(make([]byte, 5))
				if i == big {
					n, crc = size, 77
				}
				m, h := layoutMember(name, crc, n, off, i == memberFrames)
				parsed, err := parseLocal(h, i, off)
				require.NoError(t, err)
				require.Equal(t, m, parsed)
				s.pieces[off] = h
				members = append(members, m)
				off = m.data + m.size
			}
			dir := zipDirectory(members)
			s.pieces[off] = dir
			s.size = off + int64(len(dir))
			z, err := zip.NewReader(s, s.size)
			require.NoError(t, err)
			for i, f := range z.File {
				require.Equal(t, memberNames[i], f.Name)
				require.EqualValues(t, members[i].size, f.UncompressedSize64)
				data, err := f.DataOffset()
				require.NoError(t, err)
				require.Equal(t, members[i].data, data)
				require.Equal(t, i == memberFrames, data%PageSize == 0 && i == memberFrames)
			}
		}
	}
}
