package caddymodule

import (
	"testing"
)

func TestScanErrcode(t *testing.T) {
	t.Parallel()
	for body, want := range map[string]int64{
		`{"errcode":40001,"errmsg":"x"}`: 40001, `{"errmsg":"a \"errcode\":1","errcode" : 42001}`: 42001, " \n{ \"errcode\":\t-1 }": -1,
		`{"errcode":"40014"}`: 40014, `{"errcode":0}`: 0, `{"a":{"errcode":1},"errcode":2}`: 2, `{"a":[{"errcode":1}],"b":"}","errcode":3}`: 3,
	} {
		if got, found := scanErrcode([]byte(body)); !found || got != want {
			t.Errorf("%s: got %d, %v", body, got, found)
		}
	}
	for _, body := range []string{"", "{}", `{"a":1}`, `{"a":{"errcode":1}}`, `[{"errcode":1}]`, `{"errcode":null}`, `{"errcode":{}}`, `{"errcode"`, `{"errcode":`,
		`{"x":"errcode"}`, `{"err`, `{"errcode":99999999999999999999}`, `"errcode":1`, `{"a\"errcode":1}`} {
		if got, found := scanErrcode([]byte(body)); found {
			t.Errorf("%s: found %d", body, got)
		}
	}
}

func TestErrcodeLabel(t *testing.T) {
	t.Parallel()
	for code, want := range map[int64]string{40001: "40001", -1: "-1", 45009: "45009", 85021: "85021", 123456789: "other", 1: "other"} {
		if got := errcodeLabel(code); got != want {
			t.Errorf("%d: got %s", code, got)
		}
	}
}
