package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// binary is the gateway, built once for all tests. It stands for stock Caddy, too, when it is configured like it.
var binary string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "caddy-wechat-bench")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	// Without the race detector: a benchmark's figures are of the program that users run.
	if binary, err = integration.Build("../..", dir, false); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// shortRun are options of a run of seconds.
func shortRun(t *testing.T) *options {
	t.Helper()
	dir := t.TempDir()
	return &options{
		plan:  plan{rounds: 2, turns: 3, time: time.Second, requests: 60, connections: 8, rate: 500, sample: 1, pause: 20 * time.Millisecond},
		world: world{dir: filepath.Join(dir, "run"), stock: binary, gateway: binary},
		json:  filepath.Join(dir, "bench.json"), baseline: filepath.Join(dir, "baseline.json"), scale: 500,
	}
}

// Every scenario and every variant that this build has runs, is judged and reported.
func TestScenarios(t *testing.T) {
	o := shortRun(t)
	o.update, o.variants = true, variants
	var out bytes.Buffer
	if err := o.run(t.Context(), &out); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	t.Log(out.String())
	var r report
	readJSON(t, o.json, &r)
	var b baseline
	readJSON(t, o.baseline, &b)
	want := []string{
		"inbound: same program", "inbound: same program, wechat_lean", "inbound: gateway", "inbound: gateway, transport http", "inbound: http, request buffers, no compression",
		"outbound: stock, bare", "outbound: same program", "outbound: gateway", "outbound: redis",
		"outbound-h2: stock, bare", "outbound-h2: same program", "outbound-h2: gateway",
		"respond: gateway",
	}
	for _, v := range variants {
		key := v.Scenario + ": " + v.Name
		if skipped := strings.Contains(out.String(), fmt.Sprintf("skipped: variant %q", v.Name)); skipped == (r.Figures[key] != nil) {
			t.Errorf("variant %q: skipped %v, measured %v", v.Name, skipped, !skipped)
		}
	}
	for _, key := range want {
		f, ratio := r.Figures[key], r.Ratios[key]
		if f == nil || len(f.Full) != o.rounds || ratio.Min <= 0 || ratio.Min > ratio.Median || ratio.Median > ratio.Max {
			t.Errorf("%s: figures %+v, ratio %+v", key, f, ratio)
			continue
		}
		if f.Full[0].Requests != o.requests {
			t.Errorf("%s: %d requests in a round, want %d", key, f.Full[0].Requests, o.requests)
		}
		if f.IdleRSS == 0 || f.LoadRSS == 0 || f.Peak < f.LoadRSS || f.Full[0].CPU <= 0 || f.Full[0].P50 <= 0 || f.Full[0].P50 > f.Full[0].P99 {
			t.Errorf("%s: figures %+v", key, f)
		}
		if then := b.Ratios[key]; then.Median != thousandths(ratio.Median) {
			t.Errorf("%s: the baseline has %+v, want %+v", key, then, ratio)
		}
		_, name, _ := strings.Cut(key, ": ")
		if name == targetGateway && strings.Count(out.String(), "CPU, stock ÷ gateway") != 4 {
			t.Error("the goals are not printed for each scenario and each way that have them")
		}
		if !strings.Contains(out.String(), "| "+name+" |") {
			t.Errorf("%s: no row in the tables", key)
		}
	}
}

func readJSON(t *testing.T, path string, into any) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, into)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A benchmark that passes over wrong answers measures nothing.
func TestWrongAnswers(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, scenario, target string
		faults                 faults
		around                 func(office) office
		says                   string
	}{
		{"the gateway has another key", "inbound", targetGateway, faults{key: strings.Repeat("A", 43)}, nil, "inbound, gateway: 20 wrong of 20, the first: status 403"},
		{"the token is another one, over HTTP", "outbound", targetGateway, faults{token: "another"}, nil, "at the far end 20 wrong of 20, the first: call has 1 tokens, or a wrong one"},
		{"the token is another one, over HTTP/2", "outbound-h2", targetGateway, faults{token: "another"}, nil, "at the far end 20 wrong of 20"},
		{"the backend answers another push", "inbound", targetStock, faults{}, answerAnother, "20 wrong of 20, the first: reply belongs to another push"},
		{"the backend answers another push, encrypted", "inbound", targetGateway, faults{}, answerAnother, "20 wrong of 20, the first: reply belongs to another push"},
		{"WeChat answers another call", "outbound", targetGateway, faults{}, answerAnother, "20 wrong of 20, the first: answer belongs to another call"},
		{"the backend's answer is another one", "inbound", targetStock, faults{}, answerWith("<xml>no</xml>"), "20 wrong of 20, the first: reply is not the backend's"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			o := shortRun(t)
			o.faults, o.around = tt.faults, tt.around
			if err := o.prepare(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := o.Close(); err != nil {
					t.Error(err)
				}
			}()
			scenarios, err := o.scenarios()
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range scenarios {
				if s.name != tt.scenario {
					continue
				}
				server := s.target(tt.target)
				if err := o.start(t.Context(), server); err != nil {
					t.Fatal(err)
				}
				if _, err = o.volley(20, 0)(t.Context(), server); err == nil || !strings.Contains(err.Error(), tt.says) {
					t.Errorf("got %v, want an error that says %q", err, tt.says)
				}
				return
			}
			t.Fatal("no such scenario")
		})
	}
}

