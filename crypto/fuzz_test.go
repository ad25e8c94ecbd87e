package crypto

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"testing"
)

// What is fuzzed for agreement: whenever our scanner accepts, the standard library's parser accepts too and reads the
// same values. The reverse does not hold, ours being the stricter.

// picture puts a character of its own in the place of each that XML forbids, that our scanner lets pass and the standard library's
// does not.
func picture(body []byte) []byte {
	return bytes.Map(func(r rune) rune {
		if r > 0 && !isXML(r) {
			return 0xf0000 + r
		}
		return r
	}, body)
}

// oracleXML returns the text of the top-level elements as encoding/xml's tokens have it, and how often each occurs.
func oracleXML(body []byte) (values map[string]string, count map[string]int, err error) {
	values, count = make(map[string]string), make(map[string]int)
	if isWritten(body) {
		body = picture(body)
	}
	d := xml.NewDecoder(bytes.NewReader(body))
	var path []string
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return values, count, nil
		}
		if err != nil {
			return nil, nil, err
		}
		switch token := token.(type) {
		case xml.StartElement:
			name := token.Name.Space + token.Name.Local
			if path = append(path, name); len(path) == 2 {
				count[name]++
				values[name] += ""
			}
			if len(path) == 1 {
				count["root "+name]++
			}
			count["any "+name]++
		case xml.EndElement:
			path = path[:len(path)-1]
		case xml.CharData:
			if len(path) == 2 {
				values[path[1]] += string(token)
			}
		}
	}
}

// oracleJSON returns the top-level members as encoding/json has them, in the form in which we give them.
func oracleJSON(body []byte) (values map[string]string, err error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(body, &members); err != nil {
		return nil, err
	}
	values = make(map[string]string)
	for name, raw := range members {
		text := string(bytes.TrimSpace(raw))
		switch {
		case strings.HasPrefix(text, `"`):
			if err := json.Unmarshal(raw, &text); err != nil {
				return nil, err
			}
		case text == "null":
			text = ""
		}
		values[name] = text
	}
	return values, nil
}

// wireFields gives the values of a scan by their names on the wire.
func wireFields(f *Fields) map[string][]byte {
	return map[string][]byte{
		"ToUserName": f.ToUserName, "FromUserName": f.FromUserName, "CreateTime": f.CreateTime, "MsgType": f.MsgType,
		"Event": f.Event, "EventKey": f.EventKey, "Content": f.Content, "InfoType": f.InfoType, "AppId": f.AppID,
		"ComponentVerifyTicket": f.ComponentVerifyTicket, "AuthorizerAppid": f.AuthorizerAppID,
		"AuthorizationCode": f.AuthorizationCode, "AuthorizationCodeExpiredTime": f.AuthorizationCodeExpiredTime,
		"PreAuthCode": f.PreAuthCode, "appid": f.NotifyAppID, "auth_code": f.NotifyAuthCode, "status": f.NotifyStatus,
		"Encrypt": f.Encrypt,
	}
}

// agree compares a scan with an oracle.
func agree(t *testing.T, body []byte, got map[string][]byte, want map[string]string) {
	t.Helper()
	for name, value := range got {
		wanted, ok := want[name]
		text := string(value)
		if bytes.Contains(body, []byte("<xml")) && !json.Valid(body) {
			text = string(picture(value))
		}
		if ok != (value != nil) || text != wanted {
			t.Errorf("%q: %s is %q (found %v), the standard library has %q (found %v)", body, name, value, value != nil, wanted, ok)
		}
	}
}

func checkFields(t *testing.T, body []byte) {
	t.Helper()
	before := bytes.Clone(body)
	var f Fields
	err := ScanFields(body, &f)
	if !bytes.Equal(body, before) {
		t.Fatalf("%q was changed", before)
	}
	if err != nil {
		if !errors.Is(err, ErrEnvelope) {
			t.Errorf("%q: error %v", body, err)
		}
		return
	}
	got := wireFields(&f)
	var want map[string]string
	if f.Format == FormatJSON {
		want, err = oracleJSON(body)
	} else {
		var count map[string]int
		want, count, err = oracleXML(body)
		for name, n := range count {
			if _, known := got[name]; known && n != 1 {
				t.Errorf("%q: %s stands there %d times", body, name, n)
			}
		}
		if err == nil && count["root xml"] != 1 {
			t.Errorf("%q: not one root", body)
		}
	}
	if err != nil {
		t.Errorf("%q: accepted, the standard library says %v", body, err)
		return
	}
	wantID, ok := want["MsgId"]
	if !ok {
		wantID, ok = want["MsgID"]
	}
	if ok != (f.MsgID != nil) || wantID != string(f.MsgID) {
		t.Errorf("%q: MsgId is %q, the standard library has %q", body, f.MsgID, wantID)
	}
	agree(t, body, got, want)
}

