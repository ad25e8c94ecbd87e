package caddymodule

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const invalidCode = `{"errcode":40029,"errmsg":"invalid code, rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`

// from asks for an address as a visitor from another one.
func (f *oauthFixture) from(remote, target string) *httptest.ResponseRecorder {
	f.t.Helper()
	r := httptest.NewRequest(http.MethodGet, target, nil)
	r.RemoteAddr = remote
	return serve(f.t, f.OAuth, r, nil)
}

// madeUp has a visitor bring n codes that WeChat answers so, and returns the last answer.
func (f *oauthFixture) madeUp(remote, name, answer string, n int) (rec *httptest.ResponseRecorder) {
	f.t.Helper()
	for i := range n {
		code := fmt.Sprint(name, i)
		f.wechat.answer(code, answer)
		rec = f.from(remote, callbackURL("verify", code, "s"))
	}
	return rec
}

// assertLimited fails unless an answer asks the visitor to come again later, and WeChat was not asked.
func (f *oauthFixture) assertLimited(rec *httptest.ResponseRecorder) {
	f.t.Helper()
	after, err := strconv.Atoi(rec.Header().Get("Retry-After"))
	if rec.Code != http.StatusTooManyRequests || err != nil || after < 1 || time.Duration(after)*time.Second > badCodesDebt ||
		!strings.Contains(rec.Body.String(), pageTooMany.zh.Title) || !strings.Contains(rec.Body.String(), `href="">`) || rec.Header().Get("Location") != "" {
		f.t.Errorf("answer %d %v\n%s", rec.Code, rec.Header(), rec.Body)
	}
	assertPrivate(f.t, rec.Header())
	if calls := f.wechat.takeCalls(); len(calls) != 0 {
		f.t.Errorf("WeChat was asked %q", calls)
	}
}

// Whatever a stranger makes up, WeChat is asked so many times; others, and what went well before, are not touched.
func TestOAuthBadCodes(t *testing.T) {
	for name, answer := range map[string]string{
		"invalid": invalidCode, "used": `{"errcode":40163,"errmsg":"code been used"}`, "expired": `{"errcode":42003,"errmsg":"code expired"}`,
	} {
		t.Run(name, func(t *testing.T) {
			f := newOAuth(t, &OAuth{Platform: platformID})
			const stranger, other = "192.0.2.66:1234", "192.0.2.67:1234"
			good := f.from(stranger, callbackURL("verify", "good", "s"))
			assertLanded(t, good, "s")
			f.wechat.takeCalls()
			f.madeUp(stranger, "made-up", answer, defaultBadCodes)
			if n := len(f.wechat.takeCalls()); n != defaultBadCodes {
				t.Errorf("WeChat was asked %d times", n)
			}
			f.logs.TakeAll()
			f.assertLimited(f.from(stranger, callbackURL("verify", "more", "s")))
			f.assertLimited(f.from("192.0.2.66:4321", oauthBase+"/authUserReceive/"+accountID+"/verify?code=more&state=s"))
			if logs := f.logs.TakeAll(); len(logs) != 1 || logs[0].Level != zap.WarnLevel || !strings.Contains(fmt.Sprint(logs[0].ContextMap()["remedy"]), "trusted_proxies") {
				t.Errorf("logged %v", logs)
			}
			if n := counted(t, f.app.metrics().oauth, "callback", "limited"); n != 2 {
				t.Errorf("counted %v", n)
			}
			if again := f.from(stranger, callbackURL("verify", "good", "s")); again.Header().Get("Location") != good.Header().Get("Location") {
				t.Errorf("the callback of a login that went well, again: %d to %s", again.Code, again.Header().Get("Location"))
			}
			assertLanded(t, f.from(other, callbackURL("verify", "more", "s")), "s") // nor was the code used up
		})
	}
}

