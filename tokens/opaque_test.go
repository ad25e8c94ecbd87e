package tokens

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

// opaqueNode is one node on a store that may be shared.
func opaqueNode(t *testing.T, store Store, sealer *crypto.Sealer) *Manager {
	t.Helper()
	client, err := NewClient(ClientOptions{Origins: []string{"http://127.0.0.1:1"}})
	if err != nil {
		t.Fatal(err)
	}
	m := NewManager()
	m.Use(&Environment{Store: store, Sealer: sealer, API: client})
	t.Cleanup(m.Close)
	return m
}

func opaqueSealer(t *testing.T) *crypto.Sealer {
	t.Helper()
	sealer, err := crypto.NewSealer(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	return sealer
}

func opaqueClaims() OpaqueClaims {
	return OpaqueClaims{
		Client: "crm", KeyFingerprint: "0123456789abcdef", AppID: "wx2222222222222222", Platform: "wx1111111111111111",
		Kind: KindAuthorizer, ExpiresAt: time.Unix(time.Now().Add(2*time.Hour).Unix(), 0),
	}
}

func mustIssue(t *testing.T, m *Manager, c OpaqueClaims) string {
	t.Helper()
	token, err := m.IssueOpaque(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return token.Reveal()
}

func TestOpaqueRoundTrip(t *testing.T) {
	t.Parallel()
	m := opaqueNode(t, NewMemStore(), opaqueSealer(t))
	want := opaqueClaims()
	token := mustIssue(t, m, want)
	if !regexp.MustCompile(`^[A-Za-z0-9_-]{1,512}$`).MatchString(token) {
		t.Errorf("token %q is not of the shape that SDKs take", token)
	}
	got, err := m.OpenOpaque(t.Context(), token)
	if err != nil || got != want {
		t.Errorf("opened %+v, %v; want %+v", got, err, want)
	}
	if again := mustIssue(t, m, want); again == token {
		t.Error("two tokens for the same claims are the same")
	}
	raw, _ := base64.RawURLEncoding.DecodeString(token)
	for _, claim := range []string{want.Client, want.KeyFingerprint, want.AppID, want.Platform} {
		if bytes.Contains(raw, []byte(claim)) {
			t.Errorf("token shows %q", claim)
		}
	}
}

func TestOpaqueSurvivesRestartOnEveryNode(t *testing.T) {
	t.Parallel()
	for _, sealer := range map[string]*crypto.Sealer{"sealed": opaqueSealer(t), "unsealed": nil} {
		store := NewMemStore()
		token := mustIssue(t, opaqueNode(t, store, sealer), opaqueClaims())
		other := opaqueNode(t, store, sealer)
		if _, err := other.OpenOpaque(t.Context(), token); err != nil {
			t.Errorf("another node: %v", err)
		}
		if _, err := other.OpenOpaque(t.Context(), mustIssue(t, other, opaqueClaims())); err != nil {
			t.Errorf("its own token: %v", err)
		}
	}
}

func TestOpaqueOfAnotherStore(t *testing.T) {
	t.Parallel()
	token := mustIssue(t, opaqueNode(t, NewMemStore(), nil), opaqueClaims())
	if _, err := opaqueNode(t, NewMemStore(), nil).OpenOpaque(t.Context(), token); !errors.Is(err, ErrOpaqueUnknown) {
		t.Errorf("got %v, want ErrOpaqueUnknown", err)
	}
}

func TestOpaqueExpires(t *testing.T) {
	t.Parallel()
	m := opaqueNode(t, NewMemStore(), nil)
	c := opaqueClaims()
	c.ExpiresAt = time.Unix(time.Now().Add(-time.Second).Unix(), 0)
	got, err := m.OpenOpaque(t.Context(), mustIssue(t, m, c))
	if !errors.Is(err, ErrOpaqueExpired) || got != c {
		t.Errorf("got %+v, %v; want the claims and ErrOpaqueExpired", got, err)
	}
}

func TestOpaqueRefusesWhatItDidNotMake(t *testing.T) {
	t.Parallel()
	m := opaqueNode(t, NewMemStore(), nil)
	token := mustIssue(t, m, opaqueClaims())
	for name, bad := range map[string]string{
		"empty": "", "a real token's shape": strings.Repeat("80_abcdEFGH-", 12), "not base64": "!!!!", "newline": token[:20] + "\n" + token[20:],
		"carriage return": token + "\r", "padded": token + "=", "cut": token[:len(token)-4], "header alone": token[:7], "twice": token + token,
		"too long": strings.Repeat("A", 10_000), "the version before": "AQ" + token[2:],
	} {
		if _, err := m.OpenOpaque(t.Context(), bad); !errors.Is(err, ErrOpaqueUnknown) {
			t.Errorf("%s: got %v, want ErrOpaqueUnknown", name, err)
		}
	}
	raw, _ := base64.RawURLEncoding.DecodeString(token)
	var wg sync.WaitGroup
	for i := range raw {
		wg.Go(func() { // the bytes that name the key take a look into the store each
			altered := bytes.Clone(raw)
			altered[i] ^= 1
			if _, err := m.OpenOpaque(t.Context(), base64.RawURLEncoding.EncodeToString(altered)); !errors.Is(err, ErrOpaqueUnknown) {
				t.Errorf("byte %d altered: got %v, want ErrOpaqueUnknown", i, err)
			}
		})
	}
	wg.Wait()
}

func TestOpaqueAnyNames(t *testing.T) {
	t.Parallel()
	m := opaqueNode(t, NewMemStore(), nil)
	rapid.Check(t, func(t *rapid.T) {
		want := OpaqueClaims{
			Client: rapid.StringN(0, -1, 200).Draw(t, "client"), AppID: rapid.StringN(0, -1, 20).Draw(t, "appid"),
			Platform:       rapid.StringN(0, -1, 20).Draw(t, "platform"),
			KeyFingerprint: rapid.StringN(0, -1, 40).Draw(t, "fingerprint"), Kind: Kind(rapid.StringN(0, -1, 20).Draw(t, "kind")),
			ExpiresAt: time.Unix(time.Now().Unix()+rapid.Int64Range(10, 1<<40).Draw(t, "life"), 0),
		}
		token, err := m.IssueOpaque(context.Background(), want)
		if err != nil {
			t.Fatal(err)
		}
		got, err := m.OpenOpaque(context.Background(), token.Reveal())
		if err != nil || got != want || len(token.Reveal()) > MaxOpaqueLength {
			t.Fatalf("got %+v, %v", got, err)
		}
	})
}

func TestOpaqueNameTooLong(t *testing.T) {
	t.Parallel()
	m := opaqueNode(t, NewMemStore(), nil)
	for _, n := range []int{256, 255} {
		c := opaqueClaims()
		c.Client, c.KeyFingerprint = strings.Repeat("c", n), strings.Repeat("f", 200)
		if _, err := m.IssueOpaque(t.Context(), c); err == nil {
			t.Errorf("a client name of %d bytes was accepted", n)
		}
	}
}

// The longest name that the limit allows fits beside everything else a token says.
func TestOpaqueLongestName(t *testing.T) {
	t.Parallel()
	m := opaqueNode(t, NewMemStore(), nil)
	c := opaqueClaims()
	c.Client = strings.Repeat("c", MaxOpaqueName)
	token := mustIssue(t, m, c)
	if got, err := m.OpenOpaque(t.Context(), token); err != nil || got != c || len(token) > MaxOpaqueLength {
		t.Errorf("got %d characters, %v", len(token), err)
	}
}

func TestParseClaims(t *testing.T) {
	t.Parallel()
	whole, err := appendClaims(nil, opaqueClaims())
	if err != nil {
		t.Fatal(err)
	}
	for n := range whole {
		if _, ok := parseClaims(whole[:n]); ok {
			t.Errorf("the first %d bytes were accepted", n)
		}
	}
	if _, ok := parseClaims(append(whole, 0)); ok {
		t.Error("a byte too many was accepted")
	}
}

// oldKeys puts keys into a store, the newest first, made at these ages.
func oldKeys(t *testing.T, m *Manager, ages ...time.Duration) {
	t.Helper()
	var kept opaqueRecord
	for i, age := range ages {
		kept.Keys = append(kept.Keys, opaqueKeyRecord{
			ID: bytes.Repeat([]byte{byte(i + 1)}, opaqueKeyID), Key: bytes.Repeat([]byte{byte(i + 1)}, opaqueKeyBytes),
			Created: time.Now().Add(-age).Unix(),
		})
	}
	env, err := m.current()
	if err != nil {
		t.Fatal(err)
	}
	if err := m.storeRecord(t.Context(), env, opaqueName, kept); err != nil {
		t.Fatal(err)
	}
}

func TestOpaqueKeysRotate(t *testing.T) {
	t.Parallel()
	store := NewMemStore()
	oldKeys(t, opaqueNode(t, store, nil), time.Hour)
	before := opaqueNode(t, store, nil)
	token := mustIssue(t, before, opaqueClaims())

	oldKeys(t, before, opaqueKeyLife+time.Hour, 2*opaqueKeyLife+time.Hour) // time passes
	after := opaqueNode(t, store, nil)
	newer := mustIssue(t, after, opaqueClaims())
	if newer[:6] == token[:6] {
		t.Error("the old key is still in use")
	}
	for name, issued := range map[string]string{"old": token, "new": newer} {
		if _, err := after.OpenOpaque(t.Context(), issued); err != nil {
			t.Errorf("%s token: %v", name, err)
		}
	}
	var kept opaqueRecord
	env, _ := after.current()
	if err := after.loadRecord(t.Context(), env, opaqueName, &kept); err != nil || len(kept.Keys) != opaqueGenerations {
		t.Errorf("%d generations are kept (%v), want %d", len(kept.Keys), err, opaqueGenerations)
	}

	// The node that knows only the old key learns of the new one from a token.
	if _, err := before.OpenOpaque(t.Context(), newer); err != nil {
		t.Errorf("the other node's new token: %v", err)
	}
}

// A token is good on every node from the moment it is given out, also where the store was just read in vain: there the
// next look is waited for. However many ask, the store is read once a second.
func TestOpaqueNewKeyAtOnceOnEveryNode(t *testing.T) {
	t.Parallel()
	store := &loadCounter{MemStore: NewMemStore()}
	elsewhere := mustIssue(t, opaqueNode(t, NewMemStore(), nil), opaqueClaims()) // of a store that is gone
	node := opaqueNode(t, store, nil)
	if _, err := node.OpenOpaque(t.Context(), elsewhere); !errors.Is(err, ErrOpaqueUnknown) {
		t.Fatalf("got %v, want ErrOpaqueUnknown", err)
	}
	token := mustIssue(t, opaqueNode(t, store, nil), opaqueClaims())
	store.loads.Store(0)
	var wg sync.WaitGroup
	for range 200 {
		wg.Go(func() {
			if _, err := node.OpenOpaque(t.Context(), token); err != nil {
				t.Errorf("a token just given out by another node: %v", err)
			}
		})
		wg.Go(func() {
			if _, err := node.OpenOpaque(t.Context(), elsewhere); !errors.Is(err, ErrOpaqueUnknown) {
				t.Errorf("got %v, want ErrOpaqueUnknown", err)
			}
		})
	}
	wg.Wait()
	if n := store.loads.Load(); n > 3 {
		t.Errorf("the store was read %d times", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := node.OpenOpaque(ctx, elsewhere); !errors.Is(err, context.Canceled) {
		t.Errorf("who leaves is kept waiting: %v", err)
	}
}

// Who waits for the next look into a store that then fails is not told that the token is none of ours.
func TestOpaqueStoreFailsMeanwhile(t *testing.T) {
	t.Parallel()
	store := &brokenStore{MemStore: NewMemStore()}
	elsewhere := mustIssue(t, opaqueNode(t, NewMemStore(), nil), opaqueClaims())
	node := opaqueNode(t, store, nil)
	if _, err := node.OpenOpaque(t.Context(), elsewhere); !errors.Is(err, ErrOpaqueUnknown) {
		t.Fatalf("got %v, want ErrOpaqueUnknown", err)
	}
	store.load = true
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if _, err := node.OpenOpaque(t.Context(), elsewhere); !errors.Is(err, ErrStore) {
				t.Errorf("got %v, want ErrStore", err)
			}
		})
	}
	wg.Wait()
}

// A look into the store that began before a key was made says nothing about the tokens of that key, however late it ends.
func TestOpaqueLookBegunBeforeTheKey(t *testing.T) {
	t.Parallel()
	store := &heldLoads{MemStore: NewMemStore(), began: make(chan struct{}), release: make(chan struct{})}
	elsewhere := mustIssue(t, opaqueNode(t, NewMemStore(), nil), opaqueClaims()) // of a store that is gone
	node := opaqueNode(t, store, nil)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := node.OpenOpaque(t.Context(), elsewhere); !errors.Is(err, ErrOpaqueUnknown) {
			t.Errorf("got %v, want ErrOpaqueUnknown", err)
		}
	})
	<-store.began
	token := mustIssue(t, opaqueNode(t, store.MemStore, nil), opaqueClaims())
	wg.Go(func() {
		if _, err := node.OpenOpaque(t.Context(), token); err != nil {
			t.Errorf("a token given out while the store was read: %v", err)
		}
	})
	time.Sleep(50 * time.Millisecond) // it waits for that look
	close(store.release)
	wg.Wait()
}

