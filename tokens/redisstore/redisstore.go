// Package redisstore keeps tokens in Redis, for many nodes: a single server, one that Sentinels watch over, or a Cluster.
// It needs Redis 7.0 or later, or Valkey, with the memory policy noeviction.
//
// The records of a folder are the fields of one hash, so that a folder can be listed without an index that could differ
// from it. Its name is the hash tag of all keys that belong to it, so that each script stays in one slot of a Cluster:
//
//	<prefix>{wechat/v1/account}               hash: a field for each record
//	<prefix>{wechat/v1/account}:lock:<name>   the owner of a lock, with its lease, and the number of the last owner
//	<prefix>once:{<name>}                     a value of Ephemeral
//	<prefix>claim:<name>                      a claim
//	<prefix>node:<node>                       that a node lives; and the channel on which it is told something
//	<prefix>changed:<db>                      channel: which record has changed
package redisstore

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// DefaultPrefix is what all keys and channels begin with.
	DefaultPrefix = "wechat:"
	// DefaultDialTimeout and DefaultTimeout bound making a connection and one exchange on it.
	DefaultDialTimeout = time.Second
	DefaultTimeout     = 2 * time.Second
	// DefaultPoolSize is for each processor.
	DefaultPoolSize = 10

	// operationLimit bounds one operation other than Lock, with all its attempts: WeChat waits five seconds for the answer
	// that waits for it.
	operationLimit = 3 * time.Second
	// leastTimeout is below what any network keeps. A number without a unit, which in JSON is of nanoseconds, is below it too.
	leastTimeout = time.Millisecond
	// retries are made on a fresh connection. Every operation may be made twice without harm.
	retries = 2
	// maxPool bounds the connections to one server, and MaxPrefix the prefix.
	maxPool   = 10_000
	maxPrefix = 128
)

// Options say which Redis it is and how to reach it.
type Options struct {
	// Addresses are host:port of the server, of the Sentinels if there is a Master, or of some nodes of the Cluster.
	Addresses []string
	// Master is the name that Sentinels know the server by. Empty: there are no Sentinels.
	Master string
	// Cluster says that the addresses are those of a Redis Cluster.
	Cluster bool

	Username string
	Password secret.String
	// The Sentinels have passwords of their own.
	SentinelUsername string
	SentinelPassword secret.String

	DB     int         // not with Cluster
	Prefix string      // of all keys and channels. Default: DefaultPrefix
	TLS    *tls.Config // nil: in the clear

	DialTimeout time.Duration // of one connection. Default: DefaultDialTimeout
	Timeout     time.Duration // of one exchange. Default: DefaultTimeout
	PoolSize    int           // connections to one server, at most. Default: DefaultPoolSize for each processor

	// Report is told when the store begins to be out of reach for news of other nodes, rarely again while that lasts, and
	// nil once it is over; ErrEvicts, ErrForgets, ErrTooOld, ErrReplica or ErrSplitsReads, as rarely; and ErrUntold, once. Default: nobody.
	Report func(error)
}

