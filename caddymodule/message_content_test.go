package caddymodule

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
)

// WeChat does not escape the control characters that a user has typed. What the user wrote reaches the backend as it is.
func TestMessageOfControlCharacters(t *testing.T) {
	t.Parallel()
	const odd = " \x1dc\x02\x10"
	m, _ := newMessage(t, nil)
	s, b, message := platformSender(t), &answering{text: replyXML}, textMessage(odd)
	rec := serve(t, m, s.push("/wx/message/"+authorizerID, message), b)
	if reply, err := s.codec.OpenReply(rec.Body.Bytes()); err != nil || string(reply) != replyXML || b.body != message {
		t.Errorf("%d %q, backend got %q", rec.Code, rec.Body, b.body)
	}

	// In 兼容模式 it stands in the envelope too.
	_, ctx := newTestApp(t, fmt.Sprintf(`{"accounts": [{"appid": %q, "secret": "s", "tokens": [%q], "aes_keys": [%q], "mode": "compat"}]}`, accountID, accountToken, accountKey))
	compat := new(Message)
	if err := compat.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	s, b = accountSender(t), &answering{text: replyXML}
	r := s.push("/"+accountID, message)
	envelope, _ := io.ReadAll(r.Body)
	_, encrypt, _ := strings.Cut(string(envelope), "</ToUserName>")
	outer := strings.TrimSuffix(message, "</xml>") + encrypt
	r.Body, r.ContentLength = io.NopCloser(strings.NewReader(outer)), int64(len(outer))
	rec = serve(t, compat, r, b)
	if reply, err := s.codec.OpenReply(rec.Body.Bytes()); rec.Code != http.StatusOK || err != nil || string(reply) != replyXML || b.body != message {
		t.Errorf("compatible mode: %d %q, backend got %q", rec.Code, rec.Body, b.body)
	}
}
