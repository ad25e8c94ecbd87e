package crypto

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
)

func TestScanEnvelope(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, body, encrypt, user, app string
	}{
		{"CDATA", "<xml><ToUserName><![CDATA[gh_1]]></ToUserName><Encrypt><![CDATA[QQ==]]></Encrypt></xml>", "QQ==", "gh_1", "-"},
		{"plain text", "<xml><AppId>wx1</AppId><Encrypt>QQ==</Encrypt></xml>", "QQ==", "-", "wx1"},
		{"other order and spaces", " \r\n<xml >\n\t<Encrypt\n>QQ==</Encrypt >\n<AppId/>\n</xml\t>\n ", "QQ==", "-", ""},
		{"byte order mark and declaration", "\ufeff<?xml version=\"1.0\" encoding='UTF-8' standalone=\"yes\" ?><xml><Encrypt>QQ==</Encrypt></xml>", "QQ==", "-", "-"},
		{"comments", "<!--a--><xml><!-- <Encrypt>no</Encrypt> --><Encrypt>Q<!--b-->Q<![CDATA[=]]>=</Encrypt></xml><!---->", "QQ==", "-", "-"},
		{"references", "<xml><Encrypt>Q&#81;&#x3D;&#x3d;</Encrypt><AppId>&lt;&gt;&amp;&apos;&quot;</AppId></xml>", "QQ==", "-", `<>&'"`},
		{"names", "<xml><aAzZ_09-.b/><_/><Encrypt>QQ==</Encrypt></xml>", "QQ==", "-", "-"},
		{"all hex digits", "<xml><Encrypt>&#x4A;&#x4F;&#x4a;&#x4f;</Encrypt><AppId>&#9;&#xAF;</AppId></xml>", "JOJO", "-", "\t\u00af"},
		{"unknown and nested fields", "<xml><A><B><C/>t</B><B>]</B></A><Encrypt>QQ==</Encrypt><A/></xml>", "QQ==", "-", "-"},
		{"similar names", "<xml><encrypt>no</encrypt><Encrypts>no</Encrypts><Encrypt>QQ==</Encrypt></xml>", "QQ==", "-", "-"},
		{"JSON", `{"ToUserName":"gh_1","Encrypt":"QQ=="}`, "QQ==", "gh_1", "-"},
		{"JSON with spaces", " \r\n{ \"Encrypt\" :\t\"QQ==\" , \"AppId\":\"\" }\n", "QQ==", "-", ""},
		{"JSON with escapes", `{"\u0045ncrypt":"\/\u0051Q=\u003D","AppId":"\ud83d\ude00\n"}`, "/QQ==", "-", "😀\n"},
		{"JSON with all hex digits", `{"Encrypt":"\u004A\u004F\u004a\u004f\u0019","AppId":"\uFfAa"}`, "JOJO\x19", "-", "\uffaa"},
		{"JSON with numbers", `{"a":[0,9,10.90,1e-9,1E+0],"Encrypt":"QQ=="}`, "QQ==", "-", "-"},
		{"JSON with more", `{"a":[],"b":{},"c":[1,-0.5e+3,true,{"d":null}],"encrypt":"no","Encrypt":"QQ=="}`, "QQ==", "-", "-"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			body := []byte(test.body)
			env, err := ScanEnvelope(body)
			if err != nil {
				t.Fatal(err)
			}
			if got := show(env.Encrypt); got != test.encrypt {
				t.Errorf("Encrypt %q", got)
			}
			if got := show(env.ToUserName); got != test.user {
				t.Errorf("ToUserName %q", got)
			}
			if got := show(env.AppID); got != test.app {
				t.Errorf("AppId %q", got)
			}
			if want := strings.Contains(test.name, "JSON"); (env.Format == FormatJSON) != want {
				t.Errorf("format %v", env.Format)
			}
			if string(body) != test.body {
				t.Error("the body was changed")
			}
		})
	}
}

// show tells an absent value, "-", from an empty one.
func show(v []byte) string {
	if v == nil {
		return "-"
	}
	return string(v)
}

