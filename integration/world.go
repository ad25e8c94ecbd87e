package integration

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// The cast: the appids are those of Caddyfile.example.
const (
	PlatformID   = "wx1111111111111111"
	AccountID    = "wx2222222222222222"
	AuthorizerID = "wx3333333333333333"

	// VerifyName and VerifyContent are a verification file.
	VerifyName    = "MP_verify_abcdefgh12345678.txt"
	VerifyContent = "abcdefgh12345678"

	// Host is the gateway's name, and Pages the domain below which each authorised account has its own.
	Host  = "localhost"
	Pages = "wx.example.com"
)

// World is a gateway with everything around it: the simulated WeChat, a legacy backend, and a folder that all of it
// writes to. It is made from a Caddyfile like Caddyfile.example, by environment variables alone.
type World struct {
	// Binary is the caddy binary, Dir the folder, which must not exist or be empty.
	Binary, Dir string
	// Caddyfile is the configuration. Default: Caddyfile.example of the working directory.
	Caddyfile string
	// Config configures the simulator; platforms, accounts and hosts are added. A Platforms entry replaces the
	// default one, to give it other URLs.
	Config wxsim.Config
	// Env are further environment variables of the gateway.
	Env []string
	// Log receives what the gateway prints. Default: only Gateway.Log has it.
	Log io.Writer
	// TLS has the gateway and browsers reach WeChat over TLS, with certificates of a CA that is in WeChatCA.
	TLS bool
	// Ports are wanted addresses by name (https, http, api, console, admin); taken or absent ones are replaced by free ones.
	Ports map[string]string

	WeChat  *wxsim.Server
	Backend *Backend
	Gateway *Gateway

	// HTTPS, HTTP, API, Console and Admin are the gateway's addresses.
	HTTPS, HTTP, API, Console, Admin string
	// ClientKey is the key of the client crm.
	ClientKey string
	// WeChatCA is the certificate of WeChat's CA as PEM, with TLS.
	WeChatCA []byte

	roots     *x509.CertPool
	secrets   map[string]string
	simulator atomic.Pointer[wxsim.Server]
}

// Start makes the world. The caller ends it with Close, also after an error.
func (w *World) Start(ctx context.Context) error {
	if err := w.prepare(); err != nil {
		return err
	}
	if w.Backend == nil {
		w.Backend = &Backend{}
	}
	if err := w.Backend.Start("127.0.0.1:0"); err != nil {
		return err
	}
	w.simulate()
	if err := w.startWeChat(); err != nil {
		return err
	}
	w.WeChat.SetOAuthHosts(w.HostPort())
	w.Gateway = &Gateway{
		Binary: w.Binary, Dir: w.Dir, Caddyfile: w.Caddyfile, Admin: w.Admin, Env: w.environment(), Output: w.Log,
	}
	if err := w.Gateway.Start(ctx); err != nil {
		return err
	}
	pem, err := w.Gateway.CACert()
	if err != nil {
		return fmt.Errorf("the gateway's internal CA: %w", err)
	}
	if !w.roots.AppendCertsFromPEM(pem) {
		return errors.New("the gateway's internal CA is not PEM")
	}
	return w.awaitCertificate(ctx)
}

// startWeChat has the simulator listen.
func (w *World) startWeChat() (err error) {
	if !w.TLS {
		return w.WeChat.Start("127.0.0.1:0")
	}
	if w.WeChatCA, err = w.WeChat.StartTLS("127.0.0.1:0"); err != nil {
		return err
	}
	return os.WriteFile(w.wechatCAFile(), w.WeChatCA, 0o600)
}

func (w *World) wechatCAFile() string { return filepath.Join(w.Dir, "wechat-ca.pem") }

