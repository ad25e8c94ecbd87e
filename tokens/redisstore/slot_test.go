package redisstore

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// slotStop is for how long a machine may stand still before what happens while a slot moves says nothing: operations have operationLimit.
const slotStop = 100 * time.Millisecond

// move is a slot of a Cluster on its way from one node to another.
type move struct {
	nodes    []*redistest.Server
	from, to *redistest.Server
	slot     any
}

// beginMove begins to move the slot of a key, as redis-cli does.
func beginMove(nodes []*redistest.Server, key string) *move {
	i := redistest.MasterOf(nodes, key)
	m := &move{nodes: nodes, from: nodes[i], to: nodes[(i+1)%len(nodes)]}
	m.slot = m.from.Do("CLUSTER", "KEYSLOT", key)
	m.to.Do("CLUSTER", "SETSLOT", m.slot, "IMPORTING", m.from.Do("CLUSTER", "MYID"))
	m.from.Do("CLUSTER", "SETSLOT", m.slot, "MIGRATING", m.to.Do("CLUSTER", "MYID"))
	return m
}

// take moves a key.
func (m *move) take(key string) {
	host, port, _ := net.SplitHostPort(m.to.Addr)
	m.from.Do("MIGRATE", host, port, key, 0, 10_000)
}

// end says whose the slot is: to its new node first, since nodes that send clients to each other serve none.
func (m *move) end() {
	for _, n := range append([]*redistest.Server{m.to, m.from}, m.nodes...) {
		n.Do("CLUSTER", "SETSLOT", m.slot, "NODE", m.to.Do("CLUSTER", "MYID"))
	}
}

func turns(nodes []*redistest.Server) (turns []func()) {
	for _, n := range nodes {
		turns = append(turns, n.Turn)
	}
	return turns
}

// TestClusterMovesASlot to another node: nobody notices, with a lock or without, whatever of the slot has moved, and for however long that
// takes. Two nodes would renew one token if there were no locks meanwhile.
func TestClusterMovesASlot(t *testing.T) {
	t.Parallel()
	nodes := redistest.Cluster(t)
	o := Options{Addresses: []string{nodes[0].Addr}, Cluster: true}
	round := 0
	for try := range stall.Tries(t, slotStop, turns(nodes)...) {
		round++
		folder := fmt.Sprintf("wechat/v1/round%d", round) // in a slot of its own
		movesASlot(t, try, nodes, o, folder)
	}
}

func movesASlot(t *testing.T, try *stall.Try, nodes []*redistest.Server, o Options, folder string) {
	t.Helper()
	a, b := open(t, o), open(t, o)
	defer a.Close()
	defer b.Close()
	record := folder + "/wx1"
	want := func(what string, err error) {
		t.Helper()
		if err != nil {
			try.Errorf("%s: %v", what, err)
		}
	}
	want("Store", a.Store(t.Context(), record, []byte("0")))
	lock := func(s *Store, name string, wait time.Duration) (func(), error) {
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		defer cancel()
		return s.Lock(ctx, name)
	}
	// writes are those of who has no lock, and of who has one, which is not another's meanwhile.
	writes := func(when string) {
		t.Helper()
		want(when+": Store", a.Store(t.Context(), record, []byte("1")))
		want(when+": Swap", a.Swap(t.Context(), record, []byte("1"), []byte("2")))
		for i := range 2 { // one that nobody has had, and one that was given back
			unlock, err := lock(a, record, operationLimit)
			if want(fmt.Sprint(when, ": Lock ", i), err); err != nil {
				return
			}
			if _, err := lock(b, record, 300*time.Millisecond); !errors.Is(err, tokens.ErrLockHeld) {
				try.Errorf("%s: Lock of a held lock: %v", when, err)
			}
			start := time.Now()
			want(when+": Swap under a lock", a.Swap(t.Context(), record, []byte("2"), []byte("3")))
			want(when+": Store under a lock", a.Store(t.Context(), record, []byte("4")))
			want(when+": Delete under a lock", a.Delete(t.Context(), record))
			want(when+": Delete of what is not there", a.Delete(t.Context(), record))
			want(when+": Store of what was not there", a.Store(t.Context(), record, []byte("3")))
			if took := try.Since(start); took > operationLimit/2 {
				try.Errorf("%s: writes under a lock took %v", when, took)
			}
			if held, err := b.Load(t.Context(), record); err != nil || string(held) != "3" {
				try.Errorf("%s: the record is %q, %v", when, held, err)
			}
			if err := a.Swap(t.Context(), record, []byte("2"), []byte("4")); !errors.Is(err, tokens.ErrSwapped) {
				try.Errorf("%s: Swap of another value: %v", when, err)
			}
			want(when+": Swap back", a.Swap(t.Context(), record, []byte("3"), []byte("2")))
			unlock()
			if i == 1 {
				continue
			}
			lost, err := lock(a, record, operationLimit)
			if want(when+": Lock", err); err != nil {
				return
			}
			want(when+": the lock ends", a.release(a.held[record]))
			if other, err := lock(b, record, operationLimit); err != nil {
				try.Errorf("%s: Lock of one that has ended: %v", when, err)
			} else {
				other()
			}
			if err := a.Swap(t.Context(), record, []byte("2"), []byte("older")); !errors.Is(err, tokens.ErrLockLost) {
				try.Errorf("%s: Swap under a lock that another had: %v", when, err)
			}
			if err := a.Store(t.Context(), record, []byte("older")); !errors.Is(err, tokens.ErrLockLost) {
				try.Errorf("%s: Store under a lock that another had: %v", when, err)
			}
			if err := a.Delete(t.Context(), record); !errors.Is(err, tokens.ErrLockLost) {
				try.Errorf("%s: Delete under a lock that another had: %v", when, err)
			}
			lost()
		}
	}
	key, field := a.place(record)
	m := beginMove(nodes, key)
	writes("nothing has moved")
	for _, moved := range []string{key, lockKey(key, field)} {
		m.take(moved)
		writes(moved + " has moved")
	}
	record = folder + "/wx2" // of which nothing is there, but for the folder
	writes("another record")
	m.end()
	writes("the slot has moved")

	err := open(t, Options{Addresses: []string{m.from.Addr}}).Store(t.Context(), record, nil)
	if wrong := lacking(err, "for which store redis has the option cluster", "none"); wrong != "" {
		try.Errorf("%s", wrong)
	}
}

