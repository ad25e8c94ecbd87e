package integration_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// domainsWorld is a world whose sites serve verification files from WeChat too, at the root and below /mp, on plain http
// and on the accounts' own hosts.
func domainsWorld(t *testing.T) *integration.World {
	t.Helper()
	content, err := os.ReadFile("../Caddyfile.example")
	if err != nil {
		t.Fatal(err)
	}
	const (
		folder = "\twechat_verify {$WECHAT_VERIFY:/srv/wechat-verify}"
		pages  = "\treverse_proxy {$WECHAT_PAGES_BACKEND:pages.internal:8080}"
		auto   = "\twechat_verify {\n\t\tauto\n\t}\n"
	)
	config := strings.ReplaceAll(string(content), folder, auto+"\twechat_verify {\n\t\tpath /mp\n\t}\n"+folder)
	config = strings.Replace(config, pages, auto+"\trespond \"page of {host}\"", 1)
	if strings.Count(config, "auto\n") != 3 {
		t.Fatalf("the example has other sites:\n%s", config)
	}
	file := filepath.Join(t.TempDir(), "Caddyfile")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return newWorld(t, func(w *integration.World) {
		polite(w)
		w.Caddyfile = file
		w.Config.Authorizers = []wxsim.Authorizer{{AppID: integration.AuthorizerID, MiniProgram: true}}
	})
}

// awaitTLS waits until a node's https site has its certificate again, which Caddy loads in the background.
func awaitTLS(t *testing.T, w *integration.World, addr string) {
	t.Helper()
	eventually(t, "the site's certificate", func() error {
		_, err := shakeHandsAt(t.Context(), w, addr, integration.Host)
		return err
	})
}

// shakeHands makes a TLS handshake for a name, and returns the certificate.
func shakeHands(ctx context.Context, w *integration.World, name string) (*x509.Certificate, error) {
	return shakeHandsAt(ctx, w, w.HTTPS, name)
}

func shakeHandsAt(ctx context.Context, w *integration.World, addr, name string) (*x509.Certificate, error) {
	pem, err := w.Gateway.CACert()
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	dialer := tls.Dialer{Config: &tls.Config{RootCAs: roots, ServerName: name}}
	conn, err := dialer.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	return conn.(*tls.Conn).ConnectionState().PeerCertificates[0], nil
}

