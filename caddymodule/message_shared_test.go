package caddymodule

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// fleet is several nodes that share a store in memory, in a bubble of synctest.
type fleet struct {
	store *tokens.MemStore
	nodes []*pacer
	runs  atomic.Int32 // of the backend, for all nodes
}

// newFleet makes nodes. Backend gets the number of the node and that of the run, from 1.
func newFleet(t *testing.T, n int, configure func(*Message), backend func(node, run int, w http.ResponseWriter, r *http.Request)) *fleet {
	t.Helper()
	key, err := crypto.ParseSealKey(strings.Repeat("ab", 32))
	if err != nil {
		t.Fatal(err)
	}
	sealer, err := crypto.NewSealer(key)
	if err != nil {
		t.Fatal(err)
	}
	f := &fleet{store: tokens.NewMemStore()}
	for node := range n {
		p := newPacer(t, configure, func(w http.ResponseWriter, r *http.Request) error {
			backend(node, int(f.runs.Add(1)), w, r)
			return nil
		})
		env := p.m.app.env
		env.Store, env.Sealer = f.store, sealer
		if p.m.Deduplication = ""; p.m.provisionDeduplication() != nil || !p.m.clustered {
			t.Fatal("a store that nodes share makes no cluster")
		}
		p.m.app.activate.Do(func() { p.m.app.shared.claims.use(env) }) // without the manager
		f.nodes = append(f.nodes, p)
	}
	return f
}

// claims are those of a node.
func (f *fleet) claims(node int) *claims { return f.nodes[node].m.app.claims() }

// freeze has a node seem dead: it does not beat, nor hears. What its handlers do goes on.
func (f *fleet) freeze(node int) {
	c := f.claims(node)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cancel()
}

// thaw lets it live again.
func (f *fleet) thaw(node int) {
	c := f.claims(node)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.begin(f.store)
}

// send pushes a message until it is answered, each time to another node.
func (f *fleet) send(message string, nodes ...int) seen {
	began := time.Now()
	for i, node := range nodes {
		if answer, ok := f.nodes[node].push(message); ok {
			return seen{answer, time.Since(began), i + 1}
		}
	}
	return seen{after: time.Since(began)}
}

// after is a backend that takes a time.
func after(d time.Duration, text string) func(int, int, http.ResponseWriter, *http.Request) {
	return func(_, _ int, w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(d):
			_, _ = io.WriteString(w, text)
		case <-r.Context().Done():
		}
	}
}

// TestSharedPace: the user sees the same, at the same time, on whichever nodes WeChat's pushes come, and the backend runs once.
func TestSharedPace(t *testing.T) {
	t.Parallel()
	const slow = "<Content><![CDATA[请稍候]]></Content>"
	for _, tt := range []struct {
		after   time.Duration
		reply   string
		want    string
		attempt int
		by      time.Duration
	}{
		{0, replyXML, replyXML, 1, 0},
		{4900 * time.Millisecond, replyXML, replyXML, 1, 4900 * time.Millisecond},
		{5100 * time.Millisecond, replyXML, replyXML, 2, 5100 * time.Millisecond},
		{9900 * time.Millisecond, replyXML, replyXML, 2, 9900 * time.Millisecond},
		{10100 * time.Millisecond, replyXML, replyXML, 3, 10100 * time.Millisecond},
		{14400 * time.Millisecond, replyXML, replyXML, 3, 14400 * time.Millisecond},
		{14600 * time.Millisecond, replyXML, slow, 3, 14500 * time.Millisecond},
		{3 * time.Minute, replyXML, slow, 3, 14500 * time.Millisecond},
		{7 * time.Second, "success", "success", 2, 7 * time.Second},
		{12 * time.Second, "<html>", "稍后回复您", 3, 12 * time.Second},
	} {
		for _, nodes := range [][]int{{0, 1, 2}, {0, 0, 1}, {0, 1, 1}, {0, 1, 0}} {
			t.Run(fmt.Sprint(tt.after, " ", kindOfText([]byte(tt.reply)).EN, nodes), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					f := newFleet(t, 3, func(m *Message) {
						m.SlowReply, m.SlowReplyText, m.FallbackText = slowText, "请稍候", "稍后回复您"
					}, after(tt.after, tt.reply))
					got := f.send(paceMessage(1), nodes...)
					if !strings.Contains(got.answer, tt.want) || got.attempt != tt.attempt || got.after != tt.by {
						t.Errorf("saw %q at push %d after %s, want %q at push %d after %s", got.answer, got.attempt, got.after, tt.want, tt.attempt, tt.by)
					}
					time.Sleep(2 * time.Minute)
					if n := f.runs.Load(); n != 1 {
						t.Errorf("the backend ran %d times", n)
					}
					for i, p := range f.nodes {
						if n := p.m.app.calls().inFlight(); n != 0 || len(p.m.places) != 0 || f.claims(i).held() != 0 {
							t.Errorf("node %d: %d in flight, %d places taken, %d waiting", i, n, len(p.m.places), f.claims(i).held())
						}
					}
					late := 0.0
					for _, p := range f.nodes {
						late += counted(t, p.m.app.metrics().replies, outcomeLate)
					}
					if want := tt.after > 14*time.Second && tt.after < time.Minute && tt.attempt == 3 && tt.want == slow; (late == 1) != want {
						t.Errorf("%v answers are late", late)
					}
				})
			})
		}
	}
}

// TestSharedLastWhateverPushesSays: nine seconds after the first push is counted from the one that came to another node, also of a message
// that does not say when it was made.
func TestSharedLastWhateverPushesSays(t *testing.T) {
	t.Parallel()
	created := regexp.MustCompile("<CreateTime>.*</CreateTime>")
	for _, nodes := range [][]int{{0, 1, 2}, {0, 0, 1}, {0, 1, 1}, {0, 1, 0}} {
		for pushes, want := range map[int]seen{
			2:  {"success", 9500 * time.Millisecond, 2},
			5:  {"success", 14500 * time.Millisecond, 3},
			10: {"success", 14500 * time.Millisecond, 3},
		} {
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, 3, func(m *Message) { m.Pushes = pushes }, after(30*time.Second, replyXML))
				if got := f.send(created.ReplaceAllString(paceMessage(1), ""), nodes...); got != want {
					t.Errorf("pushes %d, to nodes %v: %+v, want %+v", pushes, nodes, got, want)
				}
				time.Sleep(time.Minute)
				if n := f.runs.Load(); n != 1 {
					t.Errorf("pushes %d, to nodes %v: the backend ran %d times", pushes, nodes, n)
				}
			})
		}
	}
}

