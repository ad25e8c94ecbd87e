package crypto

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	keyA  = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG"
	keyB  = "jWmYm7qr5nMoAUwZRjGtBxmz3KA1tkAj3ykkR6q2B2C"
	appid = "wx134c8103faa5a59e"
)

// layout builds a plaintext with a length field of one's choice, soundly padded.
func layout(message string, length uint32, receiveID string) []byte {
	plain := []byte("0123456789abcdef")
	plain = binary.BigEndian.AppendUint32(plain, length)
	plain = append(plain, message+receiveID...)
	pad := padBlock - len(plain)%padBlock
	return append(plain, bytes.Repeat([]byte{byte(pad)}, pad)...)
}

// openPlain encrypts and signs a plaintext as it is, and opens it with the vector's codec.
func openPlain(t *testing.T, v messageVector, plain []byte) error {
	t.Helper()
	plain = bytes.Clone(plain)
	mustKey(t, v.EncodingAESKey).s.encrypt(plain)
	return openText(t, v, base64.StdEncoding.EncodeToString(plain))
}

// openText signs a text as it is, and opens it with the vector's codec.
func openText(t *testing.T, v messageVector, encrypt string) error {
	t.Helper()
	c := vectorCodec(t, v)
	v.MsgSignature = string(new(Buffers).sign(nil, c.tokens[0], v.Timestamp, v.Nonce, []byte(encrypt)))
	o, err := c.Open(new(Buffers), vectorParams(v), []byte(encrypt))
	if err != nil && o.Message != nil {
		t.Error("a message beside an error")
	}
	return err
}

func TestOpenRefusesBadPlaintext(t *testing.T) {
	t.Parallel()
	v := messageVectors(t)["official-doc-component-safe"]
	sound := layout("hello", 5, v.AppID) // 43 bytes and 21 of padding
	with := func(i int, c byte) []byte {
		plain := bytes.Clone(sound)
		plain[(i+len(plain))%len(plain)] = c
		return plain
	}
	padded := func(plain []byte, pad int) []byte {
		for i := range pad {
			plain[len(plain)-1-i] = byte(pad)
		}
		return plain
	}
	tests := []struct {
		name  string
		plain []byte
		want  error
	}{
		{"sound", sound, nil},
		{"empty message", layout("", 0, v.AppID), nil},
		{"padding 0", with(-1, 0), ErrDecrypt},
		{"padding 33", with(-1, 33), ErrDecrypt},
		{"padding 255", with(-1, 255), ErrDecrypt},
		{"padding 33 throughout", padded(bytes.Clone(sound), 33), ErrDecrypt},
		{"padding shorter than written", with(-1, 20), ErrDecrypt},
		{"first byte of the padding", with(-21, 20), ErrDecrypt},
		{"padding alone", padded(make([]byte, 32), 32), ErrDecrypt},
		{"padding after 19 bytes", padded(make([]byte, 32), 13), ErrDecrypt},
		{"padding after 20 bytes", padded(make([]byte, 32), 12), ErrReceiveID},
		{"length negative as a signed number", layout("hello", 0xffffffff, v.AppID), ErrDecrypt},
		{"length smallest signed number", layout("hello", 0x80000000, v.AppID), ErrDecrypt},
		{"length wraps around with the header", layout("hello", 0xffffffff-19, v.AppID), ErrDecrypt},
		{"length one past the end", layout("hello", uint32(len("hello"+v.AppID))+1, v.AppID), ErrDecrypt},
		{"length up to the end", layout("hello", uint32(len("hello"+v.AppID)), v.AppID), ErrReceiveID},
		{"length one too short", layout("hello", 4, v.AppID), ErrReceiveID},
		{"length one too long", layout("hello", 6, v.AppID), ErrReceiveID},
		{"length 0", layout("hello", 0, v.AppID), ErrReceiveID},
		{"no receive id", layout("hello", 5, ""), ErrReceiveID},
		{"receive id cut short", layout("hello", 5, v.AppID[:17]), ErrReceiveID},
		{"receive id longer", layout("hello", 5, v.AppID+"0"), ErrReceiveID},
		{"receive id with NUL", layout("hello", 5, v.AppID+"\x00"), ErrReceiveID},
		{"receive id in upper case", layout("hello", 5, strings.ToUpper(v.AppID)), ErrReceiveID},
		{"half a padding block", sound[:48], ErrDecrypt},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			err := openPlain(t, v, test.plain)
			if !errors.Is(err, test.want) || errors.Is(err, ErrReceiveID) != (test.want == ErrReceiveID) {
				t.Errorf("error %v, want %v", err, test.want)
			}
		})
	}
}

