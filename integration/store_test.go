package integration_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// records is the folder of the gateway's records in its storage.
func records(w *integration.World, names ...string) string {
	return filepath.Join(append([]string{w.Dir, "data", "caddy", "wechat", "v1"}, names...)...)
}

// spilled are the files in the gateway's spill folder.
func spilled(t *testing.T, w *integration.World) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(w.Dir, "data", "caddy", "wechat-spill", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// metric is one line of the gateway's metrics, name and labels as they are printed.
func metric(t *testing.T, w *integration.World, name string) string {
	t.Helper()
	return metricAt(t, w.Admin, name)
}

// metricAt is one line of the metrics of the process with that admin endpoint.
func metricAt(t *testing.T, admin, name string) string {
	t.Helper()
	_, text := fetch(t, plainClient, http.MethodGet, "http://"+admin+"/metrics", nil, "")
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), name+" "); ok {
			return value
		}
	}
	return ""
}

// callUser calls the API for the authorizer, and returns the answer.
func callUser(t *testing.T, w *integration.World, user wxsim.User) string {
	t.Helper()
	_, body := call(t, w, http.MethodGet, "/"+integration.AuthorizerID+"/cgi-bin/user/info?openid="+user.OpenID, bearer(w), "")
	return body
}

// TestStoreTakesNothing: the storage takes no records of authorizers while WeChat changes the refresh token with each
// refresh. The record waits in the spill folder, over a kill -9, and goes to the storage once that takes it.
func TestStoreTakesNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Config.Faults.RotateRefreshTokens = true
	})
	authorize(t, w)
	user := w.WeChat.NewUser(integration.AuthorizerID)
	folder := records(w, "authorizer")
	if err := os.Rename(folder, folder+".kept"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(folder, nil, 0o600); err != nil { // in the place of the folder
		t.Fatal(err)
	}
	w.WeChat.ExpireAll(wxsim.KindAuthorizer, integration.AuthorizerID)
	if body := callUser(t, w, user); !strings.Contains(body, user.OpenID) {
		t.Fatalf("a call with a token that cannot be written: %s", body)
	}
	if files := spilled(t, w); len(files) != 1 {
		t.Fatalf("spilled: %v", files)
	}
	if waiting, unsaved := metric(t, w, "caddy_wechat_records_waiting"), metric(t, w, "caddy_wechat_records_unsaved"); waiting != "1" || unsaved != "0" {
		t.Errorf("%s records wait, %s are unsaved", waiting, unsaved)
	}
	refreshes := w.WeChat.Journal().Refreshes(wxsim.KindAuthorizer, integration.AuthorizerID)
	restart(t, w)
	if body := callUser(t, w, user); !strings.Contains(body, user.OpenID) {
		t.Fatalf("after kill -9: %s", body)
	}
	if err := os.Remove(folder); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(folder+".kept", folder); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the record in the storage", func() error {
		if files := spilled(t, w); len(files) > 0 {
			return fmt.Errorf("still spilled: %v", files)
		}
		return nil
	})
	restart(t, w)
	if body := callUser(t, w, user); !strings.Contains(body, user.OpenID) {
		t.Fatalf("from the storage: %s", body)
	}
	if got := w.WeChat.Journal().Refreshes(wxsim.KindAuthorizer, integration.AuthorizerID); got != refreshes {
		t.Errorf("%d refreshes more, although nothing was lost", got-refreshes)
	}
	checkViolations(t, w)
}

// TestStoreWiped: all records are gone. With the next ticket the gateway is whole again, without any customer.
func TestStoreWiped(t *testing.T) {
	t.Parallel()
	w := newWorld(t, polite)
	authorize(t, w)
	user := w.WeChat.NewUser(integration.AuthorizerID)
	if err := w.Gateway.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(records(w)); err != nil {
		t.Fatal(err)
	}
	asked := w.WeChat.Journal().Count("/cgi-bin/component/api_start_push_ticket")
	w.WeChat.AllowRefresh(wxsim.KindComponent, integration.PlatformID)
	w.WeChat.AllowRefresh(wxsim.KindAuthorizer, integration.AuthorizerID)
	if err := w.Gateway.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the gateway asks for a ticket", func() error {
		if w.WeChat.Journal().Count("/cgi-bin/component/api_start_push_ticket") == asked {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	if body := callUser(t, w, user); !strings.Contains(body, `"errcode":61003`) && !strings.Contains(body, `"errcode":61005`) {
		t.Errorf("before there is a ticket: %s", body)
	}
	if result, err := w.WeChat.PushTicket(t.Context(), integration.PlatformID); err != nil || !result.OK() {
		t.Fatalf("ticket: %s %v", result.Wrong, err)
	}
	eventually(t, "the account", func() error {
		if body := callUser(t, w, user); !strings.Contains(body, user.OpenID) {
			return fmt.Errorf("%s", body)
		}
		return nil
	})
	checkViolations(t, w)
}

// TestDamagedRecord: a record is torn. It is set aside, as it was, and the account goes on.
func TestDamagedRecord(t *testing.T) {
	t.Parallel()
	w := newWorld(t, polite)
	authorize(t, w)
	user := w.WeChat.NewUser(integration.AuthorizerID)
	if err := w.Gateway.Kill(); err != nil {
		t.Fatal(err)
	}
	found, err := filepath.Glob(records(w, "authorizer", "*", "*", "*"))
	if err != nil || len(found) != 1 {
		t.Fatalf("%v %v", found, err)
	}
	if err := os.Truncate(found[0], 40); err != nil {
		t.Fatal(err)
	}
	torn, err := os.ReadFile(found[0])
	if err != nil {
		t.Fatal(err)
	}
	w.WeChat.AllowRefresh(wxsim.KindAuthorizer, integration.AuthorizerID)
	if err := w.Gateway.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the account", func() error {
		if body := callUser(t, w, user); !strings.Contains(body, user.OpenID) {
			return fmt.Errorf("%s", body)
		}
		return nil
	})
	aside, err := filepath.Glob(records(w, "aside", "authorizer", "*", "*", "*", "*"))
	if err != nil || len(aside) != 1 {
		t.Fatalf("set aside: %v %v", aside, err)
	}
	if kept, err := os.ReadFile(aside[0]); err != nil || string(kept) != string(torn) {
		t.Errorf("set aside is another record: %v", err)
	}
	for _, file := range append(aside, found...) {
		if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", filepath.Base(file), info, err)
		}
	}
	checkViolations(t, w)
}