// Word of a new key comes while the store is read that did not have it yet: its tokens need not wait for the next look.
func TestOpaqueHeardWhileReading(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := &heldLoads{MemStore: NewMemStore(), began: make(chan struct{}), release: make(chan struct{})}
		elsewhere := mustIssue(t, opaqueNode(t, NewMemStore(), nil), opaqueClaims())
		node := opaqueNode(t, store, nil)
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := node.OpenOpaque(t.Context(), elsewhere); !errors.Is(err, ErrOpaqueUnknown) {
				t.Errorf("got %v, want ErrOpaqueUnknown", err)
			}
		})
		<-store.began
		token := mustIssue(t, opaqueNode(t, store.MemStore, nil), opaqueClaims())
		node.opaque.heard()
		close(store.release)
		synctest.Wait()
		start := time.Now()
		if _, err := node.OpenOpaque(t.Context(), token); err != nil {
			t.Error(err)
		}
		wg.Wait()
		if took := time.Since(start); took != 0 {
			t.Errorf("it waited for %v", took)
		}
	})
}

// Who waits for a key need not wait any more when somebody else finds it.
func TestOpaqueFoundByAnother(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := NewMemStore()
		elsewhere := mustIssue(t, opaqueNode(t, NewMemStore(), nil), opaqueClaims())
		node := opaqueNode(t, store, nil)
		if _, err := node.OpenOpaque(t.Context(), elsewhere); !errors.Is(err, ErrOpaqueUnknown) {
			t.Fatalf("got %v, want ErrOpaqueUnknown", err)
		}
		token := mustIssue(t, opaqueNode(t, store, nil), opaqueClaims())
		start := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := node.OpenOpaque(t.Context(), token); err != nil {
				t.Error(err)
			}
			if took := time.Since(start); took != 0 {
				t.Errorf("it waited for %v", took)
			}
		})
		synctest.Wait()
		mustIssue(t, node, opaqueClaims()) // reads the store for its own sake
		wg.Wait()
	})
}

