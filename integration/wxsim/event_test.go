package wxsim

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// events is a fake gateway behind the platform's event URL.
func events(t *testing.T, s *Server, reply func(string) string) *fakeGateway {
	t.Helper()
	g := newFakeGateway(t, testPlatform, ModeSafe, reply)
	s.SetURLs(testPlatform, g.URL+"/event", "")
	return g
}

func success(string) string { return answerSuccess }

func TestEventsAreWhatTheyShouldBe(t *testing.T) {
	t.Parallel()
	for seed := range uint64(6) {
		s := newSim(t, func(c *Config) { c.Seed, c.Faults = seed, Faults{RepeatedTickets: -1, StaleTickets: -1} })
		g := events(t, s, success)
		if r, err := s.PushTicket(t.Context(), testPlatform); err != nil || !r.OK() {
			t.Fatalf("%v %+v", err, r)
		}
		a, err := s.Authorize(t.Context(), testPlatform, testShop)
		if err != nil || !a.Push.OK() {
			t.Fatalf("%v %+v", err, a)
		}
		if _, err := s.Unauthorize(t.Context(), testPlatform, testShop); err != nil {
			t.Fatal(err)
		}
		if _, err := s.FastRegister(t.Context(), testPlatform, "wx5555555555555555"); err != nil {
			t.Fatal(err)
		}
		if _, err := s.PushEvent(t.Context(), testPlatform, testShop, "notify_new", Field{Name: "x", Value: "1"}); err != nil {
			t.Fatal(err)
		}
		ticket, _ := s.Current(KindTicket, testPlatform, testPlatform)
		for i, want := range []map[string]string{
			{"InfoType": "component_verify_ticket", "AppId": testPlatform, "ComponentVerifyTicket": ticket},
			{"InfoType": "authorized", "AuthorizerAppid": testShop, "AuthorizationCode": a.Code, "PreAuthCode": a.PreAuthCode},
			{"InfoType": "unauthorized", "AuthorizerAppid": testShop},
			{"InfoType": "notify_third_fasteregister", "appid": "wx5555555555555555", "status": "0"},
			{"InfoType": "notify_new", "x": "1"},
		} {
			for name, text := range want {
				if got := value(g.plains[i], name); got != text {
					t.Errorf("seed %d: %s of %s is %q, want %q", seed, name, g.plains[i], got, text)
				}
			}
		}
		created, err1 := strconv.Atoi(value(g.plains[1], "CreateTime"))
		ends, err2 := strconv.Atoi(value(g.plains[1], "AuthorizationCodeExpiredTime"))
		if err1 != nil || err2 != nil || ends-created < 3599 || ends-created > 3601 {
			t.Errorf("created %d, ends %d", created, ends)
		}
		if strings.Contains(g.query[0], "openid=") {
			t.Errorf("query %s has an openid", g.query[0])
		}
	}
}

func TestEventsComeUntilSuccess(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	answers := []string{"raw:<xml/>", "", answerSuccess}
	n := 0
	events(t, s, func(string) string {
		n++ // one push at a time
		return answers[n-1]
	})
	r, err := s.PushTicket(t.Context(), testPlatform)
	if err != nil || !r.OK() || len(r.Attempts) != 3 {
		t.Errorf("%v %+v", err, r)
	}
	if rules(s)[RuleAnswer] != 2 {
		t.Errorf("violations %v, want two wrong answers", rules(s))
	}
}

func TestTicketsStop(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	answer := "raw:no"
	events(t, s, func(string) string { return answer })
	for range ticketFailures {
		if r, err := s.PushTicket(t.Context(), testPlatform); err != nil || r.OK() {
			t.Fatalf("%v %+v", err, r)
		}
	}
	if _, err := s.PushTicket(t.Context(), testPlatform); !errors.Is(err, ErrTicketsStopped) {
		t.Fatalf("%v, want ErrTicketsStopped", err)
	}
	start := func(body map[string]string) result {
		return c.post("/cgi-bin/component/api_start_push_ticket", "", body)
	}
	wantCode(t, start(map[string]string{"component_appid": testPlatform, "component_appsecret": testSecret}), 41004)
	right := map[string]string{"component_appid": testPlatform, "component_secret": testSecret}
	if r := start(right); r.text("errmsg") != "ok" {
		t.Errorf("%s", r.body)
	}
	if r := start(right); r.text("errmsg") != "in a normal state" {
		t.Errorf("%s", r.body)
	}
	answer = answerSuccess
	if r, err := s.PushTicket(t.Context(), testPlatform); err != nil || !r.OK() {
		t.Errorf("%v %+v", err, r)
	}
}

