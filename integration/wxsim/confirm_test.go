package wxsim

import "testing"

// A web-view domain's file needs the platform's or the account's token, and the account's permission set 18.
func TestConfirmFiles(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	component, mini, _ := c.authorized(testMini)
	a, err := s.Authorize(t.Context(), testPlatform, testShop)
	if err != nil || !a.Push.OK() {
		t.Fatalf("authorize: %v %+v", err, a)
	}
	shop, _ := c.exchange(component, a.Code)["authorizer_access_token"].(string)
	for _, tt := range []struct{ path, token, appID string }{
		{"/cgi-bin/component/get_domain_confirmfile", "component_access_token=" + component, testPlatform},
		{"/wxa/get_webviewdomain_confirmfile", "access_token=" + mini, testMini},
	} {
		name, content := ConfirmFile(tt.appID)
		if r := c.post(tt.path, tt.token, "{}"); r.text("file_name") != name || r.text("file_content") != content || len(name) != 14 || len(content) != 32 {
			t.Errorf("%s: %s", tt.path, r.body)
		}
	}
	wantCode(t, c.post("/wxa/get_webviewdomain_confirmfile", "access_token="+shop, "{}"), 61007)
	wantCode(t, c.post("/wxa/get_webviewdomain_confirmfile", "access_token="+mini, nil), 44002)
	wantNoViolations(t, s)
}
