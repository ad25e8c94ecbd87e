// Package redistest starts real Redis servers for tests: one, one with a replica and Sentinels, or a Cluster of
// three, with replicas if wanted.
// They are processes of the test's own, on loopback, and end with it.
package redistest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// slots are those of a Cluster.
const slots = 16384

// patience is how long a server gets to start, and a group of them to agree.
const patience = 30 * time.Second

// Server is a process of redis-server.
type Server struct {
	Addr string
	Dir  string

	t      testing.TB
	args   []string
	client *redis.Client

	mu  sync.Mutex
	cmd *exec.Cmd
}

// Start starts a server with further options, as redis-server takes them on its command line. Nothing is kept on disk
// unless they say so.
func Start(t testing.TB, options ...string) *Server {
	t.Helper()
	return start(t, nil, options)
}

func start(t testing.TB, mode, options []string) *Server {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Fatal("redis-server is missing: scripts/install-test-needs.sh installs it")
	}
	s := &Server{t: t, Dir: t.TempDir()}
	t.Cleanup(s.Kill)
	var said string
	for range 5 { // somebody else may take the port first
		s.Addr = FreeAddr(t)
		_, port, _ := net.SplitHostPort(s.Addr)
		s.args = append(append([]string{}, mode...), append([]string{
			"--port", port, "--bind", "127.0.0.1", "--dir", s.Dir, "--save", "", "--daemonize", "no",
			"--logfile", "redis.log", "--enable-debug-command", "yes", "--repl-diskless-sync-delay", "0",
		}, options...)...)
		if said = s.run(); said == "" {
			return s
		}
	}
	t.Fatalf("redis-server does not start: %s", said)
	return nil
}

// run starts the process and waits until it answers; said is what it said if it does not.
func (s *Server) run() (said string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out bytes.Buffer
	s.cmd = exec.Command("redis-server", s.args...) //nolint:gosec // a test's own arguments
	s.cmd.Stdout, s.cmd.Stderr = &out, &out
	if err := s.cmd.Start(); err != nil {
		return err.Error()
	}
	exited := make(chan struct{})
	cmd := s.cmd
	go func() { _ = cmd.Wait(); close(exited) }()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		conn, err := net.DialTimeout("tcp", s.Addr, time.Second)
		if err == nil {
			answers := isProcess(conn, cmd.Process.Pid, s.password())
			_ = conn.Close()
			if answers {
				return ""
			}
		}
		select {
		case <-exited:
			log, _ := os.ReadFile(filepath.Join(s.Dir, "redis.log"))
			return out.String() + string(log)
		case <-time.After(10 * time.Millisecond):
		}
	}
	return "no answer"
}

// isProcess reports whether the server at the other end is a certain process, and ready: another test's may have taken the port first.
func isProcess(conn net.Conn, pid int, password string) bool {
	_ = conn.SetDeadline(time.Now().Add(time.Second))
	if password != "" {
		_, _ = fmt.Fprintf(conn, "AUTH %s\r\n", password)
	}
	_, _ = io.WriteString(conn, "INFO server\r\nPING\r\nQUIT\r\n") // while it loads what is on its disk it answers the first alone
	said, _ := io.ReadAll(conn)
	return bytes.Contains(said, fmt.Appendf(nil, "\r\nprocess_id:%d\r\n", pid)) && bytes.Contains(said, []byte("\r\n+PONG\r\n"))
}

// password is the one that the server's options give it.
func (s *Server) password() string {
	if i := slices.Index(s.args, "--requirepass"); i >= 0 {
		return s.args[i+1]
	}
	return ""
}

// The ports that FreeAddr gives are below those that systems give to outgoing connections and to listeners on port 0, so that nothing
// takes one before the server listens, or while one that was killed is down.
const (
	firstPort = 10_000
	ports     = 10_000
	busOffset = 10_000 // a Cluster's nodes take the port that much above, too
)

