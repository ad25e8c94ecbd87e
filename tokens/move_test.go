package tokens

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// moverFor is a mover of a store; key 0: unsealed.
func moverFor(t *testing.T, s Store, key byte) *Mover {
	t.Helper()
	env := &Environment{Store: s, Platforms: []PlatformCredentials{{AppID: testPlatform}, {AppID: testPlatform2}}}
	if key != 0 {
		var err error
		if env.Sealer, err = crypto.NewSealer(bytes.Repeat([]byte{key}, 32)); err != nil {
			t.Fatal(err)
		}
	}
	return NewMover(env)
}

func exported(t *testing.T, mv *Mover) (records [][]byte, moved Moved) {
	t.Helper()
	moved, err := mv.Export(t.Context(), func(record []byte) error {
		records = append(records, bytes.Clone(record))
		return nil
	})
	if err != nil {
		t.Fatalf("Export: %v", err)
	}
	return records, moved
}

// inTurn gives records as an archive does.
func inTurn(records [][]byte) func() ([]byte, error) {
	i := 0
	return func() ([]byte, error) {
		if i == len(records) {
			return nil, io.EOF
		}
		i++
		return records[i-1], nil
	}
}

func imported(t *testing.T, mv *Mover, records [][]byte, dry bool) Moved {
	t.Helper()
	moved, err := mv.Import(t.Context(), inTurn(records), dry)
	if err != nil {
		t.Fatalf("Import: %v", err)
	}
	return moved
}

// moveName is where a record of an archive goes.
func movedNames(t *testing.T, records [][]byte) (names []string) {
	t.Helper()
	for _, record := range records {
		name, _, err := unpackRecord(record)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	return names
}

const moveOther = "wx00000000000000ee"

// lived is a gateway that has had some of everything.
func lived(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	r.env.RosterEvery = 24 * time.Hour
	r.env.ConfirmFiles = true
	r.giveConfirmFiles(confirmAnswer(confirmTestFile, confirmTestContent), "")
	r.Use(r.env)
	for _, p := range []string{testPlatform, testPlatform2} {
		r.ticket(t, p)
	}
	r.authorize(t, testPlatform, testAuthorizer)
	r.authorize(t, testPlatform2, moveOther)
	for _, k := range []Key{
		testAuthKey, AuthorizerKey(testPlatform2, moveOther), ComponentKey(testPlatform), AccountKey(testAccount),
		JSAPIKey(testPlatform, testAuthorizer), CardKey("", testAccount),
	} {
		r.get(t, k)
	}
	r.put(t, "MP_verify_a1B2c3D4e5F6g7H8.txt", "a1B2c3D4e5F6g7H8")
	confirm := confirmWire{Name: accountTestFile, Content: []byte(confirmTestContent), AskedAt: time.Now().Unix()}
	if err := r.storeRecord(t.Context(), r.env.prepared(), confirmName(testAuthKey), confirm); err != nil {
		t.Fatal(err)
	}
	r.keepForward(t)
	r.UserName(testPlatform, testAuthorizer)
	time.Sleep(time.Hour)
	synctest.Wait()
	if name, known := r.UserName(testPlatform, testAuthorizer); !known {
		t.Fatalf("no gh_ id: %q", name)
	}
	for _, k := range []Key{testAuthKey, AuthorizerKey(testPlatform2, moveOther), ComponentKey(testPlatform), AccountKey(testAccount)} {
		r.get(t, k)
	}
	return r
}

// TestMoveWholeStore: all that a gateway has kept goes to another store, sealed otherwise or not at all, and a gateway on
// that goes on where the first was: nobody authorises again, and WeChat is asked for nothing.
func TestMoveWholeStore(t *testing.T) {
	t.Parallel()
	for name, key := range map[string]byte{"to another seal key": 9, "to an unsealed store": 0} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := lived(t)
				opaque, err := r.IssueOpaque(t.Context(), OpaqueClaims{Client: "crm", AppID: testAuthorizer, ExpiresAt: time.Now().Add(time.Hour)})
				if err != nil {
					t.Fatal(err)
				}
				// An accepted authorization waits, since WeChat does not answer.
				r.wx.set(func(f *fakeWeChat) {
					f.hook = func(string, map[string]any) (string, error) { return "", errors.New("unreachable") }
				})
				code := r.newCode(testAuthorizer)
				if err := r.Accept(t.Context(), r.push(code)); err != nil {
					t.Fatal(err)
				}
				want := make(map[Key]Token)
				for _, k := range []Key{testAuthKey, ComponentKey(testPlatform), AccountKey(testAccount), CardKey("", testAccount)} {
					want[k] = r.get(t, k)
				}
				r.Close()

				records, moved := exported(t, moverFor(t, r.store, 7))
				names := movedNames(t, records)
				for held := range maps.Keys(r.store.MemStore.records) {
					if !slices.Contains(names, held) {
						t.Errorf("%s is not exported", held)
					}
				}
				if len(names) != len(r.store.MemStore.records) || moved.Total().Written != len(names) || moved.Total().Refused > 0 {
					t.Errorf("%d names, %d records, %+v", len(names), len(r.store.MemStore.records), moved)
				}
				if len(moved.Classes) != 13 { // all that there are
					t.Errorf("kinds of records: %+v", moved.Classes)
				}
				if last, _ := classOf(names[len(names)-1]); last != classRoster {
					t.Errorf("the last is of %s", last)
				}

				next := NewMemStore()
				if dry := imported(t, moverFor(t, next, key), records, true); dry.Total() != moved.Total() || len(next.records) > 0 {
					t.Errorf("dry: %+v, and %d records", dry.Total(), len(next.records))
				}
				if got := imported(t, moverFor(t, next, key), records, false); got.Total() != moved.Total() {
					t.Errorf("first import: %+v, want %+v", got.Total(), moved.Total())
				}
				before := maps.Clone(next.records)
				again := imported(t, moverFor(t, next, key), records, false).Total()
				if again.Same != len(records) || again.Written+again.Newer+again.Refused > 0 || !maps.EqualFunc(before, next.records, bytes.Equal) {
					t.Errorf("second import: %+v", again)
				}
				for name, value := range next.records {
					if crypto.IsSealed(value) != (key != 0) {
						t.Errorf("%s: sealed: %v", name, crypto.IsSealed(value))
					}
				}

				env := *r.env
				env.Store, env.Sealer = next, moverFor(t, next, key).env.Sealer
				r.Manager = NewManager()
				calls := r.calls()
				r.Use(&env)
				for k, token := range want {
					if got := r.get(t, k); !sameToken(got, token) {
						t.Errorf("%v: another token", k)
					}
				}
				if _, err := r.OpenOpaque(t.Context(), opaque.Reveal()); err != nil {
					t.Errorf("an opaque token: %v", err)
				}
				if content, found, err := r.VerifyFile(t.Context(), "MP_verify_a1B2c3D4e5F6g7H8.txt"); !found || err != nil || string(content) != "a1B2c3D4e5F6g7H8" {
					t.Errorf("a verification file: %q %v %v", content, found, err)
				}
				if _, appid, err := r.ByUserName(t.Context(), "gh_"+testAuthorizer[2:]); err != nil || appid != testAuthorizer {
					t.Errorf("by gh_ id: %q %v", appid, err)
				}
				if n := r.calls() - calls; n > 1 { // the exchange of the code
					t.Errorf("%d calls to WeChat", n)
				}
				r.wx.set(func(f *fakeWeChat) { f.hook = nil })
				time.Sleep(10 * time.Minute)
				synctest.Wait()
				if got, err := next.List(t.Context(), intentFolder); err != nil || len(got) > 0 {
					t.Errorf("%d accepted authorizations are left: %v", len(got), err)
				}
			})
		})
	}
}

