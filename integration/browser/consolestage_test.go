package browser_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// stage shows the console's own page, as the gateway serves it, over operations that a scene plays: what a gateway says
// when things are as the scene has them.
type stage struct {
	*httptest.Server

	mu    sync.Mutex
	scene scene
	asked []string // requests for operations
	seq   int      // of the last entry of the feed
}

// scene is how things are.
type scene struct {
	name     string
	status   map[string]any
	accounts func(q, cursor string, limit int) (list []any, next string, index any)
	entries  []map[string]any // of the feed, the same again and again
	refusals []map[string]any
	funcs    map[string]any // nil: the gateway's own
	gone     bool
}

func newStage(t *testing.T, w *world) *stage {
	t.Helper()
	gateway, err := url.Parse("http://" + w.Console)
	if err != nil {
		t.Fatal(err)
	}
	s := &stage{}
	real := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(gateway)
		r.Out.Host = "localhost"
		r.Out.Header.Del("Origin")
	}}
	s.Server = httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		path, operation := strings.CutPrefix(r.URL.Path, "/api/")
		s.mu.Lock()
		now := s.scene
		if operation {
			s.asked = append(s.asked, r.Method+" "+path+"?"+r.URL.RawQuery)
		}
		s.mu.Unlock()
		switch {
		case now.gone:
			panic(http.ErrAbortHandler)
		case !operation, path == "qr", path == "funcs" && now.funcs == nil:
			real.ServeHTTP(rw, r)
		default:
			s.play(rw, r, now, path)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

// set has the scene played from now on.
func (s *stage) set(next scene) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.scene, s.asked = next, nil
}

// requests are those for operations since the scene began.
func (s *stage) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

func (s *stage) play(rw http.ResponseWriter, r *http.Request, now scene, path string) {
	q := r.URL.Query()
	var answer any
	switch name, rest, _ := strings.Cut(path, "/"); {
	case r.Method == http.MethodPost && r.Header.Get("Content-Type") != "application/json":
		s.refuse(rw, http.StatusUnsupportedMediaType, "changes must come as application/json")
		return
	case r.Method == http.MethodPost && name == "refresh":
		answer = map[string]any{"platform": q.Get("platform"), "appid": rest, "kind": "authorizer", "expires": at(2 * time.Hour)}
	case r.Method == http.MethodPost && name == "drain":
		answer = map[string]any{"waiting": 2, "tried": 2, "done": 1, "failed": []any{map[string]any{"platform": "wx1111111111111111", "appid": "wx3333333333333337", "reason": "the attempt is still under way",
			"text": text("the attempt is still under way", "仍在换取中")}}}
	case path == "status":
		status := maps.Clone(now.status)
		status["time"] = at(0)
		answer = status
	case path == "funcs":
		answer = now.funcs
	case path == "authorizers":
		limit, _ := strconv.Atoi(q.Get("limit"))
		list, next, index := now.accounts(q.Get("q"), q.Get("cursor"), limit)
		answer = map[string]any{"authorizers": list, "next": next, "index": index}
	case name == "authorizers":
		answer = detailOf(rest)
		if answer == nil {
			s.refuse(rw, http.StatusNotFound, "no platform knows "+rest)
			return
		}
	case path == "feed":
		answer = s.feed(now, q)
	case path == "refusals":
		list := []any{}
		for _, e := range now.refusals {
			if code := q.Get("code"); code == "" || fmt.Sprint(e["errcode"]) == code {
				list = append(list, e)
			}
		}
		answer = map[string]any{"refusals": list}
	case path == "explain" && q.Get("code") == "61004":
		answer = map[string]any{"errcode": 61004, "known": true, "class": "operator", "meaning": text("the address that the call came from is not on the platform's white list", "调用方的 IP 不在第三方平台的白名单里"),
			"remedy": text("add the gateway's egress address to 白名单IP地址列表 in the platform's settings", "在第三方平台的开发资料里，把网关的出口 IP 加入白名单IP地址列表")}
	case path == "explain":
		answer = map[string]any{"errcode": 12345, "known": false}
	default:
		s.refuse(rw, http.StatusNotFound, "the gateway has no such operation")
		return
	}
	rw.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(rw).Encode(answer)
}

func (s *stage) refuse(rw http.ResponseWriter, status int, why string) {
	rw.Header().Set("Content-Type", "application/json")
	rw.WriteHeader(status)
	_ = json.NewEncoder(rw).Encode(map[string]string{"error": why})
}

