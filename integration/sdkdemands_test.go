package integration_test

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// wechatSite is the gateway in the place of WeChat's own host, as SDKs see it that are led here by a hosts file.
const wechatSite = `
https://api.weixin.qq.com {
	tls internal
	encode
	wechat_api
}
`

// sdkWorld is a gateway process with a client that has two keys, and a second client.
type sdkWorld struct {
	*integration.World
	config string // the Caddyfile's path
	text   string
}

const twoKeys = "key {env.CRM_KEY} {env.CRM_KEY_OLD}"

func newSDKWorld(t *testing.T) *sdkWorld {
	t.Helper()
	return newSDKWorldOf(t, nil)
}

func newSDKWorldOf(t *testing.T, configure func(*integration.World)) *sdkWorld {
	t.Helper()
	example, err := os.ReadFile("../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	s := &sdkWorld{config: filepath.Join(t.TempDir(), "Caddyfile")}
	s.text = strings.Replace(string(example), "key {env.CRM_KEY}", twoKeys, 1)
	s.text = strings.Replace(s.text, "\t\tclient crm {", "\t\tclient bi {\n\t\t\tkey {env.BI_KEY}\n\t\t\tappids "+integration.AccountID+"\n\t\t}\n\t\tclient crm {", 1) + wechatSite
	if !strings.Contains(s.text, twoKeys) || !strings.Contains(s.text, "client bi") {
		t.Fatal("the example has another form than this test expects")
	}
	s.write(t, s.text)
	s.World = newWorld(t, func(w *integration.World) {
		w.Config.Faults = wxsim.Faults{Polite: true, NoCDATA: 0.5, StrayBytes: 0.5}
		w.Caddyfile = s.config
		w.Env = append(w.Env, "CRM_KEY_OLD="+oldKey, "BI_KEY="+biKey)
		if configure != nil {
			configure(w)
		}
	})
	return s
}

// The keys beside World.ClientKey.
const (
	oldKey = "crm-old-key-0123456789abcdef"
	biKey  = "bi-key-0123456789abcdef"
)

func (s *sdkWorld) write(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(s.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// token gets an opaque token as an SDK does.
func (s *sdkWorld) token(t *testing.T, appid, key string) string {
	t.Helper()
	_, body := call(t, s.World, http.MethodGet, tokenQuery(appid, key), nil, "")
	token, _ := field(t, body, "access_token").(string)
	if token == "" {
		t.Fatalf("no token: %s", body)
	}
	return token
}

func tokenQuery(appid, key string) string {
	return "/cgi-bin/token?grant_type=client_credential&appid=" + appid + "&secret=" + key
}

// last is the newest call of a path that WeChat saw.
func (s *sdkWorld) last(t *testing.T, path string) wxsim.Entry {
	t.Helper()
	calls := s.WeChat.Journal().Calls(path)
	if len(calls) == 0 {
		t.Fatalf("WeChat saw no %s", path)
	}
	return calls[len(calls)-1]
}

// sdkToken is an answer to a request for a token: one line, no escape, an integer, no errcode, a token that can be
// concatenated.
var sdkToken = regexp.MustCompile(`^\{"access_token":"[A-Za-z0-9_.~-]{1,512}","expires_in":7200\}$`)

// TestSDKDemands holds a gateway process to what unmodified SDKs demand of one that stands in for api.weixin.qq.com. The
// numbers are those of the list of demands, sdk-compat.md. What takes hours (an opaque token's end), and every form in
// detail, is in the unit tests of wechat_api, under the names in the comments.
func TestSDKDemands(t *testing.T) {
	t.Parallel()
	s := newSDKWorld(t)
	authorize(t, s.World)
	user, shopUser := s.WeChat.NewUser(integration.AuthorizerID), s.WeChat.NewUser(integration.AccountID)
	info := "/cgi-bin/user/info?openid=" + user.OpenID + "&access_token="
	shopInfo := "/cgi-bin/user/info?openid=" + shopUser.OpenID + "&access_token="
	var token string // of the authorizer, used over all that comes

	// First, because nobody has asked for the account's token yet.
	t.Run("16_cold_call_below_three_seconds", func(t *testing.T) {
		begin := time.Now()
		if _, body := call(t, s.World, http.MethodGet, shopInfo+s.token(t, integration.AccountID, s.ClientKey), nil, ""); !strings.Contains(body, shopUser.OpenID) {
			t.Errorf("got %s", body)
		}
		if took := time.Since(begin); took > 3*time.Second {
			t.Errorf("the first token and the first call took %v", took)
		}
		result, err := s.WeChat.PushMessage(t.Context(), wxsim.Message{Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "pace"})
		if err != nil || !result.OK() || len(result.Attempts) != 1 || result.Attempts[0].TimedOut {
			t.Errorf("a push: %s %v", result.Wrong, err)
		}
	})

	// TestAPITokenForms, TestAPITokenRefusals
	t.Run("01_paths_and_query", func(t *testing.T) {
		stable := `{"force_refresh":true,"secret":"` + s.ClientKey + `","appid":"` + integration.AuthorizerID + `","grant_type":"client_credential"}`
		for _, path := range []string{
			tokenQuery(integration.AuthorizerID, s.ClientKey) + "&neededText=",
			"/cgi-bin/token?x=&secret=" + s.ClientKey + "&neededText=&appid=" + integration.AuthorizerID + "&grant_type=client_credential",
		} {
			if status, body := call(t, s.World, http.MethodGet, path, nil, ""); status != 200 || !sdkToken.MatchString(body) {
				t.Errorf("token: %d %s", status, body)
			}
		}
		before := s.WeChat.Journal().Refreshes(wxsim.KindAuthorizer, integration.AuthorizerID)
		for _, kind := range []string{"application/json", "application/json;charset=utf-8", "text/plain", ""} {
			if status, body := call(t, s.World, http.MethodPost, "/cgi-bin/stable_token", http.Header{"Content-Type": {kind}}, stable); status != 200 || !sdkToken.MatchString(body) {
				t.Errorf("stable_token as %q: %d %s", kind, status, body)
			}
		}
		chunked, body := fetchBody(t, plainClient, http.MethodPost, s.APIURL("/cgi-bin/stable_token"), nil, io.MultiReader(strings.NewReader(stable)))
		if chunked.StatusCode != 200 || !sdkToken.MatchString(body) {
			t.Errorf("stable_token, chunked: %s", body)
		}
		if n := s.WeChat.Journal().Refreshes(wxsim.KindAuthorizer, integration.AuthorizerID); n != before {
			t.Error("force_refresh renewed what others use")
		}
	})
	t.Run("02_answers_in_one_line", func(t *testing.T) {
		for _, path := range []string{
			tokenQuery(integration.AuthorizerID, s.ClientKey), tokenQuery(integration.AuthorizerID, "wrong"), info + "nobodys", "/cgi-bin/..%2f?access_token=x",
			"/cgi-bin/component/api_query_auth?access_token=" + s.token(t, integration.AuthorizerID, s.ClientKey),
		} {
			resp, body := fetch(t, plainClient, http.MethodGet, s.APIURL(path), nil, "")
			if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "application/json" || strings.ContainsAny(body, "\n\r\t\\\uFEFF") || !strings.HasPrefix(body, "{") {
				t.Errorf("%.40s…: %d %s %q", path, resp.StatusCode, resp.Header.Get("Content-Type"), body)
			}
		}
	})
	t.Run("03_token_and_expires_in", func(t *testing.T) {
		if _, body := call(t, s.World, http.MethodGet, tokenQuery(integration.AuthorizerID, s.ClientKey), nil, ""); !sdkToken.MatchString(body) {
			t.Errorf("got %s", body)
		}
	})

	// TestAPIOpaqueSurvives; TestOpaqueSurvivesRestartOnEveryNode and TestOpaqueKeysRotate in tokens
	t.Run("04_opaque_token_outlives_everything", func(t *testing.T) {
		token = s.token(t, integration.AuthorizerID, s.ClientKey)
		good := func(when, api string) {
			t.Helper()
			resp, body := fetch(t, plainClient, http.MethodGet, "http://"+api+info+token, nil, "")
			if resp.StatusCode != 200 || !strings.Contains(body, user.OpenID) {
				t.Errorf("%s: %d %s", when, resp.StatusCode, body)
			}
		}
		good("at first", s.API)
		s.token(t, integration.AuthorizerID, s.ClientKey)
		s.token(t, integration.AuthorizerID, oldKey)
		good("after further grants", s.API)
		for _, errcode := range []int64{40001, 42001, 40014} {
			s.WeChat.FailNext("/cgi-bin/user/info", wxsim.Fault{Errcode: errcode})
			good(fmt.Sprintf("after WeChat's %d", errcode), s.API)
		}
		if err := s.Gateway.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
		good("after a reload", s.API)
		if err := s.Gateway.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := s.Gateway.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		good("after a kill", s.API)
		if err := s.Gateway.Stop(); err != nil {
			t.Fatal(err)
		}
		if err := s.Gateway.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		good("after a restart", s.API)
		api := secondNode(t, s.World)
		good("on another node", api)
	})

	// TestAPIExpiredOpaque, TestAPIRefusedTwice, TestAPIAlwaysRefusingPath, TestAPITokenTroubleAtWeChat
	t.Run("05_token_errors_only_when_a_grant_helps", func(t *testing.T) {
		if _, body := call(t, s.World, http.MethodGet, info+"80_unknown", nil, ""); !strings.Contains(body, `"errcode":40001,"errmsg":"invalid credential, access_token is invalid or not latest`) {
			t.Errorf("unknown token: %s", body)
		}
		s.WeChat.FailNext("/cgi-bin/menu/get", wxsim.Fault{Errcode: 40001, Times: -1})
		_, body := call(t, s.World, http.MethodGet, "/cgi-bin/menu/get?access_token="+token, nil, "")
		s.WeChat.ClearFaults()
		if !strings.Contains(body, `"errcode":48001`) {
			t.Errorf("a lasting 40001: %s", body)
		}
		if _, body := call(t, s.World, http.MethodGet, tokenQuery("wx8888888888888888", s.ClientKey), nil, ""); !strings.Contains(body, `"errcode":48001`) {
			t.Errorf("an account that the client does not list: %s", body)
		}
	})

	// TestAPINeverSendsTwice, TestAPISlow, TestAPIUnreachable
	t.Run("06_no_invented_busy_and_no_second_post", func(t *testing.T) {
		const send = "/cgi-bin/message/custom/send"
		body := `{"touser":"` + user.OpenID + `","msgtype":"text","text":{"content":"once"}}`
		s.WeChat.FailNext(send, wxsim.Fault{Act: true, DropConnection: true})
		status, answer := call(t, s.World, http.MethodPost, send+"?access_token="+token, nil, body)
		if status != http.StatusBadGateway || strings.Contains(answer, `"errcode":-1`) {
			t.Errorf("lost: %d %s", status, answer)
		}
		if sent := s.WeChat.SentTo(user.OpenID); len(sent) != 1 {
			t.Errorf("the user got %d messages", len(sent))
		}
		s.WeChat.FailNext(send, wxsim.Fault{Errcode: -1})
		status, answer = call(t, s.World, http.MethodPost, send+"?access_token="+token, nil, body)
		if status != 200 || !strings.Contains(answer, `"errcode":-1`) || len(s.WeChat.SentTo(user.OpenID)) != 1 {
			t.Errorf("WeChat's own -1: %d %s", status, answer)
		}
	})
	t.Run("07_status_as_it_comes", func(t *testing.T) {
		for _, errcode := range []int64{40003, 45009, 45011} {
			s.WeChat.FailNext("/cgi-bin/user/info", wxsim.Fault{Errcode: errcode})
			if status, body := call(t, s.World, http.MethodGet, info+token, nil, ""); status != 200 || !strings.Contains(body, fmt.Sprintf(`"errcode":%d,`, errcode)) {
				t.Errorf("%d: %d %s", errcode, status, body)
			}
		}
		const page = "<html><body>nginx</body></html>\n"
		s.WeChat.FailNext("/cgi-bin/user/info", wxsim.Fault{Status: 502, Body: page})
		if status, body := call(t, s.World, http.MethodGet, info+token, nil, ""); status != 502 || body != page {
			t.Errorf("a 502 of WeChat's: %d %q", status, body)
		}
		_, metrics := fetch(t, plainClient, http.MethodGet, "http://"+s.Admin+"/metrics", nil, "")
		for _, want := range []string{`caddy_wechat_api_errors_total{errcode="45009"} 1`, `caddy_wechat_api_errors_total{errcode="45011"} 1`, `caddy_wechat_api_calls_today{appid="` + integration.AuthorizerID + `"}`} {
			if !strings.Contains(metrics, want) {
				t.Errorf("not counted: %s", want)
			}
		}
	})

	var media string
	t.Run("08_content_types", func(t *testing.T) {
		resp, _ := fetch(t, plainClient, http.MethodPost, s.APIURL("/wxa/getwxacodeunlimit?access_token="+token), http.Header{"Content-Type": {"text/plain"}}, `{"scene":"a"}`)
		if resp.Header.Get("Content-Type") != "image/jpeg" || resp.Header.Get("Content-Disposition") == "" || resp.ContentLength <= 0 {
			t.Errorf("an image came as %v, length %d", resp.Header, resp.ContentLength)
		}
		if got := s.last(t, "/wxa/getwxacodeunlimit").Header.Get("Content-Type"); got != "text/plain" {
			t.Errorf("WeChat got %q", got)
		}
		s.WeChat.FailNext("/cgi-bin/media/get", wxsim.Fault{Status: 200, ContentType: "text/plain", Body: `{"errcode":40007,"errmsg":"invalid media_id"}`})
		if resp, body := fetch(t, plainClient, http.MethodGet, s.APIURL("/cgi-bin/media/get?media_id=x&access_token="+token), nil, ""); resp.Header.Get("Content-Type") != "text/plain" || !strings.Contains(body, "40007") {
			t.Errorf("an error of media/get came as %q: %s", resp.Header.Get("Content-Type"), body)
		}
		if resp, body := fetch(t, plainClient, http.MethodGet, s.APIURL("/sns/jscode2session?js_code=x&appid="+integration.AccountID+"&secret="+s.ClientKey), nil, ""); resp.Header.Get("Content-Type") != "text/plain" {
			t.Errorf("sns came as %q: %s", resp.Header.Get("Content-Type"), body)
		}
	})

	led := s.led(t)
	t.Run("09_no_compression_unasked", func(t *testing.T) {
		for asked, want := range map[string]string{"": "", "gzip": "gzip"} {
			header := http.Header{}
			if asked != "" {
				header.Set("Accept-Encoding", asked)
			}
			long := "/cgi-bin/user/get?access_token=" + token
			for range 20 {
				s.WeChat.NewUser(integration.AuthorizerID) // an answer that is worth compressing
			}
			resp, _ := fetch(t, led, http.MethodGet, "https://api.weixin.qq.com"+long, header, "")
			if got := resp.Header.Get("Content-Encoding"); got != want {
				t.Errorf("asked for %q, got %q", asked, got)
			}
			if got := s.last(t, "/cgi-bin/user/get").Header.Get("Accept-Encoding"); got != "" {
				t.Errorf("WeChat was asked for %q", got)
			}
		}
	})
	t.Run("10_no_redirects", func(t *testing.T) {
		for _, path := range []string{"//cgi-bin/user/info?openid=" + user.OpenID + "&access_token=" + token, "/" + integration.AuthorizerID + "//cgi-bin/user/info?openid=" + user.OpenID + "&access_token=" + token} {
			if status, body := call(t, s.World, http.MethodGet, path, nil, ""); status != 200 || !strings.Contains(body, user.OpenID) {
				t.Errorf("%.30s…: %d %s", path, status, body)
			}
		}
		if status, body := call(t, s.World, http.MethodPost, "//cgi-bin/menu/create?access_token="+token, nil, `{"button":[]}`); status != 200 || !strings.Contains(body, `"errcode":0`) {
			t.Errorf("POST: %d %s", status, body)
		}
	})
	t.Run("11_any_host", func(t *testing.T) {
		for _, host := range []string{"api.weixin.qq.com", "mp.weixin.qq.com", "gateway.internal:8090", "[::1]", "x"} {
			req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, s.APIURL(info+token), nil)
			req.Host = host
			resp, err := plainClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if resp.StatusCode != 200 {
				t.Errorf("Host %s: %d", host, resp.StatusCode)
			}
		}
	})

	// TestAPIMisc
	t.Run("12_methods", func(t *testing.T) {
		status, body := call(t, s.World, http.MethodPost, "/cgi-bin/ticket/getticket?type=jsapi&access_token="+token, nil, "")
		if status != 200 || !strings.Contains(body, `"errcode":0`) || field(t, body, "errmsg") != "ok" || field(t, body, "ticket") == nil || field(t, body, "expires_in") == nil {
			t.Errorf("getticket by POST: %d %s", status, body)
		}
		// Whoever asks gets the ticket that the gateway keeps, as long as it lives.
		ticket, asked := field(t, body, "ticket"), s.WeChat.Journal().Count("/cgi-bin/ticket/getticket")
		for _, form := range []string{"/cgi-bin/ticket/getticket?access_token=" + token + "&type=jsapi", "/cgi-bin/ticket/getticket?type=jsapi&access_token=" + token} {
			if _, body := call(t, s.World, http.MethodGet, form, nil, ""); field(t, body, "ticket") != ticket {
				t.Error("getticket by GET: another ticket")
			}
		}
		if n := s.WeChat.Journal().Count("/cgi-bin/ticket/getticket"); n != asked {
			t.Errorf("WeChat was asked for %d tickets more", n-asked)
		}
		form, kind := upload(t, []byte("\xff\xd8 small"))
		_, body = call(t, s.World, http.MethodPost, "/cgi-bin/media/upload?type=image&access_token="+token, http.Header{"Content-Type": {kind}}, string(form))
		media, _ = field(t, body, "media_id").(string)
		if status, body := call(t, s.World, http.MethodPost, "/cgi-bin/media/get?media_id="+url.QueryEscape(media)+"&access_token="+token, nil, ""); status != 200 || !strings.HasPrefix(body, "\xff\xd8") {
			t.Errorf("media/get by POST: %d %q", status, body)
		}
		// Where files come from, a refused token is healed too.
		for _, errcode := range []int64{40001, 40014, 42001, 42006, 40001, 42001} {
			s.WeChat.FailNext("/cgi-bin/media/get", wxsim.Fault{Errcode: errcode}) // as JSON or text/plain, in turn
			if status, body := call(t, s.World, http.MethodGet, "/cgi-bin/media/get?media_id="+url.QueryEscape(media)+"&access_token="+token, nil, ""); status != 200 || !strings.HasPrefix(body, "\xff\xd8") {
				t.Errorf("media/get after %d: %d %q", errcode, status, body)
			}
		}
	})

	// TestAppIDPrefix, TestAPIWays
	t.Run("13_appid_prefix", func(t *testing.T) {
		if status, body := call(t, s.World, http.MethodGet, "/"+integration.AuthorizerID+info+token, nil, ""); status != 200 || !strings.Contains(body, user.OpenID) {
			t.Errorf("below its prefix: %d %s", status, body)
		}
		if status, body := call(t, s.World, http.MethodGet, "/"+integration.AccountID+info+token, nil, ""); status != 200 || !strings.Contains(body, "48001") {
			t.Errorf("below another's prefix: %d %s", status, body)
		}
		if status, body := call(t, s.World, http.MethodGet, "/"+integration.AuthorizerID+tokenQuery(integration.AuthorizerID, s.ClientKey), nil, ""); status != 200 || !sdkToken.MatchString(body) {
			t.Errorf("a token below its prefix: %d %s", status, body)
		}
		if status, body := call(t, s.World, http.MethodPost, "/wxa/getwxacodeunlimit?access_token="+token, nil, `{"scene":"a"}`); status != 200 || !strings.Contains(body, "JFIF") {
			t.Errorf("/wxa/ is no prefix: %d %s", status, body)
		}
	})

	// TestSplitQuery, TestAPIUserTokenOnce
	t.Run("14_query_and_body_byte_for_byte", func(t *testing.T) {
		for query, want := range map[string]string{
			"access_token=T&a=%7e~+%E4%BD%A0&b=":  "access_token=%s&a=%7e~+%E4%BD%A0&b=",
			"b=2&a=1&b=1&access_token=T":          "b=2&a=1&b=1&access_token=%s",
			"access_token=T&x=1&access_token=T":   "access_token=%s&x=1",
			"x=access_token&access_token=T&%41=b": "x=access_token&access_token=%s&%41=b",
		} {
			_, _ = call(t, s.World, http.MethodGet, "/cgi-bin/user/get?"+strings.ReplaceAll(query, "T", token), nil, "")
			before, after, _ := strings.Cut(want, "%s")
			got := s.last(t, "/cgi-bin/user/get").Query
			if middle, ok := strings.CutPrefix(got, before); !ok || !strings.HasSuffix(middle, after) || strings.ContainsAny(strings.TrimSuffix(middle, after), "&=") {
				t.Errorf("%s: WeChat got %s, want %s", query, got, want)
			}
		}
		body := `{"button":[{"name":"菜单 <b>&amp;","type":"click","key":"\u4f60"}]}`
		if _, answer := call(t, s.World, http.MethodPost, "/cgi-bin/menu/create?access_token="+token, nil, body); !strings.Contains(answer, `"errcode":0`) {
			t.Fatal(answer)
		}
		if _, answer := call(t, s.World, http.MethodGet, "/cgi-bin/menu/get?access_token="+token, nil, ""); answer != `{"menu":`+body+`}` {
			t.Errorf("the menu became %s", answer)
		}
	})

	// TestAPIStreams, TestAPIExpectContinue, TestAPIBodyTooLargeToRepeat, TestUploadsInParallel
	t.Run("15_multipart", func(t *testing.T) {
		big := make([]byte, 10<<20)
		_, _ = rand.Read(big)
		form, kind := upload(t, big)
		path := "/cgi-bin/media/upload?type=image&access_token=" + token
		send := func(body []byte, expect bool) string {
			t.Helper()
			header := http.Header{"Content-Type": {kind}}
			if expect {
				header.Set("Expect", "100-continue")
			}
			_, answer := fetchBody(t, plainClient, http.MethodPost, s.APIURL(path), header, bytes.NewReader(body))
			return answer
		}
		for _, expect := range []bool{false, true} {
			answer := send(form, expect)
			if e := s.last(t, "/cgi-bin/media/upload"); e.BodySHA != sum(form) || e.BodySize != int64(len(form)) || e.Header.Get("Content-Type") != kind || !strings.Contains(answer, "media_id") {
				t.Errorf("WeChat got %d bytes as %s; %s", e.BodySize, e.Header.Get("Content-Type"), answer)
			}
		}
		// Too big to be repeated: WeChat's error shows, and the next call works.
		s.WeChat.FailNext("/cgi-bin/media/upload", wxsim.Fault{Errcode: 40001})
		before := s.WeChat.Journal().Count("/cgi-bin/media/upload")
		if answer := send(form, false); !strings.Contains(answer, `"errcode":40001`) || s.WeChat.Journal().Count("/cgi-bin/media/upload") != before+1 {
			t.Errorf("a body too big to be kept: %s", answer)
		}
		if answer := send(form, false); !strings.Contains(answer, "media_id") {
			t.Errorf("the next call: %s", answer)
		}
		// What can be kept is repeated whole, and a length is found for what came without one.
		small, kind2 := upload(t, big[:500<<10])
		kind = kind2
		s.WeChat.FailNext("/cgi-bin/media/upload", wxsim.Fault{Errcode: 42001})
		_, answer := fetchBody(t, plainClient, http.MethodPost, s.APIURL(path), http.Header{"Content-Type": {kind}}, io.MultiReader(bytes.NewReader(small)))
		if e := s.last(t, "/cgi-bin/media/upload"); !strings.Contains(answer, "media_id") || e.BodySHA != sum(small) {
			t.Errorf("a chunked upload, refused once: %s", answer)
		}
	})
	t.Run("17_keep_alive_and_h2", func(t *testing.T) {
		conn, err := net.Dial("tcp", s.API)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		r := bufio.NewReader(conn)
		for range 3 {
			_, _ = fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: api.weixin.qq.com\r\n\r\n", info+token)
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			if resp.StatusCode != 200 || resp.Close || resp.ContentLength <= 0 {
				t.Errorf("%d, close %v, length %d", resp.StatusCode, resp.Close, resp.ContentLength)
			}
		}
		if resp, body := fetch(t, led, http.MethodGet, "https://api.weixin.qq.com"+info+token, nil, ""); resp.ProtoMajor != 2 || !strings.Contains(body, user.OpenID) {
			t.Errorf("in the place of WeChat's host: %s %d %s", resp.Proto, resp.StatusCode, body)
		}
		// Caddy keeps idle connections for five minutes, unless it is told otherwise.
		if _, config := fetch(t, plainClient, http.MethodGet, "http://"+s.Admin+"/config/apps/http", nil, ""); strings.Contains(config, `"idle_timeout"`) || !strings.Contains(config, "wechat_api") {
			t.Error("the configuration sets an idle timeout")
		}
	})

	// As SDKs and their HTTP clients write requests: TestUploadForms in wxsim, TestAPIOddRequests.
	t.Run("20_forms_of_requests", func(t *testing.T) {
		raw := func(request, body string) string {
			t.Helper()
			conn, err := net.Dial("tcp", s.API)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = conn.Close() }()
			_ = conn.SetDeadline(time.Now().Add(time.Minute))
			head, rest, _ := strings.Cut(request, "\n")
			if rest = strings.ReplaceAll(rest, "\n", "\r\n"); rest != "" {
				rest += "\r\n"
			}
			if body != "" && !strings.Contains(rest, "hunked") {
				rest += fmt.Sprintf("Content-Length: %d\r\n", len(body))
			}
			_, _ = fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: API.Weixin.QQ.com\r\nConnection: close\r\n%s\r\n%s", head, rest, body)
			resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				t.Fatal(err)
			}
			answer, _ := io.ReadAll(resp.Body)
			return string(answer)
		}
		const picture = "\xff\xd8\xff\xe0 a picture"
		form := func(head string) string {
			return "--b\r\n" + head + "\r\n\r\n" + picture + "\r\n--b--\r\n"
		}
		const kind = "\nContent-Type: multipart/form-data; boundary=b"
		for name, head := range map[string]string{
			"wechatpy":      "Content-Disposition: form-data; name=\"media\"; filename=\"图 1.jpg\"",
			"EasyWeChat":    "Content-Type: image/jpeg\r\nContent-Transfer-Encoding: 8bit\r\nContent-Disposition: form-data; name=\"media\"; filename=\"a.jpg\"",
			"WxJava":        "Content-Disposition: form-data; name=\"media\"; filename=\"图.jpg\"\r\nContent-Type: application/octet-stream\r\nContent-Transfer-Encoding: binary",
			"both of names": "Content-Disposition: form-data; name=\"media\"; filename=\"a.jpg\"; filename*=utf-8''%E5%9B%BE.jpg\r\nContent-Type: image/jpeg",
		} {
			body := form(head)
			for _, how := range []string{"", "\nAccept-Encoding: gzip, deflate, br\nAccept: */*", "\nTransfer-Encoding: chunked"} {
				sent := body
				if strings.Contains(how, "chunked") {
					sent = fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body), body)
				}
				answer := raw("POST /cgi-bin/media/upload?access_token="+token+"&type=image"+kind+how, sent)
				if e := s.last(t, "/cgi-bin/media/upload"); !strings.Contains(answer, "media_id") || e.BodySHA != sum([]byte(body)) {
					t.Errorf("an upload as %s sends it,%s: %s", name, how, answer)
				}
			}
		}
		for name, request := range map[string]string{
			"a trailing &":              "GET " + info + token + "&",
			"empty parameters":          "GET /cgi-bin/user/info?&&access_token=" + token + "&lang=&openid=" + user.OpenID + "&&",
			"a token in front":          "GET /cgi-bin/user/info?access_token=" + token + "&openid=" + user.OpenID + "&lang=zh_CN",
			"an encoded token":          "GET " + info + strings.ReplaceAll(url.QueryEscape(token), "-", "%2D"),
			"a slash at the end":        "GET /cgi-bin/user/info/?openid=" + user.OpenID + "&access_token=" + token,
			"a whole URL":               "GET http://api.weixin.qq.com" + info + token,
			"a JSON GET":                "GET " + info + token + "\nContent-Type: application/json\nAccept: application/json",
			"a length of nothing":       "GET " + info + token + "\nContent-Length: 0",
			"no chunk":                  "GET " + info + token + "\nTransfer-Encoding: chunked",
			"an empty token and a key":  "GET /" + integration.AuthorizerID + "/cgi-bin/user/info?access_token=&openid=" + user.OpenID + "\nAuthorization: Bearer " + s.ClientKey,
			"names in lower case":       "GET /cgi-bin/user/info?openid=" + user.OpenID + "\nauthorization: bearer " + s.ClientKey + "\nx-wechat-appid: " + integration.AuthorizerID,
			"a cookie and an X-Trace":   "GET " + info + token + "\nCookie: a=b\nX-Trace: 1\nPragma: no-cache",
			"a user agent in Chinese":   "GET " + info + token + "\nUser-Agent: 商城/1.0",
			"a parameter in raw UTF-8":  "GET " + info + token + "&remark=你好",
			"an empty token beside one": "GET /cgi-bin/user/info?access_token=&openid=" + user.OpenID + "&access_token=" + token,
		} {
			body := ""
			if strings.Contains(request, "chunked") {
				body = "0\r\n\r\n"
			}
			if answer := raw(request, body); !strings.Contains(answer, user.OpenID) {
				t.Errorf("%s: %s", name, answer)
			}
		}
		for _, kind := range []string{"", "application/json", "application/json; charset=utf-8", "text/plain;charset=UTF-8", "text/xml", "application/x-www-form-urlencoded"} {
			for _, chunked := range []bool{false, true} {
				request, body := "POST /cgi-bin/menu/create?access_token="+token, `{"button":[{"name":"菜单","type":"click","key":"k"}]}`+"\n"
				if kind != "" {
					request += "\nContent-Type: " + kind
				}
				if chunked {
					request, body = request+"\nTransfer-Encoding: Chunked", fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body), body)
				}
				if answer := raw(request, body); !strings.Contains(answer, `"errcode":0`) {
					t.Errorf("a menu as %q, chunked %v: %s", kind, chunked, answer)
				}
			}
		}
	})

	// TestAPIOpaqueRights
	t.Run("18_tokens_of_several_keys_side_by_side", func(t *testing.T) {
		// Two apps that share a cache and an appid share a token, whichever key it was got with.
		for name, key := range map[string]string{"the other app": biKey, "the old key": oldKey, "the key": s.ClientKey} {
			shared := s.token(t, integration.AccountID, key)
			if _, body := call(t, s.World, http.MethodGet, shopInfo+shared, nil, ""); !strings.Contains(body, shopUser.OpenID) {
				t.Errorf("by %s: %s", name, body)
			}
		}
		old, other := s.token(t, integration.AuthorizerID, oldKey), s.token(t, integration.AccountID, biKey)
		s.write(t, strings.Replace(s.text, twoKeys, "key {env.CRM_KEY}", 1))
		if err := s.Gateway.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, body := call(t, s.World, http.MethodGet, info+token, nil, ""); !strings.Contains(body, user.OpenID) {
			t.Errorf("the key that stayed: %s", body)
		}
		if status, body := call(t, s.World, http.MethodGet, info+old, nil, ""); status != 200 || !strings.Contains(body, `"errcode":42001,"errmsg":"access_token expired`) {
			t.Errorf("the key that is gone: %d %s", status, body)
		}
		if status, body := call(t, s.World, http.MethodGet, tokenQuery(integration.AuthorizerID, oldKey), nil, ""); status != 200 || !strings.Contains(body, `"errcode":40125`) {
			t.Errorf("a grant with the key that is gone: %d %s", status, body)
		}
		// A right that is gone, and a client that is.
		s.write(t, strings.Replace(s.text, "appids "+integration.AccountID, "appids wx8888888888888888", 1))
		if err := s.Gateway.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
		if status, body := call(t, s.World, http.MethodGet, shopInfo+other, nil, ""); status != 200 || !strings.Contains(body, `"errcode":48001`) || !strings.Contains(body, "bi") {
			t.Errorf("the right is gone: %d %s", status, body)
		}
		s.write(t, strings.Replace(s.text, "client bi", "client other", 1))
		if err := s.Gateway.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
		if status, body := call(t, s.World, http.MethodGet, shopInfo+other, nil, ""); status != 200 || !strings.Contains(body, `"errcode":48001`) {
			t.Errorf("the client is gone: %d %s", status, body)
		}
	})

	// TestVectors, TestOpenRefusesBadPlaintext and TestScanEnvelope in crypto; TestForgedPushes
	t.Run("19_push_crypto", func(t *testing.T) {
		for n := range 33 { // every length of padding, either way
			text := strings.Repeat("x", n+1)
			for _, m := range []wxsim.Message{{Platform: integration.PlatformID, AppID: integration.AuthorizerID}, {AppID: integration.AccountID}} {
				m.Content = text
				if result, err := s.WeChat.PushMessage(t.Context(), m); err != nil || !result.OK() || result.UserSaw != "收到："+text {
					t.Errorf("%d characters: %s %v", n+1, result.Wrong, err)
				}
			}
		}
		for receiveID, status := range map[string]int{integration.PlatformID: 200, integration.AuthorizerID: 403, integration.PlatformID + "0": 403, integration.PlatformID[:17]: 403} {
			result, err := s.WeChat.PushMessage(t.Context(), wxsim.Message{
				Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "x", Attempts: 1, Keys: keysOf(s.World, receiveID), Tamper: func(*wxsim.Outgoing) {},
			})
			if err != nil || result.Last().Status != status {
				t.Errorf("receive id %s: %d %v", receiveID, result.Last().Status, err)
			}
		}
		const stem = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEF" // 42 characters
		plain, err := crypto.ParseKey(stem + "A")
		if err != nil {
			t.Fatal(err)
		}
		for _, last := range []string{"B", "C", "D"} {
			if key, err := crypto.ParseKey(stem + last); err != nil || !key.Same(plain) {
				t.Errorf("a key that ends in %s: %v", last, err)
			}
		}
	})
	checkViolations(t, s.World)
	for _, e := range s.WeChat.Journal().Entries() {
		if e.Direction == wxsim.In && strings.Contains(e.Query+string(e.Body), token) {
			t.Errorf("an opaque token came to WeChat: %s", e.Path)
		}
	}
}

