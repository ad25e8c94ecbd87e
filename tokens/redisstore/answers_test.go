package redisstore

import (
	"context"
	"errors"
	"io/fs"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

func claimOne(t *testing.T, s *Store) (tokens.Claim, error) {
	t.Helper()
	claims := []tokens.Claim{{Name: "x", Value: []byte("1"), TTL: time.Minute}}
	err := s.ClaimAll(claims, time.Minute)
	return claims[0], err
}

// A claim whose connection was refused is neither made nor another's: a push would be taken for a replay of another.
func TestClaimsOnAConnectionThatIsRefused(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, "--requirepass", "right-password")
	s := open(t, Options{Addresses: []string{server.Addr}, Password: secret.New("wrong-password")})
	if c, err := claimOne(t, s); err == nil || !strings.Contains(err.Error(), "WRONGPASS") {
		t.Errorf("ClaimAll: first %v, held %q, error %v", c.First, c.Held, err)
	}
}

// A master that the Sentinels do not know is no record that is absent, no lock that is held, and no claim that was had.
func TestSentinelsThatKnowNoSuchMaster(t *testing.T) {
	t.Parallel()
	s := open(t, Options{Addresses: []string{answering(t, "*-1\r\n", "get-master-addr-by-name")}, Master: "other"})
	for what, do := range map[string]func(context.Context) error{
		"Load":      func(ctx context.Context) error { _, err := s.Load(ctx, locked); return err },
		"Peek":      func(ctx context.Context) error { _, err := s.Peek(ctx, "x"); return err },
		"Take":      func(ctx context.Context) error { _, err := s.Take(ctx, "x"); return err },
		"PeekClaim": func(ctx context.Context) error { _, _, err := s.PeekClaim(ctx, "x"); return err },
		"Lives":     func(ctx context.Context) error { _, err := s.Lives(ctx, "x"); return err },
		"ClaimAll":  func(context.Context) error { _, err := claimOne(t, s); return err },
		"Lock": func(ctx context.Context) error {
			_, err := s.Lock(ctx, locked)
			return err
		},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), operationLimit)
		err := do(ctx)
		cancel()
		if !errors.Is(err, errNoMaster) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, tokens.ErrLockHeld) {
			t.Errorf("%s: %v, want %v", what, err, errNoMaster)
		}
	}
}

