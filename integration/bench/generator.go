package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Deadlines and sizes of the generator's connections.
const (
	dialTimeout  = 10 * time.Second
	roundGrace   = 60 * time.Second     // beyond what a round should take
	slowest      = 2 * time.Millisecond // that a request takes, on average, on a machine that has much else to do
	longestReply = 1 << 20
	replyBuffer  = 8 << 10
)

// volley is a batch to send, and how.
type volley struct {
	addr        string
	batch       *batch
	traffic     traffic
	connections int
	rate        float64 // requests a second, whatever the server does; 0: as fast as replies come
	sample      float64 // share of the replies that are inspected
	cpu         func() (time.Duration, error)
}

// result is what a volley showed.
type result struct {
	Requests  int
	Elapsed   time.Duration
	CPU       time.Duration // of the server's process
	Others    float64       // processors that were at work for neither the server nor this process
	Inspected int
	wrong     complaints
	latencies []time.Duration // by request; with a rate, from when the request was due
}

// add makes r the result of what both sent.
func (r *result) add(more *result) {
	r.Others = (r.Others*float64(r.Elapsed) + more.Others*float64(more.Elapsed)) / float64(r.Elapsed+more.Elapsed)
	r.Requests += more.Requests
	r.Elapsed += more.Elapsed
	r.CPU += more.CPU
	r.Inspected += more.Inspected
	r.latencies = append(r.latencies, more.latencies...)
}

// complaints count what went wrong, and keep the first.
type complaints struct {
	mu    sync.Mutex
	count int
	first string
}

func (c *complaints) add(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.count++; c.count == 1 {
		c.first = what
	}
}

// take returns what there is, as an error, and forgets it.
func (c *complaints) take(of int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.count == 0 {
		return nil
	}
	err := fmt.Errorf("%d wrong of %d, the first: %s", c.count, of, c.first)
	c.count, c.first = 0, ""
	return err
}

// kept is a reply to inspect afterwards.
type kept struct {
	id   uint64
	body []byte
}

// fire sends the batch over keep-alive connections that are open before the clock starts. An error is one of transport: no
// reply, or not HTTP. Wrong replies are in the result.
func (v *volley) fire(ctx context.Context) (*result, error) {
	conns, err := dial(ctx, v.addr, v.connections)
	if err != nil {
		return nil, err
	}
	closeAll := func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}
	defer closeAll()
	defer context.AfterFunc(ctx, closeAll)()

	n := v.batch.len()
	r := &result{Requests: n, latencies: make([]time.Duration, n)}
	expected := time.Duration(n) * slowest
	if v.rate > 0 {
		expected += time.Duration(float64(n) / v.rate * float64(time.Second))
	}
	deadline := time.Now().Add(expected + roundGrace)
	for _, c := range conns {
		if err := c.SetDeadline(deadline); err != nil {
			return nil, err
		}
	}
	every := n + 1
	if v.sample > 0 {
		every = max(1, int(1/v.sample))
	}
	s := &salvo{volley: v, result: r, every: every, offset: rand.IntN(every)} //nolint:gosec // a sample, not a secret
	before, err := readClocks(v.cpu)
	if err != nil {
		return nil, err
	}
	s.start = time.Now()
	var wg sync.WaitGroup
	for _, c := range conns {
		wg.Go(func() {
			if err := s.work(c); err != nil {
				s.fail(err)
				closeAll()
			}
		})
	}
	wg.Wait()
	r.Elapsed = time.Since(s.start)
	after, err := readClocks(v.cpu)
	if err != nil {
		return nil, err
	}
	r.CPU = after.server - before.server
	others := after.machine - before.machine - r.CPU - (after.own - before.own)
	r.Others = max(0, float64(others)/float64(r.Elapsed))
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	if s.err != nil {
		return nil, s.err
	}
	for _, k := range s.kept {
		r.Inspected++
		if wrong := v.traffic.inspect(k.id, k.body); wrong != "" {
			r.wrong.add(wrong)
		}
	}
	return r, nil
}

// clocks are CPU times.
type clocks struct{ server, own, machine time.Duration }

func readClocks(server func() (time.Duration, error)) (c clocks, err error) {
	if c.machine, err = busy(); err != nil {
		return c, err
	}
	if c.own, err = cpuTime(os.Getpid()); err != nil {
		return c, err
	}
	c.server, err = server()
	return c, err
}

// salvo is a volley under way.
type salvo struct {
	*volley
	result        *result
	start         time.Time
	next          atomic.Int64
	every, offset int

	mu   sync.Mutex
	err  error // the first
	kept []kept
}

func (s *salvo) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
}

// work sends request after request on a connection, each when the reply to the one before is there and it is due.
func (s *salvo) work(c net.Conn) error {
	r := newReplies(c)
	for {
		i := int(s.next.Add(1)) - 1
		if i >= s.batch.len() {
			return nil
		}
		began := time.Now()
		if s.rate > 0 {
			due := s.start.Add(time.Duration(float64(i) / s.rate * float64(time.Second)))
			time.Sleep(due.Sub(began))
			began = due
		}
		if _, err := c.Write(s.batch.request(i)); err != nil {
			return fmt.Errorf("sending: %w", err)
		}
		status, body, err := r.read()
		if err != nil {
			return fmt.Errorf("reading the reply: %w", err)
		}
		s.result.latencies[i] = time.Since(began)
		id := s.batch.ids[i]
		if status != http.StatusOK {
			s.result.wrong.add(fmt.Sprintf("status %d: %s", status, excerpt(body)))
		} else if wrong := s.traffic.glance(id, body); wrong != "" {
			s.result.wrong.add(wrong)
		} else if i%s.every == s.offset {
			s.mu.Lock()
			s.kept = append(s.kept, kept{id, bytes.Clone(body)})
			s.mu.Unlock()
		}
	}
}

