package integration_test

import (
	"bytes"
	"context"
	"fmt"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// TestJobs goes through the gateway's five jobs on one process, with the simulated WeChat as hostile as it is by
// default.
func TestJobs(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	authorize(t, w)
	t.Run("tls", func(t *testing.T) { jobTLS(t, w) })
	t.Run("verify", func(t *testing.T) { jobVerify(t, w) })
	t.Run("handshake", func(t *testing.T) { jobHandshake(t, w) })
	t.Run("message", func(t *testing.T) { jobMessage(t, w) })
	t.Run("account message", func(t *testing.T) { jobAccountMessage(t, w) })
	t.Run("routing by event", func(t *testing.T) { jobEvents(t, w) })
	t.Run("api", func(t *testing.T) { jobAPI(t, w) })
	t.Run("upload", func(t *testing.T) { jobUpload(t, w) })
	t.Run("oauth", func(t *testing.T) { jobOAuth(t, w) })
	t.Run("release check", func(t *testing.T) { jobReleaseCheck(t, w) })
	t.Run("unauthorized", func(t *testing.T) { jobUnauthorized(t, w) })
	checkViolations(t, w)
	t.Run("secrets", func(t *testing.T) { checkOutputs(t, w) })
}

func jobTLS(t *testing.T, w *integration.World) {
	resp, _ := fetch(t, httpsClient(t, w), http.MethodGet, w.URL("/"), nil, "")
	if resp.TLS == nil || resp.ProtoMajor != 2 {
		t.Errorf("protocol %s", resp.Proto)
	}
}

func jobVerify(t *testing.T, w *integration.World) {
	plain := "http://" + w.HTTP
	for _, tt := range []struct {
		client  *http.Client
		address string
		status  int
	}{
		{httpsClient(t, w), w.URL("/" + integration.VerifyName), 200},
		{plainClient, plain + "/" + integration.VerifyName, 404}, // not by the address
		{httpsClient(t, w), w.URL("/MP_verify_nobodyknows00000.txt"), 200},
	} {
		resp, body := fetch(t, tt.client, http.MethodGet, tt.address, http.Header{}, "")
		if tt.address == w.URL("/"+integration.VerifyName) {
			if body != integration.VerifyContent || resp.Header.Get("Content-Type") != "text/plain" {
				t.Errorf("%q as %s", body, resp.Header.Get("Content-Type"))
			}
		} else if strings.Contains(body, integration.VerifyContent) {
			t.Errorf("%s: %q", tt.address, body)
		}
	}
	resp, body := fetch(t, plainClient, http.MethodGet, "http://"+integration.Host+":"+integration.Port(w.HTTP)+"/"+integration.VerifyName, nil, "")
	if resp.StatusCode != 200 || body != integration.VerifyContent {
		t.Errorf("on plain http: %d %q", resp.StatusCode, body)
	}
	resp, _ = fetch(t, plainClient, http.MethodGet, "http://"+integration.Host+":"+integration.Port(w.HTTP)+"/other", nil, "")
	if resp.StatusCode != 302 {
		t.Errorf("anything else on plain http: %d", resp.StatusCode)
	}
	// A file added later is served without a reload.
	if err := os.WriteFile(filepath.Join(w.Dir, "verify", "abcdef1234.txt"), []byte("0123456789abcdef"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, body := fetch(t, httpsClient(t, w), http.MethodGet, w.URL("/abcdef1234.txt"), nil, ""); body != "0123456789abcdef" {
		t.Errorf("added file: %q", body)
	}
}

func jobHandshake(t *testing.T, w *integration.World) {
	for name, check := range map[string]func() (wxsim.Handshake, error){
		"event URL": func() (wxsim.Handshake, error) { return w.WeChat.VerifyEventURL(t.Context(), integration.PlatformID) },
		"message URL": func() (wxsim.Handshake, error) {
			return w.WeChat.VerifyMessageURL(t.Context(), integration.PlatformID, integration.AuthorizerID)
		},
		"account URL": func() (wxsim.Handshake, error) {
			return w.WeChat.VerifyMessageURL(t.Context(), "", integration.AccountID)
		},
	} {
		if h, err := check(); err != nil || h.Wrong != "" {
			t.Errorf("%s: %s %v", name, h.Wrong, err)
		}
	}
}

func jobMessage(t *testing.T, w *integration.World) {
	for i := range 20 {
		text := fmt.Sprintf("你好 <%d> & \"%s\"", i, strings.Repeat("长", i*40))
		result, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{
			Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: text,
		})
		if err != nil || !result.OK() {
			t.Fatalf("push %d: %s %v", i, result.Wrong, err)
		}
		if result.UserSaw != "收到："+text {
			t.Errorf("user saw %q", result.UserSaw)
		}
	}
	received := w.Backend.Received()
	last := received[len(received)-1]
	if last.Header.Get("X-Wechat-Appid") != integration.AuthorizerID || last.Header.Get("X-Wechat-Platform") != integration.PlatformID {
		t.Errorf("headers %v", last.Header)
	}
	if last.Length != int64(len(last.Body)) || last.Length <= 0 {
		t.Errorf("length %d of %d", last.Length, len(last.Body))
	}
	if strings.Contains(last.URI, "msg_signature") || strings.Contains(last.URI, "encrypt_type") || !strings.Contains(last.URI, "openid=") {
		t.Errorf("query %s", last.URI)
	}
}

func jobAccountMessage(t *testing.T, w *integration.World) {
	result, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{AppID: integration.AccountID, Content: "shop"})
	if err != nil || !result.OK() || result.UserSaw != "收到：shop" {
		t.Fatalf("%q %s %v", result.UserSaw, result.Wrong, err)
	}
}

func jobEvents(t *testing.T, w *integration.World) {
	for _, m := range []wxsim.Message{{Event: "LOCATION"}, {Event: "CLICK", EventKey: "menu_1"}, {Event: "subscribe"}} {
		m.Platform, m.AppID = integration.PlatformID, integration.AuthorizerID
		result, err := w.WeChat.PushMessage(t.Context(), m)
		if err != nil || !result.OK() || result.UserSaw != "" {
			t.Errorf("%s: %q %s %v", m.Event, result.UserSaw, result.Wrong, err)
		}
	}
}

// jobAPI calls for the authorizer and for the plain account, in all three ways.
func jobAPI(t *testing.T, w *integration.World) {
	for _, appid := range []string{integration.AuthorizerID, integration.AccountID} {
		user := w.WeChat.NewUser(appid)
		info := "/cgi-bin/user/info?lang=zh_CN&openid=" + user.OpenID
		_, grant := call(t, w, http.MethodGet, "/cgi-bin/token?grant_type=client_credential&appid="+appid+"&secret="+w.ClientKey, nil, "")
		token, _ := field(t, grant, "access_token").(string)
		if token == "" || strings.HasSuffix(grant, "\n") {
			t.Fatalf("grant %q", grant)
		}
		_, stable := call(t, w, http.MethodPost, "/"+appid+"/cgi-bin/stable_token", nil,
			`{"grant_type":"client_credential","appid":"`+appid+`","secret":"`+w.ClientKey+`"}`)
		stableToken, _ := field(t, stable, "access_token").(string)
		header := bearer(w)
		header.Set("X-Wechat-Appid", appid)
		for name, do := range map[string]func() (int, string){
			"path":           func() (int, string) { return call(t, w, http.MethodGet, "/"+appid+info, bearer(w), "") },
			"header":         func() (int, string) { return call(t, w, http.MethodGet, info, header, "") },
			"drop-in":        func() (int, string) { return call(t, w, http.MethodGet, info+"&access_token="+token, nil, "") },
			"drop-in stable": func() (int, string) { return call(t, w, http.MethodGet, info+"&access_token="+stableToken, nil, "") },
		} {
			retryLost(t, appid+" by "+name, user.OpenID, do)
		}
		for _, real := range w.WeChat.Issued(wxsim.KindComponent, wxsim.KindAuthorizer, wxsim.KindAccount, wxsim.KindStable) {
			if strings.Contains(grant+stable, real) {
				t.Error("a real token was handed out")
			}
		}
	}
}

// retryLost repeats a call that the hostile WeChat lost: only the caller can know whether that is safe.
func retryLost(t *testing.T, what, want string, do func() (int, string)) {
	t.Helper()
	var status int
	var body string
	for range 5 {
		if status, body = do(); status != http.StatusBadGateway {
			break
		}
	}
	if status != 200 || !strings.Contains(body, want) {
		t.Errorf("%s: %d %s", what, status, body)
	}
}

func jobUpload(t *testing.T, w *integration.World) {
	var form bytes.Buffer
	mw := multipart.NewWriter(&form)
	part, _ := mw.CreateFormFile("media", "a.jpg")
	_, _ = part.Write(bytes.Repeat([]byte{0xff, 0xd8, 0x00}, 200<<10))
	_ = mw.Close()
	header := bearer(w)
	header.Set("Content-Type", mw.FormDataContentType())
	var mediaID string
	retryLost(t, "upload", "media_id", func() (int, string) {
		status, body := call(t, w, http.MethodPost, "/"+integration.AuthorizerID+"/cgi-bin/media/upload?type=image", header, form.String())
		if status == 200 {
			mediaID, _ = field(t, body, "media_id").(string)
		}
		return status, body
	})
	if mediaID == "" {
		t.Fatal("no media_id")
	}
	retryLost(t, "download", "\xff\xd8", func() (int, string) {
		return call(t, w, http.MethodGet, "/"+integration.AuthorizerID+"/cgi-bin/media/get?media_id="+url.QueryEscape(mediaID), bearer(w), "")
	})
}

func jobOAuth(t *testing.T, w *integration.World) {
	client := loginBrowser(t, w)
	for _, tt := range []struct{ appid, funcKey, state, want string }{
		{integration.AuthorizerID, "scan", "menu1", "/scan?from=wechat&wxTkId="},
		{integration.AccountID, "verify", "", "/webVerify/?wxTkId="},
	} {
		user := w.WeChat.NewUser(tt.appid)
		resp, _ := fetch(t, client, http.MethodGet, w.URL("/wx/thirdParty/authorize/"+tt.appid+"/"+tt.funcKey+"?state="+tt.state), nil, "")
		callback, err := w.WeChat.Visit(resp.Header.Get("Location"), user)
		if err != nil {
			t.Fatalf("WeChat's page: %v (%s)", err, resp.Header.Get("Location"))
		}
		resp, page := fetch(t, client, http.MethodGet, callback, nil, "")
		landing := resp.Header.Get("Location")
		if resp.StatusCode != 302 || !strings.Contains(landing, tt.want) {
			t.Fatalf("%s: %d %s %s", tt.funcKey, resp.StatusCode, landing, page)
		}
		u, err := url.Parse(landing)
		if err != nil || u.Host != w.Backend.Addr() || u.Fragment != tt.state {
			t.Errorf("landing %s", landing)
		}
		status, body := call(t, w, http.MethodGet, "/wechat/users/"+u.Query().Get("wxTkId"), bearer(w), "")
		if status != 200 || field(t, body, "openid") != user.OpenID || field(t, body, "funcKey") != tt.funcKey {
			t.Errorf("redeemed %d %s", status, body)
		}
		if again, _ := fetch(t, client, http.MethodGet, callback, nil, ""); again.Header.Get("Location") != landing {
			t.Errorf("the same callback again leads to %s", again.Header.Get("Location"))
		}
	}
}

func jobReleaseCheck(t *testing.T, w *integration.World) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	before := len(w.Backend.Received())
	for group := range wxsim.ReleaseGroups {
		report, err := w.WeChat.ReleaseCheck(ctx, integration.PlatformID, group+1)
		if err != nil || !report.Passed() {
			t.Errorf("group %d: %v\n%s", group+1, err, report)
		}
	}
	if got := len(w.Backend.Received()); got != before {
		t.Errorf("%d messages of the check reached the backend", got-before)
	}
}

