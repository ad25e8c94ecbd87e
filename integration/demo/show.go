package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// show tells what happens, job by job. Each part fails when what it shows is not so.
type show struct {
	world *integration.World
	out   io.Writer
	https *http.Client
	api   *http.Client
	user  wxsim.User
	land  string // where OAuth led
}

func (s *show) all(ctx context.Context) error {
	var err error
	if s.https, err = s.world.Client(); err != nil {
		return err
	}
	if s.https.Jar, err = cookiejar.New(nil); err != nil { // a login is bound to the browser where it began
		return err
	}
	s.api = &http.Client{Timeout: 30 * time.Second}
	for _, part := range []struct {
		title string
		play  func(context.Context) error
	}{
		{"1  TLS", s.tls},
		{"2  Domain verification files", s.verify},
		{"3a A ticket arrives and becomes tokens", s.ticket},
		{"3b A push reaches the backend as plaintext, its answer goes back encrypted", s.push},
		{"4  An app calls WeChat's API without a token", s.call},
		{"5  An OAuth callback lands on the right page by funcKey", s.oauth},
	} {
		s.line("\n\x1b[1m%s\x1b[0m", part.title)
		if err := part.play(ctx); err != nil {
			return fmt.Errorf("%s: %w\n%s", part.title, err, tail(s.world.Gateway.Log(), 12))
		}
	}
	if v := s.world.WeChat.Journal().Violations(); len(v) > 0 {
		return fmt.Errorf("the simulated WeChat saw what it must never see: %v", v[0].Violations)
	}
	return nil
}

func (s *show) line(format string, args ...any) { _, _ = fmt.Fprintf(s.out, format+"\n", args...) }

func (s *show) tls(ctx context.Context) error {
	resp, body, err := s.get(ctx, s.https, s.world.URL("/"), nil)
	if err != nil {
		return err
	}
	cert := resp.TLS.PeerCertificates[0]
	s.line("   GET %s -> %s over %s, %d bytes", s.world.URL("/"), resp.Proto, tlsVersion(resp.TLS.Version), len(body))
	s.line("   certificate for %s by %s; nothing of ours is involved", strings.Join(cert.DNSNames, ", "), cert.Issuer.CommonName)
	return nil
}

func (s *show) verify(ctx context.Context) error {
	for _, u := range []string{s.world.URL("/" + integration.VerifyName), "http://" + integration.Host + ":" + integration.Port(s.world.HTTP) + "/" + integration.VerifyName} {
		client := s.https
		if strings.HasPrefix(u, "http:") {
			client = s.api
		}
		resp, body, err := s.get(ctx, client, u, nil)
		if err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK || string(body) != integration.VerifyContent {
			return fmt.Errorf("%s: %d %q", u, resp.StatusCode, body)
		}
		s.line("   GET %s -> %d %q", u, resp.StatusCode, body)
	}
	return nil
}

func (s *show) ticket(ctx context.Context) error {
	result, err := s.world.WeChat.PushTicket(ctx, integration.PlatformID)
	if err != nil || !result.OK() {
		return fmt.Errorf("ticket not accepted: %s %w", result.Wrong, err)
	}
	s.line("   WeChat pushes a component_verify_ticket to /wx/event, encrypted; answer %q in %v", result.Last().Body, result.Last().Latency.Round(time.Millisecond))
	if _, err := s.world.WeChat.Authorize(ctx, integration.PlatformID, integration.AuthorizerID); err != nil {
		return err
	}
	s.line("   an account authorises the platform: authorized, with a code, answered success")
	journal := s.world.WeChat.Journal()
	waiting, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for _, path := range []string{"/cgi-bin/component/api_component_token", "/cgi-bin/component/api_query_auth"} {
		if err := journal.WaitCalls(waiting, path, 1); err != nil {
			return fmt.Errorf("waiting for %s: %w", path, err)
		}
		s.line("   gateway -> WeChat  POST %s", path)
	}
	return s.store(waiting)
}