// Check returns what is wrong with the options.
func (o *Options) Check() error {
	switch {
	case len(o.Addresses) == 0:
		return errors.New("address is missing: write the host and port of Redis, like redis.internal:6379")
	case o.Master != "" && o.Cluster:
		return errors.New("sentinel and cluster exclude each other: a Redis Cluster fails over by itself")
	case len(o.Addresses) > 1 && o.Master == "" && !o.Cluster:
		return errors.New("several addresses are for sentinel or cluster: name one server, or say which of the two it is")
	case o.Cluster && o.DB != 0:
		return errors.New("db: a Redis Cluster has database 0 alone")
	case o.DB < 0:
		return fmt.Errorf("db: %d is not the number of a database", o.DB)
	case o.Username != "" && o.Password.IsZero():
		return errors.New("username needs a password")
	case o.SentinelUsername != "" && o.SentinelPassword.IsZero():
		return errors.New("the username of the Sentinels needs a password")
	case o.Master == "" && !o.SentinelPassword.IsZero():
		return errors.New("there is a password of the Sentinels, and no sentinel")
	case len(o.Prefix) > maxPrefix || strings.ContainsAny(o.Prefix, "{}"):
		return fmt.Errorf("prefix: want at most %d characters, none of them a brace: Redis reads those as a hash tag", maxPrefix)
	case o.PoolSize < 0 || o.PoolSize > maxPool:
		return fmt.Errorf("pool_size: want 1 to %d", maxPool)
	case o.DialTimeout < 0 || o.DialTimeout > operationLimit:
		return fmt.Errorf("dial_timeout: want more than 0 and at most %v, since WeChat waits five seconds in all", operationLimit)
	case o.DialTimeout > 0 && o.DialTimeout < leastTimeout:
		return errTooShort("dial_timeout", o.DialTimeout)
	case o.Timeout < 0 || o.Timeout > operationLimit:
		return fmt.Errorf("timeout: want more than 0 and at most %v, since WeChat waits five seconds in all", operationLimit)
	case o.Timeout > 0 && o.Timeout < leastTimeout:
		return errTooShort("timeout", o.Timeout)
	}
	for _, a := range o.Addresses {
		if err := CheckAddress(a); err != nil {
			return err
		}
	}
	return nil
}

func errTooShort(field string, d time.Duration) error {
	return fmt.Errorf(`%s: %s is too short to be meant: give the unit, as in 2s; in JSON "2s", for a number there is of nanoseconds`, field, d)
}

// CheckAddress refuses what is not host:port.
func CheckAddress(s string) error {
	host, port, err := net.SplitHostPort(s)
	n, bad := strconv.ParseUint(port, 10, 16)
	if err != nil || bad != nil || host == "" || n == 0 || strings.ContainsAny(host, "/@ ") {
		// The text may hold a password, as a redis:// URL does.
		return errors.New("address: want host:port, like redis.internal:6379; username, password and db are options of their own")
	}
	return nil
}

// Store is a tokens.Store in Redis.
type Store struct {
	client  redis.UniversalClient
	prefix  string
	channel string
	origin  string // tells this store's messages from others
	report  func(error)
	lease   time.Duration // of a lock
	quiet   time.Duration // quietMost
	look    time.Duration // lookEvery
	timeout time.Duration // of one exchange

	alone, cluster bool // alone: one server, with neither Sentinels nor a Cluster

	mu      sync.Mutex
	closed  bool
	closing chan struct{}    // closed with closed
	held    map[string]*lock // by name
	free    []freedLock      // of the time of one lease
	work    sync.WaitGroup   // releases that nobody waits for, and claims; begun under mu or that of claims

	claims    batcher
	unfitSaid string // what was reported last of a server that is not fit for what it is to keep, and when; guarded by mu
	unfitAt   time.Time
	// untoldSaid: it was reported that a server does not tell; guarded by mu
	untoldSaid bool
	losesNews  atomic.Bool                      // the last attempt to listen ended with ErrLosesNews
	doubts     *tokens.Window[string, []string] // by name of an Ephemeral value that may have been taken: by which tokens
}

// New returns a store. It connects on first use. What it holds is freed by Close.
func New(o Options) (*Store, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	if o.Prefix == "" {
		o.Prefix = DefaultPrefix
	}
	if o.DialTimeout == 0 {
		o.DialTimeout = DefaultDialTimeout
	}
	if o.Timeout == 0 {
		o.Timeout = DefaultTimeout
	}
	if o.PoolSize == 0 {
		o.PoolSize = DefaultPoolSize * runtime.GOMAXPROCS(0)
	}
	if o.Report == nil {
		o.Report = func(error) {}
	}
	silence()
	return &Store{
		client: redis.NewUniversalClient(o.universal()), prefix: o.Prefix, channel: o.Prefix + "changed:" + strconv.Itoa(o.DB),
		origin: rand.Text(), report: o.Report, lease: leaseLife, quiet: quietMost, look: lookEvery, timeout: o.Timeout, alone: o.Master == "" && !o.Cluster, cluster: o.Cluster,
		closing: make(chan struct{}), held: make(map[string]*lock),
		doubts: tokens.NewWindow[string, []string](takenLife, maxDoubts),
	}, nil
}

