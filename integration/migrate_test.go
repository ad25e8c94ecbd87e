package integration_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// oldSystem is what a gateway is put before: it opens pushes and encrypts replies itself, keeps the ticket, renews tokens, and takes
// plaintext at an address of its own.
type oldSystem struct {
	w *integration.World

	mu     sync.Mutex
	crypt  *wxsim.Crypt
	ticket string
	events []string // InfoType of what came in plaintext, with the code that it had
	opened int      // messages
}

func (o *oldSystem) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	q := r.URL.Query()
	switch {
	case r.URL.Path == "/break":
		panic(http.ErrAbortHandler)
	case r.URL.Path == "/wechat/message":
		r.Body = io.NopCloser(bytes.NewReader(body))
		integration.Echo(w, r)
	case q.Get("msg_signature") == "" && strings.Contains(string(body), "<InfoType>"):
		o.mu.Lock()
		o.events = append(o.events, element(body, "InfoType")+element(body, "AuthorizationCode"))
		o.mu.Unlock()
		_, _ = io.WriteString(w, "success")
	case q.Get("msg_signature") != "":
		o.open(w, q.Get("timestamp"), q.Get("nonce"), q.Get("msg_signature"), body)
	default:
		_, _ = io.WriteString(w, "the old website")
	}
}

// open is the old crypto.
func (o *oldSystem) open(w http.ResponseWriter, timestamp, nonce, signature string, body []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	encrypted := element(body, "Encrypt")
	if o.crypt == nil {
		o.crypt, _ = wxsim.NewCrypt(o.w.Secret("WECHAT_PLATFORM_TOKEN"), o.w.Secret("WECHAT_PLATFORM_AES_KEY"), integration.PlatformID)
	}
	message, err := o.crypt.Open(encrypted)
	if err != nil || o.crypt.Sign(timestamp, nonce, encrypted) != signature {
		http.Error(w, "not WeChat's", http.StatusForbidden)
		return
	}
	if element(message, "InfoType") != "" {
		o.ticket = element(message, "ComponentVerifyTicket")
		_, _ = io.WriteString(w, "success")
		return
	}
	o.opened++
	reply, _ := o.crypt.Seal(fmt.Appendf(nil, "<xml><ToUserName><![CDATA[%s]]></ToUserName><FromUserName><![CDATA[%s]]></FromUserName><CreateTime>%d</CreateTime><MsgType><![CDATA[text]]></MsgType><Content><![CDATA[old: %s]]></Content></xml>",
		element(message, "FromUserName"), element(message, "ToUserName"), time.Now().Unix(), element(message, "Content")))
	_, _ = fmt.Fprintf(w, "<xml><Encrypt><![CDATA[%s]]></Encrypt><MsgSignature><![CDATA[%s]]></MsgSignature><TimeStamp>%s</TimeStamp><Nonce><![CDATA[%s]]></Nonce></xml>", reply, o.crypt.Sign(timestamp, nonce, reply), timestamp, nonce)
}

// renew has the old system renew an account's token, as its jobs do: by the newest ticket, and the refresh token of WeChat's list.
func (o *oldSystem) renew(t *testing.T, appid string) (refresh, access string) {
	t.Helper()
	o.mu.Lock()
	ticket := o.ticket
	o.mu.Unlock()
	post := func(path, body string) string {
		t.Helper()
		resp, answer := fetch(t, plainClient, http.MethodPost, o.w.WeChat.URL()+path, nil, body)
		if resp.StatusCode != http.StatusOK || strings.Contains(answer, `"errcode":4`) || strings.Contains(answer, `"errcode":6`) {
			t.Fatalf("the old system gets %s from %s", answer, path)
		}
		return answer
	}
	o.w.WeChat.AllowRefresh(wxsim.KindComponent, integration.PlatformID)
	component := field(t, post("/cgi-bin/component/api_component_token", fmt.Sprintf(`{"component_appid":%q,"component_appsecret":%q,"component_verify_ticket":%q}`,
		integration.PlatformID, o.w.Secret("WECHAT_PLATFORM_SECRET"), ticket)), "component_access_token").(string)
	var list struct {
		List []struct {
			AppID   string `json:"authorizer_appid"`
			Refresh string `json:"refresh_token"`
		}
	}
	if err := json.Unmarshal([]byte(post("/cgi-bin/component/api_get_authorizer_list?component_access_token="+component, fmt.Sprintf(`{"component_appid":%q,"offset":0,"count":500}`, integration.PlatformID))), &list); err != nil {
		t.Fatal(err)
	}
	for _, a := range list.List {
		if a.AppID != appid {
			continue
		}
		answer := post("/cgi-bin/component/api_authorizer_token?component_access_token="+component, fmt.Sprintf(`{"component_appid":%q,"authorizer_appid":%q,"authorizer_refresh_token":%q}`, integration.PlatformID, appid, a.Refresh))
		return field(t, answer, "authorizer_refresh_token").(string), field(t, answer, "authorizer_access_token").(string)
	}
	t.Fatalf("the old system does not find %s", appid)
	return "", ""
}

