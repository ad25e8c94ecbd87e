package sdk_test

import (
	"bytes"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// task is what an SDK is to do, for one account, through one gateway.
type task struct {
	gateway   string            // base URL of the gateway; "" in the hosts-file form
	hosts     http.RoundTripper // in the hosts-file form: trusts the test's CA, and has WeChat's host be the gateway
	stable    bool              // where the SDK can, it gets its token from stable_token
	w         *integration.World
	tap       *tap
	appID     string
	clientKey string // in the place of the AppSecret
	openID    string
	text      string // of the customer-service message
	menu      string // name of the menu's only button
	picture   string // file to upload
}

const (
	pageURL    = "https://shop.example.com/cart?id=1&from=menu"
	templateID = "ngqIpbwh8bUfcSsECmogfXcV14J0tQlEpBO27izEYtY"
)

// outcome is what it has in its hands afterwards.
type outcome struct {
	Token     string `json:"token"`    // the access_token as the SDK keeps it
	OpenID    string `json:"openid"`   // of the user it looked up
	Template  int64  `json:"template"` // msgid of the template message
	QRCode    string `json:"qrcode"`   // ticket of the QR code
	Media     []byte `json:"media"`    // the picture, fetched again
	Nonce     string `json:"nonce"`    // these three: a page's signature under the jsapi_ticket
	Timestamp string `json:"timestamp"`
	Signature string `json:"signature"`
}

// sdks are all that run here, by their headings in docs/sdk.md.
var sdks = []struct {
	name string
	run  func(*testing.T, task) outcome
}{
	{"silenceper/wechat", silenceper},
	{"PowerWeChat", powerWeChat},
	{"co-wechat-api", node("co-wechat-api.js")},
	{"wechat-api", node("wechat-api.js")},
	{"node-easywechat", node("node-easywechat.js")},
}

// TestSDKs has every SDK do the same work for a plain account and for an authorised one, with the gateway as its base URL
// and with the gateway in the place of WeChat's host.
func TestSDKs(t *testing.T) {
	t.Parallel()
	for _, sdk := range sdks {
		t.Run(sdk.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			name, content := picture(t)
			// One after the other: silenceper/wechat keeps its HTTP client in a global variable.
			for _, form := range []string{"base URL", "hosts file"} {
				for _, appID := range []string{integration.AccountID, integration.AuthorizerID} {
					t.Run(form+"/"+appID, func(t *testing.T) {
						about := sdk.name + " by " + form + " <&>"
						job := task{
							stable: form == "hosts file", w: w, tap: &tap{}, appID: appID, clientKey: w.ClientKey, openID: w.WeChat.NewUser(appID).OpenID,
							text: "你好 " + about, menu: "菜单 " + about, picture: name,
						}
						job.lead(t, form)
						done := job.do(t, sdk.run)
						done.check(t, job, content)
						checkJournal(t, job, done.Token)
						job.tap.unleaked(t, w)
					})
				}
			}
		})
	}
}

// lead chooses the way to the gateway.
func (job *task) lead(t *testing.T, form string) {
	t.Helper()
	if form == "base URL" {
		job.gateway = "http://" + job.tap.listen(t, job.w.API)
		return
	}
	client, err := job.w.Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.CloseIdleConnections)
	job.hosts = tapped{client.Transport, job.tap}
}

// do has the SDK work while WeChat, twice, takes the account's token away at the worst moment: when a message or a file is
// on its way under it. Of that no SDK may notice anything.
func (job *task) do(t *testing.T, run func(*testing.T, task) outcome) outcome {
	t.Helper()
	wechat := job.w.WeChat
	wechat.Journal().Reset()
	var message, file sync.Once
	wechat.Watch(func(p wxsim.Progress) {
		switch {
		case p.Step != wxsim.StepArrived:
		case p.Path == "/cgi-bin/message/custom/send":
			message.Do(func() { endTokens(wechat.ReplaceAll, job.appID) }) // 40001
		case p.Path == "/cgi-bin/media/upload":
			file.Do(func() { endTokens(wechat.ExpireAll, job.appID) }) // 42001
		}
	})
	defer wechat.Watch(nil)
	return run(t, *job)
}

