package tokens

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const pathComponentToken = "/cgi-bin/component/api_component_token"

// fetchComponent exchanges the ticket for a component token.
func (m *Manager) fetchComponent(ctx context.Context, env *Environment, platform string) (grant, error) {
	p, ok := env.platform(platform)
	if !ok {
		return grant{}, fmt.Errorf("platform %s: %w", platform, ErrNotConfigured)
	}
	t, err := m.ticket(ctx, env, platform)
	if err != nil {
		if errors.Is(err, ErrNoTicket) {
			m.wantTicket(platform)
		}
		return grant{}, err
	}
	body := struct {
		AppID  string `json:"component_appid"`
		Secret string `json:"component_appsecret"`
		Ticket string `json:"component_verify_ticket"`
	}{p.AppID, p.Secret.Reveal(), t.Value.Reveal()}
	var answer struct {
		Token     wireToken   `json:"component_access_token"`
		ExpiresIn wireSeconds `json:"expires_in"`
	}
	asked := time.Now()
	err = env.API.Post(ctx, pathComponentToken, nil, body, &answer)
	if hasCode(err, codeTicketExpired, codeTicketInvalid) {
		m.tickets.refuse(platform, t.Ticket, err)
		m.wantTicket(platform)
		err = noTicket(platform, err)
	}
	if err != nil {
		return grant{}, err
	}
	return grant{access: secret.New(string(answer.Token)), asked: asked, life: lifeOf(int64(answer.ExpiresIn))}, nil
}
