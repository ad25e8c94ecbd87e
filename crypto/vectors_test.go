package crypto

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/md5"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// messageVector is an entry of message_crypto.
type messageVector struct {
	ID             string `json:"id"`
	Kind           string `json:"kind"`
	Token          string `json:"token"`
	EncodingAESKey string `json:"encoding_aes_key"`
	AppID          string `json:"appid"`
	Timestamp      string `json:"timestamp"`
	Nonce          string `json:"nonce"`
	Encrypt        string `json:"encrypt"`
	MsgSignature   string `json:"msg_signature"`
	Random16       string `json:"random16"`
	Plaintext      string `json:"plaintext"`
	PlaintextBytes int    `json:"plaintext_bytes"`
	ReceiveID      string `json:"receive_id"`
	Pad            int    `json:"pkcs7_pad"`
	CipherBytes    int    `json:"cipher_bytes"`
	Envelope       string `json:"envelope"`
}

func loadVectors(tb testing.TB) map[string]json.RawMessage {
	tb.Helper()
	data, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		tb.Fatal(err)
	}
	return decode[map[string]json.RawMessage](tb, data)
}

func decode[T any](tb testing.TB, data []byte) (v T) {
	tb.Helper()
	if err := json.Unmarshal(data, &v); err != nil {
		tb.Fatal(err)
	}
	return v
}

func messageVectors(tb testing.TB) map[string]messageVector {
	tb.Helper()
	byID := make(map[string]messageVector)
	for _, v := range decode[[]messageVector](tb, loadVectors(tb)["message_crypto"]) {
		byID[v.ID] = v
	}
	return byID
}

// TestVectors walks the whole file, so that no section can be added to it without a check. WeChat Pay's signature, the
// mini program's rawData signature and the API's security mode are other protocols, which this package does not
// offer: their entries are checked by a computation of the test's own.
func TestVectors(t *testing.T) {
	t.Parallel()
	sections := map[string]func(*testing.T, json.RawMessage){
		"encoding_aes_keys":             testKeyVectors,
		"message_crypto":                testMessageVectors,
		"sorted_sha1":                   testSortedVectors,
		"jssdk_and_card":                testJSSDKVectors,
		"negative":                      testNegativeVectors,
		"pay_v2_sign":                   testPayVectors,
		"miniprogram_rawdata_signature": testRawDataVectors,
		"api_security_mode":             testSecurityModeVectors,
	}
	prose := []string{"$comment", "conventions"}
	file := loadVectors(t)
	for _, name := range slices.Sorted(maps.Keys(file)) {
		if slices.Contains(prose, name) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test, ok := sections[name]
			if !ok {
				t.Fatal("section without a test")
			}
			test(t, file[name])
		})
	}
	for name := range sections {
		if _, ok := file[name]; !ok {
			t.Errorf("section %s is gone", name)
		}
	}
}

func testKeyVectors(t *testing.T, section json.RawMessage) {
	for _, v := range decode[[]struct {
		Key       string `json:"encoding_aes_key"`
		Hex       string `json:"aes_key_hex"`
		IV        string `json:"iv_hex"`
		Canonical string `json:"canonical_43"`
	}](t, section) {
		k := mustKey(t, v.Key)
		if got := hex.EncodeToString(k.s.raw[:]); got != v.Hex {
			t.Errorf("%s: key %s, want %s", v.Key, got, v.Hex)
		}
		if got := hex.EncodeToString(k.s.iv()); got != v.IV {
			t.Errorf("%s: IV %s, want %s", v.Key, got, v.IV)
		}
		if !k.Same(mustKey(t, v.Canonical)) {
			t.Errorf("%s is not the same key as %s", v.Key, v.Canonical)
		}
		if got := base64.RawStdEncoding.EncodeToString(k.s.raw[:]); got != v.Canonical {
			t.Errorf("%s: encodes to %s, want %s", v.Key, got, v.Canonical)
		}
	}
}

func testMessageVectors(t *testing.T, section json.RawMessage) {
	for _, v := range decode[[]messageVector](t, section) {
		t.Run(v.ID, func(t *testing.T) {
			t.Parallel()
			if v.ReceiveID != "" && v.ReceiveID != v.AppID {
				t.Fatalf("receive id %s, appid %s", v.ReceiveID, v.AppID)
			}
			testCipher(t, v)
			if v.Token == "" { // a vector of the cipher alone
				if v.MsgSignature != "" || v.Envelope != "" {
					t.Fatal("signed without a token")
				}
				return
			}
			testSigned(t, v)
			switch {
			case v.Kind == "reply":
				testReply(t, v)
			case v.Envelope != "":
				testEnvelope(t, v)
			}
		})
	}
}

