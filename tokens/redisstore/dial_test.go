package redisstore

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
)

// withTLS starts a server that has a port for TLS beside the other, and returns that, and how a client trusts it.
func withTLS(t *testing.T) (server *redistest.Server, addr string, trust *tls.Config) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	err = errors.Join(
		os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	addr = redistest.FreeAddr(t)
	_, port, _ := net.SplitHostPort(addr)
	server = redistest.Start(t, "--tls-port", port, "--tls-cert-file", cert, "--tls-key-file", key, "--tls-auth-clients", "no")
	trust = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: x509.NewCertPool()}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	trust.RootCAs.AddCert(parsed)
	return server, addr, trust
}

// Where one side means TLS and the other does not, the error says what to do: of one of them, that no answer came in time, nobody could
// tell that.
func TestTLSOnOneSideAlone(t *testing.T) {
	t.Parallel()
	server, secured, trust := withTLS(t)
	for try := range stall.Tries(t, slotStop, server.Turn) {
		load := func(name string, o Options, want string) {
			s := open(t, o)
			defer s.Close()
			_, err := s.Load(t.Context(), locked)
			if wrong := lacking(err, want, "none"); wrong != "" {
				try.Errorf("%s: %s", name, wrong)
			}
		}
		load("in TLS", Options{Addresses: []string{secured}, TLS: trust}, fs.ErrNotExist.Error())
		for range 4 { // what a handshake has in it by chance decides how a server takes it
			load("one server", Options{Addresses: []string{server.Addr}, TLS: trust}, "leave out the option tls")
		}
		load("one server", Options{Addresses: []string{secured}}, "store redis needs the option tls")
		for name, o := range map[string]Options{"cluster": {Cluster: true}, "sentinel": {Master: "wechat"}} {
			o.Addresses, o.TLS = []string{server.Addr}, trust
			load(name, o, "leave out the option tls")
			o.Addresses, o.TLS = []string{secured}, nil
			load(name, o, "store redis needs the option tls")
		}
	}
}

// A server that says nothing at all is not taken for one without TLS.
func TestTLSToAServerThatHangs(t *testing.T) {
	t.Parallel()
	server, secured, trust := withTLS(t)
	for _, addr := range []string{secured, server.Addr} {
		relay := redistest.NewRelay(t, addr)
		relay.Hang()
		_, err := open(t, Options{Addresses: []string{relay.Addr}, TLS: trust, DialTimeout: 100 * time.Millisecond}).Load(t.Context(), locked)
		if err == nil || errors.Is(err, errPlain) || errors.Is(err, errHungUp) {
			t.Errorf("error %v", err)
		}
	}
}

// go-redis looks at the socket itself for whether a connection still stands.
func TestConnectionsShowTheirSocket(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	o := Options{DialTimeout: time.Second}
	conn, err := o.dial(t.Context(), "tcp", server.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, ok := conn.(syscall.Conn); !ok {
		t.Errorf("%T hides it", conn)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := o.dial(ctx, "tcp", server.Addr); err == nil {
		t.Error("a connection is made for a caller that has gone")
	}
}