// awaitCertificate waits for the site's certificate, which Caddy obtains in the background.
func (w *World) awaitCertificate(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	dialer := tls.Dialer{Config: &tls.Config{RootCAs: w.roots, ServerName: Host}}
	for {
		conn, err := dialer.DialContext(ctx, "tcp", w.HTTPS)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the gateway has no certificate: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Close ends everything.
func (w *World) Close() error {
	var err error
	if w.Gateway != nil {
		err = w.Gateway.Stop()
	}
	if w.WeChat != nil {
		w.WeChat.Close()
	}
	if w.Backend != nil && w.Backend.listener != nil {
		w.Backend.Close()
	}
	return err
}

// prepare chooses addresses and secrets and lays out the folder.
func (w *World) prepare() error {
	var err error
	if w.Caddyfile == "" {
		w.Caddyfile = "Caddyfile.example"
	}
	if w.Caddyfile, err = filepath.Abs(w.Caddyfile); err != nil {
		return err
	}
	if w.Dir, err = filepath.Abs(w.Dir); err != nil {
		return err
	}
	for name, into := range map[string]*string{"https": &w.HTTPS, "http": &w.HTTP, "api": &w.API, "console": &w.Console, "admin": &w.Admin} {
		if *into, err = FreeAddr(w.Ports[name]); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Join(w.Dir, "verify"), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(w.Dir, "verify", VerifyName), []byte(VerifyContent), 0o600); err != nil {
		return err
	}
	w.ClientKey = rand.Text()
	w.secrets = map[string]string{
		"WECHAT_PLATFORM_SECRET": rand.Text(), "WECHAT_PLATFORM_TOKEN": rand.Text(), "WECHAT_PLATFORM_AES_KEY": aesKey(),
		"SHOP_SECRET": rand.Text(), "SHOP_TOKEN": rand.Text(), "SHOP_AES_KEY": aesKey(),
		"CRM_KEY": w.ClientKey, "WECHAT_SEAL_KEY": randomHex(32),
	}
	return nil
}

// simulate makes the WeChat in which the platform and the account of the configuration exist.
func (w *World) simulate() {
	cfg := w.Config
	if len(cfg.Platforms) == 0 {
		cfg.Platforms = []wxsim.Platform{{
			AppID: PlatformID, EventURL: w.URL("/wx/event"), MessageURL: w.URL("/wx/message/$APPID$"),
			AuthorizeHost: w.HostPort(),
		}}
	}
	for i := range cfg.Platforms {
		if p := &cfg.Platforms[i]; p.AppID == PlatformID {
			p.Secret, p.Token, p.AESKey = w.secrets["WECHAT_PLATFORM_SECRET"], w.secrets["WECHAT_PLATFORM_TOKEN"], w.secrets["WECHAT_PLATFORM_AES_KEY"]
		}
	}
	cfg.Accounts = append(cfg.Accounts, wxsim.Account{
		AppID: AccountID, Secret: w.secrets["SHOP_SECRET"], Token: w.secrets["SHOP_TOKEN"], AESKey: w.secrets["SHOP_AES_KEY"],
		MessageURL: w.URL("/wx/message/" + AccountID), NickName: "小店",
	})
	cfg.Authorizers = append(cfg.Authorizers, wxsim.Authorizer{AppID: AuthorizerID, NickName: "授权方"})
	w.roots = x509.NewCertPool()
	cfg.PushRoots = w.roots
	cfg.PushDial = func(ctx context.Context, network, address string) (net.Conn, error) {
		to := w.HTTPS
		if Port(address) == Port(w.HTTP) {
			to = w.HTTP
		}
		return new(net.Dialer).DialContext(ctx, network, to)
	}
	w.WeChat = wxsim.New(cfg)
	w.simulator.Store(w.WeChat)
}

// Simulator is WeChat, for those who are called while the world starts; nil: it is not there yet.
func (w *World) Simulator() *wxsim.Server { return w.simulator.Load() }

// HostPort is the gateway's name and https port.
func (w *World) HostPort() string { return Host + ":" + Port(w.HTTPS) }

// URL is an address on the gateway's https site.
func (w *World) URL(path string) string { return "https://" + w.HostPort() + path }

// HTTPURL is an address on the gateway's plain http site.
func (w *World) HTTPURL(path string) string { return "http://" + Host + ":" + Port(w.HTTP) + path }

// APIURL is an address on the gateway's wechat_api listener.
func (w *World) APIURL(path string) string { return "http://" + w.API + path }

// Secrets are all secret values of this world, by what must never appear in any output.
func (w *World) Secrets() []string {
	list := w.WeChat.Secrets()
	for _, s := range w.secrets {
		list = append(list, s)
	}
	return list
}

// Secret is a secret of the configuration, by its environment variable.
func (w *World) Secret(name string) string { return w.secrets[name] }

// Client is an HTTP client for the gateway's https site.
func (w *World) Client() (*http.Client, error) { return w.Gateway.Client(w.HTTPS) }

// environment is what Caddyfile.example asks for.
func (w *World) environment() []string {
	env := []string{
		"WECHAT_HOST=" + Host, "WECHAT_TLS=internal", "WECHAT_ADMIN=" + w.Admin,
		"WECHAT_HTTPS_PORT=" + Port(w.HTTPS), "WECHAT_HTTP_PORT=" + Port(w.HTTP),
		"WECHAT_API_PORT=" + Port(w.API), "WECHAT_API_BIND=127.0.0.1",
		"WECHAT_CONSOLE_PORT=" + Port(w.Console), "WECHAT_CONSOLE_BIND=127.0.0.1",
		"WECHAT_API=" + w.WeChat.URL(), "WECHAT_OPEN=" + w.WeChat.URL(), "WECHAT_VERIFY=`" + filepath.Join(w.Dir, "verify") + "`", // there may be a blank in it
		"WECHAT_BACKEND=" + w.Backend.Addr(), "WECHAT_GPS_BACKEND=" + w.Backend.Addr(),
		"WECHAT_WEB=http://" + w.Backend.Addr(), "WECHAT_PAGES_BACKEND=" + w.Backend.Addr(),
		"WECHAT_JSSDK_HOSTS=" + w.HostPort() + " *." + Pages + ":" + Port(w.HTTPS),
	}
	if w.TLS {
		env = append(env, "SSL_CERT_FILE="+w.wechatCAFile())
	}
	for name, value := range w.secrets {
		env = append(env, name+"="+value)
	}
	return append(env, w.Env...)
}

// aesKey makes an EncodingAESKey: 43 letters and digits.
func aesKey() string {
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
	key := make([]byte, 43)
	_, _ = rand.Read(key)
	for i, b := range key {
		key[i] = alphabet[int(b)%len(alphabet)]
	}
	return string(key)
}

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return hex.EncodeToString(b)
}
