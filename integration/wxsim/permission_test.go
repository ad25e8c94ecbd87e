package wxsim

import "testing"

// A platform may call for an account what the account has granted, whichever token it has. A later authorization grants
// otherwise.
func TestPermissionSets(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	component := c.componentToken()
	const menu, ticket = "/cgi-bin/menu/get", "/cgi-bin/ticket/getticket"
	access := func(sets ...int) string {
		t.Helper()
		a, err := s.Authorize(t.Context(), testPlatform, testShop, sets...)
		if err != nil || !a.Push.OK() {
			t.Fatalf("authorize: %v %+v", err, a)
		}
		token, _ := c.exchange(component, a.Code)["authorizer_access_token"].(string)
		return "access_token=" + token
	}
	messages := access(1)
	wantCode(t, c.get(menu, messages), 61007)
	wantCode(t, c.get(ticket, messages+"&type=jsapi"), 61007)
	wantCode(t, c.post("/cgi-bin/message/custom/send", messages, `{"touser":"x","msgtype":"text"}`), 40003) // looked at
	wantCode(t, c.get("/wxa/revertcoderelease", messages), 61007)
	wantCode(t, c.get("/cgi-bin/getcallbackip", messages), 0)

	menus := access(15, 4)
	wantCode(t, c.get(menu, menus), 46003) // there is none
	wantCode(t, c.get(ticket, menus+"&type=jsapi"), 0)
	wantCode(t, c.get("/cgi-bin/user/get", menus), 61007)
	wantNoViolations(t, s)

	stable := "access_token=" + c.stable(false).text("access_token")
	wantCode(t, c.get(menu, stable), 46003) // an account's own token is good for all
}
