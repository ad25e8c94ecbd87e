package wxsim

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
)

// Authorization is what happened when an account authorized a platform.
type Authorization struct {
	Platform, AppID string
	Code            string // authorization_code, in the push
	PreAuthCode     string
	Push            PushResult
}

// ErrNotAuthorized means that the account has not authorized the platform.
var ErrNotAuthorized = errors.New("the account has not authorized the platform")

// Authorize has an account authorize a platform with its own permission sets (or the given
// ones) and pushes `authorized` with a code. An appid not known yet becomes an official account.
// Any refresh token from before is dead.
func (s *Server) Authorize(ctx context.Context, platformAppID, appID string, sets ...int) (Authorization, error) {
	return s.grant(ctx, platformAppID, appID, "authorized", sets)
}

// Reauthorize has an account that authorized before do so again: a new refresh token, the old
// one dead at once. The push is `updateauthorized`, or `authorized` if it had ended in between.
func (s *Server) Reauthorize(ctx context.Context, platformAppID, appID string, sets ...int) (Authorization, error) {
	s.mu.Lock()
	known := s.authorizations[pair{platformAppID, appID}]
	infoType := "updateauthorized"
	if !known.live() {
		infoType = "authorized"
	}
	s.mu.Unlock()
	if known == nil {
		return Authorization{}, ErrNotAuthorized
	}
	return s.grant(ctx, platformAppID, appID, infoType, sets)
}

func (s *Server) grant(ctx context.Context, platformID, appID, infoType string, sets []int) (Authorization, error) {
	code, preAuth, err := s.newGrant(platformID, appID, sets)
	if err != nil {
		return Authorization{}, err
	}
	return s.pushGrant(ctx, platformID, appID, infoType, code, preAuth)
}

// pushGrant pushes what an account granted.
func (s *Server) pushGrant(ctx context.Context, platformID, appID, infoType string, code, preAuth *credential) (a Authorization, err error) {
	a = Authorization{Platform: platformID, AppID: appID, Code: code.value, PreAuthCode: preAuth.value}
	a.Push, err = s.PushEvent(ctx, platformID, appID, infoType,
		Field{Name: "AuthorizerAppid", Value: appID}, Field{Name: "AuthorizationCode", Value: a.Code},
		// Documented as seconds, in fact the time at which the code ends.
		Field{Name: "AuthorizationCodeExpiredTime", Value: strconv.FormatInt(code.expires.Add(time.Duration(s.ahead.Load())).Unix(), 10), Number: true},
		Field{Name: "PreAuthCode", Value: a.PreAuthCode})
	return a, err
}

// PriorAuthorization has an account authorize a platform before the story begins: nothing is pushed, and the refresh
// token, which is returned, is known to the platform. It is for tests that write a gateway's records themselves.
func (s *Server) PriorAuthorization(platformAppID, appID string, sets ...int) (refreshToken string, err error) {
	if _, _, err := s.newGrant(platformAppID, appID, sets); err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	auth := s.authorizations[pair{platformAppID, appID}]
	auth.exchanged = true
	return auth.refresh.value, nil
}

// newGrant makes the authorization and a code for it.
func (s *Server) newGrant(platformID, appID string, sets []int) (code, preAuth *credential, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.platforms[platformID] == nil {
		return nil, nil, fmt.Errorf("no platform %s", platformID)
	}
	acc := s.accounts[appID]
	if acc == nil {
		acc = s.addAuthorizer(Authorizer{AppID: appID})
	}
	key := pair{platformID, appID}
	auth := s.authorizations[key]
	if auth == nil {
		auth = &authorization{sets: acc.FuncInfo}
		s.authorizations[key] = auth
	}
	if len(sets) > 0 {
		auth.sets = slices.Clone(sets)
	}
	auth.active, auth.exchanged, auth.at = true, false, time.Now()
	s.newRefresh(auth, holder{platform: platformID, appID: appID}, 0)
	preAuth = s.issue(holder{KindPreAuthCode, platformID, platformID}, s.cfg.Lives.PreAuthCode)
	preAuth.used = true
	return s.newAuthCode(platformID, appID), preAuth, nil
}

// newAuthCode makes a code of a standing authorization. The caller holds mu.
func (s *Server) newAuthCode(platformID, appID string) *credential {
	return s.issue(holder{KindAuthCode, platformID, appID}, s.cfg.Lives.AuthCode)
}

// Unauthorize ends an authorization: all its tokens are dead, calls with them get 61003. It
// pushes `unauthorized`.
func (s *Server) Unauthorize(ctx context.Context, platformAppID, appID string) (PushResult, error) {
	s.mu.Lock()
	auth := s.authorizations[pair{platformAppID, appID}]
	if !auth.live() {
		s.mu.Unlock()
		return PushResult{}, ErrNotAuthorized
	}
	auth.active = false
	auth.refresh.dies = time.Now()
	if token := s.current[holder{KindAuthorizer, platformAppID, appID}]; token != nil {
		token.dies = time.Now() // or a later authorization would bring it back to life
	}
	s.mu.Unlock()
	return s.PushEvent(ctx, platformAppID, appID, "unauthorized", Field{Name: "AuthorizerAppid", Value: appID})
}

// AuthCode makes one more code of a standing authorization, such as the one in the redirect of
// the authorization page beside the one in the push.
func (s *Server) AuthCode(platformAppID, appID string) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.authorizations[pair{platformAppID, appID}].live() {
		return "", ErrNotAuthorized
	}
	return s.newAuthCode(platformAppID, appID).value, nil
}

// FastRegister registers a mini program for a platform (快速注册); its authorization code is in the
// push alone.
func (s *Server) FastRegister(ctx context.Context, platformAppID, appID string) (Authorization, error) {
	s.mu.Lock()
	s.addAuthorizer(Authorizer{AppID: appID, MiniProgram: true})
	s.mu.Unlock()
	code, _, err := s.newGrant(platformAppID, appID, nil)
	if err != nil {
		return Authorization{}, err
	}
	a := Authorization{Platform: platformAppID, AppID: appID, Code: code.value}
	a.Push, err = s.PushEvent(ctx, platformAppID, appID, "notify_third_fasteregister",
		Field{Name: "appid", Value: appID}, Field{Name: "status", Value: "0", Number: true},
		Field{Name: "auth_code", Value: a.Code}, Field{Name: "msg", Value: "OK"},
		Field{Name: "info", Value: "<name><![CDATA[测试]]></name><code><![CDATA[123]]></code><code_type>1</code_type>", Raw: true})
	return a, err
}
