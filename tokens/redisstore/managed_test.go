package redisstore

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// What managed services do otherwise than a redis-server: docs/clustering.md has what to choose of them.

// saying has a proxy answer commands, by the first words of each.
func saying(answers map[string]string) func([]string) string {
	return func(command []string) string {
		text := strings.ToLower(strings.Join(command, " "))
		for words, answer := range answers {
			if text == words || strings.HasPrefix(text, words+" ") {
				return answer
			}
		}
		return ""
	}
}

// bulk is a text as a server sends it.
func bulk(text string) string { return fmt.Sprintf("$%d\r\n%s\r\n", len(text), text) }

func unknown(name string) string { return "-ERR unknown command '" + name + "'\r\n" }

// TestConformanceBehindAProxy: one that knows no more than what the store needs.
func TestConformanceBehindAProxy(t *testing.T) {
	t.Parallel()
	refused := make(map[string]string)
	for name := range strings.FieldsSeq("acl client command config function info monitor psubscribe role script spublish ssubscribe wait watch") {
		refused[name] = unknown(name)
	}
	conforms(t, Options{Addresses: []string{redistest.NewProxy(t, saying(refused), redistest.Start(t)).Addr}})
}

// TestNewsThatAProxyLoses: it leads what is published to one shard, and what a script does on another stays there. Who takes
// heartbeats for a sign that changes are heard serves what was revoked elsewhere.
func TestNewsThatAProxyLoses(t *testing.T) {
	t.Parallel()
	proxy := redistest.NewProxy(t, nil, redistest.Start(t), redistest.Start(t))
	s, on, reports := reporting(t, Options{Addresses: []string{proxy.Addr}})
	select {
	case err := <-reports:
		if !errors.Is(err, ErrLosesNews) {
			t.Fatalf("reported %v, want %v", err, ErrLosesNews)
		}
	case <-on:
		t.Fatal("it believes that it hears")
	}
	if err := s.Unfit(t.Context()); !errors.Is(err, ErrLosesNews) {
		t.Errorf("Unfit: %v, want %v", err, ErrLosesNews)
	}
	if len(on) > 0 || len(reports) > 0 {
		t.Errorf("it began to listen %d times, and reported %d times more", len(on), len(reports))
	}
	if err := s.Store(t.Context(), locked, []byte("x")); err != nil { // all else works
		t.Error(err)
	}
}

// TestScriptsThatMayNotPublish: a service that looks into scripts refuses all that change a record.
func TestScriptsThatMayNotPublish(t *testing.T) {
	t.Parallel()
	refuse := func(command []string) string {
		switch name := strings.ToLower(command[0]); {
		case name == "evalsha":
			return "-NOSCRIPT No matching script. Please use EVAL.\r\n"
		case name == "eval" && strings.Contains(command[1], "PUBLISH"):
			return "-ERR bad lua script for redis cluster, all the keys that the script uses should be passed using the KEYS array\r\n"
		}
		return ""
	}
	s, on, reports := reporting(t, Options{Addresses: []string{redistest.NewProxy(t, refuse, redistest.Start(t)).Addr}})
	concise(t, <-reports, "what to choose of a managed redis", "none")
	concise(t, s.Store(t.Context(), locked, []byte("x")), "what to choose of a managed redis", "none")
	if len(on) > 0 {
		t.Error("it listens")
	}
}

// A proof counts for the subscription on which it was begun.
func TestProof(t *testing.T) {
	t.Parallel()
	var p proof
	if p.came("1.0") {
		t.Error("nothing was begun")
	}
	old := p.begin()
	marks := p.begin()
	for _, mark := range append(old, marks[1:]...) {
		if p.came(mark) {
			t.Errorf("whole with %s", mark)
		}
	}
	if !p.came(marks[0]) || p.came(marks[0]) {
		t.Error("it is whole once, with the last")
	}
}

