package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// What the memory cases are made of. Options divide the numbers, for tests.
const (
	workRequests   = 50_000
	idleClients    = 10_000
	uploads        = 64
	uploadSize     = 10 << 20
	uploadBlock    = 64 << 10
	heldPushes     = 5_000
	seriesSteps    = 10
	seriesRequests = 100_000
	atOnceInMemory = 50_000 // requests that are prepared at a time
	spareFiles     = 500    // that a process needs beside connections
	seriesName     = "series"

	heldTimeout = 4 * time.Second // from the last one's sending; after 4.5 s the gateway answers by itself
	fileTimeout = 2 * time.Minute
)

// memoryCase is a situation in which a server's memory is read.
type memoryCase struct {
	name string
	goal *goal // of what the gateway has more, in MiB
	run  func(context.Context, *target) (rss int64, err error)
}

// measureMemory reads the memory of stock Caddy and of the gateway in each case whose name matches, of a new process each time.
func (o *options) measureMemory(ctx context.Context, only *regexp.Regexp, out io.Writer) error {
	files, err := openFiles()
	if err != nil {
		return err
	}
	// A held push has a connection on each side; both ends of the generator's are in this process.
	clients := within(out, idleClients/o.scale, files-spareFiles, "idle clients")
	held := within(out, heldPushes/o.scale, (files-spareFiles)/2, "held pushes")
	files64 := max(2, uploads/o.scale)
	gate := new(gate)
	o.around, o.files = gate.office, gate.file
	inbound, err := o.inbound()
	if err != nil {
		return err
	}
	outbound, err := o.outbound("outbound", "", nil)
	if err != nil {
		return err
	}
	work := workRequests / o.scale
	pushCases := []memoryCase{
		{"idle", &goalIdle, func(_ context.Context, t *target) (int64, error) { return t.IdleRSS, nil }},
		{fmt.Sprintf("at work: %d pushes on %d connections", work, o.connections), &goalAtWork, func(ctx context.Context, t *target) (int64, error) {
			return t.LoadRSS, o.work(ctx, t, work)
		}},
		{fmt.Sprintf("%d keep-alive clients, idle after a push each", clients), nil, func(ctx context.Context, t *target) (int64, error) {
			return o.idle(ctx, t, clients)
		}},
		{fmt.Sprintf("%d pushes held by the backend", held), nil, func(ctx context.Context, t *target) (int64, error) {
			return o.hold(ctx, t, gate, held)
		}},
	}
	callCases := []memoryCase{
		{fmt.Sprintf("%d uploads of %d MiB at once", files64, uploadSize>>20), nil, func(ctx context.Context, t *target) (int64, error) {
			return o.upload(ctx, t, gate, files64)
		}},
	}
	fmt.Fprintf(out, "\n| RSS, MiB | stock | gateway | more | gateway, transport http | more | gate, target of both |\n| --- | --- | --- | --- | --- | --- | --- |\n")
	var missing error // a case that this machine is too slow for; the others are worth their time
	for i, cases := range [][]memoryCase{pushCases, callCases} {
		for _, c := range cases {
			if !only.MatchString(c.name) {
				continue
			}
			switch err := o.memoryRow(ctx, out, c, []*scenario{inbound, outbound}[i]); {
			case errors.Is(err, errTooSlow):
				fmt.Fprintf(out, "| %s | – | – | – | – | – | %v |\n", c.name, err)
				missing = errors.Join(missing, err)
			case err != nil:
				return err
			}
		}
	}
	if !only.MatchString(seriesName) {
		return missing
	}
	return errors.Join(o.series(ctx, out, inbound), missing)
}

// within bounds a number of connections by the files that may be open, and says so.
func within(out io.Writer, want, most int, what string) int {
	if want <= most {
		return want
	}
	fmt.Fprintf(out, "only %d %s in place of %d: the hard limit of open files (ulimit -Hn) allows no more\n", most, what, want)
	return most
}

func (s *scenario) target(name string) *target {
	for _, t := range s.targets {
		if t.name == name {
			return t
		}
	}
	return nil
}

// memoryTargets are whose memory is measured: stock Caddy, and the gateway in each way to the backend.
var memoryTargets = []string{targetStock, targetGateway, targetGatewayHTTP}

// memoryRow measures a case. A goal is for the larger of the gateway's.
func (o *options) memoryRow(ctx context.Context, out io.Writer, c memoryCase, s *scenario) error {
	row, stock, most := "", int64(0), int64(math.MinInt64)
	for _, name := range memoryTargets {
		t := s.target(name)
		if t == nil {
			row += " – | – |"
			continue
		}
		rss, err := o.memoryOf(ctx, c, t)
		if err != nil {
			return err
		}
		row += " " + mib(rss) + " |"
		if name == targetStock {
			stock = rss
			continue
		}
		row += " **" + mib(rss-stock) + "** |"
		most = max(most, rss-stock)
	}
	goal := ""
	if c.goal != nil {
		goal = fmt.Sprintf("%g, %g: %s", c.goal.gate, c.goal.target, c.goal.verdict(float64(most)/(1<<20)))
	}
	_, err := fmt.Fprintf(out, "| %s |%s %s |\n", c.name, row, goal)
	return err
}

