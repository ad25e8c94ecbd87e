package tokens

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
)

// ErrNotSigned: a signature that this gateway did not make, or made for something else.
var ErrNotSigned = errors.New("signature is not one of ours")

// signatureBytes is the length of a signature: the key's id and an HMAC-SHA256.
const signatureBytes = opaqueKeyID + sha256.Size

// signingLabel sets the key of signatures apart from the key of opaque tokens that it is derived from.
const signingLabel = "caddy-wechat signatures"

// Sign returns a signature of data for one purpose, for what the gateway hands out and gets back, such as a cookie.
// The key is derived from that of opaque tokens: all nodes have it, and it survives restarts. A signature stays good
// for a month at least; whatever is to end sooner has its end in data.
//
// The error wraps ErrStore if the store holds no key and none can be made, and is ErrClosed after Close.
func (m *Manager) Sign(ctx context.Context, purpose string, data []byte) ([]byte, error) {
	key, err := m.issuingKey(ctx)
	if err != nil {
		return nil, err
	}
	return key.sign(purpose, data), nil
}

// Verify checks a signature. The error is ErrNotSigned for one that Sign did not make of the same data for the same
// purpose, and wraps ErrStore if that cannot be told because the store fails.
func (m *Manager) Verify(ctx context.Context, purpose string, data, signature []byte) error {
	if len(signature) != signatureBytes {
		return ErrNotSigned
	}
	key, err := m.openingKey(ctx, [opaqueKeyID]byte(signature))
	if errors.Is(err, ErrOpaqueUnknown) {
		return ErrNotSigned
	}
	if err != nil {
		return err
	}
	if !hmac.Equal(signature, key.sign(purpose, data)) {
		return ErrNotSigned
	}
	return nil
}

func (k *opaqueKey) sign(purpose string, data []byte) []byte {
	mac := hmac.New(sha256.New, k.signing)
	var length [8]byte
	binary.BigEndian.PutUint64(length[:], uint64(len(purpose)))
	mac.Write(length[:])
	mac.Write([]byte(purpose))
	mac.Write(data)
	return mac.Sum(append(make([]byte, 0, signatureBytes), k.id[:]...))
}