// TestImportOfABackup: an account that authorised after the archive was made, or whose record it lacks, is not denied by a
// gateway on the store that the archive was put into, whether that was empty or left behind: WeChat knows the account. Before
// long the gateway has read WeChat's list for this store, and then an account that WeChat does not know is asked for no more.
func TestImportOfABackup(t *testing.T) {
	t.Parallel()
	const later = "wx00000000000000fe"
	for name, tt := range map[string]struct{ behind, running, listed bool }{
		"into an empty store":             {},
		"into one that was left behind":   {behind: true},
		"under a gateway that is running": {behind: true, running: true},
		"which is in use by the list":     {listed: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := lived(t)
				next := newFaultStore()
				if tt.behind {
					records, _ := exported(t, moverFor(t, r.store, 7))
					imported(t, moverFor(t, next, 9), records, false)
					wire := rosterWire{CompletedAt: time.Now().Add(-12 * time.Hour).Unix()} // an hour or so before the archive's
					mv := moverFor(t, next, 9)
					for _, p := range []string{testPlatform, testPlatform2} {
						if err := mv.m.storeRecord(t.Context(), mv.env, rosterName(p), wire); err != nil {
							t.Fatal(err)
						}
					}
				}
				records, _ := exported(t, moverFor(t, r.store, 7)) // the nightly backup
				lacks := AuthorizerKey(testPlatform2, moveOther)
				if !tt.behind {
					records = slices.DeleteFunc(records, func(b []byte) bool { // it could not be read
						name, _, _ := unpackRecord(b)
						return name == lacks.recordName()
					})
				}
				time.Sleep(time.Hour)
				r.authorize(t, testPlatform, later) // in the morning
				r.get(t, AuthorizerKey(testPlatform, later))
				r.Close() // the disk dies

				env := *r.env
				env.Store, env.Sealer = next, moverFor(t, next, 9).env.Sealer
				use := func() {
					r.Manager = NewManager()
					r.Use(&env)
				}
				if tt.running {
					use()
					time.Sleep(time.Minute)
				}
				imported(t, moverFor(t, next, 9), records, false)
				if !tt.running {
					use()
				} else {
					time.Sleep(rosterCheck)
				}
				synctest.Wait() // it has seen what the store says of the list
				if tt.listed {
					time.Sleep(rosterSettle + time.Second)
					synctest.Wait()
					infos := r.wx.count(pathAuthorizerInfo)
					r.get(t, AuthorizerKey(testPlatform, later))
					r.get(t, lacks)
					if n := r.wx.count(pathAuthorizerInfo) - infos; n > 0 {
						t.Errorf("%d accounts were asked for one by one after the list was to be read", n)
					}
				}
				r.get(t, AuthorizerKey(testPlatform, later))
				r.get(t, lacks)
				time.Sleep(rosterCheck)
				synctest.Wait()
				for _, k := range []Key{AuthorizerKey(testPlatform, "wx00000000000000f0"), AuthorizerKey(testPlatform2, "wx00000000000000f0")} {
					calls := r.calls()
					if _, err := r.Get(t.Context(), k); !errors.Is(err, ErrNotAuthorized) || r.calls() != calls {
						t.Errorf("of an account that WeChat does not know: %v after %d calls", err, r.calls()-calls)
					}
				}
				lists := r.wx.count(pathAuthorizerList)
				if got := imported(t, moverFor(t, next, 9), records, false).Total(); got.Written > 0 {
					t.Errorf("the same archive again: %+v", got)
				}
				time.Sleep(2 * rosterCheck)
				if n := r.wx.count(pathAuthorizerList) - lists; n > 0 {
					t.Errorf("then the list was read again, on %d pages", n)
				}
			})
		})
	}
}