// What is missing may be on its way for a second after the scripts have run, however long they ran.
func TestProofHasItsTime(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var p proof
		if p.failed() {
			t.Error("it failed before it began")
		}
		marks := p.begin()
		time.Sleep(2 * silenceMost)
		if p.failed() {
			t.Error("it failed while scripts were being sent")
		}
		p.end()
		for _, mark := range marks[1:] {
			p.came(mark)
		}
		time.Sleep(silenceMost)
		if p.failed() {
			t.Error("it failed although the last may be on its way")
		}
		time.Sleep(time.Millisecond)
		if !p.failed() {
			t.Error("it did not fail although the last does not come")
		}
		p.came(marks[0])
		if p.failed() {
			t.Error("it failed although all have come")
		}
	})
}

// That news are lost is believed of the last attempt to listen alone.
func TestNewsThatAreLostNoMore(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	reports := make(chan error, 100)
	s := open(t, Options{Addresses: []string{server.Addr}, Report: func(err error) { reports <- err }})
	s.losesNews.Store(true) // as after an attempt before
	on := make(listening, 100)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { s.Watch(ctx, on) })
	defer wg.Wait()
	defer cancel()
	<-on
	for end := time.Now().Add(10 * time.Second); s.Unfit(t.Context()) != nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it listens, and is unfit: %v", s.Unfit(t.Context()))
		}
	}
	server.Kill()
	if err := <-reports; errors.Is(err, ErrLosesNews) {
		t.Errorf("reported %v of a server that is down", err)
	}
	if err := s.Unfit(t.Context()); errors.Is(err, ErrLosesNews) {
		t.Errorf("a server that is down: %v", err)
	}
}

// TestProofThatIsNotSent: scripts that never came to the server say nothing of what it passes on.
func TestProofThatIsNotSent(t *testing.T) {
	t.Parallel()
	var broken atomic.Bool
	breakOnce := func(command []string) string {
		if strings.EqualFold(command[0], "eval") && !broken.Swap(true) {
			return "?\r\n" // after which a client gives up the connection
		}
		return ""
	}
	_, on, reports := reporting(t, Options{Addresses: []string{redistest.NewProxy(t, breakOnce, redistest.Start(t)).Addr}})
	select {
	case <-on:
	case err := <-reports:
		t.Fatalf("reported %v", err)
	}
	if !broken.Load() {
		t.Error("no proof was sent")
	}
}

// TestProxyThatSubscribesAnew: what was published in between has gone by unheard.
func TestProxyThatSubscribesAnew(t *testing.T) {
	t.Parallel()
	proxy := redistest.NewProxy(t, nil, redistest.Start(t))
	_, on, reports := reporting(t, Options{Addresses: []string{proxy.Addr}})
	if !<-on {
		t.Fatal("does not listen")
	}
	proxy.SubscribeAnew()
	for _, want := range []bool{false, true} {
		select {
		case got := <-on:
			if got != want {
				t.Errorf("listens: %v, want %v", got, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("it does not notice, or does not listen again: reported %d times", len(reports))
		}
	}
	if err := <-reports; !errors.Is(err, errAgain) {
		t.Errorf("reported %v, want %v", err, errAgain)
	}
}

// TestServiceThatDoesNotTell: who has set it up well cannot have it tell, and is told once.
func TestServiceThatDoesNotTell(t *testing.T) {
	t.Parallel()
	for name, answers := range map[string]map[string]string{
		"refused": {"info": unknown("info")},
		"silent":  {"info server": bulk("redis_version:7.0.0\r\n"), "info memory": bulk("used_memory:1\r\n")},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			asked := make(chan bool, 1000)
			answer := func(command []string) string {
				if strings.EqualFold(command[0], "info") {
					select {
					case asked <- true:
					default:
					}
				}
				return saying(answers)(command)
			}
			reports := make(chan error, 100)
			s := open(t, Options{Addresses: []string{redistest.NewProxy(t, answer, redistest.Start(t)).Addr}, Report: func(err error) { reports <- err }})
			s.look = 10 * time.Millisecond
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() { s.Watch(ctx, deafListener{}); close(done) }()
			if err := <-reports; !errors.Is(err, ErrUntold) || (name == "refused") != strings.Contains(err.Error(), "unknown command") {
				t.Errorf("reported %v, want %v", err, ErrUntold)
			}
			for range 30 {
				<-asked
			}
			cancel()
			<-done
			if len(reports) > 0 {
				t.Errorf("reported again: %v", <-reports)
			}
			if err := s.Unfit(t.Context()); err != nil {
				t.Errorf("Unfit: %v", err)
			}
		})
	}
}

