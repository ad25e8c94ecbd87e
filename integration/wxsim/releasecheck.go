package wxsim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// testAccounts are WeChat's own accounts of the full-network release check (全网发布接入检测).
var testAccounts = [ReleaseGroups]struct{ official, officialID, mini, miniID string }{
	{"wx570bc396a51b8ff8", "gh_3c884a361561", "wxd101a85aa106f53e", "gh_8dad206e9538"},
	{"wx9252c5e0bb1836fc", "gh_c0f28a78b318", "wxc39235c15087f6f3", "gh_905ae9d01059"},
	{"wx8e1097c5bc82cde9", "gh_3f222ed8d140", "wx7720d01d4b2a4500", "gh_393666f1fdf4"},
	{"wx14550af28c71a144", "gh_26128078e9ab", "wx05d483572dcd5d8b", "gh_39abb5d4e1b7"},
	{"wxa35b9c23cfe664eb", "gh_2b3713f184a6", "wx5910277cae6fd970", "gh_7818dcb60240"},
}

const (
	releaseText    = "TESTCOMPONENT_MSG_TYPE_TEXT"
	releaseReply   = "TESTCOMPONENT_MSG_TYPE_TEXT_callback"
	releaseCode    = "QUERY_AUTH_CODE:"
	apiSuffix      = "_from_api"
	releaseDelayed = "from_callback" // of the event case, which is no longer on the page
)

// ReleaseItem is one line of the check's result.
type ReleaseItem struct {
	Name     string
	Console  string // how WeChat's console lists it; "" for what it does not list by itself
	Optional bool   // no longer part of WeChat's check
	OK       bool
	Detail   string
	Status   int
	Latency  time.Duration
	Reply    string // decrypted
}

// ReleaseReport is the result of the check.
type ReleaseReport struct {
	Group int
	Items []ReleaseItem
}

// Passed reports whether every item that counts is right.
func (r ReleaseReport) Passed() bool {
	for _, item := range r.Items {
		if !item.OK && !item.Optional {
			return false
		}
	}
	return len(r.Items) > 0
}