// storeLoads is how often the gateway has read its store.
func storeLoads(t *testing.T, w *integration.World) int {
	t.Helper()
	n, err := strconv.Atoi(metric(t, w, `caddy_wechat_store_operation_duration_seconds_count{op="load",store="caddy"}`))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestAccountHosts: an authorised account's own host gets a certificate, and no other name does. A flood of unknown ones
// costs the store no more reads than the bound, and an account that takes its authorization back gets none any more.
func TestAccountHosts(t *testing.T) {
	t.Parallel()
	w := domainsWorld(t)
	const host, stranger, other = integration.AuthorizerID + "." + integration.Pages, "wx9999999999999999", "wx5555555555555555"
	if _, err := shakeHands(t.Context(), w, host); err == nil {
		t.Fatal("a certificate before anybody authorised")
	}
	authorize(t, w)
	if a, err := w.WeChat.Authorize(t.Context(), integration.PlatformID, other); err != nil || !a.Push.OK() {
		t.Fatalf("authorized: %v", err)
	}
	cert, err := shakeHands(t.Context(), w, host)
	if err != nil {
		t.Fatalf("%s: %v", host, err)
	}
	if err := cert.VerifyHostname(host); err != nil || len(cert.DNSNames) != 1 {
		t.Errorf("certificate for %v: %v", cert.DNSNames, err)
	}
	if _, body := fetch(t, httpsClient(t, w), http.MethodGet, "https://"+host+"/", nil, ""); body != "page of "+host {
		t.Errorf("page: %q", body)
	}
	for _, name := range []string{
		stranger + "." + integration.Pages, integration.AccountID + "." + integration.Pages, integration.PlatformID + "." + integration.Pages,
		integration.AuthorizerID + ".evil.example", host + ".evil.example", "www." + host, integration.Pages,
		"x" + integration.Pages, integration.AuthorizerID, "shop." + integration.Pages,
	} {
		if _, err := shakeHands(t.Context(), w, name); err == nil {
			t.Errorf("%s has a certificate", name)
		}
	}

	before, start := storeLoads(t, w), time.Now()
	const flood = 1000
	for n := range flood {
		if _, err := shakeHands(t.Context(), w, fmt.Sprintf("wx%016x.%s", n, integration.Pages)); err == nil {
			t.Fatal("a stranger has a certificate")
		}
	}
	took := time.Since(start)
	bound := 200 + int(100*took.Seconds()) + 60 // and what the gateway reads for itself
	loads := storeLoads(t, w) - before
	t.Logf("%d handshakes for unknown names in %v: %d reads of the store, the bound is %d", flood, took.Round(time.Millisecond), loads, bound)
	if loads > bound {
		t.Errorf("%d reads of the store, the bound is %d", loads, bound)
	}
	// Once more, all of one name.
	before, start = storeLoads(t, w), time.Now()
	for range 300 {
		if _, err := shakeHands(t.Context(), w, stranger+"."+integration.Pages); err == nil {
			t.Fatal("a stranger has a certificate")
		}
	}
	if loads, bound := storeLoads(t, w)-before, 10+2*int(time.Since(start).Seconds()); loads > bound {
		t.Errorf("%d reads of the store for one name", loads)
	}
	if _, err := shakeHands(t.Context(), w, host); err != nil {
		t.Errorf("after the flood: %v", err)
	}

	if result, err := w.WeChat.Unauthorize(t.Context(), integration.PlatformID, other); err != nil || !result.OK() {
		t.Fatalf("unauthorized: %v", err)
	}
	if _, err := shakeHands(t.Context(), w, other+"."+integration.Pages); err == nil {
		t.Error("a certificate for an account that has just taken its authorization back")
	}
	if strings.Contains(w.Gateway.Log(), "panic") {
		t.Error("a panic")
	}
	checkViolations(t, w)
}

// adminVerify calls the routes of the verification files on an admin endpoint.
func adminVerify(t *testing.T, admin, method, name, body string) (int, string) {
	t.Helper()
	resp, text := fetch(t, plainClient, method, "http://"+admin+"/wechat/verify"+name, nil, body)
	return resp.StatusCode, text
}

// TestVerifyAtRunTime: a file that is added on one node's admin endpoint is served at once there, within a second on
// another node, over https and plain http, at the root and below the path, and after kill -9; until it is removed.
func TestVerifyAtRunTime(t *testing.T) {
	t.Parallel()
	w := domainsWorld(t)
	other := startNode(t, w)
	awaitTLS(t, w, other["https"])
	const name, content = "/MP_verify_RunTime123456789.txt", "\ufeffRunTime123456789\r\n"
	client := httpsClient(t, w)
	addresses := func(https, http string) []string {
		return []string{
			"https://" + integration.Host + ":" + integration.Port(https) + name, "http://" + integration.Host + ":" + integration.Port(http) + name,
			"https://" + integration.Host + ":" + integration.Port(https) + "/mp" + name, "http://" + integration.Host + ":" + integration.Port(http) + "/mp" + name,
		}
	}
	get := func(address string) error {
		c := plainClient
		if strings.HasPrefix(address, "https:") && strings.Contains(address, ":"+integration.Port(w.HTTPS)+"/") {
			c = client
		} else if strings.HasPrefix(address, "https:") {
			g, err := w.Gateway.Client(other["https"])
			if err != nil {
				return err
			}
			c = g
		}
		resp, body := fetch(t, c, http.MethodGet, address, nil, "")
		if body != content || resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/plain" || resp.Header.Get("X-Content-Type-Options") != "nosniff" {
			return fmt.Errorf("%s: %d %q %v", address, resp.StatusCode, body, resp.Header)
		}
		if resp, body = fetch(t, c, http.MethodHead, address, nil, ""); resp.StatusCode != 200 || body != "" || resp.ContentLength != int64(len(content)) {
			return fmt.Errorf("HEAD %s: %d, length %d", address, resp.StatusCode, resp.ContentLength)
		}
		return nil
	}
	everywhere := append(addresses(w.HTTPS, w.HTTP), addresses(other["https"], other["http"])...)
	for _, address := range everywhere {
		if get(address) == nil {
			t.Fatalf("%s before there was anything", address)
		}
	}
	if status, body := adminVerify(t, w.Admin, http.MethodPut, name, content); status != 201 || !strings.Contains(body, "byte order mark") {
		t.Fatalf("added: %d %s", status, body)
	}
	for _, address := range everywhere[:4] {
		if err := get(address); err != nil {
			t.Error(err)
		}
	}
	added := time.Now()
	eventually(t, "the file on the other node", func() error { return get(everywhere[4]) })
	if took := time.Since(added); took > 3*time.Second {
		t.Errorf("the other node served it after %v", took)
	}
	for _, address := range everywhere[5:] {
		if err := get(address); err != nil {
			t.Error(err)
		}
	}
	restart(t, w)
	awaitTLS(t, w, w.HTTPS)
	for _, address := range everywhere[:4] {
		if err := get(address); err != nil {
			t.Errorf("after kill -9: %v", err)
		}
	}
	if status, body := adminVerify(t, other["admin"], http.MethodGet, "", ""); status != 200 || !strings.Contains(body, name[1:]) {
		t.Errorf("the other node's list: %d %s", status, body)
	}
	if status, _ := adminVerify(t, other["admin"], http.MethodDelete, name, ""); status != 204 {
		t.Errorf("removed: %d", status)
	}
	eventually(t, "the end of the file on the first node", func() error {
		if get(everywhere[0]) == nil {
			return fmt.Errorf("still served")
		}
		return nil
	})

	before, start := storeLoads(t, w), time.Now()
	for n := range 2000 {
		if _, body := fetch(t, plainClient, http.MethodGet, fmt.Sprintf("http://%s:%s/MP_verify_%016x.txt", integration.Host, integration.Port(w.HTTP), n), nil, ""); strings.Contains(body, "verify") {
			t.Fatalf("an unknown name is served: %s", body)
		}
	}
	took := time.Since(start)
	bound := 16*(int(took.Seconds())+2) + 60
	loads := storeLoads(t, w) - before
	t.Logf("2000 requests for unknown names in %v: %d reads of the store, the bound is %d", took.Round(time.Millisecond), loads, bound)
	if loads > bound {
		t.Errorf("%d reads of the store, the bound is %d", loads, bound)
	}
	checkViolations(t, w)
}