// memoryOf starts a target, measures a case, and stops it.
func (o *options) memoryOf(ctx context.Context, c memoryCase, t *target) (rss int64, err error) {
	t.figures = figures{}
	if err := o.start(ctx, t); err != nil {
		return 0, err
	}
	if err = t.settle(ctx, o.pause); err == nil {
		rss, err = c.run(ctx, t)
	}
	if rss == 0 {
		rss = t.LoadRSS
	}
	if stopped := o.stop(t); err != nil || stopped != nil {
		return 0, fmt.Errorf("%s: %s: %w", c.name, t.name, errors.Join(err, stopped))
	}
	return rss, nil
}

// work has the target answer n pushes, some at a time.
func (o *options) work(ctx context.Context, t *target, n int) error {
	for n > 0 {
		some := min(n, atOnceInMemory)
		if _, err := o.volley(some, 0)(ctx, t); err != nil {
			return err
		}
		n -= some
	}
	return nil
}

// idle has n clients push once each and stay.
func (o *options) idle(ctx context.Context, t *target, n int) (int64, error) {
	b, err := t.traffic.prepare(n, t.addr)
	if err != nil {
		return 0, err
	}
	conns, err := dial(ctx, t.addr, n)
	if err != nil {
		return 0, err
	}
	defer closeConns(conns)
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, o.connections)
	for w := range errs {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n && errs[w] == nil; i = int(next.Add(1)) - 1 {
				errs[w] = exchange(conns[i], b, t.traffic, i)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return 0, err
	}
	idle := t.IdleRSS
	defer func() { t.IdleRSS = idle }()
	err = t.settle(ctx, o.pause)
	return t.IdleRSS, err
}

// exchange sends a request of a batch and judges the reply.
func exchange(c net.Conn, b *batch, judge traffic, i int) error {
	if err := c.SetDeadline(time.Now().Add(roundGrace)); err != nil {
		return err
	}
	if _, err := c.Write(b.request(i)); err != nil {
		return err
	}
	return readReply(c, judge, b.ids[i])
}

func readReply(c net.Conn, judge traffic, id uint64) error {
	status, body, err := newReplies(c).read()
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return fmt.Errorf("status %d: %s", status, excerpt(body))
	}
	if wrong := judge.inspect(id, body); wrong != "" {
		return errors.New(wrong)
	}
	return nil
}

// hold has n pushes wait for the backend at the same time.
func (o *options) hold(ctx context.Context, t *target, g *gate, n int) (rss int64, err error) {
	b, err := t.traffic.prepare(n, t.addr)
	if err != nil {
		return 0, err
	}
	conns, err := dial(ctx, t.addr, n)
	if err != nil {
		return 0, err
	}
	defer closeConns(conns)
	all := g.shut(n)
	defer g.open()
	for i, c := range conns {
		if _, err := c.Write(b.request(i)); err != nil {
			return 0, err
		}
	}
	if rss, err = g.await(ctx, t, all, heldTimeout); err != nil {
		return 0, err
	}
	g.open()
	for i, c := range conns {
		if err := c.SetDeadline(time.Now().Add(roundGrace)); err != nil {
			return 0, err
		}
		if err := readReply(c, t.traffic, b.ids[i]); err != nil {
			return 0, fmt.Errorf("push %d that was held: %w", i, err)
		}
	}
	return rss, t.far.wrong.take(n)
}

// upload sends n files at once, each of which waits half-way until all are there.
func (o *options) upload(ctx context.Context, t *target, g *gate, n int) (rss int64, err error) {
	conns, err := dial(ctx, t.addr, n)
	if err != nil {
		return 0, err
	}
	defer closeConns(conns)
	all := g.shut(n)
	defer g.open()
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i, c := range conns {
		wg.Go(func() { errs[i] = sendFile(c, t.addr) })
	}
	seen := t.watchRSS(t.gateway.PID())
	_, err = g.await(ctx, t, all, fileTimeout)
	g.open()
	wg.Wait()
	rss = seen()
	return rss, errors.Join(append(errs, err, t.far.wrong.take(n))...)
}

const uploaded = `{"type":"image","media_id":"benchmark","created_at":1715943329}`

// fileBlock is what files consist of.
var fileBlock = bytes.Repeat([]byte("0123456789abcdef"), uploadBlock/16)