// feed has a few new entries each time.
func (s *stage) feed(now scene, q url.Values) any {
	s.mu.Lock()
	defer s.mu.Unlock()
	after, _ := strconv.Atoi(q.Get("after"))
	fresh := 3
	if after == 0 {
		s.seq, fresh = 0, 40
	}
	list := []any{}
	for i := 0; i < fresh && len(now.entries) > 0; i++ {
		s.seq++
		e := maps.Clone(now.entries[s.seq%len(now.entries)])
		e["seq"], e["time"] = s.seq, at(-time.Duration(fresh-i)*700*time.Millisecond)
		if appid := q.Get("appid"); appid == "" || appid == e["appid"] {
			list = append(list, e)
		}
	}
	return map[string]any{"entries": list, "next": s.seq, "missed": 0}
}

// at is a time that long from now.
func at(in time.Duration) string { return time.Now().Add(in).UTC().Format(time.RFC3339) }

func text(en, zh string) map[string]string { return map[string]string{"en": en, "zh": zh} }

func finding(level, code, subject string, what, remedy map[string]string) map[string]any {
	return map[string]any{"level": level, "code": code, "subject": subject, "text": what, "remedy": remedy}
}

func detailOf(appid string) any {
	if strings.HasPrefix(appid, "wx9") {
		return nil
	}
	return map[string]any{
		"platform": "wx1111111111111111", "appid": appid, "name": "老王水果店", "user_name": "gh_0123456789ab", "state": "authorized",
		"type": map[string]any{"mini_program": false}, "principal": "广州市天河区老王水果有限公司",
		"permission_sets": []any{
			map[string]any{"id": 1, "name": text("Messages", "消息管理权限")}, map[string]any{"id": 2, "name": text("Users", "用户管理权限")},
			map[string]any{"id": 4, "name": text("Web services", "网页服务权限")}, map[string]any{"id": 999},
		},
		"token":      map[string]any{"expires": at(80 * time.Minute), "refreshed": at(-40 * time.Minute)},
		"last_push":  map[string]any{"seq": 7, "time": at(-time.Minute), "kind": "push", "appid": appid, "what": "event CLICK", "outcome": "ok", "took_ms": 84},
		"last_call":  map[string]any{"seq": 8, "time": at(-3 * time.Minute), "kind": "call", "appid": appid, "client": "crm", "what": "/cgi-bin/user/info", "outcome": "ok", "status": 200, "took_ms": 120},
		"last_error": refusedCall(appid),
	}
}

func refusedCall(appid string) map[string]any {
	return map[string]any{"seq": 9, "time": at(-26 * time.Hour), "kind": "call", "appid": appid, "platform": "wx1111111111111111", "client": "crm", "what": "/cgi-bin/message/custom/send",
		"outcome": "refused", "status": 200, "took_ms": 1420, "errcode": 61004, "rid": "6746c1d2-3f5e1a2b-7c9d0e1f",
		"meaning": text("the address that the call came from is not on the platform's white list", "调用方的 IP 不在第三方平台的白名单里"),
		"remedy":  text("add the gateway's egress address to 白名单IP地址列表", "把网关的出口 IP 加入白名单IP地址列表")}
}