// A private address is that of a proxy that nobody named, and so it says nothing of who brings a code.
func TestOAuthBadCodesBehindAProxy(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, BadCodes: 1})
	for _, proxy := range []string{"127.0.0.1:1", "10.1.2.3:1", "172.16.0.9:1", "192.168.1.1:1", "100.100.0.1:1", "169.254.3.4:1", "[::1]:1", "[fd00::7]:1", "[fe80::1]:1", "[::ffff:10.0.0.1]:1", "@"} {
		f.madeUp(proxy, "made-up "+proxy, invalidCode, 3)
		assertLanded(t, f.from(proxy, callbackURL("verify", "good "+proxy, "s")), "s")
	}
	// What a proxy says that is trusted counts, whatever it is.
	rec, repl := httptest.NewRecorder(), caddy.NewReplacer()
	for i := range 3 {
		f.wechat.answer("forwarded", invalidCode)
		r := caddyhttp.PrepareRequest(httptest.NewRequest(http.MethodGet, callbackURL("verify", fmt.Sprint("forwarded", i), "s"), nil), repl, rec, &caddyhttp.Server{})
		r.RemoteAddr = "10.1.2.3:1"
		caddyhttp.SetVar(r.Context(), caddyhttp.ClientIPVarKey, "10.0.0.1")
		f.wechat.answer(fmt.Sprint("forwarded", i), invalidCode)
		rec = httptest.NewRecorder()
		if err := f.ServeHTTP(rec, r, nil); err != nil {
			t.Error(err)
		}
	}
	if rec.Code != http.StatusTooManyRequests {
		t.Errorf("a forwarded address: %d", rec.Code)
	}
	for _, public := range []string{"203.0.113.5:1", "100.128.0.1:1", "[2001:db8::1]:1"} {
		f.madeUp(public, "made-up "+public, invalidCode, 1)
		f.wechat.takeCalls()
		f.assertLimited(f.from(public, callbackURL("verify", "good "+public, "s")))
	}
}

// Any number of people may share an address, as long as their codes are good, or it is not they who are to blame.
func TestOAuthBadCodesCountsNothingElse(t *testing.T) {
	const few = 3
	f := newOAuth(t, &OAuth{Platform: platformID, BadCodes: few})
	const nat = "198.51.100.1:1"
	refused := func(code int) string { return fmt.Sprintf(`{"errcode":%d,"errmsg":"x"}`, code) }
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			for range 2 { // as a reload does
				if rec := f.from(nat, callbackURL("verify", fmt.Sprint("good", i), "s")); rec.Code != http.StatusFound {
					t.Errorf("login %d: %d", i, rec.Code)
				}
			}
		})
	}
	wg.Wait()
	for name, answer := range map[string]string{
		"busy": refused(-1), "HTML": "<html>", "right": refused(48001), "address": refused(61004), "quota": refused(45009), "secret": refused(40125), "token": refused(42001),
	} {
		f.madeUp(nat, name, answer, 2*few)
	}
	for range 2 * few { // known here to be used: WeChat is not asked
		if rec := f.from(nat, callbackURL("scan", "good1", "s")); rec.Code != http.StatusGone {
			t.Errorf("moved to another func: %d", rec.Code)
		}
	}
	for range 2 * few {
		f.from(nat, callbackURL("verify", "", "s"))
		f.from(nat, callbackURL("nobody", "x", "s"))
	}
	if n := counted(t, f.app.metrics().oauth, "callback", "limited"); n != 0 {
		t.Errorf("%v were limited", n)
	}
	assertLanded(t, f.from(nat, callbackURL("verify", "last", "s")), "s")
}

