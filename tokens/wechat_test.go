package tokens

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	testPlatform   = "wx00000000000000aa"
	testPlatform2  = "wx00000000000000bb"
	testAccount    = "wx00000000000000cc"
	testAuthorizer = "wx00000000000000dd"

	testPlatformSecret = "platform-secret-0123"
	testAccountSecret  = "account-secret-4567"
)

// fakeWeChat is a WeChat in memory: an http.RoundTripper that works in synctest bubbles.
type fakeWeChat struct {
	mu      sync.Mutex
	latency time.Duration
	expires string // raw JSON of expires_in; default 7200
	// hook, if set, may answer a call itself: with a body, or with an error. Called without mu.
	hook func(path string, body map[string]any) (answer string, err error)

	calls   map[string]int // by path
	serial  int
	alive   map[string]time.Time // access token -> end
	stable  map[string]string    // account -> the token that normal mode gives
	refresh map[string]string    // authorizer -> refresh token
	codes   map[string]string    // unused authorization code -> authorizer
	strict  bool                 // a rotated refresh token is void at once
	rotate  bool                 // each refresh gives a new refresh token
	tickets map[string]bool      // tickets accepted; nil: any
	listing map[string]string    // what lists and infos say of refresh tokens, in the place of refresh
	authAt  map[string]int64     // authorizer -> auth_time in lists; default 1
	page    int                  // accounts in one answer of the list; default 500
}

func newFakeWeChat() *fakeWeChat {
	return &fakeWeChat{
		expires: "7200", calls: make(map[string]int), alive: make(map[string]time.Time), stable: make(map[string]string),
		refresh: make(map[string]string), codes: make(map[string]string),
	}
}

func (f *fakeWeChat) RoundTrip(r *http.Request) (*http.Response, error) {
	var body map[string]any
	if r.Body != nil {
		raw, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		if len(raw) > 0 {
			if err := json.Unmarshal(raw, &body); err != nil {
				return nil, fmt.Errorf("fake: body is no JSON")
			}
		}
	}
	f.mu.Lock()
	f.calls[r.URL.Path]++
	latency, hook := f.latency, f.hook
	f.mu.Unlock()
	if latency > 0 {
		t := time.NewTimer(latency)
		defer t.Stop()
		select {
		case <-t.C:
		case <-r.Context().Done():
			return nil, r.Context().Err()
		}
	}
	answer := ""
	if hook != nil {
		var err error
		if answer, err = hook(r.URL.Path, body); err != nil {
			return nil, err
		}
	}
	if answer == "" {
		answer = f.answer(r, body)
	}
	return &http.Response{
		StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {"text/plain"}},
		Body: io.NopCloser(strings.NewReader(answer)), Request: r,
	}, nil
}

func wxError(code int, msg string) string {
	return fmt.Sprintf(`{"errcode":%d,"errmsg":%q}`, code, msg+" rid: 64f1e2d3-0a1b2c3d-4e5f6071")
}

