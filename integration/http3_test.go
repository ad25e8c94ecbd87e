package integration_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// TestHTTP3 has apps and WeChat come over HTTP/3, which each https site of Caddy's speaks unless told not to. A request
// without a body has no length there.
func TestHTTP3(t *testing.T) {
	t.Parallel()
	s := newSDKWorldOf(t, func(w *integration.World) { w.Config.PushApart = true })
	authorize(t, s.World)
	transport := http3Transport(t, s.World)
	client := &http.Client{Transport: transport, Timeout: 30 * time.Second}
	ask := func(t *testing.T, method, path, body string, header http.Header) string {
		t.Helper()
		var with io.Reader
		if body != "" {
			with = strings.NewReader(body)
		}
		resp, text := fetchBody(t, client, method, "https://api.weixin.qq.com:"+integration.Port(s.HTTPS)+path, header, with)
		if resp.ProtoMajor != 3 || resp.StatusCode != http.StatusOK {
			t.Errorf("%s %s: %s %d %s", method, path, resp.Proto, resp.StatusCode, text)
		}
		return text
	}
	user := s.WeChat.NewUser(integration.AuthorizerID)
	info := "/cgi-bin/user/info?openid=" + user.OpenID
	token, _ := field(t, ask(t, http.MethodGet, tokenQuery(integration.AuthorizerID, s.ClientKey), "", nil), "access_token").(string)

	t.Run("calls", func(t *testing.T) {
		stable := `{"grant_type":"client_credential","appid":"` + integration.AuthorizerID + `","secret":"` + s.ClientKey + `"}`
		if body := ask(t, http.MethodPost, "/cgi-bin/stable_token", stable, nil); !sdkToken.MatchString(body) {
			t.Errorf("stable_token: %s", body)
		}
		if body := ask(t, http.MethodGet, info+"&access_token="+token, "", nil); !strings.Contains(body, user.OpenID) {
			t.Errorf("by token: %s", body)
		}
		if body := ask(t, http.MethodGet, "/"+integration.AuthorizerID+info, "", bearer(s.World)); !strings.Contains(body, user.OpenID) {
			t.Errorf("by prefix: %s", body)
		}
		if got := s.last(t, "/cgi-bin/user/info").Header; got.Get("Content-Length") != "" || got.Get("Transfer-Encoding") != "" {
			t.Errorf("a GET went with a body: %v", got)
		}
		list := `{"user_list":[{"openid":"` + user.OpenID + `"}]}`
		s.WeChat.FailNext("/cgi-bin/user/info/batchget", wxsim.Fault{Errcode: 40001})
		if body := ask(t, http.MethodPost, "/cgi-bin/user/info/batchget?access_token="+token, list, nil); strings.Contains(body, "40001") {
			t.Errorf("a refused token: %s", body)
		}
		if got := s.WeChat.Journal().Calls("/cgi-bin/user/info/batchget"); len(got) != 2 || string(got[1].Body) != list {
			t.Errorf("a refused token: WeChat saw %d calls", len(got))
		}
	})
	// What has to be without a body: its end alone says that it is.
	t.Run("logins", func(t *testing.T) {
		login := "/sns/jscode2session?grant_type=authorization_code&js_code=made-up&appid=" + integration.AccountID + "&secret=" + s.ClientKey
		if body := ask(t, http.MethodGet, login, "", nil); !strings.Contains(body, `"errcode":40029,`) {
			t.Errorf("GET: %s", body)
		}
		ask(t, http.MethodPost, login, "", nil)
		if got := s.last(t, "/sns/jscode2session"); got.Method != http.MethodPost || len(got.Body) != 0 {
			t.Errorf("POST: WeChat saw %s %q", got.Method, got.Body)
		}
		before := len(s.WeChat.Journal().Entries())
		if body := ask(t, http.MethodPost, login, "appid="+integration.AuthorizerID, nil); !strings.Contains(body, `"errcode":43001,`) {
			t.Errorf("with a body: %s", body)
		}
		if n := len(s.WeChat.Journal().Entries()) - before; n != 0 {
			t.Errorf("with a body: WeChat saw %d calls", n)
		}
	})
	t.Run("a login in a browser", func(t *testing.T) {
		jar, err := cookiejar.New(nil)
		if err != nil {
			t.Fatal(err)
		}
		browser := &http.Client{
			Transport: transport, Jar: jar, Timeout: client.Timeout,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
		callback := start(t, s.World, browser, "/wx/thirdParty/authorize/"+integration.AuthorizerID+"/scan?state=a%20b", user)
		var first string
		for range 2 { // a browser that reloads
			resp, _ := fetchBody(t, browser, http.MethodGet, callback, nil, nil)
			id, state := landed(t, resp, http.StatusFound, "/scan?from=wechat&wxTkId=")
			if first == "" {
				first = id
			}
			if resp.ProtoMajor != 3 || state != "a b" || id != first || id == "" {
				t.Errorf("%s: %q %q, first %q", resp.Proto, id, state, first)
			}
		}
		if body := ask(t, http.MethodGet, "/wechat/users/"+first, "", bearer(s.World)); !strings.Contains(body, user.OpenID) {
			t.Errorf("redeemed: %s", body)
		}
	})
	t.Run("ticket of another kind", func(t *testing.T) {
		ask(t, http.MethodGet, "/cgi-bin/ticket/getticket?type=2&access_token="+token, "", nil)
		if got := s.last(t, "/cgi-bin/ticket/getticket"); !strings.Contains(got.Query, "type=2") {
			t.Errorf("WeChat was asked for %s", got.Query)
		}
	})
	t.Run("pushes", func(t *testing.T) {
		relayed := http3Relay(t, s.World, transport)
		result, err := s.WeChat.PushMessage(t.Context(), wxsim.Message{Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "quick"})
		if err != nil || result.UserSaw != "收到：quick" || len(result.Attempts) != 1 {
			t.Errorf("%q after %d attempts: %s %v", result.UserSaw, len(result.Attempts), result.Wrong, err)
		}
		if ticket, err := s.WeChat.PushTicket(t.Context(), integration.PlatformID); err != nil || !ticket.OK() {
			t.Errorf("ticket: %s %v", ticket.Wrong, err)
		}
		if n := relayed.Load(); n < 2 {
			t.Errorf("%d pushes went over HTTP/3", n)
		}
	})
	outputs := map[string]string{"log": s.Gateway.Log()}
	for _, path := range []string{"/metrics", "/config/", "/wechat/status", "/wechat/feed", "/wechat/refusals"} {
		_, outputs[path] = fetch(t, plainClient, http.MethodGet, "http://"+s.Admin+path, nil, "")
	}
	for where, text := range outputs {
		checkAbsent(t, append(s.Secrets(), token), where, text)
	}
}

// TestHTTP3Pace has the backend take longer than WeChat waits: the push that WeChat gave up is joined by the next one.
func TestHTTP3Pace(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Config.PushApart = true
		w.Backend = &integration.Backend{Answer: func(rw http.ResponseWriter, r *http.Request) {
			select {
			case <-time.After(wechatWait + time.Second):
				integration.Echo(rw, r)
			case <-r.Context().Done():
			}
		}}
	})
	authorize(t, w)
	relayed := http3Relay(t, w, http3Transport(t, w))
	result, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "slow"})
	if err != nil || result.UserSaw != "收到：slow" || len(result.Attempts) < 2 {
		t.Errorf("%q after %d attempts: %s %v", result.UserSaw, len(result.Attempts), result.Wrong, err)
	}
	if got := w.Backend.Received(); len(got) != 1 {
		t.Errorf("the backend got the message %d times", len(got))
	}
	if n := relayed.Load(); int(n) < len(result.Attempts) {
		t.Errorf("%d of %d pushes went over HTTP/3", n, len(result.Attempts))
	}
}

