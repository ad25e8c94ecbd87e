package crypto

import (
	"bytes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/hex"
	"strings"
	"testing"
)

func sealKeyBytes(c byte) []byte { return bytes.Repeat([]byte{c}, sealKeyLength) }

func mustSealer(tb testing.TB, keys ...[]byte) *Sealer {
	tb.Helper()
	s, err := NewSealer(keys...)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

// TestXAES checks the cipher against the two test vectors of the C2SP XAES-256-GCM specification.
func TestXAES(t *testing.T) {
	t.Parallel()
	const nonce = "ABCDEFGHIJKLMNOPQRSTUVWX"
	for _, test := range []struct {
		key       byte
		aad, want string
	}{
		{1, "", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"},
		{3, "c2sp.org/XAES-256-GCM", "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"},
	} {
		aead, err := mustSealer(t, sealKeyBytes(test.key)).keys[0].derive([]byte(nonce))
		if err != nil {
			t.Fatal(err)
		}
		got := hex.EncodeToString(aead.Seal(nil, []byte(nonce[12:]), []byte("XAES-256-GCM"), []byte(test.aad)))
		if got != test.want {
			t.Errorf("key %d: %s, want %s", test.key, got, test.want)
		}
	}
}

func TestSealerRoundTripAndRotation(t *testing.T) {
	t.Parallel()
	before := mustSealer(t, sealKeyBytes('a'))
	during := mustSealer(t, sealKeyBytes('b'), sealKeyBytes('a'))
	after := mustSealer(t, sealKeyBytes('b'))
	for _, plaintext := range [][]byte{nil, []byte("x"), bytes.Repeat([]byte("record"), 1000)} {
		sealed, err := before.Seal("wechat/v1/ticket/1", plaintext)
		if err != nil {
			t.Fatal(err)
		}
		if len(sealed) != len(plaintext)+45 {
			t.Errorf("%d bytes become %d", len(plaintext), len(sealed))
		}
		got, old, err := during.Open("wechat/v1/ticket/1", sealed)
		if err != nil || !old || !bytes.Equal(got, plaintext) {
			t.Errorf("with the old key: %q, %v, %v", got, old, err)
		}
		if resealed, err := during.Seal("wechat/v1/ticket/1", got); err != nil {
			t.Error(err)
		} else if got, old, err := after.Open("wechat/v1/ticket/1", resealed); err != nil || old || !bytes.Equal(got, plaintext) {
			t.Errorf("sealed again: %q, %v, %v", got, old, err)
		}
		_, _, err = after.Open("wechat/v1/ticket/1", sealed)
		wantErr(t, err, ErrDecrypt)
		if !strings.Contains(err.Error(), "not configured") {
			t.Errorf("key gone: %v", err)
		}
	}
}

// A record tells which key it was sealed with, to who has that key and to who has not.
func TestSealedWith(t *testing.T) {
	t.Parallel()
	a, both := mustSealer(t, sealKeyBytes('a')), mustSealer(t, sealKeyBytes('b'), sealKeyBytes('a'))
	ids := both.KeyIDs()
	if len(ids) != 2 || ids[0] == ids[1] || ids[1] != a.KeyIDs()[0] {
		t.Fatalf("ids: %x of one, %x of both", a.KeyIDs(), ids)
	}
	for i, s := range []*Sealer{both, a} {
		sealed, err := s.Seal("n", nil)
		if err != nil {
			t.Fatal(err)
		}
		if id, ok := SealedWith(sealed); !ok || id != ids[i] {
			t.Errorf("sealed with %x, %v, want %x", id, ok, ids[i])
		}
		if _, ok := SealedWith(sealed[:len(sealed)-1]); ok {
			t.Error("half a record has a key")
		}
	}
	for _, data := range [][]byte{nil, []byte(`{"v":1}`), bytes.Repeat([]byte{2}, 100)} {
		if _, ok := SealedWith(data); ok {
			t.Errorf("%q has a key", data)
		}
	}
}

func TestSealerRefuses(t *testing.T) {
	t.Parallel()
	s := mustSealer(t, sealKeyBytes('a'))
	const name = "wechat/v1/component/1"
	sealed, err := s.Seal(name, []byte("plaintext"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range sealed {
		for _, bit := range []byte{1, 0x80} {
			forged := bytes.Clone(sealed)
			forged[i] ^= bit
			got, _, err := s.Open(name, forged)
			wantErr(t, err, ErrDecrypt)
			if got != nil {
				t.Errorf("byte %d: a plaintext", i)
			}
		}
	}
	for i := range sealed {
		_, _, err := s.Open(name, sealed[:i])
		wantErr(t, err, ErrDecrypt)
	}
	for what, test := range map[string]struct {
		name   string
		sealed []byte
		want   string
	}{
		"moved":       {"wechat/v1/component/2", sealed, "altered or moved"},
		"no name":     {"", sealed, "altered or moved"},
		"longer":      {name, append(bytes.Clone(sealed), 0), "altered or moved"},
		"empty":       {name, nil, "not sealed"},
		"plain JSON":  {name, []byte(`{"v":1}`), "not sealed"},
		"new version": {name, append([]byte{2}, sealed[1:]...), "newer version"},
		"short":       {name, sealed[:44], "cut short"},
	} {
		_, _, err := s.Open(test.name, test.sealed)
		wantErr(t, err, ErrDecrypt)
		if err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", what, err, test.want)
		}
	}
}

// Two keys may share the four bytes that tell them apart; then both are tried.
func TestSealerKeyIDsMayCollide(t *testing.T) {
	t.Parallel()
	a, b := mustSealer(t, sealKeyBytes('a')), mustSealer(t, sealKeyBytes('b'))
	both := &Sealer{keys: []sealKey{b.keys[0], a.keys[0]}}
	both.keys[0].id = a.keys[0].id
	sealed, err := a.Seal("n", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if got, old, err := both.Open("n", sealed); err != nil || !old || string(got) != "x" {
		t.Errorf("%q, %v, %v", got, old, err)
	}
}

func TestSealIsFresh(t *testing.T) {
	t.Parallel()
	s := mustSealer(t, sealKeyBytes('a'))
	first, err := s.Seal("n", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	second, err := s.Seal("n", []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(first[5:29], second[5:29]) || bytes.Equal(first[29:], second[29:]) {
		t.Error("one nonce twice")
	}
	if !bytes.Equal(first[:5], second[:5]) || first[0] != 1 {
		t.Errorf("headers %x and %x", first[:5], second[:5])
	}
}

func TestNewSealerRefuses(t *testing.T) {
	t.Parallel()
	for _, keys := range [][][]byte{nil, {nil}, {make([]byte, 31)}, {make([]byte, 33)}, {make([]byte, 32), make([]byte, 16)}} {
		if s, err := NewSealer(keys...); s != nil || err == nil {
			t.Errorf("%d keys accepted", len(keys))
		}
	}
}

func TestParseSealKey(t *testing.T) {
	t.Parallel()
	key := bytes.Repeat([]byte{0xfb, 0xff, 0xbe, 0x01}, 8) // has "+" and "/" in base64
	std, url := base64.StdEncoding.EncodeToString(key), base64.URLEncoding.EncodeToString(key)
	for _, text := range []string{
		hex.EncodeToString(key), strings.ToUpper(hex.EncodeToString(key)),
		std, strings.TrimRight(std, "="), url, strings.TrimRight(url, "="),
	} {
		if got, err := ParseSealKey(text); err != nil || !bytes.Equal(got, key) {
			t.Errorf("%s: %x, %v", text, got, err)
		}
	}
	for _, text := range []string{
		"", "short", hex.EncodeToString(key[:31]), hex.EncodeToString(key) + "00", "g" + hex.EncodeToString(key)[1:],
		std[:40], std + "=", std[:43] + "==", std + "\n", std[:20] + "\n" + std[20:], "-" + std[1:], std[:42] + "F=",
		base64.StdEncoding.EncodeToString(make([]byte, 31)), base64.StdEncoding.EncodeToString(make([]byte, 33)),
	} {
		got, err := ParseSealKey(text)
		if err == nil || got != nil {
			t.Errorf("%q accepted", text)
		} else if len(text) > 10 && strings.Contains(err.Error(), text[:10]) {
			t.Errorf("value in the error: %v", err)
		}
	}
}

// plainMode hides SetIV, as a standard library would whose modes cannot be set back.
type plainMode struct{ cipher.Block }

func (plainMode) NewCBCEncrypter(iv []byte) cipher.BlockMode { return xorMode(iv[0]) }
func (plainMode) NewCBCDecrypter(iv []byte) cipher.BlockMode { return xorMode(iv[0]) }

type xorMode byte

func (xorMode) BlockSize() int { return 16 }
func (m xorMode) CryptBlocks(dst, src []byte) {
	for i, c := range src {
		dst[i] = c ^ byte(m)
	}
}

func TestModesThatCannotBeSetBack(t *testing.T) {
	t.Parallel()
	k := mustKey(t, keyA)
	k.s.block = plainMode{k.s.block}
	want := bytes.Repeat([]byte("a"), 32)
	buf := bytes.Clone(want)
	for range 2 {
		if k.s.encrypt(buf); bytes.Equal(buf, want) {
			t.Error("not encrypted")
		}
		if k.s.decrypt(buf, buf); !bytes.Equal(buf, want) {
			t.Errorf("%q", buf)
		}
	}
}