// TestWhatTellsTellsTheRest: one section that is refused hides no other.
func TestWhatTellsTellsTheRest(t *testing.T) {
	t.Parallel()
	proxy := redistest.NewProxy(t, saying(map[string]string{"info server": unknown("info")}), redistest.Start(t, "--maxmemory-policy", "allkeys-lru"))
	if err := open(t, Options{Addresses: []string{proxy.Addr}}).Unfit(t.Context()); !errors.Is(err, ErrEvicts) {
		t.Errorf("Unfit: %v, want %v", err, ErrEvicts)
	}
}

// TestReadsFromReplicas: what takes writes is no replica, whatever it calls itself.
func TestReadsFromReplicas(t *testing.T) {
	t.Parallel()
	proxy := redistest.NewProxy(t, saying(map[string]string{"info replication": bulk("role:slave\r\n")}), redistest.Start(t))
	s, _, reports := reporting(t, Options{Addresses: []string{proxy.Addr}})
	for _, err := range []error{<-reports, s.Unfit(t.Context())} {
		if !errors.Is(err, ErrSplitsReads) || errors.Is(err, ErrReplica) {
			t.Errorf("%v, want %v", err, ErrSplitsReads)
		}
	}
}

// TestReplicaThatTakesWrites: it keeps them to itself, and loses them.
func TestReplicaThatTakesWrites(t *testing.T) {
	t.Parallel()
	host, port, _ := strings.Cut(redistest.Start(t).Addr, ":")
	replica := redistest.Start(t, "--replicaof", host+" "+port, "--replica-read-only", "no")
	if err := open(t, Options{Addresses: []string{replica.Addr}}).Unfit(t.Context()); !errors.Is(err, ErrReplica) || errors.Is(err, ErrSplitsReads) {
		t.Errorf("Unfit: %v, want %v", err, ErrReplica)
	}
}

// TestRecordsOutliveEviction: services are set to volatile-lru by default, which throws away what has an end. Records have none.
func TestRecordsOutliveEviction(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t, "--maxmemory-policy", "volatile-lru")
	s := open(t, Options{Addresses: []string{server.Addr}})
	if err := s.Unfit(t.Context()); !errors.Is(err, ErrForgets) || errors.Is(err, ErrEvicts) {
		t.Errorf("Unfit: %v, want %v", err, ErrForgets)
	}
	const records = 100
	name := func(i int) string { return fmt.Sprintf("wechat/v1/account/wx%016d.json", i) }
	for i := range records {
		unlock := mustLock(t, s)
		if err := s.Swap(t.Context(), name(i), nil, []byte("record")); err != nil {
			t.Fatal(err)
		}
		unlock()
	}
	server.Do("CONFIG", "SET", "maxmemory", "3mb")
	claims := make([]tokens.Claim, 1000)
	for round := range 10 {
		for i := range claims {
			claims[i] = tokens.Claim{Name: fmt.Sprintf("%d-%d", round, i), Value: []byte(strings.Repeat("x", 1000)), TTL: time.Hour}
		}
		if err := s.ClaimAll(claims, time.Minute); err != nil {
			t.Fatal(err)
		}
	}
	if stats, _ := server.Do("INFO", "stats").(string); strings.Contains(stats, "evicted_keys:0\r") {
		t.Fatal("nothing was evicted")
	}
	for i := range records {
		if value, err := s.Load(t.Context(), name(i)); err != nil || string(value) != "record" {
			t.Fatalf("%s: %q, %v", name(i), value, err)
		}
	}
}

