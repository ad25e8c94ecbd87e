package integration_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// lockFiles are the locks of ours in the gateway's storage.
func lockFiles(w *integration.World) ([]string, error) {
	all, err := filepath.Glob(filepath.Join(w.Dir, "data", "caddy", "locks", "*"))
	var ours []string
	for _, name := range all {
		if strings.Contains(filepath.Base(name), "wechat") {
			ours = append(ours, name)
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return ours, err
}

const addedAccount = "wx7777777777777777"

// TestReloadUnderLoad reloads again and again, one time with an account more, while pushes and calls go on: no push is
// lost, no reply is lost, no call fails, and no token is fetched a second time.
//
// An HTTP/1.1 server that is shut down closes the connections that it takes for idle, and a request may just be arriving
// on one (RFC 9112, 9.5). net/http notes only after it has read a request that its connection is no longer idle, so
// that it may even be carried out. And Caddy has a listening socket for each configuration: with the old one go the
// connections that nobody had accepted yet. WeChat pushes such a push again, and the calls here are safe to repeat. Each
// connection that was closed under a request is counted, and nothing may happen twice without one.
func TestReloadUnderLoad(t *testing.T) {
	t.Parallel()
	// betweenReloads requests are made before each: what a reload closes does not depend on how fast the machine is, and their
	// share below must not either.
	const betweenReloads = 400
	config, err := os.ReadFile("../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "Caddyfile")
	write := func(content string) {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(string(config))
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		// A push that met a dying connection must not meet the next one of the pool at once.
		w.Config.Pace.Interval = 100 * time.Millisecond
		w.Caddyfile = file
		w.Config.Accounts = []wxsim.Account{{AppID: addedAccount, Secret: "added-account-secret"}}
		w.Env = append(w.Env, "ADDED_SECRET=added-account-secret", "CRM_APPIDS=*")
		w.Backend = &integration.Backend{Answer: func(rw http.ResponseWriter, r *http.Request) {
			time.Sleep(20 * time.Millisecond) // in flight while a reload happens
			integration.Echo(rw, r)
		}}
	})
	authorize(t, w)
	user := w.WeChat.NewUser(integration.AuthorizerID)
	info := "/" + integration.AuthorizerID + "/cgi-bin/user/info?openid=" + user.OpenID

	before := int64(w.WeChat.Journal().Count("/cgi-bin/user/info"))
	ctx, cancel := context.WithCancel(t.Context())
	var load sync.WaitGroup
	var pushes, calls, cutPushes, cutCalls atomic.Int64
	for i := range 4 {
		load.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				text := fmt.Sprintf("%d/%d", i, n)
				result, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{
					Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: text,
				})
				if err != nil || !result.OK() || result.UserSaw != "收到："+text {
					t.Errorf("push %s: saw %q: %s %v", text, result.UserSaw, result.Wrong, err)
				}
				for _, lost := range result.Attempts[:len(result.Attempts)-1] {
					if lost.Err == nil || lost.Status != 0 || lost.TimedOut {
						t.Errorf("push %s: an attempt was answered %d", text, lost.Status)
					}
					cutPushes.Add(1)
				}
				pushes.Add(1)
			}
		})
		load.Go(func() {
			for ctx.Err() == nil {
				status, body, cut, err := tryCall(w, info)
				for try := 0; err != nil && try < 2; try++ { // also a new connection can be cut: see above
					cutCalls.Add(cut + 1)
					time.Sleep(100 * time.Millisecond)
					status, body, cut, err = tryCall(w, info)
				}
				cutCalls.Add(cut)
				if err != nil || status != 200 || !strings.Contains(body, user.OpenID) {
					t.Errorf("call: %d %s %v", status, body, err)
				}
				calls.Add(1)
			}
		})
	}
	for round := range 8 {
		for pushes.Load()+calls.Load() < int64(round+1)*betweenReloads && t.Context().Err() == nil && !t.Failed() {
			time.Sleep(10 * time.Millisecond)
		}
		if round == 4 {
			write(strings.Replace(string(config), "\t\tclient crm {",
				"\t\taccount "+addedAccount+" {\n\t\t\tsecret {env.ADDED_SECRET}\n\t\t}\n\t\tclient crm {", 1))
		}
		if err := w.Gateway.Reload(t.Context()); err != nil {
			t.Error(err)
		}
	}
	cancel()
	load.Wait()
	t.Logf("%d pushes and %d calls over 8 reloads; a connection was closed under %d pushes and %d calls",
		pushes.Load(), calls.Load(), cutPushes.Load(), cutCalls.Load())
	// A call that was carried out and whose answer was lost would show as one that WeChat got and nobody was answered.
	if got := int64(w.WeChat.Journal().Count("/cgi-bin/user/info")) - before; got < calls.Load() || got > calls.Load()+cutCalls.Load() {
		t.Errorf("WeChat got %d calls, %d were answered, and under %d the connection was closed", got, calls.Load(), cutCalls.Load())
	}
	// A reply lost on its way back would show as a message that the backend had to answer again.
	if got := int64(len(w.Backend.Received())); got < pushes.Load() || got > pushes.Load()+cutPushes.Load() {
		t.Errorf("the backend answered %d messages, %d were pushed, and under %d the connection was closed", got, pushes.Load(), cutPushes.Load())
	}
	if cut, all := cutPushes.Load()+cutCalls.Load(), pushes.Load()+calls.Load(); cut*100 > all {
		t.Errorf("a connection was closed under %d requests of %d: those are not only the idle ones of a reload", cut, all)
	}
	if pushes.Load() < 20 || calls.Load() < 20 {
		t.Errorf("only %d pushes and %d calls: that is no load", pushes.Load(), calls.Load())
	}
	journal := w.WeChat.Journal()
	if got := journal.Refreshes(wxsim.KindAuthorizer, integration.AuthorizerID); got != 1 {
		t.Errorf("%d authorizer tokens were fetched", got)
	}
	if got := journal.Refreshes(wxsim.KindComponent, integration.PlatformID); got != 1 {
		t.Errorf("%d component tokens were fetched", got)
	}
	added := w.WeChat.NewUser(addedAccount)
	if status, body := call(t, w, http.MethodGet, "/"+addedAccount+"/cgi-bin/user/info?openid="+added.OpenID, bearer(w), ""); status != 200 || !strings.Contains(body, added.OpenID) {
		t.Errorf("the added account: %d %s", status, body)
	}
	checkViolations(t, w)
}

