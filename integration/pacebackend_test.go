package integration_test

import (
	"bufio"
	"context"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// script tells a scripted backend what to do with a message. It travels as the message's text, or as an event's key.
type script struct {
	name string // tells messages of one test apart
	take time.Duration
	give string
}

// What a scripted backend can be told to give.
const (
	giveText    = "text"    // a reply with the text repliesWith says
	giveSuccess = "success" // nothing for the user
	give500     = "500"     // a status that is not 2xx, with a reply in the body
	giveHTML    = "html"    // an error page with status 200
	giveGarbage = "garbage" // neither of the formats
	giveHalf    = "half"    // half of a reply, then the connection ends
	giveOther   = "other"   // a reply in the other format
	giveLarge   = "large"   // a reply of more than the 1 MiB that max_body allows by default
	giveNever   = "never"   // the connection is held
)

func (s script) String() string { return fmt.Sprintf("%s %v %s", s.name, s.take, s.give) }

// repliesWith is the text that the user gets to see when the script gives one.
func (s script) repliesWith() string { return "收到：" + s.String() }

func parseScript(text string) (script, bool) {
	parts := strings.Fields(text)
	if len(parts) != 3 {
		return script{}, false
	}
	take, err := time.ParseDuration(parts[1])
	return script{parts[0], take, parts[2]}, err == nil
}

// scripted is a backend that does as each message tells it, and counts how often it was given each.
type scripted struct {
	mu   sync.Mutex
	runs map[string]int
	from map[string]time.Time // when it was first given each
	came chan struct{}        // closed and replaced with each message
	over chan struct{}        // closed when the test is over
}

func newScripted() *scripted {
	return &scripted{runs: make(map[string]int), from: make(map[string]time.Time), came: make(chan struct{}), over: make(chan struct{})}
}

// ran is how often the backend was given a message.
func (b *scripted) ran(s script) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.runs[s.String()]
}

// began is when the backend was first given a message.
func (b *scripted) began(s script) time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.from[s.String()]
}

// wait waits until the backend has been given a message.
func (b *scripted) wait(ctx context.Context, s script) error {
	for {
		b.mu.Lock()
		came, ran := b.came, b.runs[s.String()]
		b.mu.Unlock()
		if ran > 0 {
			return nil
		}
		select {
		case <-came:
		case <-ctx.Done():
			return fmt.Errorf("the backend never got %q: %w", s, ctx.Err())
		}
	}
}

// told is the part of a message that matters here, in either format.
type told struct {
	ToUserName, FromUserName, Content, EventKey string
}

func (b *scripted) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m, s, asJSON, err := readScript(r)
	if err != nil {
		http.Error(w, "not a script", http.StatusBadRequest)
		return
	}
	b.mu.Lock()
	if b.runs[s.String()]++; b.runs[s.String()] == 1 {
		b.from[s.String()] = time.Now()
	}
	close(b.came)
	b.came = make(chan struct{})
	b.mu.Unlock()

	timer := time.NewTimer(s.take)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-r.Context().Done():
		return
	case <-b.over:
		return
	}
	b.give(w, r, s, m, asJSON)
}

// readScript reads a message, in either format, and what it tells the backend to do.
func readScript(r *http.Request) (m told, s script, asJSON bool, err error) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return m, s, false, err
	}
	if asJSON = strings.HasPrefix(string(body), "{"); asJSON {
		err = json.Unmarshal(body, &m)
	} else {
		err = xml.Unmarshal(body, &m)
	}
	if err != nil {
		return m, s, asJSON, err
	}
	s, ok := parseScript(m.Content + m.EventKey)
	if !ok {
		err = fmt.Errorf("%q is no script", m.Content+m.EventKey)
	}
	return m, s, asJSON, err
}

func (b *scripted) give(w http.ResponseWriter, r *http.Request, s script, m told, asJSON bool) {
	reply := m.reply(s.repliesWith(), asJSON)
	w.Header().Set("Content-Type", "text/html; charset=utf-8") // as old servlets say, whatever they send
	switch s.give {
	case giveText:
		_, _ = io.WriteString(w, reply)
	case giveSuccess:
		_, _ = io.WriteString(w, "success")
	case give500:
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = io.WriteString(w, reply)
	case giveHTML:
		_, _ = io.WriteString(w, "<!DOCTYPE html><html><body>It works!</body></html>")
	case giveGarbage:
		_, _ = io.WriteString(w, "\x00\x01 neither of the two")
	case giveHalf:
		w.Header().Set("Content-Length", strconv.Itoa(len(reply)))
		_, _ = io.WriteString(w, reply[:len(reply)/2])
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	case giveOther:
		_, _ = io.WriteString(w, m.reply(s.repliesWith(), !asJSON))
	case giveLarge:
		_, _ = io.WriteString(w, m.reply(strings.Repeat("x", 2<<20), asJSON))
	case giveNever:
		select {
		case <-r.Context().Done():
		case <-b.over:
		}
	}
}

func (m told) reply(text string, asJSON bool) string {
	now := time.Now().Unix()
	if asJSON {
		out, _ := json.Marshal(map[string]any{ // strings and a number: always encodes
			"ToUserName": m.FromUserName, "FromUserName": m.ToUserName, "CreateTime": now, "MsgType": "text", "Content": text,
		})
		return string(out)
	}
	return fmt.Sprintf("<xml><ToUserName><![CDATA[%s]]></ToUserName><FromUserName><![CDATA[%s]]></FromUserName>"+
		"<CreateTime>%d</CreateTime><MsgType><![CDATA[text]]></MsgType><Content><![CDATA[%s]]></Content></xml>",
		m.FromUserName, m.ToUserName, now, text)
}

// halfBackendAddr is the environment variable that makes the test binary a backend which stops in the middle of its answer.
const halfBackendAddr = "WECHAT_TEST_HALF_BACKEND"

// halfBackend answers the first request on addr with half a reply, says so on its output, and waits to be killed.
func halfBackend(addr string) int {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		fmt.Println(err)
		return 1
	}
	fmt.Println("listening")
	err = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { //nolint:gosec // ends by SIGKILL
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Length", "1000")
		_, _ = io.WriteString(w, "<xml><ToUserName><![CDATA[")
		_ = http.NewResponseController(w).Flush()
		fmt.Println("half")
		<-r.Context().Done()
	}))
	fmt.Println(err)
	return 1
}

// startHalfBackend starts that process. Said reads what it says, line by line.
func startHalfBackend(t *testing.T, addr string) (cmd *exec.Cmd, said *bufio.Scanner) {
	t.Helper()
	cmd = exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), halfBackendAddr+"="+addr)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	said = bufio.NewScanner(out)
	if !said.Scan() || said.Text() != "listening" {
		t.Fatalf("the backend process says %q", said.Text())
	}
	return cmd, said
}