// One wrong reply is enough to end the run, and there are no figures then.
func TestOneWrongAnswerEndsTheRun(t *testing.T) {
	o := shortRun(t)
	var asked atomic.Int64
	o.only, o.rate, o.around = "^inbound$", 0, func(right office) office {
		wrong := answerAnother(right)
		return func(dst []byte, a *ask) ([]byte, string) {
			if asked.Add(1) == 100 {
				return wrong(dst, a)
			}
			return right(dst, a)
		}
	}
	if err := o.run(t.Context(), io.Discard); err == nil || !strings.Contains(err.Error(), "1 wrong of 60, the first: reply belongs to another push") {
		t.Errorf("got %v", err)
	}
	if _, err := os.Stat(o.json); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("figures were written: %v", err)
	}
}

// answerAnother answers the request before, or one that never was.
func answerAnother(o office) office {
	return func(dst []byte, a *ask) ([]byte, string) {
		body, wrong := o(dst, a)
		for _, t := range []template{reply, answer} {
			if id, ok := t.id(body); ok {
				return t.append(body[:0], id-1), wrong
			}
		}
		return body, wrong
	}
}

func answerWith(text string) func(office) office {
	return func(o office) office {
		return func(dst []byte, a *ask) ([]byte, string) {
			_, wrong := o(dst, a)
			return append(dst[:0], text...), wrong
		}
	}
}

func TestInspect(t *testing.T) {
	t.Parallel()
	const id = 1_795_875_370_123_456_789
	crypt := newCrypt(t, pushKey)
	seal := func(c *wxsim.Crypt, plain []byte) string {
		encrypt, err := c.Seal(plain)
		if err != nil {
			t.Fatal(err)
		}
		return "<xml><Encrypt><![CDATA[" + encrypt + "]]></Encrypt><MsgSignature><![CDATA[" + c.Sign("1715943330", "7", encrypt) +
			"]]></MsgSignature><TimeStamp>1715943330</TimeStamp><Nonce><![CDATA[7]]></Nonce></xml>"
	}
	right := seal(crypt, reply.append(nil, id))
	tests := []struct{ name, body, wrong string }{
		{"right", right, ""},
		{"signature", strings.Replace(right, "<TimeStamp>1715943330", "<TimeStamp>1715943331", 1), "signature"},
		{"key", seal(newCrypt(t, strings.Repeat("A", 43)), reply.append(nil, id)), "encrypted reply"},
		{"another push's", seal(crypt, reply.append(nil, id+1)), "another push"},
		{"another text", seal(crypt, []byte("<xml></xml>")), "not the backend's"},
		{"cut", right[:len(right)/2], "signature"},
		{"plaintext", string(reply.append(nil, id)), "signature"},
	}
	for _, tt := range tests {
		if got := (pushes{sealed: true}).inspect(id, []byte(tt.body)); (got == "") != (tt.wrong == "") || !strings.Contains(got, tt.wrong) {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.wrong)
		}
	}
	if got := (pushes{sealed: true}).glance(id, reply.append(nil, id)); !strings.Contains(got, "not encrypted") {
		t.Errorf("a plaintext reply at a glance: %q", got)
	}
}