// A caller that has gone has nothing done for it.
func TestNothingIsBegunForNobody(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	s := open(t, Options{Addresses: []string{server.Addr}})
	if _, err := s.Load(t.Context(), locked); !errors.Is(err, fs.ErrNotExist) { // there is a connection
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for what, err := range map[string]error{
		"Store": s.Store(ctx, locked, []byte("x")), "Beat": s.Beat(ctx, "node", time.Minute), "Put": s.Put(ctx, "x", []byte("x"), time.Minute),
		"Replace": s.Replace(ctx, "x", []byte("x")),
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if n := server.Do("DBSIZE"); n != int64(0) {
		t.Errorf("%d keys were written", n)
	}
}

// A value of another program's is none of ours.
func TestForeignValue(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	s := open(t, Options{Addresses: []string{server.Addr}})
	server.Do("SET", s.onceKey("x"), strings.Repeat("x", tokenLength-1))
	if got, err := s.Peek(t.Context(), "x"); err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Peek = %q, %v", got, err)
	}
	server.Do("DEL", s.onceKey("x"))
	server.Do("HSET", s.onceKey("x"), "a", "b")
	_, _, err := s.Claim(t.Context(), "x", nil, time.Minute)
	concise(t, err, "wrongtype", "none")
}

// A connection on which a node is told something is tested when nothing comes, and is left alone as long as it lives.
func TestHearingIsTested(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	for try := range stall.Tries(t, 100*time.Millisecond, server.Turn) {
		relay := redistest.NewRelay(t, server.Addr)
		s := open(t, Options{Addresses: []string{relay.Addr}, Timeout: 300 * time.Millisecond})
		s.quiet = 50 * time.Millisecond
		heard, ended := make(chan string, 100), make(chan bool, 1)
		go func() { ended <- s.hear(t.Context(), "node", func(m string) { heard <- m }) }()
		redistest.Eventually(t, "it listens", func() error {
			if n := server.Do("PUBLISH", s.nodeKey("node"), "hello"); n != int64(1) {
				return errors.New("not yet")
			}
			return nil
		})
		<-heard
		select {
		case <-ended:
			try.Errorf("a connection that lives is given up")
			continue
		case <-time.After(10 * s.quiet):
		}
		relay.Hang()
		select {
		case well := <-ended:
			if !well {
				try.Errorf("it says that it did not listen")
			}
		case <-time.After(10 * time.Second):
			t.Fatal("a dead connection is not given up")
		}
	}
}

// What a server says is passed on with what is to be done about it.
func TestErrorsSayWhatToDo(t *testing.T) {
	t.Parallel()
	guarded, plain := redistest.Start(t, "--requirepass", "right-password"), redistest.Start(t)
	plain.Do("ACL", "SETUSER", "gateway", "on", ">right-password", "~wechat:*", "+@all", "-hget")
	user := Options{Addresses: []string{plain.Addr}, Username: "gateway", Password: secret.New("right-password")}
	load := func(s *Store) error { _, err := s.Load(t.Context(), locked); return err }
	swap := func(s *Store) error { return s.Swap(t.Context(), locked, nil, []byte("x")) }
	tell := func(s *Store) error { return s.Tell(t.Context(), "node", "x") }
	newer := answering(t, "-ERR ACL failure in script: No permissions to access a channel script: 1, on @user_script:4.\r\n", "evalsha")
	replica := answering(t, "-READONLY You can't write against a read only replica.\r\n", "publish")
	write := func(s *Store) error { return s.Store(t.Context(), locked, []byte("x")) }
	old := answering(t, "-ERR wrong number of arguments for 'auth' command\r\n", "auth")
	scriptless := answering(t, "-ERR unknown command 'evalsha'\r\n", "evalsha")
	outdated := answering(t, "-ERR command evalsha not support for normal user\r\n", "evalsha")
	for name, tt := range map[string]struct {
		options Options
		do      func(*Store) error
		want    string
	}{
		"no password":           {Options{Addresses: []string{guarded.Addr}}, load, "store redis needs a password"},
		"no password, a script": {Options{Addresses: []string{guarded.Addr}}, swap, "store redis needs a password"},
		"a command":             {user, load, "docs/clustering.md has what an access list must allow"},
		"a channel":             {user, tell, "docs/clustering.md has what an access list must allow"},
		"a channel, a script":   {user, write, "docs/clustering.md has what an access list must allow"},
		"a channel, since 7.2":  {Options{Addresses: []string{newer}}, write, "docs/clustering.md has what an access list must allow"},
		"no cluster":            {Options{Addresses: []string{plain.Addr}, Cluster: true}, load, "leave out the option cluster"},
		"no sentinel":           {Options{Addresses: []string{plain.Addr}, Master: "wechat"}, load, "leave out the option sentinel"},
		"a user to a proxy":     {Options{Addresses: []string{old}, Username: "gateway", Password: secret.New("right-password")}, load, "leave out username"},
		"no scripts":            {Options{Addresses: []string{scriptless}}, write, "the commands that must be allowed"},
		"no scripts yet":        {Options{Addresses: []string{outdated}}, write, "what to choose of a managed redis"},
		"a replica":             {Options{Addresses: []string{replica}}, tell, "give the address of its master"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			concise(t, tt.do(open(t, tt.options)), tt.want, "right-password")
		})
	}
}

// reporting is a store that is listened on, and what it reports.
func reporting(t *testing.T, o Options) (s *Store, on listening, reports chan error) {
	t.Helper()
	on, reports = make(listening, 100), make(chan error, 100)
	o.Report = func(err error) { reports <- err }
	s = open(t, o)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { s.Watch(ctx, on) })
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		for close(reports); len(reports) > 0; {
			if err := <-reports; errors.Is(err, context.Canceled) {
				t.Errorf("the end is reported: %v", err)
			}
		}
	})
	return s, on, reports
}

