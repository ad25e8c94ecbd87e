package caddymodule

import (
	"strings"
	"testing"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

func releaseMessage(toUser, msgType, rest string) string {
	return "<xml><ToUserName>" + toUser + "</ToUserName><FromUserName>" + openID + "</FromUserName><CreateTime>1</CreateTime><MsgType>" +
		msgType + "</MsgType>" + rest + "</xml>"
}

func TestReleaseCheckText(t *testing.T) {
	t.Parallel()
	m, app := newMessage(t, nil)
	for original, appid := range releaseCheckAccounts {
		if appid == "" {
			appid = authorizerID
		}
		for _, tt := range []struct{ message, want string }{
			{releaseMessage(original, "text", "<Content>TESTCOMPONENT_MSG_TYPE_TEXT</Content>"), "TESTCOMPONENT_MSG_TYPE_TEXT_callback"},
			{releaseMessage(original, "event", "<Event>LOCATION</Event>"), "LOCATIONfrom_callback"},
		} {
			s := platformSender(t)
			rec := serve(t, m, s.push("/wx/message/"+appid, tt.message), nil)
			reply, err := s.codec.OpenReply(rec.Body.Bytes())
			if err != nil {
				t.Fatalf("%s: %v", original, err)
			}
			var f crypto.Fields
			if err := crypto.ScanFields(reply, &f); err != nil {
				t.Fatal(err)
			}
			if string(f.Content) != tt.want || string(f.ToUserName) != openID || string(f.FromUserName) != original {
				t.Errorf("%s: reply %s", original, reply)
			}
		}
	}
	if got, want := counted(t, app.metrics().replies, outcomeReleaseCheck), float64(2*len(releaseCheckAccounts)); got != want {
		t.Errorf("counted %v, want %v", got, want)
	}
	rec := serve(t, m, platformSender(t).push("/x", releaseMessage("gh_3c884a361561", "text", "<Content>hello</Content>")), nil)
	if rec.Body.String() != "success" {
		t.Errorf("another text: %q", rec.Body)
	}
}

func TestReleaseCheckOnlyForWeChatsAccounts(t *testing.T) {
	t.Parallel()
	text := "<Content>TESTCOMPONENT_MSG_TYPE_TEXT</Content>"
	m, _ := newMessage(t, nil)
	b := &answering{}
	serve(t, m, platformSender(t).push("/"+authorizerID, releaseMessage(ghID, "text", text)), b)
	if !strings.Contains(b.body, "TESTCOMPONENT") {
		t.Error("a customer's message was taken for the check")
	}
	off := false
	m.app.Platforms[0].ReleaseCheck = &off
	b = &answering{}
	serve(t, m, platformSender(t).push("/"+authorizerID, releaseMessage("gh_3c884a361561", "text", text)), b)
	if b.got == nil {
		t.Error("release_check off has no effect")
	}
}
