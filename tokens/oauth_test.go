package tokens

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	loginPlatform = "wx1111111111111111"
	loginAccount  = "wx2222222222222222"
	loginUserOf   = "wx3333333333333333"
)

// loginWeChat answers the calls of web authorization and keeps what was asked.
type loginWeChat struct {
	mu      sync.Mutex
	asked   []*url.URL
	answers map[string][]string // by path; the last one stays
	issued  int                 // component tokens so far
	tokens  int                 // that are issued at most; 0: any number
	fail    error               // instead of any answer but a component token
}

func (f *loginWeChat) RoundTrip(r *http.Request) (*http.Response, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	body := `{"errcode":-1,"errmsg":"no such path"}`
	if r.URL.Path == "/cgi-bin/component/api_component_token" {
		f.issued++
		body = fmt.Sprintf(`{"component_access_token":"component-%d","expires_in":7200}`, f.issued)
		if f.tokens > 0 && f.issued > f.tokens {
			body = `{"errcode":61004,"errmsg":"access clientip is not registered"}`
		}
	} else if strings.HasPrefix(r.URL.Path, "/sns/") {
		f.asked = append(f.asked, r.URL)
		if f.fail != nil {
			return nil, f.fail
		}
		if queue := f.answers[r.URL.Path]; len(queue) > 0 {
			body = queue[0]
			f.answers[r.URL.Path] = queue[min(1, len(queue)-1):]
		}
	}
	return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(body)), Request: r}, nil
}

func (f *loginWeChat) calls() []*url.URL {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]*url.URL(nil), f.asked...)
}