// A subscription on which nothing can come is none: the log hears why, once, and not each second that all is well again.
func TestPublishingThatIsRefused(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	server.Do("ACL", "SETUSER", "gateway", "on", ">pass", "~*", "&*", "+@all", "-publish")
	_, on, reports := reporting(t, Options{Addresses: []string{server.Addr}, Username: "gateway", Password: secret.New("pass")})
	concise(t, <-reports, "'publish'", "pass ")
	subscribed := func() bool {
		n, _ := server.Do("PUBSUB", "NUMSUB", "wechat:changed:0").([]any)
		return len(n) == 2 && n[1] == int64(1)
	}
	for _, want := range []bool{false, true, false} { // once more in vain
		redistest.Eventually(t, "another subscription", func() error {
			if subscribed() != want {
				return errors.New("not yet")
			}
			return nil
		})
	}
	if len(on) > 0 || len(reports) > 0 {
		t.Errorf("it listens %v times, and reported %d times more", len(on), len(reports))
	}
	server.Do("ACL", "SETUSER", "gateway", "+publish")
	if !<-on {
		t.Error("it ceased to listen")
	}
	if err := <-reports; err != nil {
		t.Errorf("reported %v once all is well", err)
	}
	server.Do("ACL", "SETUSER", "gateway", "-publish")
	concise(t, <-reports, "'publish'", "pass ") // another trouble, which is told at once
}

// TestReplicaIsReported: one that was given by mistake can be read, and what is published on it comes back.
func TestReplicaIsReported(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, "--replicaof", "127.0.0.1 1")
	s, _, reports := reporting(t, Options{Addresses: []string{server.Addr}})
	if err := <-reports; !errors.Is(err, ErrReplica) {
		t.Errorf("reported %v, want %v", err, ErrReplica)
	}
	if err := s.Unfit(t.Context()); !errors.Is(err, ErrReplica) {
		t.Errorf("Unfit: %v, want %v", err, ErrReplica)
	}
	concise(t, s.Beat(t.Context(), "node", time.Minute), "give the address of its master", "none")
}

// What is heard by way of all masters is heard, and other masters are noticed.
func TestClusterBeats(t *testing.T) {
	t.Parallel()
	var c *clusterBeats
	is := func(what string, got, want bool) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %v", what, got)
		}
	}
	for round := range 2 {
		c = new(clusterBeats)
		is("a master that nobody named", c.came("a"), false)
		c.named([]string{"a", "b"})
		is("one of two", c.came("a"), false)
		is("one of two, again", c.came("a"), false)
		is("one of two has moved", c.moved(), false)
		is("as of never", c.last().IsZero(), true)
		c.named([]string{"b", "a"})
		is("both", c.came("b"), true)
		is("both, again", c.came("a"), false)
		is("both have moved", c.moved(), false)
		oldest := time.Now().Add(-time.Minute)
		c.heard["b"] = oldest
		is("as of the oldest", c.last().Equal(oldest), true)
		c.named([]string{"a", "b"})
		is("the same have moved", c.moved(), false)
		is("as of the oldest, still", c.last().Equal(oldest), true)
		if round == 0 {
			c.named([]string{"a", "c"})
		} else {
			c.named([]string{"a", "b", "c"})
		}
		is("others have moved", c.moved(), true)
	}
	// Before a beat came back from each, others are no news.
	c = new(clusterBeats)
	c.named([]string{"a"})
	c.named([]string{"b"})
	is("others have moved before", c.moved(), false)
	is("one that is a master no more", c.came("a"), false)
	is("the only one", c.came("b"), true)
	c = new(clusterBeats)
	c.named([]string{"a", "b"})
	is("one of two", c.came("a"), false)
	c.named([]string{"a", "b", "c"})
	is("two of three", c.came("b"), false)
	is("all three", c.came("c"), true)
}