// TestVerifyFromWeChat: WeChat gives the file of the platform's web-view domain, which the gateway has before anybody
// asks for it, and that of an account on the account's host. Unknown names cost one call to WeChat at most.
func TestVerifyFromWeChat(t *testing.T) {
	t.Parallel()
	const platformAPI, accountAPI = "/cgi-bin/component/get_domain_confirmfile", "/wxa/get_webviewdomain_confirmfile"
	w := domainsWorld(t)
	authorize(t, w)
	host := "https://" + integration.AuthorizerID + "." + integration.Pages
	name, content := wxsim.ConfirmFile(integration.PlatformID)
	accountName, accountContent := wxsim.ConfirmFile(integration.AuthorizerID)
	eventually(t, "the platform's file", func() error {
		status, body := adminVerify(t, w.Admin, http.MethodGet, "", "")
		if status != 200 || !strings.Contains(body, name) {
			return fmt.Errorf("%d %s", status, body)
		}
		return nil
	})
	client := httpsClient(t, w)
	plain := "http://" + integration.Host + ":" + integration.Port(w.HTTP)
	for _, tt := range []struct {
		client        *http.Client
		address, want string
	}{
		{client, w.URL("/" + name), content},
		{plainClient, plain + "/" + name, content},
		{client, host + "/" + name, content},
		{client, host + "/" + accountName, accountContent},
	} {
		if resp, body := fetch(t, tt.client, http.MethodGet, tt.address, nil, ""); resp.StatusCode != 200 || body != tt.want {
			t.Errorf("%s: %d %q", tt.address, resp.StatusCode, body)
		}
	}
	if _, body := fetch(t, client, http.MethodGet, w.URL("/"+accountName), nil, ""); strings.Contains(body, accountContent) {
		t.Errorf("an account's file on another host: %q", body)
	}
	for n := range 200 {
		for _, site := range []string{w.URL(""), host} {
			if _, body := fetch(t, client, http.MethodGet, fmt.Sprintf("%s/x%09d.txt", site, n), nil, ""); strings.Contains(body, content) {
				t.Fatalf("an unknown name is served: %s", body)
			}
		}
	}
	restart(t, w)
	awaitTLS(t, w, w.HTTPS)
	for _, tt := range []struct{ address, want string }{{w.URL("/" + name), content}, {host + "/" + accountName, accountContent}} {
		if _, body := fetch(t, httpsClient(t, w), http.MethodGet, tt.address, nil, ""); body != tt.want {
			t.Errorf("after kill -9: %s: %q", tt.address, body)
		}
	}
	for _, api := range []string{platformAPI, accountAPI} {
		if n := w.WeChat.Journal().Count(api); n != 1 {
			t.Errorf("%s was called %d times", api, n)
		}
	}
	checkViolations(t, w)
}
