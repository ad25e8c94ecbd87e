package caddymodule

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// The cast of these tests.
const (
	platformID    = "wx1111111111111111"
	otherPlatform = "wx4444444444444444"
	accountID     = "wx2222222222222222"
	authorizerID  = "wx3333333333333333"
	strangerID    = "wx9999999999999999"

	platformToken  = "platform-token"
	platformKey    = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG"
	platformOldKey = "jWmYm7qr5nMoAUwZRjGtBxmz3KA1tkAj3ykkR6q2B2C"
	otherToken     = "other-token"
	otherKey       = "AdiqDDDvUNCeE1ZW5XJmjf9fqNBJpGBs4vL4cHKmHBS"
	accountToken   = "account-token"
	accountKey     = "kWxPEV2UEDyxWpmPdKC3F4dgPDmOvfKX1HGnEUDS1aR"

	openID = "oUser123"
	ghID   = "gh_0123456789ab"
)

// newTestApp provisions the app of a JSON configuration, with a storage of its own.
func newTestApp(t testing.TB, config string) (*App, caddy.Context) {
	t.Helper()
	app, ctx, err := provisionApp(t, config)
	if err != nil {
		t.Fatal(err)
	}
	return app, ctx
}

func provisionApp(t testing.TB, config string) (*App, caddy.Context, error) {
	t.Helper()
	app, ctx, err := provisionAt(filepath.Join(t.TempDir(), "storage"), config)
	if err != nil {
		return nil, ctx, err
	}
	t.Cleanup(func() {
		if err := app.Cleanup(); err != nil {
			t.Errorf("cleanup: %v", err)
		}
	})
	return app, ctx, nil
}

// provisioning is held while Caddy provisions a context, which writes package variables of its own.
var provisioning sync.Mutex

// provisionAt provisions the app of a JSON configuration with its storage in a folder. The caller cleans it up.
func provisionAt(root, config string) (*App, caddy.Context, error) {
	provisioning.Lock()
	defer provisioning.Unlock()
	storage, _ := json.Marshal(map[string]string{"module": "file_system", "root": root})
	ctx, err := caddy.ProvisionContext(&caddy.Config{
		Admin:      &caddy.AdminConfig{Disabled: true},
		StorageRaw: storage,
		AppsRaw:    caddy.ModuleMap{"wechat": json.RawMessage(config)},
	})
	if err != nil {
		return nil, ctx, err
	}
	app, err := loadApp(ctx)
	return app, ctx, err
}

// testConfig has two platforms, an account, and a client; the API's origin is unreachable unless one is given.
func testConfig(api string) string {
	if api == "" {
		api = "http://127.0.0.1:1"
	}
	return fmt.Sprintf(`{
		"platforms": [
			{"appid": %q, "secret": "platform-secret", "tokens": [%q], "aes_keys": [%q, %q]},
			{"appid": %q, "secret": "other-secret", "tokens": [%q], "aes_keys": [%q]}
		],
		"accounts": [{"appid": %q, "secret": "account-secret", "tokens": [%q], "aes_keys": [%q]}],
		"clients": [{"name": "crm", "keys": ["crm-key-0123456789"], "appids": ["*"]}],
		"api": [%q], "open": %q
	}`, platformID, platformToken, platformKey, platformOldKey, otherPlatform, otherToken, otherKey,
		accountID, accountToken, accountKey, api, api)
}

// sender seals pushes as WeChat does.
type sender struct {
	t      testing.TB
	codec  *crypto.Codec
	idName string
	format crypto.Format
	at     time.Time
	nonce  string
}

func newSender(t testing.TB, receiveID, token, key string) *sender {
	t.Helper()
	k, err := crypto.ParseKey(key)
	if err != nil {
		t.Fatal(err)
	}
	codec, err := crypto.NewCodec(receiveID, []secret.String{secret.New(token)}, []crypto.Key{k})
	if err != nil {
		t.Fatal(err)
	}
	return &sender{t: t, codec: codec, idName: "ToUserName", format: crypto.FormatXML, at: time.Now(), nonce: "1372623149"}
}

func platformSender(t testing.TB) *sender {
	return newSender(t, platformID, platformToken, platformKey)
}

func accountSender(t testing.TB) *sender { return newSender(t, accountID, accountToken, accountKey) }

// push is the request with which WeChat pushes a message to a path.
func (s *sender) push(path, message string) *http.Request {
	s.t.Helper()
	ts := s.at.Unix()
	nonce := s.nonce
	body, msgSignature, err := s.codec.SealPush(&crypto.Buffers{}, s.format, s.idName, ghID, ts, nonce, []byte(message))
	if err != nil {
		s.t.Fatal(err)
	}
	stamp := strconv.FormatInt(ts, 10)
	q := url.Values{
		"signature": {s.codec.Signature(stamp, nonce)}, "timestamp": {stamp}, "nonce": {nonce},
		"openid": {openID}, "encrypt_type": {"aes"}, "msg_signature": {msgSignature},
	}
	r := httptest.NewRequest(http.MethodPost, path+"?"+q.Encode(), strings.NewReader(string(body)))
	r.Header.Set("Content-Type", "text/xml")
	return r
}

// createTime is when the tests' messages were written: once, so that two of one text are alike.
var createTime = strconv.FormatInt(time.Now().Unix(), 10)

// textMessage is a text from a user, as XML.
func textMessage(content string) string {
	id := strconv.FormatInt(6054768590064713728+msgIDs.Add(1), 10)
	return "<xml><ToUserName><![CDATA[" + ghID + "]]></ToUserName><FromUserName><![CDATA[" + openID +
		"]]></FromUserName><CreateTime>" + createTime + "</CreateTime><MsgType><![CDATA[text]]></MsgType><Content><![CDATA[" +
		content + "]]></Content><MsgId>" + id + "</MsgId></xml>"
}

// msgIDs counts the messages made: each is another one.
var msgIDs atomic.Int64

// serve runs a handler as Caddy would.
func serve(t *testing.T, h caddyhttp.MiddlewareHandler, r *http.Request, next caddyhttp.Handler) *httptest.ResponseRecorder {
	t.Helper()
	rec := httptest.NewRecorder()
	if next == nil {
		next = caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
			t.Error("the next handler was called")
			return nil
		})
	}
	r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), rec, &caddyhttp.Server{})
	if err := h.ServeHTTP(rec, r, next); err != nil {
		t.Errorf("handler returned an error, with which Caddy would log the URI: %v", err)
	}
	return rec
}

// watchLog replaces the app's logger by one whose entries can be read.
func watchLog(app *App) *observer.ObservedLogs {
	core, logs := observer.New(zapcore.DebugLevel)
	app.logger = zap.New(core)
	return logs
}

func counted(t *testing.T, v *prometheus.CounterVec, labels ...string) float64 {
	t.Helper()
	return testutil.ToFloat64(v.WithLabelValues(labels...))
}
