package redistest

import (
	"bufio"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// Proxy stands before servers as the proxy of a managed Redis does before its shards: keys are spread over all of them, and
// what is published and subscribed goes to the first. It knows Redis's protocol of before version 6 alone.
type Proxy struct {
	Addr string

	answer   func(command []string) string
	shards   []string
	listener net.Listener
	wg       sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]bool
	ears  map[net.Conn]string // of clients that have subscribed: to what
}

// NewProxy starts a proxy. Answer may answer a command in a server's place, with all of an answer as it is sent: "" leaves
// it to the server.
func NewProxy(t testing.TB, answer func(command []string) string, shards ...*Server) *Proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &Proxy{Addr: l.Addr().String(), answer: answer, listener: l, conns: make(map[net.Conn]bool), ears: make(map[net.Conn]string)}
	for _, s := range shards {
		p.shards = append(p.shards, s.Addr)
	}
	p.wg.Go(p.accept)
	t.Cleanup(func() {
		_ = l.Close()
		p.mu.Lock()
		for c := range p.conns {
			_ = c.Close()
		}
		p.conns = nil
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p
}

func (p *Proxy) accept() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			return
		}
		if p.keep(c) {
			p.wg.Go(func() { p.serve(c) })
		}
	}
}

// keep notes a connection, which ends with the proxy.
func (p *Proxy) keep(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.conns == nil {
		_ = c.Close()
		return false
	}
	p.conns[c] = true
	return true
}

func (p *Proxy) drop(c net.Conn) {
	_ = c.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
	delete(p.ears, c)
}

// SubscribeAnew tells all who have subscribed that they have, once more, as a proxy does that had to subscribe at another server.
func (p *Proxy) SubscribeAnew() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c, channel := range p.ears {
		_, _ = fmt.Fprintf(c, "*3\r\n$9\r\nsubscribe\r\n$%d\r\n%s\r\n:1\r\n", len(channel), channel)
	}
}

// shard is a client's connection to one of the servers.
type shard struct {
	net.Conn
	answers *bufio.Reader
	asked   *bufio.Writer
}

// serve answers a client, of what it sent together all at once.
func (p *Proxy) serve(client net.Conn) {
	defer p.drop(client)
	commands, told := bufio.NewReader(client), bufio.NewWriter(client)
	shards := make([]*shard, len(p.shards))
	defer func() {
		for _, s := range shards {
			if s != nil {
				p.drop(s.Conn)
			}
		}
	}()
	for {
		type pending struct {
			said string
			from *shard
		}
		var batch []pending
		for len(batch) == 0 || commands.Buffered() > 0 {
			raw, command, err := readValue(commands)
			if err != nil || len(command) == 0 {
				return
			}
			name := strings.ToLower(command[0])
			said := ""
			if p.answer != nil {
				said = p.answer(command)
			}
			if name == "hello" {
				said = "-ERR unknown command 'hello'\r\n"
			}
			if said != "" {
				batch = append(batch, pending{said: said})
				continue
			}
			s, err := p.reach(shards, p.place(name, command))
			if err != nil {
				return
			}
			_, _ = s.asked.WriteString(raw)
			if name == "subscribe" {
				p.mu.Lock()
				p.ears[client] = command[1]
				p.mu.Unlock()
				p.pass(client, commands, s)
				return
			}
			batch = append(batch, pending{from: s})
		}
		for _, answer := range batch {
			if answer.from != nil {
				_ = answer.from.asked.Flush()
				var err error
				if answer.said, _, err = readValue(answer.from.answers); err != nil {
					return
				}
			}
			_, _ = told.WriteString(answer.said)
		}
		if told.Flush() != nil {
			return
		}
	}
}

// reach is a connection to a server, made if there is none yet.
func (p *Proxy) reach(shards []*shard, i int) (*shard, error) {
	if shards[i] == nil {
		c, err := net.Dial("tcp", p.shards[i])
		if err != nil {
			return nil, err
		}
		if !p.keep(c) {
			return nil, net.ErrClosed
		}
		shards[i] = &shard{c, bufio.NewReader(c), bufio.NewWriter(c)}
	}
	return shards[i], nil
}

// pass lets pass what a client that subscribed sends and hears.
func (p *Proxy) pass(client net.Conn, commands io.Reader, s *shard) {
	_ = s.asked.Flush()
	p.wg.Go(func() { _, _ = io.Copy(client, s.answers); _ = client.Close() })
	_, _ = io.Copy(s.Conn, commands)
}

// place is the shard of a command.
func (p *Proxy) place(name string, command []string) int {
	key := ""
	switch {
	case name == "eval" || name == "evalsha":
		if len(command) > 3 && command[2] != "0" {
			key = command[3]
		}
	case name == "get" || name == "set" || name == "del" || strings.HasPrefix(name, "h"):
		key = command[1]
	}
	if key == "" {
		return 0
	}
	if _, tag, ok := strings.Cut(key, "{"); ok {
		key, _, _ = strings.Cut(tag, "}")
	}
	return int(crc32.ChecksumIEEE([]byte(key)) % uint32(len(p.shards))) //nolint:gosec // few
}

// readValue reads a command, or an answer, and the texts of one that is an array.
func readValue(r *bufio.Reader) (raw string, texts []string, err error) {
	line, err := r.ReadString('\n')
	if err != nil {
		return "", nil, err
	}
	n, _ := strconv.Atoi(strings.TrimSpace(line[1:]))
	switch line[0] {
	case '$':
		if n < 0 {
			return line, []string{""}, nil
		}
		text := make([]byte, n+len("\r\n"))
		if _, err := io.ReadFull(r, text); err != nil {
			return "", nil, err
		}
		return line + string(text), []string{string(text[:n])}, nil
	case '*':
		raw = line
		for range n {
			part, in, err := readValue(r)
			if err != nil {
				return "", nil, err
			}
			raw += part
			texts = append(texts, in...)
		}
		return raw, texts, nil
	case '+', '-', ':':
		return line, []string{strings.TrimSpace(line[1:])}, nil
	}
	return "", nil, errors.New("this is not Redis's protocol")
}
