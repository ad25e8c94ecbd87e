package caddymodule

import (
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"github.com/caddyserver/caddy/v2/caddyconfig/httpcaddyfile"
	"pgregory.net/rapid"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

func TestClassify(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]apiPath{
		"/cgi-bin/user/info":                         {use: useAccount, param: paramAccess},
		"/cgi-bin/message/custom/send":               {use: useAccount, param: paramAccess},
		"/wxa/commit":                                {use: useAccount, param: paramAccess},
		"/wxaapi/newtmpl/addtemplate":                {use: useAccount, param: paramAccess},
		"/datacube/getusersummary":                   {use: useAccount, param: paramAccess},
		"/card/create":                               {use: useAccount, param: paramAccess},
		"/cgi-bin/open/create":                       {use: useAccount, param: paramAccess},
		"/anything/new":                              {use: useAccount, param: paramAccess},
		"/cgi-bin/ticket/getticket":                  {use: useAccount, param: paramAccess},
		"/cgi-bin/component/api_create_preauthcode":  {use: useComponent, param: paramComponent},
		"/cgi-bin/component/fastregisterweapp":       {use: useComponent, param: paramComponent},
		"/cgi-bin/component/get_domain_confirmfile":  {use: useComponent, param: paramComponent},
		"/cgi-bin/component/setprivacysetting":       {use: useAccount, param: paramAccess},
		"/cgi-bin/component/getprivacysetting":       {use: useAccount, param: paramAccess},
		"/cgi-bin/component/uploadprivacyextfile":    {use: useAccount, param: paramAccess},
		"/wxa/gettemplatedraftlist":                  {use: useComponent, param: paramAccess},
		"/wxa/gettemplatelist":                       {use: useComponent, param: paramAccess},
		"/wxa/addtotemplate":                         {use: useComponent, param: paramAccess},
		"/wxa/deletetemplate":                        {use: useComponent, param: paramAccess},
		"/wxa/component/fastregisterpersonalweapp":   {use: useComponent, param: paramAccess},
		"/wxa/component/fastregisterbetaweapp":       {use: useComponent, param: paramAccess},
		"/componenttcb/batchgetenvid":                {use: useComponent, param: paramAccess},
		"/product/register/register_shop":            {use: useComponent, param: paramAccess},
		"/product/spu/add":                           {use: useAccount, param: paramAccess},
		"/wxa/security/applysetorderpathinfo":        {use: useComponent, param: paramAccess},
		"/wxa/security/get_code_privacy_info":        {use: useAccount, param: paramAccess},
		"/sns/component/jscode2session":              {use: useComponent, param: paramComponent, singleUse: true},
		"/sns/oauth2/component/access_token":         {use: useComponent, param: paramComponent, singleUse: true},
		"/sns/oauth2/component/refresh_token":        {use: useComponent, param: paramComponent},
		"/sns/oauth2/access_token":                   {use: useLogin, singleUse: true},
		"/sns/jscode2session":                        {use: useLogin, singleUse: true},
		"/sns/oauth2/refresh_token":                  {use: useNone},
		"/sns/userinfo":                              {use: useUser},
		"/sns/auth":                                  {use: useUser},
		"/cgi-bin/clear_quota":                       {use: useEither, param: paramAccess},
		"/cgi-bin/openapi/quota/get":                 {use: useEither, param: paramAccess},
		"/cgi-bin/getcallbackip":                     {use: useEither, param: paramAccess},
		"/cgi-bin/token":                             {use: useNone, answer: answerToken},
		"/cgi-bin/stable_token":                      {use: useNone, answer: answerStableToken},
		"/cgi-bin/component/api_component_token":     {use: useNone, answer: answerComponentToken},
		"/cgi-bin/component/api_authorizer_token":    {use: useComponent, answer: answerAuthorizerToken},
		"/cgi-bin/component/api_query_auth":          {use: useComponent, answer: answerNever},
		"/cgi-bin/component/api_get_authorizer_list": {use: useComponent, answer: answerNever},
		"/cgi-bin/component/api_get_authorizer_info": {use: useComponent, answer: answerNever},
		"/cgi-bin/account/fastregister":              {use: useAccount, answer: answerNever},
		"/cgi-bin/openapi/rid/get":                   {use: useEither, answer: answerNever},
		"/cgi-bin/clear_quota/v2":                    {use: useAccount, answer: answerNever},
	} {
		for _, spelling := range []string{path, strings.ToUpper(path)} {
			if got := classify(spelling); got != want {
				t.Errorf("%s: got %+v, want %+v", spelling, got, want)
			}
		}
	}
}

