package tokens

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// useSealKeys puts a configuration with other seal keys in force on a node, each of one byte; that of a rig is 7.
func useSealKeys(t *testing.T, r *rig, keys ...byte) {
	t.Helper()
	var all [][]byte
	for _, key := range keys {
		all = append(all, bytes.Repeat([]byte{key}, 32))
	}
	sealer, err := crypto.NewSealer(all...)
	if err != nil {
		t.Fatal(err)
	}
	env := *r.env
	env.Sealer = sealer
	r.env = &env
	r.Use(r.env)
}

// While the seal key is changed, a node has the new one and another has not. What the first one writes the other cannot open: it
// must not put what it remembers in the place of that, nor fetch a token for it.
func TestRecordOfANodeWithAnotherSealKey(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		a.rotating()
		useSealKeys(t, a, 8, 7)
		want, err := a.Renew(t.Context(), testAuthKey, secret.String{})
		if err != nil {
			t.Fatal(err)
		}
		written, _ := a.store.MemStore.Load(t.Context(), testAuthKey.recordName())
		before := a.calls()
		time.Sleep(time.Minute) // the other node has heard of it
		_, _ = b.Get(t.Context(), testAuthKey)
		for range 3 {
			if _, err := b.Renew(t.Context(), testAuthKey, secret.String{}); err == nil {
				t.Error("the node without the key renewed a token that another one had renewed")
			} else if _, lacks := LacksSealKey(err); !lacks {
				t.Errorf("it does not say that a seal key is missing: %v", err)
			}
			time.Sleep(time.Minute)
		}
		if now, _ := a.store.MemStore.Load(t.Context(), testAuthKey.recordName()); !bytes.Equal(now, written) {
			t.Error("the node without the key wrote over the record")
		}
		if kept := setAsideOf(t, a.store.MemStore, testAuthKey.recordName()); len(kept) > 0 {
			t.Errorf("%d records were set aside", len(kept))
		}
		if got := a.calls() - before; got > 0 {
			t.Errorf("WeChat was asked %d times", got)
		}
		if _, lacks := LacksSealKey(b.MissingSealKey()); !lacks || a.MissingSealKey() != nil {
			t.Errorf("missing: %v; on the node that has it: %v", b.MissingSealKey(), a.MissingSealKey())
		}
		if n := b.log.count("another node seals records with a seal_key"); n != 1 {
			t.Errorf("the log says it %d times", n)
		}
		a.wantInStep(t)

		useSealKeys(t, b, 7, 8)
		if got := b.get(t, testAuthKey); !sameToken(got, want) {
			t.Errorf("with the key: generation %d, want %d", got.Generation, want.Generation)
		}
		if err := b.MissingSealKey(); err != nil {
			t.Errorf("with the key: %v", err)
		}
	})
}

// Nor does an account come back that took its authorization back on the node with the new key.
func TestRevocationOnANodeWithAnotherSealKey(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		useSealKeys(t, a, 8, 7)
		revoke(t, a)
		time.Sleep(time.Minute)
		_, _ = b.Get(t.Context(), testAuthKey)
		_, _ = b.Renew(t.Context(), testAuthKey, secret.String{})
		time.Sleep(time.Minute)
		if r := a.stored(t, testAuthKey); !r.revoked() {
			t.Error("the node without the key undid the revocation")
		}
		useSealKeys(t, b, 7, 8)
		if _, err := b.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("with the key: %v", err)
		}
	})
}

// A key that was here and was taken out too early is no other node's: what the node remembers takes the record's place.
func TestSealKeyTakenOutTooEarly(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		want := a.get(t, testAuthKey)
		for _, r := range []*rig{a, b} {
			useSealKeys(t, r, 8, 7)
		}
		a.ticket(t, testPlatform) // sealed with the new one
		for _, r := range []*rig{a, b} {
			useSealKeys(t, r, 8)
		}
		if _, err := a.Ticket(t.Context(), testPlatform); err != nil { // so that something opens
			t.Fatal(err)
		}
		if _, err := a.commit(t.Context(), a.Manager.env.Load(), testAuthKey, false, func(cur *record) *record { return cur }); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		if kept := setAsideOf(t, a.store.MemStore, testAuthKey.recordName()); len(kept) != 1 {
			t.Errorf("%d records were set aside", len(kept))
		}
		if got := a.stored(t, testAuthKey); !got.AccessToken.Same(want.Value) {
			t.Error("another record is there than the node remembered")
		}
		if err := a.MissingSealKey(); err != nil {
			t.Error(err)
		}
	})
}