// led is an SDK's HTTP client that a hosts file leads here.
func (s *sdkWorld) led(t *testing.T) *http.Client {
	t.Helper()
	client := httpsClient(t, s.World)
	client.Transport.(*http.Transport).DisableCompression = true // which asks for it unasked
	eventually(t, "a certificate for WeChat's name", func() error {
		resp, err := client.Get("https://api.weixin.qq.com/") //nolint:noctx // ends with the client's timeout
		if err == nil {
			_ = resp.Body.Close()
		}
		return err
	})
	return client
}

// secondNode starts another process on the storage of the first, and returns its API address.
func secondNode(t *testing.T, w *integration.World) string {
	t.Helper()
	return startNode(t, w)["api"]
}

// startNode starts another process on the storage of the first, and returns its addresses: admin, api, console, https, http.
func startNode(t *testing.T, w *integration.World) map[string]string {
	t.Helper()
	ports := map[string]string{"admin": "", "api": "", "console": "", "https": "", "http": ""}
	for name := range ports {
		addr, err := integration.FreeAddr("")
		if err != nil {
			t.Fatal(err)
		}
		ports[name] = addr
	}
	g := &integration.Gateway{
		Binary: w.Binary, Dir: w.Dir, Caddyfile: w.Caddyfile, Admin: ports["admin"],
		Env: append(slices.Clone(w.Gateway.Env), "WECHAT_ADMIN="+ports["admin"], "WECHAT_API_PORT="+integration.Port(ports["api"]), "WECHAT_CONSOLE_PORT="+integration.Port(ports["console"]),
			"WECHAT_HTTPS_PORT="+integration.Port(ports["https"]), "WECHAT_HTTP_PORT="+integration.Port(ports["http"])),
	}
	t.Cleanup(func() {
		if err := g.Stop(); err != nil {
			t.Error(err)
		}
		for _, race := range races(g.Log()) {
			t.Errorf("the second node has a data race:\n%s", race)
		}
		checkNoSecrets(t, w, "second node's log", g.Log())
	})
	if err := g.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return ports
}

// upload is a multipart body with one file, and its Content-Type.
func upload(t *testing.T, data []byte) (body []byte, contentType string) {
	t.Helper()
	var form bytes.Buffer
	mw := multipart.NewWriter(&form)
	part, err := mw.CreateFormFile("media", "a.jpg")
	if err == nil {
		_, err = part.Write(data)
	}
	if err == nil {
		err = mw.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return form.Bytes(), mw.FormDataContentType()
}

// sum is how the journal names a body.
func sum(body []byte) string { return fmt.Sprintf("%x", sha256.Sum256(body)) }
