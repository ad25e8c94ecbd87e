//go:build soak

package integration_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
)

const (
	soakLogins  = 10_000
	loginRounds = 3
	// loginWorkers log people in at the same time.
	loginWorkers = 8
	// loginTTL is longer than a round's last logins take to be redeemed, and over before the next round is.
	loginTTL = 20 * time.Second
	// maxLoginHeap is what the live heap may grow by for each login of the rounds after the first, in bytes. What stays
	// when the tracking id has ended is the code, for an hour, and the flow, for half an hour: a hundred thousand of each.
	maxLoginHeap = 2 << 10
)

// loginTally counts what became of logins.
type loginTally struct{ lost, twice, doubled, redeemed atomic.Int64 }

// TestLoginSoak brings ten thousand people through the whole flow, again and again: start, WeChat, callback (half of them
// twice at once), landing, redemption by the app. Nobody is lost, no id is given out twice, and what is remembered of
// a login that is over is little enough that the tables, full, have their place in memory.
func TestLoginSoak(t *testing.T) {
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Binary = plainBinary(t) // the race detector's memory and time are not the gateway's
		w.Env = append(w.Env, "WECHAT_LOG_LEVEL=INFO")
		w.Caddyfile = loginConfig(t, fmt.Sprintf("\twechat_oauth /wx/thirdParty {\n\t\trequire_start\n\t\tfunc verify {$WECHAT_WEB}/webVerify/ {\n"+
			"\t\t\tttl %s\n\t\t}\n\t}\n", loginTTL))
	})
	authorize(t, w)
	shared := httpsClient(t, w).Transport

	ids := make(map[string]int)
	var mu sync.Mutex
	var table strings.Builder
	fmt.Fprintln(&table, "| round | logins | callbacks | redeemed | lost | twice | time | resident before | after | live heap before | after |")
	fmt.Fprintln(&table, "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
	var heaps []int // KiB
	var firstID string
	for round := range loginRounds {
		before, heapBefore := memory(t, w, "VmRSS"), liveHeap(t, w)
		var tally loginTally
		work := make(chan int)
		var wg sync.WaitGroup
		began := time.Now()
		for range loginWorkers {
			wg.Go(func() {
				for n := range work {
					id, err := soakLogin(t.Context(), w, shared, n, &tally)
					mu.Lock()
					switch {
					case err != nil:
						tally.lost.Add(1)
						t.Errorf("login %d: %v", n, err)
					case ids[id] > 0:
						tally.twice.Add(1)
						t.Errorf("login %d: the id was given out before", n)
					}
					ids[id]++
					if firstID == "" {
						firstID = id
					}
					mu.Unlock()
				}
			})
		}
		for n := range soakLogins {
			if t.Failed() && tally.lost.Load() > 20 {
				break
			}
			work <- n
		}
		close(work)
		wg.Wait()
		took := time.Since(began)
		over := time.NewTimer(loginTTL) // no id of this round may count as one of the next, however fast the machine is
		<-over.C
		after, heapAfter := memory(t, w, "VmRSS"), liveHeap(t, w)
		fmt.Fprintf(&table, "| %d | %d | %d | %d | %d | %d | %.0f s | %d KiB | %d KiB | %d KiB | %d KiB |\n", round+1, soakLogins,
			soakLogins+tally.doubled.Load(), tally.redeemed.Load(), tally.lost.Load(), tally.twice.Load(), took.Seconds(), before, after, heapBefore, heapAfter)
		heaps = append(heaps, heapAfter)
		if tally.redeemed.Load() != soakLogins {
			t.Errorf("round %d: %d of %d ids were redeemed", round+1, tally.redeemed.Load(), soakLogins)
		}
	}
	t.Log("\n" + table.String())
	if grown := (heaps[len(heaps)-1] - heaps[0]) << 10; grown > maxLoginHeap*soakLogins*(loginRounds-1) {
		t.Errorf("the live heap grew by %d bytes in the rounds after the first, %d for each login", grown, grown/(soakLogins*(loginRounds-1)))
	}
	if len(ids) != loginRounds*soakLogins {
		t.Errorf("%d different ids of %d logins", len(ids), loginRounds*soakLogins)
	}
	if status, body := call(t, w, http.MethodGet, "/wechat/users/"+firstID, bearer(w), ""); status != http.StatusNotFound {
		t.Errorf("an id past its time: %d %s", status, body)
	}
	folder := filepath.Join("..", ".run")
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, t.Name()+".txt"), []byte(table.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	checkViolations(t, w)
}

