package tokens

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

func TestRefusalTable(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var table refusalTable
		want := func(k refusalKey, say bool, missed int) {
			t.Helper()
			if gotSay, gotMissed := table.tell(k); gotSay != say || gotMissed != missed {
				t.Errorf("%v: say %v, missed %d; want %v, %d", k, gotSay, gotMissed, say, missed)
			}
		}
		one := refusalKey{"wx1", 48001}
		want(one, true, 0)
		want(one, false, 0)
		want(refusalKey{"wx1", 61004}, true, 0)
		want(refusalKey{"wx2", 48001}, true, 0)
		time.Sleep(troubleLogEvery - time.Second)
		want(one, false, 0)
		time.Sleep(time.Second)
		want(one, true, 2)
		want(one, false, 0)

		for i := range maxRefusals {
			table.tell(refusalKey{fmt.Sprint("many", i), 48001})
		}
		want(refusalKey{"late", 48001}, false, 0)
		if n := len(table.told); n > maxRefusals {
			t.Errorf("%d entries", n)
		}
		time.Sleep(troubleLogEvery)
		if say, missed := table.tell(refusalKey{"late", 48001}); !say || missed < 1 {
			t.Errorf("room again: say %v, missed %d", say, missed)
		}
		if n := len(table.told); n != 1 {
			t.Errorf("%d entries are left, want 1", n)
		}
	})
}

// refuse has WeChat answer a path with an error.
func (r *rig) refuse(path string, code int, msg string) {
	r.wx.set(func(f *fakeWeChat) {
		f.hook = func(p string, _ map[string]any) (string, error) {
			if p == path {
				return wxError(code, msg), nil
			}
			return "", nil
		}
	})
}

func TestCallOfOurOwnIsExplained(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.refuse(pathAuthorizerInfo, 45009, "reach max api daily quota limit") // or it would tell other permission sets
		r.authorize(t, testPlatform, testAuthorizer)
		synctest.Wait()
		k := AuthorizerKey(testPlatform, testAuthorizer)
		call := func(path string) string {
			t.Helper()
			before := len(r.log.String())
			if err := r.Call(t.Context(), k, http.MethodPost, path, nil, nil, nil); err == nil {
				t.Error("the call succeeded")
			}
			return r.log.String()[before:]
		}
		has := func(log string, parts ...string) {
			t.Helper()
			for _, part := range append(parts, "level=WARN", "refused a call of the gateway's own", "rid=64f1e2d3-0a1b2c3d-4e5f6071", "remedy=") {
				if !strings.Contains(log, part) {
					t.Errorf("the log lacks %q: %s", part, log)
				}
			}
		}
		r.refuse("/cgi-bin/message/mass/send", 61007, "api is unauthorized to component") // granted are 1 and 15
		has(call("/cgi-bin/message/mass/send"), "errcode=61007", `permission_set="7 (mass`, "granted=no", "appid="+testAuthorizer)
		if log := call("/cgi-bin/message/mass/send"); log != "" {
			t.Errorf("said twice: %s", log)
		}
		r.refuse("/cgi-bin/menu/create", 48001, "api unauthorized")
		has(call("/cgi-bin/menu/create"), "granted=yes")
		r.refuse("/cgi-bin/x", 61004, "access clientip is not registered requestIP: 203.0.113.7")
		has(call("/cgi-bin/x"), "egress_ip=203.0.113.7")

		// Another account of the platform is refused for the same list of addresses.
		r.authorize(t, testPlatform, "wx5555555555555555")
		k = AuthorizerKey(testPlatform, "wx5555555555555555")
		if log := call("/cgi-bin/x"); strings.Contains(log, "61004") {
			t.Errorf("said for another account too: %s", log)
		}
		r.refuse("/cgi-bin/y", 40003, "invalid openid")
		if log := call("/cgi-bin/y"); log != "" {
			t.Errorf("a caller's mistake was logged: %s", log)
		}
		time.Sleep(troubleLogEvery)
		r.refuse("/cgi-bin/x", 61004, "access clientip is not registered requestIP: 203.0.113.7")
		has(call("/cgi-bin/x"), "not_logged=1")
	})
}

func TestFailedRenewalSaysTheRemedy(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.refuse(pathStableToken, 40164, "invalid ip 203.0.113.8 ipv6 ::ffff:203.0.113.8, not in whitelist")
		if _, err := r.Get(t.Context(), AccountKey(testAccount)); err == nil {
			t.Fatal("Get succeeded")
		}
		log := r.log.String()
		for _, part := range []string{"token cannot be renewed", "egress_ip=203.0.113.8", "IP白名单", "errcode=40164"} {
			if !strings.Contains(log, part) {
				t.Errorf("the log lacks %q: %s", part, log)
			}
		}
	})
}

// A token that cannot be renewed is explained once, also if it comes and goes, and each line has WeChat's request id.
func TestFailedRenewalIsExplainedOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		k := AccountKey(testAccount)
		for range 3 {
			r.refuse("/cgi-bin/stable_token", 45009, "reach max api daily quota limit")
			if _, err := r.Renew(t.Context(), k, secret.String{}); err == nil {
				t.Error("renewed")
			}
			r.wx.set(func(f *fakeWeChat) { f.hook = nil })
			time.Sleep(time.Minute)
			r.get(t, k)
		}
		log := r.log.String()
		if n := strings.Count(log, "token cannot be renewed"); n != 3 {
			t.Errorf("said %d times: %s", n, log)
		}
		if n := strings.Count(log, "remedy="); n != 1 {
			t.Errorf("explained %d times: %s", n, log)
		}
		if n := strings.Count(log, "rid=64f1e2d3-0a1b2c3d-4e5f6071"); n != 3 {
			t.Errorf("%d lines with the request id: %s", n, log)
		}
	})
}

func TestErrorNamesItsRequestID(t *testing.T) {
	t.Parallel()
	for msg, want := range map[string]string{"": "/x: 1 rid: r", "no rid: r": "/x: 1 no rid: r"} {
		if got := (&APIError{Code: 1, API: "/x", Msg: msg, RID: "r"}).Error(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
