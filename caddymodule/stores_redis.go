package caddymodule

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
	"go.uber.org/zap"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
	"github.com/caddy-wechat/caddy-wechat/tokens/redisstore"
)

// redisGrace is for how long the connections of a configuration that has ended are kept: what it began goes on, a renewal
// for the longest.
const redisGrace = 90 * time.Second

// RedisStore keeps the gateway's records in Redis, for any number of gateways that share them: one server, one that
// Sentinels watch over, or a Redis Cluster. It needs Redis 7.0 or later, or Valkey, with the memory policy noeviction. It
// connects on first use. docs/clustering.md says what is guaranteed and what is not.
//
// Addresses and texts may be placeholders such as {env.NAME}, which are resolved when the config is loaded.
type RedisStore struct {
	// Addresses are host:port of the server, of the Sentinels, or of some nodes of the Cluster. Required; several only with
	// Sentinel or Cluster.
	Addresses []string `json:"addresses,omitempty"`
	// Username is that of an access list (ACL). Default: none.
	Username string `json:"username,omitempty"`
	// Password is the user's, or the server's. Default: none.
	Password string `json:"password,omitempty"`
	// DB is the number of the database. Default: 0.
	DB int `json:"db,omitempty"`
	// Prefix is what all keys and channels begin with. Default: "wechat:".
	Prefix string `json:"prefix,omitempty"`
	// TLS encrypts the connections, those to Sentinels too. Default: none, in the clear.
	TLS *RedisTLS `json:"tls,omitempty"`
	// Sentinel says that the addresses are those of Sentinels. Default: they are not.
	Sentinel *RedisSentinel `json:"sentinel,omitempty"`
	// Cluster says that the addresses are those of a Redis Cluster. Default: false.
	Cluster bool `json:"cluster,omitempty"`
	// DialTimeout bounds making a connection, at most 3 s. Default: 1 s.
	DialTimeout caddy.Duration `json:"dial_timeout,omitempty"`
	// Timeout bounds one exchange with the server, at most 3 s. Default: 2 s.
	Timeout caddy.Duration `json:"timeout,omitempty"`
	// PoolSize is the number of connections to one server, at most. Default: 10 for each processor.
	PoolSize int `json:"pool_size,omitempty"`

	poolKey  string
	identity string
	store    *redisstore.Store
}

// RedisTLS says how a connection to Redis is encrypted.
type RedisTLS struct {
	// CA is a file of certificates in PEM: who may have issued the server's. Default: whom the system trusts.
	CA string `json:"ca,omitempty"`
	// Certificate is a file in PEM that the gateway proves itself with. Default: none.
	Certificate string `json:"certificate,omitempty"`
	// Key is the file of the certificate's key, in PEM. Required with Certificate.
	Key string `json:"key,omitempty"`
	// ServerName is the name that the server's certificate must have. Default: the host of the address.
	ServerName string `json:"server_name,omitempty"`
}

// RedisSentinel says how Sentinels are asked.
type RedisSentinel struct {
	// Master is the name that they know the server by. Required.
	Master string `json:"master,omitempty"`
	// Username is that of an access list of the Sentinels themselves. Default: none.
	Username string `json:"username,omitempty"`
	// Password is the Sentinels' own. Default: none.
	Password string `json:"password,omitempty"`
}

// redisPool holds the stores by their whole configuration, so that a reload keeps the connections.
var redisPool = caddy.NewUsagePool()

// pooledRedis is one of them.
type pooledRedis struct{ *redisstore.Store }

// Destruct ends the connections once nothing that was begun can need them.
func (p pooledRedis) Destruct() error {
	time.AfterFunc(redisGrace, p.Close)
	return nil
}

// CaddyModule returns the Caddy module information.
func (*RedisStore) CaddyModule() caddy.ModuleInfo {
	return caddy.ModuleInfo{ID: "wechat.stores.redis", New: func() caddy.Module { return new(RedisStore) }}
}

