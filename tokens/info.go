package tokens

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

const (
	pathAuthorizerInfo = "/cgi-bin/component/api_get_authorizer_info"

	// infoEvery is how soon an account's gh_ id is asked for again when that failed.
	infoEvery = time.Hour
	// infoRetry is how soon it is queued again when it was not asked for, because too much was queued.
	infoRetry = time.Minute
)

// accountInfo is what WeChat says of an authorizer.
type accountInfo struct {
	refresh            secret.String // empty if no code was ever exchanged
	userName, nickName string
	headImg, principal string
	mini               bool
	funcInfo           []int
}

// authorizerInfo asks WeChat for one account. The error has the code 61003 if it has not authorised the platform.
func (m *Manager) authorizerInfo(ctx context.Context, env *Environment, k Key) (accountInfo, error) {
	body := struct {
		Platform string `json:"component_appid"`
		AppID    string `json:"authorizer_appid"`
	}{k.Platform, k.AppID}
	var answer struct {
		Account struct {
			NickName  string          `json:"nick_name"`
			UserName  string          `json:"user_name"`
			HeadImg   string          `json:"head_img"`
			Principal string          `json:"principal_name"`
			Mini      json.RawMessage `json:"MiniProgramInfo"`
		} `json:"authorizer_info"`
		Authorization struct {
			AppID    string    `json:"authorizer_appid"` // the older forms name it otherwise
			AppID2   string    `json:"appid"`
			AppID3   string    `json:"authorization_appid"`
			Refresh  wireToken `json:"authorizer_refresh_token"`
			FuncInfo funcInfo  `json:"func_info"`
		} `json:"authorization_info"`
	}
	if err := m.componentCall(ctx, env, k.Platform, pathAuthorizerInfo, body, &answer); err != nil {
		return accountInfo{}, err
	}
	if a := &answer.Authorization; cmp.Or(a.AppID, a.AppID2, a.AppID3, k.AppID) != k.AppID {
		return accountInfo{}, fmt.Errorf("%s: %w: the answer is about another account", pathAuthorizerInfo, ErrUnreachable)
	}
	return accountInfo{
		refresh:  secret.New(string(answer.Authorization.Refresh)),
		userName: printable(answer.Account.UserName, maxID), nickName: printable(answer.Account.NickName, maxNickName),
		headImg: printable(answer.Account.HeadImg, maxProfileText), principal: printable(answer.Account.Principal, maxNickName),
		mini:     len(answer.Account.Mini) > 0 && string(answer.Account.Mini) != "null",
		funcInfo: answer.Authorization.FuncInfo,
	}, nil
}

// AccountInfo is what an account that authorised a platform shows of itself.
type AccountInfo struct {
	AppID       string
	NickName    string
	Principal   string // the company or person behind it
	UserName    string // the gh_ id
	HeadImg     string // the address of its picture, as WeChat gives it
	MiniProgram bool
	FuncInfo    []int // ids of the permission sets that were granted
}

// FetchAccountInfo asks WeChat for an account that authorised a platform, and keeps what is of use later.
func (m *Manager) FetchAccountInfo(ctx context.Context, platform, appid string) (AccountInfo, error) {
	env, err := m.current()
	if err != nil {
		return AccountInfo{}, err
	}
	k := AuthorizerKey(platform, appid)
	if err := env.knows(k); err != nil {
		return AccountInfo{}, err
	}
	info, err := m.authorizerInfo(ctx, env, k)
	if err != nil {
		return AccountInfo{}, err
	}
	if err := m.keepInfo(ctx, env, k, info); err != nil {
		env.Log.Debug("an account's name cannot be kept; it is fetched again when needed", "platform", platform, "appid", appid, "error", err)
	}
	return AccountInfo{
		AppID: appid, NickName: info.nickName, Principal: info.principal, UserName: info.userName, HeadImg: info.headImg,
		MiniProgram: info.mini, FuncInfo: info.funcInfo,
	}, nil
}

// maxNickName bounds an account's name, in bytes. WeChat's have at most 30 characters.
const maxNickName = 256

// funcInfo are the ids of permission sets. Whatever WeChat writes in their place, the refresh token beside them is good:
// what cannot be read is left out.
type funcInfo []int

// UnmarshalJSON reads them as WeChat lists them, and never fails.
func (f *funcInfo) UnmarshalJSON(data []byte) error {
	var sets []json.RawMessage
	if json.Unmarshal(data, &sets) != nil {
		return nil
	}
	for _, raw := range sets {
		var set struct {
			Category struct {
				ID wireInt `json:"id"`
			} `json:"funcscope_category"`
		}
		if json.Unmarshal(raw, &set) == nil && set.Category.ID > 0 { // 0: there is no id
			*f = append(*f, int(set.Category.ID))
		}
	}
	return nil
}

