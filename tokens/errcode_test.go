package tokens

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"
)

var update = flag.Bool("update", false, "rewrite docs/errors.md")

// listedCodes are the codes of WeChat's that matter, with what is to be done about them: R renew, T ticket, O tell who
// runs the gateway, B back off, P pass on, - neither.
func listedCodes(t *testing.T) map[int64]string {
	t.Helper()
	list, err := os.ReadFile("testdata/errcodes.md")
	if err != nil {
		t.Fatal(err)
	}
	codes := make(map[int64]string)
	spans := regexp.MustCompile(`(-?\d+)(?:-(\d+))?`)
	for _, row := range regexp.MustCompile(`(?m)^\| ([-0-9, ]+\d) \| ([-RTOBP ]+) \|$`).FindAllStringSubmatch(string(list), -1) {
		for _, span := range spans.FindAllStringSubmatch(row[1], -1) {
			from, _ := strconv.ParseInt(span[1], 10, 64)
			to, err := strconv.ParseInt(span[2], 10, 64)
			if err != nil {
				to = from
			}
			for code := from; code <= to; code++ {
				codes[code] = row[2]
			}
		}
	}
	if len(codes) < 200 {
		t.Fatalf("read %d codes only", len(codes))
	}
	return codes
}

func TestEveryListedCodeIsExplained(t *testing.T) {
	t.Parallel()
	for code, actions := range listedCodes(t) {
		e, ok := Explain(code)
		if !ok || e.Code != code {
			t.Errorf("%d is not explained", code)
			continue
		}
		want := ClassPass
		switch {
		case actions == "-":
			want = e.Class
		case strings.Contains(actions, "R"):
			want = ClassRenew
		case strings.Contains(actions, "T"):
			want = ClassTicket
		case strings.Contains(actions, "B"):
			want = ClassBackoff
		case strings.Contains(actions, "O"):
			want = ClassOperator
		}
		if e.Class != want {
			t.Errorf("%d is of class %s, want %s", code, e.Class, want)
		}
		if reported := strings.Contains(actions, "O") && !strings.ContainsAny(actions, "RT"); actions != "-" && e.Reported() != reported {
			t.Errorf("%d: reported %v, want %v", code, e.Reported(), reported)
		}
		if IsTokenRefused(code) != strings.Contains(actions, "R") {
			t.Errorf("%d: token refused %v", code, IsTokenRefused(code))
		}
	}
	if e, ok := Explain(99999); ok || e.Class != ClassPass || e.Remedy == (Text{}) || e.Reported() {
		t.Errorf("unknown code: %+v, %v", e, ok)
	}
}

func TestErrcodeRows(t *testing.T) {
	t.Parallel()
	ascii := regexp.MustCompile(`^[\x20-\x7e]+$`)
	seen := make(map[int64]bool)
	for _, r := range errcodes {
		if r.from > r.to || r.from == r.to && seen[r.from] {
			t.Errorf("%d-%d is no row, or a second one", r.from, r.to)
		}
		seen[r.from] = true
		for _, text := range []Text{r.meaning, r.remedy} {
			if text.EN == "" || text.ZH == "" || strings.ContainsAny(text.EN+text.ZH, "|\n") {
				t.Errorf("%d: text %+v", r.from, text)
			}
			if ascii.MatchString(text.ZH) {
				t.Errorf("%d: %q is not Chinese", r.from, text.ZH)
			}
		}
		if !ascii.MatchString(r.meaning.EN) {
			t.Errorf("%d: %q is not English", r.from, r.meaning.EN)
		}
	}
}

// What WeChat says of a secret is for who has it: the gateway sends no other one to WeChat than those of its configuration.
func TestRemediesOfTheSecret(t *testing.T) {
	t.Parallel()
	for _, code := range []int64{40001, 40125, 41004} {
		e, _ := Explain(code)
		if !strings.Contains(e.Remedy.EN, remedySecret.EN) || !strings.Contains(e.Remedy.ZH, remedySecret.ZH) {
			t.Errorf("%d: the remedy does not name the secret: %+v", code, e.Remedy)
		}
	}
}

// Questions for quotas that WeChat does not answer can be mended by who asks: 76022 is of a token of another kind of account too.
func TestRemediesOfQuotas(t *testing.T) {
	t.Parallel()
	for code, want := range map[int64]string{76003: "cgi_path", 76021: "cgi_path", 76022: "token of the kind of account"} {
		if e, ok := Explain(code); !ok || !strings.Contains(e.Remedy.EN, want) {
			t.Errorf("%d: %+v", code, e)
		}
	}
}

