//go:build soak

package integration_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

const (
	fewAccounts  = 10
	manyAccounts = 1_000_000
	// A record takes a block and an inode of its own; the test wants some space to spare.
	blockPerRecord = 4 << 10
	spareSpace     = 2 << 30
	folderWorkers  = 8

	// Starts of each size, in turns, and one more before them that does not count. The machine may be busy with other
	// things: medians are compared.
	scaleRounds = 9
	// settleTime is how long a process is left alone before its memory is read.
	settleTime = 2 * time.Second
	maxSlower  = 50 * time.Millisecond
	maxLarger  = 3 << 10 // KiB
	// maxMoreGoroutines is for those of connections that happen to be open.
	maxMoreGoroutines = 4

	coldCalls = 5
	// A cold account's first call reads its record once to know the account. The renewal reads it again under the lock
	// that all nodes respect, and once more under the lock around the write, since a lock may have been waited for.
	maxColdLoads = 3
	// The lock of the renewal and that of the write.
	maxColdLocks = 2
)

// TestScale: a million authorizers in the file storage cost the start and the idle process what ten cost, and the first
// call for one of them what it costs with ten. The records are written into the storage directly, sealed, in the form
// in which the gateway keeps them; that the form is right is seen by the gateway living on them.
func TestScale(t *testing.T) {
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Binary = plainBinary(t) // the race detector's memory and time are not the gateway's
		w.Env = append(w.Env, "WECHAT_LOG_LEVEL=INFO", "CRM_APPIDS=*")
	})
	if result, err := w.WeChat.PushTicket(t.Context(), integration.PlatformID); err != nil || !result.OK() {
		t.Fatalf("ticket: %s %v", result.Wrong, err)
	}
	if err := w.Gateway.Stop(); err != nil {
		t.Fatal(err)
	}
	few, many := newSeeds(t, w, "few", fewAccounts), newSeeds(t, w, "many", manyAccounts)
	few.write(t)
	many.write(t)

	t.Run("start and idle", func(t *testing.T) { compareIdle(t, w, few, many) })
	t.Run("cold call", func(t *testing.T) {
		for _, s := range []*seeds{few, many} {
			coldAccounts(t, w, s)
		}
	})
	checkViolations(t, w)
}