var (
	portMu sync.Mutex
	port   = rand.IntN(ports) //nolint:gosec // of the last one given, so that none is given twice; other processes begin elsewhere
)

// FreeAddr is an address on loopback that nobody listens on, and that no other call in this process is given.
func FreeAddr(t testing.TB) string {
	t.Helper()
	portMu.Lock()
	defer portMu.Unlock()
	for range ports {
		port = (port + 1) % ports
		if addr := loopback(firstPort + port); isFree(addr) && isFree(loopback(firstPort+port+busOffset)) {
			return addr
		}
	}
	t.Fatal("no free port on the loopback interface")
	return ""
}

func loopback(port int) string { return "127.0.0.1:" + strconv.Itoa(port) }

func isFree(addr string) bool {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return false
	}
	_ = l.Close()
	return true
}

// Client is a client of the server's own, as its administrator.
func (s *Server) Client() *redis.Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.client == nil {
		s.client = redis.NewClient(&redis.Options{Addr: s.Addr, Protocol: 2, DisableIdentity: true, PipelinePoolSize: -1})
		client := s.client
		s.t.Cleanup(func() { _ = client.Close() })
	}
	return s.client
}

// Do sends a command and returns its answer; the test ends if it fails.
func (s *Server) Do(args ...any) any {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	answer, err := s.Client().Do(ctx, args...).Result()
	if err != nil {
		s.t.Fatalf("redis %v: %v", args, err)
	}
	return answer
}

// Turn returns once the server has had its turn, which package stall wants to know of.
func (s *Server) Turn() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_ = s.Client().Ping(ctx).Err()
}

// Kill ends the process as kill -9 does.
func (s *Server) Kill() { s.signal(os.Kill) }

// Restart starts the process again after Kill, at its address.
func (s *Server) Restart() {
	s.t.Helper()
	for range 50 {
		if s.run() == "" {
			return
		}
		time.Sleep(20 * time.Millisecond) // until the port is free
	}
	s.t.Fatal("redis-server does not start again")
}

func (s *Server) signal(sig os.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd != nil && s.cmd.Process != nil {
		_ = s.cmd.Process.Signal(sig)
	}
}

// Replica starts a replica of a server, which it reaches at addr, and waits until it is in step.
func Replica(t testing.TB, addr string, options ...string) *Server {
	t.Helper()
	host, port, _ := net.SplitHostPort(addr)
	r := Start(t, append([]string{"--replicaof", host + " " + port}, options...)...)
	awaitStep(t, r)
	return r
}

// Follow makes a server a replica of another, and waits until it is in step.
func Follow(t testing.TB, s *Server, addr string) {
	t.Helper()
	host, port, _ := net.SplitHostPort(addr)
	s.Do("REPLICAOF", host, port)
	awaitStep(t, s)
}

func awaitStep(t testing.TB, r *Server) {
	t.Helper()
	Eventually(t, "the replica is in step", func() error {
		if info, _ := r.Do("INFO", "replication").(string); !strings.Contains(info, "master_link_status:up") {
			return fmt.Errorf("%s", info)
		}
		return nil
	})
}

// Sentinels starts three Sentinels that watch over a master by a name, and waits until they know each other and its
// replicas. An election that comes to nothing, as on a busy machine, is followed by another after twice the time of a failover.
func Sentinels(t testing.TB, name string, master *Server, replicas int) (addrs []string) {
	t.Helper()
	host, port, _ := net.SplitHostPort(master.Addr)
	for range 3 {
		conf := filepath.Join(t.TempDir(), "sentinel.conf")
		text := fmt.Sprintf("sentinel monitor %s %s %s 2\nsentinel down-after-milliseconds %s 1000\nsentinel failover-timeout %s 4000\n", name, host, port, name, name)
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		s := start(t, []string{conf, "--sentinel"}, nil)
		addrs = append(addrs, s.Addr)
		Eventually(t, "the Sentinel knows its master", func() error {
			if info, _ := s.Do("INFO", "sentinel").(string); !strings.Contains(info, "status=ok") || !strings.Contains(info, "slaves="+strconv.Itoa(replicas)) {
				return fmt.Errorf("%s", info)
			}
			return nil
		})
		if len(addrs) == 3 {
			Eventually(t, "the Sentinels know each other", func() error {
				if info, _ := s.Do("INFO", "sentinel").(string); !strings.Contains(info, "sentinels=3") {
					return fmt.Errorf("%s", info)
				}
				return nil
			})
		}
	}
	return addrs
}

