package browser_test

import (
	"context"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/integration"
)

// TestBrowser has one browser go through everything, one after the other: what WeChat does next is prepared for whoever
// comes next.
func TestBrowser(t *testing.T) {
	w := newWorld(t)
	for _, flow := range []struct {
		name string
		run  func(*testing.T, *world)
	}{{"authorize", authorization}, {"login", login}, {"jssdk", jssdk}, {"console", console}} {
		t.Run(flow.name, func(t *testing.T) {
			w.join(t)
			flow.run(t, w)
		})
	}
}

// join has the account grant the platform all that it has, and waits until its host has a certificate.
func (w *world) join(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	if a, err := w.WeChat.Authorize(ctx, integration.PlatformID, integration.AuthorizerID, 1, 2, 3, 4, 7, 11, 15); err != nil || !a.Push.OK() {
		t.Fatalf("authorized: %s %v", a.Push.Wrong, err)
	}
	client, err := w.Client()
	if err != nil {
		t.Fatal(err)
	}
	for {
		err := reach(ctx, client, w.web)
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the account's host: %v", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func reach(ctx context.Context, client *http.Client, address string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("status %d", resp.StatusCode)
	}
	return nil
}