// tryCall is call for goroutines other than the test's own. Cut is how many connections were closed under it: net/http
// sends a GET again by itself then.
func tryCall(w *integration.World, path string) (status int, text string, cut int64, err error) {
	trace := &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { cut++ }}
	req, err := http.NewRequestWithContext(httptrace.WithClientTrace(context.Background(), trace), http.MethodGet, w.APIURL(path), nil)
	if err != nil {
		return 0, "", 0, err
	}
	req.Header = bearer(w)
	resp, err := plainClient.Do(req)
	cut--
	if err != nil {
		return 0, "", cut, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), cut, err
}

// TestReloadRefused: a configuration that cannot be put in force, for a mistake of its own or because a listener is not
// to be had, changes nothing: neither the accounts that are known nor any token. The admin endpoint, which Caddy leaves where the
// refused configuration has it, goes on to speak for the one in force.
func TestReloadRefused(t *testing.T) {
	t.Parallel()
	config, err := os.ReadFile("../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	file := filepath.Join(t.TempDir(), "Caddyfile")
	write := func(content string) {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(string(config))
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Caddyfile = file
		w.Config.Accounts = []wxsim.Account{{AppID: addedAccount, Secret: "added-account-secret"}}
		w.Env = append(w.Env, "ADDED_SECRET=added-account-secret", "CRM_APPIDS=*")
	})
	authorize(t, w)
	added := strings.Replace(string(config), "\t\tclient crm {", "\t\taccount "+addedAccount+" {\n\t\t\tsecret {env.ADDED_SECRET}\n\t\t}\n\t\tclient crm {", 1)
	const late = "\nhttp://:1 {\n\tbind 192.0.2.1\n\trespond nowhere\n}\n"
	other := strings.Replace(string(config), "account {$WECHAT_ACCOUNT_APPID:"+integration.AccountID+"}", "account "+addedAccount, 1) // in AccountID's place
	other = strings.Replace(other, "client crm", "client erp", 1)
	global, _, _ := strings.Cut(string(config), "\twechat {\n")
	_, sites, _ := strings.Cut(string(config), "\n\ton_demand_tls {\n")
	for _, tt := range []struct{ config, want string }{
		{strings.Replace(added, "{env.SHOP_SECRET}", "{env.NO_SUCH_SECRET}", 1),
			"account " + integration.AccountID + ": secret: {env.NO_SUCH_SECRET} resolves to nothing"},
		{added + "\nhttp://:" + integration.Port(taken.Addr().String()) + " {\n\tbind 127.0.0.1\n\trespond late\n}\n", "listen"},
		{added + late, "listen"},
		{other + late, "listen"},
		{strings.Replace(other, "\twechat {\n", "\tstorage file_system "+filepath.Join(w.Dir, "elsewhere")+"\n\twechat {\n", 1) + late, "listen"},
		{global + "}\n" + late, "listen"},
		{global + "\ton_demand_tls {\n" + sites, "needs the global option wechat"},
	} {
		write(tt.config)
		if err := w.Gateway.Reload(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("reload: %v, want %q", err, tt.want)
		}
		result, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{Platform: integration.PlatformID, AppID: integration.AuthorizerID, Content: "still"})
		if err != nil || result.UserSaw != "收到：still" {
			t.Errorf("push: %q %s %v", result.UserSaw, result.Wrong, err)
		}
		awaitAuthorizer(t, w)
		if status, body := call(t, w, http.MethodGet, "/"+addedAccount+"/cgi-bin/user/info?openid=o", bearer(w), ""); !strings.Contains(body, "errcode") || w.WeChat.Journal().Refreshes(wxsim.KindStable, addedAccount) != 0 {
			t.Errorf("the account of the refused configuration is known: %d %s", status, body)
		}
		checkAdminInForce(t, w)
		if tt.config == other+late {
			if resp, body := fetch(t, adminClient, http.MethodPost, "http://"+w.Admin+"/wechat/refresh/"+integration.AccountID, nil, ""); resp.StatusCode != http.StatusOK {
				t.Errorf("refresh: %d %s", resp.StatusCode, body)
			}
		}
	}
	reload := func(content string) {
		t.Helper()
		write(content)
		if err := w.Gateway.Reload(t.Context()); err != nil {
			t.Error(err)
		}
	}
	reload(global + "}\n") // which is accepted
	if resp, body := fetch(t, adminClient, http.MethodGet, "http://"+w.Admin+"/wechat/status", nil, ""); resp.StatusCode != http.StatusNotFound || !strings.Contains(body, "no global option wechat") {
		t.Errorf("status without the global option: %d %s", resp.StatusCode, body)
	}
	reload(string(config))
	checkAdminInForce(t, w)
	if got := w.WeChat.Journal().Refreshes(wxsim.KindComponent, integration.PlatformID); got != 1 {
		t.Errorf("%d component tokens were fetched", got)
	}
	checkViolations(t, w)
}