func (o *Options) universal() *redis.UniversalOptions {
	return &redis.UniversalOptions{
		Addrs: o.Addresses, MasterName: o.Master, IsClusterMode: o.Cluster, DB: o.DB,
		Username: o.Username, Password: o.Password.Reveal(),
		SentinelUsername: o.SentinelUsername, SentinelPassword: o.SentinelPassword.Reveal(),
		TLSConfig: o.TLS, Dialer: o.dial,

		DialTimeout: o.DialTimeout, ReadTimeout: o.Timeout, WriteTimeout: o.Timeout, PoolTimeout: operationLimit,
		ContextTimeoutEnabled: true, PoolSize: o.PoolSize,
		// A server that is not there is said to be so at once; a command is tried on another connection.
		DialerRetries: 1, MaxRetries: retries,

		// Nothing that an access list may not allow, and nothing that we do not use.
		Protocol: 2, DisableIdentity: true, PipelinePoolSize: -1,
		MaintNotificationsConfig: &maintnotifications.Config{Mode: maintnotifications.ModeDisabled},
	}
}

// silence ends go-redis's own log, which goes to the process's standard error past Caddy's. What matters comes back as an
// error of the operation.
var silence = sync.OnceFunc(func() { redis.SetLogger(noLog{}) })

type noLog struct{}

func (noLog) Printf(context.Context, string, ...any) {}

// Close ends the store's connections. Later operations fail with tokens.ErrClosed.
func (s *Store) Close() {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.closing)
	}
	for _, l := range s.held {
		l.renewal.Stop()
	}
	s.mu.Unlock()
	s.claims.mu.Lock()
	s.claims.closed = true
	s.claims.mu.Unlock()
	s.work.Wait() // bounded: each of them has a limit
	_ = s.client.Close()
}

// Load implements tokens.Store.
func (s *Store) Load(ctx context.Context, name string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	folder, field := s.place(name)
	value, err := s.client.HGet(ctx, folder, field).Bytes()
	if isNil(err) {
		return nil, fs.ErrNotExist
	}
	return value, s.failure(ctx, err)
}

// Store implements tokens.Store. Under the lock of the same name it is refused with tokens.ErrLockLost once another owner
// has had that.
func (s *Store) Store(ctx context.Context, name string, value []byte) error {
	folder, field := s.place(name)
	return s.write(ctx, storeScript, name, folder, field, value)
}

// Swap implements tokens.Swapper, with the same refusal as Store.
func (s *Store) Swap(ctx context.Context, name string, old, next []byte) error {
	folder, field := s.place(name)
	there := "1"
	if old == nil {
		there = "0"
	}
	return s.write(ctx, swapScript, name, folder, field, next, there, old)
}

// Delete implements tokens.Store, with the same refusal as Store.
func (s *Store) Delete(ctx context.Context, name string) error {
	folder, field := s.place(name)
	return s.write(ctx, deleteScript, name, folder, field)
}

// write runs a script that changes one record, and tells the other nodes.
func (s *Store) write(ctx context.Context, script *redis.Script, name, folder, field string, args ...any) error {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	fence := s.fence(name)
	keys := []string{folder}
	if fence != "" { // else a Cluster that moves the folder to another node would have to have the key there
		keys = append(keys, lockKey(folder, field))
	}
	args = append([]any{s.channel, s.origin + " " + name, fence, field}, args...)
	run := s.run
	if fence != "" {
		run = s.runFenced
	}
	done, err := run(ctx, script, keys, args...).Int()
	switch {
	case err != nil:
		return s.failure(ctx, err)
	case done == lockLost:
		return tokens.ErrLockLost
	case done == swapped:
		return tokens.ErrSwapped
	}
	return nil
}