// TestExportSpill: what waits on the node's disk is exported too.
func TestExportSpill(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.env.Spill = t.TempDir()
		r.Use(r.env)
		r.ticket(t, testPlatform)
		r.authorize(t, testPlatform, testAuthorizer)
		r.rotating()
		r.store.fail(func(op, name string) error {
			if op == "store" && name == testAuthKey.recordName() {
				return errors.New("full")
			}
			return nil
		})
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Fatal(err)
		}
		mv := moverFor(t, r.store, 7)
		mv.env.Spill = r.env.Spill
		records, moved := exported(t, mv)
		next := NewMemStore()
		imported(t, moverFor(t, next, 7), records, false)
		_, there, err := readThere[recordWire](t.Context(), moverFor(t, next, 7), testAuthKey.recordName())
		if err != nil {
			t.Fatal(err)
		}
		r.wx.set(func(f *fakeWeChat) {
			if there.RefreshToken != f.refresh[testAuthorizer] {
				t.Errorf("not the refresh token that WeChat takes; %+v", moved)
			}
		})
		r.store.fail(nil)
	})
}

// TestMergeToken: which of two records of two stores stays.
func TestMergeToken(t *testing.T) {
	t.Parallel()
	at := func(minutes int) time.Time {
		return time.Unix(1_700_000_000, 0).Add(time.Duration(minutes) * time.Minute)
	}
	rec := func(change func(*record)) *record {
		r := &record{
			Gen: 5, RefreshToken: secret.New("refresh-1"), AccessToken: secret.New("access-1"), ObtainedAt: at(10), ExpiresAt: at(130),
			AuthorizedAt: at(0), UserName: "gh_1",
		}
		if change != nil {
			change(r)
		}
		return r
	}
	for _, tt := range []struct {
		name         string
		there, comes *record
		want         verdict
		refresh      string // afterwards
	}{
		{"nothing there", nil, rec(nil), moveWrite, "refresh-1"},
		{"the same", rec(nil), rec(nil), moveSame, "refresh-1"},
		{"the same of another generation", rec(func(r *record) { r.Gen = 9 }), rec(nil), moveSame, "refresh-1"},
		{"an earlier token of a higher generation", rec(nil), rec(func(r *record) {
			r.Gen, r.ObtainedAt, r.AccessToken, r.RefreshToken = 50, at(5), secret.New("access-0"), secret.New("refresh-0")
		}), moveNewer, "refresh-1"},
		{"a later token of a lower generation", rec(nil), rec(func(r *record) {
			r.Gen, r.ObtainedAt, r.AccessToken, r.RefreshToken = 2, at(15), secret.New("access-2"), secret.New("refresh-2")
		}), moveWrite, "refresh-2"},
		{"a later authorization", rec(nil), rec(func(r *record) {
			r.Gen, r.AuthorizedAt, r.ObtainedAt, r.RefreshToken = 1, at(1), at(1), secret.New("refresh-2")
		}), moveWrite, "refresh-2"},
		{"an earlier authorization", rec(nil), rec(func(r *record) {
			r.Gen, r.AuthorizedAt, r.ObtainedAt, r.RefreshToken = 90, at(-1), at(90), secret.New("refresh-0")
		}), moveNewer, "refresh-1"},
		{"of an account that has gone since", &record{Gen: 2, AuthorizedAt: at(0), RevokedAt: at(20)}, rec(nil), moveNewer, ""},
		{"the end of the authorization", rec(nil), &record{Gen: 2, AuthorizedAt: at(0), RevokedAt: at(20)}, moveWrite, ""},
		{"the end of an earlier one", rec(func(r *record) { r.AuthorizedAt = at(30) }), &record{Gen: 2, AuthorizedAt: at(0), RevokedAt: at(20)}, moveNewer, "refresh-1"},
		{"a later authorization without a refresh token", rec(nil), rec(func(r *record) {
			r.AuthorizedAt, r.RefreshToken = at(1), secret.String{}
		}), moveWrite, "refresh-1"},
		{"the refresh token that a later authorization lacks", rec(func(r *record) { r.AuthorizedAt, r.RefreshToken = at(1), secret.String{} }), rec(nil), moveWrite, "refresh-1"},
		{"of one that was adopted from WeChat, with the generation alone", rec(func(r *record) {
			r.Gen, r.ObtainedAt, r.AccessToken, r.RefreshToken = 6, time.Time{}, secret.String{}, secret.New("refresh-9")
		}), rec(nil), moveNewer, "refresh-9"},
	} {
		var there *recordWire
		if tt.there != nil {
			wire := tt.there.wire()
			there = &wire
		}
		comes := tt.comes.wire()
		next, v, err := mergeToken(there, &comes)
		if v != tt.want || err != nil || (next != nil) != (tt.want == moveWrite) {
			t.Errorf("%s: %v %v %v, want %v", tt.name, next != nil, v, err, tt.want)
			continue
		}
		after := tt.there
		if next != nil {
			after = next.record()
			if tt.there != nil && (after.Gen <= tt.there.Gen || !after.supersedes(tt.there)) {
				t.Errorf("%s: who has the other in memory keeps it", tt.name)
			}
		}
		if after.RefreshToken.Reveal() != tt.refresh {
			t.Errorf("%s: %q stays", tt.name, after.RefreshToken.Reveal())
		}
	}
}