// The ambiguous row of WeChat's table is decided by whom the caller names.
func TestAPIEitherToken(t *testing.T) {
	wechat := newFakeWeChat(t)
	g := newGateway(t, wechat, "", "")
	g.authorize()
	for appid, key := range map[string]string{accountID: crmKey, authorizerID: crmKey, platformID: panelKey} {
		wechat.seen()
		for _, path := range []string{"/cgi-bin/clear_quota", "/cgi-bin/openapi/quota/get", "/cgi-bin/getcallbackip"} {
			g.post("/"+appid+path, "{}", bearer(key))
			if got := wechat.one(t); got.Query != "access_token=REALTOKEN-"+appid+"-1" {
				t.Errorf("%s for %s: WeChat got %s", path, appid, got.Query)
			}
		}
	}
}

func TestCanonicalPath(t *testing.T) {
	t.Parallel()
	for path, want := range map[string]string{
		"/cgi-bin/user/info": "/cgi-bin/user/info", "//cgi-bin/user": "/cgi-bin/user", "cgi-bin/user": "/cgi-bin/user", "/a.b/c_d/": "/a.b/c_d",
		"": "", "/": "", "///": "", "/a//b": "", "/../a": "", "/a/..": "", "/a/.": "", "/a%2fb": "", "/a;b": "", "/a b": "", "/a\\b": "",
		"/a\x00": "", "/é": "", "/a:b": "", "/a?b": "", "/a*": "", "/" + strings.Repeat("a", maxAPIPath+1): "",
	} {
		got, err := canonicalPath(path)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: got %q, %v; want %q", path, got, err, want)
		}
	}
}

func TestAppIDPrefix(t *testing.T) {
	t.Parallel()
	for path, want := range map[string][2]string{
		"/wx0123456789abcdef/cgi-bin/x":  {"wx0123456789abcdef", "cgi-bin/x"},
		"//wx0123456789abcdef//x":        {"wx0123456789abcdef", "/x"},
		"/wx0123456789abcdef":            {"", "/wx0123456789abcdef"},
		"/wx0123456789ABCDEF/x":          {"", "/wx0123456789ABCDEF/x"},
		"/wx0123456789abcdef0/x":         {"", "/wx0123456789abcdef0/x"},
		"/wxa/x":                         {"", "/wxa/x"},
		"/wxaapi/x":                      {"", "/wxaapi/x"},
		"/x/wx0123456789abcdef/x":        {"", "/x/wx0123456789abcdef/x"},
		"/wx0123456789abcdef%2fcgi-bin/": {"", "/wx0123456789abcdef%2fcgi-bin/"},
	} {
		appid, rest := appIDPrefix(path)
		if appid != want[0] || rest != want[1] {
			t.Errorf("%q: got %q, %q; want %q", path, appid, rest, want)
		}
	}
}

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
		"a=%zz&b=%E4%BD%A0+&&c":                               "a=%zz&b=%E4%BD%A0+&c&access_token=T",
		"a=1;b=2":                                             "a=1;b=2&access_token=T",
		"redirect=https%3A%2F%2Fx%3Faccess_token%3Dy":         "redirect=https%3A%2F%2Fx%3Faccess_token%3Dy&access_token=T",
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
	for _, raw := range []string{"a=1;access_token=x", "a;b;component_access_token", "access_token;", "access_token;a=1", "access%5Ftoken=1&a=1;access%5Ftoken=x"} {
		if _, err := splitQuery(raw); !errors.Is(err, errAPIQuery) {
			t.Errorf("%q: got %v, want a refusal", raw, err)
		}
	}
	q, err := splitQuery("secret=s&access_token=a%2Bb&access_token=a%2Bb&x=1", "secret")
	if credential, sole := q.sole(); err != nil || credential != "a+b" || !sole || q.with(nil) != "x=1" {
		t.Errorf("got %q, %v, rest %q, %v", credential, sole, q.with(nil), err)
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

func TestMatchPattern(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		pattern, path string
		want          bool
	}{
		{"/cgi-bin/user/info", "/cgi-bin/user/info", true},
		{"/cgi-bin/user/info", "/cgi-bin/user/info2", false},
		{"/cgi-bin/user/*", "/cgi-bin/user/info", true},
		{"/cgi-bin/user/*", "/cgi-bin/user/info/batchget", true},
		{"/cgi-bin/user/*", "/cgi-bin/user", false},
		{"/cgi-bin/user/*", "/cgi-bin/users", false},
		{"/cgi-bin/user*", "/cgi-bin/users", true},
		{"/*/get", "/cgi-bin/menu/get", true},
		{"/*/get", "/cgi-bin/menu/getx", false},
		{"/*/get", "/get", false},
		{"/a*b*c", "/axxbyyc", true},
		{"/a*b*c", "/axxbyyd", false},
		{"/a*b*c", "/abc", true},
		{"/a*b*c", "/ac", false},
		{"/*", "/anything/at/all", true},
		{"/**", "/x", true},
	} {
		if got := matchPattern(c.pattern, c.path); got != c.want {
			t.Errorf("%s on %s: got %v", c.pattern, c.path, got)
		}
	}
}

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
	for code, want := range map[int64]string{40001: "40001", -1: "-1", 45009: "45009", 123456789: "other", 0: "other"} {
		if got := errcodeLabel(code); got != want {
			t.Errorf("%d: got %s", code, got)
		}
	}
}

