package wxsim

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestListeners(t *testing.T) {
	t.Parallel()
	s := New(Config{Hosts: []string{"wx.example.com", "127.0.0.2"}})
	defer s.Close()
	for _, addr := range []string{"0.0.0.0:0", ":0", "192.0.2.1:0", "nonsense"} {
		if err := s.Start(addr); err == nil {
			t.Errorf("listening on %s", addr)
		}
	}
	pem, err := s.StartTLS("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if s.URL() != s.TLSURL() || !strings.HasPrefix(s.URL(), "https://127.0.0.1:") {
		t.Errorf("URL %s, TLSURL %s", s.URL(), s.TLSURL())
	}
	if err := s.Start("127.0.0.1:0"); err != nil || !strings.HasPrefix(s.URL(), "http://") {
		t.Errorf("%v, URL %s", err, s.URL())
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		t.Fatal("no CA in the PEM")
	}
	for _, name := range []string{"api.weixin.qq.com", "wx.example.com"} {
		client := &http.Client{Transport: &http.Transport{
			DisableKeepAlives: true, ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: name},
		}}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.TLSURL()+"/cgi-bin/user/info", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		client.CloseIdleConnections()
		if resp.ProtoMajor != 2 {
			t.Errorf("%s: %s, want HTTP/2", name, resp.Proto)
		}
	}
	s.Close()
	if err := s.Start("127.0.0.1:0"); err == nil {
		t.Error("started after Close")
	}
}

func TestMistakesInConfig(t *testing.T) {
	t.Parallel()
	for name, cfg := range map[string]Config{
		"key too short":        {Platforms: []Platform{{AppID: testPlatform, AESKey: testKey[:42]}}},
		"platform without key": {Platforms: []Platform{{AppID: testPlatform}}},
		"safe without key":     {Accounts: []Account{{AppID: testAccount, Mode: ModeSafe}}},
	} {
		s := New(cfg)
		if err := s.Start("127.0.0.1:0"); err == nil {
			t.Errorf("%s: started", name)
		}
		if _, err := s.PushMessage(t.Context(), Message{AppID: testAccount}); err == nil {
			t.Errorf("%s: pushed", name)
		}
		if _, err := s.PushTicket(t.Context(), testPlatform); err == nil {
			t.Errorf("%s: pushed a ticket", name)
		}
		s.Close()
	}
}

func TestWhatMustNotReachWeChat(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	component, access, refresh := c.authorized(testShop)
	for _, tc := range []struct {
		name, header, value, body string
		rule                      Rule
	}{
		{name: "nothing"},
		{name: "cookie", header: "Cookie", value: "a=b", rule: RuleHeader},
		{name: "authorization", header: "Authorization", value: "Bearer client-key-0123456789", rule: RuleHeader},
		{name: "forwarded for", header: "X-Forwarded-For", value: "192.0.2.1", rule: RuleHeader},
		{name: "via", header: "Via", value: "1.1 Caddy", rule: RuleHeader},
		{name: "our own", header: "X-Wechat-Appid", value: testShop, rule: RuleHeader},
		{name: "idempotency key", header: "Idempotency-Key", value: "1", rule: RuleHeader},
		{name: "token in the body", body: `{"button":[],"access_token":"x"}`, rule: RuleTokenPlace},
		{name: "another token in the body", body: `{"button":[{"name":"` + component + `"}]}`, rule: RuleTokenPlace},
		{name: "refresh token in the body", body: `{"button":[{"name":"` + refresh + `"}]}`, rule: RuleTokenPlace},
	} {
		s.Journal().Reset()
		if tc.body == "" {
			tc.body = `{"button":[]}`
		}
		req := c.request(http.MethodPost, "/cgi-bin/menu/create", "access_token="+access, tc.body)
		if tc.header != "" {
			req.Header.Set(tc.header, tc.value)
		}
		if _, err := c.do(req); err != nil {
			t.Fatal(err)
		}
		found := rules(s)
		if tc.rule == "" && len(found) > 0 || tc.rule != "" && found[tc.rule] != 1 {
			t.Errorf("%s: violations %v, want %q", tc.name, found, tc.rule)
		}
		for _, e := range s.Journal().Entries() {
			for _, secret := range slices.Concat(s.Secrets(), []string{"client-key-0123456789"}) {
				if strings.Contains(e.Query, secret) || bytes.Contains(e.Body, []byte(secret)) || slices.Contains(e.Header["Authorization"], "Bearer "+secret) {
					t.Errorf("%s: a secret in the journal: %+v", tc.name, e)
				}
			}
		}
	}
	e := s.Journal().Calls("/cgi-bin/menu/create")[0]
	if e.Query != "access_token=<authorizer>" || e.Kind != KindAuthorizer || e.AppID != testShop || e.Platform != testPlatform {
		t.Errorf("%+v", e)
	}
	req := c.request(http.MethodGet, "/cgi-bin/menu/get", "access_token="+access, nil)
	req.Header.Set("Accept-Encoding", "gzip")
	if _, err := c.do(req); err != nil {
		t.Fatal(err)
	}
	if notes := s.Journal().Calls("/cgi-bin/menu/get")[0].Notes; !slices.Equal(notes, []string{"Accept-Encoding: gzip"}) {
		t.Errorf("notes %v", notes)
	}
}

func TestJournal(t *testing.T) {
	t.Parallel()
	var seen []uint64
	j := newJournal(20, func(e Entry) { seen = append(seen, e.Seq) })
	for i := range 100 {
		e := Entry{Direction: In, Path: "/a"}
		if i == 0 {
			e.Violations = []Violation{{RuleHeader, "x"}}
		}
		j.add(e)
	}
	entries := j.Entries()
	if len(entries) > 20 || len(entries) < 15 || entries[len(entries)-1].Seq != 100 || len(seen) != 100 {
		t.Errorf("%d entries kept, %d seen", len(entries), len(seen))
	}
	if j.Count("/a") != 100 || len(j.Violations()) != 1 {
		t.Errorf("count %d, violations %d", j.Count("/a"), len(j.Violations()))
	}
	if err := j.WaitCalls(t.Context(), "/a", 100); err != nil {
		t.Error(err)
	}
	found := make(chan Entry)
	go func() {
		e, _ := j.Wait(t.Context(), func(e Entry) bool { return e.Path == "/b" })
		found <- e
	}()
	j.add(Entry{Direction: In, Path: "/b"})
	if e := <-found; e.Path != "/b" {
		t.Errorf("waited for %+v", e)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := j.Wait(ctx, func(e Entry) bool { return e.Path == "/c" }); err == nil {
		t.Error("waited for nothing")
	}
	if err := j.WaitCalls(ctx, "/c", 1); err == nil {
		t.Error("waited for no call")
	}
	j.Reset()
	if len(j.Entries())+len(j.Violations())+j.Count("/a") != 0 {
		t.Error("Reset left something")
	}
}