func sendFile(c net.Conn, host string) error {
	if err := c.SetDeadline(time.Now().Add(fileTimeout)); err != nil {
		return err
	}
	if _, err := fmt.Fprintf(c, "POST /cgi-bin/media/upload?type=image HTTP/1.1\r\nHost: %s\r\nUser-Agent: sdk/1\r\nAuthorization: Bearer %s\r\n"+
		"X-Wechat-Appid: %s\r\nContent-Type: multipart/form-data; boundary=file\r\nContent-Length: %d\r\n\r\n", host, clientKey, appID, uploadSize); err != nil {
		return err
	}
	for range uploadSize / uploadBlock {
		if _, err := c.Write(fileBlock); err != nil {
			return err
		}
	}
	status, body, err := newReplies(c).read()
	if err == nil && (status != http.StatusOK || string(body) != uploaded) {
		err = fmt.Errorf("status %d: %s", status, excerpt(body))
	}
	return err
}

func closeConns(conns []net.Conn) {
	for _, c := range conns {
		_ = c.Close()
	}
}

// gate is where requests wait at the far end until all are there. It is open until it is shut.
type gate struct {
	mu      sync.Mutex
	want    int
	all     chan struct{} // closed when all are there
	release chan struct{} // nil: open
}

// shut has those who come from now on wait, until open. The returned channel is closed when n are there.
func (g *gate) shut(n int) <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.want, g.all, g.release = n, make(chan struct{}), make(chan struct{})
	return g.all
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.release != nil {
		close(g.release)
		g.release = nil
	}
}

func (g *gate) pass() {
	g.mu.Lock()
	release := g.release
	if release != nil {
		if g.want--; g.want == 0 {
			close(g.all)
		}
	}
	g.mu.Unlock()
	if release != nil {
		<-release
	}
}

var errTooSlow = errors.New("the machine is too slow, or too busy")

// await waits until all are there, and reads the target's memory.
func (g *gate) await(ctx context.Context, t *target, all <-chan struct{}, patience time.Duration) (int64, error) {
	select {
	case <-all:
		rss, _, err := memory(t.gateway.PID())
		return rss, err
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(patience):
		g.mu.Lock()
		defer g.mu.Unlock()
		return 0, fmt.Errorf("%w: %d requests did not come to the far end within %v", errTooSlow, g.want, patience)
	}
}

// office has requests without a file pass the gate before they are answered.
func (g *gate) office(o office) office {
	return func(dst []byte, a *ask) ([]byte, string) {
		if len(a.body) > 0 && bytes.HasPrefix(a.path, []byte("/wx/message/")) {
			g.pass()
		}
		return o(dst, a)
	}
}

// file takes an upload, and has it pass the gate half-way.
func (g *gate) file(dst []byte, a *ask) ([]byte, string) {
	block := make([]byte, uploadBlock)
	for i := range uploadSize / uploadBlock {
		if i == uploadSize/uploadBlock/2 {
			g.pass()
		}
		if _, err := io.ReadFull(a.upload, block); err != nil {
			return dst, "upload: " + err.Error()
		}
		if !bytes.Equal(block, fileBlock) {
			return dst, "upload is not what was sent"
		}
	}
	return append(dst, uploaded...), ""
}

// series shows whether memory grows: what both have after each of many steps.
func (o *options) series(ctx context.Context, out io.Writer, s *scenario) error {
	targets := []*target{s.target(targetStock), s.target(targetGateway)}
	for _, t := range targets {
		if err := o.start(ctx, t); err != nil {
			return err
		}
	}
	fmt.Fprintf(out, "\n| pushes | stock: RSS, live heap MiB | gateway: RSS, live heap MiB |\n| --- | --- | --- |\n")
	step := seriesRequests / o.scale
	for i := range seriesSteps + 1 {
		row := fmt.Sprintf("| %d |", i*step)
		for _, t := range targets {
			if i > 0 {
				if err := o.work(ctx, t, step); err != nil {
					return err
				}
			}
			rss, _, err := memory(t.gateway.PID())
			if err != nil {
				return err
			}
			heap, err := liveHeap(ctx, t)
			if err != nil {
				return err
			}
			row += fmt.Sprintf(" %s, %s |", mib(rss), mib(heap))
		}
		fmt.Fprintln(out, row)
	}
	for _, t := range targets {
		if err := o.stop(t); err != nil {
			return err
		}
	}
	return nil
}

// liveHeap is what a server's heap holds after a garbage collection.
func liveHeap(ctx context.Context, t *target) (int64, error) {
	const name = "# HeapAlloc = "
	var page bytes.Buffer
	if err := fetch(ctx, "http://"+t.gateway.Admin+"/debug/pprof/heap?gc=1&debug=1", roundGrace, &page); err != nil {
		return 0, err
	}
	for line := range strings.Lines(page.String()) {
		if value, ok := strings.CutPrefix(line, name); ok {
			return strconv.ParseInt(strings.TrimSpace(value), 10, 64)
		}
	}
	return 0, errors.New("the heap profile does not say what is allocated")
}
