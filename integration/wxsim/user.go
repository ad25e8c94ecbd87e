package wxsim

import (
	"crypto/rand"
	"encoding/base64"
	"time"
)

// User is a person in WeChat as one account sees them.
type User struct {
	AppID    string
	OpenID   string
	UnionID  string // "" unless given to NewUser's account by SetUser
	NickName string
	Snapshot bool // the virtual user of the snapshot page (快照页)
	// SessionKey is what mini-program login gives; base64 of 16 bytes.
	SessionKey string
}

// NewUser makes a follower of an account, with a new openid and unionid.
func (s *Server) NewUser(appID string) User {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.addUser(User{AppID: appID, UnionID: "o6" + randomText(26), NickName: "用户 & <friends>"})
}

// SetUser adds or changes a user; an empty OpenID is filled in. It returns the user as kept.
func (s *Server) SetUser(u User) User {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.addUser(u)
}

// addUser is SetUser for callers that hold mu.
func (s *Server) addUser(u User) User {
	if u.OpenID == "" {
		u.OpenID = "o" + randomText(27)
	}
	if u.SessionKey == "" {
		raw := make([]byte, 16)
		_, _ = rand.Read(raw) // never fails, by its contract
		u.SessionKey = base64.StdEncoding.EncodeToString(raw)
		s.keep(u.SessionKey)
	}
	s.users[u.OpenID] = u
	return u
}

// visitor is who opens pages of an account when nobody was named. The caller holds mu.
func (s *Server) visitor(appID string) User {
	u, known := s.visitors[appID]
	if !known {
		u = s.addUser(User{AppID: appID, UnionID: "o6" + randomText(26), NickName: "visitor"})
		s.visitors[appID] = u
	}
	return u
}

// LoginCode is what wx.login gives a mini program: a js_code for one jscode2session call.
func (s *Server) LoginCode(u User) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.issue(holder{kind: KindLoginCode, appID: u.AppID}, s.cfg.Lives.UserCode)
	c.user = u
	return c.value
}

// UserCode is a code of web authorization as if the user had just opened a link: for platform
// "" that of a plain account. Scope is snsapi_base or snsapi_userinfo.
func (s *Server) UserCode(u User, platformAppID, scope string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.userCode(u, platformAppID, scope).value
}

func (s *Server) userCode(u User, platformID, scope string) *credential {
	c := s.issue(holder{KindUserCode, platformID, u.AppID}, s.cfg.Lives.UserCode)
	c.user, c.scope = u, scope
	return c
}

// ageOf is how long ago a credential was issued, for messages.
func ageOf(c *credential) time.Duration { return time.Since(c.issued).Round(time.Second) }

const valueAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

// randomText returns n characters that ids are made of.
func randomText(n int) string {
	raw := make([]byte, n)
	_, _ = rand.Read(raw)
	for i, b := range raw {
		raw[i] = valueAlphabet[int(b)%len(valueAlphabet)]
	}
	return string(raw)
}