// TestSharedWithoutMessages: the same when no node hears another one.
func TestSharedWithoutMessages(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 2, nil, after(7*time.Second, replyXML))
		c := f.claims(1)
		_ = c.shared()
		synctest.Wait()
		f.freeze(1) // it hears nothing; that it does not beat either, nobody looks at
		got := f.send(paceMessage(1), 0, 1)
		if got.answer != replyXML || got.attempt != 2 || got.after < 7*time.Second || got.after > 7*time.Second+lookEvery {
			t.Errorf("%+v", got)
		}
		if n := f.runs.Load(); n != 1 {
			t.Errorf("the backend ran %d times", n)
		}
	})
}

// TestSharedQuickAnswerGetsLost: an answer that came at once and did not reach WeChat is had from the node that has it, sealed
// anew, for a minute; after that the answer is success, also when that node is gone.
func TestSharedQuickAnswerGetsLost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 3, nil, func(_, run int, w http.ResponseWriter, _ *http.Request) {
			_, _ = fmt.Fprintf(w, "<xml><Content>run %d</Content></xml>", run)
		})
		message := paceMessage(1)
		first, _ := f.nodes[0].push(message)
		time.Sleep(wechatWait)
		for _, node := range []int{1, 2, 1, 0} {
			again, ok := f.nodes[node].push(message)
			if !ok || again != first || again == "" {
				t.Errorf("node %d: %q, first it was %q", node, again, first)
			}
		}
		time.Sleep(answerLife + time.Second)
		for _, node := range []int{0, 1} {
			if again, ok := f.nodes[node].push(message); !ok || again != "success" {
				t.Errorf("node %d later: %q", node, again)
			}
		}
		// An answer that nobody asked for, of a node that is gone.
		other := paceMessage(2)
		_, _ = f.nodes[0].push(other)
		f.freeze(0)
		time.Sleep(answerLife + time.Second)
		if again, ok := f.nodes[1].push(other); !ok || again != "success" {
			t.Errorf("of a node that is gone: %q", again)
		}
		if n := f.runs.Load(); n != 2 {
			t.Errorf("the backend ran %d times for two messages", n)
		}
	})
}

// TestSharedNoRetryOfWeChats: what comes later than a retry of WeChat's can is no reason to have a message begun once more that a node had
// which is gone, whatever pushes says.
func TestSharedNoRetryOfWeChats(t *testing.T) {
	t.Parallel()
	for _, pushes := range []int{3, 10} {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t, 2, func(m *Message) { m.Pushes = pushes }, after(0, replyXML))
			message := paceMessage(1)
			if answer, _ := f.nodes[0].push(message); answer != replyXML {
				t.Errorf("pushes %d: %q", pushes, answer)
			}
			f.freeze(0)
			time.Sleep(wechatPushes*wechatWait + takeOverSlack + time.Second)
			began := time.Now()
			for time.Since(began) < 20*time.Second {
				if again, ok := f.nodes[1].push(message); ok && again != "success" {
					t.Errorf("pushes %d: %q", pushes, again)
				}
				time.Sleep(time.Second)
			}
			if n := f.runs.Load(); n != 1 {
				t.Errorf("pushes %d: the backend ran %d times", pushes, n)
			}
		})
	}
}

// TestSharedOwnerDies: the message of a node that dies, or is stopped for a while, is begun once more; what that node has to say
// when it wakes counts nothing.
func TestSharedOwnerDies(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		frozen  time.Duration // when
		nodes   []int
		attempt int
		latest  time.Duration
	}{
		"at once":              {0, []int{0, 1, 2}, 2, 8 * time.Second},
		"while others wait":    {5500 * time.Millisecond, []int{0, 1, 2}, 2, 10 * time.Second},
		"the last takes over":  {0, []int{0, 0, 1}, 3, 13 * time.Second},
		"it comes back to one": {4 * time.Second, []int{0, 1, 1}, 2, 9900 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				woken := make(chan struct{})
				f := newFleet(t, 3, nil, func(node, run int, w http.ResponseWriter, _ *http.Request) {
					if node == 0 {
						<-woken
					}
					_, _ = fmt.Fprintf(w, "<xml><Content>run %d</Content></xml>", run)
				})
				message := paceMessage(1)
				_ = f.claims(0).shared()
				synctest.Wait()
				time.AfterFunc(tt.frozen, func() { f.freeze(0) })
				// A frozen node takes no push: what WeChat sends there goes unanswered.
				began, got := time.Now(), seen{}
				for i, node := range tt.nodes {
					if i > 0 && node == 0 {
						time.Sleep(wechatWait)
						continue
					}
					if answer, ok := f.nodes[node].push(message); ok {
						got = seen{answer, time.Since(began), i + 1}
						break
					}
				}
				if got.answer != "<xml><Content>run 2</Content></xml>" || got.attempt != tt.attempt || got.after > tt.latest {
					t.Errorf("%+v", got)
				}
				f.thaw(0)
				close(woken)
				synctest.Wait()
				for node := range f.nodes {
					if again, ok := f.nodes[node].push(message); !ok || again != got.answer {
						t.Errorf("node %d later: %q", node, again)
					}
				}
				if n := f.runs.Load(); n != 2 {
					t.Errorf("the backend ran %d times", n)
				}
				time.Sleep(time.Minute)
				for i, p := range f.nodes {
					if n := p.m.app.calls().inFlight(); n != 0 || len(p.m.places) != 0 {
						t.Errorf("node %d: %d in flight, %d places taken", i, n, len(p.m.places))
					}
				}
			})
		})
	}
}