// The answer to an older look must not take away a key that was made meanwhile.
func TestOpaqueOlderLook(t *testing.T) {
	t.Parallel()
	store := &heldLoads{MemStore: NewMemStore(), began: make(chan struct{}), release: make(chan struct{})}
	node := opaqueNode(t, store.MemStore, nil)
	oldKeys(t, node, opaqueKeyLife+time.Hour)
	env, err := node.current()
	if err != nil {
		t.Fatal(err)
	}
	slow := *env
	slow.Store = store
	looked := make(chan error)
	go func() {
		_, err := node.loadOpaqueKeys(t.Context(), &slow)
		looked <- err
	}()
	<-store.began
	if err := node.makeOpaqueKey(t.Context(), env); err != nil {
		t.Fatal(err)
	}
	close(store.release)
	if err := <-looked; err != nil {
		t.Fatal(err)
	}
	if !node.opaque.fresh() {
		t.Error("the new key is gone")
	}
}

// heldLoads holds the answer to the first read back.
type heldLoads struct {
	*MemStore
	once           sync.Once
	began, release chan struct{}
}

func (s *heldLoads) Load(ctx context.Context, name string) ([]byte, error) {
	value, err := s.MemStore.Load(ctx, name)
	s.once.Do(func() {
		close(s.began)
		<-s.release
	})
	return value, err
}

