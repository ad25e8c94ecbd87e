package wxsim

import (
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// WeChat's pages on which an account authorizes a platform: for a computer, and for the WeChat client.
const (
	desktopLinkPath = "/cgi-bin/componentloginpage"
	mobileLinkPath  = "/wxaopen/safe/bindcomponent"
)

// linkTypes are the values of auth_type that are documented. wechatpy and EasyWeChat send none: then accounts of both sorts are meant.
var linkTypes = []string{"1", "2", "3", "4", "5", "6", "8"}

// FollowAuthorizationLink opens an authorization link as a browser on a computer, or as the WeChat client, does that left
// a page with this Referer; the owner of appID ("": the account that the link names, or else the first of
// Config.Authorizers) agrees. It returns the address that WeChat redirects to, with a code of its own beside the one in
// the push that follows. A link that WeChat would not follow is a *PageError.
func (s *Server) FollowAuthorizationLink(link, referer, appID string) (callback string, err error) {
	address, fragment, _ := strings.Cut(link, "#")
	parsed, err := url.Parse(address)
	if err != nil {
		return "", &PageError{0, "the link cannot be parsed"}
	}
	origin := parsed.Scheme + "://" + parsed.Host
	ours := origin == s.URL() || origin == s.TLSURL()
	switch parsed.Path {
	case desktopLinkPath:
		if origin != "https://mp.weixin.qq.com" && !ours {
			return "", &PageError{0, "not a link to https://mp.weixin.qq.com" + desktopLinkPath}
		}
	case mobileLinkPath:
		if origin != "https://open.weixin.qq.com" && !ours || fragment != wechatFragment {
			return "", &PageError{0, "not a link to https://open.weixin.qq.com" + mobileLinkPath + " that ends in #" + wechatFragment}
		}
	default:
		return "", &PageError{0, "no such page"}
	}
	callback, pageErr := s.bind(parsed.Path, parsed.RawQuery, referer, appID)
	if pageErr != nil {
		return "", pageErr
	}
	return callback, nil
}

// bindPage is FollowAuthorizationLink for a browser.
func (c *call) bindPage() answer {
	if c.r.Method != http.MethodGet {
		return answer{status: http.StatusMethodNotAllowed, contentType: "text/plain"}
	}
	s, path, query, referer := c.s, c.r.URL.Path, c.r.URL.RawQuery, c.r.Referer()
	agree := func() (string, *PageError) { return s.bind(path, query, referer, "") }
	if !s.cfg.Ask {
		return c.sendOn(agree())
	}
	return c.ask(func() *PageError {
		link, err := url.ParseQuery(query)
		if err != nil {
			return &PageError{0, "the query cannot be parsed"}
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		_, _, pageErr := s.checkBindLink(path, link, referer)
		return pageErr
	}, choice{"授权", agree}) // who does not want to closes the page: WeChat sends nobody back
}

// bind checks a link, has the account authorize and returns where to redirect.
func (s *Server) bind(path, rawQuery, referer, appID string) (string, *PageError) {
	link, err := url.ParseQuery(rawQuery)
	if err != nil {
		return "", &PageError{0, "the query cannot be parsed"}
	}
	s.mu.Lock()
	preAuth, sets, pageErr := s.checkBindLink(path, link, referer)
	if pageErr == nil {
		appID, pageErr = s.binder(link, appID)
	}
	if pageErr == nil {
		preAuth.used = true
	}
	s.mu.Unlock()
	if pageErr != nil {
		return "", pageErr
	}
	code, _, err := s.newGrant(preAuth.platform, appID, sets)
	if err != nil {
		return "", &PageError{0, err.Error()}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.platforms[preAuth.platform].EventURL != "" && !s.closed {
		s.wg.Go(func() { _, _ = s.pushGrant(s.ctx, preAuth.platform, appID, "authorized", code, preAuth) })
	}
	redirected := s.newAuthCode(preAuth.platform, appID)
	return withParameters(link.Get("redirect_uri"), []string{
		"auth_code=" + url.QueryEscape(redirected.value), "expires_in=" + strconv.Itoa(int(s.cfg.Lives.AuthCode/time.Second)),
	}), nil
}

// checkBindLink applies the rules of WeChat's pages, and returns the link's code and permission sets. The caller holds mu.
func (s *Server) checkBindLink(path string, link url.Values, referer string) (preAuth *credential, sets []int, err *PageError) {
	allowed := []string{"component_appid", "pre_auth_code", "redirect_uri", "auth_type", "biz_appid", "category_id_list"}
	if path == mobileLinkPath {
		allowed = append(allowed, "action", "no_scan")
		if link.Get("action") != "bindcomponent" || link.Get("no_scan") != "1" {
			return nil, nil, &PageError{0, "action=bindcomponent or no_scan=1 is missing"}
		}
	}
	for name, values := range link {
		if !slices.Contains(allowed, name) || len(values) != 1 || values[0] == "" {
			return nil, nil, &PageError{0, fmt.Sprintf("parameter %q", name)}
		}
	}
	p := s.platforms[link.Get("component_appid")]
	if p == nil {
		return nil, nil, &PageError{0, "no such component_appid"}
	}
	redirect, failed := url.Parse(link.Get("redirect_uri"))
	if failed != nil || redirect.Scheme != "https" {
		return nil, nil, &PageError{0, "redirect_uri is not an https URL"}
	}
	from, failed := url.Parse(referer)
	if failed != nil || p.AuthorizeHost == "" || from.Host != p.AuthorizeHost || redirect.Host != p.AuthorizeHost {
		return nil, nil, &PageError{0, "请确认授权入口页所在域名，与授权后回调页的域名相同，并且，此两者都必须与申请第三方平台时填写的授权发起页域名相同"}
	}
	if link.Has("auth_type") && !slices.Contains(linkTypes, link.Get("auth_type")) {
		return nil, nil, &PageError{0, "auth_type is none that is documented"}
	}
	if list := link.Get("category_id_list"); list != "" {
		for one := range strings.SplitSeq(list, "|") {
			id, failed := strconv.Atoi(one)
			if failed != nil {
				return nil, nil, &PageError{0, "category_id_list is not a list of ids"}
			}
			sets = append(sets, id)
		}
	}
	preAuth = s.creds[link.Get("pre_auth_code")]
	if preAuth == nil || preAuth.kind != KindPreAuthCode || preAuth.platform != p.AppID || preAuth.used || s.dead(preAuth, time.Now()) != 0 {
		return nil, nil, &PageError{0, "pre_auth_code is unknown, used or expired"}
	}
	return preAuth, sets, nil
}

// binder is the account whose owner agrees. The caller holds mu.
func (s *Server) binder(link url.Values, appID string) (string, *PageError) {
	only := link.Get("biz_appid")
	switch {
	case appID == "" && only != "":
		appID = only
	case appID == "" && len(s.cfg.Authorizers) > 0:
		appID = s.cfg.Authorizers[0].AppID
	}
	acc := s.accounts[appID]
	switch {
	case acc == nil:
		return "", &PageError{0, "no such account"}
	case only != "" && only != appID:
		return "", &PageError{0, "another account is wanted"}
	case only == "" && (link.Get("auth_type") == "1" && acc.MiniProgram || link.Get("auth_type") == "2" && !acc.MiniProgram):
		return "", &PageError{0, "the account is of another sort"}
	}
	return appID, nil
}