// TestSharedDeadline: a node is dead 4 to 5 seconds after its last sign of life, for a push that waits for it all the time. The
// documentation says so.
func TestSharedDeadline(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		began := make(chan time.Time, 2)
		f := newFleet(t, 2, nil, func(int, int, http.ResponseWriter, *http.Request) {
			began <- time.Now()
			time.Sleep(20 * time.Second)
		})
		_ = f.claims(0).shared()
		synctest.Wait() // it has shown that it lives
		lastSign := time.Now()
		f.freeze(0)
		var wg sync.WaitGroup
		message := paceMessage(1)
		for node := range f.nodes {
			wg.Go(func() { _, _ = f.nodes[node].push(message) })
			synctest.Wait()
		}
		wg.Wait()
		<-began
		select {
		case at := <-began:
			if d := at.Sub(lastSign); d < 4*time.Second || d > 5*time.Second {
				t.Errorf("taken over after %s", d)
			}
		default:
			t.Error("nobody took the message over")
		}
		time.Sleep(time.Minute)
	})
	for file, words := range map[string]string{
		"../docs/pushes.md": "is taken for dead 4 to 5 seconds after its last sign of life", "../docs/pushes.zh-CN.md": "最后一次心跳之后 4 到 5 秒视为已死",
	} {
		if text, err := os.ReadFile(file); err != nil || !strings.Contains(string(text), words) {
			t.Errorf("%s says something else: %v", file, err)
		}
	}
}

// TestSharedJoinsOnce: a push that has joined one on its own node, and goes on to the node that took the message over, is counted once.
func TestSharedJoinsOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 2, nil, func(node, run int, w http.ResponseWriter, _ *http.Request) {
			time.Sleep([]time.Duration{7500 * time.Millisecond, 3 * time.Second}[node])
			_, _ = fmt.Fprintf(w, "<xml><Content>run %d</Content></xml>", run)
		})
		message := paceMessage(1)
		_ = f.claims(0).shared()
		synctest.Wait()
		f.freeze(0)
		if _, ok := f.nodes[0].push(message); ok {
			t.Fatal("answered before the backend was")
		}
		var wg sync.WaitGroup
		for node := range f.nodes {
			wg.Go(func() {
				if answer, ok := f.nodes[node].push(message); !ok || answer != "<xml><Content>run 2</Content></xml>" {
					t.Errorf("node %d: %q, %v", node, answer, ok)
				}
			})
		}
		wg.Wait()
		for node := range f.nodes {
			if n := testutil.ToFloat64(f.nodes[node].m.app.metrics().joined); n != 1 {
				t.Errorf("node %d: %v pushes joined", node, n)
			}
		}
		time.Sleep(time.Minute)
	})
}

// TestSharedCatchesUp: what a node took on while the store failed is known on all nodes once that is back, in time for WeChat's
// next push.
func TestSharedCatchesUp(t *testing.T) {
	t.Parallel()
	for name, takes := range map[string]time.Duration{"running": 7 * time.Second, "answered": 0} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, 2, nil, after(takes, replyXML))
				_ = f.claims(0).shared()
				synctest.Wait()
				f.claims(0).failed(errors.New("no answer"))
				began := time.Now()
				if takes == 0 { // and WeChat does not get the answer
					_, _ = f.nodes[0].push(paceMessage(1))
					time.Sleep(wechatWait)
				} else if _, ok := f.nodes[0].push(paceMessage(1)); ok {
					t.Fatal("answered before the backend was")
				}
				if _, err := f.claims(1).peek(onlyPush(t, f)); err != nil {
					t.Errorf("nothing is claimed %v after the push: %v", time.Since(began), err)
				}
				if got := f.send(paceMessage(1), 1); got.answer != replyXML {
					t.Errorf("%+v", got)
				}
				if n := f.runs.Load(); n != 1 {
					t.Errorf("the backend ran %d times", n)
				}
				time.Sleep(maxHold)
			})
		})
	}
}

// onlyPush is the one message that node 0 knows.
func onlyPush(t *testing.T, f *fleet) (id pushID) {
	t.Helper()
	calls := f.nodes[0].m.app.calls()
	calls.mu.Lock()
	defer calls.mu.Unlock()
	if n := len(calls.calls) + calls.kept.count; n != 1 {
		t.Fatalf("%d messages", n)
	}
	for id = range calls.calls {
	}
	for k := range calls.kept.all {
		id = k.id()
	}
	return id
}

// claimFaults is a node's way to the store, on which the answer to the first claim of a message gets lost.
type claimFaults struct {
	*tokens.MemStore
	repeats bool // the claim is made again then, as a client of Redis does on a fresh connection; else the node never hears
	lost    atomic.Bool
}

func (s *claimFaults) ClaimAll(claims []tokens.Claim, within time.Duration) error {
	if claims[0].Name[0] == 'p' && s.lost.CompareAndSwap(false, true) {
		if err := s.MemStore.ClaimAll(slices.Clone(claims), within); err != nil {
			return err
		}
		if !s.repeats {
			time.Sleep(within)
			return errors.New("no answer")
		}
	}
	return s.MemStore.ClaimAll(claims, within)
}

// TestSharedClaimWhoseAnswerIsLost: the message is this node's all the same, its backend runs once, and each push counts once.
func TestSharedClaimWhoseAnswerIsLost(t *testing.T) {
	t.Parallel()
	for name, repeats := range map[string]bool{"and the claim is made again": true, "for good": false} {
		for _, nodes := range [][]int{{0, 1, 2}, {0, 0, 1}, {0, 0, 0}, {0, 1, 0}} {
			t.Run(fmt.Sprint(name, nodes), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					f := newFleet(t, 3, nil, after(12*time.Second, replyXML))
					env := *f.nodes[0].m.app.env
					env.Store = &claimFaults{MemStore: f.store, repeats: repeats}
					f.claims(0).use(&env)
					got := f.send(paceMessage(1), nodes...)
					if got.answer != replyXML || got.attempt != 3 || got.after < 12*time.Second || got.after > 12*time.Second+claimWait {
						t.Errorf("%+v", got)
					}
					if n := f.runs.Load(); n != 1 {
						t.Errorf("the backend ran %d times", n)
					}
					if s, err := f.claims(1).peek(pushIDOf(t, f.nodes[0].m, paceMessage(1))); err != nil || repeats && s.count != 3 {
						t.Errorf("the claim counts %d pushes, %v", s.count, err)
					}
					time.Sleep(maxHold)
				})
			})
		}
	}
}