// Accounts are made up as easily as codes. Those that the gateway knows stay open to everybody.
func TestOAuthBadAccounts(t *testing.T) {
	const few = 3
	for _, code := range []int{40013, 61003} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			f := newOAuth(t, &OAuth{Platform: platformID, BadCodes: few})
			if _, err := f.app.manager().ExchangeAuthCode(t.Context(), platformID, authorizerID, secret.New("code")); err != nil {
				t.Fatal(err)
			}
			callback := func(appid, code string) string {
				return strings.Replace(callbackURL("verify", code, "s"), authorizerID, appid, 1)
			}
			for i := range few {
				code, answer := fmt.Sprint("made-up", i), fmt.Sprintf(`{"errcode":%d,"errmsg":"x"}`, code)
				f.wechat.answer(code, answer)
				if rec := f.get(callback(fmt.Sprintf("wx%016x", i), code)); rec.Code != http.StatusBadGateway {
					t.Errorf("account %d: %d", i, rec.Code)
				}
			}
			if n := len(f.wechat.takeCalls()); n != few {
				t.Errorf("WeChat was asked %d times", n)
			}
			if logs := f.logs.TakeAll(); len(logs) != 1 || logs[0].ContextMap()["errcode"] != int64(code) {
				t.Errorf("logged %v", logs)
			}
			if bad, odd := len(f.app.shared.feed.bad.newest()), len(f.app.shared.feed.odd.newest()); bad != 0 || odd != few {
				t.Errorf("the feed has %d entries among those that count, %d among strangers'", bad, odd)
			}
			// One that is known is no invention.
			f.wechat.answer("known", fmt.Sprintf(`{"errcode":%d,"errmsg":"x"}`, code))
			f.from("192.0.2.68:1", callback(authorizerID, "known"))
			if bad := len(f.app.shared.feed.bad.newest()); bad != 1 {
				t.Errorf("the feed has %d entries among those that count", bad)
			}
			f.wechat.takeCalls()
			f.assertLimited(f.get(callback(strangerID, "more")))
			assertLanded(t, f.get(callback(authorizerID, "good1")), "s")
			assertLanded(t, f.get(oauthBase+"/authUserReceive/"+accountID+"/verify?code=good2&state=s"), "s")
			assertLanded(t, f.from("192.0.2.67:1", callback(strangerID, "more")), "s")
		})
	}
}

func TestOAuthBadCodesOff(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, BadCodes: anyBadCodes})
	if rec := f.madeUp("192.0.2.66:1", "made-up", invalidCode, 3*defaultBadCodes); rec.Code != http.StatusBadRequest {
		t.Errorf("answer %d", rec.Code)
	}
	if n := len(f.wechat.calls()); n != 3*defaultBadCodes {
		t.Errorf("WeChat was asked %d times", n)
	}
}

// A stranger cannot fill the log, nor push what others did out of the feed.
func TestOAuthBadCodesAreQuiet(t *testing.T) {
	f := newOAuth(t, &OAuth{Platform: platformID, BadCodes: anyBadCodes})
	f.madeUp("192.0.2.66:1", "made-up", invalidCode, 20)
	if logs := f.logs.TakeAll(); len(logs) != 1 || logs[0].ContextMap()["errcode"] != int64(40029) || logs[0].ContextMap()["not_logged"] != int64(0) {
		t.Errorf("logged %v", logs)
	}
	d := f.funcs["verify"].dampers["invalid"]
	d.last = d.last.Add(-damperInterval)
	f.madeUp("192.0.2.66:1", "made-up again", invalidCode, 1)
	if logs := f.logs.TakeAll(); len(logs) != 1 || logs[0].ContextMap()["not_logged"] != int64(19) {
		t.Errorf("logged %v", logs)
	}
	f.wechat.answer("another", invalidCode)
	f.get(callbackURL("scan", "another", "s"))
	if logs := f.logs.TakeAll(); len(logs) != 1 || logs[0].ContextMap()["func"] != "scan" {
		t.Errorf("of another func logged %v", logs)
	}
	if bad, odd := len(f.app.shared.feed.bad.newest()), len(f.app.shared.feed.odd.newest()); bad != 0 || odd != 22 {
		t.Errorf("the feed has %d entries among those that count, %d among strangers'", bad, odd)
	}
}

// A reload does not give a visitor anew what was used up, on any route.
func TestOAuthBadCodesOutliveAReload(t *testing.T) {
	wechat := newLoginWeChat(t)
	root := filepath.Join(t.TempDir(), "storage")
	target := func(i int) string {
		return fmt.Sprintf("%s/authUserReceive/%s/verify?code=c%d&state=s", oauthBase, accountID, i)
	}
	first, before := flowGeneration(t, root, wechat.URL, &OAuth{BadCodes: 2})
	for i := range 2 {
		wechat.answer(fmt.Sprint("c", i), invalidCode)
		before.get(target(i))
	}
	second, after := flowGeneration(t, root, wechat.URL, &OAuth{BadCodes: 2})
	defer func() { _ = second.Cleanup() }()
	if err := first.Cleanup(); err != nil {
		t.Fatal(err)
	}
	after.wechat = wechat
	wechat.takeCalls()
	after.assertLimited(after.get(target(3)))
}