// healthy is a gateway with everything in it, and nothing wrong.
func healthy() scene {
	return scene{
		name: "healthy",
		status: map[string]any{
			"version": "v0.9.0", "node": "gateway-1", "started": at(-75 * time.Hour), "level": "green", "findings": []any{},
			"platforms": []any{map[string]any{"appid": "wx1111111111111111", "level": "green", "ticket": map[string]any{"received": at(-4 * time.Minute), "age_seconds": 240},
				"token":         map[string]any{"expires": at(70 * time.Minute), "refreshed": at(-50 * time.Minute)},
				"keys":          []any{map[string]any{"what": "aes_key", "index": 0, "last_used": at(-2 * time.Second)}, map[string]any{"what": "aes_key", "index": 1}, map[string]any{"what": "token", "index": 0, "last_used": at(-2 * time.Second)}},
				"release_check": map[string]any{"seen": true, "last": at(-49 * time.Hour)}, "unexchanged": 0, "lost": 0, "last_push": at(-2 * time.Second)}},
			"accounts": []any{map[string]any{"appid": "wx2222222222222222", "mode": "safe", "level": "green", "keys": []any{map[string]any{"what": "aes_key", "index": 0}, map[string]any{"what": "token", "index": 0}}, "token": map[string]any{"expires": at(100 * time.Minute), "refreshed": at(-20 * time.Minute)}, "last_push": at(-90 * time.Second)}},
			"clients":  []any{map[string]any{"name": "crm", "appids": []any{"*"}}, map[string]any{"name": "shop", "appids": []any{"wx2222222222222222"}, "paths": []any{"/cgi-bin/message/*"}}},
			"store":    map[string]any{"module": "wechat.stores.redis", "level": "green", "waiting": 0, "unsaved": 0, "degraded": false},
			"hosts":    []any{map[string]any{"host": "api.weixin.qq.com", "level": "green", "last_ok": at(-time.Second), "egress_ip": "203.0.113.7"}},
			"backends": []any{map[string]any{"address": "legacy.internal:8080", "level": "green", "in_flight": 12, "fails": 0}, map[string]any{"address": "gps.internal:8080", "level": "green", "in_flight": 0, "fails": 0}},
			"pushes":   map[string]any{"in_flight": 12, "last": at(-time.Second)},
		},
		accounts: few(
			account(1, "老王水果店", "authorized"), account(2, "Sunrise Coffee 晨光咖啡", "authorized"), account(3, "城南图书馆", "revoked"), account(4, "", "authorized"),
		),
		entries: []map[string]any{
			{"kind": "push", "appid": "wx3333333333333331", "platform": "wx1111111111111111", "what": "text", "outcome": "ok", "status": 200, "took_ms": 84},
			{"kind": "push", "appid": "wx3333333333333332", "platform": "wx1111111111111111", "what": "event CLICK", "outcome": "ok", "status": 200, "took_ms": 2304},
			{"kind": "call", "appid": "wx3333333333333331", "platform": "wx1111111111111111", "client": "crm", "what": "/cgi-bin/user/info", "outcome": "ok", "status": 200, "took_ms": 120},
			{"kind": "login", "appid": "wx3333333333333332", "platform": "wx1111111111111111", "what": "callback", "outcome": "ok", "took_ms": 204},
			{"kind": "event", "platform": "wx1111111111111111", "what": "component_verify_ticket", "outcome": "ok", "took_ms": 3},
			{"kind": "authorization", "appid": "wx3333333333333334", "platform": "wx1111111111111111", "what": "authorized", "outcome": "ok", "took_ms": 340},
			refusedCall("wx3333333333333333"),
			{"kind": "push", "appid": "wx3333333333333331", "platform": "wx1111111111111111", "what": "voice", "outcome": "failed", "status": 502, "took_ms": 4500, "reason": "no backend could be reached: connection refused"},
			{"kind": "push", "appid": "wx3333333333333331", "platform": "wx1111111111111111", "what": "image", "outcome": "slow", "took_ms": 14500},
			{"kind": "push", "appid": "wx2222222222222222", "what": "text", "outcome": "held", "took_ms": 5100},
			{"kind": "call", "appid": "wx2222222222222222", "client": "shop", "what": "/cgi-bin/message/template/send", "outcome": "canceled", "took_ms": 900},
		},
		refusals: []map[string]any{
			refusedCall("wx3333333333333333"),
			{"seq": 4, "time": at(-2 * time.Minute), "kind": "push", "appid": "wx2222222222222222", "what": "", "outcome": "refused", "status": 403, "reason": "signature fits no configured token: compare the token with WeChat's console, and the path with the account",
				"remedy": text("compare token with 消息校验Token in WeChat's console", "与微信后台的消息校验Token 核对")},
		},
	}
}

func account(n int, name, state string) any {
	return map[string]any{"platform": "wx1111111111111111", "appid": fmt.Sprintf("wx%016x", 0x3333333333333330+n), "name": name, "user_name": fmt.Sprintf("gh_%012x", n), "state": state}
}

// few are accounts that fit on one page, found by what their JSON has.
func few(list ...any) func(string, string, int) ([]any, string, any) {
	return func(q, _ string, _ int) ([]any, string, any) {
		found := []any{}
		for _, a := range list {
			if shown, _ := json.Marshal(a); strings.Contains(string(shown), q) {
				found = append(found, a)
			}
		}
		return found, "", map[string]any{"state": "ready", "seen": len(list)}
	}
}

// empty is a gateway that was just set up.
func empty() scene {
	return scene{
		name: "empty",
		status: map[string]any{"version": "v0.9.0", "node": "gateway-1", "started": at(-2 * time.Minute), "level": "red",
			"findings": []any{finding("red", "no_ticket", "platform wx1111111111111111", text("No ticket has come from WeChat yet.", "微信还没有推送过票据。"),
				text("Give https://wechat.example.com/wx/event as 授权事件接收URL in the platform's settings. WeChat pushes a ticket within ten minutes.", "在第三方平台的开发资料里把授权事件接收URL 填为 https://wechat.example.com/wx/event，微信会在十分钟内推送票据。"))},
			"platforms": []any{map[string]any{"appid": "wx1111111111111111", "level": "red", "token": map[string]any{}, "keys": []any{}, "release_check": map[string]any{"seen": false}, "unexchanged": 0, "lost": 0}},
			"accounts":  []any{}, "clients": []any{}, "hosts": []any{}, "backends": []any{}, "pushes": map[string]any{"in_flight": 0},
			"store": map[string]any{"module": "wechat.stores.caddy", "level": "green", "waiting": 0, "unsaved": 0, "degraded": false}},
		accounts: few(), funcs: map[string]any{"funcs": []any{}, "authorize": []any{}},
	}
}

