package crypto

import (
	"bufio"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// An archive is a header and then frames, each of which holds one record, but for the last, which ends it:
//
//	header: magic | version | kind of key | salt | iterations | HMAC-SHA-256 of all before
//	frame:  length, whose highest bit says that it is the last | AES-256-GCM of the record
//
// The salt makes the keys of both those of this archive alone. A frame's nonce is its number, and whether it is the last:
// a frame that was moved, left out, taken from another archive or put behind the end does not open.
const (
	archiveMagic   = "caddy-wechat archive\n"
	archiveVersion = 1
	archiveSalt    = 32
	archiveHeader  = len(archiveMagic) + 1 + 1 + archiveSalt + 4 // before the HMAC

	archiveByKey        = 1
	archiveByPassphrase = 2

	archiveLast   = 1 << 31 // in a length
	archiveLength = 4

	// MaxArchiveRecord bounds a record, in bytes.
	MaxArchiveRecord = 16 << 20

	// minPassphrase bounds a passphrase from below, in bytes.
	minPassphrase = 16
	// passphraseIterations of PBKDF2-HMAC-SHA-256 take a passphrase to a key, some half a second. What an archive says is
	// bounded, since it is believed before anything is authenticated.
	passphraseIterations    = 1_000_000
	maxPassphraseIterations = 10 * passphraseIterations
)

var (
	// ErrNoArchive: it is something else.
	ErrNoArchive = errors.New("not an archive of this gateway's records")
	// ErrArchiveVersion: the archive is newer than the program.
	ErrArchiveVersion = errors.New("the archive is of a newer version of the gateway: read it with that")
	// ErrArchiveKey: the archive was sealed with another key.
	ErrArchiveKey = errors.New("the archive was sealed with another key")
	// ErrArchivePassphrase: the archive was sealed with a passphrase, and none is given.
	ErrArchivePassphrase = errors.New("the archive was sealed with a passphrase, and none is given")
	// ErrArchiveCut: the end mark is missing.
	ErrArchiveCut = errors.New("the archive is cut short")
	// ErrArchiveAltered: a record does not open in its place.
	ErrArchiveAltered = errors.New("the archive was altered: a record was changed, moved, left out or comes from another archive")
)

// ArchiveKey is what an archive is sealed with: 32 bytes, such as a seal key, or a passphrase.
type ArchiveKey struct {
	secret     []byte
	passphrase bool
}

// Format shows no key, whatever the verb.
func (ArchiveKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "crypto.ArchiveKey") }

// NewArchiveKey makes a key of 32 bytes, as [ParseSealKey] gives.
func NewArchiveKey(key []byte) ArchiveKey { return ArchiveKey{secret: key} }

// ParseArchiveKey reads a key as [ParseSealKey] does, and takes any other text for a passphrase, if it is not too short.
// The error never has the value in it.
func ParseArchiveKey(text string) (ArchiveKey, error) {
	if key, err := ParseSealKey(text); err == nil {
		return NewArchiveKey(key), nil
	}
	if len(text) < minPassphrase {
		return ArchiveKey{}, fmt.Errorf("neither a key of %d bytes in hex or base64 nor a passphrase of at least %d characters: make a key with: openssl rand -hex %d",
			sealKeyLength, minPassphrase, sealKeyLength)
	}
	return ArchiveKey{secret: []byte(text), passphrase: true}, nil
}

// archiveKeys derives from a key what seals the frames of one archive, and what its header is authenticated with.
func archiveKeys(key ArchiveKey, salt []byte, iterations int) (aead cipher.AEAD, mac []byte, err error) {
	master := key.secret
	if key.passphrase {
		if master, err = pbkdf2.Key(sha256.New, string(key.secret), salt, iterations, sealKeyLength); err != nil {
			return nil, nil, err
		}
	}
	keys, err := hkdf.Key(sha256.New, master, salt, "caddy-wechat archive", 2*sealKeyLength)
	if err != nil {
		return nil, nil, err
	}
	block, err := aes.NewCipher(keys[:sealKeyLength])
	if err != nil {
		return nil, nil, err
	}
	aead, err = cipher.NewGCM(block)
	return aead, keys[sealKeyLength:], err
}

func archiveMAC(key, header []byte) []byte {
	h := hmac.New(sha256.New, key)
	_, _ = h.Write(header)
	return h.Sum(nil)
}

// archiveNonce is the nonce of the frame of that number.
func archiveNonce(number uint64, last bool) []byte {
	nonce := binary.BigEndian.AppendUint64(make([]byte, 3, gcmNonceLength), number)
	if last {
		return append(nonce, 1)
	}
	return append(nonce, 0)
}

// ArchiveWriter writes an archive. It is not safe for concurrent use.
type ArchiveWriter struct {
	w      *bufio.Writer
	aead   cipher.AEAD
	number uint64
	frame  []byte
}

