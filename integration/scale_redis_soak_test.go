//go:build soak

package integration_test

import (
	"encoding/json"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
)

const (
	redisPrefix  = "wechat:"
	redisNodes   = 3
	pipelineSize = 1000
	// usedAccounts are called for on each node, each for the first time on one of them.
	usedAccounts = 3000
	// otherLayouts is how many records are kept in other ways, to compare.
	otherLayouts = 200_000
	// smallFolder is as many records as a listpack takes by default.
	smallFolder = 128
)

// redisSeeds are so many authorizers' records in a Redis of their own.
type redisSeeds struct {
	*seeds
	server *redistest.Server
	used   []int // numbers of the accounts that the simulated WeChat knows, too
}

// TestScaleRedis: a million authorizers in Redis cost the start and the idle process what ten cost, and the first call
// for one of them one refresh, on three nodes together.
func TestScaleRedis(t *testing.T) {
	f := newFleet(t, fleetOptions{
		nodes: redisNodes, simulator: func(c *wxsim.Config) { c.Faults = wxsim.Faults{Polite: true} },
		store: []string{"address {$REDIS_SERVER}"}, // no relay between
		env:   []string{"WECHAT_LOG_LEVEL=INFO", "REDIS_SERVER=127.0.0.1:9"},
	})
	plain := plainBinary(t)
	for _, n := range f.nodes {
		if err := n.Stop(); err != nil {
			t.Fatal(err)
		}
		n.Binary = plain // the race detector's memory and time are not the gateway's
	}
	few, many := newRedisSeeds(t, f, fewAccounts, fewAccounts), newRedisSeeds(t, f, manyAccounts, usedAccounts)
	few.fill(t)
	many.fill(t)
	for _, s := range []*redisSeeds{few, many} {
		s.start(t, f.nodes[:1])
		if err := f.ticket(on(t.Context(), f.nodes[0])); err != nil {
			t.Fatal(err)
		}
		s.stop(t, f.nodes[:1])
	}
	t.Run("start and idle", func(t *testing.T) { compareRedisIdle(t, f, few, many) })
	t.Run("use", func(t *testing.T) {
		for _, s := range []*redisSeeds{few, many} {
			useRedis(t, f, s)
		}
	})
	t.Run("layout", func(t *testing.T) { compareLayouts(t, many) })
}

func newRedisSeeds(t *testing.T, f *fleet, accounts, used int) *redisSeeds {
	t.Helper()
	s := &redisSeeds{
		seeds:  &seeds{accounts: accounts, known: make(map[int]string), obtained: time.Now().Add(-30 * 24 * time.Hour).Unix()},
		server: redistest.Start(t),
	}
	var err error
	for i := range used {
		// Spread over all folders, and other accounts for each store: WeChat knows one refresh token of each.
		n := i * (accounts / used)
		s.used = append(s.used, n)
		if s.known[n], err = f.wechat.PriorAuthorization(integration.PlatformID, s.appid(n)); err != nil {
			t.Fatal(err)
		}
	}
	key, err := crypto.ParseSealKey(f.env[slices.IndexFunc(f.env, func(e string) bool { return strings.HasPrefix(e, "WECHAT_SEAL_KEY=") })][len("WECHAT_SEAL_KEY="):])
	if err != nil {
		t.Fatal(err)
	}
	if s.sealer, err = crypto.NewSealer(key); err != nil {
		t.Fatal(err)
	}
	return s
}

// appid is that of the n-th account.
func (s *redisSeeds) appid(n int) string { return seededAppID(s.accounts + n) }

// sealed is an account's record as the gateway keeps it.
func (s *redisSeeds) sealed(n int) (name string, content []byte, err error) {
	name = recordName(s.appid(n))
	if content, err = json.Marshal(s.record(n)); err == nil {
		content, err = s.sealer.Seal(name, content)
	}
	return name, content, err
}