// Nor does the reading of WeChat's list take such a record for damaged.
func TestListOnANodeWithAnotherSealKey(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		a.rotating()
		useSealKeys(t, a, 8, 7)
		if _, err := a.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Fatal(err)
		}
		written, _ := a.store.MemStore.Load(t.Context(), testAuthKey.recordName())
		if _, err := b.Ticket(t.Context(), testPlatform); err != nil { // so that something opens
			t.Fatal(err)
		}
		env := b.Manager.env.Load()
		account := listed{AppID: testAuthorizer, Refresh: wireToken(a.stored(t, testAuthKey).RefreshToken.Reveal()), AuthTime: wireInt(time.Now().Unix())}
		if err := b.compare(t.Context(), env, testPlatform, account, new(othersIntents)); err != nil {
			t.Error(err)
		}
		if err := b.setAside(t.Context(), env, testAuthKey.recordName(), new(recordWire), false); !errors.Is(err, errUnreadable) || errors.Is(err, errDamaged) {
			t.Errorf("to set it aside, after the other node wrote it in the place of a damaged one: %v", err)
		}
		if now, _ := a.store.MemStore.Load(t.Context(), testAuthKey.recordName()); !bytes.Equal(now, written) {
			t.Error("the node without the key wrote over the record")
		}
		if kept := setAsideOf(t, a.store.MemStore, testAuthKey.recordName()); len(kept) > 0 {
			t.Errorf("%d records were set aside", len(kept))
		}
	})
}

// A record that cannot be opened does not stand for the store: what else changes is read before it is used, and neither uses nor
// renewals of that record have the store asked each time, nor take the lock from the node that can renew it.
func TestUsesOfARecordOfAnotherSealKey(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		useSealKeys(t, a, 8, 7)
		if _, err := a.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Fatal(err)
		}
		asked := func(what, op string, most int, use func()) {
			t.Helper()
			time.Sleep(2 * time.Minute)
			before := a.store.count(op)
			for range 200 {
				use()
				time.Sleep(10 * time.Millisecond)
			}
			if n := a.store.count(op) - before; n > most {
				t.Errorf("%s: %d × %s in two seconds", what, n, op)
			}
		}
		asked("uses of a live token", "load", 8, func() {
			if _, err := b.Get(t.Context(), testAuthKey); err != nil {
				t.Error(err)
			}
		})
		if b.hearing.Load().tired.Load() {
			t.Error("the store counts as one that does not answer")
		}
		token := b.cache.Load().get(testAuthKey).token.Value
		lost := func() {
			if _, err := b.Renew(t.Context(), testAuthKey, token); err == nil {
				t.Error("renewed")
			} else if _, lacks := LacksSealKey(err); !lacks {
				t.Errorf("it does not say that a seal key is missing: %v", err)
			}
		}
		asked("uses of a token that WeChat refused", "lock", 8, lost)
		asked("uses of a token that WeChat refused", "load", 24, lost)

		useSealKeys(t, b, 7, 8)
		time.Sleep(checkEvery)
		if got := b.get(t, testAuthKey); got.Value.Same(token) {
			t.Error("with the key: still the token that WeChat refused")
		}
	})
}

// A ticket that another node sealed so makes no store that does not answer: the next push is kept in its place.
func TestTicketOfAnotherSealKey(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		useSealKeys(t, a, 8, 7)
		held := b.TicketReceived(testPlatform)
		a.ticket(t, testPlatform)
		if _, err := b.Get(t.Context(), testAuthKey); err != nil {
			t.Fatal(err)
		}
		if _, err := b.reload(t.Context(), b.Manager.env.Load(), testAuthKey); err != nil { // so that something opens
			t.Fatal(err)
		}
		at, err := b.LastTicket(t.Context(), testPlatform)
		if err != nil || !at.Equal(held) {
			t.Errorf("%v, %v; want %v", at, err, held)
		}
		if _, lacks := LacksSealKey(b.MissingSealKey()); !lacks {
			t.Errorf("missing: %v", b.MissingSealKey())
		}
		for range 3 {
			time.Sleep(10 * time.Minute)
			b.ticket(t, testPlatform)
			if got, err := a.Ticket(t.Context(), testPlatform); err != nil || !got.CreatedAt.Equal(time.Now()) {
				t.Errorf("the node with both keys has not the other's: %v, %v", got.CreatedAt, err)
			}
			time.Sleep(10 * time.Minute)
			a.ticket(t, testPlatform)
		}
		if kept := setAsideOf(t, a.store.MemStore, ticketName(testPlatform)); len(kept) > 0 || b.log.count("a record is damaged") > 0 {
			t.Errorf("%d tickets were set aside", len(kept))
		}
	})
}

