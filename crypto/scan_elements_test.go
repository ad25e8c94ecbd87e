package crypto

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

// The paths of these tests and of the fuzz target.
var testPaths = []string{"MsgType", "Image/MediaId", "Articles/item/Title", "Articles/Title", "a/b/c/d"}

// elementsText lists what was found, for comparison.
func elementsText(values []Text) string {
	var out strings.Builder
	for i, v := range values {
		if v != nil {
			fmt.Fprintf(&out, "%s=%s;", testPaths[i], string(v))
		}
	}
	return out.String()
}

func TestScanElements(t *testing.T) {
	t.Parallel()
	tests := []struct{ name, message, want string }{
		{
			"as WeChat writes it",
			"<xml>\n  <MsgType><![CDATA[image]]></MsgType>\n  <Image>\n    <MediaId><![CDATA[id]]></MediaId>\n  </Image>\n</xml>",
			"MsgType=image;Image/MediaId=id;",
		},
		{"plain text in another order", "<xml><Image><MediaId>a&amp;b</MediaId></Image><MsgType>image</MsgType></xml>", "MsgType=image;Image/MediaId=a&b;"},
		{"the first of many", "<xml><Articles><item><Title>1</Title></item><item><Title>2</Title></item></Articles></xml>", "Articles/item/Title=1;"},
		{"the first one lacks it", "<xml><Articles><item/><item><Title>2</Title></item></Articles></xml>", ""},
		{"unknown elements", "<xml><x>t<Image>no</Image></x><Image><x><MediaId>no</MediaId>t</x><MediaId>id</MediaId><y/></Image></xml>", "Image/MediaId=id;"},
		{"known names elsewhere", "<xml><MediaId>no</MediaId><Title>no</Title><a><MsgType>no</MsgType><b><d>no</d></b></a></xml>", ""},
		{"deepest path", "<xml><a><b><c><d><![CDATA[]]]]><![CDATA[>]]></d></c></b></a></xml>", "a/b/c/d=]]>;"},
		{"empty", "<xml><MsgType/><Image></Image><Articles><item><Title/></item></Articles><a/></xml>", "MsgType=;Articles/item/Title=;"},
		{"comments", "<xml><!----><Image><!--a--><MediaId>i<!--b-->d</MediaId><!--c--></Image></xml>", "Image/MediaId=id;"},
		{"mark and declaration", "\ufeff<?xml version='1.0' encoding='utf-8'?>\n<xml><Image><MediaId>id</MediaId></Image></xml>", "Image/MediaId=id;"},
		{"no elements", "<xml/>", ""},

		{"JSON", `{"MsgType":"image","Image":{"MediaId":"id"}}`, "MsgType=image;Image/MediaId=id;"},
		{"JSON in another order", ` { "Image" : { "x" : [ { "MediaId" : 1 } ] , "MediaId" : "\u4f60" } , "MsgType" : 7 } `, "MsgType=7;Image/MediaId=你;"},
		{"JSON array of articles", `{"Articles":[{"Title":"1"},{"Title":"2"}]}`, "Articles/Title=1;"},
		{"JSON array of items", `{"Articles":{"item":[{"Title":"1"},{"Title":"2"},3,null]}}`, "Articles/item/Title=1;"},
		{"JSON one item", `{"Articles":{"item":{"Title":"1"}}}`, "Articles/item/Title=1;"},
		{"JSON item twice", `{"Articles":{"item":{"Title":"1"},"item":{"Title":"2"}}}`, "Articles/item/Title=1;"},
		{"JSON arrays in arrays", `{"Articles":[[{"Title":"1"}],[]]}`, "Articles/Title=1;"},
		{"JSON empty", `{"MsgType":null,"Image":null,"Articles":[],"a":{"b":[null,{"c":{"d":1}}]}}`, "MsgType=;"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			format := FormatXML
			if strings.Contains(test.name, "JSON") {
				format = FormatJSON
			}
			message := []byte(test.message)
			values, err := ScanElements(message, format, testPaths...)
			if err != nil {
				t.Fatal(err)
			}
			if got := elementsText(values); got != test.want {
				t.Errorf("got  %s\nwant %s", got, test.want)
			}
			for _, v := range values {
				_ = append(v, "overrun!"...) // must not reach the message
			}
			if string(message) != test.message {
				t.Error("the message was changed")
			}
			if _, err := ScanElements(message, 1-format, testPaths...); err == nil {
				t.Error("taken for the other format")
			}
		})
	}
}

