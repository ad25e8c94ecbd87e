package redisstore

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
	"github.com/caddy-wechat/caddy-wechat/tokens/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(redistest.Tests{M: m}) }

func open(t testing.TB, o Options) *Store {
	t.Helper()
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// serial makes prefixes, so that stores on one server are empty.
var serial atomic.Int64

// conforms runs the tests of all stores over what options reach.
func conforms(t *testing.T, o Options) {
	t.Helper()
	fresh := func() Options {
		o := o
		o.Prefix = fmt.Sprintf("test-%d:", serial.Add(1))
		return o
	}
	storetest.Run(t, func() tokens.Store { return open(t, fresh()) })
	storetest.RunBus(t, func() (a, b tokens.Store) {
		o := fresh()
		return open(t, o), open(t, o)
	})
}

func TestConformance(t *testing.T) {
	t.Parallel()
	conforms(t, Options{Addresses: []string{redistest.Start(t).Addr}, DB: 3})
}

func TestConformanceWithSentinels(t *testing.T) {
	t.Parallel()
	master := redistest.Start(t)
	redistest.Replica(t, master.Addr)
	conforms(t, Options{Addresses: redistest.Sentinels(t, "wechat", master, 1), Master: "wechat"})
}

func TestConformanceInACluster(t *testing.T) {
	t.Parallel()
	nodes := redistest.Cluster(t)
	conforms(t, Options{Addresses: []string{nodes[0].Addr, nodes[1].Addr}, Cluster: true})
}

func TestOptionsAreChecked(t *testing.T) {
	t.Parallel()
	address := []string{"redis.internal:6379"}
	hidden := secret.New("hidden-password")
	tests := []struct {
		name    string
		options Options
		want    string // "" if nothing is wrong
	}{
		{"an address", Options{Addresses: address}, ""},
		{"IPv6", Options{Addresses: []string{"[::1]:6379"}}, ""},
		{"none", Options{}, "address is missing"},
		{"no port", Options{Addresses: []string{"redis.internal"}}, "want host:port"},
		{"no host", Options{Addresses: []string{":6379"}}, "want host:port"},
		{"port 0", Options{Addresses: []string{"redis.internal:0"}}, "want host:port"},
		{"a URL", Options{Addresses: []string{"redis://:hidden-password@redis.internal:6379"}}, "want host:port"},
		{"two servers", Options{Addresses: []string{"a:1", "b:1"}}, "several addresses are for sentinel or cluster"},
		{"sentinel and cluster", Options{Addresses: address, Master: "m", Cluster: true}, "exclude each other"},
		{"db of a cluster", Options{Addresses: address, Cluster: true, DB: 1}, "database 0 alone"},
		{"negative db", Options{Addresses: address, DB: -1}, "-1 is not the number"},
		{"username alone", Options{Addresses: address, Username: "u"}, "username needs a password"},
		{"password of no Sentinels", Options{Addresses: address, SentinelPassword: hidden}, "and no sentinel"},
		{"username of Sentinels alone", Options{Addresses: address, Master: "m", SentinelUsername: "u"}, "needs a password"},
		{"prefix", Options{Addresses: address, Prefix: "a{b}"}, "hash tag"},
		{"all that may be", Options{
			Addresses: address, Prefix: strings.Repeat("a", maxPrefix), PoolSize: maxPool, DialTimeout: operationLimit, Timeout: operationLimit,
		}, ""},
		{"port in words", Options{Addresses: []string{"redis.internal:redis"}}, "want host:port"},
		{"long prefix", Options{Addresses: address, Prefix: strings.Repeat("a", 129)}, "at most 128"},
		{"pool", Options{Addresses: address, PoolSize: -1}, "pool_size"},
		{"dial_timeout", Options{Addresses: address, DialTimeout: 4e9}, "dial_timeout"},
		{"timeout", Options{Addresses: address, Timeout: -1}, "timeout"},
		{"dial_timeout without a unit", Options{Addresses: address, DialTimeout: 1}, "dial_timeout: 1ns is too short"},
		{"timeout without a unit", Options{Addresses: address, Timeout: 2000}, "timeout: 2µs is too short"},
		{"short timeouts", Options{Addresses: address, DialTimeout: 1e6, Timeout: 1e6}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			err := tt.options.Check()
			switch {
			case (err == nil) != (tt.want == ""), err != nil && !strings.Contains(err.Error(), tt.want):
				t.Errorf("error %v, want %q", err, tt.want)
			case err != nil && strings.Contains(err.Error(), "hidden"):
				t.Errorf("the error shows a secret: %v", err)
			case err != nil:
				if s, err := New(tt.options); err == nil {
					s.Close()
					t.Error("New takes the options")
				}
			}
		})
	}
}

func TestDefaults(t *testing.T) {
	t.Parallel()
	s := open(t, Options{Addresses: []string{"127.0.0.1:1"}})
	o := s.client.(*redis.Client).Options()
	if o.DialTimeout != DefaultDialTimeout || o.ReadTimeout != DefaultTimeout || o.WriteTimeout != DefaultTimeout || s.timeout != DefaultTimeout {
		t.Errorf("timeouts %v, %v, %v, %v", o.DialTimeout, o.ReadTimeout, o.WriteTimeout, s.timeout)
	}
	if want := DefaultPoolSize * runtime.GOMAXPROCS(0); o.PoolSize != want {
		t.Errorf("%d connections, want %d", o.PoolSize, want)
	}
	if s.channel != DefaultPrefix+"changed:0" {
		t.Errorf("channel %q", s.channel)
	}
	s.report(ErrEvicts) // nobody is told
}

func TestUnfit(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		info string
		want error
	}{
		{"# Server\r\nredis_version:7.0.15\r\n", nil},
		{"redis_version:10.2.0\r\nmaxmemory_policy:noeviction\r\n", nil},
		{"redis_version:6.0.16\r\n", ErrTooOld},
		{"redis_version:5.0.7\r\nmaxmemory_policy:noeviction\r\n", ErrTooOld},
		{"redis_version:x\r\nmaxmemory_policy:allkeys-lru\r\n", ErrEvicts},
		{"redis_version:x\r\nmaxmemory_policy:volatile-lru\r\n", ErrForgets},
		{"maxmemory_policy:volatile-ttl\r\n", ErrForgets},
		{"maxmemory_policy:noeviction\r\n", nil},
		{"", nil},
	} {
		if err := unfit(tt.info); !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) {
			t.Errorf("%q: %v, want %v", tt.info, err, tt.want)
		}
		if own, ok := errors.AsType[*tokens.SaidError](unfit(tt.info)); ok != (tt.want != nil) || ok && (own.Text.EN == "" || !strings.Contains(own.Text.ZH, "Redis")) {
			t.Errorf("%q: not in both languages: %+v", tt.info, own)
		}
	}
}
