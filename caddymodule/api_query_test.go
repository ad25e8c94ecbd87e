package caddymodule

import (
	"errors"
	"net/url"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

func TestSplitQuery(t *testing.T) {
	t.Parallel()
	token := []queryParam{{paramAccess, secret.New("T")}}
	for raw, want := range map[string]string{
		"":                                 "access_token=T",
		"a=1":                              "a=1&access_token=T",
		"access_token=x":                   "access_token=T",
		"access_token":                     "access_token=T",
		"access_token=x&a=1":               "access_token=T&a=1",
		"a=1&access_token=x":               "a=1&access_token=T",
		"a=1&access_token=x&b=2":           "a=1&access_token=T&b=2",
		"access_token=x&a=1&access_token=": "access_token=T&a=1",
		"a=1&component_access_token=x&b=2&access_token=y&c=3": "a=1&access_token=T&b=2&c=3",
		"access%5ftoken=x&a=1":                                "access_token=T&a=1",
		"%61ccess_token=x":                                    "access_token=T",
		"Access_Token=x":                                      "access_token=T",
		"+access_token%00=x":                                  "access_token=T",
		"a=access_token=x":                                    "a=access_token=x&access_token=T",
		"my_access_token=x":                                   "my_access_token=x&access_token=T",
		"a=%zz&b=%E4%BD%A0+&&c":                               "a=%zz&b=%E4%BD%A0+&&c&access_token=T",
		"&a=1&&access_token=x&&b=2&":                          "&a=1&&access_token=T&&b=2&",
		"&access_token=x":                                     "&access_token=T",
		"access_token=x&":                                     "access_token=T&",
		"&":                                                   "&&access_token=T",
		"a=1;b=2":                                             "a=1;b=2&access_token=T",
		"a=1&secret=k&b=2&appsecret=k&component_appsecret=k": "a=1&b=2&access_token=T",
		"Secret=k&se%63ret=k&+secret=k&mysecret=1":           "mysecret=1&access_token=T",
		"redirect=https%3A%2F%2Fx%3Faccess_token%3Dy":        "redirect=https%3A%2F%2Fx%3Faccess_token%3Dy&access_token=T",
	} {
		q, err := splitQuery(raw)
		if err != nil {
			t.Errorf("%q: %v", raw, err)
			continue
		}
		if got := q.with(token); got != want {
			t.Errorf("%q: got %q, want %q", raw, got, want)
		}
	}
	for _, raw := range []string{"a=1;access_token=x", "a;b;component_access_token", "access_token;", "access_token;a=1", "access%5Ftoken=1&a=1;access%5Ftoken=x", "a=1;secret=k"} {
		if _, err := splitQuery(raw); !errors.Is(err, errAPIQuery) {
			t.Errorf("%q: got %v, want a refusal", raw, err)
		}
	}
	for c := range 256 {
		_, err := splitQuery("a=1&b=" + string([]byte{byte(c)}) + "&c=1")
		if want := c <= ' ' || c == 0x7f || c == '#'; errors.Is(err, errAPIQueryByte) != want {
			t.Errorf("byte %#x: got %v, want refused: %v", c, err, want)
		}
	}
	q, err := splitQuery("secret=s&access_token=a%2Bb&access_token=a%2Bb&x=1", "secret")
	if credential, sole := q.sole(); err != nil || credential != "a+b" || !sole || q.with(nil) != "x=1" {
		t.Errorf("got %q, %v, rest %q, %v", credential, sole, q.with(nil), err)
	}
	for raw, want := range map[string]string{"access_token=&x=1&access_token=a": "a", "access_token=a&component_access_token&x=1": "a", "access_token=&x=1": ""} {
		q, err := splitQuery(raw)
		if credential, sole := q.sole(); err != nil || credential != want || q.rawCredential != want || !sole || q.with(nil) != "x=1" {
			t.Errorf("%s: got %q, %q, %v, rest %q, %v", raw, credential, q.rawCredential, sole, q.with(nil), err)
		}
	}
}

// Whatever the query, no reader finds more than the gateway's one token in what goes to WeChat.
func TestSplitQueryLeavesOneToken(t *testing.T) {
	t.Parallel()
	pieces := rapid.SampledFrom([]string{
		"&", "&", "=", "=", ";", "+", "%", "%00", "%26", "%3b", "%3D", "a", "1", "access_token", "access_token=x", "access%5ftoken", "%61ccess_token",
		"ACCESS_TOKEN", "component_access_token", "component%5Faccess_token=", "cloudbase_access_token", "access%255ftoken", "你",
	})
	rapid.Check(t, func(t *rapid.T) {
		raw := strings.Join(rapid.SliceOfN(pieces, 0, 20).Draw(t, "pieces"), "")
		q, err := splitQuery(raw)
		if err != nil {
			return
		}
		out := q.with([]queryParam{{paramAccess, secret.New("T")}})
		for _, separators := range []string{"&", "&;"} {
			tokens := 0
			for _, segment := range strings.FieldsFunc(out, func(r rune) bool { return strings.ContainsRune(separators, r) }) {
				name, value, _ := strings.Cut(segment, "=")
				if name, err = url.QueryUnescape(name); err == nil && strings.HasSuffix(strings.ToLower(strings.TrimSpace(name)), "access_token") {
					if slices.Contains([]string{"access_token", "component_access_token", "cloudbase_access_token"}, name) {
						tokens++
						if value != "T" {
							t.Fatalf("%q became %q", raw, out)
						}
					}
				}
			}
			if tokens != 1 {
				t.Fatalf("%q became %q, with %d tokens", raw, out, tokens)
			}
		}
	})
}