// liveHeap is what the gateway's heap has in it after a garbage collection, in KiB.
func liveHeap(t *testing.T, w *integration.World) int {
	t.Helper()
	fetch(t, plainClient, http.MethodGet, "http://"+w.Admin+"/debug/pprof/heap?gc=1", nil, "")
	_, metrics := fetch(t, plainClient, http.MethodGet, "http://"+w.Admin+"/metrics", nil, "")
	_, rest, _ := strings.Cut(metrics, "\ngo_memstats_heap_alloc_bytes ")
	value, _, _ := strings.Cut(rest, "\n")
	bytes, err := strconv.ParseFloat(value, 64)
	if err != nil {
		t.Fatalf("the heap's size in the metrics: %v", err)
	}
	return int(bytes) >> 10
}

// soakLogin is one person's login with a browser of their own, and its redemption.
func soakLogin(ctx context.Context, w *integration.World, transport http.RoundTripper, n int, tally *loginTally) (id string, err error) {
	appid := integration.AuthorizerID
	if n%4 == 0 {
		appid = integration.AccountID
	}
	jar, err := cookiejar.New(nil)
	if err != nil {
		return "", err
	}
	client := &http.Client{Transport: transport, Jar: jar, Timeout: 30 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	user := w.WeChat.NewUser(appid)
	state := fmt.Sprintf("a b&%d#扫码", n)
	link, err := redirectOf(ctx, client, w.URL("/wx/thirdParty/authorize/"+appid+"/verify?state="+url.QueryEscape(state)))
	if err != nil {
		return "", fmt.Errorf("start: %w", err)
	}
	callback, err := w.WeChat.Visit(link, user)
	if err != nil {
		return "", err
	}
	second := make(chan string, 1)
	if n%2 == 0 { // some clients follow WeChat's redirect twice
		tally.doubled.Add(1)
		go func() {
			location, err := redirectOf(ctx, client, callback)
			if err != nil {
				location = err.Error()
			}
			second <- location
		}()
	}
	landing, err := redirectOf(ctx, client, callback)
	if err != nil {
		return "", fmt.Errorf("callback: %w", err)
	}
	if n%2 == 0 {
		if other := <-second; other != landing {
			return "", fmt.Errorf("the same callback twice led to two places: %s", other)
		}
	}
	u, err := url.Parse(landing)
	if err != nil || u.Fragment != state || u.Path != "/webVerify/" {
		return "", fmt.Errorf("landed at %s", landing)
	}
	id = u.Query().Get("wxTkId")
	return id, soakRedeem(ctx, w, id, user.OpenID, state, tally)
}

// soakRedeem has the app ask who came, which must be that user.
func soakRedeem(ctx context.Context, w *integration.World, id, openID, state string, tally *loginTally) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.APIURL("/wechat/users/"+id), nil)
	if err != nil {
		return err
	}
	req.Header = bearer(w)
	resp, err := plainClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	var got struct{ OpenID, State string }
	if err := json.Unmarshal(body, &got); err != nil || resp.StatusCode != http.StatusOK || got.OpenID != openID || got.State != state {
		return fmt.Errorf("redeemed %d %s", resp.StatusCode, body)
	}
	tally.redeemed.Add(1)
	return nil
}

// redirectOf is where an address redirects to.
func redirectOf(ctx context.Context, client *http.Client, address string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	_ = resp.Body.Close()
	location := resp.Header.Get("Location")
	if location == "" || err != nil {
		return "", fmt.Errorf("answered %d without a redirect", resp.StatusCode)
	}
	return location, nil
}
