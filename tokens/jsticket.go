package tokens

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const pathGetTicket = "/cgi-bin/ticket/getticket"

// fetchJSTicket gets the ticket that signs an account's pages or cards, with the account's access token. WeChat gives few
// of them a day. Whether one outlives the access token that it was fetched with is not said anywhere: its own expires_in
// is believed.
func (m *Manager) fetchJSTicket(ctx context.Context, env *Environment, k Key) (grant, error) {
	kind := "jsapi"
	if k.Kind == KindCard {
		kind = "wx_card"
	}
	var answer struct {
		Ticket    wireToken   `json:"ticket"`
		ExpiresIn wireSeconds `json:"expires_in"`
	}
	asked := time.Now()
	err := m.call(ctx, env, k.account(), http.MethodGet, pathGetTicket, url.Values{"type": {kind}}, nil, &answer)
	if err != nil {
		return grant{}, fmt.Errorf("%s ticket: %w", k.Kind, err)
	}
	return grant{access: secret.New(string(answer.Ticket)), asked: asked, life: lifeOf(int64(answer.ExpiresIn))}, nil
}