// UserName returns the gh_ id of an account that authorised a platform, if it is known by now. It never waits: what is
// not known is fetched in the background.
func (m *Manager) UserName(platform, appid string) (string, bool) {
	env, err := m.current()
	if err != nil {
		return "", false
	}
	k := AuthorizerKey(platform, appid)
	e := m.cache.Load().get(k)
	now := instantOf(time.Now())
	switch {
	case e == nil || !e.believed(now):
		if env.knows(k) == nil {
			m.learnSoon(k)
		}
		return "", false
	case e.rec == nil:
		return "", false
	case e.rec.UserName == "" && e.renewable():
		if due := e.infoAt.Load(); now.steady >= due && e.infoAt.CompareAndSwap(due, now.steady+int64(infoRetry)) {
			m.learnSoon(k)
		}
	}
	return e.rec.UserName, e.rec.UserName != ""
}

// learnSoon is learn in the background.
func (m *Manager) learnSoon(k Key) {
	answered := m.seeks.asks(k.Platform)
	if !m.queue.addLight("info "+k.recordName(), func(ctx context.Context) {
		defer answered()
		_, _, _ = m.learn(ctx, k)
	}) {
		answered()
	}
}

// learn asks WeChat about an account, unless the store knows about it, and reports whether it did, and whether WeChat answered. The error says
// that the store did not.
func (m *Manager) learn(ctx context.Context, k Key) (asked, answered bool, err error) {
	env, err := m.current()
	if err != nil {
		return false, false, err
	}
	e, err := m.lookup(ctx, env, k)
	if errors.Is(err, ErrStore) {
		return false, false, err
	}
	if err != nil || !e.renewable() || e.rec.UserName != "" {
		return false, false, nil
	}
	e.infoAt.Store(steady(time.Now().Add(infoEvery)))
	info, err := m.authorizerInfo(ctx, env, k)
	_, refused := errors.AsType[*APIError](err)
	answered = err == nil || refused && !errors.Is(err, errNoComponentToken)
	if err == nil {
		err = m.keepInfo(ctx, env, k, info)
	}
	if err != nil {
		env.Log.Debug("an account's name cannot be fetched; tried again in an hour", "platform", k.Platform, "appid", k.AppID, "error", err)
	}
	return true, answered, nil
}

// keepInfo keeps what was learned of an account with its record, and the way back from its gh_ id.
func (m *Manager) keepInfo(ctx context.Context, env *Environment, k Key, info accountInfo) error {
	if info.userName == "" {
		return fmt.Errorf("%s: %w: the answer has no user_name", pathAuthorizerInfo, ErrUnreachable)
	}
	if err := m.keepUserName(ctx, env, k, info.userName); err != nil {
		return err
	}
	_, err := m.commit(ctx, env, k, false, func(cur *record) *record {
		if cur == nil || cur.revoked() {
			return nil
		}
		next := *cur
		next.learn(info)
		if next.same(cur) {
			return nil
		}
		return &next
	})
	return err
}

// keepUserName keeps the way back from an account's gh_ id. An account's record that names its gh_ id has one: ids that are known are not
// asked for again.
func (m *Manager) keepUserName(ctx context.Context, env *Environment, k Key, userName string) error {
	name := userNameName(userName)
	if err := m.storeRecord(ctx, env, name, userNameWire{Platform: k.Platform, AppID: k.AppID}); err != nil {
		return err
	}
	m.seeks.learned(name)
	return nil
}

// learn takes over what WeChat says of the account, but for its refresh token.
func (r *record) learn(info accountInfo) {
	if info.userName != "" {
		r.UserName, r.NickName = info.userName, info.nickName
	}
	if len(info.funcInfo) > 0 {
		r.FuncInfo = info.funcInfo
	}
}

// userNameWire is which account a gh_ id belongs to.
type userNameWire struct {
	Platform string `json:"platform"`
	AppID    string `json:"appid"`
}

// ByUserName returns which authorizer has a gh_ id, as far as this gateway has learned it. It is ErrNotAuthorized if none
// is known.
func (m *Manager) ByUserName(ctx context.Context, userName string) (platform, appid string, err error) {
	env, err := m.current()
	if err != nil {
		return "", "", err
	}
	var wire userNameWire
	name := userNameName(userName)
	err = m.loadRecord(ctx, env, name, &wire)
	if errors.Is(err, errDamaged) {
		if err = m.setAside(ctx, env, name, new(userNameWire), false); err == nil {
			err = m.loadRecord(ctx, env, name, &wire) // there is none, or it is another one by now
		}
	}
	if errors.Is(err, fs.ErrNotExist) || userName == "" {
		return "", "", fmt.Errorf("%s: %w, or its gh_ id is not known yet", printable(userName, maxID), ErrNotAuthorized)
	}
	return wire.Platform, wire.AppID, err
}