// testCipher checks both directions of base64, cipher, padding and layout.
func testCipher(t *testing.T, v messageVector) {
	t.Helper()
	var b Buffers
	k := mustKey(t, v.EncodingAESKey)
	text, err := b.decode([]byte(v.Encrypt))
	if err != nil {
		t.Fatal(err)
	}
	if v.CipherBytes != 0 && len(text) != v.CipherBytes {
		t.Errorf("cipher text of %d bytes, want %d", len(text), v.CipherBytes)
	}
	message, err := b.open(k.s, text, v.AppID)
	if err != nil {
		t.Fatal(err)
	}
	if string(message) != v.Plaintext {
		t.Errorf("opened %q, want %q", message, v.Plaintext)
	}
	if v.PlaintextBytes != 0 && len(message) != v.PlaintextBytes {
		t.Errorf("message of %d bytes, want %d", len(message), v.PlaintextBytes)
	}
	if got := string(b.plain[:randomLength]); got != v.Random16 {
		t.Errorf("random bytes %q, want %q", got, v.Random16)
	}
	if got := int(b.plain[len(b.plain)-1]); got != v.Pad {
		t.Errorf("padding %d, want %d", got, v.Pad)
	}
	sealed, err := b.seal(nil, k.s, [randomLength]byte([]byte(v.Random16)), v.AppID, []byte(v.Plaintext))
	if err != nil {
		t.Fatal(err)
	}
	if string(sealed) != v.Encrypt {
		t.Errorf("sealed %s, want %s", sealed, v.Encrypt)
	}
}

// testSigned checks both directions of msg_signature, and the whole of Open.
func testSigned(t *testing.T, v messageVector) {
	t.Helper()
	c := vectorCodec(t, v)
	var b Buffers
	if got := string(b.sign(nil, secret.New(v.Token), v.Timestamp, v.Nonce, []byte(v.Encrypt))); got != v.MsgSignature {
		t.Errorf("signed %s, want %s", got, v.MsgSignature)
	}
	o, err := c.Open(&b, vectorParams(v), []byte(v.Encrypt))
	if err != nil {
		t.Fatal(err)
	}
	if string(o.Message) != v.Plaintext {
		t.Errorf("opened %q, want %q", o.Message, v.Plaintext)
	}
}

