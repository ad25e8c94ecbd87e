package integration_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/integration"
	"github.com/caddy-wechat/caddy-wechat/integration/wxsim"
)

// TestMiniProgramCode brings a mini program's code from the draft to its users and back, twice over one gateway
// process: once with a client's key, once as the SDK of a platform does. The platform's calls and the account's go
// turn by turn, as they do in life, and WeChat must see the right token with each.
func TestMiniProgramCode(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(w *integration.World) {
		polite(w)
		w.Config.Authorizers = []wxsim.Authorizer{{AppID: integration.AuthorizerID, MiniProgram: true}}
		w.Env = append(w.Env, "CRM_APPIDS="+integration.PlatformID+" "+integration.AuthorizerID)
	})
	authorize(t, w)
	t.Run("key", func(t *testing.T) {
		codeFlow(t, w, 1, func(appid string) (prefix, query string, header http.Header) { return "/" + appid, "", bearer(w) })
	})
	t.Run("SDK", func(t *testing.T) {
		component := grantOf(t, w, "component_access_token", "/cgi-bin/component/api_component_token",
			`{"component_appid":"`+integration.PlatformID+`","component_appsecret":"`+w.ClientKey+`","component_verify_ticket":"t"}`)
		authorizer := grantOf(t, w, "authorizer_access_token", "/cgi-bin/component/api_authorizer_token?component_access_token="+component,
			`{"component_appid":"`+integration.PlatformID+`","authorizer_appid":"`+integration.AuthorizerID+`","authorizer_refresh_token":"r"}`)
		tokens := map[string]string{integration.PlatformID: component, integration.AuthorizerID: authorizer}
		codeFlow(t, w, 2, func(appid string) (prefix, query string, header http.Header) {
			return "", "access_token=" + tokens[appid], nil
		})
	})
	checkViolations(t, w)
}

// grantOf asks for an opaque token.
func grantOf(t *testing.T, w *integration.World, name, path, body string) string {
	t.Helper()
	status, answer := call(t, w, http.MethodPost, path, nil, body)
	token, _ := field(t, answer, name).(string)
	if status != http.StatusOK || token == "" {
		t.Fatalf("%s: %d %s", path, status, answer)
	}
	return token
}

// codeFlow goes the whole way. as says how to call for an appid.
func codeFlow(t *testing.T, w *integration.World, round int, as func(appid string) (prefix, query string, header http.Header)) {
	const platform, program = integration.PlatformID, integration.AuthorizerID
	step := func(appid, method, path, query, body, want string) {
		t.Helper()
		prefix, credential, header := as(appid)
		before := w.WeChat.Journal().Count(path)
		status, answer := call(t, w, method, prefix+path+"?"+strings.Trim(credential+"&"+query, "&"), header, body)
		if status != http.StatusOK || !strings.Contains(answer, want) {
			t.Fatalf("%s?%s: %d %s, want %s", path, query, status, answer, want)
		}
		seen := w.WeChat.Journal().Calls(path)[before:]
		kind := wxsim.KindAuthorizer
		if appid == platform {
			kind = wxsim.KindComponent
		}
		for _, e := range seen {
			if e.Kind != kind {
				t.Errorf("%s: WeChat got the token of a %s, want a %s's", path, e.Kind, kind)
			}
		}
		if len(seen) == 0 {
			t.Errorf("%s did not reach WeChat", path)
		}
	}
	const ok = `"errcode":0`
	template := string(rune('0' + round)) // the library still has the one of the round before
	step(platform, "GET", "/wxa/gettemplatedraftlist", "", "", `"draft_id":0`)
	step(platform, "POST", "/wxa/addtotemplate", "", `{"draft_id":0,"template_type":0}`, ok)
	step(platform, "GET", "/wxa/gettemplatelist", "", "", `"template_id":`+template)
	for _, version := range []string{"1.0", "2.0"} {
		// WeChat's refusal of the token in between must not be seen, nor may the code be committed twice.
		if version == "2.0" {
			w.WeChat.FailNext("/wxa/commit", wxsim.Fault{Errcode: 42001})
		}
		step(program, "POST", "/wxa/commit", "", `{"template_id":`+template+`,"ext_json":"{\"extAppid\":\"`+program+`\"}","user_version":"`+version+`","user_desc":"说明 <&>"}`, ok)
		step(platform, "GET", "/wxa/gettemplatelist", "", "", `"template_id":`+template)
		step(program, "POST", "/wxa/getwxacodeunlimit", "", `{"scene":"a=1"}`, "JFIF")
		step(program, "POST", "/wxa/submit_audit", "", `{"item_list":[]}`, `"auditid":1`)
		result, err := w.WeChat.PushMessage(t.Context(), wxsim.Message{Platform: platform, AppID: program, Event: "weapp_audit_success"})
		if err != nil || !result.OK() {
			t.Fatalf("the audit's event: %s %v", result.Wrong, err)
		}
		step(program, "POST", "/wxa/get_auditstatus", "", `{"auditid":1}`, `"status":0`)
		step(program, "POST", "/wxa/release", "", `{}`, ok)
		step(program, "POST", "/wxa/getversioninfo", "", `{}`, `"release_version":"`+version+`"`)
		step(platform, "POST", "/cgi-bin/component/api_create_preauthcode", "", `{"component_appid":"`+platform+`"}`, "pre_auth_code")
	}
	step(program, "GET", "/wxa/revertcoderelease", "action=get_history_version", "", `"user_version":"1.0"`)

	// Going back is not repeated by anyone: each repetition would go back one more.
	before := w.WeChat.Journal().Count("/wxa/revertcoderelease")
	w.WeChat.FailNext("/wxa/revertcoderelease", wxsim.Fault{Act: true, DropConnection: true})
	prefix, credential, header := as(program)
	if status, answer := call(t, w, "GET", prefix+"/wxa/revertcoderelease?"+credential, header, ""); status != http.StatusBadGateway {
		t.Errorf("a lost answer: %d %s", status, answer)
	}
	if n := w.WeChat.Journal().Count("/wxa/revertcoderelease") - before; n != 1 {
		t.Errorf("WeChat was told %d times to go back", n)
	}
	step(program, "POST", "/wxa/getversioninfo", "", `{}`, `"release_version":"1.0"`)
	step(program, "GET", "/wxa/revertcoderelease", "", "", "87012")
	if round == 2 {
		step(platform, "POST", "/wxa/deletetemplate", "", `{"template_id":`+template+`}`, ok)
	}
}
