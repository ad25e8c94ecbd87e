package caddymodule

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// redisConfig is an app with a platform whose store is a Redis.
func redisConfig(store string) string {
	return `{"platforms": [{"appid": "wx1111111111111111", "secret": "s", "tokens": ["t"], "aes_keys": ["` + platformKey + `"]}], "store": {"module": "redis", ` + store + `}}`
}

func TestRedisStoreRefusesWhatAPlaceholderHid(t *testing.T) {
	t.Setenv("REDIS_URL", "redis://:hidden@redis.internal:6379")
	t.Setenv("REDIS_BRACES", "a{b}")
	notPEM := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(notPEM, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	const address = `"addresses": ["redis.internal:6379"]`
	tests := []struct{ name, store, want string }{
		{"no address", `"db": 1`, "address is missing"},
		{"address unset", `"addresses": ["{env.NO_SUCH_REDIS}"]`, "address: {env.NO_SUCH_REDIS} resolves to nothing"},
		{"address is a URL", `"addresses": ["{env.REDIS_URL}"]`, "want host:port"},
		{"password unset", address + `, "password": "{env.NO_SUCH_PASSWORD}"`, "password: {env.NO_SUCH_PASSWORD} resolves to nothing"},
		{"prefix", address + `, "prefix": "{env.REDIS_BRACES}"`, "hash tag"},
		{"two servers", `"addresses": ["a:1", "b:1"]`, "several addresses are for sentinel or cluster"},
		{"sentinel without a master", address + `, "sentinel": {}`, "the name of the master is missing"},
		{"cluster with a db", address + `, "cluster": true, "db": 1`, "database 0 alone"},
		{"no such ca", address + `, "tls": {"ca": "/nonexistent/ca.pem"}`, "tls ca"},
		{"ca is none", address + `, "tls": {"ca": "` + notPEM + `"}`, "holds no certificate in PEM"},
		{"certificate alone", address + `, "tls": {"certificate": "/etc/gateway.pem"}`, "belong together"},
		{"no such certificate", address + `, "tls": {"certificate": "/nonexistent/a", "key": "/nonexistent/b"}`, "tls certificate"},
		{"unknown field", address + `, "sentinels": 1`, "unknown field"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := provisionApp(t, redisConfig(tt.store))
			if err == nil || !strings.Contains(err.Error(), "store") || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "hidden") {
				t.Errorf("the error shows a secret: %v", err)
			}
		})
	}
}

// TestRedisStoreIsTheSame: what a reload may change without splitting the state, and what not.
func TestRedisStoreIsTheSame(t *testing.T) {
	t.Setenv("REDIS_NODES", "b:2, a:1")
	key := func(store string) string {
		t.Helper()
		app, _ := newTestApp(t, redisConfig(store))
		return app.poolKey
	}
	base := key(`"addresses": ["a:1", "b:2"], "cluster": true`)
	for _, same := range []string{
		`"addresses": ["b:2", "a:1"], "cluster": true, "password": "hidden"`, `"addresses": ["{env.REDIS_NODES}"], "cluster": true, "timeout": 1000000000`,
	} {
		if got := key(same); got != base || strings.Contains(got, "hidden") {
			t.Errorf("%s: %s, want %s", same, got, base)
		}
	}
	one := key(`"addresses": ["a:1"]`)
	for _, other := range []string{`"addresses": ["a:2"]`, `"addresses": ["a:1"], "db": 1`, `"addresses": ["a:1"], "prefix": "x:"`, `"addresses": ["a:1"], "sentinel": {"master": "m"}`} {
		if key(other) == one {
			t.Errorf("%s is taken for the same", other)
		}
	}
}

// TestRedisStoreProvisionIsQuiet: caddy validate opens no connection.
func TestRedisStoreProvisionIsQuiet(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	newTestApp(t, redisConfig(`"addresses": ["`+l.Addr().String()+`"]`))
	if err := l.(*net.TCPListener).SetDeadline(time.Now().Add(50 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Accept(); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection was made: %v", err)
	}
}

// TestRedisStoreKeeps: over TLS, with a reload that changes nothing about the store.
func TestRedisStoreKeeps(t *testing.T) {
	t.Parallel()
	cert, key := selfSigned(t)
	port := redistest.FreeAddr(t)
	_, tlsPort, _ := net.SplitHostPort(port)
	server := redistest.Start(t, "--tls-port", tlsPort, "--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert, "--tls-auth-clients", "yes")
	config := redisConfig(fmt.Sprintf(`"addresses": [%q], "tls": {"ca": %q, "certificate": %q, "key": %q}`, port, cert, cert, key))
	first, _ := newTestApp(t, config)
	second, _ := newTestApp(t, config)
	if first.env.Store != second.env.Store || first.shared != second.shared {
		t.Error("a reload makes connections of its own")
	}
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	if err := first.manager().PutTicket(t.Context(), "wx1111111111111111", tokens.Ticket{Value: secret.New("ticket"), CreatedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	if n := server.Do("HEXISTS", "wechat:{wechat/v1/ticket}", "wx1111111111111111"); n != int64(1) {
		t.Error("Redis has no ticket")
	}
	if n := testutil.CollectAndCount(first.shared.metrics.storeDuration); n == 0 {
		t.Error("operations are not measured")
	}
}

// selfSigned makes a certificate of 127.0.0.1 for both sides, and its key.
func selfSigned(t *testing.T) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "redis"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	write := func(name, kind string, bytes []byte) string {
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: bytes}), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	return write("cert.pem", "CERTIFICATE", der), write("key.pem", "PRIVATE KEY", pkcs8)
}

// TestRedisStoreShowsPlaceholders: what Caddy shows of a config is what stands in it.
func TestRedisStoreShowsPlaceholders(t *testing.T) {
	t.Setenv("REDIS_PASSWORD", "hidden")
	app, _ := newTestApp(t, redisConfig(`"addresses": ["a:1"], "password": "{env.REDIS_PASSWORD}"`))
	shown, err := json.Marshal(app)
	if err != nil || strings.Contains(string(shown), "hidden") {
		t.Errorf("%s %v", shown, err)
	}
}