func TestOpenRefusesBadBase64(t *testing.T) {
	t.Parallel()
	v := messageVectors(t)["official-doc-component-safe"] // ends in "Mg==" and has both "+" and "/"
	text := v.Encrypt
	tests := map[string]string{
		"empty":               "",
		"cut short":           text[:len(text)-1],
		"unpadded":            strings.TrimRight(text, "="),
		"one quantum less":    text[:len(text)-4],
		"url-safe":            strings.NewReplacer("+", "-", "/", "_").Replace(text),
		"plus became space":   strings.ReplaceAll(text, "+", " "),
		"line breaks":         text[:64] + "\n" + text[64:128] + "\r\n" + text[128:192] + "\n" + text[192:],
		"line breaks at end":  text + "\n\n\n\n",
		"break in padding":    text[:len(text)-1] + "\n\n\n\n=",
		"four line breaks":    text[:64] + "\n\n\n\n" + text[64:],
		"leading spaces":      "    " + text,
		"more after padding":  text + "AAAA",
		"too much padding":    text + "====",
		"only padding":        "====",
		"wrong character":     "*" + text[1:],
		"not ASCII":           "é" + text[2:],
		"NUL":                 text[:4] + "\x00" + text[5:],
		"whitespace in value": " " + text + "\n  ",
	}
	for name, text := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			wantErr(t, openText(t, v, text), ErrDecrypt)
		})
	}
	// The bits that the padding leaves over are ignored: "Mg==" and "Mh==" are one byte.
	if err := openText(t, v, strings.TrimSuffix(text, "g==")+"h=="); err != nil {
		t.Errorf("trailing bits: %v", err)
	}
}

func TestOpenChecksSignatureFirst(t *testing.T) {
	t.Parallel()
	v := messageVectors(t)["official-doc-component-safe"]
	c := vectorCodec(t, v)
	good := vectorParams(v)
	tests := []struct {
		name    string
		change  func(p *Params)
		encrypt string
	}{
		{"missing", func(p *Params) { p.MsgSignature = "" }, v.Encrypt},
		{"short", func(p *Params) { p.MsgSignature = p.MsgSignature[:39] }, v.Encrypt},
		{"long", func(p *Params) { p.MsgSignature += "0" }, v.Encrypt},
		{"upper case", func(p *Params) { p.MsgSignature = strings.ToUpper(p.MsgSignature) }, v.Encrypt},
		{"space", func(p *Params) { p.MsgSignature = " " + p.MsgSignature[1:] }, v.Encrypt},
		{"beyond hex", func(p *Params) { p.MsgSignature = p.MsgSignature[:39] + "g" }, v.Encrypt},
		{"zeros", func(p *Params) { p.MsgSignature = strings.Repeat("0", 40) }, v.Encrypt},
		{"timestamp", func(p *Params) { p.Timestamp = "1715943330" }, v.Encrypt},
		{"nonce", func(p *Params) { p.Nonce = "1590219413" }, v.Encrypt},
		{"no nonce", func(p *Params) { p.Nonce = "" }, v.Encrypt},
		{"changed text", func(*Params) {}, "E" + v.Encrypt[1:]},
		{"unsigned text that would not decode", func(*Params) {}, "!"},
		{"no text", func(*Params) {}, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			p := good
			test.change(&p)
			o, err := c.Open(new(Buffers), p, []byte(test.encrypt))
			if err != ErrSignature || o.Message != nil { //nolint:errorlint // undifferentiated
				t.Errorf("error %v, want %v alone", err, ErrSignature)
			}
		})
	}
}

// Without a limit, bytes of the cipher text could be moved into the nonce without the signature changing: decryption
// from a later block on then still ends in the right receive id.
func TestOpenRefusesTextMovedIntoNonce(t *testing.T) {
	t.Parallel()
	const moved = 128 // 96 bytes: whole base64 quanta and whole blocks
	c := mustCodec(t, appid, []string{"zz"}, []string{keyA})
	encrypt, err := new(Buffers).seal(nil, c.keys[0].s, newRandom(), appid, bytes.Repeat([]byte("x"), 300))
	if err != nil {
		t.Fatal(err)
	}
	p := Params{Timestamp: "1715943329", Nonce: string(encrypt[:moved])}
	sum := new(Buffers)
	sum.join = append(append(append([]byte("1715943329"), encrypt[:moved]...), encrypt[moved:]...), "zz"...)
	p.MsgSignature = string(sum.sign(nil, c.tokens[0], p.Timestamp, p.Nonce, encrypt[moved:]))
	_, err = c.Open(new(Buffers), p, encrypt[moved:])
	wantErr(t, err, ErrSignature)
	p.Timestamp, p.Nonce = p.Nonce, p.Timestamp
	_, err = c.Open(new(Buffers), p, encrypt[moved:])
	wantErr(t, err, ErrSignature)
	if c.VerifySignature(c.Signature("1715943329", p.Timestamp), "1715943329", p.Timestamp) {
		t.Error("plain signature with a nonce of 128 bytes accepted")
	}
}