// element is the text of an element.
func element(xml []byte, name string) string {
	m := regexp.MustCompile(`<` + name + `>(?:<!\[CDATA\[)?(.*?)(?:\]\]>)?</` + name + `>`).FindSubmatch(xml)
	if m == nil {
		return ""
	}
	return string(m[1])
}

// migrationFiles are the Caddyfile of upgrade.md for this world, and what its steps have before and after it. Bare is without the gateway.
func migrationFiles(t *testing.T, dir string) (bare, before, events, some, all string) {
	t.Helper()
	text := ""
	everyone := regexp.MustCompile("With `(@moved [^`]+)` all have").FindStringSubmatch(document(t, "docs/upgrade.md"))
	if everyone == nil {
		t.Fatal("upgrade.md does not say how all accounts are moved")
	}
	for _, m := range fence.FindAllStringSubmatch(document(t, "docs/upgrade.md"), -1) {
		if m[1] == "caddyfile" && strings.Contains(m[2], "@moved") {
			text = m[2]
		}
	}
	replace := func(old, with string, times int) {
		t.Helper()
		if strings.Count(text, old) != times {
			t.Fatalf("upgrade.md has %q %d times:\n%s", old, strings.Count(text, old), text)
		}
		text = strings.ReplaceAll(text, old, with)
	}
	replace("{\n\tgrace_period 10s\n", "{\n\thttp_port {$WECHAT_HTTP_PORT}\n\thttps_port {$WECHAT_HTTPS_PORT}\n\tadmin {$WECHAT_ADMIN}\n\tskip_install_trust\n\tlog {\n\t\tlevel DEBUG\n\t}\n\tgrace_period 1s\n", 1)
	replace("\t\tseal_key", "\t\tapi {$WECHAT_API}\n\t\topen {$WECHAT_OPEN}\n\t\tseal_key", 1)
	replace("\nwechat.example.com {\n", "\nlocalhost {\n\ttls internal\n", 1)
	replace("\nhttp://wechat.example.com {\n", "\nhttp://localhost {\n", 1)
	replace("http://:8090 {", "http://:{$WECHAT_API_PORT} {", 1)
	replace("10.0.0.11:8080 10.0.0.12:8080", "127.0.0.1:1 {$WECHAT_BACKEND}", 2) // the first one is down
	replace("/srv/wechat-verify", "{$WECHAT_VERIFY}", 2)
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	some = write("some.Caddyfile", text)
	replace("@moved path /wx/wx3333333333333333/callback", everyone[1], 1)
	all = write("all.Caddyfile", text)
	cut := func(from, to string) {
		t.Helper()
		_, after, found := strings.Cut(text, from)
		inside, _, ended := strings.Cut(after, to)
		if !found || !ended {
			t.Fatalf("upgrade.md has no part from %q to %q:\n%s", from, to, text)
		}
		replace(from+inside+to, "", 1)
	}
	cut("\t@moved", "\n\t}\n\n")
	events = write("events.Caddyfile", text)
	cut("\twechat_event", "\n\t}\n\n")
	before = write("before.Caddyfile", text)
	cut("\twechat {", "\n\t}\n")
	cut("http://:{$WECHAT_API_PORT} {", "\n}\n")
	return write("bare.Caddyfile", text), before, events, some, all
}