// loginManager returns a manager with a platform that has a ticket, and a plain account.
func loginManager(t *testing.T, o ClientOptions) *Manager {
	t.Helper()
	client, err := NewClient(o)
	if err != nil {
		t.Fatal(err)
	}
	m := NewManager()
	t.Cleanup(m.Close)
	m.Use(&Environment{
		Store: NewMemStore(), API: client,
		Platforms: []PlatformCredentials{{AppID: loginPlatform, Secret: secret.New("platform-secret")}},
		Accounts:  []AccountCredentials{{AppID: loginAccount, Secret: secret.New("account-secret")}},
	})
	if err := m.PutTicket(t.Context(), loginPlatform, Ticket{Value: secret.New("ticket"), CreatedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	return m
}

var (
	platformCode = UserCode{Platform: loginPlatform, AppID: loginUserOf, Code: secret.New("the-code")}
	accountCode  = UserCode{AppID: loginAccount, Code: secret.New("the-code")}
)

const goodGrant = `{"access_token":"user-token","expires_in":7200,"refresh_token":"user-refresh","openid":"o1","scope":"snsapi_userinfo","unionid":"u1","is_snapshotuser":1}`

func TestExchangeUserCode(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		code  UserCode
		path  string
		query url.Values
	}{
		{"authorizer", platformCode, pathComponentUserCode, url.Values{
			"appid": {loginUserOf}, "code": {"the-code"}, "grant_type": {"authorization_code"},
			"component_appid": {loginPlatform}, "component_access_token": {"component-1"},
		}},
		{"plain account", accountCode, pathUserCode, url.Values{
			"appid": {loginAccount}, "code": {"the-code"}, "grant_type": {"authorization_code"}, "secret": {"account-secret"},
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			wechat := &loginWeChat{answers: map[string][]string{tt.path: {goodGrant}}}
			m := loginManager(t, ClientOptions{Transport: wechat})
			before := time.Now()
			g, err := m.ExchangeUserCode(t.Context(), tt.code)
			if err != nil {
				t.Fatal(err)
			}
			if g.OpenID != "o1" || g.UnionID != "u1" || g.Scope != "snsapi_userinfo" || !g.Snapshot ||
				g.AccessToken.Reveal() != "user-token" || g.RefreshToken.Reveal() != "user-refresh" {
				t.Errorf("grant = %+v", g)
			}
			if life := g.ExpiresAt.Sub(before); life < 7199*time.Second || life > 7260*time.Second {
				t.Errorf("grant lives %v, want two hours", life)
			}
			calls := wechat.calls()
			if len(calls) != 1 || calls[0].Path != tt.path {
				t.Fatalf("asked %v", calls)
			}
			if diff := cmp.Diff(tt.query, calls[0].Query()); diff != "" {
				t.Errorf("query (-want +got):\n%s", diff)
			}
		})
	}
}

func TestExchangeUserCodeErrors(t *testing.T) {
	t.Parallel()
	isCode := func(code int64) func(error) bool { return func(err error) bool { return hasCode(err, code) } }
	is := func(target error) func(error) bool { return func(err error) bool { return errors.Is(err, target) } }
	not := func(target error) func(error) bool { return func(err error) bool { return !errors.Is(err, target) } }
	tests := []struct {
		name   string
		code   UserCode
		answer []string
		fail   error
		want   func(error) bool
		calls  int
	}{
		{"code used", platformCode, []string{`{"errcode":40163,"errmsg":"code been used"}`}, nil, isCode(40163), 1},
		{"code used, plain", accountCode, []string{`{"errcode":40163}`}, nil, isCode(40163), 1},
		{"not authorized", platformCode, []string{`{"errcode":61003}`}, nil, isCode(61003), 1},
		{"component token refused", platformCode, []string{`{"errcode":40001}`}, nil, isCode(40001), 1},
		{"plain account's 40001 is about its secret", accountCode, []string{`{"errcode":40001}`}, nil, isCode(40001), 1},
		{"no openid", platformCode, []string{`{"access_token":"t"}`}, nil, is(ErrUnreachable), 1},
		{"no token", platformCode, []string{`{"openid":"o1"}`}, nil, is(ErrUnreachable), 1},
		{"HTML", accountCode, []string{`<html>502</html>`}, nil, is(ErrUnreachable), 1},
		{"half an answer", accountCode, []string{`{"openid":"o1","access_`}, nil, is(ErrUnreachable), 1},
		{"connection broken", platformCode, nil, io.ErrUnexpectedEOF, is(ErrUnreachable), 1},
		{"no openid: in doubt", platformCode, []string{`{"access_token":"t"}`}, nil, is(ErrCodeInDoubt), 1},
		{"HTML: in doubt", accountCode, []string{`<html>502</html>`}, nil, is(ErrCodeInDoubt), 1},
		{"connection broken: in doubt", platformCode, nil, io.ErrUnexpectedEOF, is(ErrCodeInDoubt), 1},
		{"not connected", platformCode, nil, &net.OpError{Op: "dial", Err: errors.New("refused")}, is(ErrUnreachable), 1},
		{"not connected: not in doubt", accountCode, nil, &net.OpError{Op: "dial", Err: errors.New("refused")}, not(ErrCodeInDoubt), 1},
		{"an answer of WeChat's: not in doubt", platformCode, []string{`{"errcode":-1}`}, nil, not(ErrCodeInDoubt), 1},
		{"unknown platform", UserCode{Platform: loginUserOf, AppID: loginUserOf}, nil, nil, is(ErrNotConfigured), 0},
		{"unknown account", UserCode{AppID: loginUserOf}, nil, nil, is(ErrNotConfigured), 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			wechat := &loginWeChat{fail: tt.fail, answers: map[string][]string{pathUserCode: tt.answer, pathComponentUserCode: append([]string(nil), tt.answer...)}}
			m := loginManager(t, ClientOptions{Transport: wechat})
			g, err := m.ExchangeUserCode(t.Context(), tt.code)
			if err == nil || !tt.want(err) || g.OpenID != "" {
				t.Errorf("grant of %q, err = %v", g.OpenID, err)
			}
			for _, private := range []string{"the-code", "-secret", "component-"} {
				if err != nil && strings.Contains(err.Error(), private) {
					t.Errorf("error tells a secret: %v", err)
				}
			}
			if n := len(wechat.calls()); n != tt.calls {
				t.Errorf("%d calls, want %d", n, tt.calls)
			}
		})
	}
}

