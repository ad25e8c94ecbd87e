package caddymodule

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// TestEventForwardIsDurableFirst: an event that is to be forwarded and cannot be kept is not acknowledged, nor forwarded, also if the gateway
// itself keeps nothing of it. A ticket, which nobody gets, needs no more than before.
func TestEventForwardIsDurableFirst(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(time.Date(2026, 11, 28, 0, 0, 0, 0, time.UTC))) // timestamps have ten digits
		e, app := newEvent(t)
		e.Forward = true
		store := app.env.Store
		app.env.Store = hungStore{tokens.NewMemStore()}
		next := caddyhttp.HandlerFunc(func(http.ResponseWriter, *http.Request) error {
			t.Error("forwarded")
			return nil
		})
		began := time.Now()
		rec := serve(t, e, eventSender(t).push("/wx/event", eventXML("something_new", "")), next)
		if took := time.Since(began); rec.Code != http.StatusServiceUnavailable || took != eventStoreTimeout {
			t.Errorf("%d %q after %s, want 503 after 3 s", rec.Code, rec.Body, took)
		}
		app.env.Store = store
	})
}

// TestForwardKept: an event that another process has accepted goes through the site's routes to the handler after wechat_event, as it went when
// it came, and nowhere else.
func TestForwardKept(t *testing.T) {
	const forward = "wechat_event {\nforward\n}\n"
	tests := []struct {
		name, site string
		path       string // of which the backend hears; empty: it hears of nothing
	}{
		{"as it came", "route /wx/event {\n" + forward + "reverse_proxy BACKEND\n}", "/wx/event"},
		{"below handle_path", "handle_path /wx/* {\n" + forward + "reverse_proxy BACKEND\n}", "/event"},
		{"by what it is", "route /wx/event {\n" + forward + "@gone wechat_message info_type unauthorized\nreverse_proxy @gone BACKEND\nreverse_proxy OTHER\n}", "/wx/event"},
		{"from whom it came", "@others not remote_ip 101.226.103.0/24\nrespond @others 403\nroute /wx/event {\n" + forward + "reverse_proxy BACKEND\n}", "/wx/event"},
		{"over TLS alone", "@tls protocol https\nroute @tls {\n" + forward + "reverse_proxy BACKEND\n}", "/wx/event"},
		{"no forward any more", "route /wx/event {\nwechat_event\nreverse_proxy BACKEND\n}", ""},
		{"no wechat_event any more", "route /wx/event {\nreverse_proxy OTHER\n}\nroute /other {\n" + forward + "reverse_proxy OTHER\n}", ""},
		{"another handler before it", "route /wx/event {\nreverse_proxy OTHER\n" + forward + "reverse_proxy OTHER\n}", ""},
		{"another host", "@host host other.example\nroute @host {\n" + forward + "reverse_proxy OTHER\n}", ""},
	}
	event, err := json.Marshal(keptEvent{
		Server: "srv0", Host: "wechat.example.com", URI: "/wx/event?signature=s&timestamp=1&nonce=2&encrypt_type=aes&msg_signature=m",
		TLS: true, Proto: "HTTP/1.1", Remote: "101.226.103.1:1234", Local: "127.0.0.1:443", Header: http.Header{"User-Agent": {"Mozilla/4.0"}},
		Message: []byte(eventXML("unauthorized", "<AuthorizerAppid>"+authorizerID+"</AuthorizerAppid>")),
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newSites(t, t.TempDir(), ":8080 {\n"+tt.site+"\n}\n")
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			err := s.app.forwardThrough(ctx, s.servers, tokens.Forward{Platform: platformID, AppID: authorizerID, InfoType: "unauthorized", Event: event})
			if (err == nil) != (tt.path != "") || err != nil && !errors.Is(err, tokens.ErrNotForwarded) {
				t.Errorf("error %v", err)
			}
			if n := len(s.other.copies()); n != 0 {
				t.Errorf("the other backend got %d requests", n)
			}
			got := s.backend.copies()
			if tt.path == "" {
				if len(got) != 0 {
					t.Errorf("the backend got %d requests", len(got))
				}
				return
			}
			if len(got) != 1 {
				t.Fatalf("the backend got %d requests", len(got))
			}
			r := got[0]
			if r.path+"?"+r.query != tt.path+"?signature=s&timestamp=1&nonce=2" || !strings.Contains(r.body, authorizerID) {
				t.Errorf("%s %s", r.path, r.body)
			}
			if a, p := r.header.Get("X-Wechat-Appid"), r.header.Get("X-Wechat-Platform"); a != authorizerID || p != platformID {
				t.Errorf("of %s, %s", a, p)
			}
			if proto, of := r.header.Get("X-Forwarded-Proto"), r.header.Get("X-Forwarded-For"); proto != "https" || of != "101.226.103.1" {
				t.Errorf("over %q, from %q", proto, of)
			}
		})
	}
}