func checkEnvelope(t *testing.T, body []byte) {
	t.Helper()
	env, err := ScanEnvelope(body)
	if err != nil {
		if !errors.Is(err, ErrEnvelope) {
			t.Errorf("%q: error %v", body, err)
		}
		return
	}
	if len(env.Encrypt) == 0 {
		t.Errorf("%q: empty Encrypt accepted", body)
	}
	var want map[string]string
	if env.Format == FormatJSON {
		want, err = oracleJSON(body)
	} else {
		var count map[string]int
		want, count, err = oracleXML(body)
		if err == nil && count["any Encrypt"] != 1 {
			t.Errorf("%q: %d Encrypt", body, count["any Encrypt"])
		}
	}
	if err != nil {
		t.Errorf("%q: accepted, the standard library says %v", body, err)
		return
	}
	agree(t, body, map[string][]byte{"Encrypt": env.Encrypt, "ToUserName": env.ToUserName, "AppId": env.AppID}, want)
	// What is an envelope is a message, of the same values.
	var f Fields
	if err := ScanFields(body, &f); err == nil && !bytes.Equal(f.Encrypt, env.Encrypt) {
		t.Errorf("%q: Encrypt is %q and %q", body, env.Encrypt, f.Encrypt)
	}
}

// seedBodies adds the official messages and envelopes, and some oddities, as far as they begin with the byte.
func seedBodies(f *testing.F, first string) {
	f.Helper()
	for _, v := range messageVectors(f) {
		for _, body := range []string{v.Envelope, v.Plaintext} {
			if strings.HasPrefix(body, first) {
				f.Add([]byte(body))
			}
		}
	}
	for _, body := range []string{
		"\ufeff<?xml version='1.0' encoding='utf-8'?>\n<!--c--><xml><Encrypt>a&#x41;&lt;<![CDATA[]]]]><![CDATA[>]]></Encrypt ></xml>",
		"<xml><Content>a\r\n\rb<!---->c]&gt;</Content><MsgID/><a b='c'/><d><e>&amp;</e></d><AppId>中\U0001f600</AppId></xml>",
		"<xml><MsgType><![CDATA[text]]></MsgType><Content><![CDATA[ \x1dc\x02]]>d</Content><Encrypt>QQ==</Encrypt><Label><![CDATA[\x10]]></Label></xml>",
		"<xml><!DOCTYPE a [<!ENTITY b 'c'>]><Content>&b;</Content><Content/></xml><xml/>",
		`{"MsgId":9007199254740993,"MsgID":"1","Content":"\ud83d\ude00\ud83d\/\u0000","Event":null,"a":[{"Encrypt":-1.5E+3},[],{}]}`,
		` {"\u0045ncrypt":"a","status":true,"appid":-0.0e1}` + "\n",
		`{"Encrypt":"a","Encrypt":"b"} {}`,
	} {
		if strings.Contains(body, first) {
			f.Add([]byte(body))
		}
	}
}

func FuzzScanEnvelopeXML(f *testing.F) {
	seedBodies(f, "<")
	f.Fuzz(checkEnvelope)
}

func FuzzScanFieldsXML(f *testing.F) {
	seedBodies(f, "<")
	f.Fuzz(checkFields)
}

func FuzzScanJSON(f *testing.F) {
	seedBodies(f, "{")
	f.Fuzz(func(t *testing.T, body []byte) {
		checkEnvelope(t, body)
		checkFields(t, body)
	})
}

// oracleNode is an element as the standard library has it, in order.
type oracleNode struct {
	name, text string
	children   []*oracleNode
	array      bool // JSON: the children are its items
}

// treeXML reads the whole of a message with encoding/xml.
func treeXML(body []byte) (*oracleNode, error) {
	d := xml.NewDecoder(bytes.NewReader(body))
	root := &oracleNode{}
	path := []*oracleNode{root}
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return root.children[0], nil
		}
		if err != nil {
			return nil, err
		}
		top := path[len(path)-1]
		switch token := token.(type) {
		case xml.StartElement:
			child := &oracleNode{name: token.Name.Local}
			top.children = append(top.children, child)
			path = append(path, child)
		case xml.EndElement:
			path = path[:len(path)-1]
		case xml.CharData:
			top.text += string(token)
		}
	}
}