// transport is WeChat without a network.
type transport func(*http.Request) (*http.Response, error)

func (f transport) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// inBubble is f's handler with a WeChat and a store in which time passes as a test wants.
func (f *oauthFixture) inBubble(t *testing.T, wechat http.RoundTripper) *oauthFixture {
	t.Helper()
	client, err := tokens.NewClient(tokens.ClientOptions{Transport: wechat})
	if err != nil {
		t.Fatal(err)
	}
	env := *f.app.env
	env.API, env.Store = client, tokens.NewMemStore()
	manager := tokens.NewManager()
	inner := &shared{pushMemory: &pushMemory{calls: newCallTable(nil)}, manager: manager, users: tokens.NewUserTable(1000), metrics: newMetrics(manager, newCallTable(nil)), claims: newClaims(newCallTable(nil), nil), feed: newFeed(), events: newEventQueue(t.Context(), nil), logins: newVisitorLimits()}
	t.Cleanup(func() { inner.logins.close(); inner.users.Close(); inner.manager.Close() })
	o := *f.OAuth
	o.app = &App{byAppID: f.app.byAppID, env: &env, shared: inner, generations: new(generations)}
	o.places = newLoginPlaces(o.MaxInFlight)
	return &oauthFixture{OAuth: &o, t: t, wechat: f.wechat, logs: f.logs}
}

func accountCallback(code any) string {
	return fmt.Sprintf("%s/authUserReceive/%s/verify?code=%v&state=s", oauthBase, accountID, code)
}

// Nobody is kept out for longer than five minutes, however few codes the option has and however many were under way.
func TestOAuthBadCodesDebtEnds(t *testing.T) {
	for _, n := range []int{1, 2, 6, defaultBadCodes, maxBadCodes} {
		o := &OAuth{BadCodes: n}
		limits := newVisitorLimits()
		visitor := netip.MustParsePrefix("192.0.2.66/32")
		for range n + 100*n {
			if n == maxBadCodes && limits.wait(visitor, o.allowance(badCode)) > 4*time.Minute {
				break // it would take long
			}
			limits.charge(visitor, o.allowance(badCode))
		}
		if wait := limits.wait(visitor, o.allowance(badCode)); wait > badCodesDebt || wait < badCodesDebt/2 && n > 1 {
			t.Errorf("bad_codes %d: %v", n, wait)
		}
		limits.close()
	}
}

// A minute brings as many again. Codes that were all under way before the first was answered make a debt, which ends.
func TestOAuthBadCodesInTime(t *testing.T) {
	const n = 6 // one in ten seconds
	outer := newOAuth(t, &OAuth{BadCodes: n})
	synctest.Test(t, func(t *testing.T) {
		f := outer.inBubble(t, transport(func(r *http.Request) (*http.Response, error) {
			time.Sleep(100 * time.Millisecond)
			outer.wechat.answer(r.URL.Query().Get("code"), invalidCode)
			return outer.wechat.RoundTrip(r)
		}))
		codes := 0
		asked := func(tries int) int {
			f.wechat.takeCalls()
			for range tries {
				codes++
				f.get(accountCallback(codes))
			}
			return len(f.wechat.takeCalls())
		}
		if got := asked(50); got != n {
			t.Errorf("asked %d times at once", got)
		}
		time.Sleep(35 * time.Second)
		if got := asked(50); got != 3 {
			t.Errorf("asked %d times after 35 seconds", got)
		}
		time.Sleep(time.Hour)
		if got := asked(50); got != n {
			t.Errorf("asked %d times after an hour", got)
		}

		time.Sleep(time.Hour)
		var wg sync.WaitGroup
		for i := range 500 {
			wg.Go(func() { f.get(accountCallback(fmt.Sprint("at-once", i))) })
		}
		wg.Wait()
		f.wechat.takeCalls()
		rec := f.get(accountCallback("soon"))
		f.assertLimited(rec)
		after, _ := strconv.Atoi(rec.Header().Get("Retry-After"))
		if wait := time.Duration(after) * time.Second; wait < badCodesDebt-20*time.Second || wait > badCodesDebt {
			t.Errorf("to come again after %d seconds", after)
		}
		time.Sleep(time.Duration(after-1) * time.Second)
		f.assertLimited(f.get(accountCallback("too-soon")))
		time.Sleep(time.Second)
		if got := asked(1); got != 1 {
			t.Errorf("asked %d times when it was time", got)
		}
	})
}