func TestEgressIP(t *testing.T) {
	t.Parallel()
	for msg, want := range map[string]string{
		"access clientip is not registered hint: [x] requestIP: 203.0.113.7 rid: 64f1e2d3-0a1b2c3d-4e5f6071": "203.0.113.7",
		"access clientip is not registered, requestIP: 203.0.113.7":                                          "203.0.113.7",
		"access clientip is not registered, requestIP: 2001:DB8::7, hint: [x]":                               "2001:db8::7",
		"invalid ip 203.0.113.8 ipv6 ::ffff:203.0.113.8, not in whitelist rid: 64f1e2d3-0a1b2c3d-4e5f6071":   "203.0.113.8",
		"invalid ip ::ffff:203.0.113.9, not in whitelist":                                                    "203.0.113.9",
		`{"errcode":40164,"errmsg":"invalid ip 203.0.113.8."}`:                                               "203.0.113.8",
		"invalid ip, not in whitelist":                                                                       "", "invalid ip 999.1.1.1": "", "requestIP: ": "", "": "", "myrequestIP: 203.0.113.7": "",
	} {
		if got := EgressIP(msg); got != want {
			t.Errorf("%q: got %q, want %q", msg, got, want)
		}
	}
}

func TestExplainedFields(t *testing.T) {
	t.Parallel()
	err := newAPIError("/cgi-bin/stable_token", 40164, "invalid ip 203.0.113.8 ipv6 ::ffff:203.0.113.8, not in whitelist rid: 64f1e2d3-0a1b2c3d-4e5f6071")
	fields := fmt.Sprint(err.Explained()...)
	for _, want := range []string{"/cgi-bin/stable_token", "40164", "64f1e2d3-0a1b2c3d-4e5f6071", "egress_ip", "203.0.113.8", "IP白名单"} {
		if !strings.Contains(fields, want) {
			t.Errorf("%s lacks %s", fields, want)
		}
	}
}

func TestPermissionSetsFor(t *testing.T) {
	t.Parallel()
	for path, want := range map[string][]int{
		"/wxa/commit": {18}, "/WXA/Commit": {18}, "/wxa/commit/x": nil, "/wxa/img_sec_check": nil, "/cgi-bin/menu/create": {15},
		"/cgi-bin/message/mass/send": {7}, "/sns/component/jscode2session": nil, "/cgi-bin/message/custom/send": {1, 19}, "/cgi-bin/menus": nil, "/cgi-bin/menu/": {15},
		"/customservice/kfaccount/add": {6}, "/cgi-bin/user/info/batchget": {2}, "/cgi-bin/x": nil, "/": nil, "": nil,
	} {
		if got := PermissionSetsFor(path); !slices.Equal(got, want) {
			t.Errorf("%q: got %v, want %v", path, got, want)
		}
	}
	for path, ids := range pathPermissions {
		if path != strings.ToLower(path) || len(ids) == 0 {
			t.Errorf("%s: %v", path, ids)
		}
		for _, id := range ids {
			if name, ok := PermissionSet(id); !ok || name.EN == "" || name.ZH == "" {
				t.Errorf("%s: set %d has no name", path, id)
			}
		}
	}
	if got := DescribePermissionSets([]int{7, 9999}); got != "7 (mass messages and notices, 群发与通知) or 9999" {
		t.Error(got)
	}
}

// TestPermissionSetsInUse: a mini program that has granted all it is asked for (WeChat's example of api_get_authorizer_info) lacks none.
func TestPermissionSetsInUse(t *testing.T) {
	t.Parallel()
	granted := []int{17, 18, 19, 25, 30, 31, 36, 37, 40}
	for _, id := range PermissionSetsInUse(true) {
		if !slices.Contains(granted, id) {
			t.Errorf("%d cannot be granted", id)
		}
	}
}

