package wxsim

import (
	"strings"
	"testing"
)

func TestCustomerServiceMessages(t *testing.T) {
	t.Parallel()
	s := newSim(t, nil)
	c := caller{t, s}
	_, access, _ := c.authorized(testShop)
	user := s.NewUser(testShop)
	image, voice, video, thumb := s.NewMedia(testShop, "image"), s.NewMedia(testShop, "voice"), s.NewMedia(testShop, "video"), s.NewMedia(testShop, "thumb")
	send := func(kind, part string) result {
		t.Helper()
		body := `{"touser":"` + user.OpenID + `","msgtype":"` + kind + `"` + part + "}"
		return c.post("/cgi-bin/message/custom/send", "access_token="+access, body)
	}
	long := strings.Repeat("字", maxCustomText/3+1)
	for _, tt := range []struct {
		kind, part, saw string
		code            int64
	}{
		{"text", `,"text":{"content":"<b>&"}`, "<b>&", 0},
		{"text", `,"text":{"content":"` + long[:len(long)-3] + `"}`, long[:len(long)-3], 0},
		{"text", `,"text":{"content":"` + long + `"}`, "", 45002},
		{"text", `,"text":{"content":""}`, "", 44004},
		{"text", `,"text":{"Content":"x"}`, "", 44004},
		{"text", `,"text":{"content":7}`, "", 44004},
		{"text", `,"text":"x"`, "", 44004},
		{"text", ``, "", 44004},
		{"image", `,"image":{"media_id":"` + image + `"}`, "[image " + image + "]", 0},
		{"image", `,"image":{"MediaId":"` + image + `"}`, "", 41006},
		{"image", `,"image":{"media_id":"` + voice + `"}`, "", 40007},
		{"image", `,"voice":{"media_id":"` + voice + `"}`, "", 41006},
		{"voice", `,"voice":{"media_id":"` + voice + `"}`, "[voice " + voice + "]", 0},
		{"voice", `,"voice":{"media_id":"nobody's"}`, "", 40007},
		{"video", `,"video":{"media_id":"` + video + `"}`, "[video " + video + "]", 0},
		{"video", `,"video":{"media_id":"` + video + `","thumb_media_id":"` + thumb + `","title":"t","description":"d"}`, "[video " + video + "]", 0},
		{"video", `,"video":{"media_id":"` + video + `","thumb_media_id":"` + voice + `"}`, "", 40007},
		{"video", `,"video":{"thumb_media_id":"` + thumb + `"}`, "", 41006},
		{"music", `,"music":{"title":"t","musicurl":"http://a/","hqmusicurl":"http://b/","thumb_media_id":"` + thumb + `"}`, "[music]", 0},
		{"music", `,"music":{"musicurl":"http://a/","thumb_media_id":"` + thumb + `"}`, "", 40097},
		{"music", `,"music":{"hqmusicurl":"http://a/","thumb_media_id":"` + thumb + `"}`, "", 40097},
		{"music", `,"music":{"musicurl":"http://a/","hqmusicurl":"http://b/"}`, "", 41006},
		{"music", `,"music":{"musicurl":"http://a/","hqmusicurl":"http://b/","thumb_media_id":"` + video + `"}`, "", 40007},
		{"news", `,"news":{"articles":[{"title":"t","description":"","url":"http://u/","picurl":"http://p/"}]}`, "t", 0},
		{"news", `,"news":{"articles":[{"title":"t"}]}`, "t", 0},
		{"news", `,"news":{"articles":[{"title":"1"},{"title":"2"}]}`, "", 45008},
		{"news", `,"news":{"articles":[]}`, "", 44003},
		{"news", `,"news":{"articles":{"item":{"title":"t"}}}`, "", 44003},
		{"news", `,"news":{"articles":[{"url":"http://u/"}]}`, "", 44003},
		{"news", `,"news":{"articles":[{"title":"t","url":["http://u/"]}]}`, "", 47001},
		{"news", `,"news":[{"title":"t"}]`, "", 44003},
		{"miniprogrampage", `,"miniprogrampage":{"title":"t"}`, "[miniprogrampage]", 0},
		{"wxcard", ``, "", 40097},
		{"transfer_customer_service", `,"transfer_customer_service":{}`, "", 40008},
		{"Text", `,"Text":{"content":"x"}`, "", 40008},
		{"", ``, "", 40008},
	} {
		before := len(s.SentTo(user.OpenID))
		wantCode(t, send(tt.kind, tt.part), tt.code)
		sent := s.SentTo(user.OpenID)[before:]
		switch {
		case tt.code != 0 && len(sent) != 0:
			t.Errorf("%s%s: refused and sent", tt.kind, tt.part)
		case tt.code == 0 && (len(sent) != 1 || sent[0].Type != tt.kind || sent[0].Content != tt.saw):
			t.Errorf("%s%s: sent %+v", tt.kind, tt.part, sent)
		}
	}
	wantNoViolations(t, s)

	foreign := s.NewMedia(testMini, "image")
	wantCode(t, send("image", `,"image":{"media_id":"`+foreign+`"}`), 40007)
	if rules(s)[RuleTokenOwner] != 1 {
		t.Errorf("violations %v, want one of %s", rules(s), RuleTokenOwner)
	}
}
