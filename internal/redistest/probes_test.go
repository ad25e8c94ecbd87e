package redistest

import (
	"context"
	"errors"
	"net"
	"testing"

	"github.com/redis/go-redis/v9"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(Tests{M: m}) }

// TestProbesAreAwaited says, too, if go-redis calls its probe by another name.
func TestProbesAreAwaited(t *testing.T) {
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", PoolSize: 1, MaxRetries: -1})
	Eventually(t, "the pool looks for its server", func() error {
		client.Ping(t.Context())
		if !probing() {
			return errors.New("nothing does")
		}
		return nil
	})
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	awaitProbes()
	goleak.VerifyNone(t)
}

// TestDialsAreAwaited: one that nobody waits for any more may begin a probe.
func TestDialsAreAwaited(t *testing.T) {
	dialing, fail := make(chan struct{}), make(chan struct{})
	client := redis.NewClient(&redis.Options{PoolSize: 1, MaxRetries: -1, DialerRetries: 1, Dialer: func(context.Context, string, string) (net.Conn, error) {
		close(dialing)
		<-fail
		return nil, errors.New("no server")
	}})
	ctx, cancel := context.WithCancel(t.Context())
	asked := make(chan error, 1)
	go func() { asked <- client.Ping(ctx).Err() }()
	<-dialing
	cancel()
	if err := <-asked; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	if !probing() {
		t.Error("the dial is not seen")
	}
	close(fail)
	awaitProbes()
	goleak.VerifyNone(t)
}