// Nor does a node write its own ticket over such a one because the bus was away: the other's is no lost one, and may be the only that lives.
func TestTicketOfAnotherSealKeyAfterTheBusWasAway(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, h *hub) {
		useSealKeys(t, a, 8, 7)
		time.Sleep(ticketLife - time.Minute) // each push comes to the other node
		a.ticket(t, testPlatform)
		if _, err := b.reload(t.Context(), b.Manager.env.Load(), testAuthKey); err != nil { // so that something opens
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		written, _ := a.store.MemStore.Load(t.Context(), ticketName(testPlatform))
		h.set(true)
		h.set(false)
		time.Sleep(time.Minute)
		if now, _ := a.store.MemStore.Load(t.Context(), ticketName(testPlatform)); !bytes.Equal(now, written) {
			t.Error("the ticket is written over")
		}
		a.restart()
		if _, err := a.Ticket(t.Context(), testPlatform); err != nil {
			t.Errorf("after a restart: %v", err)
		}
		b.ticket(t, testPlatform)
		if got, err := a.Ticket(t.Context(), testPlatform); err != nil || !got.CreatedAt.Equal(time.Now()) {
			t.Errorf("the next push: %v, %v", got.CreatedAt, err)
		}
	})
}

// A ticket that is damaged, and not sealed with a key that only another node has, is set aside on a node that hears others too.
func TestDamagedTicketAmongNodes(t *testing.T) {
	inCluster(t, func(t *testing.T, a, _ *rig, _ *hub) {
		const torn = `{"v":1,"tick`
		name := ticketName(testPlatform)
		if err := a.store.MemStore.Store(t.Context(), name, []byte(torn)); err != nil {
			t.Fatal(err)
		}
		if err := a.PutTicket(t.Context(), testPlatform, Ticket{Value: secret.New("ticket@@@next"), CreatedAt: time.Now()}); err != nil {
			t.Fatal(err)
		}
		var wire ticketWire
		if err := a.loadRecord(t.Context(), a.env.prepared(), name, &wire); err != nil || wire.Ticket != "ticket@@@next" {
			t.Errorf("the ticket in the store: %v", err)
		}
		if kept := setAsideOf(t, a.store.MemStore, name); len(kept) != 1 || kept[0] != torn {
			t.Errorf("set aside: %d", len(kept))
		}
	})
}

// What a node has never held it leaves alone too, as long as another node seals with that key, and a while longer.
func TestUnknownRecordOfANodeWithAnotherSealKey(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		useSealKeys(t, a, 8, 7)
		const next = "wx00000000000000a7"
		key := AuthorizerKey(testPlatform, next)
		a.authorize(t, testPlatform, next)
		written, err := a.store.MemStore.Load(t.Context(), key.recordName())
		if err != nil {
			t.Fatal(err)
		}
		b.restart()                                                               // it holds nothing
		if _, err := b.Get(t.Context(), ComponentKey(testPlatform)); err != nil { // so that something opens
			t.Fatal(err)
		}
		for range 5 {
			if _, err := b.Get(t.Context(), key); err == nil {
				t.Error("the node without the key has a token")
			} else if _, lacks := LacksSealKey(err); !lacks {
				t.Errorf("it does not say that a seal key is missing: %v", err)
			}
			time.Sleep(10 * time.Minute)
		}
		if now, _ := a.store.MemStore.Load(t.Context(), key.recordName()); !bytes.Equal(now, written) {
			t.Error("the node without the key wrote over the record")
		}

		a.Close()
		time.Sleep(sealingLife + time.Second) // nobody seals with it any more
		_, _ = b.Get(t.Context(), key)
		time.Sleep(time.Minute)
		if kept := setAsideOf(t, a.store.MemStore, key.recordName()); len(kept) != 1 {
			t.Errorf("%d records were set aside once nobody had the key", len(kept))
		}
	})
}

// While a node's seal key is changed it may just be saying the one of before: the new one is said all the same, before the first record with it.
func TestNewSealKeyIsSaidWhileTheOldOneIs(t *testing.T) {
	inCluster(t, func(t *testing.T, a, _ *rig, _ *hub) {
		before := a.Manager.env.Load()
		sealer, err := crypto.NewSealer(bytes.Repeat([]byte{8}, 32), bytes.Repeat([]byte{7}, 32))
		if err != nil {
			t.Fatal(err)
		}
		next := *before
		next.Sealer = sealer
		a.sealKeys.use(sealer) // as in a reload
		a.saySealing(t.Context(), before)
		a.Manager.env.Store(&next)
		a.saySealing(t.Context(), &next)
		values, ok := next.Store.(Ephemeral)
		if !ok {
			t.Fatal("the store keeps no values for a while")
		}
		if _, err := values.Peek(t.Context(), sealingName(sealer.KeyIDs()[0])); err != nil {
			t.Errorf("the new key is not said: %v", err)
		}
	})
}
