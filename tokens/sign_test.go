package tokens

import (
	"bytes"
	"errors"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

func mustSign(t *testing.T, m *Manager, purpose, data string) []byte {
	t.Helper()
	signature, err := m.Sign(t.Context(), purpose, []byte(data))
	if err != nil {
		t.Fatal(err)
	}
	return signature
}

func TestSignSurvivesRestartOnEveryNode(t *testing.T) {
	t.Parallel()
	for name, sealer := range map[string]*crypto.Sealer{"sealed": opaqueSealer(t), "unsealed": nil} {
		store := NewMemStore()
		signature := mustSign(t, opaqueNode(t, store, sealer), "p", "data")
		other := opaqueNode(t, store, sealer)
		if err := other.Verify(t.Context(), "p", []byte("data"), signature); err != nil {
			t.Errorf("%s: another node: %v", name, err)
		}
		if !bytes.Equal(mustSign(t, other, "p", "data"), signature) {
			t.Errorf("%s: another node signs in another way", name)
		}
	}
}

func TestVerifyRefuses(t *testing.T) {
	t.Parallel()
	m := opaqueNode(t, NewMemStore(), nil)
	signature := mustSign(t, m, "p", "data")
	altered := bytes.Clone(signature)
	altered[len(altered)-1] ^= 1
	for _, tt := range []struct {
		name, purpose, data string
		signature           []byte
	}{
		{"other data", "p", "date", signature},
		{"other purpose", "q", "data", signature},
		{"a part of the data as purpose", "pd", "ata", signature},
		{"altered", "p", "data", altered},
		{"cut", "p", "data", signature[:len(signature)-1]},
		{"longer", "p", "data", append(bytes.Clone(signature), 0)},
		{"empty", "p", "data", nil},
		{"of another store", "p", "data", mustSign(t, opaqueNode(t, NewMemStore(), nil), "p", "data")},
	} {
		if err := m.Verify(t.Context(), tt.purpose, []byte(tt.data), tt.signature); !errors.Is(err, ErrNotSigned) {
			t.Errorf("%s: %v, want ErrNotSigned", tt.name, err)
		}
	}
	if err := m.Verify(t.Context(), "p", []byte("data"), signature); err != nil {
		t.Errorf("the signature itself: %v", err)
	}
}

// The key of a signature is not that of an opaque token, and tells nothing of it.
func TestSignHasAKeyOfItsOwn(t *testing.T) {
	t.Parallel()
	store := NewMemStore()
	m := opaqueNode(t, store, nil)
	mustSign(t, m, "p", "data")
	key, ok := m.opaque.newest()
	raw, err := store.Load(t.Context(), opaqueName)
	if !ok || err != nil || len(key.signing) != 32 || bytes.Contains(raw, key.signing) {
		t.Errorf("the signing key has %d bytes; the record: %v", len(key.signing), err)
	}
}

// While the store is away, who has the key goes on; who has none says so, and does not call a good signature bad.
func TestSignWithoutTheStore(t *testing.T) {
	t.Parallel()
	store := NewMemStore()
	away := &brokenStore{MemStore: store, load: true, store: true}
	m := opaqueNode(t, store, nil)
	signature := mustSign(t, m, "p", "data")
	client, err := NewClient(ClientOptions{Origins: []string{"http://127.0.0.1:1"}})
	if err != nil {
		t.Fatal(err)
	}
	m.Use(&Environment{Store: away, API: client})
	if err := m.Verify(t.Context(), "p", []byte("data"), mustSign(t, m, "p", "data")); err != nil {
		t.Errorf("with the key: %v", err)
	}
	fresh := opaqueNode(t, away, nil)
	if err := fresh.Verify(t.Context(), "p", []byte("data"), signature); !errors.Is(err, ErrStore) {
		t.Errorf("without the key: %v, want ErrStore", err)
	}
	if _, err := fresh.Sign(t.Context(), "p", []byte("data")); !errors.Is(err, ErrStore) {
		t.Errorf("signing without the key: %v, want ErrStore", err)
	}
}