func TestScanElementsRefuses(t *testing.T) {
	t.Parallel()
	deep := func(open, end string, n int) string { return strings.Repeat(open, n) + strings.Repeat(end, n) }
	tests := []struct {
		name, message string
		want          error
	}{
		{"empty", "", errUnknown},
		{"no message", "success", errUnknown},
		{"HTML", "<html></html>", errRoot},
		{"DOCTYPE", "<!DOCTYPE xml><xml/>", errMarkup},
		{"repeated value", "<xml><Image><MediaId>a</MediaId><MediaId>a</MediaId></Image></xml>", errDuplicate},
		{"repeated at the top", "<xml><MsgType>a</MsgType><MsgType>a</MsgType></xml>", errDuplicate},
		{"repeated element at the top", "<xml><Image/><Image><MediaId>a</MediaId></Image></xml>", errDuplicate},
		{"text around elements", "<xml><Image>a<MediaId>id</MediaId></Image></xml>", errNestedText},
		{"CDATA around elements", "<xml><Image><![CDATA[ ]]><MediaId>id</MediaId></Image></xml>", errNestedText},
		{"element as value", "<xml><Image><MediaId><b/></MediaId></Image></xml>", errNested},
		{"attribute", "<xml><Image><MediaId x='y'>id</MediaId></Image></xml>", errAttribute},
		{"crossed tags", "<xml><Image><MediaId>id</Image></MediaId></xml>", errSyntax},
		{"wrong end", "<xml><Image><MediaId>id</MediaId></Images></xml>", errSyntax},
		{"cut within", "<xml><Image><MediaId>id</MediaId>", errSyntax},
		{"cut before", "<xml><Image>", errSyntax},
		{"more behind", "<xml><Image><MediaId>id</MediaId></Image></xml><xml/>", errTrailing},
		{"broken after the value", "<xml><Image><MediaId>id</MediaId></Image><x>&y;</x></xml>", errEntity},
		{"broken second article", "<xml><Articles><item/><item><Title>&y;</Title></item></Articles></xml>", errEntity},
		{"too deep", "<xml><Image>" + deep("<x>", "</x>", maxDepth) + "</Image></xml>", errDeep},

		{"JSON repeated value", `{"Image":{"MediaId":1,"MediaId":1}}`, errDuplicate},
		{"JSON repeated at the top", `{"Image":null,"Image":{"MediaId":1}}`, errDuplicate},
		{"JSON text for an element", `{"Image":"id"}`, errNestedText},
		{"JSON array as value", `{"Image":{"MediaId":["id"]}}`, errNested},
		{"JSON comma at the end", `{"Image":{"MediaId":"id",}}`, errSyntax},
		{"JSON comma at the end of an array", `{"Articles":[{"Title":"1"},]}`, errSyntax},
		{"JSON array without comma", `{"Articles":[{"Title":"1"}{}]}`, errSyntax},
		{"JSON cut within an array", `{"Articles":[{"Title":"1"}`, errSyntax},
		{"JSON cut word", `{"Image":nul}`, errSyntax},
		{"JSON more behind", `{"Image":{"MediaId":"id"}}}`, errTrailing},
		{"JSON too deep", `{"Image":` + deep("[", "]", maxDepth+1) + `}`, errDeep},
		{"JSON too deep beside", `{"Image":{"x":` + deep("[", "]", maxDepth) + `}}`, errDeep},
		{"JSON too deep behind the first", `{"Image":[{},` + deep("[", "]", maxDepth) + `]}`, errDeep},
		{"JSON very deep", `{"Image":` + strings.Repeat("[", 1<<20), errDeep},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			format := FormatXML
			if strings.Contains(test.name, "JSON") {
				format = FormatJSON
			}
			values, err := ScanElements([]byte(test.message), format, testPaths...)
			wantErr(t, err, test.want)
			wantErr(t, err, ErrEnvelope)
			if values != nil {
				t.Errorf("values beside the error: %d", len(values))
			}
		})
	}
	for format, message := range map[Format]string{
		FormatXML:  "<xml><Image>" + deep("<x>", "</x>", maxDepth-1) + "</Image></xml>",
		FormatJSON: `{"Image":{"x":` + deep("[", "]", maxDepth-1) + `}}`,
	} {
		if _, err := ScanElements([]byte(message), format, testPaths...); err != nil {
			t.Errorf("%s at the limit of depth: %v", format, err)
		}
	}
	for _, image := range []string{deep("[", "]", maxDepth), "[{}," + deep("[", "]", maxDepth-1) + "]"} {
		if _, err := ScanElements([]byte(`{"Image":`+image+`}`), FormatJSON, testPaths...); err != nil {
			t.Errorf("arrays at the limit of depth: %v", err)
		}
	}
	if _, err := ScanElements([]byte("{}"), FormatXML); err == nil || !strings.Contains(err.Error(), "expected format") {
		t.Errorf("JSON for XML: %v", err)
	}
}

// What is found, and what it costs in memory, must not depend on how much else is there.
func TestScanElementsManyArticles(t *testing.T) {
	const articles = 10_000
	asXML := "<xml><Articles><item><Title>1</Title></item>" + strings.Repeat("<item><Title>x</Title><Title>y</Title></item>", articles) + "</Articles></xml>"
	asJSON := `{"Articles":[{"Title":"1"}` + strings.Repeat(`,{"Title":"x","Title":"y"}`, articles) + "]}"
	for format, message := range map[Format]string{FormatXML: asXML, FormatJSON: asJSON} {
		values, err := ScanElements([]byte(message), format, "Articles/item/Title", "Articles/Title")
		if err != nil {
			t.Fatal(err)
		}
		if got := bytes.Join([][]byte{values[0], values[1]}, nil); string(got) != "1" {
			t.Errorf("%s: %q", format, got)
		}
		if allocs := testing.AllocsPerRun(3, func() { _, _ = ScanElements([]byte(message), format, "Articles/item/Title") }); allocs > 20 {
			t.Errorf("%s: %v allocations", format, allocs)
		}
	}
}