// loadCounter counts reads.
type loadCounter struct {
	*MemStore
	loads atomic.Int64
}

func (s *loadCounter) Load(ctx context.Context, name string) ([]byte, error) {
	s.loads.Add(1)
	return s.MemStore.Load(ctx, name)
}

func TestOpaqueOneKeyForAllNodes(t *testing.T) {
	t.Parallel()
	store := NewMemStore()
	var wg sync.WaitGroup
	nodes := make([]*Manager, 4)
	issued := make([]string, 32)
	for i := range nodes {
		nodes[i] = opaqueNode(t, store, nil)
	}
	for i := range issued {
		wg.Go(func() {
			token, err := nodes[i%len(nodes)].IssueOpaque(context.Background(), opaqueClaims())
			if err != nil {
				t.Error(err)
			}
			issued[i] = token.Reveal()
		})
	}
	wg.Wait()
	for i, token := range issued {
		if token[:6] != issued[0][:6] {
			t.Fatalf("token %d was made with another key", i)
		}
	}
}

// Keys that the store has lost are written beside those that another node has made meanwhile, not in their place.
func TestOpaqueKeysAreWrittenBesideOthers(t *testing.T) {
	inCluster(t, func(t *testing.T, a, _ *rig, _ *hub) {
		token := mustIssue(t, a.Manager, opaqueClaims())
		if err := a.store.MemStore.Delete(t.Context(), opaqueName); err != nil {
			t.Fatal(err)
		}
		other := opaqueKeyRecord{ID: bytes.Repeat([]byte{9}, opaqueKeyID), Key: bytes.Repeat([]byte{9}, opaqueKeyBytes), Created: time.Now().Unix()}
		env := a.env.prepared()
		written := false
		a.store.hold(func(op, name string) {
			if op == "lock" && name == opaqueName && !written { // somebody else had it until now
				written = true
				data, err := encodeRecord(env, opaqueName, opaqueRecord{Keys: []opaqueKeyRecord{other}})
				if err != nil {
					t.Error(err)
				}
				_ = a.store.MemStore.Store(t.Context(), opaqueName, data)
			}
		})
		if err := a.keepOpaqueKeys(t.Context()); err != nil || !written {
			t.Fatalf("%v, the lock was asked for: %v", err, written)
		}
		var kept opaqueRecord
		if err := a.loadRecord(t.Context(), env, opaqueName, &kept); err != nil {
			t.Fatal(err)
		}
		has := func(id []byte) bool {
			return slices.ContainsFunc(kept.Keys, func(k opaqueKeyRecord) bool { return bytes.Equal(k.ID, id) })
		}
		sealed, err := base64.RawURLEncoding.DecodeString(token)
		if err != nil {
			t.Fatal(err)
		}
		if len(kept.Keys) != 2 || !has(other.ID) || !has(sealed[1:1+opaqueKeyID]) {
			t.Errorf("%d keys are kept, the other node's: %v, ours: %v", len(kept.Keys), has(other.ID), has(sealed[1:1+opaqueKeyID]))
		}
	})
}