func TestHostileTickets(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.Faults.RepeatedTickets, c.Faults.StaleTickets = 1, 1 })
	g := events(t, s, success)
	front := httptest.NewServer(g)
	t.Cleanup(front.Close)
	s.mu.Lock()
	s.platforms[testPlatform].TestEventURL = front.URL
	s.mu.Unlock()
	if _, err := s.PushTicket(t.Context(), testPlatform); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.platforms[testPlatform].prevAt = time.Now().Add(-10 * time.Minute)
	s.mu.Unlock()
	if _, err := s.PushTicket(t.Context(), testPlatform); err != nil {
		t.Fatal(err)
	}
	var tickets []string
	for _, plain := range g.plains {
		tickets = append(tickets, value(plain, "ComponentVerifyTicket"))
	}
	if len(tickets) != 7 { // 3 of the first: event, test and repeated; as many of the second; the first again
		t.Fatalf("%d pushes, want 7", len(tickets))
	}
	if tickets[0] != tickets[2] || tickets[3] != tickets[5] || tickets[6] != tickets[0] || tickets[0] == tickets[3] {
		t.Error("the tickets did not come in the hostile order")
	}
	if value(g.plains[6], "CreateTime") >= value(g.plains[5], "CreateTime") {
		t.Error("the stale ticket is not older")
	}
}

func TestBentEvents(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	g := events(t, s, success)
	for name, e := range map[string]EventPush{
		"msg_signature": {Tamper: func(o *Outgoing) { o.Set("msg_signature", "x") }},
		"key":           {Keys: &PushKeys{Token: "other", AESKey: testKey}},
	} {
		e.Platform, e.InfoType, e.Attempts = testPlatform, "unauthorized", 1
		if r, err := s.PushEventWith(t.Context(), e); err != nil || r.Last().Status != http.StatusForbidden {
			t.Errorf("%s: %v %+v", name, err, r)
		}
	}
	if r, err := s.PushEventWith(t.Context(), EventPush{Platform: testPlatform, Raw: []byte("<xml/>"), Skew: -time.Hour}); err != nil || !r.OK() || g.plains[0] != "<xml/>" {
		t.Errorf("%v %+v %v", err, r, g.plains)
	}
}

func TestHandshake(t *testing.T) {
	t.Parallel()
	for seed := range uint64(6) {
		s := newSim(t, func(c *Config) { c.Seed = seed })
		reply := ""
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.WriteString(w, r.URL.Query().Get("echostr")+reply)
		}))
		t.Cleanup(srv.Close)
		s.SetURLs(testPlatform, srv.URL, srv.URL+"/$APPID$")
		s.SetMessageURL(testAccount, srv.URL)
		check := func(want bool) {
			t.Helper()
			h1, err1 := s.VerifyEventURL(t.Context(), testPlatform)
			h2, err2 := s.VerifyMessageURL(t.Context(), testPlatform, testShop)
			h3, err3 := s.VerifyMessageURL(t.Context(), "", testAccount)
			if err := errors.Join(err1, err2, err3); err != nil {
				t.Fatal(err)
			}
			for _, h := range []Handshake{h1, h2, h3} {
				if (h.Wrong == "") != want {
					t.Errorf("%+v, want right: %v", h, want)
				}
			}
		}
		check(true)
		reply = "\n"
		check(false)
	}
}

func TestTicketsByThemselves(t *testing.T) {
	t.Parallel()
	got := make(chan string, 16)
	crypt, err := NewCrypt(testToken, testKey, testPlatform)
	if err != nil {
		t.Fatal(err)
	}
	g := &fakeGateway{t: t, crypt: crypt, reply: func(plain string) string {
		select {
		case got <- value(plain, "ComponentVerifyTicket"):
		default:
		}
		return answerSuccess
	}}
	srv := httptest.NewServer(g)
	t.Cleanup(srv.Close)
	s := newSim(t, func(c *Config) {
		c.TicketEvery = time.Hour
		c.Platforms[0].EventURL = srv.URL
	})
	first := <-got
	caller{t, s}.post("/cgi-bin/component/api_start_push_ticket", "", map[string]string{"component_appid": testPlatform, "component_secret": testSecret})
	if second := <-got; first == "" || second == "" || first == second {
		t.Error("no second ticket")
	}
}

func TestTicketLife(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := New(Config{})
		defer s.Close()
		c := s.issue(holder{KindTicket, testPlatform, testPlatform}, ticketLife)
		time.Sleep(ticketLife - time.Second)
		if s.dead(c, time.Now()) != 0 {
			t.Error("dead before 12 h")
		}
		time.Sleep(time.Second)
		if s.dead(c, time.Now()) != codeTokenExpired {
			t.Error("alive after 12 h")
		}
	})
}