// treeJSON reads the next value with encoding/json, members in order.
func treeJSON(d *json.Decoder, name string) (*oracleNode, error) {
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	n := &oracleNode{name: name}
	switch token := token.(type) {
	case string:
		n.text = token
	case bool, json.Number:
		n.text = fmt.Sprint(token)
	case json.Delim:
		n.array = token == '['
		for d.More() {
			name := ""
			if !n.array {
				key, err := d.Token()
				if err != nil {
					return nil, err
				}
				name = key.(string)
			}
			child, err := treeJSON(d, name)
			if err != nil {
				return nil, err
			}
			n.children = append(n.children, child)
		}
		_, err = d.Token()
	}
	return n, err
}

// at returns the values at a path: of the elements around them the first counts.
func (n *oracleNode) at(path string) (values []string) {
	for n.array {
		if len(n.children) == 0 {
			return nil
		}
		n = n.children[0]
	}
	first, rest, goesOn := strings.Cut(path, "/")
	for _, child := range n.children {
		switch {
		case child.name != first:
		case goesOn:
			return child.at(rest)
		default:
			values = append(values, child.text)
		}
	}
	return values
}

func FuzzScanElements(f *testing.F) {
	seedBodies(f, "<")
	seedBodies(f, "{")
	for _, message := range []string{
		"<xml><MsgType><![CDATA[image]]></MsgType><Image>\n<MediaId><![CDATA[id]]></MediaId></Image></xml>",
		"<xml><Articles><item><Title>1</Title><Title/></item><item><Title>&lt;</Title></item><Title>t</Title></Articles><a><b/><b><c><d/></c></b></a></xml>",
		`{"MsgType":"news","Articles":[{"Title":"1"},{"Title":"2"}],"Image":null,"a":{"b":{"c":[[{"d":-1e5}],0]}}}`,
		`{"Articles":{"item":[{"Title":true},[]],"item":{"Title":"x"}},"a":{"b":[],"b":{"c":{"d":1}}},"Image":{"MediaId":"\ud83d\ude00"}}`,
	} {
		f.Add([]byte(message))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		before := bytes.Clone(body)
		for _, format := range []Format{FormatXML, FormatJSON} {
			values, err := ScanElements(body, format, testPaths...)
			if !bytes.Equal(body, before) {
				t.Fatalf("%q was changed", before)
			}
			if err != nil {
				if !errors.Is(err, ErrEnvelope) {
					t.Errorf("%q: error %v", body, err)
				}
				continue
			}
			// What has elements is a message.
			var f Fields
			if err := ScanFields(body, &f); err != nil && !errors.Is(err, errNested) && !errors.Is(err, errDuplicate) {
				t.Errorf("%q: no message: %v", body, err)
			}
			var tree *oracleNode
			if format == FormatJSON {
				d := json.NewDecoder(bytes.NewReader(body))
				d.UseNumber()
				tree, err = treeJSON(d, "")
			} else {
				tree, err = treeXML(body)
			}
			if err != nil {
				t.Fatalf("%q: accepted, the standard library says %v", body, err)
			}
			for i, path := range testPaths {
				want := tree.at(path)
				if len(want) > 1 {
					t.Errorf("%q: %s stands there %d times", body, path, len(want))
				}
				if (values[i] != nil) != (len(want) == 1) || values[i] != nil && string(values[i]) != want[0] {
					t.Errorf("%q: %s is %q, the standard library has %q", body, path, []byte(values[i]), want)
				}
			}
		}
	})
}

