package integration_test

import (
	mathrand "math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
)

// TestFleet has nodes die, sleep, restart and lose Redis, and Redis itself die and fail over, one after the other and under
// load, against a WeChat whose tokens live for seconds, which voids a token at once when there is another, and changes the
// refresh token with each renewal. The soak test does the same for an hour. It is not parallel: on a machine that is too busy
// for them, nodes that live seem to be dead.
func TestFleet(t *testing.T) {
	run := newFleetRun(t, 3)
	for _, fault := range fleetFaults {
		run.quiet(3 * time.Second)
		fault(run)
	}
	t.Logf("\n%s", run.finish(10*time.Second))
}

// TestFleetSentinels has Sentinels fail over, whom the nodes ask for the server.
func TestFleetSentinels(t *testing.T) {
	t.Parallel()
	const name = "gateways"
	server := redistest.Start(t, "--appendonly", "yes")
	replica := redistest.Replica(t, server.Addr, "--appendonly", "yes")
	sentinels := redistest.Sentinels(t, name, server, 1)
	r := &fleetRun{fleetLoad: newFleetLoad(), replica: replica}
	r.start(newFleet(t, fleetOptions{
		nodes: 3, server: server, simulator: r.simulator, store: []string{"address {env.SENTINELS}", "sentinel " + name},
		env: []string{"WECHAT_LOG_LEVEL=INFO", "SENTINELS=" + strings.Join(sentinels, ",")},
	}))
	r.quiet(3 * time.Second)
	r.fail(redisOver, nil, func() error {
		server.Kill()
		redistest.AwaitMaster(t, sentinels, name, replica) // until then no node can find it
		return nil
	})
	r.f.redis = replica
	t.Logf("\n%s", r.finish(10*time.Second))
}

// fleetRun is a fleet under load, whose Redis has a replica.
type fleetRun struct {
	*fleetLoad
	replica *redistest.Server
}

func newFleetRun(t *testing.T, nodes int) *fleetRun {
	t.Helper()
	r := &fleetRun{fleetLoad: newFleetLoad()}
	options := []string{"--appendonly", "yes"}
	f := newFleet(t, fleetOptions{nodes: nodes, redis: options, env: []string{"WECHAT_LOG_LEVEL=INFO"}, simulator: r.simulator})
	r.replica = redistest.Replica(t, f.redis.Addr, options...)
	r.start(f)
	return r
}

// simulator has many lives of tokens pass in a short time.
func (r *fleetRun) simulator(c *wxsim.Config) {
	c.Observe = r.observe
	c.Lives.Component, c.Lives.Authorizer = 20*time.Second, 12*time.Second
	c.Lives.Stable, c.Lives.StableOverlap = 60*time.Second, 20*time.Second
}

// fleetFaults are the faults. Each ends when all nodes are well again.
var fleetFaults = []func(*fleetRun){
	(*fleetRun).killNode, (*fleetRun).freezeNode, (*fleetRun).restartNode, (*fleetRun).cutNodeOff, (*fleetRun).killRedis, (*fleetRun).failOver,
}

func (r *fleetRun) quiet(d time.Duration) {
	r.enter(nothingFails)
	r.wait(d)
}

// wait lets the load go on for a while.
func (r *fleetRun) wait(d time.Duration) {
	select {
	case <-time.After(d):
	case <-r.f.t.Context().Done():
	}
}

func (r *fleetRun) node() *fleetNode {
	return r.f.nodes[mathrand.IntN(len(r.f.nodes))] //nolint:gosec // no secret
}

// fail runs a fault from its begin to its end, and waits until all is well again.
func (r *fleetRun) fail(kind string, n *fleetNode, do func() error) {
	r.f.t.Helper()
	if locksGone(&fleetFault{kind: kind}) {
		r.wait(r.untilOnePush())
	}
	x := r.begin(kind, n)
	err := do()
	r.end(x)
	if err != nil {
		r.f.errorf("%s: %v", kind, err)
	}
	r.recover(time.Now())
}

// untilOnePush is how long it takes until no push meets two faults of Redis: each may cost the message one more run.
func (r *fleetRun) untilOnePush() (wait time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, x := range r.faults {
		if locksGone(x) {
			wait = max(wait, time.Until(x.to.Add(pushLife)))
		}
	}
	return wait
}

func (r *fleetRun) killNode() {
	n := r.node()
	r.fail(nodeKilled, n, func() error {
		if err := n.kill(); err != nil {
			return err
		}
		r.wait(3 * time.Second)
		return n.revive(r.f.t.Context())
	})
}

func (r *fleetRun) freezeNode() {
	n := r.node()
	r.fail(nodeFrozen, n, func() error {
		n.freeze()
		r.wait(leaseLife + 2*time.Second)
		n.thaw()
		return nil
	})
}

func (r *fleetRun) restartNode() {
	n := r.node()
	r.fail(nodeRestarted, n, func() error {
		n.set(true)
		r.wait(noticed + 500*time.Millisecond) // the balancer is told first
		if err := n.Stop(); err != nil {
			return err
		}
		return n.revive(r.f.t.Context())
	})
}

func (r *fleetRun) cutNodeOff() {
	n := r.node()
	r.fail(nodeCutOff, n, func() error {
		if mathrand.IntN(2) == 0 { //nolint:gosec // no secret
			n.relay.Hang()
		} else {
			n.relay.Cut()
		}
		r.wait(8 * time.Second)
		n.relay.Pass()
		return nil
	})
}

func (r *fleetRun) killRedis() {
	r.fail(redisKilled, nil, func() error {
		r.f.redis.Kill()
		r.wait(2 * time.Second)
		r.f.redis.Restart()
		r.f.redis.Do("REPLICAOF", "NO", "ONE") // it may have been started as the replica
		return nil
	})
}

// failOver has the replica take over, and the old master, when it is back, follow it.
func (r *fleetRun) failOver() {
	old := r.f.redis
	r.fail(redisOver, nil, func() error {
		old.Kill()
		r.wait(time.Second)
		r.replica.Do("REPLICAOF", "NO", "ONE")
		for _, n := range r.f.nodes {
			n.relay.Retarget(r.replica.Addr)
		}
		return nil
	})
	r.f.redis, r.replica = r.replica, old
	old.Restart()
	redistest.Follow(r.f.t, old, r.f.redis.Addr)
}

// finish ends the load after a while of quiet, and judges.
func (r *fleetRun) finish(quiet time.Duration) (table string) {
	r.f.t.Helper()
	r.quiet(quiet)
	r.stop()
	return r.judge()
}