// brokenStore fails as it is told.
type brokenStore struct {
	*MemStore
	load, store bool
}

func (s *brokenStore) Load(ctx context.Context, name string) ([]byte, error) {
	if s.load {
		return nil, errors.New("disk gone")
	}
	return s.MemStore.Load(ctx, name)
}

func (s *brokenStore) Store(ctx context.Context, name string, value []byte) error {
	if s.store {
		return errors.New("disk full")
	}
	return s.MemStore.Store(ctx, name, value)
}

func TestOpaqueStoreFails(t *testing.T) {
	t.Parallel()
	store := &brokenStore{MemStore: NewMemStore(), store: true}
	m := opaqueNode(t, store, nil)
	if _, err := m.IssueOpaque(t.Context(), opaqueClaims()); !errors.Is(err, ErrStore) {
		t.Errorf("a key that cannot be kept: got %v, want ErrStore", err)
	}
	store.store = false
	if _, err := m.IssueOpaque(t.Context(), opaqueClaims()); !errors.Is(err, ErrStore) {
		t.Errorf("asked the store again at once: %v", err)
	}
	m.opaque.mu.Lock()
	m.opaque.failed = m.opaque.failed.Add(-opaqueReload)
	m.opaque.mu.Unlock()
	token := mustIssue(t, m, opaqueClaims())

	store.load, store.store = true, true
	if _, err := m.OpenOpaque(t.Context(), token); err != nil {
		t.Errorf("a known key needs no store: %v", err)
	}
	cold := opaqueNode(t, store, nil)
	for range 2 { // the second time without asking the store
		if _, err := cold.OpenOpaque(t.Context(), token); !errors.Is(err, ErrStore) {
			t.Errorf("cannot tell, and said %v instead of ErrStore", err)
		}
	}
	if _, err := cold.IssueOpaque(t.Context(), opaqueClaims()); !errors.Is(err, ErrStore) {
		t.Errorf("got %v, want ErrStore", err)
	}
}

