package crypto

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"strings"
	"testing"
)

// TestReplyIsWellFormed reads replies with the standard library's parsers, nonces that WeChat does not send among them.
func TestReplyIsWellFormed(t *testing.T) {
	t.Parallel()
	c := mustCodec(t, appid, []string{"tokenA"}, []string{keyA})
	for _, nonce := range []string{
		"1590219412", "", "a]]>b", "]]>", "]]]>>", "]]", "<&>\"'", `back\slash`, "é中😀", "tab\there", "line\nbreak",
	} {
		for _, format := range []Format{FormatXML, FormatJSON} {
			reply, err := c.AppendReply(nil, new(Buffers), Opened{}, format, 1715943330, nonce, []byte("hello"))
			if err != nil {
				t.Errorf("%v %q: %v", format, nonce, err)
				continue
			}
			var v struct {
				XMLName                      xml.Name `json:"-"`
				Encrypt, MsgSignature, Nonce string
				TimeStamp                    int64
			}
			if format == FormatJSON {
				err = json.Unmarshal(reply, &v)
			} else {
				err = xml.Unmarshal(reply, &v)
			}
			if err != nil || v.Nonce != nonce || v.TimeStamp != 1715943330 || len(v.Encrypt) != 88 || len(v.MsgSignature) != 40 {
				t.Errorf("%v %q: %+v, %v", format, nonce, v, err)
			}
			if nonce == "" {
				_, err := c.OpenReply(reply)
				wantErr(t, err, errReply)
				continue
			}
			message, err := c.OpenReply(reply)
			if err != nil || string(message) != "hello" {
				t.Errorf("%v %q: opened %q, %v", format, nonce, message, err)
			}
		}
	}
}

// TestReplyEscapesControls: JSON can carry what XML cannot, as long as it is escaped.
func TestReplyEscapesControls(t *testing.T) {
	t.Parallel()
	c := mustCodec(t, appid, []string{"tokenA"}, []string{keyA})
	for r := range rune(' ' + 1) {
		reply, err := c.AppendReply(nil, new(Buffers), Opened{}, FormatJSON, 1715943330, "a"+string(r), []byte("hello"))
		if err != nil {
			t.Errorf("%U: %v", r, err)
			continue
		}
		var v struct{ Nonce string }
		if err := json.Unmarshal(reply, &v); err != nil || v.Nonce != "a"+string(r) {
			t.Errorf("%U: %q, %v", r, v.Nonce, err)
		}
	}
}

func TestSealRefuses(t *testing.T) {
	t.Parallel()
	c := mustCodec(t, appid, []string{"tokenA"}, []string{keyA})
	plain := mustCodec(t, appid, []string{"tokenA"}, nil)
	tests := []struct {
		name   string
		codec  *Codec
		format Format
		idName string
		id     string
		nonce  string
		want   error
	}{
		{"no key", plain, FormatXML, "AppId", "wx", "1", errNoKey},
		{"id element", c, FormatXML, "appid", "wx", "1", errIDName},
		{"control character", c, FormatXML, "AppId", "w\x01x", "\x01", errUnwritable},
		{"carriage return", c, FormatXML, "AppId", "w\rx", "\r", errUnwritable},
		{"not UTF-8 in XML", c, FormatXML, "AppId", "w\xffx", "\xff", errUnwritable},
		{"not UTF-8 in JSON", c, FormatJSON, "AppId", "w\xffx", "\xff", errUnwritable},
		{"long nonce", c, FormatJSON, "AppId", "wx", strings.Repeat("1", maxParam+1), errUnwritable},
	}
	for _, test := range tests {
		body, sig, err := test.codec.SealPush(new(Buffers), test.format, test.idName, test.id, 1715943329, test.nonce, []byte("hello"))
		wantErr(t, err, test.want)
		if body != nil || sig != "" {
			t.Errorf("%s: a push beside the error", test.name)
		}
		if test.want == errIDName { //nolint:errorlint // our table
			continue
		}
		dst, err := test.codec.AppendReply([]byte("before"), new(Buffers), Opened{}, test.format, 1715943329, test.nonce, []byte("hello"))
		wantErr(t, err, test.want)
		if string(dst) != "before" {
			t.Errorf("%s: dst is %q", test.name, dst)
		}
	}
}

