package redisstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// A heartbeat is published every beatEvery on the way that changes go. When none of one's own has come back for
	// silenceMost, changes may go by unheard, whatever the connection looks like: it may be dead without a sign, or lead to
	// a server that is the master no more.
	beatEvery   = 300 * time.Millisecond
	silenceMost = time.Second
	// beatLimit leaves a heartbeat the time to have a connection made on a slow line, which the next one then finds. The first one needs
	// that connection, and may come back as late.
	beatLimit = 2 * silenceMost
	// againFirst and againMost are the pauses before another attempt to listen, less half by chance: all nodes lose
	// their server at the same time.
	againFirst = 50 * time.Millisecond
	againMost  = time.Second
	// reportEvery is how rarely a trouble that lasts is reported again.
	reportEvery = 10 * time.Minute
	// lookEvery is how often a server that is listened to is asked whether it is fit for what it is to keep: what it does when it is
	// full can be changed while it runs.
	lookEvery = time.Minute
	// proofs is how many scripts publish before it is believed that what scripts publish is heard, each with a key in another
	// slot: behind a proxy, those of the channel's own shard are heard, and no others.
	proofs = 16
	// maxHeard bounds the messages that wait for the listener.
	maxHeard = 64 + proofs
	// leastVersion of Redis, the first number of it, runs our scripts.
	leastVersion = 7
)

var (
	// ErrEvicts: the server is set up to throw away records when it is full.
	ErrEvicts = errors.New("redis may throw away refresh tokens when its memory is full: set maxmemory-policy to noeviction")
	// ErrForgets: the server is set up to throw away what has an end when it is full, which records have not.
	ErrForgets = errors.New("redis may throw away locks, logins, and which messages were delivered, when its memory is full: set maxmemory-policy to noeviction")
	// ErrUntold: the server does not tell what it does when it is full.
	ErrUntold = errors.New("redis does not say what it does when its memory is full: see to it that maxmemory-policy is noeviction, of a managed Redis in its console")
	// ErrTooOld: the server is of before Redis 7.0, and refuses locks and claims.
	ErrTooOld = errors.New("redis is too old: version 7.0 or later is needed")
	// ErrReplica: the server takes no writes.
	ErrReplica = errors.New("redis is a replica, which takes no writes: give the address of its master, or those of the Sentinels")

	// ErrSplitsReads: what answers takes writes, and reads from a replica.
	ErrSplitsReads = errors.New("redis takes writes and answers as a replica, so that reads may be of a moment ago: turn off the splitting of reads and writes, or give the address of the master")
	// ErrLosesNews: what scripts publish does not come back, though what is published otherwise does.
	ErrLosesNews = errors.New("redis does not pass on what scripts publish, as the proxy of a cluster does: docs/clustering.md has what to choose of a managed Redis")

	errSilent = errors.New("nothing that is published comes back")
	errMoved  = errors.New("the Cluster has other masters")
	errAgain  = errors.New("it was subscribed anew on the way, and news may have been missed")
)

// Watch implements tokens.Bus.
func (s *Store) Watch(ctx context.Context, l tokens.Listener) {
	pause := againFirst
	var reported time.Time // zero: all is well
	for {
		err := s.listen(ctx, l, func() {
			pause = againFirst
			s.losesNews.Store(false)
			if !reported.IsZero() {
				s.report(nil)
				reported = time.Time{}
			}
		})
		if ctx.Err() != nil {
			return
		}
		s.losesNews.Store(errors.Is(err, ErrLosesNews))
		if now := time.Now(); reported.IsZero() || now.Sub(reported) >= reportEvery {
			reported = now
			s.report(s.failure(ctx, err))
		}
		t := time.NewTimer(pause/2 + mathrand.N(pause/2)) //nolint:gosec // no secret
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
		pause = min(2*pause, againMost)
	}
}