// store shows that the records are on disk, and sealed.
func (s *show) store(ctx context.Context) error {
	root := filepath.Join(s.world.Dir, "data", "caddy", "wechat")
	for {
		var files []string
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				rel, _ := filepath.Rel(root, path)
				files = append(files, rel)
			}
			return nil
		})
		if err != nil {
			return err
		}
		if slices.ContainsFunc(files, func(name string) bool { return filepath.Base(name) == integration.AuthorizerID }) {
			s.line("   in Caddy's storage, sealed:  %s", strings.Join(files, "  "))
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the authorizer's tokens are not among %v in %s", files, root)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (s *show) push(ctx context.Context) error {
	var sent []byte
	result, err := s.world.WeChat.PushMessage(ctx, wxsim.Message{
		Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "你好",
		Tamper: func(o *wxsim.Outgoing) { sent = bytes.Clone(o.Body) },
	})
	if err != nil || !result.OK() {
		return fmt.Errorf("push not answered rightly: %s %w", result.Wrong, err)
	}
	received := s.world.Backend.Received()
	if len(received) == 0 {
		return errors.New("nothing reached the backend")
	}
	got := received[len(received)-1]
	s.line("   WeChat -> gateway   %s", clip(sent))
	s.line("   gateway -> backend  %s", clip(got.Body))
	for _, name := range []string{"X-Wechat-Appid", "X-Wechat-Platform", "X-Wechat-Openid", "X-Wechat-Msg-Type"} {
		s.line("                       %s: %s", name, got.Header.Get(name))
	}
	s.line("   backend -> gateway  %s", clip(result.Reply))
	s.line("   gateway -> WeChat   %s", clip(result.Last().Body))
	s.line("   the user sees       %s", result.UserSaw)
	if result.UserSaw != "收到：你好" {
		return errors.New("that is not what the backend answered")
	}
	return nil
}

func (s *show) call(ctx context.Context) error {
	s.user = s.world.WeChat.NewUser(integration.AuthorizerID)
	path := "/cgi-bin/user/info?openid=" + s.user.OpenID
	bearer := http.Header{"Authorization": {"Bearer " + s.world.ClientKey}}
	if err := s.callOnce(ctx, "by path", "/"+integration.AuthorizerID+path, bearer); err != nil {
		return err
	}
	header := bearer.Clone()
	header.Set("X-Wechat-Appid", integration.AuthorizerID)
	if err := s.callOnce(ctx, "by header", path, header); err != nil {
		return err
	}
	grant := "/cgi-bin/token?grant_type=client_credential&appid=" + integration.AuthorizerID + "&secret=" + s.world.ClientKey
	_, body, err := s.get(ctx, s.api, s.world.APIURL(grant), nil)
	if err != nil {
		return err
	}
	token, err := jsonField(body, "access_token")
	if err != nil {
		return err
	}
	s.line("   as an SDK does: GET /cgi-bin/token with the client's key as secret -> an opaque token of the gateway's own, %d characters", len(token))
	return s.callOnce(ctx, "with it", path+"&access_token="+token, nil)
}

func (s *show) callOnce(ctx context.Context, how, path string, header http.Header) error {
	resp, body, err := s.get(ctx, s.api, s.world.APIURL(path), header)
	if err != nil {
		return err
	}
	if openID, err := jsonField(body, "openid"); err != nil || openID != s.user.OpenID {
		return fmt.Errorf("%s: %d %s", how, resp.StatusCode, body)
	}
	calls := s.world.WeChat.Journal().Calls("/cgi-bin/user/info")
	s.line("   app -> gateway      %-9s GET %s", how, clip([]byte(path)))
	s.line("   gateway -> WeChat             GET /cgi-bin/user/info?%s", calls[len(calls)-1].Query)
	s.line("   WeChat -> app                 %s", clip(body))
	return nil
}