func TestOpaqueOldKeyServesWhileStoreFails(t *testing.T) {
	t.Parallel()
	store := &brokenStore{MemStore: NewMemStore()}
	m := opaqueNode(t, store, nil)
	oldKeys(t, m, opaqueKeyLife+time.Hour)
	store.store = true
	token := mustIssue(t, m, opaqueClaims())
	if _, err := m.OpenOpaque(t.Context(), token); err != nil {
		t.Error(err)
	}
}

// A record that holds no usable key is left alone; one that nothing will read again is set aside, and new keys are made.
func TestOpaqueUnusableRecord(t *testing.T) {
	t.Parallel()
	for name, record := range map[string]string{"version": `{"v":9,"keys":[]}`, "torn": `{"v":1,"keys":[{"id`} {
		store := NewMemStore()
		if err := store.Store(t.Context(), opaqueName, []byte(record)); err != nil {
			t.Fatal(err)
		}
		m := opaqueNode(t, store, nil)
		if _, err := m.OpenOpaque(t.Context(), mustIssue(t, m, opaqueClaims())); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if kept := setAsideOf(t, store, opaqueName); len(kept) != 1 || kept[0] != record {
			t.Errorf("%s: set aside: %q", name, kept)
		}
	}
	for name, record := range map[string]string{
		"short key": `{"v":1,"keys":[{"id":"AQEBAQ==","key":"AQ==","created":1}]}`,
		"short id":  fmt.Sprintf(`{"v":1,"keys":[{"id":"AQ==","key":%q,"created":1}]}`, base64.StdEncoding.EncodeToString(make([]byte, 32))),
	} {
		store := NewMemStore()
		if err := store.Store(t.Context(), opaqueName, []byte(record)); err != nil {
			t.Fatal(err)
		}
		m := opaqueNode(t, store, nil)
		if _, err := m.IssueOpaque(t.Context(), opaqueClaims()); !errors.Is(err, ErrStore) {
			t.Errorf("%s: got %v, want ErrStore", name, err)
		}
		if kept, err := store.Load(t.Context(), opaqueName); err != nil || string(kept) != record {
			t.Errorf("%s: the record was changed", name)
		}
	}
}

func TestOpaqueSealedAtRest(t *testing.T) {
	t.Parallel()
	store := NewMemStore()
	mustIssue(t, opaqueNode(t, store, opaqueSealer(t)), opaqueClaims())
	if kept, err := store.Load(t.Context(), opaqueName); err != nil || bytes.Contains(kept, []byte(`"key"`)) {
		t.Errorf("keys are stored in the clear: %v", err)
	}
}

func TestOpaqueClosed(t *testing.T) {
	t.Parallel()
	m := opaqueNode(t, NewMemStore(), nil)
	token := mustIssue(t, m, opaqueClaims())
	m.Close()
	if _, err := m.OpenOpaque(t.Context(), token); !errors.Is(err, ErrClosed) {
		t.Errorf("open: got %v, want ErrClosed", err)
	}
	if _, err := m.IssueOpaque(t.Context(), opaqueClaims()); !errors.Is(err, ErrClosed) {
		t.Errorf("issue: got %v, want ErrClosed", err)
	}
	if _, err := NewManager().OpenOpaque(t.Context(), token); !errors.Is(err, ErrNotConfigured) {
		t.Errorf("before Use: got %v, want ErrNotConfigured", err)
	}
}

func BenchmarkOpenOpaque(b *testing.B) {
	client, err := NewClient(ClientOptions{})
	if err != nil {
		b.Fatal(err)
	}
	m := NewManager()
	m.Use(&Environment{Store: NewMemStore(), API: client})
	defer m.Close()
	token, err := m.IssueOpaque(b.Context(), opaqueClaims())
	if err != nil {
		b.Fatal(err)
	}
	text := token.Reveal()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := m.OpenOpaque(b.Context(), text); err != nil {
			b.Fatal(err)
		}
	}
}
