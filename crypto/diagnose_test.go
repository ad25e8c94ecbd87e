package crypto

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// TestDiagnose: each of token, key, receive id and base64 is judged by itself.
func TestDiagnose(t *testing.T) {
	t.Parallel()
	const keyA, keyB = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG", "jWmYm7qr5nMoAUwZRjGtBxmz3KA1tkAj3ykkR6q2B2C"
	codec := func(id string, tokens []string, keys ...string) *Codec {
		t.Helper()
		var secrets []secret.String
		for _, s := range tokens {
			secrets = append(secrets, secret.New(s))
		}
		var parsed []Key
		for _, s := range keys {
			k, err := ParseKey(s)
			if err != nil {
				t.Fatal(err)
			}
			parsed = append(parsed, k)
		}
		c, err := NewCodec(id, secrets, parsed)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	const message = "<xml><MsgType>text</MsgType></xml>"
	var b Buffers
	sent := codec("wx1", []string{"right"}, keyA)
	body, signature, err := sent.SealPush(&b, FormatXML, "ToUserName", "gh_1", 1700000000, "1", []byte(message))
	if err != nil {
		t.Fatal(err)
	}
	env, err := ScanEnvelope(body)
	if err != nil {
		t.Fatal(err)
	}
	params := Params{signature, "1700000000", "1"}
	for _, tt := range []struct {
		name    string
		codec   *Codec
		params  Params
		encrypt string
		token   int
		encoded bool
		key     int
		id      string
	}{
		{"right", sent, params, "", 0, true, 0, "wx1"},
		{"right, the older ones", codec("wx1", []string{"new", "right"}, keyB, keyA), params, "", 1, true, 1, "wx1"},
		{"wrong token", codec("wx1", []string{"wrong"}, keyA), params, "", -1, true, 0, "wx1"},
		{"wrong key", codec("wx1", []string{"right"}, keyB), params, "", 0, true, -1, ""},
		{"no key", codec("wx1", []string{"right"}), params, "", 0, true, -1, ""},
		{"for another", codec("wx2", []string{"right"}, keyA), params, "", 0, true, 0, "wx1"},
		{"signature cut", sent, Params{signature[1:], "1700000000", "1"}, "", -1, true, 0, "wx1"},
		{"another nonce", sent, Params{signature, "1700000000", "2"}, "", -1, true, 0, "wx1"},
		{"base64 cut", sent, params, string(env.Encrypt[:len(env.Encrypt)-1]), -1, false, -1, ""},
		{"half a block", sent, params, strings.Repeat("AAAA", 4), -1, false, -1, ""},
		{"a block of AES's", sent, params, strings.Repeat("AAAA", 5) + "AA==", -1, false, -1, ""},
		{"one block", sent, params, strings.Repeat("AAAA", 10) + "AAA=", -1, true, -1, ""},
	} {
		encrypt := env.Encrypt
		if tt.encrypt != "" {
			encrypt = []byte(tt.encrypt)
		}
		d := tt.codec.Diagnose(&b, tt.params, encrypt)
		if d.Token != tt.token || d.Encoded != tt.encoded || d.Key != tt.key || d.ReceiveID != tt.id {
			t.Errorf("%s: token %d, encoded %v, key %d, id %q", tt.name, d.Token, d.Encoded, d.Key, d.ReceiveID)
		}
		if tt.key >= 0 && string(d.Message) != message {
			t.Errorf("%s: another message", tt.name)
		}
		if text := fmt.Sprintf("%v %+v %#v %s", d, d, d, d); strings.Contains(text, "text") {
			t.Errorf("%s: it prints: %s", tt.name, text)
		}
	}
}

func TestIsID(t *testing.T) {
	t.Parallel()
	for id, want := range map[string]bool{
		"wx1111111111111111": true, "ww-corp_1": true, "": false, "a/b": false, "a+b": false, "wx@": false, "\x01wx": false,
		strings.Repeat("x", 64): true, strings.Repeat("x", 65): false,
	} {
		if isID([]byte(id)) != want {
			t.Errorf("%q: want %v", id, want)
		}
	}
}

func TestFieldNames(t *testing.T) {
	t.Parallel()
	for message, want := range map[string][]string{
		"<xml><A>1</A><B><C>2</C></B></xml>": {"A", "B"},
		`{"A":1,"B":{"C":2}}`:                {"A", "B"},
		"<xml><A>1</A>":                      nil,
	} {
		got, err := FieldNames([]byte(message))
		if !slices.Equal(got, want) || (err == nil) != (want != nil) {
			t.Errorf("%s: %q %v", message, got, err)
		}
	}
}