// checkAdminInForce asks the admin endpoint for which configuration it speaks: it has to be Caddyfile.example.
func checkAdminInForce(t *testing.T, w *integration.World) {
	t.Helper()
	admin := "http://" + w.Admin + "/wechat/"
	resp, body := fetch(t, adminClient, http.MethodGet, admin+"status", nil, "")
	var status struct {
		Accounts []struct{ AppID string }
		Clients  []struct{ Name string }
		Findings []struct{ Code string }
	}
	if err := json.Unmarshal([]byte(body), &status); err != nil || resp.StatusCode != http.StatusOK || len(status.Accounts) != 1 ||
		status.Accounts[0].AppID != integration.AccountID || len(status.Clients) != 1 || status.Clients[0].Name != "crm" {
		t.Errorf("status: %d %s", resp.StatusCode, body)
	}
	for _, f := range status.Findings {
		if f.Code == "store_down" {
			t.Errorf("status: %s", body)
		}
	}
	if resp, body := fetch(t, adminClient, http.MethodGet, admin+"ready", nil, ""); resp.StatusCode != http.StatusOK {
		t.Errorf("ready: %d %s", resp.StatusCode, body)
	}
	// Only who knows the account says what is wrong with this, and WeChat is not asked.
	if resp, body := fetch(t, adminClient, http.MethodPost, admin+"refresh/"+integration.AccountID+"?platform="+integration.PlatformID, nil, ""); resp.StatusCode != http.StatusBadRequest ||
		!strings.Contains(body, integration.AccountID+" is in the configuration") {
		t.Errorf("refresh: %d %s", resp.StatusCode, body)
	}
}

// adminClient has a connection for each request: none leads to the endpoint that was there before a reload.
var adminClient = &http.Client{Timeout: plainClient.Timeout, Transport: &http.Transport{DisableKeepAlives: true}}
