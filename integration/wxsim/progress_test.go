package wxsim

import (
	"net/http"
	"slices"
	"strings"
	"testing"
)

// watch records the steps from now on; the returned function waits for n of them.
func watch(t *testing.T, s *Server) (steps func(n int) []Progress) {
	t.Helper()
	told := make(chan Progress, 100)
	s.Watch(func(p Progress) { told <- p })
	return func(n int) []Progress {
		t.Helper()
		var list []Progress
		for range n {
			select {
			case p := <-told:
				list = append(list, p)
			case <-t.Context().Done():
				t.Fatalf("told of %v, want %d steps", list, n)
			}
		}
		return list
	}
}

// TestWatchTellsEveryStep: the exchange of an authorization code, from its push to the answer.
func TestWatchTellsEveryStep(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	component := c.componentToken()
	steps := watch(t, s)
	a, err := s.Authorize(t.Context(), testPlatform, testShop)
	if err != nil || !a.Push.OK() {
		t.Fatalf("authorize: %v %+v", err, a)
	}
	pushed := steps(2)
	slices.SortFunc(pushed, func(a, b Progress) int { return strings.Compare(string(a.Step), string(b.Step)) })
	if want := []Progress{{Step: StepPushed, AppID: testShop}, {Step: StepReplied, AppID: testShop}}; !slices.Equal(pushed, want) {
		t.Errorf("push: %v, want %v", pushed, want)
	}
	c.exchange(component, a.Code)
	const path = "/cgi-bin/component/api_query_auth"
	want := []Progress{{StepArrived, path, testShop, 0}, {StepActed, path, testShop, 0}, {StepAnswered, path, testShop, 0}}
	if got := steps(3); !slices.Equal(got, want) {
		t.Errorf("call: %v, want %v", got, want)
	}
	wantCode(t, c.post(path, "component_access_token="+component,
		map[string]string{"component_appid": testPlatform, "authorization_code": a.Code}), 61009)
	want[1].Errcode, want[2].Errcode = 61009, 61009
	if got := steps(3); !slices.Equal(got, want) {
		t.Errorf("call with a used code: %v, want %v", got, want)
	}
}

// TestWatcherMayLoseTheCall: a fault prepared when a call arrives strikes that call, so that WeChat never carries it out.
func TestWatcherMayLoseTheCall(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	component, _, refresh := c.authorized(testShop)
	s.ExpireAll(KindAuthorizer, testShop)
	const path = "/cgi-bin/component/api_authorizer_token"
	s.Watch(func(p Progress) {
		if p.Path != path || p.AppID != testShop || p.Step != StepArrived {
			t.Errorf("told of %v", p)
		}
		s.FailNext(path, Fault{DropConnection: true})
	})
	before := s.Journal().Refreshes(KindAuthorizer, testShop)
	body := map[string]string{"component_appid": testPlatform, "authorizer_appid": testShop, "authorizer_refresh_token": refresh}
	if r, err := c.do(c.request(http.MethodPost, path, "component_access_token="+component, body)); err == nil {
		t.Errorf("answered %s", r.body)
	}
	if got := s.Journal().Refreshes(KindAuthorizer, testShop); got != before {
		t.Errorf("%d refreshes", got-before)
	}
	s.Watch(nil)
	if r := c.refresh(component, testShop, refresh); r.text("authorizer_access_token") == "" {
		t.Errorf("afterwards: %s", r.body)
	}
}

// TestWatcherHoldsNoLock: a call that was carried out shows in everything that the watcher can ask the server, while
// its answer is held up.
func TestWatcherHoldsNoLock(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	component := c.componentToken()
	a, err := s.Authorize(t.Context(), testPlatform, testShop)
	if err != nil {
		t.Fatal(err)
	}
	exchanged := make(chan map[Step]bool, 1)
	seen := map[Step]bool{}
	s.Watch(func(p Progress) {
		_, live := s.Current(KindAuthorizer, testPlatform, testShop)
		seen[p.Step] = live
		if p.Step == StepAnswered {
			exchanged <- seen
		}
	})
	c.exchange(component, a.Code)
	if seen := <-exchanged; seen[StepArrived] || !seen[StepActed] || !seen[StepAnswered] {
		t.Errorf("a live token by each step: %v", seen)
	}
}

// TestWatchTellsOfLostAnswers: a call that is carried out and whose answer is lost has acted and never answered.
func TestWatchTellsOfLostAnswers(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	_, access, _ := c.authorized(testShop)
	steps := watch(t, s)
	s.FailNext("/cgi-bin/user/get", Fault{Act: true, DropConnection: true})
	if r, err := c.do(c.request(http.MethodGet, "/cgi-bin/user/get", "access_token="+access, nil)); err == nil {
		t.Errorf("answered %s", r.body)
	}
	c.get("/cgi-bin/user/get", "access_token="+access)
	var got []Step
	for _, p := range steps(5) {
		got = append(got, p.Step)
	}
	if want := []Step{StepArrived, StepActed, StepArrived, StepActed, StepAnswered}; !slices.Equal(got, want) {
		t.Errorf("steps %v, want %v", got, want)
	}
}