// A code is used up by the answer that brings the login: nothing beside the openid and the token may make that unreadable.
func TestOddValuesCostNoLogin(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		expires, snapshot string
		life              time.Duration
		virtual           bool
	}{
		{`7200`, `1`, 2 * time.Hour, true},
		{`"7200"`, `"1"`, 2 * time.Hour, true},
		{`7200.5`, `true`, 2 * time.Hour, true},
		{`300`, `0`, 5 * time.Minute, false},
		{`0`, `"0"`, shortestLife, false},
		{`-1`, `false`, shortestLife, false},
		{`""`, `""`, shortestLife, false},
		{`"two hours"`, `null`, shortestLife, false},
		{`{}`, `"yes"`, shortestLife, true},
		{`1e30`, `1.0`, longestLife, true},
		{`null`, `0.0`, shortestLife, false},
	} {
		t.Run(tt.expires+" "+tt.snapshot, func(t *testing.T) {
			t.Parallel()
			answer := `{"access_token":"user-token","expires_in":` + tt.expires + `,"openid":"o1","scope":"snsapi_base","is_snapshotuser":` + tt.snapshot + `}`
			m := loginManager(t, ClientOptions{Transport: &loginWeChat{answers: map[string][]string{pathComponentUserCode: {answer}}}})
			before := time.Now()
			g, err := m.ExchangeUserCode(t.Context(), platformCode)
			if err != nil {
				t.Fatalf("the login is lost: %v", err)
			}
			if life := g.ExpiresAt.Sub(before); life < tt.life || life > tt.life+time.Minute {
				t.Errorf("the token lives %v, want %v", life, tt.life)
			}
			if g.OpenID != "o1" || g.Snapshot != tt.virtual {
				t.Errorf("openid %q, snapshot user %v, want %v", g.OpenID, g.Snapshot, tt.virtual)
			}
		})
	}
	for _, odd := range []string{`7`, `false`, `{}`, `["snsapi_base"]`, `null`} {
		answer := `{"access_token":"user-token","openid":"o1","scope":` + odd + `,"unionid":` + odd + `,"refresh_token":` + odd + `}`
		m := loginManager(t, ClientOptions{Transport: &loginWeChat{answers: map[string][]string{pathComponentUserCode: {answer}}}})
		g, err := m.ExchangeUserCode(t.Context(), platformCode)
		if err != nil || g.OpenID != "o1" || g.Scope != "" || g.UnionID != "" || !g.RefreshToken.IsZero() {
			t.Errorf("texts that are %s: %+v, %v", odd, g, err)
		}
	}
}

// A code is never sent twice by ourselves, not even where WeChat refuses before it looks at it. The token is renewed for
// the visitor who comes again.
func TestExchangeUserCodeRenewsARefusedComponentToken(t *testing.T) {
	t.Parallel()
	for _, code := range []int64{40001, 40014, 42001, 42006} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			t.Parallel()
			wechat := &loginWeChat{answers: map[string][]string{
				pathComponentUserCode: {fmt.Sprintf(`{"errcode":%d}`, code), goodGrant},
			}}
			m, rogues := loginManager(t, ClientOptions{Transport: wechat}), new(rogueObserver)
			env := *m.env.Load()
			env.Observer = rogues
			m.Use(&env)
			if _, err := m.ExchangeUserCode(t.Context(), platformCode); !errors.Is(err, ErrTokenRenewed) || !hasCode(err, code) || errors.Is(err, ErrCodeInDoubt) {
				t.Errorf("err = %v, want ErrTokenRenewed", err)
			}
			if n := len(wechat.calls()); n != 1 {
				t.Errorf("the code was sent %d times", n)
			}
			g, err := m.ExchangeUserCode(t.Context(), platformCode)
			if err != nil || g.OpenID != "o1" {
				t.Fatalf("grant of %q, %v", g.OpenID, err)
			}
			var used []string
			for _, u := range wechat.calls() {
				used = append(used, u.Query().Get("component_access_token"))
			}
			if diff := cmp.Diff([]string{"component-1", "component-2"}, used); diff != "" {
				t.Errorf("component tokens (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff([]string{"component:" + loginPlatform}, rogues.seen); diff != "" {
				t.Errorf("another system that refreshes (-want +got):\n%s", diff)
			}
		})
	}
}

// A renewal that fails is the reason then, and does not put the code in doubt: WeChat did not look at it.
func TestExchangeUserCodeWithoutAnotherComponentToken(t *testing.T) {
	t.Parallel()
	wechat := &loginWeChat{answers: map[string][]string{pathComponentUserCode: {`{"errcode":40001}`}}, tokens: 1}
	m := loginManager(t, ClientOptions{Transport: wechat})
	_, err := m.ExchangeUserCode(t.Context(), platformCode)
	if !hasCode(err, 61004) || errors.Is(err, ErrTokenRenewed) || errors.Is(err, ErrCodeInDoubt) {
		t.Errorf("err = %v, want the refusal of a new component token", err)
	}
	if n := len(wechat.calls()); n != 1 {
		t.Errorf("the code was sent %d times", n)
	}
}