// Provision resolves and checks the configuration. It opens no connection.
func (s *RedisStore) Provision(caddy.Context) error {
	o, err := s.options(resolver{repl: caddy.NewReplacer()})
	if err != nil {
		return err
	}
	if err := o.Check(); err != nil {
		return err
	}
	// Passwords change, and the records are the same; so do certificates and timeouts.
	addresses := slices.Sorted(slices.Values(o.Addresses))
	s.identity = fmt.Sprintf("redis %s %q %d %q", strings.Join(addresses, ","), o.Master, o.DB, o.Prefix)
	o.Report = s.report(addresses)
	if s.poolKey, err = s.fingerprint(o); err != nil {
		return err
	}
	v, _, err := redisPool.LoadOrNew(s.poolKey, func() (caddy.Destructor, error) {
		store, err := redisstore.New(o)
		return pooledRedis{store}, err
	})
	if err != nil {
		s.poolKey = ""
		return err
	}
	s.store = v.(pooledRedis).Store
	return nil
}

// options are the settings with their placeholders resolved.
func (s *RedisStore) options(r resolver) (o redisstore.Options, err error) {
	optional := func(field, text string) string {
		if text == "" || err != nil {
			return ""
		}
		var v string
		v, err = r.required(field, text)
		return v
	}
	for _, a := range s.Addresses {
		// One placeholder may hold all of them.
		o.Addresses = append(o.Addresses, strings.FieldsFunc(optional("address", a), func(c rune) bool { return c == ',' || c == ' ' })...)
	}
	o.Username, o.Password = optional("username", s.Username), secret.New(optional("password", s.Password))
	if o.Prefix = optional("prefix", s.Prefix); o.Prefix == "" {
		o.Prefix = redisstore.DefaultPrefix
	}
	o.DB, o.Cluster, o.PoolSize = s.DB, s.Cluster, s.PoolSize
	o.DialTimeout, o.Timeout = time.Duration(s.DialTimeout), time.Duration(s.Timeout)
	if s.Sentinel != nil {
		if s.Sentinel.Master == "" {
			return o, errors.New("sentinel: the name of the master is missing")
		}
		o.Master = optional("sentinel", s.Sentinel.Master)
		o.SentinelUsername = optional("sentinel username", s.Sentinel.Username)
		o.SentinelPassword = secret.New(optional("sentinel password", s.Sentinel.Password))
	}
	if err == nil && s.TLS != nil {
		o.TLS, err = s.TLS.config(optional, &err)
	}
	return o, err
}

