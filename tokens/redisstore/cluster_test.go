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
	"github.com/caddy-wechat/caddy-wechat/internal/stall"
)

// goesOn is how soon after a replica has taken over it is in use. It may also not have got that a lock was released,
// which then counts for leaseLife.
const goesOn = 5 * time.Second

// TestClusterFailsOver: a master of a Cluster dies before its replica has got the last writes. Whether it had the records
// or the channel of the news, nothing that was acknowledged is lost, each token is refreshed once, and the nodes hear
// of each other again.
func TestClusterFailsOver(t *testing.T) {
	t.Parallel()
	for name, news := range map[string]bool{"master of the records": false, "master of records and news": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			masters, replicas := redistest.ReplicatedCluster(t)
			o := Options{Addresses: []string{masters[0].Addr, masters[1].Addr}, Cluster: true}
			folder := folderOf(authorizer)
			of := func(key string) int { return redistest.MasterOf(masters, key) }
			// The hash tag is the same with every prefix, and the channel's place is not.
			for i := 0; o.Prefix == "" || (of(o.Prefix+folder) == of(o.Prefix+"changed:0")) != news; i++ {
				o.Prefix = fmt.Sprintf("wechat%d:", i)
			}
			victim := of(o.Prefix + folder)
			clusterFailsOver(t, o, masters[victim], replicas[victim])
		})
	}
}

// recordOf is the name of another record in the folder of the authorizer's.
func recordOf(appid string) string { return strings.Trim(folderOf(authorizer), "{}") + "/" + appid }

// folderOf is the key of an authorizer's folder, without the prefix.
func folderOf(appid string) string {
	sum := sha256.Sum256([]byte(appid))
	return "{wechat/v1/authorizer/" + platform + "/" + hex.EncodeToString(sum[:1]) + "}"
}

func clusterFailsOver(t *testing.T, o Options, master, replica *redistest.Server) {
	t.Helper()
	wx := new(fakeWeChat)
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
	over, w := time.Now(), stall.New(t, replica.Turn)
	within := func(limit time.Duration, what string, try func() error) {
		t.Helper()
		redistest.Eventually(t, what, try)
		if took := w.Since(over); took > limit {
			t.Errorf("%s: %v after the replica took over", what, took)
		}
	}
	within(goesOn, "tickets are taken", func() error { return b.ticket(t) })
	within(goesOn, "records are taken", func() error { return b.store.Store(t.Context(), recordOf("wx1"), []byte("x")) })
	within(leaseLife+goesOn, "the record that the replica did not have", func() error {
		if w, u := a.Waiting(), a.Unsaved(); w+u > 0 {
			return fmt.Errorf("%d wait, %d unsaved", w, u)
		}
		record := replica.Client().HGet(t.Context(), o.Prefix+folderOf(authorizer), authorizer).Val()
		if !strings.Contains(record, fmt.Sprintf("%q", wx.current())) {
			return errors.New("is not there")
		}
		return nil
	})
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
		for try := range stall.Tries(t, stepStop, replica.Turn) {
			pair[0].authorize(t)
			token := pair[0].get(t, authKey)
			start := time.Now()
			redistest.Eventually(t, "the other node hears", func() error {
				if !pair[1].get(t, authKey).Value.Same(token.Value) {
					return errors.New("not yet")
				}
				return nil
			})
			if took := try.Since(start); took > inForce {
				try.Errorf("an authorization on one node counts on the other %v later", took)
			}
		}
	}
	if err := a.accept(t); err != nil {
		t.Errorf("an event is not taken: %v", err)
	}
}
