package crypto

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
)

const (
	randomLength = 16 // random bytes before the length
	headerLength = randomLength + 4
	padBlock     = 32 // WeChat pads to 32, twice the AES block; an unpadder for 16 refuses half of its traffic
)

// Buffers is the working memory of one push: opening it and sealing its reply allocate nothing once the buffers have
// grown. The zero value is ready. It serves one goroutine at a time; pool it, and drop what has grown huge ([Buffers.Cap]).
type Buffers struct {
	join  []byte // text that is signed
	work  []byte // cipher text of the push; plaintext, then cipher text, of the reply
	plain []byte // plaintext of the push; Opened.Message lies here
}

// Cap returns the memory held, in bytes.
func (b *Buffers) Cap() int { return cap(b.join) + cap(b.work) + cap(b.plain) }

// Format implements fmt.Formatter: the content of pushes never prints.
func (Buffers) Format(f fmt.State, _ rune) { redact(f) }

// resize returns a buffer of n bytes, the old one if it is large enough. The content is undefined.
func resize(buf []byte, n int) []byte { return slices.Grow(buf[:0], n)[:n] }

// decode decodes the base64 of Encrypt into b.work: standard alphabet, padded, nothing else in it. Bits that the
// padding leaves over are ignored, as every WeChat SDK does.
func (b *Buffers) decode(encrypt []byte) ([]byte, error) {
	if len(encrypt) == 0 || len(encrypt)%4 != 0 {
		return nil, ErrDecrypt
	}
	want := len(encrypt) / 4 * 3
	b.work = resize(b.work, want)
	n, err := base64.StdEncoding.Decode(b.work, encrypt)
	if err != nil {
		return nil, ErrDecrypt
	}
	for i := len(encrypt) - 1; encrypt[i] == '='; i-- {
		want--
	}
	// The standard decoder skips line breaks, which shows in what is missing.
	if n != want {
		return nil, ErrDecrypt
	}
	return b.work[:n], nil
}

// open decrypts text into b.plain with one key and returns the message in it.
func (b *Buffers) open(k *keyState, text []byte, receiveID string) ([]byte, error) {
	// Padded to 32 it is a multiple of 32, not just of AES's 16.
	if len(text)%padBlock != 0 {
		return nil, ErrDecrypt
	}
	b.plain = resize(b.plain, len(text))
	k.decrypt(b.plain, text)
	return unpack(b.plain, receiveID)
}

// unpack takes random bytes, length, receive id and padding off a plaintext.
func unpack(plain []byte, receiveID string) ([]byte, error) {
	message, id, err := split(plain)
	if err != nil {
		return nil, err
	}
	if string(id) != receiveID {
		return nil, ErrReceiveID
	}
	return message, nil
}

// split finds message and receive id in a plaintext.
func split(plain []byte) (message, receiveID []byte, err error) {
	if len(plain) < padBlock {
		return nil, nil, ErrDecrypt
	}
	last := plain[len(plain)-1]
	pad := int(last)
	if pad < 1 || pad > padBlock {
		return nil, nil, ErrDecrypt
	}
	var diff byte
	for _, c := range plain[len(plain)-pad:] {
		diff |= c ^ last
	}
	body := plain[:len(plain)-pad]
	if diff != 0 || len(body) < headerLength {
		return nil, nil, ErrDecrypt
	}
	// Unsigned: read as a signed number a forged length could be negative.
	length := uint64(binary.BigEndian.Uint32(body[randomLength:]))
	body = body[headerLength:]
	if length > uint64(len(body)) {
		return nil, nil, ErrDecrypt
	}
	return body[:length:length], body[length:], nil
}

// seal appends the base64 of message, encrypted for receiveID, to dst.
func (b *Buffers) seal(dst []byte, k *keyState, random [randomLength]byte, receiveID string, message []byte) ([]byte, error) {
	if uint64(len(message)) > math.MaxUint32-headerLength-padBlock-uint64(len(receiveID)) {
		return dst, errTooLong
	}
	n := headerLength + len(message) + len(receiveID)
	pad := padBlock - n%padBlock
	b.work = resize(b.work, n+pad)
	w := b.work
	copy(w, random[:])
	binary.BigEndian.PutUint32(w[randomLength:], uint32(len(message))) //nolint:gosec // bounded above
	copy(w[headerLength:], message)
	copy(w[headerLength+len(message):], receiveID)
	for i := n; i < len(w); i++ {
		w[i] = byte(pad) //nolint:gosec // 1 to 32
	}
	k.encrypt(w)
	return base64.StdEncoding.AppendEncode(dst, w), nil
}

// newRandom returns the random bytes that open a plaintext. Letters and digits, as in WeChat's own; that the first few
// are drawn a little more often than the rest costs nothing here: 95 bits keep equal messages from looking equal.
func newRandom() [randomLength]byte {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	var r [randomLength]byte
	_, _ = rand.Read(r[:]) // never fails: it ends the process instead
	for i, c := range r {
		r[i] = alphabet[int(c)%len(alphabet)]
	}
	return r
}