// deepObjects is the JSON of n objects, one in the other, with a number in the innermost.
func deepObjects(n int) string { return strings.Repeat(`{"a":`, n) + "1" + strings.Repeat("}", n) }

func TestScanEnvelopeRefuses(t *testing.T) {
	t.Parallel()
	const good = "<Encrypt>QQ==</Encrypt>"
	deep := func(open, end string, n int) string { return strings.Repeat(open, n) + strings.Repeat(end, n) }
	tests := []struct {
		name, body string
		want       error
	}{
		{"empty", "", errUnknown},
		{"spaces", " \n", errUnknown},
		{"byte order mark", "\ufeff", errUnknown},
		{"text", "success", errUnknown},
		{"form", "Encrypt=QQ==", errUnknown},
		{"JSON array", `["Encrypt"]`, errUnknown},
		{"JSON string", `"Encrypt"`, errUnknown},
		{"JSON with byte order mark", "\ufeff{\"Encrypt\":\"QQ==\"}", errUnknown},

		{"no Encrypt", "<xml><ToUserName>gh_1</ToUserName></xml>", errNoEncrypt},
		{"no fields", "<xml/>", errNoEncrypt},
		{"empty Encrypt", "<xml><Encrypt></Encrypt></xml>", errNoEncrypt},
		{"empty CDATA", "<xml><Encrypt><![CDATA[]]></Encrypt></xml>", errNoEncrypt},
		{"closed Encrypt", "<xml><Encrypt/></xml>", errNoEncrypt},
		{"other case", "<xml><encrypt>QQ==</encrypt></xml>", errNoEncrypt},
		{"repeated Encrypt", "<xml>" + good + good + "</xml>", errDuplicate},
		{"repeated after empty", "<xml><Encrypt/>" + good + "</xml>", errDuplicate},
		{"repeated ToUserName", "<xml>" + good + "<ToUserName>a</ToUserName><ToUserName>a</ToUserName></xml>", errDuplicate},
		{"nested Encrypt", "<xml><a>" + good + "</a></xml>", errNestedEncrypt},
		{"nested beside Encrypt", "<xml>" + good + "<a><b>" + good + "</b></a></xml>", errNestedEncrypt},
		{"nested closed Encrypt", "<xml>" + good + "<a><Encrypt/></a></xml>", errNestedEncrypt},
		{"element within Encrypt", "<xml><Encrypt>QQ<b>==</b></Encrypt></xml>", errNested},
		{"Encrypt within Encrypt", "<xml><Encrypt>" + good + "</Encrypt></xml>", errNested},

		{"other root", "<XML>" + good + "</XML>", errRoot},
		{"Encrypt as root", good, errRoot},
		{"root with prefix", "<a:xml>" + good + "</a:xml>", errAttribute},
		{"attribute", `<xml a="b">` + good + "</xml>", errAttribute},
		{"namespace", `<xml><Encrypt xmlns="a">QQ==</Encrypt></xml>`, errAttribute},
		{"field with prefix", "<xml><a:Encrypt>QQ==</a:Encrypt></xml>", errAttribute},
		{"two roots", "<xml>" + good + "</xml><xml/>", errTrailing},
		{"text after", "<xml>" + good + "</xml>x", errTrailing},
		{"NUL after", "<xml>" + good + "</xml>\x00", errEncoding},
		{"closed root and more", "<xml/>" + good, errTrailing},
		{"end tag after", "<xml>" + good + "</xml></xml>", errTrailing},
		{"text before", "x<xml>" + good + "</xml>", errUnknown},
		{"text between", "<xml>x" + good + "</xml>", errNestedText},
		{"CDATA between", "<xml><![CDATA[x]]>" + good + "</xml>", errNestedText},
		{"reference between", "<xml>&#32;" + good + "</xml>", errNestedText},

		{"DOCTYPE", "<!DOCTYPE xml><xml>" + good + "</xml>", errMarkup},
		{"DOCTYPE after comment", "<!----><!DOCTYPE xml><xml>" + good + "</xml>", errMarkup},
		{"DOCTYPE within", "<xml><!DOCTYPE xml>" + good + "</xml>", errMarkup},
		{"ENTITY within a field", "<xml><a><!ENTITY x 'y'></a>" + good + "</xml>", errMarkup},
		{"other section", "<xml><Encrypt><![INCLUDE[QQ==]]></Encrypt></xml>", errMarkup},
		{"CDATA in lower case", "<xml><Encrypt><![cdata[QQ==]]></Encrypt></xml>", errMarkup},
		{"instruction", "<?php x?><xml>" + good + "</xml>", errMarkup},
		{"style sheet", `<?xml-stylesheet href="a"?><xml>` + good + "</xml>", errMarkup},
		{"instruction within", "<xml><?a b?>" + good + "</xml>", errMarkup},
		{"instruction after", "<xml>" + good + "</xml><?a b?>", errTrailing},
		{"second declaration", `<?xml version="1.0"?><?xml version="1.0"?><xml>` + good + "</xml>", errMarkup},
		{"declaration after space", ` <?xml version="1.0"?><xml>` + good + "</xml>", errMarkup},
		{"declaration of GBK", `<?xml version="1.0" encoding="GBK"?><xml>` + good + "</xml>", errMarkup},
		{"declaration of 1.1", `<?xml version="1.1"?><xml>` + good + "</xml>", errMarkup},
		{"declaration without version", `<?xml encoding="utf-8"?><xml>` + good + "</xml>", errMarkup},
		{"declaration with more", `<?xml version="1.0" a="b"?><xml>` + good + "</xml>", errMarkup},
		{"declaration with other quotes", `<?xml version="1.0'?><xml>` + good + "</xml>", errMarkup},
		{"declaration with quotes of none", `<?xml version=x1.0x?><xml>` + good + "</xml>", errMarkup},
		{"declaration without space", `<?xmlversion="1.0"?><xml>` + good + "</xml>", errMarkup},
		{"declaration without name", `<?xml "1.0"?><xml>` + good + "</xml>", errMarkup},
		{"declaration of both", `<?xml version="1.0" standalone="yes" standalone="no"?><xml>` + good + "</xml>", errMarkup},
		{"declaration without end", `<?xml version="1.0">`, errMarkup},
		{"declaration alone", `<?xml version="1.0"?>`, errSyntax},

		{"unknown entity", "<xml><Encrypt>&nbsp;</Encrypt></xml>", errEntity},
		{"entity of a DTD", "<xml>" + good + "<a>&xxe;</a></xml>", errEntity},
		{"reference cut short", "<xml><Encrypt>&amp</Encrypt></xml>", errEntity},
		{"bare ampersand", "<xml><Encrypt>a&</Encrypt></xml>", errEntity},
		{"empty reference", "<xml><Encrypt>&;</Encrypt></xml>", errEntity},
		{"no number", "<xml><Encrypt>&#;</Encrypt></xml>", errEntity},
		{"no hex number", "<xml><Encrypt>&#x;</Encrypt></xml>", errEntity},
		{"hex in upper case", "<xml><Encrypt>&#X41;</Encrypt></xml>", errEntity},
		{"hex digit in decimal", "<xml><Encrypt>&#4a;</Encrypt></xml>", errEntity},
		{"negative", "<xml><Encrypt>&#-65;</Encrypt></xml>", errEntity},
		{"control character by number, not a tab", "<xml><Encrypt>&#8;</Encrypt></xml>", errEntity},
		{"hex digit beyond", "<xml><Encrypt>&#x4G;</Encrypt></xml>", errEntity},
		{"control character by number", "<xml><Encrypt>&#0;</Encrypt></xml>", errEntity},
		{"surrogate by number", "<xml><Encrypt>&#xd800;</Encrypt></xml>", errEntity},
		{"noncharacter by number", "<xml><Encrypt>&#xffff;</Encrypt></xml>", errEntity},
		{"beyond Unicode", "<xml><Encrypt>&#x110000;</Encrypt></xml>", errEntity},
		{"number that wraps", "<xml><Encrypt>&#x100000041;</Encrypt></xml>", errEntity},

		{"control character", "<xml><Encrypt><![CDATA[Q\x01Q==]]></Encrypt></xml>", errEncoding},
		{"NUL", "<xml><Encrypt>QQ==\x00</Encrypt></xml>", errEncoding},
		{"invalid UTF-8", "<xml><a>\xff</a>" + good + "</xml>", errEncoding},
		{"overlong UTF-8", "<xml><a>\xc0\x80</a>" + good + "</xml>", errEncoding},
		{"surrogate in UTF-8", "<xml><a>\xed\xa0\x80</a>" + good + "</xml>", errEncoding},
		{"noncharacter", "<xml><a>\uffff</a>" + good + "</xml>", errEncoding},
		{"UTF-16", "\xff\xfe<\x00x\x00m\x00l\x00>\x00", errUnknown},

		{"cut in tag", "<xml", errSyntax},
		{"cut after root", "<xml>", errSyntax},
		{"cut after field", "<xml>" + good, errSyntax},
		{"cut in value", "<xml><Encrypt>QQ==", errSyntax},
		{"cut in end tag", "<xml>" + good + "</xml", errSyntax},
		{"cut in CDATA", "<xml><Encrypt><![CDATA[QQ==", errSyntax},
		{"cut in comment", "<xml><!-- a", errSyntax},
		{"cut in comment of value", "<xml><Encrypt><!-- a -", errSyntax},
		{"comment in epilogue cut", "<xml>" + good + "</xml><!--", errSyntax},
		{"hyphens in comment", "<xml><!-- a -- b -->" + good + "</xml>", errSyntax},
		{"hyphens in comment of value", "<xml><Encrypt>QQ==<!-- a -- b --></Encrypt></xml>", errSyntax},
		{"comment before root cut", "<!--", errSyntax},
		{"comment alone", "<!-- -->", errSyntax},
		{"root is an end tag", "</xml>", errSyntax},
		{"wrong end tag", "<xml><Encrypt>QQ==</encrypt></xml>", errSyntax},
		{"end tag of prefix", "<xml><Encrypt>QQ==</Encrypts></xml>", errSyntax},
		{"crossed tags", "<xml><a><b></a></b>" + good + "</xml>", errSyntax},
		{"end of CDATA in text", "<xml><Encrypt>a]]>b</Encrypt></xml>", errSyntax},
		{"end of CDATA at the beginning of text", "<xml><a>]]>0123456789abcdef</a>" + good + "</xml>", errSyntax},
		{"end of CDATA in skipped text", "<xml><a>0123456789abcdef]]></a>" + good + "</xml>", errSyntax},
		{"no name", "<xml><>QQ==</></xml>", errSyntax},
		{"space before name", "<xml>< Encrypt>QQ==</Encrypt></xml>", errSyntax},
		{"name with a bracket", "<xml><a[/>" + good + "</xml>", errAttribute},
		{"name with a backtick", "<xml><a`/>" + good + "</xml>", errAttribute},
		{"name with a brace", "<xml><a{/>" + good + "</xml>", errAttribute},
		{"name with an at sign", "<xml><a@/>" + good + "</xml>", errAttribute},
		{"name with a comma", "<xml><a,/>" + good + "</xml>", errAttribute},
		{"name with a semicolon", "<xml><a;/>" + good + "</xml>", errAttribute},
		{"name begins with digit", "<xml><1a/>" + good + "</xml>", errSyntax},
		{"slash alone", "<xml><a/ >" + good + "</xml>", errSyntax},
		{"field called as the docs end", "<xml>" + good + "<xml>", errSyntax},
		{"too deep", "<xml>" + deep("<a>", "</a>", maxDepth+1) + good + "</xml>", errDeep},

		{"JSON without Encrypt", `{}`, errNoEncrypt},
		{"JSON with empty Encrypt", `{"Encrypt":""}`, errNoEncrypt},
		{"JSON with null", `{"Encrypt":null}`, errNoEncrypt},
		{"JSON repeated", `{"Encrypt":"a","Encrypt":"a"}`, errDuplicate},
		{"JSON repeated by escape", `{"Encrypt":"a","\u0045ncrypt":"a"}`, errDuplicate},
		{"JSON repeated after null", `{"Encrypt":null,"Encrypt":"a"}`, errDuplicate},
		{"JSON nested", `{"a":{"Encrypt":"a"}}`, errNestedEncrypt},
		{"JSON nested beside", `{"Encrypt":"a","a":[{"b":{"Encrypt":1}}]}`, errNestedEncrypt},
		{"JSON object as Encrypt", `{"Encrypt":{"a":"b"}}`, errNested},
		{"JSON array as Encrypt", `{"Encrypt":["a"]}`, errNested},
		{"JSON and more", `{"Encrypt":"a"}{}`, errTrailing},
		{"JSON and comma", `{"Encrypt":"a"},`, errTrailing},
		{"JSON comma at end", `{"Encrypt":"a",}`, errSyntax},
		{"JSON comma at beginning", `{,"Encrypt":"a"}`, errSyntax},
		{"JSON without comma", `{"Encrypt":"a" "b":"c"}`, errSyntax},
		{"JSON other comma", `{"Encrypt":"a";"b":"c"}`, errSyntax},
		{"JSON other colon", `{"Encrypt"="a"}`, errSyntax},
		{"JSON without value", `{"Encrypt":"a","AppId":}`, errSyntax},
		{"JSON without colon", `{"Encrypt" "a"}`, errSyntax},
		{"JSON without quotes", `{Encrypt:"a"}`, errSyntax},
		{"JSON single quotes", `{'Encrypt':'a'}`, errSyntax},
		{"JSON comment", `{"Encrypt":"a"/**/}`, errSyntax},
		{"JSON cut after brace", `{`, errSyntax},
		{"JSON cut in name", `{"Encrypt`, errSyntax},
		{"JSON cut in value", `{"Encrypt":"a`, errSyntax},
		{"JSON cut after value", `{"Encrypt":"a"`, errSyntax},
		{"JSON cut in escape", `{"Encrypt":"a\`, errSyntax},
		{"JSON quote escaped", `{"Encrypt":"a\"}`, errSyntax},
		{"JSON cut in number escape", `{"Encrypt":"\u00`, errSyntax},
		{"JSON cut in number escape after a quote", `{"Encrypt":"\"\u00`, errSyntax},
		{"JSON bad escape before hex", `{"Encrypt":"\x0041"}`, errSyntax},
		{"JSON bad escape", `{"Encrypt":"\x41"}`, errSyntax},
		{"JSON bad hex", `{"Encrypt":"\u00g0"}`, errSyntax},
		{"JSON bad low surrogate", `{"Encrypt":"\ud83d\u00g0"}`, errSyntax},
		{"JSON line break", "{\"Encrypt\":\"a\nb\"}", errEncoding},
		{"JSON line break after escape", "{\"Encrypt\":\"\\n\n\"}", errSyntax},
		{"JSON control character after escape", "{\"Encrypt\":\"\\n\x1f\"}", errSyntax},
		{"JSON line break in long text", "{\"Encrypt\":\"0123456789\nabcdef\"}", errEncoding},
		{"JSON invalid UTF-8", "{\"Encrypt\":\"\xff\"}", errEncoding},
		{"JSON number", `{"Encrypt":"a","b":01}`, errSyntax},
		{"JSON number with plus", `{"Encrypt":"a","b":+1}`, errSyntax},
		{"JSON number ends below the digits", `{"Encrypt":"a","AppId":1/}`, errSyntax},
		{"JSON number ends above the digits", `{"Encrypt":"a","AppId":1:}`, errSyntax},
		{"JSON number ends in dot", `{"Encrypt":"a","b":1.}`, errSyntax},
		{"JSON number begins with dot", `{"Encrypt":"a","b":.1}`, errSyntax},
		{"JSON number ends in e", `{"Encrypt":"a","b":1e}`, errSyntax},
		{"JSON minus", `{"Encrypt":"a","b":-}`, errSyntax},
		{"JSON hex number", `{"Encrypt":"a","b":0x1}`, errSyntax},
		{"JSON number as Encrypt cut", `{"Encrypt":-`, errSyntax},
		{"JSON word", `{"Encrypt":"a","b":nul}`, errSyntax},
		{"JSON word and more", `{"Encrypt":"a","b":truex}`, errSyntax},
		{"JSON array without comma", `{"Encrypt":"a","b":[1 2]}`, errSyntax},
		{"JSON array ends in comma", `{"Encrypt":"a","b":[1,]}`, errSyntax},
		{"JSON array closed by brace", `{"Encrypt":"a","b":[1}`, errSyntax},
		{"JSON bad object in array", `{"Encrypt":"a","b":[{1:2}]}`, errSyntax},
		{"JSON bad value in object", `{"Encrypt":"a","b":{"c":}}`, errSyntax},
		{"JSON too deep", `{"Encrypt":"a","b":` + deep("[", "]", maxDepth+1) + `}`, errDeep},
		{"JSON objects too deep", `{"Encrypt":"a","b":` + deepObjects(maxDepth) + `}`, errDeep},
		{"JSON very deep", `{"Encrypt":"a","b":` + strings.Repeat(`[`, 1<<20), errDeep},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			env, err := ScanEnvelope([]byte(test.body))
			wantErr(t, err, test.want)
			wantErr(t, err, ErrEnvelope)
			if !reflect.DeepEqual(env, Envelope{}) {
				t.Errorf("an envelope beside the error: %+v", env)
			}
		})
	}
	for _, body := range []string{
		"<xml>" + deep("<a>", "</a>", maxDepth) + good + "</xml>",
		`{"Encrypt":"a","b":` + deep("[", "]", maxDepth) + `}`,
		`{"Encrypt":"a","b":` + deepObjects(maxDepth-1) + `}`,
	} {
		if _, err := ScanEnvelope([]byte(body)); err != nil {
			t.Errorf("at the limit of depth: %v", err)
		}
	}
}