func TestPeek(t *testing.T) {
	t.Parallel()
	long := `{"a":"` + strings.Repeat("x", 3*peekSize) + `"}`
	for name, c := range map[string]struct {
		body  string
		whole bool
	}{
		"small JSON": {`{"errcode":0}`, true}, "spaces first": {"\n  {}", true}, "empty": {"", true}, "long JSON": {long, false},
		"one less than the limit": {long[:peekSize-1], true}, "the limit": {long[:peekSize], false}, "binary": {"\xff\xd8\xff" + long, false},
	} {
		for how, reader := range map[string]func(io.Reader) io.Reader{
			"at once": func(r io.Reader) io.Reader { return r }, "byte by byte": iotest.OneByteReader, "with its end": iotest.DataErrReader,
		} {
			p, whole := peek(io.NopCloser(reader(strings.NewReader(c.body))))
			got, err := io.ReadAll(p)
			if whole != c.whole || err != nil || string(got) != c.body {
				t.Errorf("%s, %s: whole %v, %d bytes, %v; want %v, %d bytes", name, how, whole, len(got), err, c.whole, len(c.body))
			}
		}
	}
	p, whole := peek(io.NopCloser(io.MultiReader(strings.NewReader(`{"a`), iotest.ErrReader(io.ErrUnexpectedEOF))))
	got, err := io.ReadAll(p)
	if whole || !errors.Is(err, io.ErrUnexpectedEOF) || string(got) != `{"a` {
		t.Errorf("broken: whole %v, %q, %v", whole, got, err)
	}
}

func TestKeptBody(t *testing.T) {
	t.Parallel()
	text := strings.Repeat("0123456789", 1000)
	for name, c := range map[string]struct {
		limit      int64
		repeatable bool
	}{"kept": {10_000, true}, "one too many": {9_999, false}} {
		for _, size := range []int64{int64(len(text)), -1} {
			b := newKeptBody(iotest.HalfReader(strings.NewReader(text)), size, c.limit)
			if size < 0 {
				if n := b.measure(); (n == int64(len(text))) != c.repeatable {
					t.Errorf("%s: measured %d", name, n)
				}
			}
			unread := b.open() // as for an origin that could not be reached
			unread.Close()
			first := b.open()
			got, err := io.ReadAll(first)
			if err != nil || string(got) != text {
				t.Errorf("%s, size %d: the first sending had %d bytes, %v", name, size, len(got), err)
			}
			first.Close()
			if _, err := first.Read(make([]byte, 1)); !errors.Is(err, errBodyClosed) {
				t.Errorf("%s: read after Close: %v", name, err)
			}
			if b.repeatable() != c.repeatable {
				t.Errorf("%s, size %d: repeatable is %v", name, size, b.repeatable())
			}
			got, err = io.ReadAll(b.open())
			if c.repeatable != (err == nil && string(got) == text) {
				t.Errorf("%s, size %d: the second sending had %d bytes, %v", name, size, len(got), err)
			}
		}
	}
}