// TestImportUnderLiveGateways: older records come back to a store on which gateways have gone on, while they renew.
func TestImportUnderLiveGateways(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, _ *hub) {
		a.rotating()
		old, _ := exported(t, moverFor(t, a.store, 7))
		time.Sleep(2 * time.Hour)
		a.ticket(t, testPlatform)
		a.get(t, testAuthKey)
		// Another store's gateway renewed more often before that, which says nothing.
		stale := moverFor(t, NewMemStore(), 7)
		imported(t, stale, old, false)
		for range 5 {
			_, err := edit(t.Context(), stale, testAuthKey.recordName(), false, func(there *recordWire) (*recordWire, verdict, error) {
				next := *there
				next.Gen += 10
				return &next, moveWrite, nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		old, _ = exported(t, stale)
		var wg sync.WaitGroup
		for _, n := range []*rig{a, b} {
			wg.Go(func() {
				for range 20 {
					if _, err := n.Renew(t.Context(), testAuthKey, secret.String{}); err != nil && !errors.Is(err, ErrBackoff) {
						t.Error(err)
					}
				}
			})
		}
		for range 5 {
			got := imported(t, moverFor(t, &busStore{a.store, a.env.Store.(*busStore).hub}, 7), old, false)
			for _, c := range got.Classes {
				if c.Name == string(classAuthorizer) && c.Newer != 1 {
					t.Errorf("%+v", c)
				}
			}
		}
		wg.Wait()
		a.wantInStep(t)
	})
}

// TestImportIsHeard: a later record reaches the gateways on the store, and none of them asks WeChat.
func TestImportIsHeard(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, h *hub) {
		rec := a.stored(t, testAuthKey)
		wire := rec.wire()
		wire.AccessToken, wire.ObtainedAt, wire.Gen = "other-token-3", wire.ObtainedAt+30, 1
		plain := &Environment{Store: a.store}
		data, err := encodeRecord(plain.prepared(), testAuthKey.recordName(), wire)
		if err != nil {
			t.Fatal(err)
		}
		calls := a.calls()
		moved := imported(t, moverFor(t, &busStore{a.store, h}, 7), [][]byte{packRecord(testAuthKey.recordName(), data)}, false)
		if moved.Total().Written != 1 {
			t.Fatalf("%+v", moved)
		}
		for _, n := range []*rig{a, b} {
			if got := n.get(t, testAuthKey); got.Value.Reveal() != "other-token-3" {
				t.Errorf("generation %d is served", got.Generation)
			}
		}
		if n := a.calls() - calls; n > 0 {
			t.Errorf("%d calls to WeChat", n)
		}
	})
}