func (f *fakeWeChat) answer(r *http.Request, body map[string]any) string {
	f.mu.Lock()
	defer f.mu.Unlock()
	text := func(key string) string { s, _ := body[key].(string); return s }
	needComponent := func() string {
		if !f.live(r.URL.Query().Get("component_access_token")) {
			return wxError(40001, "invalid credential")
		}
		return ""
	}
	switch r.URL.Path {
	case pathStartPush:
		if text("component_secret") != testPlatformSecret {
			return wxError(40125, "invalid appsecret")
		}
		return `{"errcode":0,"errmsg":"ok"}`
	case pathComponentToken:
		if text("component_appsecret") != testPlatformSecret {
			return wxError(40125, "invalid appsecret")
		}
		if f.tickets != nil && !f.tickets[text("component_verify_ticket")] {
			return wxError(61006, "component ticket is invalid")
		}
		return fmt.Sprintf(`{"component_access_token":%q,"expires_in":%s}`, f.issue("component"), f.expires)
	case pathStableToken:
		if text("secret") != testAccountSecret {
			return wxError(40125, "invalid appsecret")
		}
		held := f.stable[text("appid")]
		if left := time.Until(f.alive[held]); left < 5*time.Minute || body["force_refresh"] == true {
			if body["force_refresh"] == true {
				delete(f.alive, held)
			}
			held = f.issue("account")
			f.stable[text("appid")] = held
			return fmt.Sprintf(`{"access_token":%q,"expires_in":%s}`, held, f.expires)
		}
		return fmt.Sprintf(`{"access_token":%q,"expires_in":%d}`, held, int(time.Until(f.alive[held]).Seconds()))
	case pathAuthorizerToken:
		if e := needComponent(); e != "" {
			return e
		}
		appid := text("authorizer_appid")
		held, ok := f.refresh[appid]
		if !ok {
			return wxError(61003, "component is not authorized by this account")
		}
		if text("authorizer_refresh_token") != held && (f.strict || held == "") {
			return wxError(61023, "refresh_token is invalid")
		}
		if f.rotate {
			f.serial++
			held = fmt.Sprintf("refreshtoken@@@%d", f.serial)
			f.refresh[appid] = held
		}
		return fmt.Sprintf(`{"authorizer_access_token":%q,"expires_in":%s,"authorizer_refresh_token":%q}`, f.issue("authorizer"), f.expires, held)
	case pathQueryAuth:
		if e := needComponent(); e != "" {
			return e
		}
		appid, ok := f.codes[text("authorization_code")]
		if !ok {
			return wxError(61009, "code is invalid")
		}
		delete(f.codes, text("authorization_code"))
		f.serial++
		f.refresh[appid] = fmt.Sprintf("refreshtoken@@@%d", f.serial)
		return fmt.Sprintf(`{"authorization_info":{"authorizer_appid":%q,"authorizer_access_token":%q,"expires_in":%s,"authorizer_refresh_token":%q,
			"func_info":[{"funcscope_category":{"id":1}},{"funcscope_category":{"id":15}}]}}`, appid, f.issue("authorizer"), f.expires, f.refresh[appid])
	case pathPreAuthCode:
		if e := needComponent(); e != "" {
			return e
		}
		return `{"pre_auth_code":"preauthcode@@@1","expires_in":1800}`
	case pathAuthorizerInfo:
		if e := needComponent(); e != "" {
			return e
		}
		appid := text("authorizer_appid")
		if _, ok := f.refresh[appid]; !ok {
			return wxError(61003, "component is not authorized by this account")
		}
		return fmt.Sprintf(`{"authorizer_info":{"nick_name":"N","user_name":"gh_%s"},"authorization_info":{"authorizer_appid":%q,
			"authorizer_refresh_token":%q,"func_info":[{"funcscope_category":{"id":7}}]}}`, appid[2:], appid, f.shown(appid))
	case pathAuthorizerList:
		if e := needComponent(); e != "" {
			return e
		}
		all := slices.Sorted(maps.Keys(f.refresh))
		offset, _ := body["offset"].(float64)
		count, _ := body["count"].(float64)
		if f.page > 0 {
			count = float64(f.page)
		}
		var list []string
		for _, appid := range all[min(int(offset), len(all)):min(int(offset+count), len(all))] {
			list = append(list, fmt.Sprintf(`{"authorizer_appid":%q,"refresh_token":%q,"auth_time":%d}`, appid, f.shown(appid), max(1, f.authAt[appid])))
		}
		return fmt.Sprintf(`{"total_count":%d,"list":[%s]}`, len(all), strings.Join(list, ","))
	case pathGetTicket:
		if !f.live(r.URL.Query().Get("access_token")) {
			return wxError(40001, "invalid credential")
		}
		return fmt.Sprintf(`{"errcode":0,"errmsg":"ok","ticket":%q,"expires_in":%s}`, f.issue(r.URL.Query().Get("type")), f.expires)
	default:
		token := r.URL.Query().Get("access_token") + r.URL.Query().Get("component_access_token")
		if !f.live(token) {
			return wxError(40001, "invalid credential, access_token is invalid or not latest")
		}
		return fmt.Sprintf(`{"errcode":0,"token":%q}`, token)
	}
}