func TestSealPushEscapesID(t *testing.T) {
	t.Parallel()
	c := mustCodec(t, appid, []string{"tokenA"}, []string{keyA})
	for _, format := range []Format{FormatXML, FormatJSON} {
		for _, id := range []string{"gh_1", "", "]]>", `"\`} {
			body, _, err := c.SealPush(new(Buffers), format, "ToUserName", id, 1715943329, "1", nil)
			if err != nil {
				t.Fatal(err)
			}
			if env, err := ScanEnvelope(body); err != nil || string(env.ToUserName) != id {
				t.Errorf("%v %q: %q, %v", format, id, env.ToUserName, err)
			}
		}
	}
}

func TestOpenReplyRefuses(t *testing.T) {
	t.Parallel()
	c := mustCodec(t, appid, []string{"tokenA"}, []string{keyA})
	reply, err := c.AppendReply(nil, new(Buffers), Opened{}, FormatXML, 1715943330, "1590219412", []byte("hello"))
	if err != nil {
		t.Fatal(err)
	}
	replace := func(old, text string) []byte {
		if !bytes.Contains(reply, []byte(old)) {
			t.Fatalf("no %q in the reply", old)
		}
		return bytes.Replace(reply, []byte(old), []byte(text), 1)
	}
	tests := []struct {
		name string
		body []byte
		want error
	}{
		{"success", []byte("success"), errUnknown},
		{"empty", nil, errUnknown},
		{"plain message", []byte("<xml><Content>x</Content></xml>"), errNoEncrypt},
		{"no signature", replace("MsgSignature><![CDATA[", "Other><![CDATA["), ErrEnvelope},
		{"other nonce", replace("1590219412", "1590219413"), ErrSignature},
		{"other timestamp", replace("1715943330", "1715943331"), ErrSignature},
		{"duplicate", replace("</xml>", "<Nonce>1590219412</Nonce></xml>"), errDuplicate},
		{"empty Encrypt", []byte("<xml><Encrypt/><MsgSignature>b</MsgSignature><TimeStamp>1</TimeStamp><Nonce>c</Nonce></xml>"), errNoEncrypt},
		{"without signature", []byte("<xml><Encrypt>a</Encrypt><TimeStamp>1</TimeStamp><Nonce>c</Nonce></xml>"), errReply},
		{"without timestamp", []byte("<xml><Encrypt>a</Encrypt><MsgSignature>b</MsgSignature><Nonce>c</Nonce></xml>"), errReply},
	}
	for _, test := range tests {
		message, err := c.OpenReply(test.body)
		if message != nil {
			t.Errorf("%s: a message", test.name)
		}
		t.Run(test.name, func(t *testing.T) { wantErr(t, err, test.want) })
	}
	_, err = mustCodec(t, "wx2222222222222222", []string{"tokenA"}, []string{keyA}).OpenReply(reply)
	wantErr(t, err, ErrReceiveID)
}

func TestBuffersGrowOnce(t *testing.T) {
	t.Parallel()
	c := mustCodec(t, appid, []string{"tokenA"}, []string{keyA})
	b := new(Buffers)
	if b.Cap() != 0 {
		t.Errorf("empty buffers hold %d bytes", b.Cap())
	}
	large := make([]byte, 100_000)
	if _, _, err := c.SealPush(b, FormatXML, "AppId", appid, 1, "1", large); err != nil {
		t.Fatal(err)
	}
	b.plain = resize(b.plain, len(large)) // as Open has it
	held := b.Cap()
	if held != cap(b.join)+cap(b.work)+cap(b.plain) || cap(b.join) < len(large) || cap(b.work) < len(large) {
		t.Errorf("buffers of %d, %d and %d bytes hold %d", cap(b.join), cap(b.work), cap(b.plain), held)
	}
	if held < len(large) {
		t.Errorf("buffers hold %d bytes", held)
	}
	if _, _, err := c.SealPush(b, FormatXML, "AppId", appid, 1, "1", large[:10]); err != nil {
		t.Fatal(err)
	}
	if b.Cap() != held {
		t.Errorf("buffers hold %d bytes, then %d", held, b.Cap())
	}
}