// listen subscribes and passes on what it hears until that fails or ctx ends. Begun is called when the first heartbeat has come
// back, and what scripts publish too: a subscription alone does not tell that anything comes by way of it.
func (s *Store) listen(ctx context.Context, l tokens.Listener, begun func()) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cluster := s.clusterBeats()
	if cluster != nil {
		cluster.look(ctx)
	}
	sub := s.client.Subscribe(ctx, s.channel)
	defer func() { _ = sub.Close() }() // which ends Receive

	heard := make(chan any, maxHeard)
	failed := make(chan error, 1)
	began := false
	defer func() {
		if began { // before the heartbeat has ended that is on its way, maybe over a dead connection
			l.Listening(false)
		}
	}()
	begin := func() {
		began = true
		s.freeAgain()
		l.Listening(true)
		begun()
		wg.Go(func() { s.checkServer(ctx) })
	}
	wg.Go(func() {
		for {
			msg, err := sub.Receive(ctx)
			if err != nil {
				failed <- err
				return
			}
			select {
			case heard <- msg:
			case <-ctx.Done():
				return
			}
		}
	})
	beats := time.NewTicker(beatEvery)
	defer beats.Stop()
	looks := time.NewTicker(s.look)
	defer looks.Stop()
	last := time.Now()
	var proof proof
	subscribed := false
	silent := cluster == nil // no heartbeat has come back; a Cluster's count for themselves
	sent := make(chan error, 1)
	var beating bool  // a heartbeat is on its way
	var refused error // why the last was not sent
	beat := func() {
		if beating {
			return
		}
		beating = true
		var marks []string
		if proof.wanted {
			marks = proof.begin()
		}
		wg.Go(func() {
			limit := silenceMost
			if cluster == nil {
				limit = beatLimit
			}
			ctx, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			switch {
			case cluster != nil:
				sent <- cluster.send(ctx)
				return
			case len(marks) > 0: // in the beat's place, since another connection takes as long again
				sent <- s.prove(ctx, marks)
				return
			}
			sent <- s.client.Publish(ctx, s.channel, s.origin+" ").Err()
		})
	}
	for {
		select {
		case msg := <-heard:
			switch msg := msg.(type) {
			case *redis.Subscription:
				if subscribed { // a proxy that has lost its server may do so by itself
					return errAgain
				}
				subscribed, last = true, time.Now()
				beat()
			case *redis.Message:
				origin, name, _ := strings.Cut(msg.Payload, " ")
				origin, master, _ := strings.Cut(origin, viaMaster)
				switch {
				case origin == s.origin && cluster != nil:
					if master != "" && cluster.came(master) {
						begin()
					}
				case origin == s.origin && master != "":
					last = time.Now()
					if proof.came(master) {
						begin()
					}
				case origin == s.origin:
					last = time.Now()
					if silent {
						silent, proof.wanted = false, true
						beat()
					}
				case name != "":
					l.Changed(name)
				}
			}
		case refused = <-sent:
			beating = false
			if proof.underWay {
				proof.end()
				if _, said := errors.AsType[redis.Error](refused); said {
					return refused
				}
				proof.wanted = refused != nil && len(proof.missing) > 0 // once more
			}
			if proof.wanted && refused == nil {
				beat()
			}
		case err := <-failed:
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-looks.C:
			wg.Go(func() { s.checkServer(ctx) })
		case <-beats.C:
			if cluster != nil {
				if at := cluster.last(); !at.IsZero() {
					last = at
				}
				if cluster.moved() {
					return errMoved
				}
			}
			most := silenceMost
			if silent {
				most = beatLimit
			}
			if time.Since(last) > most {
				if refused != nil { // it says why
					return fmt.Errorf("%w: %w", errSilent, refused)
				}
				return errSilent
			}
			if proof.failed() {
				return ErrLosesNews
			}
			beat()
		}
	}
}

// proof is that what scripts publish is heard, as the changes of records are. A service may have a proxy before its shards that
// leads what is published and subscribed to one of them, and knows nothing of what scripts do.
type proof struct {
	round    int
	wanted   bool            // it is to begin with the next beat
	underWay bool            // scripts are being sent
	missing  map[string]bool // what they publish and has not come
	ran      time.Time       // when all had run
}

// begin begins a round, and returns what its scripts are to publish.
func (p *proof) begin() (marks []string) {
	p.round++
	p.wanted, p.underWay, p.missing = false, true, make(map[string]bool, proofs)
	for i := range proofs {
		mark := strconv.Itoa(p.round) + "." + strconv.Itoa(i)
		p.missing[mark] = true
		marks = append(marks, mark)
	}
	return marks
}

// end notes that the scripts have run, or could not be sent.
func (p *proof) end() { p.underWay, p.ran = false, time.Now() }

// came takes what came back, and reports whether it was the last that was missing.
func (p *proof) came(mark string) (whole bool) {
	if !p.missing[mark] {
		return false
	}
	delete(p.missing, mark)
	return len(p.missing) == 0
}

// failed reports whether something does not come, however slow the connection is: what scripts publish is sent before their answers.
func (p *proof) failed() bool {
	return !p.underWay && len(p.missing) > 0 && time.Since(p.ran) > silenceMost
}

// prove has scripts publish marks.
func (s *Store) prove(ctx context.Context, marks []string) error {
	_, err := s.client.Pipelined(ctx, func(pipe redis.Pipeliner) error {
		for i, mark := range marks {
			// As text, since a pipeline cannot send it when it is missing.
			_ = proveScript.Eval(ctx, pipe, []string{s.nodeKey("{" + strconv.Itoa(i) + "}")}, s.channel, s.origin+viaMaster+mark+" ")
		}
		return nil
	})
	return err
}