// FuzzScanWritten: being strict does not mean refusing what a sound writer writes, and nothing gets lost in it.
func FuzzScanWritten(f *testing.F) {
	f.Add("你好 <b>&amp;</b> ]]> \"x\" \\ \U0001f600\t\r\n", "gh_97417a04a28d", int64(6054768590064713728))
	f.Add("", "]]", int64(-1))
	f.Fuzz(func(t *testing.T, content, user string, id int64) {
		message := struct {
			XMLName             xml.Name `json:"-" xml:"xml"`
			ToUserName, Content string
			Extra               struct{ Content string }
			MsgId               int64 //nolint:revive // WeChat's name
		}{ToUserName: user, Content: content, MsgId: id}
		message.Extra.Content = user
		asJSON, err := json.Marshal(message)
		if err != nil {
			t.Fatal(err)
		}
		asXML, err := xml.MarshalIndent(message, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		check := func(body, wantContent, wantUser string) {
			t.Helper()
			var fields Fields
			err := ScanFields([]byte(body), &fields)
			if err != nil || string(fields.Content) != wantContent || string(fields.ToUserName) != wantUser || string(fields.MsgID) != strconv.FormatInt(id, 10) {
				t.Errorf("%q: %s, %v", body, fieldsText(&fields), err)
			}
		}
		valid := func(s string) string { return string([]rune(s)) } // as the writers do
		check(string(asJSON), valid(content), valid(user))
		if validXML([]byte(content)) && validXML([]byte(user)) { // the writer puts U+FFFD otherwise
			check(string(asXML), content, user)
		}
		if carries(FormatXML, content) && carries(FormatXML, user) {
			check("<xml><Content><![CDATA["+string(appendValue(nil, FormatXML, content))+"]]></Content><ToUserName><![CDATA["+
				string(appendValue(nil, FormatXML, user))+"]]></ToUserName><MsgId>"+strconv.FormatInt(id, 10)+"</MsgId></xml>", content, user)
		}
		if carries(FormatJSON, content) && carries(FormatJSON, user) {
			check(`{"Content":"`+string(appendValue(nil, FormatJSON, content))+`","ToUserName":"`+
				string(appendValue(nil, FormatJSON, user))+`","MsgId":"`+strconv.FormatInt(id, 10)+`"}`, content, user)
		}
	})
}

// FuzzOpen: nothing that was not signed opens; nothing that is signed makes it panic; what was sealed opens.
func FuzzOpen(f *testing.F) {
	for _, v := range messageVectors(f) {
		f.Add(v.MsgSignature, v.Timestamp, v.Nonce, []byte(v.Encrypt), []byte(v.Plaintext))
	}
	f.Add("82c962d39941aa48552f90ef55aa323dc620cc10", "", "", []byte("AAAA\n"), layout("x", 0xffffffff, appid))
	c := mustCodec(f, appid, []string{"a token of the fuzzer", "and an old one"}, []string{keyA, keyB})
	f.Fuzz(func(t *testing.T, signature, timestamp, nonce string, encrypt, plain []byte) {
		var b Buffers
		if _, err := c.Open(&b, Params{signature, timestamp, nonce}, encrypt); !errors.Is(err, ErrSignature) {
			t.Errorf("forged push: %v", err)
		}
		if len(timestamp) > maxParam || len(nonce) > maxParam {
			return
		}
		// Any text, signed; whatever opens must be found in what was signed.
		p := Params{string(b.sign(nil, c.tokens[1], timestamp, nonce, encrypt)), timestamp, nonce}
		if o, err := c.Open(&b, p, encrypt); err == nil {
			text := bytes.Clone(b.work)
			again, err := b.seal(nil, c.keys[o.KeyIndex()].s, [randomLength]byte(b.plain), appid, o.Message)
			if err != nil || !bytes.HasPrefix(text, b.work) {
				t.Errorf("opened %q, which seals as %q, %v", encrypt, again, err)
			}
		} else if !errors.Is(err, ErrDecrypt) {
			t.Errorf("signed text: %v", err)
		}
		// Any plaintext, encrypted.
		_, _ = unpack(plain, appid)
		body, sig, err := c.SealPush(&b, FormatXML, "AppId", appid, 1715943329, "1", plain)
		if err != nil {
			t.Fatal(err)
		}
		env, err := ScanEnvelope(body)
		if err != nil {
			t.Fatal(err)
		}
		o, err := c.Open(&b, Params{sig, "1715943329", "1"}, env.Encrypt)
		if err != nil || !bytes.Equal(o.Message, plain) {
			t.Fatalf("%q opens as %q, %v", plain, o.Message, err)
		}
		for _, format := range []Format{FormatXML, FormatJSON} {
			reply, err := c.AppendReply(nil, &b, o, format, 1715943329, nonce, o.Message)
			if err != nil {
				continue // a nonce that the format cannot carry
			}
			if message, err := c.OpenReply(reply); nonce != "" && (err != nil || !bytes.Equal(message, plain)) {
				t.Fatalf("reply opens as %q, %v", message, err)
			}
		}
	})
}

func FuzzSealer(f *testing.F) {
	s := mustSealer(f, sealKeyBytes('b'), sealKeyBytes('a'))
	sealed, err := mustSealer(f, sealKeyBytes('a')).Seal("name", []byte("record"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add("name", "other", []byte("record"), sealed[:len(sealed)-1])
	f.Add("", "", []byte{}, []byte{sealVersion})
	f.Fuzz(func(t *testing.T, name, other string, plaintext, forged []byte) {
		if _, _, err := s.Open(name, forged); !errors.Is(err, ErrDecrypt) && !bytes.Equal(forged, sealed) {
			t.Errorf("forged record: %v", err)
		}
		sealed, err := s.Seal(name, plaintext)
		if err != nil {
			t.Fatal(err)
		}
		got, old, err := s.Open(name, sealed)
		if err != nil || old || !bytes.Equal(got, plaintext) {
			t.Fatalf("%q opens as %q, %v, %v", plaintext, got, old, err)
		}
		if _, _, err := s.Open(other, sealed); name != other && !errors.Is(err, ErrDecrypt) {
			t.Errorf("moved from %q to %q: %v", name, other, err)
		}
	})
}