// shown is the refresh token of an authorizer as lists and infos have it; mu is held.
func (f *fakeWeChat) shown(appid string) string {
	if s, ok := f.listing[appid]; ok {
		return s
	}
	return f.refresh[appid]
}

// issue makes an access token; mu is held.
func (f *fakeWeChat) issue(kind string) string {
	f.serial++
	token := fmt.Sprintf("%s-token-%d", kind, f.serial)
	var life wireSeconds
	_ = json.Unmarshal([]byte(f.expires), &life)
	f.alive[token] = time.Now().Add(lifeOf(int64(life)))
	return token
}

func (f *fakeWeChat) live(token string) bool { return time.Now().Before(f.alive[token]) }

func (f *fakeWeChat) count(path string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[path]
}

func (f *fakeWeChat) set(change func(f *fakeWeChat)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f)
}

// kill makes WeChat refuse a token from now on.
func (f *fakeWeChat) kill(token Token) {
	f.set(func(f *fakeWeChat) { delete(f.alive, token.Value.Reveal()) })
}

// faultStore is a MemStore that fails, waits and counts.
type faultStore struct {
	*MemStore
	mu     sync.Mutex
	fault  func(op, name string) error // nil: none
	before func(op, name string)       // called first, without mu
	counts map[string]int
}

func newFaultStore() *faultStore {
	return &faultStore{MemStore: NewMemStore(), counts: make(map[string]int)}
}

func (s *faultStore) check(op, name string) error {
	s.mu.Lock()
	s.counts[op]++
	fault, before := s.fault, s.before
	s.mu.Unlock()
	if before != nil {
		before(op, name)
	}
	if fault != nil {
		return fault(op, name)
	}
	return nil
}