// clusterBeats are heartbeats in a Cluster: one by way of each master. What a record's master publishes reaches the one
// that is listened to by way of that master, and only beats that take it, too, tell that it does. A master that fails over
// may also come back without the last writes, which those who listen then write again.
type clusterBeats struct {
	s      *Store
	client *redis.ClusterClient

	mu      sync.Mutex
	whole   bool                 // a beat has come back by way of each master
	changed bool                 // since then, others have become masters
	heard   map[string]time.Time // when a beat came back last, by master; zero: not yet
}

// viaMaster stands between the origin of a beat and the master by way of which it goes.
const viaMaster = "~"

// clusterBeats is nil if there is no Cluster.
func (s *Store) clusterBeats() *clusterBeats {
	client, ok := s.client.(*redis.ClusterClient)
	if !ok {
		return nil
	}
	return &clusterBeats{s: s, client: client}
}

// look has the client ask the Cluster who its masters are. By itself it believes in a dead one for as long as it is asked
// for nothing but a subscription there.
func (c *clusterBeats) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, silenceMost)
	defer cancel()
	_ = c.client.ForEachMaster(ctx, func(context.Context, *redis.Client) error { return nil })
}

// send publishes a beat on each master, of those that the Cluster names now. The error is one of those that did not take it.
func (c *clusterBeats) send(ctx context.Context) error {
	var mu sync.Mutex
	var masters []string
	var refused error
	var wg sync.WaitGroup
	err := c.client.ForEachMaster(ctx, func(_ context.Context, client *redis.Client) error {
		addr := client.Options().Addr
		mu.Lock()
		masters = append(masters, addr)
		mu.Unlock()
		wg.Go(func() {
			if err := client.Publish(ctx, c.s.channel, c.s.origin+viaMaster+addr+" ").Err(); err != nil {
				mu.Lock()
				refused = err
				mu.Unlock()
			}
		})
		return nil
	})
	if err == nil {
		c.named(masters)
	}
	wg.Wait()
	return cmp.Or(err, refused)
}

// named takes note of who the masters are now.
func (c *clusterBeats) named(masters []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	same := len(masters) == len(c.heard)
	for _, m := range masters {
		_, known := c.heard[m]
		same = same && known
	}
	if same {
		return
	}
	c.changed = c.whole
	heard := make(map[string]time.Time, len(masters))
	for _, m := range masters {
		heard[m] = c.heard[m]
	}
	c.heard = heard
}

// came takes a beat that came back, and reports whether it was the first by way of the last master.
func (c *clusterBeats) came(master string) (begins bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.heard[master]; !ok {
		return false // the next one will be known
	}
	c.heard[master] = time.Now()
	if c.whole {
		return false
	}
	for _, at := range c.heard {
		if at.IsZero() {
			return false
		}
	}
	c.whole = true
	return true
}

// last is when the beat came back that is missing for the longest time; zero: they have not all come yet.
func (c *clusterBeats) last() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.whole {
		return time.Time{}
	}
	oldest := time.Now()
	for _, at := range c.heard {
		if at.Before(oldest) {
			oldest = at
		}
	}
	return oldest
}

// moved reports whether others have become masters since a beat came back from each.
func (c *clusterBeats) moved() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.changed
}

// checkServer reports a server that is not fit for what it is to keep: when that is new, and rarely again.
func (s *Store) checkServer(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	errs, untold := s.unfit(ctx)
	if ctx.Err() != nil {
		return // of what is missing it has not told
	}
	said := ""
	if err := errors.Join(errs...); err != nil {
		said = err.Error()
	}
	s.mu.Lock()
	if untold != nil && !s.untoldSaid { // once: nobody can have the server tell
		s.untoldSaid = true
		defer s.report(untold)
	}
	known := said == s.unfitSaid && time.Since(s.unfitAt) < reportEvery
	if !known {
		s.unfitSaid, s.unfitAt = said, time.Now()
	}
	s.mu.Unlock()
	if known {
		return
	}
	for _, err := range errs {
		s.report(err)
	}
}

// Unfit asks the server, or all masters of a Cluster, whether it is fit for what it is to keep: the error joins what is wrong of
// ErrEvicts, ErrForgets, ErrTooOld, ErrReplica, ErrSplitsReads and ErrLosesNews. One that does not tell is taken to be fit.
func (s *Store) Unfit(ctx context.Context) error {
	errs, _ := s.unfit(ctx)
	if s.losesNews.Load() {
		errs = append(errs, &tokens.SaidError{Kind: ErrLosesNews, Text: tokens.Text{
			EN: "nodes look at the accounts in use once a second instead", ZH: "Redis 不转发脚本发布的消息（集群版的代理即如此），各节点改为每秒查看一次正在使用的账号：托管 Redis 的选择见 docs/clustering.zh-CN.md",
		}})
	}
	return errors.Join(errs...)
}