// config reads the files. Optional resolves a placeholder, and puts what is wrong with it into failed.
func (t *RedisTLS) config(optional func(field, text string) string, failed *error) (*tls.Config, error) {
	c := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: optional("tls server_name", t.ServerName)}
	ca, cert, key := optional("tls ca", t.CA), optional("tls certificate", t.Certificate), optional("tls certificate key", t.Key)
	if *failed != nil {
		return nil, *failed
	}
	if ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			return nil, fmt.Errorf("tls ca: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("tls ca: %s holds no certificate in PEM", ca)
		}
	}
	if (cert == "") != (key == "") {
		return nil, errors.New("tls certificate: the file of the certificate and that of its key belong together")
	}
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("tls certificate: %w", err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// fingerprint tells configurations apart without showing what is in them.
func (s *RedisStore) fingerprint(o redisstore.Options) (string, error) {
	settings, err := json.Marshal(s)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	for _, part := range []string{string(settings), s.identity, o.Username, o.Password.Reveal(), o.SentinelUsername, o.SentinelPassword.Reveal()} {
		_, _ = fmt.Fprintf(h, "%d %s", len(part), part)
	}
	if o.TLS != nil { // a certificate is renewed in its place
		_, _ = fmt.Fprintf(h, "%q", o.TLS.ServerName)
		for _, c := range o.TLS.Certificates {
			_, _ = h.Write(c.Certificate[0])
		}
		if s.TLS.CA != "" {
			pem, _ := os.ReadFile(caddy.NewReplacer().ReplaceAll(s.TLS.CA, ""))
			_, _ = h.Write(pem)
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// report writes into the log of whatever configuration is in force. The store outlives this one.
func (*RedisStore) report(addresses []string) func(error) {
	return func(err error) {
		logRedis(caddy.Log().Named("wechat.stores.redis").With(zap.Strings("addresses", addresses)), err)
	}
}

// logRedis logs what a store reports, as loud as what comes of it.
func logRedis(log *zap.Logger, err error) {
	switch {
	case err == nil:
		log.Info("Redis is reached again")
	case errors.Is(err, redisstore.ErrEvicts):
		log.Error("Redis is not set up to keep what it is given", zap.Error(err))
	case errors.Is(err, redisstore.ErrForgets):
		log.Warn("Redis is not set up to keep what it is given", zap.Error(err))
	case errors.Is(err, redisstore.ErrUntold):
		log.Info("Redis does not tell how it is set up", zap.Error(err))
	case errors.Is(err, redisstore.ErrTooOld), errors.Is(err, redisstore.ErrReplica):
		log.Error("Redis refuses what nodes need of it", zap.Error(err))
	case errors.Is(err, redisstore.ErrSplitsReads):
		log.Warn("Redis is read from replicas", zap.Error(err))
	case errors.Is(err, redisstore.ErrLosesNews):
		log.Error("Redis does not pass on what other nodes change: each node looks at the accounts in use once a second instead", zap.Error(err))
	default:
		log.Error("Redis cannot be reached, or does not pass on what other nodes change: live tokens serve on from memory, WeChat's events get 503 until it can; tried again",
			zap.Error(err))
	}
}

// Cleanup gives back what Provision took.
func (s *RedisStore) Cleanup() error {
	if s.poolKey == "" {
		return nil
	}
	_, err := redisPool.Delete(s.poolKey)
	return err
}

// Store implements StoreModule.
func (s *RedisStore) Store() tokens.Store { return s.store }

// Identity implements StoreModule.
func (s *RedisStore) Identity() string { return s.identity }

// Unfit asks whether the server is fit for what it is to keep; nil: it is, or does not tell.
func (s *RedisStore) Unfit(ctx context.Context) error { return s.store.Unfit(ctx) }

// UnmarshalCaddyfile parses
//
//	store redis {
//		address      <host:port>...
//		username     <name>
//		password     <password>
//		db           <number>
//		prefix       <text>
//		tls {
//			ca          <file>
//			certificate <file> <key file>
//			server_name <name>
//		}
//		sentinel <master> {
//			username <name>
//			password <password>
//		}
//		cluster
//		dial_timeout <duration>
//		timeout      <duration>
//		pool_size    <number>
//	}
//
// Everything but address may be left out; the block of tls and that of sentinel too.
func (s *RedisStore) UnmarshalCaddyfile(d *caddyfile.Dispenser) error {
	d.Next()
	if d.NextArg() {
		return d.ArgErr()
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		var err error
		switch d.Val() {
		case "address":
			err = list(d, &s.Addresses, adding, literalAddress)
		case "username":
			err = value(d, &s.Username, nil)
		case "password":
			err = value(d, &s.Password, nil)
		case "db":
			err = database(d, &s.DB)
		case "prefix":
			err = value(d, &s.Prefix, nil)
		case "tls":
			err = s.unmarshalTLS(d)
		case "sentinel":
			err = s.unmarshalSentinel(d)
		case "cluster":
			if s.Cluster {
				err = d.Err("cluster is given twice")
			} else if d.NextArg() {
				err = d.ArgErr()
			}
			s.Cluster = true
		case "dial_timeout":
			err = duration(d, &s.DialTimeout)
		case "timeout":
			err = duration(d, &s.Timeout)
		case "pool_size":
			err = number(d, &s.PoolSize)
		default:
			err = d.Errf("unknown subdirective '%s' of store redis: want address, username, password, db, prefix, tls, sentinel, cluster, dial_timeout, timeout or pool_size", d.Val())
		}
		if err != nil {
			return err
		}
	}
	if err := s.check(); err != nil {
		return d.Errf("store redis: %v", err)
	}
	return nil
}

// check is redisstore's, of what can be judged before placeholders are resolved.
func (s *RedisStore) check() error {
	o := redisstore.Options{
		Username: s.Username, Password: secret.New(s.Password), DB: s.DB, Cluster: s.Cluster, PoolSize: s.PoolSize,
		DialTimeout: time.Duration(s.DialTimeout), Timeout: time.Duration(s.Timeout),
	}
	for _, a := range s.Addresses {
		if hasPlaceholder(a) {
			a = "placeholder:1"
		}
		o.Addresses = append(o.Addresses, a)
	}
	if !hasPlaceholder(s.Prefix) {
		o.Prefix = s.Prefix
	}
	if s.Sentinel != nil {
		o.Master, o.SentinelUsername, o.SentinelPassword = s.Sentinel.Master, s.Sentinel.Username, secret.New(s.Sentinel.Password)
	}
	return o.Check()
}

func (s *RedisStore) unmarshalTLS(d *caddyfile.Dispenser) error {
	if s.TLS != nil {
		return d.Err("tls is given twice")
	}
	if d.NextArg() {
		return d.ArgErr()
	}
	s.TLS = new(RedisTLS)
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		var err error
		switch d.Val() {
		case "ca":
			err = value(d, &s.TLS.CA, nil)
		case "certificate":
			if s.TLS.Certificate != "" {
				err = d.Err("certificate is given twice")
			} else if !d.AllArgs(&s.TLS.Certificate, &s.TLS.Key) {
				err = d.ArgErr()
			}
		case "server_name":
			err = value(d, &s.TLS.ServerName, nil)
		default:
			err = d.Errf("unknown subdirective '%s' of tls: want ca, certificate or server_name", d.Val())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *RedisStore) unmarshalSentinel(d *caddyfile.Dispenser) error {
	if s.Sentinel != nil {
		return d.Err("sentinel is given twice")
	}
	s.Sentinel = new(RedisSentinel)
	if !d.AllArgs(&s.Sentinel.Master) {
		return d.ArgErr()
	}
	for nesting := d.Nesting(); d.NextBlock(nesting); {
		var err error
		switch d.Val() {
		case "username":
			err = value(d, &s.Sentinel.Username, nil)
		case "password":
			err = value(d, &s.Sentinel.Password, nil)
		default:
			err = d.Errf("unknown subdirective '%s' of sentinel: want username or password", d.Val())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// literalAddress is redisstore.CheckAddress for what can be judged before placeholders are resolved.
func literalAddress(s string) error {
	if hasPlaceholder(s) {
		return nil
	}
	return redisstore.CheckAddress(s)
}

// database parses a subdirective that is the number of a database.
func database(d *caddyfile.Dispenser, into *int) error {
	if *into != 0 {
		return d.Err("db is given twice")
	}
	var arg string
	if !d.AllArgs(&arg) {
		return d.ArgErr()
	}
	n, err := strconv.Atoi(arg)
	if err != nil || n < 0 {
		return d.Errf("db: '%s' is not the number of a database: want 0 or more", arg)
	}
	*into = n
	return nil
}

var (
	_ caddy.Provisioner     = (*RedisStore)(nil)
	_ caddy.CleanerUpper    = (*RedisStore)(nil)
	_ caddyfile.Unmarshaler = (*RedisStore)(nil)
	_ StoreModule           = (*RedisStore)(nil)
)