// TestParametersAreBounded: as long as maxParam is fine, one byte more is not, in whatever has a timestamp or nonce.
func TestParametersAreBounded(t *testing.T) {
	t.Parallel()
	c := mustCodec(t, appid, []string{"tokenA"}, []string{keyA})
	var b Buffers
	encrypt, err := b.seal(nil, c.keys[0].s, newRandom(), appid, []byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	longest := strings.Repeat("1", maxParam)
	for _, tt := range []struct {
		timestamp, nonce string
		want             bool
	}{
		{longest, longest, true},
		{longest + "1", longest, false},
		{longest, longest + "1", false},
	} {
		signature := string(b.sign(nil, c.tokens[0], tt.timestamp, tt.nonce, encrypt))
		p := Params{signature, tt.timestamp, tt.nonce}
		if _, err := c.Open(&b, p, encrypt); (err == nil) != tt.want {
			t.Errorf("%d, %d: opened: %v", len(tt.timestamp), len(tt.nonce), err)
		}
		if d := c.Diagnose(&b, p, encrypt); (d.Token == 0) != tt.want {
			t.Errorf("%d, %d: diagnosed: token %d", len(tt.timestamp), len(tt.nonce), d.Token)
		}
		if got := c.VerifySignature(c.Signature(tt.timestamp, tt.nonce), tt.timestamp, tt.nonce); got != tt.want {
			t.Errorf("%d, %d: verified: %v", len(tt.timestamp), len(tt.nonce), got)
		}
	}
	for _, tt := range []struct {
		nonce string
		want  error
	}{{longest, nil}, {longest + "1", errUnwritable}} {
		_, err := c.AppendReply(nil, &b, Opened{}, FormatXML, 1715943329, tt.nonce, nil)
		_, _, errPush := c.SealPush(&b, FormatXML, "AppId", appid, 1715943329, tt.nonce, nil)
		if err != tt.want || errPush != tt.want { //nolint:errorlint // our own values
			t.Errorf("nonce of %d: a reply %v, a push %v", len(tt.nonce), err, errPush)
		}
	}
}

func TestOpenOtherKeysAndTokens(t *testing.T) {
	t.Parallel()
	ours := mustCodec(t, appid, []string{"tokenA"}, []string{keyA})
	var b Buffers
	push := func(t *testing.T, receiveID, token, key string) (Params, []byte) {
		t.Helper()
		body, sig, err := mustCodec(t, receiveID, []string{token}, []string{key}).
			SealPush(new(Buffers), FormatXML, "ToUserName", "gh_1", 1715943329, "1590219412", []byte("<xml></xml>"))
		if err != nil {
			t.Fatal(err)
		}
		env, err := ScanEnvelope(body)
		if err != nil {
			t.Fatal(err)
		}
		return Params{sig, "1715943329", "1590219412"}, env.Encrypt
	}
	p, text := push(t, appid, "tokenB", keyA)
	_, err := ours.Open(&b, p, text)
	wantErr(t, err, ErrSignature)

	p, text = push(t, appid, "tokenA", keyB)
	_, err = ours.Open(&b, p, text)
	if !errors.Is(err, ErrDecrypt) || errors.Is(err, ErrReceiveID) {
		t.Errorf("another platform's key: %v", err)
	}

	p, text = push(t, "wx2222222222222222", "tokenA", keyA)
	_, err = mustCodec(t, appid, []string{"tokenA"}, []string{keyB, keyA}).Open(&b, p, text)
	wantErr(t, err, ErrReceiveID)

	p, text = push(t, appid, "tokenA", keyA)
	_, err = mustCodec(t, appid, []string{"tokenA"}, nil).Open(&b, p, text)
	wantErr(t, err, ErrDecrypt)
}

func TestRotation(t *testing.T) {
	t.Parallel()
	both := mustCodec(t, appid, []string{"tokenNew", "tokenOld"}, []string{keyB, keyA})
	for _, test := range []struct {
		name       string
		token, key string
		tokenIndex int
		keyIndex   int
	}{
		{"both new", "tokenNew", keyB, 0, 0},
		{"old key", "tokenNew", keyA, 0, 1},
		{"old token", "tokenOld", keyB, 1, 0},
		{"both old", "tokenOld", keyA, 1, 1},
	} {
		for _, format := range []Format{FormatXML, FormatJSON} {
			t.Run(test.name+" "+format.String(), func(t *testing.T) {
				t.Parallel()
				// WeChat knows one token and one key at a time.
				wechat := mustCodec(t, appid, []string{test.token}, []string{test.key})
				body, sig, err := wechat.SealPush(new(Buffers), format, "AppId", appid, 1715943329, "1590219412", []byte("push"))
				if err != nil {
					t.Fatal(err)
				}
				env, err := ScanEnvelope(body)
				if err != nil || env.Format != format || string(env.AppID) != appid || env.ToUserName != nil {
					t.Fatalf("%s: %+v, %v", body, env, err)
				}
				var b Buffers
				o, err := both.Open(&b, Params{sig, "1715943329", "1590219412"}, env.Encrypt)
				if err != nil {
					t.Fatal(err)
				}
				if o.TokenIndex() != test.tokenIndex || o.KeyIndex() != test.keyIndex {
					t.Errorf("token %d, key %d, want %d, %d", o.TokenIndex(), o.KeyIndex(), test.tokenIndex, test.keyIndex)
				}
				// Sealed by a later configuration that no longer has the old ones.
				later := mustCodec(t, appid, []string{"tokenNew"}, []string{keyB})
				dst := []byte("before")
				dst, err = later.AppendReply(dst, &b, o, format, 1715943330, "1590219412", o.Message)
				if err != nil {
					t.Fatal(err)
				}
				if string(o.Message) != "push" {
					t.Errorf("message is now %q", o.Message)
				}
				reply, ok := bytes.CutPrefix(dst, []byte("before"))
				if !ok {
					t.Fatal("dst was not appended to")
				}
				message, err := wechat.OpenReply(reply)
				if err != nil || string(message) != "push" {
					t.Errorf("WeChat reads %q, %v", message, err)
				}
			})
		}
	}
}

func TestAppendReplyWithoutOpened(t *testing.T) {
	t.Parallel()
	c := mustCodec(t, appid, []string{"tokenNew", "tokenOld"}, []string{keyB, keyA})
	reply, err := c.AppendReply(nil, new(Buffers), Opened{}, FormatXML, 1715943330, "1590219412", nil)
	if err != nil {
		t.Fatal(err)
	}
	message, err := mustCodec(t, appid, []string{"tokenNew"}, []string{keyB}).OpenReply(reply)
	if err != nil || len(message) != 0 {
		t.Errorf("%q, %v", message, err)
	}
}

// The random bytes are what keeps two equal replies from being equal on the wire.
func TestSealIsRandomized(t *testing.T) {
	t.Parallel()
	seen := make(map[[randomLength]byte]bool)
	for range 100 {
		r := newRandom()
		for _, c := range r {
			if !isBase64(c) || c == '+' || c == '/' {
				t.Fatalf("random byte %q is no letter or digit", c)
			}
		}
		seen[r] = true
	}
	if len(seen) != 100 {
		t.Errorf("%d of 100 differ", len(seen))
	}
}

func TestNewCodecRefuses(t *testing.T) {
	t.Parallel()
	good := []secret.String{secret.New("tokenA")}
	tests := []struct {
		name      string
		receiveID string
		tokens    []secret.String
		keys      []Key
		want      string
	}{
		{"receive id", "", good, nil, "receive id"},
		{"no token", appid, nil, nil, "no token"},
		{"empty token", appid, append(good, secret.String{}), nil, "token 2 is empty"},
		{"zero key", appid, good, []Key{mustKey(t, keyA), {}}, "aes key 2"},
	}
	for _, test := range tests {
		c, err := NewCodec(test.receiveID, test.tokens, test.keys)
		if c != nil || err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %v, want %q", test.name, err, test.want)
		}
	}
	// keyA spelt with other trailing bits.
	c := mustCodec(t, appid, []string{"a", "a", "b"}, []string{keyA, keyA[:42] + "E", keyB})
	if len(c.tokens) != 2 || len(c.keys) != 2 || c.ReceiveID() != appid {
		t.Errorf("%d tokens, %d keys, receive id %s", len(c.tokens), len(c.keys), c.ReceiveID())
	}
}