// dial opens connections, a few at a time.
func dial(ctx context.Context, addr string, n int) ([]net.Conn, error) {
	const atOnce = 32
	conns := make([]net.Conn, n)
	errs := make([]error, atOnce)
	dialer := net.Dialer{Timeout: dialTimeout}
	var next atomic.Int64
	var wg sync.WaitGroup
	for w := range atOnce {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n && errs[w] == nil; i = int(next.Add(1)) - 1 {
				conns[i], errs[w] = dialer.DialContext(ctx, "tcp", addr)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		for _, c := range conns {
			if c != nil {
				_ = c.Close()
			}
		}
		return nil, err
	}
	return conns, nil
}

// replies reads HTTP/1.1 replies off a keep-alive connection, at a tenth of what net/http's client costs.
type replies struct {
	r    *bufio.Reader
	body []byte
}

func newReplies(r io.Reader) *replies { return &replies{r: bufio.NewReaderSize(r, replyBuffer)} }

// read returns the next reply; its body is valid until the next call.
func (r *replies) read() (status int, body []byte, err error) {
	line, err := readLine(r.r)
	if err != nil {
		return 0, nil, err
	}
	code, ok := bytes.CutPrefix(line, []byte("HTTP/1.1 "))
	if !ok || len(code) < 3 {
		return 0, nil, fmt.Errorf("status line %s", excerpt(line))
	}
	number, ok := digits(code[:3])
	if !ok {
		return 0, nil, fmt.Errorf("status line %s", excerpt(line))
	}
	h, err := readHeader(r.r, nil)
	if err != nil {
		return 0, nil, err
	}
	r.body, err = h.appendBody(r.body[:0], r.r, longestReply)
	return int(number), r.body, err //nolint:gosec // three digits
}

// header is what generator and far ends want of a header.
type header struct {
	length  int // -1: not said
	chunked bool
}

var (
	contentLength    = []byte("Content-Length")
	transferEncoding = []byte("Transfer-Encoding")
	chunkedCoding    = []byte("chunked")
)

// readHeader reads up to the empty line. Each line also goes to see, if there is one.
func readHeader(r *bufio.Reader, see func(name, value []byte)) (header, error) {
	h := header{length: -1}
	for {
		line, err := readLine(r)
		if err != nil {
			return h, err
		}
		if len(line) == 0 {
			return h, nil
		}
		name, value, ok := bytes.Cut(line, []byte(":"))
		if !ok {
			return h, fmt.Errorf("header line %s", excerpt(line))
		}
		value = bytes.TrimSpace(value)
		switch {
		case bytes.EqualFold(name, contentLength):
			n, ok := digits(value)
			if !ok || n > 1<<40 {
				return h, fmt.Errorf("Content-Length %s", excerpt(value))
			}
			h.length = int(n)
		case bytes.EqualFold(name, transferEncoding):
			h.chunked = bytes.EqualFold(value, chunkedCoding)
		case see != nil:
			see(name, value)
		}
	}
}

// appendBody reads the body that the header announces.
func (h header) appendBody(dst []byte, r *bufio.Reader, most int) ([]byte, error) {
	if !h.chunked {
		return appendN(dst, r, max(h.length, 0), most)
	}
	for {
		line, err := readLine(r)
		if err != nil {
			return dst, err
		}
		size, ok := hexDigits(line)
		if !ok {
			return dst, fmt.Errorf("size of a chunk: %s", excerpt(line))
		}
		if dst, err = appendN(dst, r, size, most); err != nil {
			return dst, err
		}
		if line, err = readLine(r); err != nil || len(line) != 0 {
			return dst, errors.Join(err, errors.New("end of a chunk"))
		}
		if size == 0 {
			return dst, nil
		}
	}
}

func hexDigits(b []byte) (n int, ok bool) {
	const most = 7
	for _, c := range b {
		d := bytes.IndexByte([]byte("0123456789abcdef"), c|0x20)
		if d < 0 {
			return 0, false
		}
		n = n<<4 | d
	}
	return n, len(b) > 0 && len(b) <= most
}

func appendN(dst []byte, r *bufio.Reader, n, most int) ([]byte, error) {
	start := len(dst)
	if start+n > most {
		return dst, fmt.Errorf("body of more than %d bytes", most)
	}
	if cap(dst) < start+n {
		dst = append(make([]byte, 0, start+n), dst...)
	}
	dst = dst[:start+n]
	_, err := io.ReadFull(r, dst[start:])
	return dst, err
}

// readLine reads a line without its end.
func readLine(r *bufio.Reader) ([]byte, error) {
	line, err := r.ReadSlice('\n')
	if err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(line[:len(line)-1], []byte("\r")), nil
}
