package appguest

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
)

// The values were computed by Python's hashlib, which the application uses.
const (
	goldenWindow = "1b8bfef4f1490797e6eb588b8ba931c71738095b5bfc9ffa13b684017c382d28"
	goldenTable  = "a4b6b96c43913497f22af4043d437f46b036700ac717716d44d4c44d911f553f"
	goldenFile   = "9c877295686943825e9a8b0c1f1adc64cf11f682e96f90820cd223912648879c"
	goldenKeys   = "706e0af863291b3542ab02f369fb9ab6d8d940ca0e50af83d2e6b7d41c661579"
)

func TestHashes(t *testing.T) {
	require.Equal(t, goldenWindow, WindowHash("t0", 3))
	require.Equal(t, goldenTable, TableHash("t0"))
	require.Equal(t, goldenFile, FileHash("t0"))
	require.Equal(t, goldenKeys, KeysHash())
}

func TestAnswerCheck(t *testing.T) {
	good := Answer{Token: "t0", Counter: 1, Window: 3, SHA256: goldenWindow}
	require.NoError(t, good.Check("t0", 3))
	require.NoError(t, good.Check("", 3))
	require.ErrorContains(t, good.Check("t1", 3), "another launch")
	require.ErrorContains(t, good.Check("t0", 4), "asked for 4")
	bad := good
	bad.Token = "t1"
	require.ErrorContains(t, bad.Check("", 3), "has the hash")
	require.Error(t, Answer{}.Check("", 0))
}

func TestVerificationCheck(t *testing.T) {
	good := Verification{Token: "t0", Table: goldenTable, Keys: goldenKeys, File: goldenFile}
	require.NoError(t, good.Check("t0"))
	require.ErrorContains(t, good.Check("t1"), "another launch")
	for name, spoil := range map[string]func(*Verification){
		"table": func(v *Verification) { v.Table = goldenFile },
		"keys":  func(v *Verification) { v.Keys = "" },
		"file":  func(v *Verification) { v.File = goldenTable },
	} {
		t.Run(name, func(t *testing.T) {
			bad := good
			spoil(&bad)
			require.ErrorContains(t, bad.Check("t0"), name+" has the hash")
		})
	}
}

func TestWriteItems(t *testing.T) {
	var b bytes.Buffer
	require.NoError(t, writeItems(&b))
	require.Equal(t, Keys, bytes.Count(b.Bytes(), []byte("SET\r\n")))
	require.True(t, bytes.HasPrefix(b.Bytes(), []byte("*3\r\n$3\r\nSET\r\n$10\r\nitem:00000\r\n$200\r\n")))
}