// fieldsText lists what was found, for comparison.
func fieldsText(f *Fields) string {
	var out strings.Builder
	v := reflect.ValueOf(f).Elem()
	for i := range v.NumField() {
		if value, ok := v.Field(i).Interface().(Text); ok && value != nil {
			fmt.Fprintf(&out, "%s=%s;", v.Type().Field(i).Name, string(value))
		}
	}
	return out.String()
}

func TestScanFields(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, message, want string }{
		{
			"text message",
			"<xml><ToUserName><![CDATA[gh_1]]></ToUserName>\n<FromUserName><![CDATA[o1]]></FromUserName>\n<CreateTime>1409735668</CreateTime>\n" +
				"<MsgType><![CDATA[text]]></MsgType>\n<Content><![CDATA[<b>&amp;你好]]></Content>\n<MsgId>6054768590064713728</MsgId>\n</xml>",
			"ToUserName=gh_1;FromUserName=o1;CreateTime=1409735668;MsgType=text;Content=<b>&amp;你好;MsgID=6054768590064713728;",
		},
		{
			"event with nested fields",
			"<xml><MsgType>event</MsgType><Event>scancode_push</Event><EventKey/><ScanCodeInfo><ScanType>qrcode</ScanType>" +
				"<Content>no</Content><Encrypt>no</Encrypt><MsgType/></ScanCodeInfo></xml>",
			"MsgType=event;Event=scancode_push;EventKey=;",
		},
		{"event with MsgID", "<xml><MsgID>7</MsgID></xml>", "MsgID=7;"},
		{"MsgId before MsgID", "<xml><MsgID>7</MsgID><MsgId>8</MsgId></xml>", "MsgID=8;"},
		{
			"platform events",
			"<xml><AppId>wx1</AppId><InfoType>authorized</InfoType><ComponentVerifyTicket>t</ComponentVerifyTicket><AuthorizerAppid>wx2</AuthorizerAppid>" +
				"<AuthorizationCode>c</AuthorizationCode><AuthorizationCodeExpiredTime>1</AuthorizationCodeExpiredTime><PreAuthCode>p</PreAuthCode></xml>",
			"InfoType=authorized;AppID=wx1;ComponentVerifyTicket=t;AuthorizerAppID=wx2;AuthorizationCode=c;AuthorizationCodeExpiredTime=1;PreAuthCode=p;",
		},
		{
			"fast registration",
			"<xml><AppId>wx1</AppId><InfoType>notify_third_fasteregister</InfoType><appid>wx3</appid><status>0</status><auth_code>c</auth_code>" +
				"<msg>OK</msg><info><name>n</name><status>9</status></info></xml>",
			"InfoType=notify_third_fasteregister;AppID=wx1;NotifyAppID=wx3;NotifyAuthCode=c;NotifyStatus=0;",
		},
		{"compatible mode", "<xml><Content>x</Content><Encrypt>QQ==</Encrypt></xml>", "Content=x;Encrypt=QQ==;"},
		{"no fields", "<xml>\n</xml>", ""},
		{"spaces are content", "<xml><Content> a\n </Content></xml>", "Content= a\n ;"},
		{"line ends", "<xml><Content>a\r\nb\rc\n\rd</Content><Event><![CDATA[\r\n]]>\r</Event></xml>", "Event=\n\n;Content=a\nb\nc\n\nd;"},
		{"line ends in long text", "<xml><Content>\ra\r\n 0123456789abcdef</Content></xml>", "Content=\na\n 0123456789abcdef;"},
		{"line ends in short text", "<xml><Content>\r\na\r</Content></xml>", "Content=\na\n;"},
		{"carriage return by number", "<xml><Content>a&#13;\n</Content></xml>", "Content=a\r\n;"},
		{"brackets", "<xml><Content>]]a] ]]&gt;]]<!--x-->></Content><Event><![CDATA[]]]]><![CDATA[>]]></Event></xml>", "Event=]]>;Content=]]a] ]]>]]>;"},
		{"pieces", "<xml><Content>a<![CDATA[b]]><!--c-->d&#101;<![CDATA[f\r]]>g</Content></xml>", "Content=abdef\ng;"},
		{"JSON", `{"ToUserName":"gh_1","CreateTime":1714112445,"MsgType":"event","Event":"debug_demo","debug_str":"hello"}`, "ToUserName=gh_1;CreateTime=1714112445;MsgType=event;Event=debug_demo;"},
		{"JSON numbers", `{"MsgId":9007199254740993,"CreateTime":-1.50E+2}`, "CreateTime=-1.50E+2;MsgID=9007199254740993;"},
		{"JSON number as string", `{"MsgId":"9007199254740993"}`, "MsgID=9007199254740993;"},
		{"JSON words", `{"Event":null,"EventKey":true,"Content":false}`, "Event=;EventKey=true;Content=false;"},
		{"JSON nested", `{"List":[{"MsgId":1,"Encrypt":"x"}],"Content":"a"}`, "Content=a;"},
		{"JSON escapes", `{"Content":"\"\\\/\b\f\n\r\t\u4f60\uD83D\uDE00\ud83dx\ude00\ud83d\u0041\uFFFD"}`, "Content=\"\\/\b\f\n\r\t你😀\ufffdx\ufffd\ufffdA\ufffd;"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			message := []byte(test.message)
			f := Fields{PreAuthCode: []byte("of the message before"), Content: []byte("too")}
			if err := ScanFields(message, &f); err != nil {
				t.Fatal(err)
			}
			if got := fieldsText(&f); got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
			if string(message) != test.message {
				t.Error("the message was changed")
			}
		})
	}
}