// lostSwaps is a node's way to the store, on which the answer to each change of a claim gets lost: a client of Redis makes it once
// more then, on a fresh connection.
type lostSwaps struct {
	*tokens.MemStore
	meanwhile func(held []byte) (next []byte) // what another node makes of the claim in between; nil: nothing
}

func (s *lostSwaps) SwapClaim(ctx context.Context, name string, old, next []byte, ttl time.Duration) (bool, error) {
	if swapped, err := s.MemStore.SwapClaim(ctx, name, old, next, ttl); !swapped || err != nil {
		return swapped, err
	}
	if s.meanwhile != nil {
		if swapped, err := s.MemStore.SwapClaim(ctx, name, next, s.meanwhile(next), 0); !swapped || err != nil {
			return swapped, errors.Join(err, errors.New("not changed"))
		}
	}
	return s.MemStore.SwapClaim(ctx, name, old, next, ttl)
}

// TestSharedSwapWhoseAnswerIsLost: a push counts once, so that the third one is the last, and no message is given up or taken over twice.
func TestSharedSwapWhoseAnswerIsLost(t *testing.T) {
	t.Parallel()
	late := func(held []byte) []byte {
		s, err := parseStanding(held)
		if err != nil || s.state != claimRunning {
			return held
		}
		s.state = claimLate
		return s.encode()
	}
	for name, meanwhile := range map[string]func([]byte) []byte{"": nil, "and the claim has changed again": late} {
		for _, nodes := range [][]int{{0, 1, 2}, {0, 1, 0}, {0, 1, 1}, {0, 0, 1}, {1, 0, 0}} {
			t.Run(fmt.Sprint(nodes, name), func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					f := newFleet(t, 3, nil, after(time.Minute, replyXML))
					for _, p := range f.nodes {
						env := *p.m.app.env
						env.Store = &lostSwaps{f.store, meanwhile}
						p.m.app.shared.claims.use(&env)
					}
					message := paceMessage(1)
					var wg sync.WaitGroup
					for i, node := range nodes {
						wg.Go(func() {
							time.Sleep(time.Duration(i) * 100 * time.Millisecond)
							if answer, ok := f.nodes[node].push(message); ok != (i == 2) || ok && answer != "success" {
								t.Errorf("push %d: %q, %v", i+1, answer, ok)
							}
						})
					}
					wg.Wait()
					if s, err := f.claims(1).peek(pushIDOf(t, f.nodes[0].m, message)); err != nil || s.count != 3 || s.run != 1 {
						t.Errorf("the claim counts %d pushes in run %d, %v", s.count, s.run, err)
					}
					time.Sleep(2 * time.Minute)
					if n := f.runs.Load(); n != 1 {
						t.Errorf("the backend ran %d times", n)
					}
				})
			})
		}
	}
}

// beatLog is a node's way to the store, which sees when the node shows that it lives.
type beatLog struct {
	*tokens.MemStore
	beat  func(context.Context) error     // before it arrives; nil: nothing is in the way
	claim func(first *tokens.Claim) error // the same for claims
	deaf  bool                            // the node hears nothing of others
	mu    sync.Mutex
	beats []time.Time // tried
	tries []time.Time // of a store that failed
	under int
}

func (s *beatLog) Beat(ctx context.Context, node string, ttl time.Duration) error {
	s.mu.Lock()
	s.beats = append(s.beats, time.Now())
	if s.under++; s.under > 1 {
		panic("two beats at once")
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.under--
		s.mu.Unlock()
	}()
	if s.beat != nil {
		if err := s.beat(ctx); err != nil {
			return err
		}
	}
	return s.MemStore.Beat(ctx, node, ttl)
}

func (s *beatLog) ClaimAll(claims []tokens.Claim, within time.Duration) error {
	if claims[0].Name[0] == 'n' {
		s.mu.Lock()
		s.tries = append(s.tries, time.Now())
		s.mu.Unlock()
	}
	if s.claim != nil {
		if err := s.claim(&claims[0]); err != nil {
			return err
		}
	}
	return s.MemStore.ClaimAll(claims, within)
}

func (s *beatLog) Hear(ctx context.Context, node string, heard func(string)) {
	if s.deaf {
		<-ctx.Done()
		return
	}
	s.MemStore.Hear(ctx, node, heard)
}

// longest is the longest time without one, from a time until now, and how many there were.
func (s *beatLog) longest(list *[]time.Time, from time.Time) (gap time.Duration, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := from
	for _, at := range append(slices.Clone(*list), time.Now()) {
		if at.After(from) {
			gap, last = max(gap, at.Sub(last)), at
			n++
		}
	}
	return gap, n - 1
}

// through has a node reach the store by a beatLog.
func (f *fleet) through(node int, log *beatLog) *beatLog {
	log.MemStore = f.store
	env := *f.nodes[node].m.app.env
	env.Store = log
	f.claims(node).use(&env)
	return log
}