// TestImportRefusesNothingSilently: what cannot be read or written is counted and named, and the rest goes on.
func TestImportRefusesNothingSilently(t *testing.T) {
	t.Parallel()
	from := NewMemStore()
	mv := moverFor(t, from, 7)
	put := func(name string, in any) {
		if err := mv.m.storeRecord(t.Context(), mv.env, name, in); err != nil {
			t.Fatal(err)
		}
	}
	put(ticketName(testPlatform), ticketWire{Ticket: "ticket@@@1", CreatedAt: 5})
	put(testAuthKey.recordName(), recordWire{Gen: 1, RefreshToken: "refreshtoken@@@1"})
	other := AuthorizerKey(testPlatform, moveOther)
	put(other.recordName(), recordWire{Gen: 1, RefreshToken: "refreshtoken@@@2"})
	_ = from.Store(t.Context(), JSAPIKey("", testAccount).recordName(), []byte("torn"))
	records, moved := exported(t, mv)
	if sum := moved.Total(); sum.Written != 3 || sum.Refused != 1 || len(moved.Refusals) != 1 || !strings.Contains(moved.Refusals[0], "jsapi") {
		t.Errorf("export: %+v", moved)
	}

	into := NewMemStore()
	_ = into.Store(t.Context(), other.recordName(), []byte("torn"))
	newer, _ := encodeRecord(mv.env, "", struct{}{})
	records = append(records, packRecord("wechat/v1/of-tomorrow/a", newer), packRecord(root+"/authorizer/../x", newer),
		packRecord(AccountKey(testAccount).recordName(), []byte(`{"v":9}`)))
	moved = imported(t, moverFor(t, into, 8), records, false)
	if sum := moved.Total(); sum.Written != 2 || sum.Refused != 4 || len(moved.Refusals) != 4 {
		t.Errorf("import: %+v", moved)
	}
	for _, want := range []string{other.recordName() + " does not open with any seal_key, and others do", "of-tomorrow/a: this gateway knows no such record", "has version 9"} {
		if !slices.ContainsFunc(moved.Refusals, func(s string) bool { return strings.Contains(s, want) }) {
			t.Errorf("nothing says %q: %q", want, moved.Refusals)
		}
	}
	for name := range into.records {
		if strings.Contains(name, "tomorrow") || strings.Contains(name, "..") {
			t.Errorf("%s was written", name)
		}
	}
	// With a seal key that is not the store's nothing is written at all.
	before := maps.Clone(into.records)
	if _, err := moverFor(t, into, 9).Import(t.Context(), inTurn(records[:1]), false); err == nil || !strings.Contains(err.Error(), "seal_key") {
		t.Errorf("with another seal key: %v", err)
	}
	if !maps.EqualFunc(before, into.records, bytes.Equal) {
		t.Error("with another seal key something was written")
	}
	if _, err := moverFor(t, from, 9).Export(t.Context(), func([]byte) error { return nil }); err == nil || !strings.Contains(err.Error(), "none of 4 records can be read") {
		t.Errorf("export with another seal key: %v", err)
	}
	if _, err := moverFor(t, NewMemStore(), 7).Export(t.Context(), func([]byte) error { return nil }); !errors.Is(err, ErrNothingToMove) {
		t.Errorf("export of nothing: %v", err)
	}
	if _, err := mv.Import(t.Context(), inTurn([][]byte{{200, 1, 2}}), false); !errors.Is(err, errNoRecord) {
		t.Errorf("a record that is none: %v", err)
	}
}

// TestImportBreaksOff: the store fails in the middle, and the list of authorizers, which would say that none is missing, is
// not written. The next import finishes.
func TestImportBreaksOff(t *testing.T) {
	t.Parallel()
	from := moverFor(t, NewMemStore(), 7)
	const accounts = 3000
	for i := range accounts {
		k := AuthorizerKey(testPlatform, fmt.Sprintf("wx%016x", i))
		if err := from.m.storeRecord(t.Context(), from.env, k.recordName(), recordWire{Gen: 1, RefreshToken: "refreshtoken@@@" + k.AppID}); err != nil {
			t.Fatal(err)
		}
	}
	if err := from.m.storeRecord(t.Context(), from.env, rosterName(testPlatform), rosterWire{CompletedAt: 5}); err != nil {
		t.Fatal(err)
	}
	records, _ := exported(t, from)
	into := newFaultStore()
	var mu sync.Mutex
	left := accounts / 2
	into.fail(func(op, _ string) error {
		mu.Lock()
		defer mu.Unlock()
		if op == "store" {
			left--
		}
		if left < 0 {
			return errors.New("down")
		}
		return nil
	})
	if _, err := moverFor(t, into, 8).Import(t.Context(), inTurn(records), false); !errors.Is(err, ErrStore) {
		t.Errorf("a store that fails: %v", err)
	}
	if _, found := into.MemStore.records[rosterName(testPlatform)]; found {
		t.Error("the list counts as complete")
	}
	into.fail(nil)
	moved := imported(t, moverFor(t, into, 8), records, false).Total()
	if moved.Written+moved.Same != accounts+1 || moved.Same < accounts/4 {
		t.Errorf("the second time: %+v", moved)
	}
}