// TestClusterDisagrees: nodes that send a command to each other, as at the end of a move by some tools, are waited for; and nobody is told
// to say that it is a Cluster.
func TestClusterDisagrees(t *testing.T) {
	t.Parallel()
	nodes := redistest.Cluster(t)
	s := open(t, Options{Addresses: []string{nodes[0].Addr}, Cluster: true})
	for try := range stall.Tries(t, slotStop, turns(nodes)...) {
		folder, _ := s.place(locked)
		i := redistest.MasterOf(nodes, folder)
		from, to := nodes[i], nodes[(i+1)%len(nodes)]
		slot, mine, others := from.Do("CLUSTER", "KEYSLOT", folder), from.Do("CLUSTER", "MYID"), to.Do("CLUSTER", "MYID")
		from.Do("DEL", folder)
		from.Do("CLUSTER", "SETSLOT", slot, "NODE", others)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		err := s.Store(ctx, locked, []byte("x"))
		cancel()
		if wrong := lacking(err, "--cluster check", "has the option cluster"); wrong != "" {
			try.Errorf("Store: %s", wrong)
		}
		_, err = s.Load(t.Context(), locked)
		if wrong := lacking(err, "--cluster check", "has the option cluster"); wrong != "" {
			try.Errorf("Load: %s", wrong)
		}
		agreed := time.AfterFunc(operationLimit/4, func() { from.Do("CLUSTER", "SETSLOT", slot, "NODE", mine) })
		if err := s.Store(t.Context(), locked, []byte("x")); err != nil {
			try.Errorf("Store: %v", err)
		}
		if agreed.Stop() {
			try.Errorf("it did not wait")
			from.Do("CLUSTER", "SETSLOT", slot, "NODE", mine)
		}
	}
}

// TestClusterNodeThatDoesNotTell: one is enough, whatever the others say.
func TestClusterNodeThatDoesNotTell(t *testing.T) {
	t.Parallel()
	nodes := redistest.Cluster(t)
	for _, n := range nodes {
		n.Do("ACL", "SETUSER", "gateway", "on", ">pass", "~*", "&*", "+@all")
	}
	nodes[1].Do("ACL", "SETUSER", "gateway", "-info")
	s, _, reports := reporting(t, Options{Addresses: []string{nodes[0].Addr}, Cluster: true, Username: "gateway", Password: secret.New("pass")})
	select {
	case err := <-reports:
		if !errors.Is(err, ErrUntold) || !strings.Contains(err.Error(), "NOPERM") {
			t.Errorf("reported %v, want %v", err, ErrUntold)
		}
	case <-time.After(10 * time.Second):
		t.Error("nothing is reported")
	}
	if err := s.Unfit(t.Context()); err != nil {
		t.Errorf("Unfit: %v", err)
	}
}

// TestClusterNodeThatIsUnfit is found, whichever it is, and one that takes no heartbeat.
func TestClusterNodeThatIsUnfit(t *testing.T) {
	t.Parallel()
	nodes := redistest.Cluster(t)
	for try := range stall.Tries(t, slotStop, turns(nodes)...) {
		for i, n := range nodes {
			n.Do("ACL", "SETUSER", "gateway", "on", ">pass", "~*", "&*", "+@all")
			if i == 0 {
				n.Do("ACL", "SETUSER", "gateway", "-publish")
			}
		}
		user := open(t, Options{Addresses: []string{nodes[1].Addr}, Cluster: true, Username: "gateway", Password: secret.New("pass")})
		if wrong := lacking(user.failure(t.Context(), user.clusterBeats().send(t.Context())), "'publish'", "pass "); wrong != "" {
			try.Errorf("%s", wrong)
		}
		user.Close()
		s := open(t, Options{Addresses: []string{nodes[0].Addr}, Cluster: true})
		for _, n := range nodes {
			n.Do("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
			if err := s.Unfit(t.Context()); !errors.Is(err, ErrEvicts) || strings.Count(err.Error(), "allkeys-lru") != 1 {
				try.Errorf("Unfit: %v, want %v", err, ErrEvicts)
			}
			n.Do("CONFIG", "SET", "maxmemory-policy", "noeviction")
		}
		s.Close()
	}
}