func endTokens(end func(wxsim.Kind, string) int, appID string) {
	for _, kind := range []wxsim.Kind{wxsim.KindAccount, wxsim.KindStable, wxsim.KindAuthorizer} {
		end(kind, appID)
	}
}

// picture is a file with something like a picture in it.
func picture(t *testing.T) (name string, content []byte) {
	t.Helper()
	noise := make([]byte, 100<<10)
	_, _ = rand.NewChaCha8([32]byte{}).Read(noise)
	content = slices.Concat([]byte("\xff\xd8\xff\xe0\x00\x10JFIF\x00"), noise, []byte("\xff\xd9"))
	name = filepath.Join(t.TempDir(), "picture.jpg")
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return name, content
}

// check holds what the SDK has against what WeChat knows.
func (o outcome) check(t *testing.T, job task, picture []byte) {
	t.Helper()
	if o.Token == "" || !strings.Contains(job.tap.String(), o.Token) {
		t.Error("the SDK's token is not one that the gateway handed out")
	}
	if slices.Contains(job.w.Secrets(), o.Token) {
		t.Error("the SDK has a token of WeChat's")
	}
	if o.OpenID != job.openID {
		t.Errorf("user info of %q, want %q", o.OpenID, job.openID)
	}
	if o.Template <= 0 {
		t.Errorf("template message has msgid %d", o.Template)
	}
	var texts, templates int
	for _, m := range job.w.WeChat.SentTo(job.openID) {
		switch {
		case m.AppID != job.appID:
			t.Errorf("a message was sent as %s", m.AppID)
		case m.Type == "template":
			templates++
		case m.Content == job.text:
			texts++
		default:
			t.Errorf("the user got %q, want %q", m.Content, job.text)
		}
	}
	if texts != 1 || templates != 1 {
		t.Errorf("the user got %d customer-service and %d template messages, want one each", texts, templates)
	}
	if o.QRCode == "" {
		t.Error("no QR code")
	}
	if !bytes.Equal(o.Media, picture) {
		t.Errorf("%d bytes of media came back, not the %d that were sent", len(o.Media), len(picture))
	}
	if !job.w.WeChat.CheckJSSDK(job.appID, o.Nonce, o.Timestamp, pageURL, o.Signature) {
		t.Errorf("signature %q is not under a ticket of the account", o.Signature)
	}
}

// checkJournal looks at what arrived at WeChat.
func checkJournal(t *testing.T, job task, opaque string) {
	t.Helper()
	journal := job.w.WeChat.Journal()
	for _, e := range journal.Violations() {
		t.Errorf("WeChat saw %s %s?%s: %v", e.Method, e.Path, e.Query, e.Violations)
	}
	named := false
	for _, e := range journal.Entries() {
		if strings.Contains(e.Query, opaque) || bytes.Contains(e.Body, []byte(opaque)) {
			t.Errorf("the gateway's own token arrived at WeChat: %s %s", e.Method, e.Path)
		}
		for name, values := range e.Header {
			if strings.Contains(strings.Join(values, " "), opaque) {
				t.Errorf("the gateway's own token arrived at WeChat in %s", name)
			}
		}
		if e.Path == "/cgi-bin/menu/create" && e.Errcode == 0 {
			named = named || bytes.Contains(e.Body, []byte(strconv.Quote(job.menu)))
		}
	}
	if !named {
		t.Errorf("no menu with a button %q was created", job.menu)
	}
	for path, want := range map[string]int64{"/cgi-bin/message/custom/send": 40001, "/cgi-bin/media/upload": 42001} {
		calls := journal.Calls(path)
		if len(calls) != 2 || calls[0].Errcode != want || calls[1].Errcode != 0 || calls[0].BodySHA != calls[1].BodySHA {
			t.Errorf("%s: %d calls, want one refused with %d and the same again", path, len(calls), want)
		}
	}
}