// String lists the items as WeChat's console does, one per line: the result, the item, how long it took, and what is
// wrong with it.
func (r ReleaseReport) String() string {
	var b strings.Builder
	for _, item := range r.Items {
		mark := "ok  "
		switch {
		case !item.OK && item.Optional:
			mark = "no  "
		case !item.OK:
			mark = "FAIL"
		}
		name := item.Name
		if item.Console != "" {
			name += " (" + item.Console + ")"
		}
		fmt.Fprintf(&b, "%s %s, %s", mark, name, item.Latency.Round(time.Millisecond))
		if item.Detail != "" {
			b.WriteString(": " + item.Detail)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// How WeChat's console lists the items.
const (
	consoleAuthorized = "授权"
	consoleTicket     = "推送component_verify_ticket"
	consoleText       = "返回普通文本消息"
	consoleAPIText    = "返回Api文本消息"
)

// ReleaseGroups is how many groups of test accounts there are.
const ReleaseGroups = 5

// ReleaseCheck runs WeChat's automated acceptance check with test group 1 to 5 (0: a random
// one): the test accounts authorize the platform, then ticket, text, QUERY_AUTH_CODE for the official
// account and for the mini program. The official account's code is the one that was pushed with
// `authorized`, so it may be used up by then; the mini program's is a fresh one. No user may get two messages, also when
// a push came twice. The error says that the check could not be run.
func (s *Server) ReleaseCheck(ctx context.Context, platformAppID string, group int) (ReleaseReport, error) {
	if group == 0 {
		group = 1 + rand.IntN(ReleaseGroups) //nolint:gosec // not a secret
	}
	if group < 0 || group > ReleaseGroups {
		return ReleaseReport{}, fmt.Errorf("no test group %d: want 1 to %d", group, ReleaseGroups)
	}
	t := testAccounts[group-1]
	s.mu.Lock()
	s.addAuthorizer(Authorizer{AppID: t.official, OriginalID: t.officialID})
	s.addAuthorizer(Authorizer{AppID: t.mini, OriginalID: t.miniID, MiniProgram: true})
	s.mu.Unlock()
	r := &releaseRun{s: s, platform: platformAppID, report: ReleaseReport{Group: group}}
	err := r.run(ctx, t.official, t.mini)
	return r.report, err
}

type releaseRun struct {
	s        *Server
	platform string
	report   ReleaseReport
	asked    []string // openids that wait for a message
}

func (r *releaseRun) run(ctx context.Context, official, mini string) error {
	granted, err := r.s.Authorize(ctx, r.platform, official)
	if err != nil {
		return err
	}
	r.add("authorized official account", consoleAuthorized, granted.Push, granted.Push.Wrong)
	grantedMini, err := r.s.Authorize(ctx, r.platform, mini)
	if err != nil {
		return err
	}
	r.add("authorized mini program", consoleAuthorized, grantedMini.Push, grantedMini.Push.Wrong)
	ticket, err := r.s.PushTicket(ctx, r.platform)
	if err != nil {
		return err
	}
	r.add("component_verify_ticket", consoleTicket, ticket, ticket.Wrong)

	text, err := r.s.PushMessage(ctx, Message{Platform: r.platform, AppID: official, Content: releaseText})
	if err != nil {
		return err
	}
	r.add("text reply", consoleText, text, wantText(text, releaseReply))
	event, err := r.s.PushMessage(ctx, Message{Platform: r.platform, AppID: official, Event: "LOCATION", Fields: []Field{
		{Name: "Latitude", Value: "23.137466", Number: true}, {Name: "Longitude", Value: "113.352425", Number: true},
	}})
	if err != nil {
		return err
	}
	r.add("event reply of the older check", "", event, wantText(event, "LOCATION"+releaseDelayed))
	r.report.Items[len(r.report.Items)-1].Optional = true

	if err := r.apiReply(ctx, "api text official account", official, granted.Code); err != nil {
		return err
	}
	fresh, err := r.s.AuthCode(r.platform, mini)
	if err != nil {
		return err
	}
	if err := r.apiReply(ctx, "api text mini program", mini, fresh); err != nil {
		return err
	}
	return r.once(ctx)
}

// once notes whether somebody gets the message more than once.
func (r *releaseRun) once(ctx context.Context) error {
	item := ReleaseItem{Name: "api text: one message each", OK: true}
	began := time.Now()
	waiting, cancel := context.WithTimeout(ctx, r.s.cfg.Pace.ReleaseWatch)
	defer cancel()
	for _, openID := range r.asked {
		_, err := r.s.WaitSent(waiting, openID, func(Sent) bool { return len(r.s.SentTo(openID)) > 1 })
		if err == nil {
			item.OK, item.Detail = false, "a user got it twice"
		}
	}
	item.Latency = time.Since(began)
	r.report.Items = append(r.report.Items, item)
	return ctx.Err()
}

// apiReply is the QUERY_AUTH_CODE case: nothing in the answer, then a customer-service message. It is pushed twice, as
// WeChat does when an answer is lost on its way.
func (r *releaseRun) apiReply(ctx context.Context, name, appID, code string) error {
	message := Message{Platform: r.platform, AppID: appID, Content: releaseCode + code, CreateTime: time.Now()}
	pushed, err := r.s.PushMessage(ctx, message)
	if err != nil {
		return err
	}
	wrong := wantNothing(pushed)
	message.From, message.MsgID = pushed.OpenID, pushed.MsgID
	again, err := r.s.PushMessage(ctx, message)
	if err != nil {
		return err
	}
	if wrong == "" && wantNothing(again) != "" {
		wrong = "pushed again: " + wantNothing(again)
	}
	r.add(name+": answer", consoleAPIText, pushed, wrong)
	r.asked = append(r.asked, pushed.OpenID)

	waiting, cancel := context.WithTimeout(ctx, r.s.cfg.Pace.ReleaseWait)
	defer cancel()
	item := ReleaseItem{Name: name + ": message", Console: consoleAPIText}
	sent, err := r.s.WaitSent(waiting, pushed.OpenID, func(m Sent) bool { return m.Type == "text" })
	item.Latency = time.Since(message.CreateTime)
	if err == nil {
		item.Latency = sent.At.Sub(message.CreateTime)
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		item.Detail = fmt.Sprintf("no customer-service message within %s", r.s.cfg.Pace.ReleaseWait)
	case sent.Content != code+apiSuffix:
		item.Detail = "its content is not the code followed by " + apiSuffix
	case sent.AppID != appID || sent.Platform != r.platform:
		item.Detail = "sent with a token of " + sent.AppID
	default:
		item.OK = true
	}
	r.report.Items = append(r.report.Items, item)
	return nil
}

// add notes a push as an item that is right when wrong is "".
func (r *releaseRun) add(name, console string, p PushResult, wrong string) {
	r.report.Items = append(r.report.Items, ReleaseItem{
		Name: name, Console: console, OK: wrong == "", Detail: wrong, Status: p.Last().Status, Latency: p.Last().Latency, Reply: string(p.Reply),
	})
}

func wantNothing(p PushResult) string {
	if p.Wrong == "" && p.Kind != ReplySuccess {
		return fmt.Sprintf("answered %s, want nothing", p.Kind)
	}
	return p.Wrong
}

func wantText(p PushResult, want string) string {
	switch {
	case p.Wrong != "":
		return p.Wrong
	case p.Kind != "text" || p.UserSaw != want:
		return fmt.Sprintf("the user saw %q, want %q", p.UserSaw, want)
	default:
		return ""
	}
}