// TestIdleConnectionsThatAreClosed: services close what was idle for some time, and nobody is to notice.
func TestIdleConnectionsThatAreClosed(t *testing.T) {
	t.Parallel()
	relay := redistest.NewRelay(t, redistest.Start(t).Addr)
	s, on, reports := reporting(t, Options{Addresses: []string{relay.Addr}})
	<-on
	for range 3 {
		relay.Break()
		if err := s.Store(t.Context(), locked, []byte("x")); err != nil {
			t.Error(err)
		}
		if c, err := claimOne(t, s); err != nil {
			t.Error(c, err)
		}
	}
	for len(reports) > 0 {
		t.Logf("reported %v", <-reports)
	}
}

// TestSlowConnectionIsHeard: a heartbeat that has its connection made first takes longer than the others, and gives it up for none.
func TestSlowConnectionIsHeard(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	for try := range stall.Tries(t, 200*time.Millisecond, server.Turn) {
		relay := redistest.NewRelay(t, server.Addr)
		relay.Slow(240 * time.Millisecond)
		_, on, reports := reporting(t, Options{Addresses: []string{relay.Addr}})
		select {
		case <-on:
		case err := <-reports:
			try.Errorf("reported %v", err)
			continue
		}
		select {
		case <-on:
			try.Errorf("it ceases to listen")
		case <-time.After(3 * silenceMost):
		}
		relay.Slow(0)
	}
}

// TestFirstHeartbeatOverASlowConnection: the first has its own connection made, on which the database is chosen, too.
func TestFirstHeartbeatOverASlowConnection(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	for try := range stall.Tries(t, 100*time.Millisecond, server.Turn) {
		relay := redistest.NewRelay(t, server.Addr)
		relay.Slow(210 * time.Millisecond)
		_, on, reports := reporting(t, Options{Addresses: []string{relay.Addr}, DB: 3})
		select {
		case <-on:
		case err := <-reports:
			try.Errorf("reported %v", err)
		}
		relay.Slow(0)
	}
}

// TestEvictionIsReportedOverASlowConnection: one who looks asks several times.
func TestEvictionIsReportedOverASlowConnection(t *testing.T) {
	t.Parallel()
	relay := redistest.NewRelay(t, redistest.Start(t, "--maxmemory-policy", "allkeys-lru").Addr)
	relay.Slow(90 * time.Millisecond)
	_, _, reports := reporting(t, Options{Addresses: []string{relay.Addr}})
	select {
	case err := <-reports:
		if !errors.Is(err, ErrEvicts) {
			t.Errorf("reported %v, want %v", err, ErrEvicts)
		}
	case <-time.After(10 * time.Second):
		t.Error("nothing is reported")
	}
	relay.Slow(0)
}

// TestDeadConnectionIsNoticed: a heartbeat that is on its way over it does not delay that.
func TestDeadConnectionIsNoticed(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	for try := range stall.Tries(t, 200*time.Millisecond, server.Turn) {
		relay := redistest.NewRelay(t, server.Addr)
		_, on, _ := reporting(t, Options{Addresses: []string{relay.Addr}})
		<-on
		time.Sleep(2 * beatEvery) // the first heartbeats are over
		relay.Hang()
		dead := time.Now()
		if <-on {
			t.Fatal("it listens over a dead connection")
		}
		if took, most := time.Since(dead), silenceMost+2*beatEvery; took > most {
			try.Errorf("noticed after %v, want %v at most", took, most)
		}
		relay.Pass()
	}
}