// docs/errors.md is made from the table: go test ./tokens -run TestErrorsPage -update
func TestErrorsPage(t *testing.T) {
	t.Parallel()
	const file = "../docs/errors.md"
	page := errorsPage()
	if *update {
		if err := os.WriteFile(file, []byte(page), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	have, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != page {
		t.Errorf("%s is not what the table says; run: go test ./tokens -run TestErrorsPage -update", file)
	}
}

func errorsPage() string {
	var b strings.Builder
	b.WriteString(`# WeChat's error codes

What the gateway knows of each errcode. Made from ` + "`tokens/errcodes.go`" + `; the log's field ` + "`remedy`" + ` speaks from the same table.

| class | what the gateway does | 网关的处理 |
| --- | --- | --- |
| renew | renews the token, once for all who wait, and repeats the call once | 刷新令牌（并发只刷新一次）并重试一次 |
| ticket | asks WeChat to push a component_verify_ticket | 请求微信推送 component_verify_ticket |
| operator | passes the answer on, and says it in the log: the first time, then at most every ten minutes per account and code | 原样返回，并写日志：首次即写，之后每账号每码至多十分钟一次 |
| backoff | passes the answer on; 45009 is said in the log as well | 原样返回；45009 同样写日志 |
| pass | passes the answer on | 原样返回 |

In the log, ` + "`egress_ip`" + ` is the address that WeChat saw (40090, 40164, 45035, 61004). For 48001, 61007, 61016 and 61017 of an authorised account
` + "`permission_set`" + ` is what the path needs, as far as the gateway knows, and ` + "`granted`" + ` whether the account granted it.

## Codes 错误码

| errcode | class | meaning | remedy | 含义 | 处理 |
| --- | --- | --- | --- | --- | --- |
`)
	rows := slices.Clone(errcodes)
	slices.SortStableFunc(rows, func(a, b errcodeRow) int { return cmp.Or(cmp.Compare(a.from, b.from), cmp.Compare(b.to, a.to)) })
	for _, r := range rows {
		codes := strconv.FormatInt(r.from, 10)
		if r.to != r.from {
			codes += "–" + strconv.FormatInt(r.to, 10)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", codes, r.class, r.meaning.EN, r.remedy.EN, r.meaning.ZH, r.remedy.ZH)
	}
	b.WriteString(`
## Permission sets 权限集

The ids in func_info. Paths are those of which the gateway knows the need.

| id | permission set | 权限集 | paths |
| --- | --- | --- | --- |
`)
	paths := make(map[int][]string)
	for path, ids := range pathPermissions {
		if strings.HasSuffix(path, "/") {
			path += "*"
		}
		for _, id := range ids {
			paths[id] = append(paths[id], "`"+path+"`")
		}
	}
	for id := range 200 {
		if name, ok := PermissionSet(id); ok {
			slices.Sort(paths[id])
			fmt.Fprintf(&b, "| %d | %s | %s | %s |\n", id, name.EN, name.ZH, strings.Join(paths[id], " "))
		}
	}
	return b.String()
}

// TestSaidInBothLanguages: why a renewal is held back is said in both languages, as is what is wrong with an answer or a seal_key.
func TestSaidInBothLanguages(t *testing.T) {
	t.Parallel()
	var forced forcedRefreshes
	var spent troubles
	k := AccountKey("wx2222222222222222")
	errs := map[error]error{
		forced.allow(k.AppID, &record{ForcedAt: time.Now()}):                                             ErrBackoff,
		forced.allow(k.AppID, &record{ForcedAt: time.Now().Add(-2 * forceInterval), Forced: forceDaily}): ErrBackoff,
		decodeAnswer("/cgi-bin/token", []byte("<html>"), nil, nil):                                       ErrUnreachable,
		decodeAnswer("/cgi-bin/token", []byte(`{"errcode":[]}`), nil, nil):                               ErrUnreachable,
		decodeRecord("ticket", []byte{1}, new(ticketWire)):                                               errUnreadable,
	}
	for range refusalBurst {
		if err := spent.spend(k); err != nil {
			t.Fatal(err)
		}
	}
	errs[spent.spend(k)] = ErrBackoff
	for err, kind := range errs {
		own, ok := errors.AsType[*SaidError](err)
		if !ok || !errors.Is(err, kind) || own.Text.EN == "" || !strings.Contains(err.Error(), own.Text.EN) || !strings.ContainsFunc(own.Text.ZH, func(c rune) bool { return unicode.Is(unicode.Han, c) }) {
			t.Errorf("%v: %+v, want one of %v", err, own, kind)
		}
		if _, lacks := LacksSealKey(err); lacks != (kind == errUnreadable) {
			t.Errorf("%v: lacks a seal_key: %t", err, lacks)
		}
	}
}