func (s *faultStore) fail(fault func(op, name string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = fault
}

func (s *faultStore) hold(before func(op, name string)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.before = before
}

func (s *faultStore) count(op string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counts[op]
}

// empty loses all records.
func (s *faultStore) empty() {
	s.MemStore.mu.Lock()
	defer s.MemStore.mu.Unlock()
	clear(s.MemStore.records)
}

func (s *faultStore) Load(ctx context.Context, name string) ([]byte, error) {
	if err := s.check("load", name); err != nil {
		return nil, err
	}
	return s.MemStore.Load(ctx, name)
}

func (s *faultStore) Store(ctx context.Context, name string, value []byte) error {
	if err := s.check("store", name); err != nil {
		return err
	}
	return s.MemStore.Store(ctx, name, value)
}

func (s *faultStore) Delete(ctx context.Context, name string) error {
	if err := s.check("delete", name); err != nil {
		return err
	}
	return s.MemStore.Delete(ctx, name)
}

func (s *faultStore) List(ctx context.Context, prefix string) ([]string, error) {
	if err := s.check("list", prefix); err != nil {
		return nil, err
	}
	return s.MemStore.List(ctx, prefix)
}

func (s *faultStore) Lock(ctx context.Context, name string) (func(), error) {
	if err := s.check("lock", name); err != nil {
		return nil, err
	}
	return s.MemStore.Lock(ctx, name)
}

// rig is a manager with everything it needs, closed with the test.
type rig struct {
	*Manager
	wx    *fakeWeChat
	store *faultStore
	env   *Environment
	log   *logBuffer
}

// logBuffer collects a log, for what must be said and what must not.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *logBuffer) count(text string) int { return strings.Count(b.String(), text) }

// newRig makes a manager over a new WeChat and an empty store.
func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{wx: newFakeWeChat(), store: newFaultStore(), log: &logBuffer{}}
	client, err := NewClient(ClientOptions{Transport: r.wx})
	if err != nil {
		t.Fatal(err)
	}
	sealer, err := crypto.NewSealer(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	r.env = &Environment{
		Store: r.store, Sealer: sealer, API: client,
		Platforms: []PlatformCredentials{{testPlatform, secret.New(testPlatformSecret)}, {testPlatform2, secret.New(testPlatformSecret)}},
		Accounts:  []AccountCredentials{{testAccount, secret.New(testAccountSecret)}},
		// The roster has tests of its own; others count calls.
		RosterEvery: -1,
		Log:         slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	r.Manager = NewManager()
	t.Cleanup(func() {
		r.Close()
		r.noSecretLogged(t)
	})
	return r
}

// started is newRig, in a bubble, with the manager in use, the loop's first jobs done, and tickets there.
func started(t *testing.T) *rig {
	t.Helper()
	r := startedAwake(t)
	synctest.Wait()
	return r
}

// startedAwake is started outside a bubble, where the loop's first jobs may still run.
func startedAwake(t testing.TB) *rig {
	t.Helper()
	r := newRig(t)
	r.Use(r.env)
	for _, p := range []string{testPlatform, testPlatform2} {
		r.ticket(t, p)
	}
	return r
}

func (r *rig) ticket(t testing.TB, platform string) {
	t.Helper()
	err := r.PutTicket(context.Background(), platform, Ticket{Value: secret.New("ticket@@@" + platform), CreatedAt: time.Now()})
	if err != nil {
		t.Fatalf("PutTicket: %v", err)
	}
}

// authorize lets an account authorise a platform, without the push.
func (r *rig) authorize(t testing.TB, platform, appid string) {
	t.Helper()
	code := r.newCode(appid)
	if _, err := r.ExchangeAuthCode(context.Background(), platform, appid, code); err != nil {
		t.Fatalf("ExchangeAuthCode: %v", err)
	}
}

// newCode is an authorization code that WeChat would give for the account now.
func (r *rig) newCode(appid string) (code secret.String) {
	r.wx.set(func(f *fakeWeChat) {
		f.serial++
		text := fmt.Sprintf("queryauthcode@@@%d", f.serial)
		f.codes[text] = appid
		code = secret.New(text)
	})
	return code
}

// startedWithOpenCode is a gateway that accepted a code which WeChat does not exchange yet.
func startedWithOpenCode(t *testing.T) *rig {
	t.Helper()
	r := started(t)
	r.refuseExchanges()
	if err := r.Accept(t.Context(), r.push(r.newCode(testAuthorizer))); err != nil {
		t.Fatal(err)
	}
	return r
}

// refuseExchanges has WeChat not reached by exchanges, until hook is set again.
func (r *rig) refuseExchanges() {
	r.wx.set(func(f *fakeWeChat) {
		f.hook = func(path string, _ map[string]any) (string, error) {
			if path == pathQueryAuth {
				return "", errors.New("connection refused")
			}
			return "", nil
		}
	})
}

// restart closes the manager, as a crash would as far as the store can tell, and starts another on the same store.
func (r *rig) restart() {
	r.Close()
	r.Manager = NewManager()
	r.Use(r.env)
}

func (r *rig) get(t testing.TB, k Key) Token {
	t.Helper()
	token, err := r.Get(context.Background(), k)
	if err != nil {
		t.Fatalf("Get(%v): %v", k, err)
	}
	return token
}

func (r *rig) noSecretLogged(t testing.TB) {
	t.Helper()
	text := r.log.String()
	for _, part := range []string{testPlatformSecret, testAccountSecret, "@@@", "-token-"} {
		if strings.Contains(text, part) {
			t.Errorf("the log holds %q:\n%s", part, text)
		}
	}
}

// sameToken compares all of two tokens.
func sameToken(a, b Token) bool {
	return a.Value.Same(b.Value) && a.ExpiresAt.Equal(b.ExpiresAt) && a.Generation == b.Generation
}
