package wxsim

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha1" //nolint:gosec // WeChat's protocol
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"sort"
	"strings"
)

// Crypt is the push encryption of one receive id, written a second time on purpose (see the
// package comment). Tests use it to craft bad pushes.
type Crypt struct {
	token, receiveID string
	iv               []byte
	block            cipher.Block // nil without an AES key
}

const (
	aesKeyChars = 43
	padBlock    = 32 // WeChat pads to 32, not to AES's 16
	headerBytes = 20 // 16 random, 4 length
)

var errOpen = errors.New("cannot be decrypted")

// NewCrypt returns the encryption with an EncodingAESKey of 43 characters; with an empty key
// only Sign works.
func NewCrypt(token, aesKey, receiveID string) (*Crypt, error) {
	c := &Crypt{token: token, receiveID: receiveID}
	if aesKey == "" {
		return c, nil
	}
	if len(aesKey) != aesKeyChars {
		return nil, fmt.Errorf("aes key has %d characters: want %d", len(aesKey), aesKeyChars)
	}
	// Not Strict: the two bits that do not fit into 32 bytes are usually set.
	key, err := base64.StdEncoding.DecodeString(aesKey + "=")
	if err != nil || len(key) != 32 {
		return nil, errors.New("aes key is not base64")
	}
	c.iv = key[:aes.BlockSize]
	c.block, err = aes.NewCipher(key)
	return c, err
}

// Sign returns the hex SHA-1 over the sorted token and parts: timestamp and nonce for
// signature, and Encrypt as well for msg_signature.
func (c *Crypt) Sign(parts ...string) string {
	return signSorted(append([]string{c.token}, parts...)...)
}

func signSorted(parts ...string) string {
	sorted := append([]string(nil), parts...)
	sort.Strings(sorted)
	sum := sha1.Sum([]byte(strings.Join(sorted, ""))) //nolint:gosec // WeChat's protocol
	return hex.EncodeToString(sum[:])
}

// Seal encrypts a message to the base64 text of Encrypt.
func (c *Crypt) Seal(message []byte) (string, error) {
	var random [16]byte
	copy(random[:], rand.Text())
	return c.SealWith(random, message)
}

// SealWith is Seal with given random bytes.
func (c *Crypt) SealWith(random [16]byte, message []byte) (string, error) {
	plain := append([]byte(nil), random[:]...)
	plain = binary.BigEndian.AppendUint32(plain, uint32(len(message))) //nolint:gosec // messages are small
	plain = append(plain, message...)
	plain = append(plain, c.receiveID...)
	pad := padBlock - len(plain)%padBlock
	for range pad {
		plain = append(plain, byte(pad))
	}
	return c.SealBlocks(plain)
}

// SealBlocks encrypts whole AES blocks as they are, for pushes with wrong padding or length.
func (c *Crypt) SealBlocks(plain []byte) (string, error) {
	if c.block == nil {
		return "", errors.New("no aes key")
	}
	if len(plain)%aes.BlockSize != 0 {
		return "", fmt.Errorf("%d bytes are not whole AES blocks", len(plain))
	}
	out := make([]byte, len(plain))
	cipher.NewCBCEncrypter(c.block, c.iv).CryptBlocks(out, plain)
	return base64.StdEncoding.EncodeToString(out), nil
}

// Open decrypts the base64 text of Encrypt and checks padding, length and receive id.
func (c *Crypt) Open(encrypt string) ([]byte, error) {
	if c.block == nil {
		return nil, errors.New("no aes key")
	}
	if strings.ContainsAny(encrypt, "\r\n") {
		return nil, fmt.Errorf("line break in base64: %w", errOpen)
	}
	data, err := base64.StdEncoding.Strict().DecodeString(encrypt)
	if err != nil {
		return nil, fmt.Errorf("base64: %w", errOpen)
	}
	if len(data) == 0 || len(data)%padBlock != 0 {
		return nil, fmt.Errorf("%d bytes are not whole blocks of %d: %w", len(data), padBlock, errOpen)
	}
	cipher.NewCBCDecrypter(c.block, c.iv).CryptBlocks(data, data)
	pad := int(data[len(data)-1])
	if pad < 1 || pad > padBlock {
		return nil, fmt.Errorf("padding of %d: %w", pad, errOpen)
	}
	for _, b := range data[len(data)-pad:] {
		if int(b) != pad {
			return nil, fmt.Errorf("uneven padding: %w", errOpen)
		}
	}
	data = data[:len(data)-pad]
	if len(data) < headerBytes {
		return nil, fmt.Errorf("too short: %w", errOpen)
	}
	n := uint64(binary.BigEndian.Uint32(data[16:headerBytes]))
	if n > uint64(len(data)-headerBytes) {
		return nil, fmt.Errorf("length field beyond the end: %w", errOpen)
	}
	message, id := data[headerBytes:headerBytes+n], data[headerBytes+n:]
	if string(id) != c.receiveID {
		return nil, fmt.Errorf("receive id is not %s: %w", c.receiveID, errOpen)
	}
	return message, nil
}
