package wxsim

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
)

func TestCallsOfApps(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	_, access, _ := c.authorized(testShop)
	token := "access_token=" + access
	user, stranger := s.NewUser(testShop), s.NewUser(testMini)

	if r := c.get("/cgi-bin/user/info", token+"&openid="+user.OpenID); r.text("openid") != user.OpenID || r.text("unionid") != user.UnionID {
		t.Errorf("user/info: %s", r.body)
	}
	if r := c.get("/cgi-bin/user/get", token); !bytes.Contains(r.body, []byte(user.OpenID)) || bytes.Contains(r.body, []byte(stranger.OpenID)) {
		t.Errorf("user/get: %s", r.body)
	}
	wantCode(t, c.post("/cgi-bin/message/custom/send", token, map[string]any{
		"touser": user.OpenID, "msgtype": "text", "text": map[string]string{"content": "你好 <b>&"},
	}), 0)
	sent, err := s.WaitSent(t.Context(), user.OpenID, nil)
	if err != nil || sent.Content != "你好 <b>&" || sent.AppID != testShop || sent.Platform != testPlatform {
		t.Errorf("sent %+v, %v", sent, err)
	}
	wantCode(t, c.post("/cgi-bin/message/template/send", token, map[string]any{"touser": user.OpenID, "template_id": "T"}), 0)
	wantCode(t, c.post("/cgi-bin/message/custom/send", token, map[string]any{"touser": "nobody", "msgtype": "text"}), 40003)

	menu := `{"button":[{"type":"click","name":"今日歌曲 <&>","key":"V1001"}]}`
	wantCode(t, c.get("/cgi-bin/menu/get", token), 46003)
	wantCode(t, c.post("/cgi-bin/menu/create", token, menu), 0)
	if r := c.get("/cgi-bin/menu/get", token); string(r.body) != `{"menu":`+menu+`}` {
		t.Errorf("menu/get: %s", r.body)
	}
	if r := c.post("/cgi-bin/qrcode/create", token, map[string]any{"action_name": "QR_SCENE"}); r.text("ticket") == "" {
		t.Errorf("qrcode/create: %s", r.body)
	}
	r := c.post("/wxa/getwxacodeunlimit", token, map[string]any{"scene": "a=1"})
	if r.header.Get("Content-Type") != "image/jpeg" || !bytes.HasPrefix(r.body, []byte("\xff\xd8\xff")) || len(r.body) < 8<<10 {
		t.Errorf("getwxacodeunlimit: %v, %d bytes", r.header, len(r.body))
	}
	wantCode(t, c.post("/cgi-bin/menu/create", token, "{broken"), 47001)
	wantCode(t, c.post("/cgi-bin/menu/create", token, nil), 44002)
	wantCode(t, c.get("/cgi-bin/menu/create", token), 43002)
	wantCode(t, c.post("/cgi-bin/menu/get", token, "{}"), 43001)
	wantNoViolations(t, s)

	wantCode(t, c.get("/cgi-bin/user/info", token+"&openid="+stranger.OpenID), 40003)
	if rules(s)[RuleTokenOwner] != 1 {
		t.Errorf("violations %v, want one of %s", rules(s), RuleTokenOwner)
	}
}