// ticketless: WeChat pushes no ticket any more.
func ticketless() scene {
	s := healthy()
	s.name = "sick-ticket"
	s.status["level"] = "red"
	s.status["findings"] = []any{
		finding("red", "ticket_expired", "platform wx1111111111111111", text("the newest ticket came 13 hours ago; it lives twelve hours, so no token can be had any more", "最新的 ticket 已是 13 小时前收到，其有效期 12 小时，已无法获取令牌"),
			text("Look whether WeChat reaches the 授权事件接收URL: certificate, firewall, and the access log for POST /wx/event.", "检查微信能否访问授权事件接收URL：证书、防火墙，以及访问日志里有没有 POST /wx/event。")),
		finding("yellow", "rotation_unfinished", "platform wx1111111111111111", text("WeChat's pushes still open with an older aes_key", "微信的推送仍在使用旧的 aes_key"), text("enter the newest aes_key in WeChat's console", "在微信后台填写最新的 aes_key")),
	}
	s.status["platforms"] = []any{map[string]any{"appid": "wx1111111111111111", "level": "red", "ticket": map[string]any{"received": at(-13 * time.Hour), "age_seconds": 46800},
		"token": map[string]any{"error": text("61006 component ticket is expired", "61006 ticket 已过期")}, "keys": []any{}, "release_check": map[string]any{"seen": false}, "unexchanged": 2, "lost": 1}}
	return s
}

// storeless: the store is away, and WeChat does not let the gateway in.
func storeless() scene {
	s := healthy()
	s.name = "sick-store"
	s.status["level"] = "red"
	s.status["findings"] = []any{
		finding("red", "store_down", "store wechat.stores.redis", text("Redis does not answer; 3 records are kept in the spill folder only.", "Redis 没有响应，有 3 条记录只保存在溢出目录。"), text("Start Redis, or mend the network to redis.internal:6379. Nothing is lost: the records follow by themselves.", "启动 Redis 或修复到 redis.internal:6379 的网络。数据没有丢失，恢复后会自动写入。")),
		finding("red", "host_timeout", "host api.weixin.qq.com", text("the last call did not reach it (timeout): the answer takes too long", "最近一次调用未能到达（timeout）：the answer takes too long"), text("look at the firewall", "检查防火墙")),
		finding("red", "address_refused", "platform wx1111111111111111", text("WeChat refuses calls from 203.0.113.7 (61004).", "微信拒绝来自 203.0.113.7 的调用（61004）。"), text("Add 203.0.113.7 to 白名单IP地址列表 of the platform.", "把 203.0.113.7 加入第三方平台的白名单IP地址列表。")),
	}
	s.status["store"] = map[string]any{"module": "wechat.stores.redis", "level": "red", "last_error": at(-9 * time.Second), "error": "dial tcp 10.0.0.5:6379: connection refused", "waiting": 3, "unsaved": 1, "degraded": true}
	s.status["hosts"] = []any{map[string]any{"host": "api.weixin.qq.com", "level": "red", "last_ok": at(-20 * time.Minute), "last_error": at(-2 * time.Second), "error": "timeout: the answer takes too long", "egress_ip": "203.0.113.7"}}
	return s
}

// backendless: backends are down, another system refreshes tokens, and there is a lot else.
func backendless() scene {
	s := healthy()
	s.name = "sick-backends"
	s.status["level"] = "red"
	findings, backends := []any{}, []any{}
	for i := range 6 {
		address := fmt.Sprintf("legacy-%d.internal:8080", i)
		findings = append(findings, finding("yellow", "backend_failing", "backend "+address, text("The backend refuses connections; 120 pushes were answered with success instead.", "后端拒绝连接，已有 120 条推送改为应答 success。"), text("Start it, or take it out of reverse_proxy.", "启动该后端，或从 reverse_proxy 中移除。")))
		backends = append(backends, map[string]any{"address": address, "level": "yellow", "in_flight": 0, "fails": 120 + i})
	}
	s.status["findings"] = append(findings, finding("red", "replies_lost", "account wx3333333333333331", text("messages are lost, for no backend could be reached: connection refused", "消息丢失：无法连接后端：connection refused"), text("start the backend", "启动后端")),
		finding("yellow", "rogue_refresh", "account wx3333333333333331", text("Another system refreshes this account's token.", "另有系统在刷新这个账号的令牌。"), text("Stop it: two that refresh take each other's tokens away.", "请停掉它：两个系统互相刷新会使对方的令牌失效。")))
	s.status["backends"] = backends
	return s
}