const listGood = `platform,appid,refresh_token
wx00000000000000aa,wx00000000000000dd,refreshtoken@@@hidden-1
wx00000000000000bb,wx00000000000000ee,"refreshtoken@@@hidden-2"
`

// TestImportList: the first use of an account that came by a list fetches a token, and nothing else is asked.
func TestImportList(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.wx.set(func(f *fakeWeChat) {
			f.strict = true
			f.refresh[testAuthorizer], f.refresh[moveOther] = "refreshtoken@@@hidden-1", "refreshtoken@@@hidden-2"
		})
		mv := moverFor(t, r.store, 7)
		for _, dry := range []bool{true, false} {
			if moved, err := mv.ImportCSV(t.Context(), strings.NewReader(listGood), dry); err != nil || moved.Total().Written != 2 {
				t.Fatalf("%+v %v", moved, err)
			}
		}
		if moved, err := mv.ImportCSV(t.Context(), strings.NewReader(listGood), false); err != nil || moved.Total().Same != 2 {
			t.Errorf("again: %+v %v", moved, err)
		}
		time.Sleep(time.Minute)
		calls := r.calls()
		r.get(t, testAuthKey)
		r.get(t, testAuthKey)
		if n := r.calls() - calls; n != 2 { // a component token, and this
			t.Errorf("%d calls", n)
		}
		// What is in use stays, whatever another list says; what never was is mended by it.
		mended := strings.ReplaceAll(listGood, "hidden", "mended")
		if moved, err := mv.ImportCSV(t.Context(), strings.NewReader(mended), false); err != nil || moved.Total().Newer != 1 || moved.Total().Written != 1 {
			t.Errorf("another list: %+v %v", moved, err)
		}
		if got := r.stored(t, AuthorizerKey(testPlatform2, moveOther)).RefreshToken.Reveal(); got != "refreshtoken@@@mended-2" {
			t.Errorf("%s", got)
		}
		if got := r.stored(t, testAuthKey).RefreshToken.Reveal(); got != "refreshtoken@@@hidden-1" {
			t.Errorf("%s", got)
		}
		// Who took the authorization back stays so.
		if err := r.Revoke(t.Context(), testPlatform, testAuthorizer, time.Now()); err != nil {
			t.Fatal(err)
		}
		if moved, err := mv.ImportCSV(t.Context(), strings.NewReader(mended), false); err != nil || moved.Total().Newer != 1 {
			t.Errorf("of an account that has gone: %+v %v", moved, err)
		}
		if _, err := r.Get(t.Context(), testAuthKey); !errors.Is(err, ErrNotAuthorized) {
			t.Errorf("Get: %v", err)
		}
	})
}