func TestMedia(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	token := "access_token=" + c.stable(false).text("access_token")
	body, mediaType := c.upload("image/jpeg", []byte("picture\x00\xff"))
	send := func(body io.Reader) result {
		req := c.request(http.MethodPost, "/cgi-bin/media/upload", token+"&type=image", nil)
		req.Header.Set("Content-Type", mediaType)
		req.Body = io.NopCloser(body)
		req.ContentLength = -1 // chunked, unless the length is known
		if b, ok := body.(*bytes.Reader); ok {
			req.ContentLength = b.Size()
		}
		r, err := c.do(req)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	wantCode(t, send(io.MultiReader(bytes.NewReader(body.Bytes()))), 41005)
	if rules(s)[RuleChunked] != 1 {
		t.Errorf("violations %v, want %s", rules(s), RuleChunked)
	}
	wantCode(t, send(bytes.NewReader(body.Bytes()[:body.Len()-20])), 41005)
	id := send(bytes.NewReader(body.Bytes())).text("media_id")
	r := c.get("/cgi-bin/media/get", token+"&media_id="+id)
	if string(r.body) != "picture\x00\xff" || r.header.Get("Content-Type") != "image/jpeg" || r.header.Get("Content-Disposition") != `attachment; filename="a.jpg"` {
		t.Errorf("media/get: %q %v", r.body, r.header)
	}
	wantCode(t, c.get("/cgi-bin/media/get", token+"&media_id=x"), 40007)
	wantCode(t, c.get("/cgi-bin/media/get", token), 41006)
}

// TestUploadForms: what SDKs send, and what WeChat refuses.
func TestUploadForms(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	token := "access_token=" + c.stable(false).text("access_token")
	const picture = "\xff\xd8\xff\xe0 a picture"
	for _, tc := range []struct {
		sdk, header, name string
		code              int64
	}{
		{"Python's requests", `Content-Disposition: form-data; name="media"; filename="图.jpg"`, "图.jpg", 0},
		{"Symfony", "Content-Type: image/jpeg\r\nContent-Transfer-Encoding: 8bit\r\nContent-Disposition: form-data; name=\"media\"; filename=\"a.jpg\"", "a.jpg", 0},
		{"formstream", "content-disposition: form-data; name=\"media\"; filename=\"a b.jpg\"\r\ncontent-type: image/jpeg", "a b.jpg", 0},
		{"both forms of a name", `Content-Disposition: form-data; name=media; filename=a.jpg; filename*=utf-8''%E5%9B%BE.jpg`, "", 0},
		{"requests of old", `Content-Disposition: form-data; name="media"; filename*=utf-8''%E5%9B%BE.jpg`, "", 41005},
		{"no name", `Content-Disposition: form-data; name="media"`, "", 41005},
		{"another field", `Content-Disposition: form-data; name="file"; filename="a.jpg"`, "", 41005},
	} {
		body := "--x\r\n" + tc.header + "\r\n\r\n" + picture + "\r\n--x--\r\n"
		req := c.request(http.MethodPost, "/cgi-bin/media/upload", token+"&type=image", nil)
		req.Header.Set("Content-Type", "multipart/form-data; boundary=x")
		req.Body, req.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
		r, err := c.do(req)
		if err != nil {
			t.Fatal(err)
		}
		if tc.code != 0 {
			wantCode(t, r, tc.code)
			continue
		}
		got := c.get("/cgi-bin/media/get", token+"&media_id="+r.text("media_id"))
		if string(got.body) != picture || got.header.Get("Content-Type") != "image/jpeg" || !strings.Contains(got.header.Get("Content-Disposition"), tc.name) {
			t.Errorf("%s: %s, then %q %v", tc.sdk, r.body, got.body, got.header)
		}
	}
	video := c.request(http.MethodPost, "/cgi-bin/media/upload", token+"&type=video", nil)
	video.Header.Set("Content-Type", "multipart/form-data; boundary=x")
	body := "--x\r\nContent-Disposition: form-data; name=\"media\"; filename=\"a.mp4\"\r\n\r\nmoving\r\n--x--\r\n"
	video.Body, video.ContentLength = io.NopCloser(strings.NewReader(body)), int64(len(body))
	r, err := c.do(video)
	if err != nil {
		t.Fatal(err)
	}
	if got := c.get("/cgi-bin/media/get", token+"&media_id="+r.text("media_id")); got.text("video_url") == "" {
		t.Errorf("a video is %s", got.body)
	}
}

func TestCodeFlow(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	component, access, _ := c.authorized(testMini)
	comp, auth := "access_token="+component, "access_token="+access
	wantCode(t, c.get("/wxa/gettemplatedraftlist", comp), 0)
	wantCode(t, c.post("/wxa/addtotemplate", comp, map[string]any{"draft_id": 0, "template_type": 0}), 0)
	if r := c.get("/wxa/gettemplatelist", comp); !bytes.Contains(r.body, []byte(`"template_id":1`)) {
		t.Errorf("template list: %s", r.body)
	}
	wantCode(t, c.post("/wxa/submit_audit", auth, map[string]any{}), 85086)
	wantCode(t, c.post("/wxa/commit", auth, map[string]any{"template_id": 1, "ext_json": map[string]any{}}), 85013)
	wantCode(t, c.post("/wxa/commit", auth, map[string]any{"template_id": 1, "ext_json": "{}"}), 0)
	wantCode(t, c.post("/wxa/release", auth, map[string]any{}), 85019)
	wantCode(t, c.post("/wxa/submit_audit", auth, map[string]any{}), 0)
	wantCode(t, c.post("/wxa/get_auditstatus", auth, map[string]any{"auditid": 1}), 0)
	wantCode(t, c.post("/wxa/release", auth, nil), 44002)
	wantCode(t, c.post("/wxa/release", auth, map[string]any{}), 0)

	// Back again: not from the first version, and only once.
	wantCode(t, c.get("/wxa/revertcoderelease", auth), 87012)
	wantCode(t, c.post("/wxa/commit", auth, map[string]any{"template_id": 2, "ext_json": "{}"}), 85014)
	wantCode(t, c.post("/wxa/commit", auth, map[string]any{"template_id": 1, "ext_json": "{}", "user_version": "2"}), 0)
	wantCode(t, c.get("/wxa/undocodeaudit", auth), 85019)
	wantCode(t, c.post("/wxa/submit_audit", auth, map[string]any{}), 0)
	wantCode(t, c.get("/wxa/undocodeaudit", auth), 0)
	wantCode(t, c.post("/wxa/submit_audit", auth, map[string]any{}), 0)
	wantCode(t, c.post("/wxa/release", auth, map[string]any{}), 0)
	if r := c.post("/wxa/getversioninfo", auth, map[string]any{}); !bytes.Contains(r.body, []byte(`"release_version":"2"`)) {
		t.Errorf("version online: %s", r.body)
	}
	if r := c.get("/wxa/revertcoderelease", auth+"&action=get_history_version"); !bytes.Contains(r.body, []byte(`"app_version":1`)) {
		t.Errorf("versions: %s", r.body)
	}
	wantCode(t, c.get("/wxa/revertcoderelease", auth), 0)
	wantCode(t, c.get("/wxa/revertcoderelease", auth), 87012)
	if r := c.post("/wxa/getversioninfo", auth, map[string]any{}); bytes.Contains(r.body, []byte(`"release_version":"2"`)) {
		t.Errorf("version online after going back: %s", r.body)
	}
	wantCode(t, c.post("/wxa/deletetemplate", comp, map[string]any{"template_id": 1}), 0)
	wantCode(t, c.post("/wxa/deletetemplate", comp, map[string]any{"template_id": 1}), 85064)
}

func TestQuotas(t *testing.T) {
	t.Parallel()
	s := newSim(t, func(c *Config) { c.Quotas = map[string]int{"/cgi-bin/user/get": 2} })
	c := caller{t, s}
	token := "access_token=" + c.stable(false).text("access_token")
	for _, want := range []int64{0, 0, 45009} {
		wantCode(t, c.get("/cgi-bin/user/get", token), want)
	}
	for path, code := range map[string]int64{"": 76003, "cgi-bin/user/get": 76003, "/sns/userinfo": 76022, "/cgi-bin/menu/get": 0} {
		wantCode(t, c.post("/cgi-bin/openapi/quota/get", token, map[string]string{"cgi_path": path}), code)
	}
	if r := c.post("/cgi-bin/openapi/quota/get", token, map[string]string{"cgi_path": "/cgi-bin/user/get"}); !bytes.Contains(r.body, []byte(`"remain":0`)) {
		t.Errorf("quota: %s", r.body)
	}
	wantCode(t, c.post("/cgi-bin/clear_quota", token, map[string]string{"appid": testShop}), 40013)
	wantCode(t, c.post("/cgi-bin/clear_quota", token, map[string]string{"appid": testAccount}), 0)
	wantCode(t, c.get("/cgi-bin/user/get", token), 0)
	for range clearsPerMonth - 2 {
		c.post("/cgi-bin/clear_quota", token, map[string]string{"appid": testAccount})
	}
	wantCode(t, c.post("/cgi-bin/clear_quota", token, map[string]string{"appid": testAccount}), 48006)
}

func TestJSTicketAndSignature(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	token := "access_token=" + c.stable(false).text("access_token")
	ticket := c.get("/cgi-bin/ticket/getticket", token+"&type=jsapi").text("ticket")
	page := "https://shop.example.com/a?b=1"
	if !s.CheckJSSDK(testAccount, "n", "1", page+"#x", jsSignature(ticket, "n", "1", page)) {
		t.Error("a right signature was refused")
	}
	if s.CheckJSSDK(testShop, "n", "1", page, jsSignature(ticket, "n", "1", page)) {
		t.Error("another account's signature was taken")
	}
	wantCode(t, c.post("/cgi-bin/ticket/getticket", token+"&type=wx_card", nil), 0)
	wantCode(t, c.get("/cgi-bin/ticket/getticket", token+"&type=9"), 40097)
}

func TestComponentCalls(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	component, _, refresh := c.authorized(testMini)
	token := "component_access_token=" + component
	own := map[string]any{"component_appid": testPlatform, "authorizer_appid": testMini}
	r := c.post("/cgi-bin/component/api_get_authorizer_info", token, own)
	if !bytes.Contains(r.body, []byte("MiniProgramInfo")) || !bytes.Contains(r.body, []byte(refresh)) || bytes.Contains(r.body, []byte("access_token")) {
		t.Errorf("authorizer info: %s", r.body)
	}
	if r := c.post("/cgi-bin/component/api_create_preauthcode", token, own); !strings.HasPrefix(r.text("pre_auth_code"), "preauthcode@@@") {
		t.Errorf("pre-auth code: %s", r.body)
	}
	if r := c.post("/cgi-bin/component/get_domain_confirmfile", token, "{}"); !strings.HasSuffix(r.text("file_name"), ".txt") {
		t.Errorf("confirm file: %s", r.body)
	}
	wantCode(t, c.post("/cgi-bin/component/api_create_preauthcode", token, map[string]string{"component_appid": testShop}), 61002)
	if rules(s)[RuleTokenOwner] != 1 {
		t.Errorf("violations %v, want %s", rules(s), RuleTokenOwner)
	}
	list := func(count int) result {
		return c.post("/cgi-bin/component/api_get_authorizer_list", token, map[string]any{"component_appid": testPlatform, "offset": 0, "count": count})
	}
	wantCode(t, list(501), 40170)
	if r := list(1); r.fields["total_count"] != 1.0 {
		t.Errorf("list: %s", r.body)
	}
}

func TestWaitSentEnds(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.WaitSent(ctx, "nobody", nil); err == nil {
		t.Error("a message came from nowhere")
	}
}
