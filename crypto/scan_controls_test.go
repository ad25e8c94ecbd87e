package crypto

import (
	"testing"
)

// WeChat escapes no control character that a user has typed, nor any other that XML forbids, and puts it into CDATA; in compatible mode it
// stands beside Encrypt too.
func TestScanControls(t *testing.T) {
	t.Parallel()
	const rest = "<ToUserName><![CDATA[gh_1]]></ToUserName><MsgType><![CDATA[text]]></MsgType><MsgId>7</MsgId>"
	for name, message := range map[string]string{
		"alone":            "<xml>" + rest + "<Content><![CDATA[ \x1dc\x02\x01\x1f你\U0001f600]]></Content></xml>",
		"with lines":       "<xml>" + rest + "<Content><![CDATA[ \x1dc\x02\x01\x1f你\U0001f600]]><!-- a\r\n --></Content>\r\n</xml>",
		"with U+FFFD":      "<xml><Label><![CDATA[\ufffd\x10]]></Label>" + rest + "<Content><![CDATA[ \x1dc\x02\x01\x1f你\U0001f600]]></Content></xml>",
		"in another field": "<xml><Label><![CDATA[\x10]]></Label>" + rest + "<Content> <![CDATA[\x1dc\x02\x01\x1f你\U0001f600]]></Content></xml>",
		"a noncharacter":   "<xml><Label><![CDATA[\uffff\ufffe]]></Label>" + rest + "<Content><![CDATA[ \x1dc\x02\x01\x1f你\U0001f600]]></Content></xml>",
		"below a field":    "<xml><a><b><![CDATA[\x10\x1e]]></b></a>" + rest + "<Content><![CDATA[ \x1dc]]><![CDATA[\x02\x01\x1f你\U0001f600]]></Content></xml>",
	} {
		var f Fields
		if err := ScanFields([]byte(message), &f); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if got, want := fieldsText(&f), "ToUserName=gh_1;MsgType=text;Content= \x1dc\x02\x01\x1f你\U0001f600;MsgID=7;"; got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	var f Fields
	if err := ScanFields([]byte("<xml>"+rest+"<Content><![CDATA[a\ufffe\uffff]]></Content></xml>"), &f); err != nil || string(f.Content) != "a\ufffe\uffff" {
		t.Errorf("noncharacters alone: %q, %v", f.Content, err)
	}
	env, err := ScanEnvelope([]byte("<xml><ToUserName>gh_1</ToUserName><Content><![CDATA[ \x1dc\uffff]]></Content><Encrypt><![CDATA[QQ==]]></Encrypt></xml>"))
	if err != nil || string(env.Encrypt) != "QQ==" || string(env.ToUserName) != "gh_1" {
		t.Errorf("compatible mode: %+v, %v", env, err)
	}
}

// Nowhere else are they taken, nor is anything else that XML forbids.
func TestScanControlsRefuses(t *testing.T) {
	t.Parallel()
	const ok = "<Content><![CDATA[\x1d]]></Content>"
	for name, message := range map[string]string{
		"NUL":                     "<xml><Content><![CDATA[a\x00]]></Content></xml>",
		"noncharacter, outside":   "<xml><Content>a\uffff</Content></xml>",
		"noncharacter, comment":   "<xml><!-- \ufffe -->" + ok + "</xml>",
		"noncharacter, word":      "<xml><MsgType><![CDATA[text\uffff]]></MsgType></xml>",
		"noncharacter, sender":    "<xml>" + ok + "<FromUserName><![CDATA[o\ufffe]]></FromUserName></xml>",
		"noncharacter, tag":       "<xml><a\uffff></a>" + ok + "</xml>",
		"noncharacter, by number": "<xml>" + ok + "<Label>&#xffff;</Label></xml>",
		"invalid UTF-8":           "<xml><Content><![CDATA[\x1d\xff]]></Content></xml>",
		"cut UTF-8":               "<xml>" + ok + "<Label>\xe4\xb8</Label></xml>",
		"surrogate":               "<xml>" + ok + "<Label>\xed\xa0\x80</Label></xml>",
		"outside of CDATA":        "<xml><Content>a\x1d</Content></xml>",
		"beside CDATA":            "<xml><Content><![CDATA[\x1d]]>\x1d</Content></xml>",
		"skipped, outside":        "<xml>" + ok + "<Label>a\x1d</Label></xml>",
		"in a comment":            "<xml><!-- \x1d -->" + ok + "</xml>",
		"in a field's comment":    "<xml><Content><!-- \x1d --></Content></xml>",
		"in a tag":                "<xml><a\x1d></a>" + ok + "</xml>",
		"in an end tag":           "<xml><a></a\x1d>" + ok + "</xml>",
		"between fields":          "<xml>\x1d" + ok + "</xml>",
		"before":                  "\x1d<xml>" + ok + "</xml>",
		"after":                   "<xml>" + ok + "</xml>\x1d",
		"in the declaration":      "<?xml version=\"1.0\"\x1d?><xml>" + ok + "</xml>",
		"in a word of WeChat's":   "<xml><MsgType><![CDATA[text\x1d]]></MsgType></xml>",
		"in an id":                "<xml>" + ok + "<MsgId><![CDATA[7\x1d]]></MsgId></xml>",
		"in a sender":             "<xml>" + ok + "<FromUserName><![CDATA[o\x1d]]></FromUserName></xml>",
		"by number":               "<xml>" + ok + "<Label>&#29;</Label></xml>",
		"in an Encrypt unopened":  "<xml>" + ok + "<Encrypt><![CDATA[Q\x1d==]]></Encrypt></xml>",
		"JSON, which escapes one": "{\"Content\":\"a\x1d\"}",
	} {
		var f Fields
		wantErr(t, ScanFields([]byte(message), &f), ErrEnvelope)
		if got := fieldsText(&f); got != "" {
			t.Errorf("%s: fields left: %q", name, got)
		}
	}
	for _, body := range []string{
		"<xml>" + ok + "<Encrypt><![CDATA[Q\x1d==]]></Encrypt></xml>",
		"<xml>" + ok + "<Encrypt>QQ==</Encrypt><ToUserName><![CDATA[gh\x1d]]></ToUserName></xml>",
		"<xml>" + ok + "<Encrypt>QQ==</Encrypt><AppId><![CDATA[wx\x1d]]></AppId></xml>",
	} {
		if _, err := ScanEnvelope([]byte(body)); err != errEncoding { //nolint:errorlint // our own value
			t.Errorf("%q: %v", body, err)
		}
	}
	if _, err := ScanElements([]byte("<xml>"+ok+"</xml>"), FormatXML, "Content"); err != errEncoding { //nolint:errorlint // our own value
		t.Errorf("of a reply: %v", err)
	}
}