func (s *show) oauth(ctx context.Context) error {
	start := s.world.URL("/wx/thirdParty/authorize/" + integration.AuthorizerID + "/scan?state=menu1")
	resp, _, err := s.get(ctx, s.https, start, nil)
	if err != nil {
		return err
	}
	link := resp.Header.Get("Location")
	s.line("   browser -> gateway  GET %s", start)
	s.line("   gateway -> browser  %d %s", resp.StatusCode, link)
	callback, err := s.world.WeChat.Visit(link, s.user)
	if err != nil {
		return fmt.Errorf("WeChat's page: %w", err)
	}
	s.line("   WeChat -> browser   302 %s", hideCode(callback))
	resp, _, err = s.get(ctx, s.https, callback, nil)
	if err != nil {
		return err
	}
	s.land = resp.Header.Get("Location")
	s.line("   gateway -> browser  %d %s", resp.StatusCode, s.land)
	id := trackingID(s.land)
	if id == "" || !strings.HasSuffix(s.land, "#menu1") {
		return errors.New("that is not the landing page of funcKey scan")
	}
	bearer := http.Header{"Authorization": {"Bearer " + s.world.ClientKey}}
	_, body, err := s.get(ctx, s.api, s.world.APIURL("/wechat/users/"+id), bearer)
	if err != nil {
		return err
	}
	if openID, err := jsonField(body, "openid"); err != nil || openID != s.user.OpenID {
		return fmt.Errorf("redeemed %s", body)
	}
	s.line("   app -> gateway      GET /wechat/users/%s -> %s", id, clip(body))
	return nil
}

// invite lists what can be tried by hand. The commands are such that any shell takes them as they are: zsh refuses a ? that is
// not quoted, and a comment.
func (s *show) invite() {
	w := s.world
	s.line("\n\x1b[1mStill running. Try:\x1b[0m")
	try := func(what, format string, args ...any) {
		s.line("   %-27s "+format, append([]any{what + ":"}, args...)...)
	}
	try("a verification file", "curl -k %s", w.URL("/"+integration.VerifyName))
	try("a login begins", "curl -k -i '%s'", w.URL("/wx/thirdParty/authorize/"+integration.AuthorizerID+"/scan?state=menu1"))
	try("a login, in a browser", "%s", w.URL("/wx/thirdParty/authorize/"+integration.AuthorizerID+"/verify?scope=snsapi_userinfo&state=menu2"))
	try("authorising, in a browser", "%s", w.URL("/wx/authorize"))
	try("the console, in a browser", "http://localhost:%s", integration.Port(w.Console))
	try("a page signed for JS-SDK", "curl -k '%s'", w.URL("/wx/jssdk/"+integration.AuthorizerID+"?url="+url.QueryEscape(w.URL("/shop?x=1"))))
	try("a forged push", "curl -k -i -d '<xml><Encrypt>AAAA</Encrypt></xml>' '%s'", w.URL("/wx/message/"+integration.AuthorizerID+"?timestamp=1&nonce=2&msg_signature=3"))
	try("a call", "curl -H 'Authorization: Bearer %s' '%s'", w.ClientKey, w.APIURL("/"+integration.AuthorizerID+"/cgi-bin/user/info?openid="+s.user.OpenID))
	try("a token, as an SDK", "curl '%s'", w.APIURL("/cgi-bin/token?grant_type=client_credential&appid="+integration.AccountID+"&secret="+w.ClientKey))
	try("how the gateway is", "bin/caddy wechat status --address %s", w.Admin)
	try("metrics", "curl -s http://%s/metrics | grep caddy_wechat", w.Admin)
	try("WeChat's acceptance check", "make release-check")
	s.line("The gateway's log is %s, its storage is beside it. Ctrl-C ends it.", filepath.Join(w.Dir, "gateway.log"))
}

func (s *show) get(ctx context.Context, client *http.Client, address string, header http.Header) (*http.Response, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, nil, err
	}
	for name, values := range header {
		req.Header[name] = values
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return resp, body, err
}

// trackingID is the id in a landing page's address.
func trackingID(landing string) string {
	u, err := url.Parse(landing)
	if err != nil {
		return ""
	}
	return u.Query().Get("wxTkId")
}