// TestPushForAnotherAccount: a platform's push is sent again on the path of another of its authorizers. The path is not
// signed; the gh_ id inside is.
func TestPushForAnotherAccount(t *testing.T) {
	t.Parallel()
	const other = "wx8888888888888888"
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Config.Authorizers = []wxsim.Authorizer{{AppID: other}}
	})
	authorize(t, w)
	if a, err := w.WeChat.Authorize(t.Context(), integration.PlatformID, other); err != nil || !a.Push.OK() {
		t.Fatalf("authorized: %v", err)
	}
	push := func(tamper func(*wxsim.Outgoing)) wxsim.PushResult {
		result, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{
			Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "hello", Tamper: tamper,
		})
		if err != nil {
			t.Fatal(err)
		}
		return result
	}
	redirect := func(out *wxsim.Outgoing) { out.URL = strings.Replace(out.URL, integration.AuthorizerID, other, 1) }
	eventually(t, "the gateway knows whose path it is", func() error {
		if result := push(redirect); result.Last().Status != http.StatusForbidden {
			return fmt.Errorf("answered %d", result.Last().Status)
		}
		return nil
	})
	before := len(w.Backend.Received())
	push(redirect)
	if got := len(w.Backend.Received()); got != before {
		t.Error("the backend got it")
	}
	for range 3 {
		if result := push(nil); result.UserSaw != "收到：hello" {
			t.Errorf("its own path: %q %s", result.UserSaw, result.Wrong)
		}
		time.Sleep(50 * time.Millisecond) // in which the gateway learns the gh_ id of this account too
	}
	if metric(t, w, `caddy_wechat_pushes_total{endpoint="message",result="addressee"}`) == "" {
		t.Error("not counted")
	}
}

// TestOrphan: an authorization code dies unexchanged, and no other was ever exchanged, so that WeChat has no refresh token of
// the account. It is listed with a link on which it can authorise again.
func TestOrphan(t *testing.T) {
	t.Parallel()
	w := newWorld(t, polite)
	if result, err := w.WeChat.PushTicket(t.Context(), integration.PlatformID); err != nil || !result.OK() {
		t.Fatalf("%s %v", result.Wrong, err)
	}
	w.WeChat.FailNext("/cgi-bin/component/api_query_auth", wxsim.Fault{Errcode: 61010, Times: -1})
	if a, err := w.WeChat.Authorize(t.Context(), integration.PlatformID, integration.AuthorizerID); err != nil || !a.Push.OK() {
		t.Fatalf("authorized: %v", err)
	}
	list := func(query string) (int, string) {
		resp, body := fetch(t, plainClient, http.MethodGet, "http://"+w.Admin+"/wechat/orphans"+query, nil, "")
		return resp.StatusCode, body
	}
	eventually(t, "the account is listed", func() error {
		if status, body := list(""); status != http.StatusOK || !strings.Contains(body, integration.AuthorizerID) || strings.Contains(body, "link") {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
	status, body := list("?redirect=" + url.QueryEscape("https://wx.example.com/back"))
	var answer struct {
		Orphans []struct{ Platform, AppID, Link string }
	}
	if err := json.Unmarshal([]byte(body), &answer); err != nil || status != http.StatusOK || len(answer.Orphans) != 1 {
		t.Fatalf("%d %s %v", status, body, err)
	}
	link, err := url.Parse(answer.Orphans[0].Link)
	if err != nil || "http://"+link.Host != w.WeChat.URL() || link.Query().Get("biz_appid") != integration.AuthorizerID ||
		!slices.Contains(w.WeChat.Secrets(), link.Query().Get("pre_auth_code")) {
		t.Errorf("link: %s", link)
	}
	if status, _ := list("?redirect=http://wx.example.com/"); status != http.StatusBadRequest {
		t.Errorf("a redirect over plain http: %d", status)
	}
	w.WeChat.ClearFaults()
	if a, err := w.WeChat.Authorize(t.Context(), integration.PlatformID, integration.AuthorizerID); err != nil || !a.Push.OK() {
		t.Fatalf("authorized: %v", err)
	}
	awaitAuthorizer(t, w)
	if status, body := list(""); status != http.StatusOK || strings.Contains(body, integration.AuthorizerID) {
		t.Errorf("still listed: %d %s", status, body)
	}
}