func jobUnauthorized(t *testing.T, w *integration.World) {
	if result, err := w.WeChat.Unauthorize(t.Context(), integration.PlatformID, integration.AuthorizerID); err != nil || !result.OK() {
		t.Fatalf("%s %v", result.Wrong, err)
	}
	before := w.WeChat.Journal().Count("/cgi-bin/user/info")
	status, body := call(t, w, http.MethodGet, "/"+integration.AuthorizerID+"/cgi-bin/user/info?openid=o", bearer(w), "")
	if !strings.Contains(body, "61003") {
		t.Errorf("after unauthorized: %d %s", status, body)
	}
	if got := w.WeChat.Journal().Count("/cgi-bin/user/info"); got != before {
		t.Error("a call for a revoked account reached WeChat")
	}
}

// checkOutputs looks for secrets in everything that can be asked of the gateway.
func checkOutputs(t *testing.T, w *integration.World) {
	for _, path := range []string{"/metrics", "/config/"} {
		_, body := fetch(t, plainClient, http.MethodGet, "http://"+w.Admin+path, nil, "")
		checkNoSecrets(t, w, path, body)
		if path == "/metrics" && !strings.Contains(body, "caddy_wechat_pushes_total") {
			t.Error("no metrics of ours")
		}
	}
	// What is on disk is sealed, and the autosaved config holds placeholders.
	err := filepath.WalkDir(w.Dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		checkNoSecrets(t, w, "file "+filepath.Base(path), string(content))
		if info, err := d.Info(); err == nil && strings.Contains(path, "/wechat/") && info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