// NewArchiveWriter begins an archive.
func NewArchiveWriter(w io.Writer, key ArchiveKey) (*ArchiveWriter, error) {
	header := make([]byte, 0, archiveHeader+sha256.Size)
	header = append(append(header, archiveMagic...), archiveVersion, archiveByKey)
	salt := make([]byte, archiveSalt)
	_, _ = rand.Read(salt) // never fails: it ends the process instead
	header = append(header, salt...)
	iterations := 0
	if key.passphrase {
		header[len(archiveMagic)+1], iterations = archiveByPassphrase, passphraseIterations
	}
	header = binary.BigEndian.AppendUint32(header, uint32(iterations)) //nolint:gosec // a constant
	aead, mac, err := archiveKeys(key, salt, iterations)
	if err != nil {
		return nil, fmt.Errorf("archive: %w", err)
	}
	a := &ArchiveWriter{w: bufio.NewWriter(w), aead: aead}
	_, err = a.w.Write(append(header, archiveMAC(mac, header)...))
	return a, err
}

// Write adds a record.
func (a *ArchiveWriter) Write(record []byte) error { return a.add(record, 0) }

// Close ends the archive. Without it what was written is no whole archive, and is found to be none.
func (a *ArchiveWriter) Close() error {
	if err := a.add(nil, archiveLast); err != nil {
		return err
	}
	return a.w.Flush()
}

func (a *ArchiveWriter) add(record []byte, last uint32) error {
	if len(record) > MaxArchiveRecord {
		return fmt.Errorf("archive: a record of %d bytes, the limit is %d", len(record), MaxArchiveRecord)
	}
	a.frame = binary.BigEndian.AppendUint32(a.frame[:0], uint32(len(record))|last) //nolint:gosec // bounded
	a.frame = a.aead.Seal(a.frame, archiveNonce(a.number, last != 0), record, a.frame)
	a.number++
	_, err := a.w.Write(a.frame)
	return err
}

// ArchiveReader reads an archive. It is not safe for concurrent use.
type ArchiveReader struct {
	r      *bufio.Reader
	aead   cipher.AEAD
	number uint64
	ended  bool
}

// NewArchiveReader begins to read an archive that was sealed with one of the keys. The error is ErrNoArchive,
// ErrArchiveVersion, ErrArchiveKey, ErrArchivePassphrase, ErrArchiveCut or the reader's.
func NewArchiveReader(r io.Reader, keys ...ArchiveKey) (*ArchiveReader, error) {
	a := &ArchiveReader{r: bufio.NewReader(r)}
	header := make([]byte, archiveHeader+sha256.Size)
	n, err := io.ReadFull(a.r, header)
	known := min(n, len(archiveMagic))
	switch {
	case err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		return nil, err
	case n == 0, string(header[:known]) != archiveMagic[:known]:
		return nil, ErrNoArchive
	case n > len(archiveMagic) && header[len(archiveMagic)] != archiveVersion:
		return nil, ErrArchiveVersion
	case err != nil:
		return nil, ErrArchiveCut
	}
	said, sum := header[:archiveHeader], header[archiveHeader:]
	passphrase := said[len(archiveMagic)+1] == archiveByPassphrase
	salt := said[len(archiveMagic)+2 : archiveHeader-4]
	iterations := int(binary.BigEndian.Uint32(said[archiveHeader-4:]))
	if iterations > maxPassphraseIterations || passphrase && iterations == 0 {
		return nil, ErrArchiveAltered
	}
	tried := false
	for _, key := range keys {
		if key.passphrase != passphrase {
			continue
		}
		tried = true
		aead, mac, err := archiveKeys(key, salt, iterations)
		if err != nil {
			return nil, fmt.Errorf("archive: %w", err)
		}
		if hmac.Equal(sum, archiveMAC(mac, said)) {
			a.aead = aead
			return a, nil
		}
	}
	if passphrase && !tried {
		return nil, ErrArchivePassphrase
	}
	return nil, ErrArchiveKey
}

// Next returns the next record, and io.EOF after the last, when the archive was whole. It is ErrArchiveCut or
// ErrArchiveAltered if it is not; what was returned before that is what was written.
func (a *ArchiveReader) Next() ([]byte, error) {
	if a.ended {
		return nil, io.EOF
	}
	frame := make([]byte, archiveLength)
	if _, err := io.ReadFull(a.r, frame); err != nil {
		return nil, cutShort(err)
	}
	length := binary.BigEndian.Uint32(frame)
	last := length&archiveLast != 0
	if length &^= archiveLast; length > MaxArchiveRecord {
		return nil, ErrArchiveAltered
	}
	sealed := make([]byte, int(length)+a.aead.Overhead())
	if _, err := io.ReadFull(a.r, sealed); err != nil {
		return nil, cutShort(err)
	}
	record, err := a.aead.Open(sealed[:0], archiveNonce(a.number, last), sealed, frame)
	if err != nil {
		return nil, ErrArchiveAltered
	}
	a.number++
	if !last {
		return record, nil
	}
	if _, err := a.r.ReadByte(); !errors.Is(err, io.EOF) {
		if err == nil {
			err = ErrArchiveAltered
		}
		return nil, err
	}
	a.ended = true
	return nil, io.EOF
}

func cutShort(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return ErrArchiveCut
	}
	return err
}