func TestScanFieldsRefuses(t *testing.T) {
	t.Parallel()
	for name, message := range map[string]string{
		"empty":             "",
		"text":              "hello",
		"duplicate":         "<xml><Content>a</Content><Content>b</Content></xml>",
		"duplicate MsgId":   "<xml><MsgId>1</MsgId><MsgId>2</MsgId></xml>",
		"nested in a field": "<xml><Content><b>x</b></Content></xml>",
		"DOCTYPE":           "<!DOCTYPE xml><xml/>",
		"JSON duplicate":    `{"MsgId":1,"MsgId":"1"}`,
		"JSON nested":       `{"Content":{}}`,
	} {
		f := Fields{Content: []byte("of the message before")}
		err := ScanFields([]byte(message), &f)
		wantErr(t, err, ErrEnvelope)
		if !reflect.DeepEqual(f, Fields{}) {
			t.Errorf("%s: fields left", name)
		}
		if strings.Contains(fmt.Sprint(err), "hello") {
			t.Errorf("%s: content in the error", name)
		}
	}
}

// Values alias the body; appending to one must not write over what follows it there.
func TestValuesAreCapped(t *testing.T) {
	t.Parallel()
	for _, body := range []string{
		"<xml><Encrypt>QQ==</Encrypt><AppId><![CDATA[wx]]></AppId><ToUserName/></xml>",
		`{"Encrypt":"QQ==","AppId":12,"ToUserName":""}`,
	} {
		before := []byte(body)
		env, err := ScanEnvelope(before)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range [][]byte{env.Encrypt, env.AppID, env.ToUserName} {
			_ = append(v, "overrun!"...) // must not reach the body
		}
		if !bytes.Equal(before, []byte(body)) {
			t.Errorf("body is now %s", before)
		}
	}
}

