package wxsim

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"
)

// checkedGateway does what the release check wants of a platform, except for what break names.
type checkedGateway struct {
	c      caller
	broken string
	mu     sync.Mutex
	tokens map[string]string // by appid
	codes  map[string]bool   // that a message was sent for
	wg     sync.WaitGroup
}

func (g *checkedGateway) event(plain string) string {
	if g.broken == value(plain, "InfoType") {
		return "raw:no"
	}
	if value(plain, "InfoType") == "authorized" {
		component, _ := g.c.s.Current(KindComponent, testPlatform, testPlatform)
		token, _ := g.c.exchange(component, value(plain, "AuthorizationCode"))["authorizer_access_token"].(string)
		g.mu.Lock()
		g.tokens[value(plain, "AuthorizerAppid")] = token
		g.mu.Unlock()
	}
	return answerSuccess
}

func (g *checkedGateway) message(appID, plain string) string {
	code, query := strings.CutPrefix(value(plain, "Content"), releaseCode)
	switch {
	case value(plain, "Content") == releaseText && g.broken != "text":
		return strings.Replace(echo(plain), "re: "+releaseText, releaseReply, 1)
	case value(plain, "Event") != "":
		return strings.Replace(echo(plain), "re: ", value(plain, "Event")+releaseDelayed, 1)
	case query && g.broken != "message":
		g.mu.Lock()
		again := g.codes[code]
		g.codes[code] = true
		g.mu.Unlock()
		if !again || g.broken == "twice" {
			g.send(appID, plain, code)
		}
	}
	return ""
}

// send has the message sent in the background.
func (g *checkedGateway) send(appID, plain, code string) {
	g.wg.Go(func() {
		g.mu.Lock()
		token := g.tokens[appID]
		g.mu.Unlock()
		if g.broken == "content" {
			code = "x"
		}
		req := g.c.request(http.MethodPost, "/cgi-bin/message/custom/send", "access_token="+token, map[string]any{
			"touser": value(plain, "FromUserName"), "msgtype": "text", "text": map[string]string{"content": code + apiSuffix},
		})
		if _, err := g.c.do(req); err != nil {
			g.c.t.Error(err)
		}
	})
}

func TestReleaseCheck(t *testing.T) {
	t.Parallel()
	for group := 1; group <= len(testAccounts); group++ {
		t.Run(fmt.Sprint(group), func(t *testing.T) {
			t.Parallel()
			report := runReleaseCheck(t, group, "")
			if !report.Passed() || report.Group != group || len(report.Items) != 10 {
				t.Errorf("not passed:\n%s", report)
			}
		})
	}
	for broken, item := range map[string]string{
		"authorized": "authorized official account", "component_verify_ticket": "component_verify_ticket", "text": "text reply",
		"message": "api text official account: message", "content": "api text mini program: message", "twice": "api text: one message each",
	} {
		t.Run(broken, func(t *testing.T) {
			t.Parallel()
			report := runReleaseCheck(t, 0, broken)
			if report.Passed() || !strings.Contains(report.String(), "FAIL "+item) {
				t.Errorf("want %s to fail:\n%s", item, report)
			}
		})
	}
	s := newSim(t, nil)
	if _, err := s.ReleaseCheck(t.Context(), testPlatform, 6); err == nil {
		t.Error("a sixth group")
	}
	if _, err := s.ReleaseCheck(t.Context(), testPlatform, 1); err == nil {
		t.Error("a check without URLs")
	}
}

func runReleaseCheck(t *testing.T, group int, broken string) ReleaseReport {
	t.Helper()
	s := newSim(t, func(c *Config) {
		if broken == "message" { // all others come, however busy the machine is
			c.Pace.ReleaseWait = 200 * time.Millisecond
		}
	})
	c := caller{t, s}
	c.componentToken()
	g := &checkedGateway{c: c, broken: broken, tokens: map[string]string{}, codes: map[string]bool{}}
	defer g.wg.Wait()
	events := newFakeGateway(t, testPlatform, ModeSafe, g.event)
	crypt, err := NewCrypt(testToken, testKey, testPlatform)
	if err != nil {
		t.Fatal(err)
	}
	messages := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		appID := strings.TrimPrefix(r.URL.Path, "/")
		one := &fakeGateway{t: t, crypt: crypt, reply: func(plain string) string { return g.message(appID, plain) }}
		one.ServeHTTP(w, r)
	}))
	t.Cleanup(messages.Close)
	s.SetURLs(testPlatform, events.URL, messages.URL+"/$APPID$")
	report, err := s.ReleaseCheck(t.Context(), testPlatform, group)
	if err != nil {
		t.Fatal(err)
	}
	return report
}