// TestImportListWithAccessToken: a token that lives is used to its end.
func TestImportListWithAccessToken(t *testing.T) {
	t.Parallel()
	for name, list := range map[string]string{
		"csv":  "\xef\xbb\xbfappid, Platform ,expires_at,access_token,refresh_token\r\n wx00000000000000dd,wx00000000000000aa,%d,access-1,refresh-1\r\n",
		"json": "\n[{\"appid\":\"wx00000000000000dd\",\n\"platform\":\"wx00000000000000aa\",\"expires_at\":%d,\n\"access_token\":\"access-1\",\"refresh_token\":\"refresh-1\"}]\n",
		"rows": `{"appid":"wx00000000000000dd","platform":"wx00000000000000aa","expires_at":"%d","access_token":"access-1","refresh_token":"refresh-1"}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				r := started(t)
				r.wx.set(func(f *fakeWeChat) { f.refresh[testAuthorizer] = "refresh-1" })
				mv := moverFor(t, r.store, 7)
				list = fmt.Sprintf(list, time.Now().Add(time.Hour).Unix())
				read := mv.ImportJSON
				if name == "csv" {
					read = mv.ImportCSV
				}
				if moved, err := read(t.Context(), strings.NewReader(list), false); err != nil || moved.Total().Written != 1 {
					t.Fatalf("%+v %v", moved, err)
				}
				calls := r.calls()
				if got := r.get(t, testAuthKey); got.Value.Reveal() != "access-1" || r.calls() != calls {
					t.Error("the token is not used")
				}
				time.Sleep(2 * time.Hour)
				r.ticket(t, testPlatform)
				if got := r.get(t, testAuthKey); got.Value.Reveal() == "access-1" {
					t.Error("the token is used after its end")
				}
			})
		})
	}
}

// TestListErrors: what is wrong with a list, said by line and field, and never with what stands there.
func TestListErrors(t *testing.T) {
	t.Parallel()
	const head = "platform,appid,refresh_token,access_token,expires_at\n"
	const ids = "wx00000000000000aa,wx00000000000000dd,"
	const js = `{"platform":"wx00000000000000aa","appid":"wx00000000000000dd",`
	for _, tt := range []struct {
		name, format, list string
		want               []string // an error, or refusals
	}{
		{"empty", "csv", "", []string{"line 1: no header: it must name the columns, such as: platform,appid,refresh_token,access_token,expires_at"}},
		{"semicolons", "csv", "platform;appid;refresh_token\nx\n", []string{"line 1: column 1 is none of platform, appid, refresh_token, access_token, expires_at: the first line must be a header, with commas between columns"}},
		{"UTF-16", "csv", "\xff\xfep\x00l\x00a\x00t\x00f\x00o\x00r\x00m\x00\n\x00", []string{"line 1: column 1 is none of platform, appid, refresh_token, access_token, expires_at: the first line must be a header, and the file saved as UTF-8"}},
		{"no header", "csv", ids + "hidden\n", []string{"line 1: column 1 is none of platform, appid, refresh_token, access_token, expires_at: the first line must be a header"}},
		{"column missing", "csv", "platform,appid\n", []string{"line 1: the column refresh_token is missing"}},
		{"column twice", "csv", "platform,appid,refresh_token,appid\n", []string{"line 1: the column appid comes twice"}},
		{"rows", "csv", head +
			ids + "hidden,,\n" + // fine
			ids + "hidden\n" +
			"hidden,wx00000000000000dd,hidden,,\n" +
			"wx00000000000000ff,wx00000000000000dd,hidden,,\n" +
			"wx00000000000000aa,WX00000000000000DD,hidden,,\n" +
			"wx00000000000000aa,wx00000000000000aa,hidden,,\n" +
			ids + ",,\n" +
			ids + "hid den,,\n" +
			ids + "hidden,hidden\x01,1\n" +
			ids + "hidden,hidden,\n" +
			ids + "hidden,hidden,hidden\n" +
			ids + "hidden,hidden,9999999999999\n" +
			ids + "\"hidden\"x,hidden,1\n" +
			ids + strings.Repeat("hidden", 200) + ",,\n",
			[]string{
				"line 3: 3 fields, and the header has 5",
				"line 4: platform: not an appid: want wx and 16 lower-case hexadecimal digits",
				"line 5: platform: the config has no such platform",
				"line 6: appid: not an appid: want wx and 16 lower-case hexadecimal digits",
				"line 7: appid: it is the platform's own",
				"line 8: refresh_token: missing",
				"line 9: refresh_token: has a character that no token of WeChat's has",
				"line 10: access_token: has a character that no token of WeChat's has",
				"line 11: expires_at: missing, and there is an access_token",
				"line 12: expires_at: want Unix seconds, or a time like 2026-01-02T15:04:05+08:00",
				"line 13: expires_at: later than any access token of WeChat's lives; it is in seconds",
				"line 14: the quotes are not in order",
				"line 15: refresh_token: longer than 1024 bytes",
			}},
		{"stray quotes", "csv", head +
			ids + "\"hidden,,\n" +
			"wx00000000000000aa,wx00000000000000d3,hidden,,\n" +
			"\n" +
			"wx00000000000000aa,wx00000000000000d4,\"hid\nden\",,\n" +
			"wx00000000000000aa,wx00000000000000d5,\"hidden\",,\r\n" +
			"wx00000000000000aa,wx00000000000000d6,hid\"den,,\n" +
			"wx00000000000000aa,wx00000000000000d7,\"hidden,,",
			[]string{
				"line 2: the quotes are not in order",
				"line 5: the quotes are not in order",
				"line 6: the quotes are not in order",
				"line 8: the quotes are not in order",
				"line 9: the quotes are not in order",
			}},
		{"long line", "csv", head + ids + strings.Repeat("hidden", 20_000) + "\n" + ids + "hidden\n" + ids + strings.Repeat("hidden", 20_000),
			[]string{"line 2: longer than 16384 bytes", "line 3: 3 fields, and the header has 5", "line 4: longer than 16384 bytes"}},
		{"an account twice", "csv", head +
			ids + ",,\n" + // not in order, so that it does not count
			ids + "hidden-1,,\n" +
			ids + "hidden-1,,\n" +
			ids + "hidden-2,,\n" +
			"wx00000000000000bb,wx00000000000000dd,hidden-2,,\n" +
			"wx00000000000000aa,wx00000000000000d2,hidden-2,,\n" +
			ids + "hidden-1,hidden,1\n",
			[]string{
				"line 2: refresh_token: missing",
				"line 5: the account is on line 3 too, with other tokens: line 3 counts",
				"line 8: the account is on line 3 too, with other tokens: line 3 counts",
			}},
		{"an account twice in JSON", "json", js + "\"refresh_token\":\"hidden-1\"}\n\n" + js + "\"refresh_token\":\"hidden-2\"}\n",
			[]string{"line 3: the account is on line 1 too, with other tokens: line 1 counts"}},
		{"array", "json", "[\n" + js + "\n\"refresh_token\":\"hidden\"},\n" + js + `"refresh_token":7},` + "\n\"hidden\",\n" + js + `"hidden":1},` + "\n" + js + "\"appid\":\"hidden\"}\n]\n",
			[]string{
				"line 4: refresh_token: not a text",
				"line 5: not an object",
				"line 6: a field is none of platform, appid, refresh_token, access_token, expires_at",
				"line 7: appid: comes twice",
			}},
		{"rows in JSON", "json", js + "\"refresh_token\":\"hidden\"}\n\n" + js + "\"refresh_token\":\"\"}\n" + js + "\"refresh_token\":null}\n",
			[]string{"line 3: refresh_token: missing", "line 4: refresh_token: missing"}},
		{"broken", "json", js + "\"refresh_token\":\"hidden\"}\n" + js + "hidden\n", []string{"line 2: not JSON: want an array of objects, or one object a line, with platform, appid, refresh_token, access_token, expires_at"}},
		{"cut", "json", "[" + js + "\"refresh_token\":\"hidden\"},\n" + js + "\"refresh", []string{"line 2: not JSON: want an array of objects, or one object a line, with platform, appid, refresh_token, access_token, expires_at"}},
		{"more behind the array", "json", "[]\n[]", []string{"line 2: not JSON: want an array of objects, or one object a line, with platform, appid, refresh_token, access_token, expires_at"}},
		{"CSV as JSON", "json", head + ids, []string{"line 1: not JSON: want an array of objects, or one object a line, with platform, appid, refresh_token, access_token, expires_at"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			mv := moverFor(t, NewMemStore(), 7)
			read := mv.ImportJSON
			if tt.format == "csv" {
				read = mv.ImportCSV
			}
			moved, err := read(t.Context(), strings.NewReader(tt.list), false)
			got := moved.Refusals
			if err != nil {
				got = []string{err.Error()}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("it says\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
			}
			if strings.Contains(strings.Join(got, "\n"), "hidden") {
				t.Error("a token is shown")
			}
		})
	}
}

// TestImportListReadsEveryLine: a stray quote costs its own line, and of two rows of an account the first one stays, on however
// many pages and goroutines the list is read.
func TestImportListReadsEveryLine(t *testing.T) {
	t.Parallel()
	var list strings.Builder
	list.WriteString("platform,appid,refresh_token\n")
	const accounts = movePage + movePage/2
	for _, version := range []string{"first", "first", "second"} {
		for i := range accounts {
			quote := ""
			if i%500 == 0 {
				quote = "\""
			}
			_, _ = fmt.Fprintf(&list, "%s,%s,%s%s\n", testPlatform, appidOf(0xa000+i), quote, version)
		}
	}
	for _, dry := range []bool{true, false} {
		s := NewMemStore()
		mv := moverFor(t, s, 7)
		moved, err := mv.ImportCSV(t.Context(), strings.NewReader(list.String()), dry)
		const good = accounts - 3
		if sum := moved.Total(); err != nil || sum.Written != good || sum.Same != good || sum.Refused != 3*accounts-2*good {
			t.Errorf("dry %v: %+v %v", dry, sum, err)
		}
		if dry {
			continue
		}
		for i := range accounts {
			_, rec, err := readThere[recordWire](t.Context(), mv, AuthorizerKey(testPlatform, appidOf(0xa000+i)).recordName())
			if err != nil || (rec == nil) != (i%500 == 0) || rec != nil && rec.record().RefreshToken.Reveal() != "first" {
				t.Fatalf("account %d: %v %v", i, rec != nil, err)
			}
		}
	}
}

// FuzzImportList: no list makes it panic, or write what is no record of an authorizer.
func FuzzImportList(f *testing.F) {
	f.Add(listGood, true)
	f.Add(`[{"platform":"wx00000000000000aa","appid":"wx00000000000000dd","refresh_token":"x"}]`, false)
	f.Add("{}\n{}", false)
	f.Fuzz(func(t *testing.T, list string, asCSV bool) {
		s := NewMemStore()
		mv := NewMover(&Environment{Store: s, Platforms: []PlatformCredentials{{AppID: testPlatform}}, Log: slog.New(slog.DiscardHandler)})
		read := mv.ImportJSON
		if asCSV {
			read = mv.ImportCSV
		}
		_, _ = read(context.Background(), strings.NewReader(list), false)
		for name := range s.records {
			if class, known := classOf(name); !known || class != classAuthorizer {
				t.Errorf("wrote %s", name)
			}
		}
	})
}