// What the visitor may do again hangs on whether the code can have reached WeChat, so that must be known of real
// connections.
func TestExchangeUserCodeDoubt(t *testing.T) {
	t.Parallel()
	answering := func(h http.HandlerFunc) string {
		server := httptest.NewServer(h)
		t.Cleanup(server.Close)
		return server.URL
	}
	tests := []struct {
		name, origin string
		doubt        bool
	}{
		{"connection refused", "http://127.0.0.1:1", false},
		{"no answer", answering(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }), true},
		{"half an answer", answering(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			_, _ = io.WriteString(w, `{"openid":"o`)
		}), true},
		{"an answer of a proxy's", answering(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) }), true},
		{"a refusal", answering(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"errcode":40029}`) }), false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			client, err := NewClient(ClientOptions{Origins: []string{tt.origin}})
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			m := NewManager()
			defer m.Close()
			m.Use(&Environment{Store: NewMemStore(), API: client, Accounts: []AccountCredentials{{AppID: loginAccount, Secret: secret.New("s")}}})
			if _, err := m.ExchangeUserCode(t.Context(), accountCode); err == nil || errors.Is(err, ErrCodeInDoubt) != tt.doubt {
				t.Errorf("err = %v, in doubt %v, want %v", err, errors.Is(err, ErrCodeInDoubt), tt.doubt)
			}
			ended, cancel := context.WithCancel(t.Context())
			cancel()
			if _, err := m.ExchangeUserCode(ended, accountCode); !errors.Is(err, context.Canceled) || errors.Is(err, ErrCodeInDoubt) {
				t.Errorf("without time: %v", err)
			}
		})
	}
}

// net/http repeats a GET by itself when a kept-alive connection breaks before the answer. WeChat may have taken the
// code by then, so the second try would turn a login into "code been used". Client prevents it for a POST by having no
// GetBody, but a GET without any body is always repeated: it needs an empty body that is not http.NoBody.
func TestExchangeUserCodeIsNotRepeatedOnABrokenConnection(t *testing.T) {
	t.Parallel()
	var exchanges atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != pathUserCode {
			_, _ = io.WriteString(w, `{"errcode":-1}`)
			return
		}
		if exchanges.Add(1) == 1 {
			_, _ = io.WriteString(w, goodGrant) // leaves a connection to reuse
			return
		}
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		_ = conn.Close()
	}))
	t.Cleanup(server.Close)
	client, err := NewClient(ClientOptions{Origins: []string{server.URL}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	m := NewManager()
	t.Cleanup(m.Close)
	m.Use(&Environment{Store: NewMemStore(), API: client, Accounts: []AccountCredentials{{AppID: loginAccount, Secret: secret.New("s")}}})
	if _, err := m.ExchangeUserCode(t.Context(), accountCode); err != nil {
		t.Fatal(err)
	}
	if _, err := m.ExchangeUserCode(t.Context(), accountCode); !errors.Is(err, ErrUnreachable) {
		t.Errorf("err = %v, want ErrUnreachable", err)
	}
	if n := exchanges.Load(); n != 2 {
		t.Errorf("%d requests reached WeChat, want 2", n)
	}
}

func TestUserInfo(t *testing.T) {
	t.Parallel()
	grant := UserGrant{OpenID: "o1", AccessToken: secret.New("user-token")}
	tests := []struct {
		name    string
		answer  string
		want    Profile
		wantErr bool
	}{
		{"all", `{"openid":"o1","nickname":"张三\u0007","sex":1,"language":"zh_CN","province":"p","city":"c","country":"CN","headimgurl":"https://thirdwx.qlogo.cn/a/132","privilege":["x"],"unionid":"u1"}`,
			Profile{Nickname: "张三", HeadImgURL: "https://thirdwx.qlogo.cn/a/132", UnionID: "u1", Sex: 1, Language: "zh_CN", Province: "p", City: "c", Country: "CN", Privilege: []string{"x"}}, false},
		{"as today", `{"openid":"o1","nickname":"n","sex":0,"privilege":[]}`, Profile{Nickname: "n"}, false},
		{"too many privileges", `{"openid":"o1","privilege":[` + strings.Repeat(`"p",`, 99) + `"p"]}`,
			Profile{Privilege: strings.Split(strings.Repeat("p", maxPrivileges), "")}, false},
		{"another user", `{"openid":"o2","nickname":"n"}`, Profile{}, true},
		{"refused", `{"errcode":48001,"errmsg":"api unauthorized"}`, Profile{}, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			wechat := &loginWeChat{answers: map[string][]string{pathUserInfo: {tt.answer}}}
			m := loginManager(t, ClientOptions{Transport: wechat})
			p, err := m.UserInfo(t.Context(), grant, DefaultUserLang)
			if (err != nil) != tt.wantErr {
				t.Fatalf("err = %v", err)
			}
			if diff := cmp.Diff(tt.want, p); diff != "" {
				t.Errorf("profile (-want +got):\n%s", diff)
			}
			if q := wechat.calls()[0].Query(); q.Get("access_token") != "user-token" || q.Get("openid") != "o1" || q.Get("component_access_token") != "" {
				t.Errorf("query = %v", q)
			}
		})
	}
}

func TestWebAuthorizationWithoutAnEnvironment(t *testing.T) {
	t.Parallel()
	m := NewManager()
	if _, err := m.ExchangeUserCode(t.Context(), accountCode); !errors.Is(err, ErrNotConfigured) {
		t.Errorf("ExchangeUserCode = %v", err)
	}
	m.Close()
	if _, err := m.UserInfo(t.Context(), UserGrant{}, DefaultUserLang); err == nil {
		t.Error("UserInfo on a closed manager has no error")
	}
}

// The user's token is renewed when it has ended or was refused, by the way that the code went, and never more than once.
func TestUserInfoLater(t *testing.T) {
	t.Parallel()
	const (
		profile = `{"openid":"o1","nickname":"n"}`
		expired = `{"errcode":42001,"errmsg":"access_token expired"}`
		renewed = `{"access_token":"renewed","expires_in":7200,"refresh_token":"user-refresh-2","openid":"o1","scope":"snsapi_userinfo"}`
		another = `{"access_token":"renewed","expires_in":7200,"openid":"o2"}`
	)
	ofPlatform, ofAccount := User{AppID: loginUserOf, Platform: loginPlatform, OpenID: "o1"}, User{AppID: loginAccount, OpenID: "o1"}
	tests := []struct {
		name      string
		user      User
		ended     bool
		info      []string
		refresh   []string
		want      string     // paths, in order
		token     string     // kept at the end
		wantError any        // errcode, error, or nil
		refreshed url.Values // of the last refresh
	}{
		{"live", ofAccount, false, []string{profile}, nil, "info", "user-token", nil, nil},
		{"ended, plain account", ofAccount, true, []string{profile}, []string{renewed}, "refresh info", "renewed", nil,
			url.Values{"appid": {loginAccount}, "grant_type": {"refresh_token"}, "refresh_token": {"user-refresh"}}},
		{"ended, authorizer", ofPlatform, true, []string{profile}, []string{renewed}, "component info", "renewed", nil,
			url.Values{"appid": {loginUserOf}, "grant_type": {"refresh_token"}, "refresh_token": {"user-refresh"},
				"component_appid": {loginPlatform}, "component_access_token": {"component-1"}}},
		{"refused", ofAccount, false, []string{expired, profile}, []string{renewed}, "info refresh info", "renewed", nil, nil},
		{"refused again", ofAccount, false, []string{expired}, []string{renewed}, "info refresh info", "renewed", int64(42001), nil},
		{"ended and then refused", ofAccount, true, []string{expired}, []string{renewed}, "refresh info", "renewed", int64(42001), nil},
		{"only snsapi_base", ofAccount, false, []string{`{"errcode":48001,"errmsg":"api unauthorized"}`}, nil, "info", "user-token", int64(48001), nil},
		{"refresh token ended", ofAccount, true, nil, []string{`{"errcode":42002,"errmsg":"refresh_token expired"}`}, "refresh", "user-token", int64(42002), nil},
		{"component token refused", ofPlatform, true, []string{profile}, []string{`{"errcode":40001,"errmsg":"not latest"}`, renewed}, "component component info", "renewed", nil,
			url.Values{"appid": {loginUserOf}, "grant_type": {"refresh_token"}, "refresh_token": {"user-refresh"},
				"component_appid": {loginPlatform}, "component_access_token": {"component-2"}}},
		{"component token refused again", ofPlatform, true, nil, []string{`{"errcode":40001,"errmsg":"not latest"}`}, "component component", "user-token", int64(40001), nil},
		{"about somebody else", ofAccount, true, nil, []string{another}, "refresh", "user-token", ErrUnreachable, nil},
		{"no answer", ofAccount, true, nil, []string{"<html>"}, "refresh", "user-token", ErrUnreachable, nil},
	}
	names := map[string]string{pathUserInfo: "info", pathUserRefresh: "refresh", pathComponentUserRefresh: "component"}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			wechat := &loginWeChat{answers: map[string][]string{
				pathUserInfo: tt.info, pathUserRefresh: tt.refresh, pathComponentUserRefresh: tt.refresh,
			}}
			m, rogues := loginManager(t, ClientOptions{Transport: wechat}), new(rogueObserver)
			env := *m.env.Load()
			env.Observer = rogues
			m.Use(&env)
			grant := UserGrant{OpenID: "o1", AccessToken: secret.New("user-token"), RefreshToken: secret.New("user-refresh"), ExpiresAt: time.Now().Add(time.Hour)}
			if tt.ended {
				grant.ExpiresAt = time.Now()
			}
			p, kept, err := m.UserInfoLater(t.Context(), tt.user, grant, "en")
			var asked []string
			for _, u := range wechat.calls() {
				asked = append(asked, names[u.Path])
				if q := u.Query(); names[u.Path] == "info" && (q.Get("lang") != "en" || q.Get("openid") != "o1") {
					t.Errorf("asked %v", q)
				} else if names[u.Path] != "info" && tt.refreshed != nil && len(asked) == len(strings.Fields(tt.want))-1 {
					if diff := cmp.Diff(tt.refreshed, q); diff != "" {
						t.Errorf("refresh (-want +got):\n%s", diff)
					}
				}
			}
			if got := strings.Join(asked, " "); got != tt.want || kept.AccessToken.Reveal() != tt.token {
				t.Errorf("asked %q, kept %s; want %q, %s", got, kept.AccessToken.Reveal(), tt.want, tt.token)
			}
			var replaced []string // by another system: where WeChat took the next component token
			if tt.name == "component token refused" {
				replaced = []string{"component:" + loginPlatform}
			}
			if diff := cmp.Diff(replaced, rogues.seen); diff != "" {
				t.Errorf("another system that refreshes (-want +got):\n%s", diff)
			}
			switch want := tt.wantError.(type) {
			case nil:
				if err != nil || p.Nickname != "n" {
					t.Errorf("%+v, %v", p, err)
				}
			case int64:
				if !hasCode(err, want) {
					t.Errorf("err = %v, want %d", err, want)
				}
			case error:
				if !errors.Is(err, want) {
					t.Errorf("err = %v, want %v", err, want)
				}
			}
			if err != nil && (strings.Contains(err.Error(), "user-refresh") || strings.Contains(err.Error(), "user-token")) {
				t.Errorf("the error tells a token: %v", err)
			}
		})
	}
}

// A renewed grant is used on; a refresh token that WeChat changed takes the place of the old one.
func TestUserInfoLaterKeepsTheNewRefreshToken(t *testing.T) {
	t.Parallel()
	wechat := &loginWeChat{answers: map[string][]string{
		pathUserInfo: {`{"openid":"o1"}`},
		pathUserRefresh: {
			`{"access_token":"a2","expires_in":7200,"refresh_token":"r2","openid":"o1"}`,
			`{"access_token":"a3","expires_in":7200,"openid":"o1"}`,
		},
	}}
	m := loginManager(t, ClientOptions{Transport: wechat})
	g := UserGrant{OpenID: "o1", RefreshToken: secret.New("r1")}
	for _, want := range []string{"r2", "r2"} {
		g.ExpiresAt = time.Now()
		var err error
		if _, g, err = m.UserInfoLater(t.Context(), User{AppID: loginAccount}, g, "zh_TW"); err != nil || g.RefreshToken.Reveal() != want {
			t.Fatalf("refresh token %s, %v", g.RefreshToken.Reveal(), err)
		}
		if left := time.Until(g.ExpiresAt); left < time.Hour || left > 2*time.Hour {
			t.Errorf("ends in %v", left)
		}
	}
}