// crowdedName is as long a name as an account may have.
var crowdedName = strings.Repeat("广州市天河区老王水果批发零售连锁", 4)

// crowded has 300 accounts of the configuration, the last but few of which is not well, as many findings as one may meet, and long names.
func crowded() scene {
	s := healthy()
	s.name = "crowded"
	accounts, findings, authorizers := []any{}, []any{}, []any{}
	for i := range 300 {
		level := "green"
		if i == 290 {
			level = "red"
		}
		accounts = append(accounts, map[string]any{"appid": fmt.Sprintf("wx%016x", 0x2000+i), "mode": "safe", "level": level, "token": map[string]any{"expires": at(time.Hour), "refreshed": at(-time.Hour)}})
	}
	for i := range 120 {
		findings = append(findings, finding([]string{"red", "yellow"}[i/60], "authorizer_token", fmt.Sprintf("account wx%016x", 0x2000+i),
			text("WeChat refuses the account's refresh token (61023), and its list does not have the account.", "微信拒绝该账号的 refresh_token（61023），授权方列表里也没有它。"), text("have its owner authorise again", "请账号的管理员重新授权")))
	}
	for i := range 50 {
		authorizers = append(authorizers, account(i, crowdedName, []string{"authorized", "revoked"}[i%2]))
	}
	s.status["level"], s.status["accounts"], s.status["findings"], s.accounts = "red", accounts, findings, few(authorizers...)
	return s
}

// million are accounts that nobody could load at once: each page is made when it is asked for.
func million() scene {
	const all = 1_000_000
	s := healthy()
	s.name = "million"
	s.status["platforms"] = append(s.status["platforms"].([]any), map[string]any{"appid": "wx4444444444444444", "level": "green", "ticket": map[string]any{"received": at(-9 * time.Minute)}, "token": map[string]any{"expires": at(time.Hour)}})
	s.accounts = func(q, cursor string, limit int) ([]any, string, any) {
		if q != "" && !strings.HasPrefix(q, "wx") && !strings.HasPrefix(q, "gh_") {
			return []any{account(777_777, q+" 777777", "authorized")}, "", map[string]any{"state": "building", "seen": 640_000}
		}
		begin, _ := strconv.Atoi(cursor)
		list := []any{}
		for i := begin; i < min(begin+limit, all); i++ {
			list = append(list, account(i, fmt.Sprintf("门店 %06d", i), "authorized"))
		}
		return list, strconv.Itoa(begin + limit), map[string]any{"state": "absent", "seen": 0}
	}
	return s
}

// hostile has what people may name their accounts, and worse.
func hostile() scene {
	s := healthy()
	s.name = "hostile"
	const script, image = `<script>window.pwned=1</script>`, `"><img src=x onerror="window.pwned=1">`
	long := strings.Repeat("很长的名称", 60) + strings.Repeat("W", 300)
	s.status["level"] = "red"
	s.status["node"] = script
	s.status["findings"] = []any{finding("red", script, image, text(script+long, script+long), text(image, image)), finding("<b>", "x", "y", text("z", "z"), nil)}
	s.status["hosts"] = []any{map[string]any{"host": image, "level": `red" onclick="window.pwned=1`, "error": script + long}}
	s.status["clients"] = []any{map[string]any{"name": script, "appids": []any{image}}}
	s.accounts = few(account(1, script, "authorized"), account(2, image, script), account(3, "\u202eevil \u2066\u0000 name", "authorized"), account(4, long, "revoked"), account(5, "{{constructor}}", "authorized"))
	e := refusedCall("wx3333333333333331")
	e["what"], e["client"], e["reason"], e["meaning"], e["outcome"], e["rid"] = script, image, script, text(image, image), script, image
	s.entries, s.refusals = []map[string]any{e}, []map[string]any{e}
	s.funcs = map[string]any{
		"funcs":     []any{map[string]any{"key": script, "to": "javascript:window.pwned=1", "scope": image, "links": []any{"javascript:window.pwned=1", "data:text/html," + script}}},
		"authorize": []any{"javascript:window.pwned=1"},
	}
	return s
}