// plainBinary is the gateway without the race detector.
func plainBinary(t *testing.T) string {
	t.Helper()
	if !raceEnabled {
		return binary
	}
	file, err := integration.Build("..", t.TempDir(), false)
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// seeds are so many authorizers' records: a folder that takes the place of the gateway's own. The last few accounts,
// which are those that the test calls for, exist in the simulated WeChat too, and it knows their refresh tokens.
type seeds struct {
	w        *integration.World
	accounts int
	folder   string
	sealer   *crypto.Sealer
	known    map[int]string // refresh token, by the account's number
	obtained int64
}

// seededRecord is an authorizer's record in the store.
type seededRecord struct {
	V            int    `json:"v"`
	Gen          int    `json:"gen"`
	AccessToken  string `json:"access_token"`
	ExpiresAt    int64  `json:"expires_at"`
	ObtainedAt   int64  `json:"obtained_at"`
	RefreshToken string `json:"refresh_token"`
	FuncInfo     []int  `json:"func_info"`
	AuthorizedAt int64  `json:"authorized_at"`
}

const seededGen = 7

func newSeeds(t *testing.T, w *integration.World, name string, accounts int) *seeds {
	t.Helper()
	key, err := crypto.ParseSealKey(w.Secret("WECHAT_SEAL_KEY"))
	if err != nil {
		t.Fatal(err)
	}
	s := &seeds{
		w: w, accounts: accounts, folder: filepath.Join(w.Dir, "seeds", name), known: make(map[int]string),
		obtained: time.Now().Add(-30 * 24 * time.Hour).Unix(),
	}
	if s.sealer, err = crypto.NewSealer(key); err != nil {
		t.Fatal(err)
	}
	for i := range coldCalls + 1 {
		n := s.called(i)
		if s.known[n], err = w.WeChat.PriorAuthorization(integration.PlatformID, seededAppID(n)); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// called is the number of the i-th account that the test calls for.
func (s *seeds) called(i int) int { return s.accounts - 1 - i }

func seededAppID(n int) string { return fmt.Sprintf("wx%016x", n) }

// recordName is the name under which the gateway keeps an authorizer: spread over 256 folders by a hash.
func recordName(appid string) string {
	sum := sha256.Sum256([]byte(appid))
	return "wechat/v1/authorizer/" + integration.PlatformID + "/" + hex.EncodeToString(sum[:1]) + "/" + appid
}

// home is where the gateway has its authorizers.
func (s *seeds) home() string {
	return filepath.Join(s.w.Dir, "data", "caddy", "wechat", "v1", "authorizer")
}

// file is a record's path below a folder like home.
func (s *seeds) file(folder, appid string) string {
	return filepath.Join(folder, filepath.FromSlash(strings.TrimPrefix(recordName(appid), "wechat/v1/authorizer/")))
}

// record is an account that was in use a month ago.
func (s *seeds) record(n int) seededRecord {
	refresh := s.known[n]
	if refresh == "" {
		refresh = fmt.Sprintf("refreshtoken@@@%043d", n)
	}
	return seededRecord{
		V: 1, Gen: seededGen, AccessToken: fmt.Sprintf("97_%0133d", n), ExpiresAt: s.obtained + 7200, ObtainedAt: s.obtained,
		RefreshToken: refresh, FuncInfo: []int{1, 2, 3, 4, 7, 11, 15}, AuthorizedAt: s.obtained - 86400,
	}
}

// write makes the records.
func (s *seeds) write(t *testing.T) {
	t.Helper()
	s.checkSpace(t)
	t.Cleanup(func() { s.remove(t) })
	begun := time.Now()
	folders := make(map[string][]int)
	for n := range s.accounts {
		folder := filepath.Dir(s.file(s.folder, seededAppID(n)))
		folders[folder] = append(folders[folder], n)
	}
	eachFolder(t, slices.Collect(maps.Keys(folders)), func(folder string) error { return s.fill(folder, folders[folder]) })
	written := time.Since(begun)
	syscall.Sync() // or the file system would write during the measurements
	if t.Failed() {
		t.FailNow()
	}
	t.Logf("%d records in %v, and %v to the disk", s.accounts, written.Round(time.Millisecond), (time.Since(begun) - written).Round(time.Millisecond))
}

// remove deletes the records, wherever they are; what is left is t.TempDir's. One by one, a million files would take
// long: the file system waits for the disk now and then.
func (s *seeds) remove(t *testing.T) {
	for _, folder := range []string{s.folder, s.home()} {
		folders, err := filepath.Glob(filepath.Join(folder, "*", "*"))
		if err != nil {
			t.Error(err)
		}
		eachFolder(t, folders, os.RemoveAll)
	}
}

// eachFolder works on several folders at a time: a file system lets one file at a time into a folder or out of it.
func eachFolder(t *testing.T, folders []string, do func(folder string) error) {
	work := make(chan string)
	var wg sync.WaitGroup
	for range folderWorkers {
		wg.Go(func() {
			for folder := range work {
				if err := do(folder); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for _, folder := range folders {
		work <- folder
	}
	close(work)
	wg.Wait()
}

func (s *seeds) fill(folder string, accounts []int) error {
	if err := os.MkdirAll(folder, 0o700); err != nil {
		return err
	}
	for _, n := range accounts {
		appid := seededAppID(n)
		content, err := json.Marshal(s.record(n))
		if err != nil {
			return err
		}
		if content, err = s.sealer.Seal(recordName(appid), content); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(folder, appid), content, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func (s *seeds) checkSpace(t *testing.T) {
	t.Helper()
	var fs syscall.Statfs_t
	if err := syscall.Statfs(s.w.Dir, &fs); err != nil {
		t.Fatal(err)
	}
	free, inodes := fs.Bavail*uint64(fs.Bsize), fs.Ffree //nolint:gosec // sizes are positive
	if want := uint64(s.accounts)*blockPerRecord + spareSpace; free < want {
		t.Fatalf("%d MiB are free where the records go, want %d", free>>20, want>>20)
	}
	// Some file systems have no table of inodes, and say 0.
	if fs.Files > 0 && inodes < uint64(s.accounts)+10_000 {
		t.Fatalf("%d inodes are free where the records go", inodes)
	}
}

// during starts the gateway on these records, measures how long it takes until its admin endpoint answers, and has it
// stopped and the records put back when what is done.
func (s *seeds) during(t *testing.T, what func(startup time.Duration)) {
	t.Helper()
	if err := os.RemoveAll(s.home()); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(s.folder, s.home()); err != nil {
		t.Fatal(err)
	}
	startup := timedStart(t, s.w)
	what(startup)
	if err := s.w.Gateway.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(s.home(), s.folder); err != nil {
		t.Fatal(err)
	}
}

// timedStart starts the gateway. It asks the admin endpoint more often than Gateway.Start does, for the sake of precision.
func timedStart(t *testing.T, w *integration.World) time.Duration {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	answered := make(chan time.Duration, 1)
	begun := time.Now()
	go func() { // ends with ctx
		for ctx.Err() == nil {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+w.Admin+"/config/apps/wechat", nil)
			if err != nil {
				return
			}
			if resp, err := client.Do(req); err == nil {
				body, _ := io.ReadAll(resp.Body)
				_ = resp.Body.Close()
				if resp.StatusCode == http.StatusOK && strings.Contains(string(body), integration.PlatformID) {
					answered <- time.Since(begun)
					return
				}
			}
			time.Sleep(time.Millisecond)
		}
	}()
	if err := w.Gateway.Start(ctx); err != nil {
		t.Fatal(err)
	}
	select {
	case took := <-answered:
		return took
	case <-ctx.Done():
		t.Fatal("the admin endpoint does not show the gateway's configuration")
		return 0
	}
}

// idle is what a process without calls costs.
type idle struct {
	startup        []time.Duration
	rss, anonymous []int // KiB: all of the resident memory, and that without mapped files
	goroutines     []int
	operations     map[string]int // on the store, since the start
}

func (i *idle) measure(t *testing.T, s *seeds) {
	t.Helper()
	s.during(t, func(startup time.Duration) {
		time.Sleep(settleTime)
		i.startup = append(i.startup, startup)
		i.rss = append(i.rss, memory(t, s.w, "VmRSS"))
		i.anonymous = append(i.anonymous, memory(t, s.w, "RssAnon"))
		m := metricsOf(t, s.w)
		i.goroutines = append(i.goroutines, m["go_goroutines"])
		i.operations = m.operations()
	})
}

func (i *idle) String() string {
	return fmt.Sprintf("start %v (%v to %v), RSS %d KiB (%d to %d), anonymous %d KiB, %d goroutines, store operations since the start %v",
		median(i.startup), slices.Min(i.startup), slices.Max(i.startup), median(i.rss), slices.Min(i.rss), slices.Max(i.rss),
		median(i.anonymous), median(i.goroutines), i.operations)
}

func compareIdle(t *testing.T, w *integration.World, few, many *seeds) {
	var with10, with1M idle
	for round := range scaleRounds + 1 {
		if round%2 == 0 {
			with10.measure(t, few)
			with1M.measure(t, many)
		} else {
			with1M.measure(t, many)
			with10.measure(t, few)
		}
		if round == 0 {
			with10, with1M = idle{}, idle{} // the page cache was cold
		}
	}
	t.Logf("%7d accounts, medians of %d starts: %v", few.accounts, scaleRounds, &with10)
	t.Logf("%7d accounts, medians of %d starts: %v", many.accounts, scaleRounds, &with1M)
	// Both starts of a round found the machine about equally busy.
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
	if !maps.Equal(with10.operations, with1M.operations) {
		t.Error("the start does not ask the same of the store")
	}
}

// coldAccounts makes the first calls for accounts of which no process has seen anything for a month, and then the first
// calls after a restart, when their tokens are in the store.
func coldAccounts(t *testing.T, w *integration.World, s *seeds) {
	t.Helper()
	var took, again []time.Duration
	s.during(t, func(time.Duration) {
		seededCall(t, w, s.called(coldCalls)) // the platform's own token is not part of what is measured
		for i := range coldCalls {
			cost := seededCall(t, w, s.called(i))
			took = append(took, cost.took)
			t.Logf("%7d accounts, cold %s: %v", s.accounts, seededAppID(s.called(i)), cost)
			if cost.refreshes != 1 || cost.others != 0 {
				t.Errorf("%d refreshes and %d other calls to WeChat's component API, want one refresh alone", cost.refreshes, cost.others)
			}
			ops := cost.operations
			if ops["load"] > maxColdLoads || ops["lock"] > maxColdLocks || ops["store"] != 1 || ops["list"]+ops["delete"] != 0 {
				t.Errorf("store operations %v, want at most %d loads and %d locks, one store, nothing else", ops, maxColdLoads, maxColdLocks)
			}
			s.checkRecord(t, s.called(i))
		}
	})
	s.during(t, func(time.Duration) {
		seededCall(t, w, s.called(coldCalls))
		for i := range coldCalls {
			cost := seededCall(t, w, s.called(i))
			again = append(again, cost.took)
			if cost.refreshes+cost.others != 0 || !maps.Equal(cost.operations, map[string]int{"load": 1}) {
				t.Errorf("with a live token in the store: %v, want one load alone", cost)
			}
			if cost := seededCall(t, w, s.called(i)); cost.refreshes+cost.others+len(cost.operations) != 0 {
				t.Errorf("with a live token in memory: %v, want nothing", cost)
			}
		}
	})
	t.Logf("%7d accounts: a cold call takes %v, the first one after a restart %v (medians of %d)", s.accounts, median(took), median(again), coldCalls)
}

// checkRecord looks whether the gateway wrote the record that was seeded, in the form in which it was seeded.
func (s *seeds) checkRecord(t *testing.T, n int) {
	t.Helper()
	appid := seededAppID(n)
	content, err := os.ReadFile(s.file(s.home(), appid))
	if err != nil {
		t.Fatal(err)
	}
	if content, _, err = s.sealer.Open(recordName(appid), content); err != nil {
		t.Fatal(err)
	}
	var got seededRecord
	if err := json.Unmarshal(content, &got); err != nil {
		t.Fatal(err)
	}
	access, _ := s.w.WeChat.Current(wxsim.KindAuthorizer, integration.PlatformID, appid)
	want := s.record(n)
	if got.V != want.V || got.Gen != seededGen+1 || got.AccessToken != access || got.RefreshToken != want.RefreshToken ||
		!slices.Equal(got.FuncInfo, want.FuncInfo) || got.AuthorizedAt != want.AuthorizedAt || got.ExpiresAt <= time.Now().Unix() {
		t.Errorf("%s: the record was not continued (generation %d)", appid, got.Gen)
	}
}

// callCost is what one call cost besides itself.
type callCost struct {
	took       time.Duration
	operations map[string]int // on the store
	refreshes  int            // of the account's token, as WeChat counts
	others     int            // other calls to WeChat for tokens and authorizations
}

func (c callCost) String() string {
	return fmt.Sprintf("%v, store operations %v, %d refreshes, %d other calls for tokens", c.took.Round(time.Microsecond), c.operations, c.refreshes, c.others)
}

// seededCall makes a call for an account.
func seededCall(t *testing.T, w *integration.World, n int) callCost {
	t.Helper()
	const refreshPath = "/cgi-bin/component/api_authorizer_token"
	appid := seededAppID(n)
	user := w.WeChat.NewUser(appid)
	journal := w.WeChat.Journal()
	journal.Reset()
	before := metricsOf(t, w).operations()
	begun := time.Now()
	status, body := call(t, w, http.MethodGet, "/"+appid+"/cgi-bin/user/info?openid="+user.OpenID, bearer(w), "")
	cost := callCost{took: time.Since(begun), operations: make(map[string]int)}
	if status != http.StatusOK || !strings.Contains(body, user.OpenID) {
		t.Fatalf("%s: %d %s", appid, status, body)
	}
	time.Sleep(100 * time.Millisecond) // for what the call may have set off
	for op, count := range metricsOf(t, w).operations() {
		if count != before[op] {
			cost.operations[op] = count - before[op]
		}
	}
	cost.refreshes = journal.Count(refreshPath)
	for _, e := range journal.Entries() {
		if e.Direction == wxsim.In && strings.HasPrefix(e.Path, "/cgi-bin/component/") && e.Path != refreshPath {
			cost.others++
		}
	}
	if issued := journal.Refreshes(wxsim.KindAuthorizer, appid); issued != cost.refreshes {
		t.Errorf("%s: %d refreshes and %d tokens", appid, cost.refreshes, issued)
	}
	if calls := journal.Count("/cgi-bin/user/info"); calls != 1 {
		t.Errorf("%s: the call reached WeChat %d times", appid, calls)
	}
	return cost
}

// metrics are the samples of a /metrics page, by name and labels.
type metrics map[string]int

var storeOperation = regexp.MustCompile(`^caddy_wechat_store_operation_duration_seconds_count\{op="(\w+)",store="\w+"\}$`)

func metricsOf(t *testing.T, w *integration.World) metrics {
	t.Helper()
	_, page := fetch(t, plainClient, http.MethodGet, "http://"+w.Admin+"/metrics", nil, "")
	m := make(metrics)
	for line := range strings.Lines(page) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		if n, err := strconv.ParseFloat(value, 64); err == nil {
			m[name] = int(n)
		}
	}
	return m
}

// operations counts those on the store.
func (m metrics) operations() map[string]int {
	counts := make(map[string]int)
	for name, n := range m {
		if match := storeOperation.FindStringSubmatch(name); match != nil {
			counts[match[1]] = n
		}
	}
	return counts
}

func median[T int | time.Duration](values []T) T {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}