// No more codes than max_in_flight are with WeChat. As many wait for a place, for a while; others come again later, and
// their codes are as good as before.
func TestOAuthMaxInFlight(t *testing.T) {
	outer := newOAuth(t, &OAuth{MaxInFlight: 2})
	for _, slow := range []bool{false, true} {
		t.Run(fmt.Sprint("slow ", slow), func(t *testing.T) {
			outer.logs.TakeAll()
			outer.wechat.takeCalls()
			synctest.Test(t, func(t *testing.T) {
				gate := make(chan struct{})
				f := outer.inBubble(t, transport(func(r *http.Request) (*http.Response, error) {
					select {
					case <-gate:
					case <-r.Context().Done():
						return nil, r.Context().Err()
					}
					return outer.wechat.RoundTrip(r)
				}))
				recs := make([]*httptest.ResponseRecorder, 4)
				var wg sync.WaitGroup
				for i := range recs {
					wg.Go(func() { recs[i] = f.get(accountCallback(fmt.Sprintf("%d-%v", i, slow))) })
					synctest.Wait() // one after the other
				}
				busy := f.get(accountCallback(fmt.Sprintf("4-%v", slow)))
				if slow {
					time.Sleep(placeWait)
					synctest.Wait() // they have left before there is a place
				}
				close(gate)
				wg.Wait()
				for i, rec := range recs {
					want := http.StatusFound
					if slow && i >= 2 {
						want = http.StatusServiceUnavailable
					}
					if rec.Code != want {
						t.Errorf("login %d: %d", i, rec.Code)
					}
				}
				if busy.Code != http.StatusServiceUnavailable || busy.Header().Get("Retry-After") != "5" || !strings.Contains(busy.Body.String(), `href="">`) {
					t.Errorf("beyond those who wait: %d %v\n%s", busy.Code, busy.Header(), busy.Body)
				}
				if logs := f.logs.FilterField(zap.String("reason", failBusy.reason)).Len(); logs > 1 || !slow && logs != 1 {
					t.Errorf("%d log lines", logs)
				}
				if assertLanded(t, f.get(accountCallback(fmt.Sprintf("4-%v", slow))), "s"); f.places.waiting.Load() != 0 || len(f.places.taken) != 0 {
					t.Error("places are left taken")
				}
			})
		})
	}
}

// What the visitor's other codes came to while one waited for its place counts for it.
func TestOAuthBadCodesWhileWaiting(t *testing.T) {
	outer := newOAuth(t, &OAuth{MaxInFlight: 20, BadCodes: 5})
	synctest.Test(t, func(t *testing.T) {
		f := outer.inBubble(t, transport(func(r *http.Request) (*http.Response, error) {
			time.Sleep(time.Second)
			outer.wechat.answer(r.URL.Query().Get("code"), invalidCode)
			return outer.wechat.RoundTrip(r)
		}))
		statuses := make([]int, 40)
		var wg sync.WaitGroup
		for i := range statuses {
			wg.Go(func() { statuses[i] = f.get(accountCallback(i)).Code })
		}
		wg.Wait()
		n := 0
		for _, status := range statuses {
			if status == http.StatusTooManyRequests {
				n++
			}
		}
		if asked := len(f.wechat.calls()); asked > 24 || n < 16 { // four may get the places of the first four to be charged
			t.Errorf("asked %d times, %d were limited", asked, n)
		}
	})
}

// Errors of the kind stay errors of the kind on their way.
func TestNotAskedIsItsOwnFailure(t *testing.T) {
	t.Parallel()
	if f := loginFailure(fmt.Errorf("work: %w", &notAsked{failBusy})); f != failBusy {
		t.Errorf("failure %+v", f)
	}
	if f := loginFailure(errors.New("x")); f.damped || f.retryAfter != 0 {
		t.Errorf("failure %+v", f)
	}
}