// testReply writes the reply of a worked example again, to the byte where the example shows its envelope.
func testReply(t *testing.T, v messageVector) {
	t.Helper()
	c := vectorCodec(t, v)
	timestamp, err := strconv.ParseInt(v.Timestamp, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	format, want := FormatXML, "<xml><Encrypt><![CDATA["+v.Encrypt+"]]></Encrypt><MsgSignature><![CDATA["+v.MsgSignature+
		"]]></MsgSignature><TimeStamp>"+v.Timestamp+"</TimeStamp><Nonce><![CDATA["+v.Nonce+"]]></Nonce></xml>"
	if v.Envelope != "" {
		format, want = FormatJSON, v.Envelope
	}
	var b Buffers
	got, err := appendReply(nil, &b, Opened{by: c}, [randomLength]byte([]byte(v.Random16)), format, timestamp, v.Nonce, []byte(v.Plaintext))
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want {
		t.Errorf("reply\n%s, want\n%s", got, want)
	}
	message, err := c.OpenReply([]byte(want))
	if err != nil || string(message) != v.Plaintext {
		t.Errorf("OpenReply: %q, %v", message, err)
	}
}

// testEnvelope reads a push's body, and writes it again.
func testEnvelope(t *testing.T, v messageVector) {
	t.Helper()
	env, err := ScanEnvelope([]byte(v.Envelope))
	if err != nil {
		t.Fatal(err)
	}
	if string(env.Encrypt) != v.Encrypt {
		t.Errorf("Encrypt %q, want %q", env.Encrypt, v.Encrypt)
	}
	var inner Fields
	if err := ScanFields([]byte(v.Plaintext), &inner); err != nil {
		t.Fatal(err)
	}
	if inner.Format != env.Format {
		t.Errorf("%v inside %v", inner.Format, env.Format)
	}
	idName, id := "ToUserName", env.ToUserName
	if id == nil {
		idName, id = "AppId", env.AppID
	}
	if want := append(inner.ToUserName, inner.AppID...); !bytes.Equal(id, want) { //nolint:gocritic // one is nil
		t.Errorf("id %q outside, %q inside", id, want)
	}
	timestamp, err := strconv.ParseInt(v.Timestamp, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	body, signature, err := vectorCodec(t, v).sealPush(new(Buffers), [randomLength]byte([]byte(v.Random16)), env.Format,
		idName, string(id), timestamp, v.Nonce, []byte(v.Plaintext))
	if err != nil {
		t.Fatal(err)
	}
	if signature != v.MsgSignature {
		t.Errorf("signature %s, want %s", signature, v.MsgSignature)
	}
	again, err := ScanEnvelope(body)
	if err != nil || !bytes.Equal(again.Encrypt, env.Encrypt) || !bytes.Equal(again.ToUserName, env.ToUserName) || !bytes.Equal(again.AppID, env.AppID) {
		t.Errorf("wrote %s, read %v", body, err)
	}
}

func testSortedVectors(t *testing.T, section json.RawMessage) {
	for _, v := range decode[[]struct {
		ID       string   `json:"id"`
		Inputs   []string `json:"inputs"`
		Expected string   `json:"expected"`
		Echostr  string   `json:"echostr"`
		Reply    string   `json:"reply"`
		Body     string   `json:"body"`
	}](t, section) {
		t.Run(v.ID, func(t *testing.T) {
			t.Parallel()
			if v.Echostr != v.Reply {
				t.Errorf("reply %s to echostr %s", v.Reply, v.Echostr)
			}
			if v.Body != "" {
				var f Fields
				if err := ScanFields([]byte(v.Body), &f); err != nil || string(f.Event) != "debug_demo" {
					t.Errorf("body: %v, event %q", err, f.Event)
				}
			}
			c := mustCodec(t, "wx", v.Inputs[:1], nil)
			switch in := v.Inputs; len(in) {
			case 3:
				if got := c.Signature(in[1], in[2]); got != v.Expected {
					t.Errorf("signature %s, want %s", got, v.Expected)
				}
				if !c.VerifySignature(v.Expected, in[1], in[2]) {
					t.Error("not verified")
				}
			case 4:
				if got := string(new(Buffers).sign(nil, secret.New(in[0]), in[1], in[2], []byte(in[3]))); got != v.Expected {
					t.Errorf("signature %s, want %s", got, v.Expected)
				}
				want, ok := parseSignature(v.Expected)
				if _, _, ok2 := matchToken(nil, c.tokens, want, in[1], in[2], []byte(in[3])); !ok || !ok2 {
					t.Error("not verified")
				}
			default:
				t.Fatalf("%d inputs", len(in))
			}
		})
	}
}

func testJSSDKVectors(t *testing.T, section json.RawMessage) {
	for _, v := range decode[[]struct {
		ID           string   `json:"id"`
		Ticket       string   `json:"jsapi_ticket"`
		Nonce        string   `json:"noncestr"`
		Timestamp    string   `json:"timestamp"`
		URL          string   `json:"url"`
		StringToSign string   `json:"string_to_sign"`
		Inputs       []string `json:"inputs"`
		Signature    string   `json:"signature"`
	}](t, section) {
		if v.Ticket == "" {
			if got := CardSignature(v.Inputs...); got != v.Signature || len(v.Inputs) == 0 {
				t.Errorf("%s: %s, want %s", v.ID, got, v.Signature)
			}
			continue
		}
		timestamp, err := strconv.ParseInt(v.Timestamp, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		for _, url := range []string{v.URL, v.URL + "#", v.URL + "#a#b"} {
			if got := JSSDKSignature(v.Ticket, v.Nonce, timestamp, url); got != v.Signature {
				t.Errorf("%s: %s: %s, want %s", v.ID, url, got, v.Signature)
			}
		}
		if sum := sha1.Sum([]byte(v.StringToSign)); hex.EncodeToString(sum[:]) != v.Signature {
			t.Errorf("%s: string to sign does not give the signature", v.ID)
		}
	}
}

func testNegativeVectors(t *testing.T, section json.RawMessage) {
	base := messageVectors(t)["official-doc-component-safe"]
	tests := map[string]func(*testing.T){
		"neg-bad-msg-signature": func(t *testing.T) {
			for i := range base.MsgSignature {
				p := vectorParams(base)
				digit := byte('0')
				if p.MsgSignature[i] == digit {
					digit = '1'
				}
				p.MsgSignature = p.MsgSignature[:i] + string(digit) + p.MsgSignature[i+1:]
				_, err := vectorCodec(t, base).Open(new(Buffers), p, []byte(base.Encrypt))
				wantErr(t, err, ErrSignature)
			}
		},
		"neg-signature-instead-of-msg_signature": func(t *testing.T) {
			c := vectorCodec(t, base)
			const signature = "cc0c594499c1634947d5b502f158ee518947db27"
			if !c.VerifySignature(signature, base.Timestamp, base.Nonce) {
				t.Fatal("the plain signature of the example does not fit")
			}
			for _, s := range []string{signature, ""} {
				p := vectorParams(base)
				p.MsgSignature = s
				_, err := c.Open(new(Buffers), p, []byte(base.Encrypt))
				wantErr(t, err, ErrSignature)
			}
		},
		"neg-wrong-receive-id": func(t *testing.T) {
			v := base
			v.AppID = "wxba5fad812f8e6fb9"
			_, err := vectorCodec(t, v).Open(new(Buffers), vectorParams(v), []byte(v.Encrypt))
			wantErr(t, err, ErrReceiveID)
			wantErr(t, err, ErrDecrypt)
		},
		"neg-key-42-chars": func(t *testing.T) {
			for _, key := range []string{base.EncodingAESKey[:42], base.EncodingAESKey + "A"} {
				if _, err := ParseKey(key); err == nil {
					t.Errorf("key of %d characters accepted", len(key))
				}
			}
		},
		"neg-truncated-cipher": func(t *testing.T) {
			raw, err := base64.StdEncoding.DecodeString(base.Encrypt)
			if err != nil {
				t.Fatal(err)
			}
			for _, text := range []string{
				base.Encrypt[:len(base.Encrypt)-4],
				base64.StdEncoding.EncodeToString(raw[:len(raw)-16]),
				base64.StdEncoding.EncodeToString(raw[:len(raw)-32]),
			} {
				wantErr(t, openText(t, base, text), ErrDecrypt)
			}
		},
		"neg-doctype": func(t *testing.T) {
			for _, doctype := range []string{`<!DOCTYPE xml>`, `<!DOCTYPE xml [<!ENTITY x SYSTEM "file:///etc/hostname">]>`} {
				_, err := ScanEnvelope([]byte(doctype + base.Envelope))
				wantErr(t, err, errMarkup)
			}
			_, err := ScanEnvelope([]byte(`<xml><Encrypt>&x;</Encrypt></xml>`))
			wantErr(t, err, errEntity)
		},
		"neg-pad-0-or-33": func(t *testing.T) {
			for _, pad := range []byte{0, 33, 255} {
				plain := layout("message", uint32(len("message")), base.AppID)
				for i := len(plain) - int(plain[len(plain)-1]); i < len(plain); i++ {
					plain[i] = pad
				}
				wantErr(t, openPlain(t, base, plain), ErrDecrypt)
			}
		},
	}
	for _, v := range decode[[]struct {
		ID   string `json:"id"`
		Base string `json:"base"`
	}](t, section) {
		test, ok := tests[v.ID]
		if !ok || v.Base != "" && v.Base != base.ID {
			t.Errorf("%s on %s: no test", v.ID, v.Base)
			continue
		}
		delete(tests, v.ID)
		t.Run(v.ID, test)
	}
	for id := range tests {
		t.Errorf("%s is gone", id)
	}
}

func testPayVectors(t *testing.T, section json.RawMessage) {
	for _, v := range decode[[]struct {
		ID           string            `json:"id"`
		Params       map[string]string `json:"params"`
		Key          string            `json:"api_key"`
		StringToSign string            `json:"string_to_sign"`
		MD5          string            `json:"sign_md5"`
		HMAC         string            `json:"sign_hmac_sha256"`
	}](t, section) {
		var text strings.Builder
		for _, name := range slices.Sorted(maps.Keys(v.Params)) {
			text.WriteString(name + "=" + v.Params[name] + "&")
		}
		text.WriteString("key=" + v.Key)
		if text.String() != v.StringToSign {
			t.Errorf("%s: string to sign %q", v.ID, text.String())
		}
		sum := md5.Sum([]byte(text.String()))
		mac := hmac.New(sha256.New, []byte(v.Key))
		mac.Write([]byte(text.String()))
		if got := strings.ToUpper(hex.EncodeToString(sum[:])); got != v.MD5 {
			t.Errorf("%s: MD5 %s, want %s", v.ID, got, v.MD5)
		}
		if got := strings.ToUpper(hex.EncodeToString(mac.Sum(nil))); got != v.HMAC {
			t.Errorf("%s: HMAC %s, want %s", v.ID, got, v.HMAC)
		}
	}
}

func testRawDataVectors(t *testing.T, section json.RawMessage) {
	file := decode[struct {
		Vectors []struct {
			RawData    string `json:"raw_data"`
			SessionKey string `json:"session_key"`
			Signature  string `json:"signature"`
		} `json:"vectors"`
	}](t, section)
	if len(file.Vectors) == 0 {
		t.Error("no entries")
	}
	for i, v := range file.Vectors {
		if sum := sha1.Sum([]byte(v.RawData + v.SessionKey)); hex.EncodeToString(sum[:]) != v.Signature {
			t.Errorf("entry %d: %x, want %s", i, sum, v.Signature)
		}
	}
}

// testSecurityModeVectors checks the cipher in both directions and the signature in the one for which there is a key.
func testSecurityModeVectors(t *testing.T, section json.RawMessage) {
	for _, v := range decode[[]struct {
		ID           string `json:"id"`
		Key          []byte `json:"sym_key_base64"`
		AAD          string `json:"aad"`
		IV           []byte `json:"iv"`
		Data         []byte `json:"data"`
		Tag          []byte `json:"authtag"`
		Plaintext    string `json:"plaintext"`
		PostBody     string `json:"post_body"`
		StringToSign string `json:"string_to_sign"`
		Signature    []byte `json:"signature"`
		Certificate  string `json:"platform_certificate_pem"`
		PublicKey    string `json:"public_key_pem"`
	}](t, section) {
		t.Run(v.ID, func(t *testing.T) {
			t.Parallel()
			block, err := aes.NewCipher(v.Key)
			if err != nil {
				t.Fatal(err)
			}
			gcm, err := cipher.NewGCM(block)
			if err != nil {
				t.Fatal(err)
			}
			sealed := slices.Concat(v.Data, v.Tag)
			plaintext, err := gcm.Open(nil, v.IV, sealed, []byte(v.AAD))
			if err != nil || string(plaintext) != v.Plaintext {
				t.Errorf("opened %q, %v", plaintext, err)
			}
			if got := gcm.Seal(nil, v.IV, []byte(v.Plaintext), []byte(v.AAD)); !bytes.Equal(got, sealed) {
				t.Errorf("sealed %x, want %x", got, sealed)
			}
			if !strings.HasSuffix(v.StringToSign, "\n"+v.PostBody) {
				t.Error("the body is not what was signed")
			}
			digest := sha256.Sum256([]byte(v.StringToSign))
			if err := rsa.VerifyPSS(rsaKey(t, v.Certificate, v.PublicKey), crypto.SHA256, digest[:], v.Signature, nil); err != nil {
				t.Error(err)
			}
		})
	}
}

func rsaKey(t *testing.T, certificate, publicKey string) *rsa.PublicKey {
	t.Helper()
	var key any
	if certificate != "" {
		block, _ := pem.Decode([]byte(certificate))
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		key = cert.PublicKey
	} else {
		block, _ := pem.Decode([]byte(publicKey))
		var err error
		if key, err = x509.ParsePKIXPublicKey(block.Bytes); err != nil {
			t.Fatal(err)
		}
	}
	rsaKey, ok := key.(*rsa.PublicKey)
	if !ok {
		t.Fatalf("key is a %T", key)
	}
	return rsaKey
}

func mustKey(tb testing.TB, text string) Key {
	tb.Helper()
	k, err := ParseKey(text)
	if err != nil {
		tb.Fatal(err)
	}
	return k
}

func mustCodec(tb testing.TB, receiveID string, tokens, keys []string) *Codec {
	tb.Helper()
	var ts []secret.String
	for _, t := range tokens {
		ts = append(ts, secret.New(t))
	}
	var ks []Key
	for _, k := range keys {
		ks = append(ks, mustKey(tb, k))
	}
	c, err := NewCodec(receiveID, ts, ks)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

func vectorCodec(tb testing.TB, v messageVector) *Codec {
	tb.Helper()
	return mustCodec(tb, v.AppID, []string{v.Token}, []string{v.EncodingAESKey})
}

func vectorParams(v messageVector) Params { return Params{v.MsgSignature, v.Timestamp, v.Nonce} }

func wantErr(tb testing.TB, err, want error) {
	tb.Helper()
	if !errors.Is(err, want) {
		tb.Errorf("error %v, want %v", err, want)
	}
}
