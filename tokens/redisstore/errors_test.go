package redisstore

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// TestErrorsShowNothingThatWasSent: a server quotes the arguments of a command that it does not know, such as one that was
// renamed.
func TestErrorsShowNothingThatWasSent(t *testing.T) {
	t.Parallel()
	const hidden = "hidden-from-logs"
	t.Run("password", func(t *testing.T) {
		t.Parallel()
		server := redistest.Start(t, "--rename-command", "AUTH", "a-other", "--rename-command", "HELLO", "h-other")
		s := open(t, Options{Addresses: []string{server.Addr}, Password: secret.New(hidden)})
		_, err := s.Load(t.Context(), locked)
		concise(t, err, "unknown command 'auth'", hidden)
	})
	t.Run("value", func(t *testing.T) {
		t.Parallel()
		server := redistest.Start(t, "--rename-command", "SET", "s-other")
		s := open(t, Options{Addresses: []string{server.Addr}})
		concise(t, s.Put(t.Context(), "x", []byte(hidden), time.Minute), "unknown command 'set'", hidden)
		err := s.ClaimAll([]tokens.Claim{{Name: "x", Value: []byte(hidden), TTL: time.Minute}}, time.Minute)
		concise(t, err, "unknown command 'set'", hidden)
	})
	t.Run("script", func(t *testing.T) {
		t.Parallel()
		server := redistest.Start(t, "--rename-command", "EVALSHA", "e-other")
		s := open(t, Options{Addresses: []string{server.Addr}})
		concise(t, s.Store(t.Context(), "a", []byte(hidden)), "unknown command 'evalsha'", hidden)
	})
}

// TestErrorsShowNothingOfAnAnswer: what answers may be no Redis, or one whose values are not ours.
func TestErrorsShowNothingOfAnAnswer(t *testing.T) {
	t.Parallel()
	const hidden = "hidden-from-logs"
	for _, answer := range []string{
		"+" + hidden + "\r\n", "$16\r\n" + hidden + "\r\n", hidden + "\r\n", ":" + hidden + "\r\n", "*1\r\n$16\r\n" + hidden + "\r\n",
		"-ERR " + strings.Repeat("x", 10_000) + hidden + "\r\n", "-ERR unknown command `EVALSHA`, with args beginning with: `" + hidden + "`\r\n",
	} {
		s := open(t, Options{Addresses: []string{answering(t, answer, "evalsha", "eval")}})
		concise(t, s.Store(t.Context(), "a", []byte("x")), "redis", hidden)
	}
}

// concise checks an error for what is to be in it, what is not, and for its length.
func concise(t *testing.T, err error, want, hidden string) {
	t.Helper()
	if wrong := lacking(err, want, hidden); wrong != "" {
		t.Error(wrong)
	}
}

// lacking is what is wrong with an error for concise.
func lacking(err error, want, hidden string) string {
	switch {
	case err == nil:
		return "no error"
	case !strings.Contains(strings.ToLower(err.Error()), want) || len(err.Error()) > 2*maxSaid:
		return fmt.Sprintf("the error is %q, want %q in few words", err, want)
	case strings.Contains(err.Error(), hidden):
		return fmt.Sprintf("the error shows what it should not: %q", err)
	}
	return ""
}

// answering is the address of a server that answers some commands, and no others.
func answering(t *testing.T, answer string, commands ...string) string {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var work sync.WaitGroup
	t.Cleanup(func() { _ = l.Close(); work.Wait() })
	work.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			work.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(10 * time.Second))
				for lines := bufio.NewScanner(c); lines.Scan(); {
					switch command := strings.ToLower(lines.Text()); {
					case command == "hello":
						_, _ = c.Write([]byte("-ERR no\r\n"))
					case slices.Contains(commands, command):
						_, _ = c.Write([]byte(answer))
					}
				}
			})
		}
	})
	return l.Addr().String()
}

// TestErrorsKeepTheirCause: callers tell a context that ended from a server that is not there.
func TestErrorsKeepTheirCause(t *testing.T) {
	t.Parallel()
	s := open(t, Options{Addresses: []string{"127.0.0.1:1"}})
	err := s.Store(t.Context(), "a", nil)
	if _, ok := errors.AsType[*net.OpError](err); !ok || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("error %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Store(ctx, "a", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}