// However much the first sending took, the second is whole.
func TestKeptBodyHandsOver(t *testing.T) {
	t.Parallel()
	text := strings.Repeat("0123456789", 1000)
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		b := newKeptBody(strings.NewReader(text), int64(len(text)), int64(len(text)))
		first := b.open()
		_, _ = io.CopyN(io.Discard, first, rng.Int64N(int64(len(text)+1)))
		first.Close()
		if got, err := io.ReadAll(b.open()); err != nil || string(got) != text {
			t.Fatalf("the second sending had %d bytes, %v", len(got), err)
		}
	}
	b := newKeptBody(io.MultiReader(strings.NewReader("x"), iotest.ErrReader(io.ErrUnexpectedEOF)), 2, 10)
	if _, err := io.ReadAll(b.open()); !errors.Is(err, io.ErrUnexpectedEOF) || b.repeatable() || !b.failed() {
		t.Errorf("a body that breaks off: %v, repeatable %v, failed %v", err, b.repeatable(), b.failed())
	}
}

func TestClientKeys(t *testing.T) {
	t.Parallel()
	a := &Client{Name: "a", keys: []secret.String{secret.New("k1"), secret.New("k2")}}
	b := &Client{Name: "b", keys: []secret.String{secret.New("k3")}}
	keys := newClientKeys([]*Client{a, b})
	for key, want := range map[string]*Client{"k1": a, "k2": a, "k3": b, "": nil, "k": nil, "k11": nil} {
		if got, _ := keys.find(key); got != want {
			t.Errorf("%q: got %v", key, got)
		}
	}
	_, fingerprint := keys.find("k2")
	if owner, current := keys.holder("a", fingerprint); owner != a || !current {
		t.Error("the holder of a key is not found")
	}
	if owner, current := keys.holder("b", fingerprint); owner != b || current {
		t.Error("another client's key is taken for this one's")
	}
	if owner, _ := keys.holder("c", fingerprint); owner != nil {
		t.Error("a client that is none is found")
	}
	// An empty key in the config would let everybody in who sends none.
	if got, _ := newClientKeys([]*Client{{Name: "x", keys: []secret.String{secret.New("")}}}).find(""); got != nil {
		t.Error("an empty key was accepted")
	}
}

func TestOutboundHeaderNominated(t *testing.T) {
	t.Parallel()
	out := outboundHeader(http.Header{"Connection": {"close, x-one", "X-Two"}, "X-One": {"1"}, "X-Two": {"2"}, "X-Three": {"3"}})
	if len(out) != 2 || out.Get("X-Three") != "3" || out["User-Agent"][0] != "" {
		t.Errorf("got %v", out)
	}
}

func TestAPIValidate(t *testing.T) {
	t.Parallel()
	for _, a := range []*API{{RepeatBuffer: -1}, {RepeatBuffer: maxSize + 1}, {ResponseTimeout: -1}} {
		if a.Validate() == nil {
			t.Errorf("%+v is accepted", a)
		}
	}
}

func TestAPIUnmarshalCaddyfile(t *testing.T) {
	t.Parallel()
	h := httpcaddyfile.Helper{Dispenser: caddyfile.NewTestDispenser("wechat_api {\n repeat_buffer 2MiB\n trust_loopback\n}")}
	handler, err := parseAPI(h)
	if err != nil {
		t.Fatal(err)
	}
	if a := handler.(*API); a.RepeatBuffer != 2<<20 || !a.TrustLoopback {
		t.Errorf("got %+v", a)
	}
	for input, want := range map[string]string{
		"wechat_api x": "wrong argument count", "wechat_api {\n nope\n}": "unknown subdirective 'nope'", "wechat_api {\n repeat_buffer\n}": "wrong argument count",
		"wechat_api {\n repeat_buffer 1MiB 2MiB\n}": "wrong argument count", "wechat_api {\n repeat_buffer much\n}": "'much' is not a size",
		"wechat_api {\n repeat_buffer 0\n}": "is not a size", "wechat_api {\n repeat_buffer 1MiB\n repeat_buffer 1MiB\n}": "given twice",
		"wechat_api {\n trust_loopback yes\n}": "wrong argument count", "wechat_api {\n trust_loopback\n trust_loopback\n}": "given twice",
	} {
		_, err := parseAPI(httpcaddyfile.Helper{Dispenser: caddyfile.NewTestDispenser(input)})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "Testfile:") {
			t.Errorf("%q: got %v, want %q with file and line", input, err, want)
		}
	}
}