// AwaitMaster waits until all the Sentinels name a server as the master. They go on naming the old one for a while after another was
// promoted.
func AwaitMaster(t testing.TB, sentinels []string, name string, master *Server) {
	t.Helper()
	for _, addr := range sentinels {
		client := redis.NewSentinelClient(&redis.Options{Addr: addr})
		Eventually(t, "the Sentinel names the new master", func() error {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			named, err := client.GetMasterAddrByName(ctx, name).Result()
			if err == nil && net.JoinHostPort(named[0], named[1]) != master.Addr {
				err = fmt.Errorf("it names %v", named)
			}
			return err
		})
		_ = client.Close()
	}
}

// Cluster starts a Cluster of three nodes.
func Cluster(t testing.TB) []*Server {
	t.Helper()
	nodes := make([]*Server, 3)
	for i := range nodes {
		nodes[i] = clusterNode(t)
		nodes[i].Do("CLUSTER", "ADDSLOTSRANGE", i*slots/len(nodes), (i+1)*slots/len(nodes)-1)
		if i > 0 {
			meet(nodes[i], nodes[0])
		}
	}
	awaitCluster(t, nodes)
	return nodes
}

// ReplicatedCluster starts a Cluster of three masters, each with a replica, in step, at the same place of the other slice.
func ReplicatedCluster(t testing.TB) (masters, replicas []*Server) {
	t.Helper()
	masters = Cluster(t)
	for range masters {
		r := clusterNode(t)
		meet(r, masters[0])
		replicas = append(replicas, r)
	}
	awaitCluster(t, append(slices.Clone(masters), replicas...))
	for i, r := range replicas {
		r.Do("CLUSTER", "REPLICATE", masters[i].Do("CLUSTER", "MYID"))
		awaitStep(t, r)
	}
	for _, n := range append(slices.Clone(masters), replicas...) {
		Eventually(t, "the node knows who is whose replica", func() error {
			nodes, _ := n.Do("CLUSTER", "NODES").(string)
			if strings.Count(nodes, "slave ") != len(replicas) {
				return fmt.Errorf("%s", nodes)
			}
			return nil
		})
	}
	return masters, replicas
}

// MasterOf is the number of the master, of those that Cluster and ReplicatedCluster start, that has a key or channel.
func MasterOf(masters []*Server, key string) int {
	slot, _ := masters[0].Do("CLUSTER", "KEYSLOT", key).(int64)
	n := len(masters)
	for i := range n - 1 {
		if int(slot) < (i+1)*slots/n {
			return i
		}
	}
	return n - 1
}

func clusterNode(t testing.TB) *Server {
	t.Helper()
	return Start(t, "--cluster-enabled", "yes", "--cluster-node-timeout", "2000")
}

func meet(n, other *Server) {
	host, port, _ := net.SplitHostPort(other.Addr)
	n.Do("CLUSTER", "MEET", host, port)
}

func awaitCluster(t testing.TB, nodes []*Server) {
	t.Helper()
	known := fmt.Sprintf("cluster_known_nodes:%d\r", len(nodes))
	for _, n := range nodes {
		Eventually(t, "the node sees a whole Cluster", func() error {
			if info, _ := n.Do("CLUSTER", "INFO").(string); !strings.Contains(info, "cluster_state:ok") || !strings.Contains(info, known) {
				return fmt.Errorf("%s", info)
			}
			return nil
		})
	}
}

// Eventually waits until try succeeds.
func Eventually(t testing.TB, what string, try func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if err = try(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}
