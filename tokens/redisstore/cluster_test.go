package redisstore

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
)

// goesOn is how soon after a replica has taken over all is as before.
const goesOn = 5 * time.Second

// TestClusterFailsOver: a master of a Cluster dies before its replica has got the last writes. Whether it had the records
// or the channel of the news, nothing that was acknowledged is lost, each token is refreshed once, and the nodes hear
// of each other again.
func TestClusterFailsOver(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name      string
		news, rec bool // what the master has
	}{
		{"master of the records", false, true},
		{"master of the news", true, false},
		{"master of both", true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			masters, replicas := redistest.ReplicatedCluster(t)
			o := Options{Addresses: []string{masters[0].Addr, masters[1].Addr}, Cluster: true}
			wx := new(fakeWeChat)
			folder := folderOf(authorizer)
			of := func(key string) int { return redistest.MasterOf(masters, key) }
			// The hash tag is the same with every prefix, and the channel's place is not.
			for i := 0; o.Prefix == "" || (of(o.Prefix+folder) == of(o.Prefix+"changed:0")) != (tt.news && tt.rec); i++ {
				o.Prefix = fmt.Sprintf("wechat%d:", i)
			}
			victim := of(o.Prefix + folder)
			if !tt.rec {
				victim = of(o.Prefix + "changed:0")
			}
			server := masters[of(o.Prefix+folder)]
			if tt.rec {
				server = replicas[victim]
			}
			clusterFailsOver(t, wx, o, masters[victim], replicas[victim], func() string {
				return server.Client().HGet(t.Context(), o.Prefix+folder, authorizer).Val()
			})
		})
	}
}

// folderOf is the key of an authorizer's folder, without the prefix.
func folderOf(appid string) string {
	sum := sha256.Sum256([]byte(appid))
	return "{wechat/v1/authorizer/" + platform + "/" + hex.EncodeToString(sum[:1]) + "}"
}

func clusterFailsOver(t *testing.T, wx *fakeWeChat, o Options, master, replica *redistest.Server, record func() string) {
	t.Helper()
	a, b := newNodeOn(t, wx, o), newNodeOn(t, wx, o)
	a.authorize(t)
	redistest.Eventually(t, "node B has the account", func() error { _, err := b.Get(t.Context(), authKey); return err })
	redistest.Eventually(t, "the replica has got all", func() error {
		if n := master.Do("WAIT", 1, 100); n != int64(1) {
			return errors.New("not yet")
		}
		return nil
	})

	replica.Pause() // and what is on the way to it ends with the connection
	master.Do("CLIENT", "KILL", "TYPE", "replica")
	a.authorize(t)
	token := a.get(t, authKey)
	redistest.Eventually(t, "node B has heard", func() error {
		if !b.get(t, authKey).Value.Same(token.Value) {
			return errors.New("not yet")
		}
		return nil
	})
	master.Kill()
	replica.Resume()
	died := time.Now()
	a.servesOn(t, authKey, token)
	b.servesOn(t, authKey, token)
	redistest.Eventually(t, "the replica takes over", func() error {
		if role, _ := replica.Do("INFO", "replication").(string); !strings.Contains(role, "role:master") {
			return errors.New("not yet")
		}
		return nil
	})
	over := time.Now()
	within := func(what string, try func() error) {
		t.Helper()
		redistest.Eventually(t, what, try)
		if took := time.Since(over); took > goesOn {
			t.Errorf("%s: %v after the replica took over", what, took)
		}
	}
	within("the record that the replica did not have", func() error {
		if w, u := a.Waiting(), a.Unsaved(); w+u > 0 {
			return fmt.Errorf("%d wait, %d unsaved", w, u)
		}
		if !strings.Contains(record(), fmt.Sprintf("%q", wx.current())) {
			return errors.New("is not there")
		}
		return nil
	})
	within("tickets are taken", func() error { return b.ticket(t) })
	t.Logf("the replica took over %v after its master died, and all went on %v later", over.Sub(died), time.Since(over))

	before := wx.count()
	token = b.get(t, authKey)
	var wg sync.WaitGroup
	for range 20 {
		for _, n := range []*node{a, b} {
			wg.Go(func() {
				if _, err := n.Renew(t.Context(), authKey, token.Value); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	if c := wx.count() - before; c != 1 {
		t.Errorf("%d refreshes of one token", c)
	}
	for _, pair := range [][2]*node{{a, b}, {b, a}} {
		pair[0].authorize(t)
		token := pair[0].get(t, authKey)
		start := time.Now()
		redistest.Eventually(t, "the other node hears", func() error {
			if !pair[1].get(t, authKey).Value.Same(token.Value) {
				return errors.New("not yet")
			}
			return nil
		})
		if took := time.Since(start); took > inForce {
			t.Errorf("an authorization on one node counts on the other %v later", took)
		}
	}
	if err := a.accept(t); err != nil {
		t.Errorf("an event is not taken: %v", err)
	}
}