// fill makes the records, and says what they take.
func (s *redisSeeds) fill(t *testing.T) {
	t.Helper()
	before, begun := usedMemory(s.server), time.Now()
	var sizes int
	pipelined(t, s.server, s.accounts, func(pipe redis.Pipeliner, n int) error {
		name, content, err := s.sealed(n)
		sizes += len(content)
		pipe.HSet(t.Context(), redisPrefix+"{"+path.Dir(name)+"}", path.Base(name), content)
		return err
	})
	after := usedMemory(s.server)
	t.Logf("%7d accounts: used_memory %d before, %d after, %d bytes for each, of which the record has %d; written in %v", s.accounts,
		before, after, (after-before)/s.accounts, sizes/s.accounts, time.Since(begun).Round(time.Millisecond))
}

// pipelined sends commands for so many records.
func pipelined(t *testing.T, server *redistest.Server, records int, queue func(redis.Pipeliner, int) error) {
	t.Helper()
	pipe := server.Client().Pipeline()
	for n := range records {
		if err := queue(pipe, n); err != nil {
			t.Fatal(err)
		}
		if pipe.Len() == pipelineSize || n == records-1 {
			if _, err := pipe.Exec(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func (s *redisSeeds) start(t *testing.T, nodes []*fleetNode) (took []time.Duration) {
	t.Helper()
	for _, n := range nodes {
		n.Env = append(slices.DeleteFunc(slices.Clone(n.Env), func(e string) bool { return strings.HasPrefix(e, "REDIS_SERVER=") }), "REDIS_SERVER="+s.server.Addr)
		took = append(took, timedStart(t, &integration.World{Gateway: n.Gateway, Admin: n.Admin}))
	}
	return took
}

func (s *redisSeeds) stop(t *testing.T, nodes []*fleetNode) {
	t.Helper()
	for _, n := range nodes {
		if err := n.Stop(); err != nil {
			t.Fatal(err)
		}
	}
}

// redisIdle is what a process without calls costs, and what it asked of Redis since its start.
type redisIdle struct {
	startup        []time.Duration
	rss, anonymous []int // KiB
	goroutines     []int
	commands       map[string]int // of all starts; heartbeats, which go by time, are not counted
}

func (i *redisIdle) measure(t *testing.T, f *fleet, s *redisSeeds) {
	t.Helper()
	before := s.commands()
	n := f.nodes[0]
	i.startup = append(i.startup, s.start(t, f.nodes[:1])...)
	time.Sleep(settleTime)
	w := &integration.World{Gateway: n.Gateway, Admin: n.Admin}
	i.rss = append(i.rss, memory(t, w, "VmRSS"))
	i.anonymous = append(i.anonymous, memory(t, w, "RssAnon"))
	i.goroutines = append(i.goroutines, metricsOf(t, w)["go_goroutines"])
	s.stop(t, f.nodes[:1])
	if i.commands == nil {
		i.commands = make(map[string]int)
	}
	for c, calls := range s.commands() {
		if calls != before[c] && c != "publish" && c != "info" && c != "set" {
			i.commands[c] += calls - before[c]
		}
	}
}

func (i *redisIdle) String() string {
	return fmt.Sprintf("start %v (%v to %v), RSS %d KiB (%d to %d), anonymous %d KiB, %d goroutines, commands %v",
		median(i.startup), slices.Min(i.startup), slices.Max(i.startup), median(i.rss), slices.Min(i.rss), slices.Max(i.rss),
		median(i.anonymous), median(i.goroutines), i.commands)
}

func compareRedisIdle(t *testing.T, f *fleet, few, many *redisSeeds) {
	var with10, with1M redisIdle
	for round := range scaleRounds + 1 {
		if round%2 == 0 {
			with10.measure(t, f, few)
			with1M.measure(t, f, many)
		} else {
			with1M.measure(t, f, many)
			with10.measure(t, f, few)
		}
		if round == 0 {
			with10, with1M = redisIdle{}, redisIdle{} // the page cache was cold
		}
	}
	t.Logf("%7d accounts, medians of %d starts: %v", few.accounts, scaleRounds, &with10)
	t.Logf("%7d accounts, medians of %d starts: %v", many.accounts, scaleRounds, &with1M)
	slower := make([]time.Duration, len(with1M.startup))
	for round := range slower {
		slower[round] = with1M.startup[round] - with10.startup[round]
	}
	t.Logf("start with many minus start with few: median %v (%v to %v)", median(slower), slices.Min(slower), slices.Max(slower))
	if median(slower) > maxSlower {
		t.Errorf("the start takes %v longer, want at most %v", median(slower), maxSlower)
	}
	if larger := median(with1M.rss) - median(with10.rss); larger > maxLarger {
		t.Errorf("RSS is %d KiB larger, want at most %d", larger, maxLarger)
	}
	if more := median(with1M.goroutines) - median(with10.goroutines); more > maxMoreGoroutines {
		t.Errorf("%d more goroutines", more)
	}
	// A scan is HKEYS of each folder. What is read now and then may fall into one start and not into the other.
	if with10.commands["hkeys"] != with1M.commands["hkeys"] || with1M.commands["hget"] > with10.commands["hget"]+scaleRounds {
		t.Error("the start does not ask the same of Redis")
	}
}

// useRedis calls for accounts of which no node has seen anything for a month: on one node for the first time, then on the
// others, and then on all once more. The nodes take turns.
func useRedis(t *testing.T, f *fleet, s *redisSeeds) {
	t.Helper()
	s.start(t, f.nodes)
	defer s.stop(t, f.nodes)
	platform := f.wechat.NewUser(s.appid(s.used[0]))
	for _, n := range f.nodes { // the platform's own token is not part of what is measured
		if err := f.untilGood(t.Context(), n, platform, healTime); err != nil {
			t.Fatal(err)
		}
	}
	used := s.used[1:]
	users := make([]wxsim.User, len(used))
	for i, n := range used {
		users[i] = f.wechat.NewUser(s.appid(n))
	}
	time.Sleep(settleTime)
	s.logMemory(t, f, "before use")
	journal := f.wechat.Journal()
	journal.Reset()
	for _, round := range []struct {
		name      string
		nodes     []int // after the account's own
		refreshes int
		limit     float64 // of records read, for each call, by clients and scripts
	}{
		{"cold: one refresh", []int{0}, 1, maxColdLoads + 1},
		{"first on another node", []int{1, 2}, 0, 1},
		{"hot", []int{0, 1, 2}, 0, 0},
	} {
		before := s.commands()
		var took []time.Duration
		refreshed := journal.Count("/cgi-bin/component/api_authorizer_token")
		for i, u := range users {
			for _, shift := range round.nodes {
				n := f.nodes[(i+shift)%len(f.nodes)]
				a := f.user(t.Context(), n, u)
				if !a.good(u) {
					t.Fatalf("%s, node %s: %s", u.AppID, n.name, a)
				}
				took = append(took, a.took)
			}
		}
		commands := make(map[string]float64)
		for c, calls := range s.commands() {
			if each := float64(calls-before[c]) / float64(len(took)); each >= 0.05 {
				commands[c] = float64(int(each*100+0.5)) / 100
			}
		}
		slices.Sort(took)
		t.Logf("%7d accounts, %5d calls, %s: median %v, p99 %v, slowest %v; commands in Redis for each %v", s.accounts, len(took), round.name,
			took[len(took)/2].Round(10*time.Microsecond), took[len(took)*99/100].Round(10*time.Microsecond), took[len(took)-1].Round(10*time.Microsecond), commands)
		if got, want := journal.Count("/cgi-bin/component/api_authorizer_token")-refreshed, round.refreshes*len(users); got != want {
			t.Errorf("%s: %d refreshes, want %d", round.name, got, want)
		}
		if s.accounts == manyAccounts && commands["hget"] > round.limit+0.05 {
			t.Errorf("%s: %v records read for each call, want at most %v", round.name, commands["hget"], round.limit)
		}
	}
	time.Sleep(settleTime)
	s.logMemory(t, f, fmt.Sprintf("after %d were used on each node", len(users)))
}

func (s *redisSeeds) logMemory(t *testing.T, f *fleet, when string) {
	t.Helper()
	var rss, anonymous []int
	for _, n := range f.nodes {
		w := &integration.World{Gateway: n.Gateway, Admin: n.Admin}
		rss = append(rss, memory(t, w, "VmRSS"))
		anonymous = append(anonymous, memory(t, w, "RssAnon"))
	}
	t.Logf("%7d accounts, %s: RSS of the nodes %v KiB, of it anonymous %v KiB; used_memory %d", s.accounts, when, rss, anonymous, usedMemory(s.server))
}

// compareLayouts holds folders of thousands of records against what Redis packs more tightly, and against plain keys.
func compareLayouts(t *testing.T, many *redisSeeds) {
	folder := redisPrefix + "{" + path.Dir(recordName(many.appid(0))) + "}"
	fields, encoding := many.server.Do("HLEN", folder), many.server.Do("OBJECT", "ENCODING", folder)
	many.server.Do("CONFIG", "RESETSTAT")
	for range 100 {
		many.server.Do("HKEYS", folder)
		many.server.Do("HGET", folder, many.appid(0))
	}
	t.Logf("a folder of %v records is a %v; microseconds in Redis: %s", fields, encoding, perCall(many.server, "hkeys", "hget"))
	for _, layout := range []struct {
		name    string
		options []string
		queue   func(pipe redis.Pipeliner, n int, name string, content []byte)
	}{
		{"hashes as they are: 256 folders", nil, func(pipe redis.Pipeliner, _ int, name string, content []byte) {
			pipe.HSet(t.Context(), redisPrefix+"{"+path.Dir(name)+"}", path.Base(name), content)
		}},
		{"a key for each", nil, func(pipe redis.Pipeliner, _ int, name string, content []byte) {
			pipe.Set(t.Context(), redisPrefix+name, content, 0)
		}},
		{
			"hashes of 128, as listpacks", []string{"--hash-max-listpack-value", "1024"},
			func(pipe redis.Pipeliner, n int, name string, content []byte) {
				pipe.HSet(t.Context(), fmt.Sprintf("%s{%s/%06x}", redisPrefix, path.Dir(path.Dir(name)), n/smallFolder), path.Base(name), content)
			},
		},
	} {
		server := redistest.Start(t, layout.options...)
		before := usedMemory(server)
		pipelined(t, server, otherLayouts, func(pipe redis.Pipeliner, n int) error {
			name, content, err := many.sealed(n)
			layout.queue(pipe, n, name, content)
			return err
		})
		key := server.Do("RANDOMKEY")
		t.Logf("%s: %d bytes for each of %d; encoding %v; microseconds in Redis: %s", layout.name, (usedMemory(server)-before)/otherLayouts, otherLayouts,
			server.Do("OBJECT", "ENCODING", key), perCall(server, "hset", "set"))
		server.Kill()
	}
}

// usedMemory is that of a Redis once it has no clients' buffers left to speak of.
func usedMemory(s *redistest.Server) int {
	info, _ := s.Do("INFO", "memory").(string)
	for line := range strings.Lines(info) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "used_memory:"); ok {
			n, _ := strconv.Atoi(value)
			return n
		}
	}
	return 0
}

var commandStat = regexp.MustCompile(`(?m)^cmdstat_([\w|-]+):calls=(\d+),usec=\d+,usec_per_call=([\d.]+)`)

// commands counts what Redis has done, by command.
func (s *redisSeeds) commands() map[string]int {
	info, _ := s.server.Do("INFO", "commandstats").(string)
	counts := make(map[string]int)
	for _, m := range commandStat.FindAllStringSubmatch(info, -1) {
		counts[m[1]], _ = strconv.Atoi(m[2])
	}
	return counts
}

// perCall is how long commands took on average.
func perCall(s *redistest.Server, names ...string) string {
	info, _ := s.Do("INFO", "commandstats").(string)
	var said []string
	for _, m := range commandStat.FindAllStringSubmatch(info, -1) {
		if slices.Contains(names, m[1]) {
			said = append(said, m[1]+" "+m[3])
		}
	}
	return strings.Join(said, ", ")
}
