package crypto

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
)

var (
	archiveTestKey   = NewArchiveKey(bytes.Repeat([]byte{7}, sealKeyLength))
	archiveOtherKey  = NewArchiveKey(bytes.Repeat([]byte{8}, sealKeyLength))
	archiveRecords   = []string{"the first of the records", "", strings.Repeat("long ", 1000), "the last of the records"}
	archivePassText  = "correct horse battery staple"
	archiveOtherPass = "correct horse battery stapler"
)

func archiveOf(t *testing.T, key ArchiveKey, records ...string) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := NewArchiveWriter(&out, key)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if err := w.Write([]byte(r)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func readArchive(data []byte, keys ...ArchiveKey) (records []string, err error) {
	r, err := NewArchiveReader(bytes.NewReader(data), keys...)
	if err != nil {
		return nil, err
	}
	for {
		record, err := r.Next()
		if errors.Is(err, io.EOF) {
			return records, nil
		}
		if err != nil {
			return records, err
		}
		records = append(records, string(record))
	}
}

func TestArchive(t *testing.T) {
	t.Parallel()
	pass, err := ParseArchiveKey(archivePassText)
	if err != nil {
		t.Fatal(err)
	}
	otherPass, err := ParseArchiveKey(archiveOtherPass)
	if err != nil {
		t.Fatal(err)
	}
	byKey, byPass := archiveOf(t, archiveTestKey, archiveRecords...), archiveOf(t, pass, archiveRecords...)
	for _, tt := range []struct {
		name string
		data []byte
		keys []ArchiveKey
		want error
	}{
		{"key", byKey, []ArchiveKey{archiveTestKey}, nil},
		{"one of several", byKey, []ArchiveKey{pass, archiveOtherKey, archiveTestKey}, nil},
		{"another key", byKey, []ArchiveKey{archiveOtherKey}, ErrArchiveKey},
		{"a passphrase in the place of a key", byKey, []ArchiveKey{pass}, ErrArchiveKey},
		{"no key", byKey, nil, ErrArchiveKey},
		{"passphrase", byPass, []ArchiveKey{pass}, nil},
		{"another passphrase", byPass, []ArchiveKey{otherPass}, ErrArchiveKey},
		{"a key in the place of a passphrase", byPass, []ArchiveKey{archiveTestKey}, ErrArchivePassphrase},
		{"empty archive", archiveOf(t, archiveTestKey), []ArchiveKey{archiveTestKey}, nil},
		{"nothing", nil, []ArchiveKey{archiveTestKey}, ErrNoArchive},
		{"something else", []byte("platform,appid,refresh_token\n"), []ArchiveKey{archiveTestKey}, ErrNoArchive},
	} {
		records, err := readArchive(tt.data, tt.keys...)
		if !errors.Is(err, tt.want) || tt.want == nil && err != nil {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
		if err == nil && tt.name != "empty archive" && fmt.Sprint(records) != fmt.Sprint(archiveRecords) {
			t.Errorf("%s: %d records", tt.name, len(records))
		}
	}
	for _, secret := range []string{"the first", "long long", "the last", archivePassText} { // none so short that random bytes hold it
		if bytes.Contains(byPass, []byte(secret)) {
			t.Errorf("%q is in the clear", secret)
		}
	}
	if text := fmt.Sprintf("%v %+v %#v %s %x", pass, pass, pass, pass, pass); strings.Contains(text, "horse") || strings.Contains(text, fmt.Sprintf("%x", "horse")) {
		t.Errorf("a key prints as %s", text)
	}
}

// TestArchiveFormat: an archive outlives the program that wrote it. Those here were made by another program, from the format as
// archive.go tells it: a writer and a reader that change in the same way would still read each other.
func TestArchiveFormat(t *testing.T) {
	t.Parallel()
	pass, err := ParseArchiveKey(archivePassText)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name       string
		kind       byte
		iterations uint32
		rest       string // the HMAC and the frames, in base64
		key        ArchiveKey
	}{
		{
			"key", 1, 0, "v1ssqJsJuRSiC1sFjcH5ox4rn8jIv0wdRS0PHzNOdUcAAAADOF4GSPXbwtSUCcRFIywokhU2PQAAAAMdRJ3E4Ui9kfxCL1azLxCY6BqdgAAAANd4QaAQchuHj+mLqhnz994=",
			archiveTestKey,
		},
		{
			"passphrase", 2, 1_000_000, "QmU+v/lkG/eUENmWNTH/aRuSFGOlMTZxzZbt1/vppK8AAAAD/XGuKHALdaFGU8ZYxRHvncXyTQAAAANFVlIK+0a89O/mka7KpCuTtcZhgAAAAGmVkrWj7xcGS71V7jaO4fY=",
			pass,
		},
	} {
		data := append([]byte("caddy-wechat archive\n"), 1, tt.kind)
		for i := range byte(32) {
			data = append(data, i) // the salt
		}
		data = binary.BigEndian.AppendUint32(data, tt.iterations)
		rest, err := base64.StdEncoding.DecodeString(tt.rest)
		if err != nil {
			t.Fatal(err)
		}
		if records, err := readArchive(append(data, rest...), tt.key); err != nil || fmt.Sprint(records) != "[one two]" {
			t.Errorf("%s: %q, %v", tt.name, records, err)
		}
		w := archiveOf(t, tt.key)
		if !bytes.Equal(w[:23], data[:23]) || !bytes.Equal(w[55:59], data[55:59]) {
			t.Errorf("%s: written with the header %x", tt.name, w[:59])
		}
	}
}

// TestArchiveAltered: each single byte, each length, each order of frames.
func TestArchiveAltered(t *testing.T) {
	t.Parallel()
	data := archiveOf(t, archiveTestKey, "one", "two", "three")
	for i := range data {
		altered := bytes.Clone(data)
		altered[i] ^= 1
		records, err := readArchive(altered, archiveTestKey)
		if err == nil {
			t.Errorf("byte %d altered: %d records and no error", i, len(records))
		}
	}
	for n := range data {
		records, err := readArchive(data[:n], archiveTestKey)
		if n > 0 && !errors.Is(err, ErrArchiveCut) || n == 0 && !errors.Is(err, ErrNoArchive) {
			t.Errorf("cut to %d bytes: %d records, %v", n, len(records), err)
		}
	}
	head := archiveHeader + 32
	frame := func(data []byte, i int) []byte { // of three letters each in what follows
		const size = archiveLength + 3 + 16
		return data[head+i*size : head+(i+1)*size]
	}
	a, b := archiveOf(t, archiveTestKey, "aaa", "bbb", "ccc"), archiveOf(t, archiveTestKey, "xxx", "yyy", "zzz")
	end := a[head+3*(archiveLength+3+16):]
	for name, frames := range map[string][][]byte{
		"swapped":        {frame(a, 1), frame(a, 0), frame(a, 2), end},
		"left out":       {frame(a, 0), frame(a, 2), end},
		"twice":          {frame(a, 0), frame(a, 0), frame(a, 1), frame(a, 2), end},
		"spliced":        {frame(a, 0), frame(b, 1), frame(a, 2), end},
		"ended early":    {frame(a, 0), end},
		"more behind":    {frame(a, 0), frame(a, 1), frame(a, 2), end, frame(a, 0)},
		"ended twice":    {frame(a, 0), frame(a, 1), frame(a, 2), end, end},
		"another's head": nil,
	} {
		forged := append(bytes.Clone(a[:head]), bytes.Join(frames, nil)...)
		if frames == nil {
			forged = append(bytes.Clone(b[:head]), a[head:]...)
		}
		if records, err := readArchive(forged, archiveTestKey); !errors.Is(err, ErrArchiveAltered) {
			t.Errorf("%s: %q, %v", name, records, err)
		}
	}
	newer := bytes.Clone(data)
	newer[len(archiveMagic)] = 2
	for _, n := range []int{len(newer), len(archiveMagic) + 1} {
		if _, err := readArchive(newer[:n], archiveTestKey); !errors.Is(err, ErrArchiveVersion) {
			t.Errorf("%d bytes of a newer version: %v", n, err)
		}
	}
	other := bytes.Clone(data)
	other[len(archiveMagic)-1] = '\r'
	for _, n := range []int{len(other), len(archiveMagic)} {
		if _, err := readArchive(other[:n], archiveTestKey); !errors.Is(err, ErrNoArchive) {
			t.Errorf("%d bytes that begin almost like an archive: %v", n, err)
		}
	}
	// What costs time or memory is bounded before anything is authenticated.
	slow := bytes.Clone(data)
	binary.BigEndian.PutUint32(slow[archiveHeader-4:], maxPassphraseIterations+1)
	if _, err := readArchive(slow, archiveTestKey); !errors.Is(err, ErrArchiveAltered) {
		t.Errorf("more iterations than any archive has: %v", err)
	}
	large := bytes.Clone(data)
	binary.BigEndian.PutUint32(large[head:], MaxArchiveRecord+1)
	if _, err := readArchive(large, archiveTestKey); !errors.Is(err, ErrArchiveAltered) {
		t.Errorf("a longer record than any archive has: %v", err)
	}
}

func TestParseArchiveKey(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{
		strings.Repeat("ab", 32): true, archivePassText: true, "": false, "short": false, strings.Repeat("x", minPassphrase): true,
	} {
		if _, err := ParseArchiveKey(text); (err == nil) != want {
			t.Errorf("%d characters: %v", len(text), err)
		} else if err != nil && text != "" && strings.Contains(err.Error(), text) {
			t.Errorf("the error shows the key: %v", err)
		}
	}
	// What is a key is none to be stretched: it opens what the same 32 bytes have sealed.
	key, err := ParseArchiveKey(strings.Repeat("07", sealKeyLength))
	if err != nil {
		t.Fatal(err)
	}
	if records, err := readArchive(archiveOf(t, archiveTestKey, "one"), key); err != nil || len(records) != 1 {
		t.Errorf("%q, %v", records, err)
	}
}

func TestArchiveRecordsAreBounded(t *testing.T) {
	t.Parallel()
	w, err := NewArchiveWriter(io.Discard, archiveTestKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Write(make([]byte, MaxArchiveRecord+1)); err == nil {
		t.Error("a record without bounds")
	}
	records, err := readArchive(archiveOf(t, archiveTestKey, strings.Repeat("x", MaxArchiveRecord)), archiveTestKey)
	if err != nil || len(records) != 1 || len(records[0]) != MaxArchiveRecord {
		t.Errorf("%d records of the largest size, %v", len(records), err)
	}
}