// TestSharedBeatsWhileTheStoreFlaps: a node to whose claims the store says no as soon as it is back shows that it lives all the same,
// and tries claims ever more rarely; so others leave it its messages, and get its answers.
func TestSharedBeatsWhileTheStoreFlaps(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 2, nil, after(12*time.Second, replyXML))
		log := f.through(0, new(beatLog))
		_ = f.claims(0).shared()
		synctest.Wait()
		began := time.Now()
		ctx, stop := context.WithTimeout(t.Context(), 75*time.Second)
		defer stop()
		time.AfterFunc(time.Second, func() {
			for ctx.Err() == nil {
				f.claims(0).failed(errFlaky)
				time.Sleep(10 * time.Millisecond)
			}
		})
		got := f.send(paceMessage(1), 0, 1, 1)
		if got.answer != replyXML || got.attempt != 3 || got.after != 12*time.Second || f.runs.Load() != 1 {
			t.Errorf("%+v, the backend ran %d times", got, f.runs.Load())
		}
		time.Sleep(time.Minute)
		if gap, n := log.longest(&log.beats, began); gap > beatEvery || n < 60 {
			t.Errorf("it showed %d times that it lives, and for %v it did not", n, gap)
		}
		if gap, n := log.longest(&log.tries, time.Now().Add(-time.Minute)); gap < probeMost/2 || n == 0 || n > int(time.Minute/(probeMost/2)) {
			t.Errorf("the store was tried %d times in a minute, with %v between two at most", n, gap)
		}
		<-ctx.Done()
		time.Sleep(time.Second)
	})
}

// TestSharedTriesToBeat: so it does while no beat arrives.
func TestSharedTriesToBeat(t *testing.T) {
	t.Parallel()
	for name, beat := range map[string]func(context.Context) error{
		"no answer": func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
		"refused":   func(context.Context) error { return errFlaky },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, 1, nil, after(0, replyXML))
				log := f.through(0, &beatLog{beat: beat})
				began := time.Now()
				_ = f.claims(0).shared()
				time.Sleep(time.Minute)
				if gap, n := log.longest(&log.beats, began); gap > beatEvery || n < 60 {
					t.Errorf("it tried %d times, and for %v it did not", n, gap)
				}
			})
		})
	}
}

// TestSharedBeatsThatTakeLong: a node whose beats reach the store late, over a slow connection or to a busy master of a Cluster, is not taken for
// dead, and its messages are not begun again.
func TestSharedBeatsThatTakeLong(t *testing.T) {
	t.Parallel()
	for _, takes := range []time.Duration{claimWait + time.Millisecond, beatWait - time.Millisecond} {
		t.Run(takes.String(), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, 2, nil, after(12*time.Second, replyXML))
				var slow atomic.Bool
				f.through(0, &beatLog{beat: func(ctx context.Context) error {
					if !slow.Load() {
						return nil
					}
					select {
					case <-time.After(takes):
						return nil
					case <-ctx.Done():
						return ctx.Err()
					}
				}})
				_ = f.claims(0).shared()
				synctest.Wait()
				time.AfterFunc(500*time.Millisecond, func() { slow.Store(true) })
				got := f.send(paceMessage(1), 0, 1, 1)
				if got.answer != replyXML || got.attempt != 3 || f.runs.Load() != 1 {
					t.Errorf("%+v, the backend ran %d times", got, f.runs.Load())
				}
				if !f.claims(0).away.Load() {
					t.Error("a store that takes so long is used for claims")
				}
				slow.Store(false)
				time.Sleep(time.Minute)
				if !f.claims(0).steady(time.Second) {
					t.Error("a store that is quick again does not count as such")
				}
			})
		})
	}
}

// TestSharedBeatsWhileItCatchesUp: a store that is slow to take what it missed sees the node live.
func TestSharedBeatsWhileItCatchesUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 1, nil, after(0, replyXML))
		log := f.through(0, &beatLog{claim: func(first *tokens.Claim) error {
			if first.Name[0] == 'p' {
				time.Sleep(claimWait * 4 / 5)
			}
			return nil
		}})
		_ = f.claims(0).shared()
		synctest.Wait()
		f.claims(0).failed(errFlaky)
		calls, now := f.nodes[0].m.app.calls(), time.Now()
		for n := range 20 * caughtUpAtOnce {
			a := calls.arrive(shortSum(fmt.Append(nil, n)), now, 0, now.Unix()+300, f.nodes[0].m.pace())
			defer calls.finish(a.call, passiveReply{}, now) // a node with a message at hand does not end
		}
		time.Sleep(10 * time.Second)
		if left := len(calls.unclaimed(now)); left != 0 {
			t.Errorf("%d are not claimed yet", left)
		}
		if gap, _ := log.longest(&log.beats, now); gap > beatEvery+claimWait {
			t.Errorf("it gave no sign of life for %v", gap)
		}
	})
}

// TestSharedLateBeats: a node that was taken for dead, and lives again when its backend answers, looks whose the message is by then.
func TestSharedLateBeats(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		answers := make(chan struct{})
		f := newFleet(t, 2, nil, func(node, run int, w http.ResponseWriter, _ *http.Request) {
			if node == 0 {
				<-answers
			}
			_, _ = fmt.Fprintf(w, "<xml><Content>run %d</Content></xml>", run)
		})
		var lost atomic.Bool
		f.through(0, &beatLog{deaf: true, beat: func(context.Context) error {
			if lost.Load() {
				return context.DeadlineExceeded
			}
			return nil
		}})
		_, _ = f.claims(0).shared(), f.claims(1).shared()
		synctest.Wait()
		lost.Store(true) // after the first
		message := paceMessage(1)
		var wg sync.WaitGroup
		time.Sleep(1900 * time.Millisecond)
		wg.Go(func() { // its answer is another one than WeChat has
			if answer, ok := f.nodes[0].push(message); ok {
				t.Errorf("node 0: %q", answer)
			}
		})
		time.Sleep(50 * time.Millisecond)
		const second = "<xml><Content>run 2</Content></xml>"
		if answer, ok := f.nodes[1].push(message); !ok || answer != second {
			t.Errorf("node 1: %q, %v", answer, ok)
		}
		lost.Store(false)
		time.Sleep(450 * time.Millisecond)
		if f.claims(0).shared() == nil {
			t.Error("the store is not back")
		}
		close(answers) // less than answerAfter after its push
		wg.Wait()
		for node := range f.nodes {
			if answer, ok := f.nodes[node].push(message); !ok || answer != second {
				t.Errorf("node %d later: %q, %v", node, answer, ok)
			}
		}
	})
}

