package crypto

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"sync"
)

// encodedKeyLength is the length of an EncodingAESKey (消息加解密Key): the base64 of 32 bytes without its "=".
const encodedKeyLength = 43

// Key is one EncodingAESKey, ready for use. The zero Key opens nothing. It is safe for concurrent use and prints
// redacted.
type Key struct{ s *keyState }

// keyState sits behind a pointer, so that a struct with a Key in it prints an address.
type keyState struct {
	raw   [32]byte
	block cipher.Block
	enc   sync.Pool // of cbcMode
	dec   sync.Pool // of cbcMode
}

// cbcMode is what the standard library's AES-CBC modes really are. A mode carries a copy of the expanded key, half a
// kilobyte, so modes are pooled and set back to the IV before each use instead of being made anew.
type cbcMode interface {
	cipher.BlockMode
	SetIV(iv []byte)
}

// ParseKey reads the 43-character EncodingAESKey as the WeChat console shows it. WeChat makes it of A-Z, a-z and 0-9;
// "+" and "/", the rest of the base64 alphabet, are accepted too. 43 characters carry two bits more than the
// key and WeChat leaves them set, so four spellings are one key; compare keys with [Key.Same].
func ParseKey(encodingAESKey string) (Key, error) {
	n := len(encodingAESKey)
	if n != encodedKeyLength {
		return Key{}, &KeyError{Length: n}
	}
	for i := range encodedKeyLength {
		if !isBase64(encodingAESKey[i]) {
			return Key{}, &KeyError{Length: n, Position: i + 1}
		}
	}
	s := new(keyState)
	// Neither error can happen now, length and alphabet being right; the decoder is lenient about trailing bits.
	if _, err := base64.RawStdEncoding.Decode(s.raw[:], []byte(encodingAESKey)); err != nil {
		return Key{}, fmt.Errorf("aes key is not base64, want %d of A-Z, a-z and 0-9", encodedKeyLength)
	}
	block, err := aes.NewCipher(s.raw[:])
	if err != nil {
		return Key{}, fmt.Errorf("aes key: %w", err)
	}
	s.block = block
	return Key{s}, nil
}

// KeyError says what is wrong with an EncodingAESKey, and not what it is.
type KeyError struct {
	Length   int
	Position int // of the first wrong character, from 1; 0: the length is wrong
}

func (e *KeyError) Error() string {
	if e.Position == 0 {
		return fmt.Sprintf("aes key has %d characters, want the %d that the WeChat console shows", e.Length, encodedKeyLength)
	}
	return fmt.Sprintf("aes key has a wrong character at position %d, want only A-Z, a-z and 0-9", e.Position)
}

func isBase64(c byte) bool {
	return 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '+' || c == '/'
}

// Same reports whether o is the same 32 bytes, however it was spelt.
func (k Key) Same(o Key) bool {
	if k.s == nil || o.s == nil {
		return k.s == o.s
	}
	return subtle.ConstantTimeCompare(k.s.raw[:], o.s.raw[:]) == 1
}

// Format implements fmt.Formatter: a key never prints.
func (Key) Format(f fmt.State, _ rune) { redact(f) }

func (s *keyState) iv() []byte { return s.raw[:aes.BlockSize] }

// encrypt encrypts buf in place; its length is a multiple of the AES block.
func (s *keyState) encrypt(buf []byte) {
	mode, ok := s.enc.Get().(cbcMode)
	if !ok {
		fresh := cipher.NewCBCEncrypter(s.block, s.iv())
		if mode, ok = fresh.(cbcMode); !ok { // a standard library whose modes cannot be set back
			fresh.CryptBlocks(buf, buf)
			return
		}
	}
	mode.SetIV(s.iv())
	mode.CryptBlocks(buf, buf)
	s.enc.Put(mode)
}

// decrypt decrypts src into dst, both of the same length, a multiple of the AES block.
func (s *keyState) decrypt(dst, src []byte) {
	mode, ok := s.dec.Get().(cbcMode)
	if !ok {
		fresh := cipher.NewCBCDecrypter(s.block, s.iv())
		if mode, ok = fresh.(cbcMode); !ok {
			fresh.CryptBlocks(dst, src)
			return
		}
	}
	mode.SetIV(s.iv())
	mode.CryptBlocks(dst, src)
	s.dec.Put(mode)
}
