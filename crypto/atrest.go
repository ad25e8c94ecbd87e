package crypto

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
)

const (
	sealKeyLength = 32

	// A sealed record: version | key id | nonce | cipher text and tag.
	sealVersion      = 1
	sealIDLength     = 4
	sealNonceLength  = 24
	sealHeaderLength = 1 + sealIDLength + sealNonceLength
	sealTagLength    = 16

	gcmNonceLength = 12
)

// Sealer encrypts and authenticates records at rest. The name of the record is additional data, so that a record cannot
// be passed off as another. Records are sealed with the newest key and open with any. It is immutable and safe for
// concurrent use.
//
// The cipher is XAES-256-GCM (C2SP): AES-256-GCM under a key derived for each record from a random nonce of 24 bytes.
// Plain GCM's 12 would allow one key 2^32 records; a million authorizers that renew every two hours reach that within a
// year.
type Sealer struct{ keys []sealKey }

// SealKeyID tells seal keys apart, and says nothing about them.
type SealKeyID [sealIDLength]byte

type sealKey struct {
	id    SealKeyID
	block cipher.Block
	mac   [aes.BlockSize]byte // CMAC's first subkey, for the derivation
}

// NewSealer makes a Sealer of at least one key, newest first, each of 32 bytes as [ParseSealKey] gives.
func NewSealer(keys ...[]byte) (*Sealer, error) {
	if len(keys) == 0 {
		return nil, errors.New("no seal key, want at least one of 32 bytes")
	}
	s := new(Sealer)
	for i, key := range keys {
		if len(key) != sealKeyLength {
			return nil, fmt.Errorf("seal key %d has %d bytes, want %d", i+1, len(key), sealKeyLength)
		}
		block, err := aes.NewCipher(key)
		if err != nil {
			return nil, fmt.Errorf("seal key %d: %w", i+1, err)
		}
		k := sealKey{block: block}
		sum := sha256.Sum256(append([]byte("caddy-wechat seal key id\x00"), key...))
		copy(k.id[:], sum[:])
		// The subkey is AES(0), doubled in GF(2^128).
		block.Encrypt(k.mac[:], k.mac[:])
		carry := k.mac[0] >> 7
		for j := range k.mac[:aes.BlockSize-1] {
			k.mac[j] = k.mac[j]<<1 | k.mac[j+1]>>7
		}
		k.mac[aes.BlockSize-1] = k.mac[aes.BlockSize-1]<<1 ^ carry*0x87
		s.keys = append(s.keys, k)
	}
	return s, nil
}

// ErrSealKey is an [ErrDecrypt]: the record was sealed with a key that is not configured.
var ErrSealKey = fmt.Errorf("sealed with a key that is not configured, add it as an old seal key: %w", ErrDecrypt)

// KeyIDs are those of the Sealer's keys, newest first.
func (s *Sealer) KeyIDs() []SealKeyID {
	ids := make([]SealKeyID, len(s.keys))
	for i := range s.keys {
		ids[i] = s.keys[i].id
	}
	return ids
}

// SealedWith is the id of the key that a record says it was sealed with, which it may have been altered to say; false: it has
// not the form of a sealed record.
func SealedWith(data []byte) (id SealKeyID, sealed bool) {
	if !IsSealed(data) || len(data) < sealHeaderLength+sealTagLength {
		return id, false
	}
	return SealKeyID(data[1 : 1+sealIDLength]), true
}

// IsSealed tells what [Sealer.Seal] made from text.
func IsSealed(data []byte) bool { return len(data) > 0 && data[0] == sealVersion }