// TestSharedSteady is when a node is sure that its messages are its own.
func TestSharedSteady(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 1, nil, after(0, replyXML))
		var lost atomic.Bool
		lost.Store(true)
		f.through(0, &beatLog{beat: func(context.Context) error {
			if lost.Load() {
				return context.DeadlineExceeded
			}
			return nil
		}})
		c := f.claims(0)
		steady := func(took time.Duration, want bool) {
			t.Helper()
			synctest.Wait()
			if c.steady(took) != want {
				t.Errorf("%v after the first beat, of a message of %v ago: want %v", time.Since(c.start), took, want)
			}
		}
		time.Sleep(time.Hour)
		_ = c.shared()
		steady(0, true)
		time.Sleep(deadAfter - 1)
		steady(0, true)
		time.Sleep(time.Nanosecond)
		steady(0, false) // it was never seen
		lost.Store(false)
		time.Sleep(2 * beatEvery)
		took := 10 * time.Millisecond
		steady(took, true)
		lost.Store(true)
		time.Sleep(lateBeat)
		steady(took, false)
		lost.Store(false)
		for !c.steady(-takeOverTime - 1) { // as of a message that is yet to come
			time.Sleep(time.Millisecond)
		}
		steady(took, false) // it may be another's since
		time.Sleep(takeOverTime + took)
		steady(took, true)
		steady(took+beatEvery, false)
	})
}

// TestSharedBackFromTheDead: a node that lives again is not said to be dead, however short ago it was.
func TestSharedBackFromTheDead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 2, nil, after(0, replyXML))
		node := f.claims(0).node
		_ = f.claims(0).shared()
		synctest.Wait()
		f.freeze(0)
		for !f.claims(1).dead(node) {
			time.Sleep(peerEvery)
		}
		f.thaw(0)
		synctest.Wait()
		if f.claims(1).dead(node) {
			t.Error("it is dead although it lives")
		}
	})
}

// TestSharedMissedLongAgo: a node that was not seen once, long ago, is not dead because it is not seen once more.
func TestSharedMissedLongAgo(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 2, nil, after(0, replyXML))
		node := f.claims(0).node
		for range 2 {
			f.thaw(0)
			time.Sleep(time.Minute)
			f.freeze(0)
			time.Sleep(beatLife + time.Second)
			if f.claims(1).dead(node) {
				t.Error("dead at the first look")
			}
		}
		for range int(deadAfter/peerEvery) + 1 {
			time.Sleep(peerEvery)
			_ = f.claims(1).dead(node)
		}
		if !f.claims(1).dead(node) {
			t.Error("not dead although it is not seen for long")
		}
	})
}

// TestSharedNeverAThird: when the node that took over dies too, the message is lost and said to be.
func TestSharedNeverAThird(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		never := make(chan struct{})
		f := newFleet(t, 3, func(m *Message) { m.FallbackText = "稍后回复您" }, func(int, int, http.ResponseWriter, *http.Request) { <-never })
		for node := range f.nodes {
			_ = f.claims(node).shared()
		}
		synctest.Wait()
		f.freeze(0)
		time.AfterFunc(7*time.Second, func() { f.freeze(1) })
		got := f.send(paceMessage(1), 0, 1, 2)
		if !strings.Contains(got.answer, "稍后回复您") || got.attempt != 3 {
			t.Errorf("%+v", got)
		}
		if n := f.runs.Load(); n != 2 {
			t.Errorf("the backend ran %d times", n)
		}
		if n := counted(t, f.nodes[2].m.app.metrics().replies, outcomeLost); n != 1 {
			t.Errorf("%v are lost", n)
		}
		close(never)
		synctest.Wait()
	})
}

// TestSharedCounts: the third push is the last, wherever the others came.
func TestSharedCounts(t *testing.T) {
	t.Parallel()
	for _, nodes := range [][]int{{0, 1, 2}, {0, 1, 0}, {0, 1, 1}, {0, 0, 1}} {
		synctest.Test(t, func(t *testing.T) {
			f := newFleet(t, 3, nil, after(time.Minute, replyXML))
			message := paceMessage(1)
			var wg sync.WaitGroup
			for i, node := range nodes {
				wg.Go(func() {
					time.Sleep(time.Duration(i) * 100 * time.Millisecond)
					began := time.Now()
					answer, ok := f.nodes[node].push(message)
					if last := i == 2; ok != last || last && (answer != "success" || time.Since(began) != defaultReplyTimeout) {
						t.Errorf("%v: push %d: %q, %v after %s", nodes, i+1, answer, ok, time.Since(began))
					}
				})
			}
			wg.Wait()
			time.Sleep(2 * time.Minute)
		})
	}
}

// TestSharedClocks: the clocks of nodes may differ; when the first push came is told by the claim.
func TestSharedClocks(t *testing.T) {
	t.Parallel()
	s := standing{owner: "abc", life: 6 * time.Minute, count: 1, run: 1, state: claimRunning, left: 5*time.Minute + 51*time.Second}
	if s.age() != 9*time.Second {
		t.Errorf("age %v", s.age())
	}
	for _, want := range []standing{
		{owner: "ABCDEFGHIJ", life: 361 * time.Second, count: 1, run: 1, state: claimRunning},
		{owner: "ABCDEFGHIJ", life: 361 * time.Second, count: 3, run: 2, state: claimDelivered},
		{owner: "ABCDEFGHIJ", life: 361 * time.Second, count: 3, run: 2, state: claimDelivered, mark: newMark()},
		{owner: "ABCDEFGHIJ", life: 361 * time.Second, count: 1, run: 1, state: claimRunning, mark: newMark()},
	} {
		if got, err := parseStanding(want.encode()); got != want || err != nil {
			t.Errorf("%s: %+v, %v", want.encode(), got, err)
		}
	}
	for _, bad := range []string{"", "a", "a b", "a 1 2", "a 1 2 3", "a 1 x 3 r", "a 1 2 x r", "a 1 2 3 rr", "a 1 2 3 r 5", "a 1 2 3 r ABCDEFGHI", "a 1 2 3 r ABCDEFGH 5"} {
		if _, err := parseStanding([]byte(bad)); err == nil {
			t.Errorf("%q is taken for a claim", bad)
		}
	}
}

