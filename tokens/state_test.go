package tokens

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

func TestState(t *testing.T) {
	t.Parallel()
	for _, sealer := range []*crypto.Sealer{opaqueSealer(t), nil} {
		synctest.Test(t, func(t *testing.T) { testState(t, sealer) })
	}
}

func testState(t *testing.T, sealer *crypto.Sealer) {
	store := NewMemStore()
	m, other := opaqueNode(t, store, sealer), opaqueNode(t, store, sealer)
	seal := func(payload string) secret.String {
		t.Helper()
		s, err := m.SealState(t.Context(), []byte(payload), time.Now().Add(time.Minute), "p", "data")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for _, payload := range []string{"", "x", strings.Repeat("p", MaxStatePayload)} {
		s := seal(payload)
		if len(s.Reveal()) > MaxOpaqueLength || strings.Contains(s.Reveal(), "ppp") {
			t.Errorf("state %s", s.Reveal())
		}
		if got, err := other.OpenState(t.Context(), s, "p", "data"); err != nil || string(got) != payload {
			t.Errorf("on another node: %q, %v", got, err)
		}
	}
	if _, err := m.SealState(t.Context(), make([]byte, MaxStatePayload+1), time.Now()); err == nil {
		t.Error("a payload that is too long was sealed")
	}
	// Neither passes for the other.
	s := seal("x")
	if _, err := m.OpenOpaque(t.Context(), s.Reveal()); !errors.Is(err, ErrOpaqueUnknown) {
		t.Errorf("a state is an opaque token: %v", err)
	}
	token := mustIssue(t, m, opaqueClaims())
	swapped := []byte(s.Reveal())
	copy(swapped, token[:1]+token[1:2]) // the version's characters
	for _, text := range []string{token, string(swapped), "", "x", s.Reveal() + "A", s.Reveal()[:20]} {
		if _, err := m.OpenState(t.Context(), secret.New(text), "p", "data"); !errors.Is(err, ErrOpaqueUnknown) {
			t.Errorf("%q opens: %v", text, err)
		}
	}
	for _, bound := range [][]string{nil, {"p"}, {"p", "date"}, {"q", "data"}, {"pdata"}, {"pd", "ata"}, {"p", "data", ""}, {"data", "p"}} {
		if _, err := m.OpenState(t.Context(), s, bound...); !errors.Is(err, ErrOpaqueUnknown) {
			t.Errorf("bound to %q: %v", bound, err)
		}
	}
	if _, err := opaqueNode(t, NewMemStore(), nil).OpenState(t.Context(), s, "p", "data"); !errors.Is(err, ErrOpaqueUnknown) {
		t.Errorf("at another store: %v", err)
	}
	time.Sleep(time.Minute)
	if _, err := m.OpenState(t.Context(), s, "p", "data"); !errors.Is(err, ErrOpaqueExpired) {
		t.Errorf("past its end: %v", err)
	}
}

// Strangers have states made, so their key is not that of opaque tokens, and cannot be told from it.
func TestStateHasAKeyOfItsOwn(t *testing.T) {
	t.Parallel()
	m := opaqueNode(t, NewMemStore(), nil)
	if _, err := m.SealState(t.Context(), nil, time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	key, ok := m.opaque.newest()
	if !ok {
		t.Fatal("no key")
	}
	sealed := key.states.Seal(nil, nil, []byte("x"), nil)
	if _, err := key.aead.Open(nil, nil, sealed, nil); err == nil {
		t.Error("the key of opaque tokens opens a state")
	}
	if opened, err := key.states.Open(nil, nil, sealed, nil); err != nil || !bytes.Equal(opened, []byte("x")) {
		t.Errorf("opened %q, %v", opened, err)
	}
}

// While the store is away, who has the key goes on; who has none says so, and does not call a good state bad.
func TestStateWithoutTheStore(t *testing.T) {
	t.Parallel()
	store := NewMemStore()
	away := &brokenStore{MemStore: store, load: true, store: true}
	m := opaqueNode(t, store, nil)
	seal := func() secret.String {
		t.Helper()
		s, err := m.SealState(t.Context(), []byte("x"), time.Now().Add(time.Minute), "p")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	state := seal()
	client, err := NewClient(ClientOptions{Origins: []string{"http://127.0.0.1:1"}})
	if err != nil {
		t.Fatal(err)
	}
	m.Use(&Environment{Store: away, API: client})
	if _, err := m.OpenState(t.Context(), seal(), "p"); err != nil {
		t.Errorf("with the key: %v", err)
	}
	fresh := opaqueNode(t, away, nil)
	if _, err := fresh.OpenState(t.Context(), state, "p"); !errors.Is(err, ErrStore) {
		t.Errorf("without the key: %v, want ErrStore", err)
	}
	if _, err := fresh.SealState(t.Context(), nil, time.Now(), "p"); !errors.Is(err, ErrStore) {
		t.Errorf("sealing without the key: %v, want ErrStore", err)
	}
}