func newCrypt(t *testing.T, key string) *wxsim.Crypt {
	t.Helper()
	c, err := wxsim.NewCrypt(pushToken, key, appID)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// The pushes are of the sizes that they should be of, no two are alike, and each is what the simulated WeChat would send.
func TestPreparedPushes(t *testing.T) {
	t.Parallel()
	const n = 200
	crypt := newCrypt(t, pushKey)
	sizes, seen := map[int]int{}, map[string]bool{}
	for range 2 {
		b, err := pushes{}.prepare(n, "127.0.0.1:1")
		if err != nil {
			t.Fatal(err)
		}
		for i := range b.len() {
			head, body, _ := strings.Cut(string(b.request(i)), "\r\n\r\n")
			_, query, _ := strings.Cut(strings.Fields(head)[1], "?")
			nonce, _ := parameter([]byte(query), "nonce")
			timestamp, _ := parameter([]byte(query), "timestamp")
			signature, _ := parameter([]byte(query), "msg_signature")
			encrypt := element(body, "Encrypt")
			if crypt.Sign(string(timestamp), string(nonce), encrypt) != string(signature) {
				t.Fatalf("push %d: signature", i)
			}
			plain, err := crypt.Open(encrypt)
			if err != nil {
				t.Fatal(err)
			}
			sizes[len(plain)]++
			if !strings.Contains(string(plain), createTime+string(timestamp)) {
				t.Errorf("push %d was not created when it was sent", i)
			}
			for _, once := range []string{string(nonce), encrypt, element(string(plain), "MsgId")} {
				if seen[once] {
					t.Fatalf("%q comes twice", once)
				}
				seen[once] = true
			}
			if !strings.Contains(head, "Content-Length: "+strconv.Itoa(len(body))) {
				t.Errorf("push %d has %d bytes, and says\n%s", i, len(body), head)
			}
			a := ask{query: []byte(query), appid: []byte(appID), body: plain}
			if answer, wrong := backend(true)(nil, &a); wrong != "" || len(answer) != replySize {
				t.Errorf("the backend: %q, %d bytes", wrong, len(answer))
			}
			a.body[bytes.Index(a.body, []byte("hello"))] ^= 1
			if _, wrong := backend(true)(nil, &a); !strings.Contains(wrong, "not the plaintext") {
				t.Errorf("the backend takes a push with another byte: %q", wrong)
			}
		}
	}
	if sizes[smallPush] != 2*n*80/100 || sizes[mediumPush] != 2*n*15/100 || sizes[largePush] != 2*n*5/100 {
		t.Errorf("sizes: %v", sizes)
	}
}

// A server that stalls is charged with all that it let wait, though one connection can only wait for one reply at a time.
func TestLatencyIsFromWhenARequestWasDue(t *testing.T) {
	t.Parallel()
	const stall, rate = 200 * time.Millisecond, 1000
	stalled := false
	f, err := startFarEnd(func(dst []byte, a *ask) ([]byte, string) {
		if !stalled {
			stalled = true
			<-time.After(stall)
		}
		return append(dst, page...), ""
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	b, err := pages{}.prepare(20, "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	v := volley{
		addr: f.listener.Addr().String(), batch: b, traffic: pages{}, connections: 1, rate: rate, sample: 1,
		cpu: func() (time.Duration, error) { return 0, nil },
	}
	r, err := v.fire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range r.latencies {
		if due := time.Duration(i) * time.Second / rate; l < stall-due {
			t.Errorf("request %d: %v, though it was due %v into a stall of %v", i, l, due, stall)
		}
	}
	if r.Inspected != b.len() || r.wrong.count != 0 {
		t.Errorf("%d inspected, %d wrong", r.Inspected, r.wrong.count)
	}
}

func TestReplies(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, wire, body, err string
		status                int
	}{
		{name: "length", wire: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", status: 200, body: "ok"},
		{name: "chunks", wire: "HTTP/1.1 403 Forbidden\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n1\r\n!\r\n0\r\n\r\n", status: 403, body: "ok!"},
		{name: "nothing", wire: "HTTP/1.1 204 No Content\r\n\r\n", status: 204},
		{name: "cut", wire: "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok", err: "unexpected EOF"},
		{name: "chunk of no size", wire: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", err: "size of a chunk"},
		{name: "no HTTP", wire: "SSH-2.0\r\n", err: "status line"},
		{name: "huge", wire: "HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n", err: "more than"},
	}
	for _, tt := range tests {
		status, body, err := newReplies(strings.NewReader(tt.wire)).read()
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: got error %v, want %q", tt.name, err, tt.err)
			}
			continue
		}
		if err != nil || status != tt.status || string(body) != tt.body {
			t.Errorf("%s: got %d %q %v", tt.name, status, body, err)
		}
	}
}

func TestCompare(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "baseline.json")
	then := &report{Ratios: map[string]spread{
		"a": {0.90, 0.88, 0.92}, "b": {0.90, 0.80, 1.00}, "c": {0.90, 0.88, 0.92}, "kept": {0.5, 0.5, 0.5},
	}}
	if err := then.update(path); err != nil {
		t.Fatal(err)
	}
	now := &report{Ratios: map[string]spread{"a": {0.95, 0.94, 0.96}, "b": {0.95, 0.94, 0.96}, "c": {0.80, 0.79, 0.81}, "d": {1, 1, 1}}}
	var out bytes.Buffer
	if err := now.compare(&out, path); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"- a: 0.950, was 0.900 (0.880 to 0.920): **5.6 % cheaper**", "- c: 0.800, was 0.900 (0.880 to 0.920): **11.1 % dearer**",
		"- d: 1.000, new", "- 1 did not move",
	} {
		if !strings.Contains(out.String(), line) {
			t.Errorf("no line %q in\n%s", line, &out)
		}
	}
	if err := now.update(path); err != nil {
		t.Fatal(err)
	}
	var b baseline
	readJSON(t, path, &b)
	if b.Ratios["kept"].Median != 0.5 || b.Ratios["a"].Median != 0.95 {
		t.Errorf("baseline: %+v", b.Ratios)
	}
}