// TestSharedCrowd: what finds no place on one node is begun by another.
func TestSharedCrowd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 2, func(m *Message) { m.MaxInFlight = 1 }, func(node, _ int, w http.ResponseWriter, _ *http.Request) {
			if node == 0 {
				time.Sleep(time.Minute)
			}
			_, _ = io.WriteString(w, replyXML)
		})
		for i := range 2 { // one runs, one waits
			go f.nodes[0].push(paceMessage(100 + i))
			synctest.Wait()
		}
		got := f.send(paceMessage(1), 0, 1)
		if got.answer != replyXML || got.attempt != 2 || got.after != wechatWait {
			t.Errorf("%+v", got)
		}
		time.Sleep(2 * time.Minute)
	})
}

// TestSharedPlainGuard: a timestamp and nonce that came to one node with a text are refused with another one on all, and the
// refused text leaves nothing behind.
func TestSharedPlainGuard(t *testing.T) {
	t.Parallel()
	store := tokens.NewMemStore()
	node := func() *Message {
		app, ctx := newTestApp(t, fmt.Sprintf(`{"accounts": [{"appid": %q, "secret": "s", "tokens": [%q]}]}`, accountID, accountToken))
		app.env.Store = store
		m := new(Message)
		if err := m.Provision(ctx); err != nil {
			t.Fatal(err)
		}
		return m
	}
	a, b := node(), node()
	at := time.Now() // of all pushes, or a second may end between two of them
	plain := func(message, nonce string) *http.Request {
		s := accountSender(t)
		s.nonce, s.at = nonce, at
		r := s.push("/"+accountID, message)
		q := r.URL.Query()
		q.Del("msg_signature")
		q.Del("encrypt_type")
		r.URL.RawQuery = q.Encode()
		r.Body, r.ContentLength = io.NopCloser(strings.NewReader(message)), int64(len(message))
		return r
	}
	backend := &answering{text: replyXML}
	message, forged := textMessage("x"), textMessage("y")
	if rec := serve(t, a, plain(message, "1"), backend); rec.Body.String() != replyXML {
		t.Errorf("first: %q", rec.Body)
	}
	for range 2 {
		if rec := serve(t, b, plain(forged, "1"), nil); rec.Code != http.StatusForbidden {
			t.Errorf("another text on another node: %d %q", rec.Code, rec.Body)
		}
	}
	if rec := serve(t, b, plain(message, "1"), nil); rec.Body.String() != replyXML {
		t.Errorf("the same text on another node: %d %q", rec.Code, rec.Body)
	}
	// The message whose text was tried to be passed off comes: it is new.
	if rec := serve(t, b, plain(forged, "2"), backend); rec.Body.String() != replyXML || backend.body != forged {
		t.Errorf("its own push: %d %q", rec.Code, rec.Body)
	}
}

// sharedWeChat is two nodes in front of one fake WeChat, for late replies.
func sharedWeChat(t *testing.T, pushes int) (nodes []*Message, wechat *fakeWeChat) {
	t.Helper()
	wechat = newFakeWeChat(t)
	store := tokens.NewMemStore()
	for range 2 {
		app, _ := newTestApp(t, gatewayConfig(wechat.URL))
		app.env.Store = store
		if len(nodes) == 0 {
			(&gateway{t: t, app: app}).authorize()
		}
		nodes = append(nodes, &Message{
			AppID: authorizerID, Pushes: pushes, ReplyTimeout: caddy.Duration(100 * time.Millisecond), SlowReply: slowCustomerService,
			BackendTimeout: caddy.Duration(time.Minute), MaxBody: 1 << 20, MaxInFlight: 1, TimestampWindow: caddy.Duration(time.Minute),
			app: app, places: make(chan struct{}, 1), clustered: true,
		})
	}
	wechat.seen()
	return nodes, wechat
}

// TestSharedLateReply: when the last push came to another node, the node that has the message delivers its answer late, once.
func TestSharedLateReply(t *testing.T) {
	t.Parallel()
	nodes, wechat := sharedWeChat(t, 2)
	message := textMessage("x")
	gate, begun := make(chan struct{}), make(chan struct{})
	ctx, hangUp := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	push := func(m *Message, ctx context.Context, next caddyhttp.HandlerFunc) *paceWriter {
		r := platformSender(t).push("/", message).WithContext(ctx)
		rec := &paceWriter{ResponseRecorder: httptest.NewRecorder(), flushed: make(chan struct{})}
		defer func() {
			if v := recover(); v != nil && v != http.ErrAbortHandler {
				t.Errorf("panic: %v", v)
			}
		}()
		if err := m.ServeHTTP(rec, caddyhttp.PrepareRequest(r, caddy.NewReplacer(), rec, &caddyhttp.Server{}), next); err != nil {
			t.Error(err)
		}
		return rec
	}
	wg.Go(func() {
		push(nodes[0], ctx, func(w http.ResponseWriter, _ *http.Request) error {
			close(begun)
			<-gate
			_, _ = io.WriteString(w, lateXML("text", "<Content>c</Content>"))
			return nil
		})
	})
	<-begun
	hangUp()
	rec := push(nodes[1], t.Context(), func(http.ResponseWriter, *http.Request) error {
		t.Error("the other node's backend ran")
		return nil
	})
	if rec.Body.String() != "success" {
		t.Errorf("the last push got %q", rec.Body)
	}
	close(gate)
	wg.Wait()
	sent := 0
	for _, c := range wechat.seen() {
		if c.Path == customServiceAPI {
			sent++
		}
	}
	if sent != 1 || counted(t, nodes[0].app.metrics().lateReplies, "ok") != 1 {
		t.Errorf("sent %d times", sent)
	}
}