// TestMigration moves a platform from an old system to the gateway and back, as upgrade.md has it. In each step messages are answered,
// at no time do both renew, and calls go well from where they may.
func TestMigration(t *testing.T) {
	t.Parallel()
	const otherID, lateID, meanwhileID = "wx4444444444444444", "wx5555555555555555", "wx6666666666666666"
	old := &oldSystem{}
	bare, before, events, some, all := migrationFiles(t, t.TempDir())
	https, err := integration.FreeAddr("")
	if err != nil {
		t.Fatal(err)
	}
	site := "https://localhost:" + integration.Port(https)
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		old.w, w.Caddyfile, w.Ports = w, before, map[string]string{"https": https}
		w.Backend = &integration.Backend{Answer: old.ServeHTTP}
		w.Config.Platforms = []wxsim.Platform{{AppID: integration.PlatformID, EventURL: site + "/wx/component/event", MessageURL: site + "/wx/$APPID$/callback"}}
		w.Config.Authorizers = []wxsim.Authorizer{{AppID: otherID}, {AppID: lateID}, {AppID: meanwhileID}}
	})
	reload := func(file string) {
		t.Helper()
		w.Gateway.Caddyfile = file
		if err := w.Gateway.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	ticket := func() {
		t.Helper()
		if r, err := w.WeChat.PushTicket(t.Context(), integration.PlatformID); err != nil || !r.OK() {
			t.Fatalf("ticket: %s %v", r.Wrong, err)
		}
	}
	says := func(appid, want string) {
		t.Helper()
		r, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{Platform: integration.PlatformID, AppID: appid, Content: "hello"})
		if err != nil || !r.OK() || r.UserSaw != want {
			t.Errorf("%s answers %q, want %q; %s; %v", appid, r.UserSaw, want, r.Wrong, err)
		}
	}
	calls := func(appid, want string) {
		t.Helper()
		user := w.WeChat.NewUser(appid)
		if want == "" {
			want = user.OpenID
		}
		if status, body := call(t, w, http.MethodGet, "/"+appid+"/cgi-bin/user/info?openid="+user.OpenID, bearer(w), ""); !strings.Contains(body, want) {
			t.Errorf("a call for %s: %d %s, want %s", appid, status, body, want)
		}
	}
	status := func() string {
		t.Helper()
		out, err := w.Gateway.Command(t.Context(), "wechat", "status", "--json", "--address", w.Admin)
		if err != nil && !strings.Contains(out, `"level"`) {
			t.Fatalf("%v\n%s", err, out)
		}
		return out
	}
	for _, file := range []string{events, some, all} { // step 1
		if out, err := w.Gateway.Command(t.Context(), "wechat", "doctor", "--config", file, "--offline"); err != nil || !strings.Contains(out, " 0 yellow, 0 red") {
			t.Errorf("doctor: %v\n%s", err, out)
		}
	}

	// Step 2: the old system does all.
	for _, appid := range []string{integration.AuthorizerID, otherID} {
		if _, err := w.WeChat.PriorAuthorization(integration.PlatformID, appid); err != nil {
			t.Fatal(err)
		}
	}
	ticket()
	refresh, _ := old.renew(t, integration.AuthorizerID)
	otherRefresh, access := old.renew(t, otherID)
	says(integration.AuthorizerID, "old: hello")
	if out := status(); !strings.Contains(out, `"no_ticket"`) {
		t.Errorf("status: %s", out)
	}
	if _, body := fetch(t, httpsClient(t, w), http.MethodGet, w.URL("/MP_verify_a1B2c3D4e5F6g7H8.txt"), nil, ""); body != "a1B2c3D4e5F6g7H8" {
		t.Errorf("verification file: %q", body)
	}
	if _, body := fetch(t, httpsClient(t, w), http.MethodGet, w.URL("/about"), nil, ""); body != "the old website" {
		t.Errorf("the rest of the site: %q", body)
	}
	if resp, _ := fetch(t, httpsClient(t, w), http.MethodGet, w.URL("/break"), nil, ""); resp.StatusCode < http.StatusInternalServerError {
		t.Errorf("a connection that breaks: %d", resp.StatusCode)
	}
	says(integration.AuthorizerID, "old: hello") // the only server that is up is not out for longer than a push waits

	// Step 3: its tokens come along. Without a ticket nothing is renewed.
	list := ""
	for _, block := range anyFence.FindAllString(document(t, "docs/upgrade.md"), -1) {
		if strings.Contains(block, "\tplatform,appid,") {
			list = strings.ReplaceAll(strings.Trim(strings.Trim(block, "`"), "\n"), "\t", "")
		}
	}
	header, row, _ := strings.Cut(strings.TrimSpace(list), "\n")
	if strings.Count(header, ",") != 4 || strings.Count(row, ",") != 4 || !strings.HasPrefix(row, integration.PlatformID+","+integration.AuthorizerID+",") {
		t.Fatalf("upgrade.md has the list %q", list)
	}
	imported := func(list string, args ...string) string {
		t.Helper()
		file := filepath.Join(t.TempDir(), "accounts.csv")
		if err := os.WriteFile(file, []byte(list), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := w.Gateway.Command(t.Context(), append([]string{"wechat", "import", "--config", before, "--format", "csv", file}, args...)...)
		if err != nil {
			t.Errorf("import: %v\n%s", err, out)
		}
		checkNoSecrets(t, w, "import", out)
		return out
	}
	if out := imported(list, "--dry-run"); !strings.Contains(out, "authorizers: 1 ") {
		t.Errorf("upgrade.md's list: %s", out)
	}
	expires := strconv.FormatInt(time.Now().Add(90*time.Minute).Unix(), 10)
	if out := imported(header + "\n" +
		strings.Join([]string{integration.PlatformID, integration.AuthorizerID, refresh, "", ""}, ",") + "\n" +
		strings.Join([]string{integration.PlatformID, otherID, otherRefresh, access, expires}, ",") + "\n"); !strings.Contains(out, "authorizers: 2 written") {
		t.Errorf("import: %s", out)
	}
	calls(otherID, "")
	calls(integration.AuthorizerID, `"errcode":61005`)
	if n := w.WeChat.Journal().Refreshes(wxsim.KindAuthorizer, otherID); n != 1 {
		t.Errorf("%d refreshes", n)
	}
	if out := imported("platform,appid,refresh_token\n"+integration.PlatformID+","+otherID+","+otherRefresh+"\n", "--dry-run"); !strings.Contains(out, "authorizers: 0 ") {
		t.Errorf("a list without the last two columns: %s", out)
	}
	if _, err := w.WeChat.PriorAuthorization(integration.PlatformID, meanwhileID); err != nil { // the old system has exchanged its code
		t.Fatal(err)
	}

	// Step 4: the events. The old system gets no ticket any more, but hears of authorizations, without their codes.
	reload(events)
	old.mu.Lock()
	old.ticket = ""
	old.mu.Unlock()
	w.WeChat.AllowRefresh(wxsim.KindComponent, integration.PlatformID) // it takes over, and has only what the list had
	w.WeChat.AllowRefresh(wxsim.KindAuthorizer, integration.AuthorizerID)
	ticket()
	eventually(t, "the ticket", func() error {
		if strings.Contains(status(), `"no_ticket"`) {
			return errors.New("no ticket")
		}
		return nil
	})
	calls(integration.AuthorizerID, "")
	calls(otherID, "")
	eventually(t, "who authorised after the list was made", func() error {
		user := w.WeChat.NewUser(meanwhileID)
		if status, body := call(t, w, http.MethodGet, "/"+meanwhileID+"/cgi-bin/user/info?openid="+user.OpenID, bearer(w), ""); !strings.Contains(body, user.OpenID) {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
	says(integration.AuthorizerID, "old: hello")
	if a, err := w.WeChat.Authorize(t.Context(), integration.PlatformID, lateID); err != nil || !a.Push.OK() {
		t.Fatalf("authorized: %s %v", a.Push.Wrong, err)
	}
	eventually(t, "the old system hears of it", func() error {
		old.mu.Lock()
		defer old.mu.Unlock()
		if len(old.events) != 1 || old.events[0] != "authorized" || old.ticket != "" {
			return fmt.Errorf("events %q, ticket %q", old.events, old.ticket)
		}
		return nil
	})
	eventually(t, "its token", func() error {
		user := w.WeChat.NewUser(lateID)
		if status, body := call(t, w, http.MethodGet, "/"+lateID+"/cgi-bin/user/info?openid="+user.OpenID, bearer(w), ""); !strings.Contains(body, user.OpenID) {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})

	// Step 5: the old system's own calls for the platform.
	component := "/" + integration.PlatformID + "/cgi-bin/component/"
	if _, body := call(t, w, http.MethodPost, component+"api_create_preauthcode", bearer(w), `{"component_appid":"`+integration.PlatformID+`"}`); !strings.Contains(body, "pre_auth_code") {
		t.Errorf("a page for authorizations: %s", body)
	}
	for _, name := range []string{"api_query_auth", "api_get_authorizer_info", "api_get_authorizer_list"} {
		before := w.WeChat.Journal().Count("/cgi-bin/component/" + name)
		if _, body := call(t, w, http.MethodPost, component+name, bearer(w), `{"component_appid":"`+integration.PlatformID+`"}`); !strings.Contains(body, `"errcode":48001`) || w.WeChat.Journal().Count("/cgi-bin/component/"+name) != before {
			t.Errorf("%s: %s", name, body)
		}
	}
	visitor := w.WeChat.NewUser(otherID)
	if _, body := call(t, w, http.MethodGet, "/"+otherID+"/sns/oauth2/component/access_token?appid="+otherID+"&code="+w.WeChat.UserCode(visitor, integration.PlatformID, "snsapi_base")+
		"&grant_type=authorization_code&component_appid="+integration.PlatformID, bearer(w), ""); !strings.Contains(body, visitor.OpenID) {
		t.Errorf("a login of the old system's: %s", body)
	}

	// Step 6: one account, and then all.
	reload(some)
	says(integration.AuthorizerID, "收到：hello")
	says(otherID, "old: hello")
	reload(all)
	for _, appid := range []string{integration.AuthorizerID, otherID, lateID} {
		says(appid, "收到：hello")
		if n := w.WeChat.Journal().Refreshes(wxsim.KindAuthorizer, appid); n > 2 {
			t.Errorf("%s: %d refreshes", appid, n)
		}
	}
	if _, body := fetch(t, httpsClient(t, w), http.MethodGet, w.URL("/wx/login/callback?code=1"), nil, ""); body != "the old website" {
		t.Errorf("an address beside those of pushes: %q", body)
	}
	if h, err := w.WeChat.VerifyEventURL(t.Context(), integration.PlatformID); err != nil || h.Wrong != "" {
		t.Errorf("check of the event URL: %s %v", h.Wrong, err)
	}
	if out := status(); strings.Contains(out, `"red"`) || strings.Contains(out, `"rogue_refresh"`) || strings.Count(out, `"code":`) != strings.Count(out, `"code":"backend_failing"`) {
		t.Errorf("status: %s", out)
	}
	checkViolations(t, w)

	// Back.
	reload(before)
	ticket()
	says(integration.AuthorizerID, "old: hello")
	reload(bare)
	eventually(t, "apps have nobody to call", func() error {
		resp, err := plainClient.Get(w.APIURL("/"))
		if err != nil {
			return nil
		}
		return errors.Join(fmt.Errorf("the gateway answers %s", resp.Status), resp.Body.Close())
	})
	if _, body := fetch(t, httpsClient(t, w), http.MethodGet, w.URL("/MP_verify_a1B2c3D4e5F6g7H8.txt"), nil, ""); body != "a1B2c3D4e5F6g7H8" {
		t.Errorf("verification file: %q", body)
	}
	says(integration.AuthorizerID, "old: hello")
	w.WeChat.AllowRefresh(wxsim.KindAuthorizer, integration.AuthorizerID)
	w.WeChat.AllowRefresh(wxsim.KindAuthorizer, lateID)
	if again, _ := old.renew(t, integration.AuthorizerID); again != refresh {
		t.Error("the refresh token is another")
	}
	if again, _ := old.renew(t, lateID); again == "" {
		t.Error("the new account is lost to the old system")
	}
}

// TestPlainAccountBesideAnother: a plain account's tokens are had by the gateway and, from /cgi-bin/token, by another system, and neither
// makes those of the other void.
func TestPlainAccountBesideAnother(t *testing.T) {
	t.Parallel()
	w := newWorld(t, polite)
	user := w.WeChat.NewUser(integration.AccountID)
	other := func() string {
		t.Helper()
		_, answer := fetch(t, plainClient, http.MethodGet, w.WeChat.URL()+"/cgi-bin/token?grant_type=client_credential&appid="+integration.AccountID+"&secret="+w.Secret("SHOP_SECRET"), nil, "")
		token, _ := field(t, answer, "access_token").(string)
		return token
	}
	gateway := func(when string) {
		t.Helper()
		if status, body := call(t, w, http.MethodGet, "/"+integration.AccountID+"/cgi-bin/user/info?openid="+user.OpenID, bearer(w), ""); !strings.Contains(body, user.OpenID) {
			t.Errorf("%s: %d %s", when, status, body)
		}
	}
	first := other()
	gateway("beside another system")
	if _, body := fetch(t, plainClient, http.MethodGet, w.WeChat.URL()+"/cgi-bin/user/info?openid="+user.OpenID+"&access_token="+first, nil, ""); !strings.Contains(body, user.OpenID) {
		t.Errorf("the other system gets %s", body)
	}
	if again := other(); again == "" || again == first {
		t.Errorf("the other system has the token %v", again == first)
	}
	gateway("after the other system renewed its token")
	if _, metrics := fetch(t, plainClient, http.MethodGet, "http://"+w.Gateway.Admin+"/metrics", nil, ""); regexp.MustCompile(`(?m)^caddy_wechat_rogue_refreshes_total\{.*\} [1-9]`).MatchString(metrics) || !strings.Contains(metrics, "caddy_wechat_rogue_refreshes_total") {
		t.Error("the gateway takes it for a rogue")
	}
}