// List implements tokens.Store.
func (s *Store) List(ctx context.Context, prefix string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, operationLimit)
	defer cancel()
	fields, err := s.client.HKeys(ctx, s.folder(prefix)).Result()
	if err != nil {
		return nil, s.failure(ctx, err)
	}
	for i := range fields {
		fields[i] = prefix + "/" + fields[i]
	}
	return fields, nil
}

// run calls a script.
func (s *Store) run(ctx context.Context, script *redis.Script, keys []string, args ...any) *redis.Cmd {
	return s.settled(ctx, func() *redis.Cmd { return script.Run(ctx, s.client, keys, args...) })
}

// settled repeats a command that a Cluster does not take for now. One that is moving the keys' slot to another node takes none of several
// keys that are not all there, and at the end of that its nodes may send one to each other for a moment; go-redis does not wait for the end
// of either.
func (s *Store) settled(ctx context.Context, do func() *redis.Cmd) *redis.Cmd {
	for {
		cmd := do()
		if !redis.IsTryAgainError(cmd.Err()) && !s.astray(cmd.Err()) {
			return cmd
		}
		t := time.NewTimer(pauseMost)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return cmd
		}
	}
}

// astray reports whether the nodes of a Cluster sent a command to each other until go-redis had enough.
func (s *Store) astray(err error) bool {
	_, moved := redis.IsMovedError(err)
	return moved && s.cluster
}

// runFenced is run of a script of records under a lock. While a Cluster moves the slot, the folder and the lock may be on two nodes.
func (s *Store) runFenced(ctx context.Context, script *redis.Script, keys []string, args ...any) *redis.Cmd {
	return s.settled(ctx, func() *redis.Cmd {
		cmd := script.Run(ctx, s.client, keys, args...)
		if redis.IsTryAgainError(cmd.Err()) {
			return s.runApart(ctx, script, keys, args)
		}
		return cmd
	})
}

// runApart looks at the lock and at the record each by itself, which is as good: the record must be what it was before the lock was looked
// at. Where it is another by then, who has written it may have the lock.
func (s *Store) runApart(ctx context.Context, script *redis.Script, keys []string, args []any) *redis.Cmd {
	for {
		run, apart := script, slices.Clone(args)
		apart[2] = ""
		gone := false
		if script != swapScript {
			held, err := s.client.HGet(ctx, keys[0], args[3].(string)).Result()
			if gone = isNil(err); err != nil && !gone {
				return redis.NewCmdResult(nil, err)
			}
			switch {
			case script == deleteScript:
				apart = append(apart, held)
			case gone:
				run, apart = swapScript, append(apart, "0", "")
			default:
				run, apart = swapScript, append(apart, "1", held)
			}
		}
		lock, err := s.client.Get(ctx, keys[1]).Result()
		if err != nil && !isNil(err) {
			return redis.NewCmdResult(nil, err)
		}
		if fence, _, _ := strings.Cut(lock, " "); fence != args[2] {
			return redis.NewCmdResult(int64(lockLost), nil)
		}
		if script == deleteScript && gone {
			return redis.NewCmdResult(int64(1), nil)
		}
		cmd := run.Run(ctx, s.client, keys[:1], apart...)
		if done, err := cmd.Int(); script == swapScript || err != nil || done != swapped {
			return cmd
		}
	}
}

// place is the key of a record's folder, and its field there.
func (s *Store) place(name string) (folder, field string) {
	i := strings.LastIndexByte(name, '/')
	return s.folder(name[:max(i, 0)]), name[i+1:]
}

// braces would end a hash tag early.
var braces = strings.NewReplacer("%", "%25", "{", "%7B", "}", "%7D")

func (s *Store) folder(name string) string {
	if name == "" {
		name = "%" // no name is written so, and an empty hash tag is none
	}
	return s.prefix + "{" + braces.Replace(name) + "}"
}

func lockKey(folder, field string) string { return folder + ":lock:" + field }

var (
	_ tokens.Store   = (*Store)(nil)
	_ tokens.Swapper = (*Store)(nil)
)