func TestFormatString(t *testing.T) {
	t.Parallel()
	if FormatXML.String() != "xml" || FormatJSON.String() != "json" || Format(9).String() != "unknown" {
		t.Error("names are wrong")
	}
}

// TestValidXML compares the eight-byte path with the plain rule, with an odd character at every offset.
func TestValidXML(t *testing.T) {
	t.Parallel()
	for c := range rune(0x110010) {
		if c > 0x3000 && c < 0xd700 || c > 0x10010 && c < 0x10fff0 {
			continue
		}
		text := bytes.Repeat([]byte("~"), 20)
		at := int(c) % 17
		odd := []byte(string(c))
		text = append(append(text[:at:at], odd...), text[at:]...)
		want := c == '\t' || c == '\n' || c == '\r' || c >= ' ' && c <= 0xd7ff || c >= 0xe000 && c <= 0xfffd || c >= 0x10000
		// A rune that is none becomes U+FFFD in odd.
		want = want || c >= 0xd800 && c <= 0xdfff || c > 0x10ffff
		if validXML(text) != want {
			t.Fatalf("%U at %d: %v", c, at, !want)
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	pieces := []string{"a", "~~~~~~~~", "\n", "长", "文字", "，", "\u3000", "é", "\U0001f600", "\ud7ff", "\ue000", "\ufffd"}
	wrong := []string{"\x80", "\xe4\xb8", "\xed\xa0\x80", "\xe0\x80\x80", "\xef\xbf\xbe", "\xef\xbf\xbf", "\xf4\x90\x80\x80", "\xc0\x80", "\xff", "\x01"}
	for n := range 50_000 {
		var text []byte
		for range random.IntN(12) {
			text = append(text, pieces[random.IntN(len(pieces))]...)
		}
		sound := len(text)
		if n%2 == 0 {
			text = append(text, wrong[random.IntN(len(wrong))]...)
			for range random.IntN(6) {
				text = append(text, pieces[random.IntN(len(pieces))]...)
			}
		}
		if validXML(text) != (len(text) == sound) {
			t.Fatalf("%q", text)
		}
	}
	for at := range 17 {
		for c := range 256 {
			text := bytes.Repeat([]byte("a"), 17)
			text[at] = byte(c)
			if want := c >= ' ' && c < 0x80 || c == '\t' || c == '\n' || c == '\r'; validXML(text) != want {
				t.Fatalf("byte %#x at %d: %v", c, at, !want)
			}
			if hasControl(text) != (c < ' ') {
				t.Fatalf("control %#x at %d", c, at)
			}
		}
	}
}