// unfit also returns, of a server that does not tell what it does when it is full, ErrUntold.
func (s *Store) unfit(ctx context.Context) (errs []error, untold error) {
	sections := []string{"server", "memory"} // of two at once Redis knows nothing before 7.0
	if s.alone {
		sections = append(sections, "replication") // others may say so of a server that was the master a moment ago
	}
	cluster, ok := s.client.(*redis.ClusterClient)
	if !ok {
		return s.unfitOf(ctx, s.client, sections)
	}
	var mu sync.Mutex
	_ = cluster.ForEachMaster(ctx, func(ctx context.Context, client *redis.Client) error {
		found, silent := s.unfitOf(ctx, client, sections)
		mu.Lock()
		defer mu.Unlock()
		errs, untold = append(errs, found...), cmp.Or(untold, silent)
		return nil
	})
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return slices.CompactFunc(errs, func(a, b error) bool { return a.Error() == b.Error() }), untold
}

// unfitOf is what is wrong with one server.
func (s *Store) unfitOf(ctx context.Context, client redis.Cmdable, sections []string) (errs []error, untold error) {
	told := false
	for _, section := range sections {
		info, err := client.Info(ctx, section).Result()
		if _, said := errors.AsType[redis.Error](err); said {
			untold = cmp.Or(untold, fmt.Errorf("%w (it says: %w)", ErrUntold, s.discreet(err)))
			continue
		}
		if err != nil {
			return errs, nil
		}
		told = told || strings.Contains(info, policyField)
		err = unfit(info)
		if errors.Is(err, ErrReplica) && !strings.Contains(info, writableReplica) {
			// One that stands behind a proxy may say so of itself. The key is none that there is.
			if client.Del(ctx, s.nodeKey("{0}")).Err() == nil {
				err = &tokens.SaidError{Kind: ErrSplitsReads, Text: tokens.Text{
					EN: "it says so of itself", ZH: "Redis 接受写入，却以副本身份应答，读到的可能是片刻之前的数据：请关闭读写分离，或改用主节点的地址",
				}}
			}
		}
		if err != nil {
			errs = append(errs, err)
		}
	}
	if told {
		return errs, nil
	}
	return errs, cmp.Or(untold, ErrUntold)
}

// policyField is the field of INFO with what is done when the memory is full.
const policyField = "maxmemory_policy"

// writableReplica is what INFO has of a replica that takes writes itself: its master knows nothing of them, and they are lost when it is
// synchronized again.
const writableReplica = "slave_read_only:0"

// saidOf puts what a server says of itself into both languages.
func saidOf(value, en, zh string) tokens.Text {
	value = strings.ToValidUTF8(value[:min(len(value), 32)], "?")
	return tokens.Text{EN: fmt.Sprintf(en, value), ZH: fmt.Sprintf(zh, value)}
}

// unfit is what is wrong with a server by what it says of itself.
func unfit(info string) error {
	for line := range strings.Lines(info) {
		switch name, value, _ := strings.Cut(strings.TrimSpace(line), ":"); name {
		case "redis_version":
			major, _, _ := strings.Cut(value, ".")
			if n, err := strconv.Atoi(major); err == nil && n < leastVersion {
				return &tokens.SaidError{Text: saidOf(value, "it is %s", "Redis 是 %s，需要 7.0 或更高版本"), Kind: ErrTooOld}
			}
		case "role":
			if value != "master" {
				return &tokens.SaidError{Text: saidOf(value, "its role is %s", "Redis 的角色是 %s，不接受写入：请改用主节点或 Sentinel 的地址"), Kind: ErrReplica}
			}
		case policyField:
			switch {
			case strings.HasPrefix(value, "volatile-"):
				return &tokens.SaidError{Text: saidOf(value, "it is %s", "Redis 的 maxmemory-policy 是 %s，内存满时可能丢弃锁、登录以及哪些消息已送达：请设为 noeviction"), Kind: ErrForgets}
			case value != "noeviction":
				return &tokens.SaidError{Text: saidOf(value, "it is %s", "Redis 的 maxmemory-policy 是 %s，内存满时可能丢弃 refresh_token：请设为 noeviction"), Kind: ErrEvicts}
			}
		}
	}
	return nil
}

var _ tokens.Bus = (*Store)(nil)