// ParseSealKey reads a key of 32 bytes: 64 hex digits, or base64 in the standard or URL alphabet, padded or not. As what
// "openssl rand -hex 32" or "openssl rand -base64 32" prints. The error never has the value in it.
func ParseSealKey(text string) ([]byte, error) {
	if len(text) == hex.EncodedLen(sealKeyLength) {
		if key, err := hex.DecodeString(text); err == nil {
			return key, nil
		}
	}
	// The decoder skips line breaks even when strict.
	if !strings.ContainsAny(text, "\r\n") {
		for _, encoding := range [...]*base64.Encoding{
			base64.StdEncoding, base64.RawStdEncoding, base64.URLEncoding, base64.RawURLEncoding,
		} {
			if key, err := encoding.Strict().DecodeString(text); err == nil && len(key) == sealKeyLength {
				return key, nil
			}
		}
	}
	return nil, fmt.Errorf("seal key is not %d bytes in hex or base64, make one with: openssl rand -hex %d", sealKeyLength, sealKeyLength)
}

// Seal seals the record name with the newest key. What it returns is 45 bytes longer than plaintext.
func (s *Sealer) Seal(name string, plaintext []byte) ([]byte, error) {
	k := &s.keys[0]
	out := make([]byte, sealHeaderLength, sealHeaderLength+len(plaintext)+sealTagLength)
	out[0] = sealVersion
	copy(out[1:], k.id[:])
	nonce := out[1+sealIDLength : sealHeaderLength]
	_, _ = rand.Read(nonce) // never fails: it ends the process instead
	aead, err := k.derive(nonce)
	if err != nil {
		return nil, fmt.Errorf("seal record %q: %w", name, err)
	}
	return aead.Seal(out, nonce[gcmNonceLength:], plaintext, additional(out, name)), nil
}

// Format shows no key, whatever the verb.
func (Sealer) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "crypto.Sealer") }

// Open opens what Seal made for the same name, with whichever key did it; old says that it was not the newest, so that the
// record is best sealed again when it is next written. The error is ErrDecrypt and says whether the version or the key
// is unknown or the record was altered or moved.
func (s *Sealer) Open(name string, sealed []byte) (plaintext []byte, old bool, err error) {
	if len(sealed) == 0 || sealed[0] != sealVersion {
		return nil, false, fmt.Errorf("record %q is not sealed, or by a newer version: %w", name, ErrDecrypt)
	}
	if len(sealed) < sealHeaderLength+sealTagLength {
		return nil, false, fmt.Errorf("record %q is cut short: %w", name, ErrDecrypt)
	}
	header, text := sealed[:sealHeaderLength:sealHeaderLength], sealed[sealHeaderLength:]
	id, nonce := header[1:1+sealIDLength], header[1+sealIDLength:]
	known := false
	for i := range s.keys {
		k := &s.keys[i]
		if !bytes.Equal(k.id[:], id) {
			continue
		}
		known = true
		aead, err := k.derive(nonce)
		if err != nil {
			return nil, false, fmt.Errorf("record %q: %w", name, err)
		}
		if plaintext, err = aead.Open(nil, nonce[gcmNonceLength:], text, additional(header, name)); err == nil {
			return plaintext, i > 0, nil
		}
	}
	if !known {
		return nil, false, fmt.Errorf("record %q: %w", name, ErrSealKey)
	}
	return nil, false, fmt.Errorf("record %q was altered or moved: %w", name, ErrDecrypt)
}

// additional is the additional data of a record: version and key id, of fixed length, and its name.
func additional(header []byte, name string) []byte {
	return append(header[:1+sealIDLength:1+sealIDLength], name...)
}

// derive makes the cipher for one nonce: its key is two CMACs over the nonce's first half, as NIST SP 800-108 would
// have it; the second half is GCM's own nonce.
func (k *sealKey) derive(nonce []byte) (cipher.AEAD, error) {
	var key [sealKeyLength]byte
	for i := range sealKeyLength / aes.BlockSize {
		half := key[i*aes.BlockSize : (i+1)*aes.BlockSize]
		copy(half, []byte{0, byte(i + 1), 'X', 0})
		copy(half[4:], nonce[:gcmNonceLength])
		for j := range half {
			half[j] ^= k.mac[j]
		}
		k.block.Encrypt(half, half)
	}
	block, err := aes.NewCipher(key[:])
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}