// http3Transport speaks HTTP/3, and nothing else, to the gateway's https port, whatever the name in the URL is.
func http3Transport(t *testing.T, w *integration.World) *http3.Transport {
	t.Helper()
	pem, err := w.Gateway.CACert()
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		t.Fatal("the internal CA's certificate is not PEM")
	}
	addr := w.HTTPS
	transport := &http3.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots}, DisableCompression: true,
		Dial: func(ctx context.Context, _ string, tlsConfig *tls.Config, config *quic.Config) (*quic.Conn, error) {
			return quic.DialAddrEarly(ctx, addr, tlsConfig, config)
		},
	}
	t.Cleanup(func() { _ = transport.Close() })
	// The site's certificate comes in the background.
	eventually(t, "HTTP/3", func() error {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, w.URL("/"+integration.VerifyName), nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			return err
		}
		defer func() { _ = resp.Body.Close() }()
		if body, err := io.ReadAll(resp.Body); string(body) != integration.VerifyContent {
			return fmt.Errorf("%d %q %w", resp.StatusCode, body, err)
		}
		return nil
	})
	return transport
}

// http3Relay has pushes go to the gateway over HTTP/3, which the simulated WeChat does not speak, and counts them.
func http3Relay(t *testing.T, w *integration.World, transport http.RoundTripper) (relayed *atomic.Int32) {
	t.Helper()
	relayed = new(atomic.Int32)
	name := filepath.Join(w.Dir, "data", "caddy", "certificates", "local", integration.Host, integration.Host)
	pair, err := tls.LoadX509KeyPair(name+".crt", name+".key")
	if err != nil {
		t.Fatal(err)
	}
	relay := httptest.NewUnstartedServer(&httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			relayed.Add(1)
			r.SetURL(&url.URL{Scheme: "https", Host: r.In.Host})
			r.Out.Host = r.In.Host
		},
		Transport:    transport,
		ErrorHandler: func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) }, // as a gateway that does not answer
	})
	relay.TLS = &tls.Config{Certificates: []tls.Certificate{pair}} //nolint:gosec // the lowest version is Go's
	relay.StartTLS()
	t.Cleanup(relay.Close)
	w.HTTPS = relay.Listener.Addr().String()
	return relayed
}
