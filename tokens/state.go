package tokens

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// stateExpiry is the number of bytes before a state's payload: its end in Unix seconds.
const stateExpiry = 8

// stateLabel sets the key of states apart from the key of opaque tokens that it is derived from: strangers can have as
// many states made as they like.
const stateLabel = "caddy-wechat states"

// MaxStatePayload bounds what a state holds, in bytes, so that it has at most MaxOpaqueLength characters.
const MaxStatePayload = MaxOpaqueLength*3/4 - opaqueHeader - opaqueOverhead - stateExpiry

// SealState makes a text that travels with a visitor, in a URL or a cookie, and comes back: characters of [A-Za-z0-9_-]
// that only the gateway, on any of its nodes and also after a restart, can have made, and that say nothing to others.
// It is bound to texts that it does not hold, the first of which says what it is for: who brings it back must bring the
// same. It opens for a month at most; until, which is kept in whole seconds, ends it sooner.
//
// The error wraps ErrStore if the store holds no key and none can be made, and is ErrClosed after Close.
func (m *Manager) SealState(ctx context.Context, payload []byte, until time.Time, bound ...string) (secret.String, error) {
	if len(payload) > MaxStatePayload {
		return secret.String{}, fmt.Errorf("state: %d bytes are too many, the limit is %d", len(payload), MaxStatePayload)
	}
	plain := binary.BigEndian.AppendUint64(make([]byte, 0, stateExpiry+len(payload)), uint64(until.Unix()))
	text, err := m.sealOpaque(ctx, stateVersion, append(plain, payload...), boundTo(bound))
	return secret.New(text), err
}

// OpenState returns what a state holds. The error is ErrOpaqueUnknown for anything that this gateway did not make, that
// was altered or that is bound to other texts, ErrOpaqueExpired past its end, and wraps ErrStore if that cannot be told
// because the store fails.
func (m *Manager) OpenState(ctx context.Context, state secret.String, bound ...string) ([]byte, error) {
	plain, err := m.openOpaque(ctx, stateVersion, state.Reveal(), boundTo(bound))
	if err != nil {
		return nil, err
	}
	if len(plain) < stateExpiry {
		return nil, ErrOpaqueUnknown
	}
	if !time.Now().Before(time.Unix(int64(binary.BigEndian.Uint64(plain)), 0)) {
		return nil, ErrOpaqueExpired
	}
	return plain[stateExpiry:], nil
}

// boundTo writes texts so that no others are written alike.
func boundTo(texts []string) (b []byte) {
	for _, s := range texts {
		b = binary.BigEndian.AppendUint64(b, uint64(len(s)))
		b = append(b, s...)
	}
	return b
}