func TestParseKeyRefuses(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"empty":     "",
		"42":        keyA[:42],
		"44":        keyA + "A",
		"padded":    keyA + "=",
		"newline":   keyA[:42] + "\n",
		"url-safe":  "-" + keyA[1:],
		"padding":   keyA[:42] + "=",
		"not ASCII": keyA[:41] + "é",
		"space":     " " + keyA[1:],
	} {
		k, err := ParseKey(text)
		if err == nil || k.s != nil {
			t.Errorf("%s accepted", name)
			continue
		}
		if len(text) > 10 && strings.Contains(err.Error(), text[5:15]) || !strings.Contains(err.Error(), "want") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParseKey("+/AZaz09" + keyA[8:]); err != nil {
		t.Errorf("base64 alphabet: %v", err)
	}
	// The neighbours of the alphabet, at the first position and the last.
	for _, c := range []string{"*", ",", "-", ".", ":", "@", "[", "`", "{"} {
		for position, text := range map[int]string{1: c + keyA[1:], 43: keyA[:42] + c} {
			_, err := ParseKey(text)
			if want := (&KeyError{Length: 43, Position: position}).Error(); err == nil || err.Error() != want || !strings.Contains(want, "at position") {
				t.Errorf("%q at %d: %v", c, position, err)
			}
		}
	}
	if !(Key{}).Same(Key{}) || (Key{}).Same(mustKey(t, keyA)) || mustKey(t, keyB).Same(mustKey(t, keyA)) {
		t.Error("Same is wrong")
	}
}