func TestMemory(t *testing.T) {
	o := shortRun(t)
	o.memory = true
	var out bytes.Buffer
	if err := o.run(t.Context(), &out); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	t.Log(out.String())
	for _, row := range []string{"| idle | ", "| at work: 100 pushes", "| 20 keep-alive clients", "| 10 pushes held", "| 2 uploads of 10 MiB", "| 2000 | "} {
		if !strings.Contains(out.String(), row) {
			t.Errorf("no row %q", row)
		}
	}
}

func TestVerdict(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		goal   goal
		figure float64
		want   string
	}{
		{goalCPU["inbound"], 0.97, "reaches the target"},
		{goalCPU["inbound"], 0.9, "passes the gate"},
		{goalCPU["inbound"], 0.8, "**misses the gate**"},
		{goalP99, 1, "reaches the target"},
		{goalP99, 1.1, "passes the gate"},
		{goalP99, 1.2, "**misses the gate**"},
	} {
		if got := tt.goal.verdict(tt.figure); got != tt.want {
			t.Errorf("%g: %s, want %s", tt.figure, got, tt.want)
		}
	}
}

// A further build is measured as the gateway is.
func TestAlso(t *testing.T) {
	t.Parallel()
	o := shortRun(t)
	if err := o.also("before=there"); err != nil {
		t.Fatal(err)
	}
	if err := o.also("there"); err == nil {
		t.Error("a binary without a name was taken")
	}
	if err := o.prepare(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = o.Close() }()
	scenarios, err := o.scenarios()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range scenarios[:3] {
		before, gateway := s.target("before"), s.target(targetGateway)
		if before == nil || filepath.Base(before.binary) != "there" || before.site != gateway.site || before.global != gateway.global || !before.rated {
			t.Errorf("%s: %+v", s.name, before)
		}
	}
}

func TestVariantsByName(t *testing.T) {
	t.Parallel()
	got, err := chooseVariants("redis-cluster, http-no-compression")
	if err != nil || len(got) != 2 || got[0].Name != "redis, cluster" || got[1].Name != "http, no compression" {
		t.Errorf("got %v, %v", got, err)
	}
	if all, err := chooseVariants("all"); err != nil || len(all) != len(variants) {
		t.Errorf("all: %v, %v", all, err)
	}
	if _, err := chooseVariants("quick"); err == nil || !strings.Contains(err.Error(), "redis-local") {
		t.Errorf("got %v, want an error that lists what there is", err)
	}
}

// Stock Caddy is Caddy's standard modules alone.
func TestStockHasNothingOfOurs(t *testing.T) {
	t.Parallel()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "./stock").Output()
	if err != nil {
		t.Fatal(err)
	}
	packages := strings.Fields(string(out))
	if !slices.Contains(packages, "github.com/caddyserver/caddy/v2/modules/standard") {
		t.Error("Caddy's standard modules are missing")
	}
	for _, p := range packages {
		if strings.HasPrefix(p, "github.com/caddy-wechat/") && !strings.HasSuffix(p, "/integration/bench/stock") {
			t.Errorf("%s is in it", p)
		}
	}
}