// TestSharedAnswerIsSealed: another node gets the answer from the store, and who reads the store does not, if there is a
// seal_key; without one who reads the store does, and the documents say so.
func TestSharedAnswerIsSealed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 2, nil, after(4*time.Second, replyXML))
		message := paceMessage(1)
		if got := f.send(message, 0); got.answer != replyXML {
			t.Errorf("%+v", got)
		}
		f.freeze(0) // the answer that took long is in the store, and needs nobody
		if got := f.send(message, 1); got.answer != replyXML || got.after != 0 {
			t.Errorf("%+v", got)
		}
		id := pushIDOf(t, f.nodes[0].m, message)
		data, err := f.store.Peek(t.Context(), answerName(id, 1))
		if err != nil || !crypto.IsSealed(data) || strings.Contains(string(data), "Content") {
			t.Errorf("in the store: %q, %v", data, err)
		}

		store := *f.claims(0).shared()
		store.sealer = nil
		if err := f.claims(0).keepAnswer(t.Context(), &store, id, 2, passiveReply{outcome: outcomeSealed, body: []byte(replyXML)}); err != nil {
			t.Fatal(err)
		}
		if data, err := f.store.Peek(t.Context(), answerName(id, 2)); err != nil || !strings.Contains(string(data), replyXML) {
			t.Errorf("in the store without a seal_key: %q, %v", data, err)
		}
	})
	for file, words := range map[string]string{
		"../docs/pushes.md": "without one they are there in plaintext", "../docs/pushes.zh-CN.md": "没有配置 `seal_key` 则是明文",
	} {
		if text, err := os.ReadFile(file); err != nil || !strings.Contains(string(text), words) {
			t.Errorf("%s says something else: %v", file, err)
		}
	}
}

// pushIDOf is the identity of a message to the plain account.
func pushIDOf(t *testing.T, m *Message, message string) pushID {
	t.Helper()
	p := newPush()
	defer p.release()
	r := accountSender(t).push("/"+accountID, message)
	if err := p.query.parse(r.URL.RawQuery); err != nil {
		t.Fatal(err)
	}
	_, candidates := m.candidates(r.URL.Path)
	if err := p.readBody(httptest.NewRecorder(), r, 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := p.open(candidates); err != nil {
		t.Fatal(err)
	}
	return p.identity(accountID, r)
}

// TestSharedReload: a push that is held under one configuration gets its answer after a reload, on both sides.
func TestSharedReload(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 2, nil, after(7*time.Second, replyXML))
		time.AfterFunc(6*time.Second, func() {
			for _, p := range f.nodes {
				next := *p.m.app.env
				p.m.app.shared.claims.use(&next)
			}
		})
		if got := f.send(paceMessage(1), 0, 1); got.answer != replyXML || got.after != 7*time.Second {
			t.Errorf("%+v", got)
		}
		if n := f.runs.Load(); n != 1 {
			t.Errorf("the backend ran %d times", n)
		}
	})
}

// TestSharedStops: a node whose last configuration ends is alive for others until its backends are done.
func TestSharedStops(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFleet(t, 2, nil, after(12*time.Second, replyXML))
		time.AfterFunc(time.Second, f.claims(0).close)
		if got := f.send(paceMessage(1), 0, 1, 1); got.answer != replyXML || got.attempt != 3 {
			t.Errorf("%+v", got)
		}
		if n := f.runs.Load(); n != 1 {
			t.Errorf("the backend ran %d times", n)
		}
		time.Sleep(maxHold)
		f.claims(0).work.Wait()
	})
}

func TestDeduplicationNeedsAStore(t *testing.T) {
	t.Parallel()
	_, ctx := newTestApp(t, testConfig(""))
	for value, want := range map[string]string{"cluster": "store redis", "both": "want cluster or local", "local": "", "": ""} {
		m := new(Message)
		if err := json.Unmarshal([]byte(`{"deduplication": "`+value+`"}`), m); err != nil {
			t.Fatal(err)
		}
		err := m.Provision(ctx)
		switch {
		case (err == nil) != (want == ""), err != nil && !strings.Contains(err.Error(), want):
			t.Errorf("%q: %v, want %q", value, err, want)
		case err == nil && (m.clustered || m.Deduplication != deduplicateLocal):
			t.Errorf("%q with files: %q", value, m.Deduplication)
		}
	}
	if n := testutil.ToFloat64(newMetrics(tokens.NewManager(), newCallTable(nil)).degraded); n != 0 {
		t.Errorf("degraded is %v at first", n)
	}
}

// TestSharedStoreUnderAnotherName: reloads take a node to another state of the same store, by another one or by another address of it.
// What it has at its backends, or has answered, is its own still, and is not begun again.
func TestSharedStoreUnderAnotherName(t *testing.T) {
	t.Parallel()
	for name, took := range map[string]time.Duration{"answered": 0, "at the backend": 12 * time.Second} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := newFleet(t, 2, nil, after(took, replyXML))
				before, now := f.nodes[0].m.app, f.nodes[1].m.app
				state, err := acquireShared(t.Name(), "redis", before.shared)
				if err != nil {
					t.Fatal(err)
				}
				own := now.shared
				t.Cleanup(func() {
					synctest.Wait()
					now.shared = own
					if err := releaseShared(t.Name()); err != nil {
						t.Error(err)
					}
				})
				message := paceMessage(1)
				state.claims.use(now.env)
				now.shared = state
				time.AfterFunc(time.Second, before.shared.claims.close)
				began := time.Now()
				first, _ := f.nodes[0].push(message)
				time.Sleep(time.Until(began.Add(wechatWait)))
				again, ok := f.nodes[1].push(message)
				if !ok && took > 2*wechatWait {
					again, ok = f.nodes[1].push(message)
				}
				if !ok || again != replyXML || took == 0 && first != again {
					t.Errorf("%q, first it was %q", again, first)
				}
				if n := f.runs.Load(); n != 1 {
					t.Errorf("the backend ran %d times", n)
				}
				time.Sleep(redisGrace)
			})
		})
	}
}