func TestNothingSecretPrints(t *testing.T) {
	t.Parallel()
	const message = "<xml><Content>plainsecret</Content></xml>"
	c := mustCodec(t, appid, []string{"tokensecret"}, []string{keyA})
	var b Buffers
	body, sig, err := c.SealPush(&b, FormatXML, "AppId", appid, 1715943329, "1590219412", []byte(message))
	if err != nil {
		t.Fatal(err)
	}
	env, err := ScanEnvelope(body)
	if err != nil {
		t.Fatal(err)
	}
	o, err := c.Open(&b, Params{sig, "1715943329", "1590219412"}, env.Encrypt)
	if err != nil {
		t.Fatal(err)
	}
	var f Fields
	if err := ScanFields(o.Message, &f); err != nil {
		t.Fatal(err)
	}
	sealer, err := NewSealer(bytes.Repeat([]byte("s"), 32))
	if err != nil {
		t.Fatal(err)
	}
	type holder struct {
		codec *Codec
		key   Key
		buf   *Buffers
		seal  *Sealer
	}
	var out strings.Builder
	for _, v := range []any{c, *c, c.keys[0], &c.keys[0], o, &o, b, &b, f, &f, sealer, *sealer, holder{c, c.keys[0], &b, sealer}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%d"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		slog.New(slog.NewTextHandler(&out, nil)).Info("x", "v", v)
	}
	js, err := json.Marshal(map[string]any{"codec": c, "key": c.keys[0], "buffers": &b, "sealer": sealer})
	if err != nil {
		t.Fatal(err)
	}
	out.Write(js)
	text := out.String()
	for _, leak := range []string{
		"plainsecret", "tokensecret", "105 183 29 121", "69b71d79", "0x69, 0xb7", // the key's first bytes
		"112 108 97 105", "0x70, 0x6c, 0x61", "706c6169", "115 115 115 115", "73737373", "mac:", // "plai", "ssss"
	} {
		if strings.Contains(text, leak) {
			t.Errorf("%q printed", leak)
		}
	}
}

func TestConcurrentUse(t *testing.T) {
	t.Parallel()
	c := mustCodec(t, appid, []string{"tokenA", "tokenB"}, []string{keyB, keyA})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			var b Buffers
			for j := range 50 {
				message := bytes.Repeat([]byte{byte('a' + i)}, j*20)
				body, sig, err := c.SealPush(&b, FormatJSON, "ToUserName", "gh_1", 1715943329, "1590219412", message)
				if err != nil {
					t.Error(err)
					return
				}
				env, err := ScanEnvelope(body)
				if err != nil {
					t.Error(err)
					return
				}
				o, err := c.Open(&b, Params{sig, "1715943329", "1590219412"}, env.Encrypt)
				if err != nil || !bytes.Equal(o.Message, message) {
					t.Errorf("%v, %d bytes", err, len(o.Message))
					return
				}
			}
		})
	}
	wg.Wait()
}
