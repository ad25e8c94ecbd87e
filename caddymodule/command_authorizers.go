package caddymodule

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
)

const (
	maxAuthorizers   = 200 // of one page
	completedAppIDs  = 20
	unreadableAnswer = "the gateway's answer cannot be read: is it of another version? %w"
)

type authorizersParams struct {
	askParams
	platform string
	limit    int
	all      bool
}

// authorizersCommand is `caddy wechat authorizers`.
func authorizersCommand() *cobra.Command {
	p := &authorizersParams{}
	cmd := &cobra.Command{
		Use: "authorizers [<appid, gh_ id, beginning of an appid, or part of a name>]", Short: "Lists the accounts that authorised a platform, or shows one", Args: cobra.MaximumNArgs(1),
		Long: `Asks a running gateway, through Caddy's admin endpoint, for the accounts that authorised its platforms: all, or those that
fit a text, which is an appid, a gh_ id, the beginning of an appid, or part of a name. An appid that is whole shows all
about the account. The first search by name has the gateway make an index, and answers with what that has so far.

With --json and --all each page is a line. The exit code is 1 if the gateway could not be asked, or knows no such account.`,
		Example: "caddy wechat authorizers --platform wx1111111111111111 --all\ncaddy wechat authorizers wx3333333333333333",
	}
	p.flags(cmd)
	cmd.PersistentFlags().StringVar(&p.platform, "platform", "", "only those of this platform")
	cmd.Flags().IntVar(&p.limit, "limit", defaultAuthorizers, "how many to show, up to "+strconv.Itoa(maxAuthorizers))
	cmd.Flags().BoolVar(&p.all, "all", false, "show all, page by page")
	cmd.ValidArgsFunction = p.completeAppID
	_ = cmd.RegisterFlagCompletionFunc("platform", p.completePlatform)
	cmd.RunE = asking(cmd, func(ctx context.Context, args []string) error {
		if len(args) > 0 && isAppID(args[0]) {
			return p.show(ctx, cmd.OutOrStdout(), args[0])
		}
		return p.list(ctx, cmd.OutOrStdout(), cmd.ErrOrStderr(), args)
	})

	show := &cobra.Command{
		Use: "show <appid>", Short: "Shows one account that authorised a platform", Args: cobra.ExactArgs(1),
		Example: "caddy wechat authorizers show wx3333333333333333",
	}
	p.flags(show)
	show.ValidArgsFunction = p.completeAppID
	show.RunE = asking(show, func(ctx context.Context, args []string) error { return p.show(ctx, show.OutOrStdout(), args[0]) })
	cmd.AddCommand(show)
	return cmd
}

// asking runs what a command asks of the gateway.
func asking(cmd *cobra.Command, run func(ctx context.Context, args []string) error) func(*cobra.Command, []string) error {
	return caddycmd.WrapCommandFuncForCobra(func(fl caddycmd.Flags) (int, error) {
		cmd.SilenceUsage = true
		ctx, cancel := interruptible()
		defer cancel()
		if err := run(ctx, fl.Args()); err != nil {
			return caddy.ExitCodeFailedStartup, err
		}
		return caddy.ExitCodeSuccess, nil
	})
}

// completeAppID completes the appid of an authorizer.
func (p *authorizersParams) completeAppID(_ *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return p.complete("/wechat/authorizers?"+p.query(begun, completedAppIDs, "").Encode(), func(body []byte) (words []string) {
		var page authorizerPage
		_ = json.Unmarshal(body, &page) // an answer of another shape completes nothing
		for _, a := range page.Authorizers {
			words = append(words, cobra.CompletionWithDesc(shown(a.AppID), shown(a.Name)))
		}
		return words
	})
}

// completePlatform completes the appid of a platform.
func (p *askParams) completePlatform(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return p.complete("/wechat/status", func(body []byte) (words []string) {
		var s Status
		_ = json.Unmarshal(body, &s)
		for _, platform := range s.Platforms {
			words = append(words, shown(platform.AppID))
		}
		return words
	})
}

func (p *authorizersParams) query(text string, limit int, cursor string) url.Values {
	q := url.Values{"limit": {strconv.Itoa(limit)}}
	for name, value := range map[string]string{"platform": p.platform, "q": text, "cursor": cursor} {
		if value != "" {
			q.Set(name, value)
		}
	}
	return q
}

// list prints a page, or with all every page.
func (p *authorizersParams) list(ctx context.Context, w, talk io.Writer, args []string) error {
	if p.limit < 1 || p.limit > maxAuthorizers {
		return fmt.Errorf("--limit: want a number from 1 to %d; --all shows all", maxAuthorizers)
	}
	text, limit := "", p.limit
	if len(args) > 0 {
		text = args[0]
	}
	if p.all {
		limit = maxAuthorizers
	}
	cursor, seen := "", 0
	for first := true; ; first = false {
		body, err := p.ask(ctx, http.MethodGet, "/wechat/authorizers?"+p.query(text, limit, cursor).Encode())
		if err != nil {
			return err
		}
		var page authorizerPage
		if err := json.Unmarshal(body, &page); err != nil {
			return fmt.Errorf(unreadableAnswer, err)
		}
		if p.json {
			if err := printJSON(w, body); err != nil {
				return err
			}
		} else {
			page.print(w, first)
		}
		seen += len(page.Authorizers)
		switch {
		case p.all && page.Next == cursor && cursor != "":
			return errors.New("the gateway's list goes in a circle")
		case p.all && page.Next != "":
			cursor = page.Next
			continue
		case page.Index.State == "building":
			_, _ = fmt.Fprintf(talk, "the index of names is being made, %d accounts so far: ask again for more\n", page.Index.Seen)
		case page.Next != "" && !p.json:
			_, _ = fmt.Fprintln(talk, "there are more: --all shows them")
		case seen == 0 && !p.json:
			_, _ = fmt.Fprintln(talk, "none")
		}
		return nil
	}
}

// pageWidths keeps the columns of several pages in line.
var pageWidths = []string{"wx1111111111111111", "wx1111111111111111", "authorized", "gh_0123456789ab"}

func (page *authorizerPage) print(w io.Writer, names bool) {
	t := table{pageWidths}
	if names {
		t = append(t, []string{"PLATFORM", "APPID", "STATE", "GH_ID", "NAME"})
	}
	for _, a := range page.Authorizers {
		t = append(t, []string{shown(a.Platform), shown(a.AppID), shown(a.State), orDash(a.UserName), orDash(a.Name)})
	}
	if len(page.Authorizers) > 0 {
		t.writeAfter(w, 1)
	}
}

// show prints all about one account.
func (p *authorizersParams) show(ctx context.Context, w io.Writer, appid string) error {
	if !isAppID(appid) {
		return notAppID(appid)
	}
	path := "/wechat/authorizers/" + appid
	if p.platform != "" {
		path += "?" + url.Values{"platform": {p.platform}}.Encode()
	}
	body, err := p.ask(ctx, http.MethodGet, path)
	if err != nil {
		return err
	}
	if p.json {
		return printJSON(w, body)
	}
	var a authorizerDetail
	if err := json.Unmarshal(body, &a); err != nil {
		return fmt.Errorf(unreadableAnswer, err)
	}
	a.print(w, time.Now())
	return nil
}

func (a *authorizerDetail) print(w io.Writer, now time.Time) {
	kind := "-" // it is not known
	switch {
	case a.Type != nil && a.Type.MiniProgram:
		kind = "mini program (小程序)"
	case a.Type != nil:
		kind = "official account (公众号)"
	}
	t := table{
		{"appid", shown(a.AppID)}, {"platform", shown(a.Platform)}, {"state", shown(a.State)}, {"name", orDash(a.Name)},
		{"gh_ id", orDash(a.UserName)}, {"type", kind}, {"principal", orDash(a.Principal)},
		{"token ends", ago(a.Token.Expires, now)}, {"refreshed", ago(a.Token.Refreshed, now)},
	}
	if reason := a.Token.Error; reason != nil {
		text := reason.EN
		if inChinese() {
			text = reason.ZH
		}
		t = append(t, []string{"token error", shown(text)})
	}
	for _, e := range []struct {
		name string
		*Entry
	}{{"last push", a.LastPush}, {"last call", a.LastCall}, {"last error", a.LastError}} {
		t = append(t, []string{e.name, e.line(now)})
	}
	for i, set := range a.PermissionSets {
		name := ""
		if i == 0 {
			name = "permissions"
		}
		text := strconv.Itoa(set.ID)
		if set.Name != nil {
			text += " " + shown(set.Name.ZH) + " " + shown(set.Name.EN)
		}
		t = append(t, []string{name, text})
	}
	t.write(w)
}

// line is an entry in one line.
func (e *Entry) line(now time.Time) string {
	if e == nil {
		return "-"
	}
	text := ago(&e.Time, now)
	for _, part := range []string{e.What, e.Outcome, e.Client} {
		if part != "" {
			text += "  " + shown(part)
		}
	}
	if e.ErrCode != 0 {
		text += "  errcode " + strconv.FormatInt(e.ErrCode, 10)
	}
	if e.RID != "" {
		text += "  rid " + shown(e.RID)
	}
	if e.Reason != "" {
		text += "  " + shown(e.Reason)
	}
	return text
}

// refreshCommand is `caddy wechat refresh`.
func refreshCommand() *cobra.Command {
	p := &authorizersParams{}
	cmd := &cobra.Command{
		Use: "refresh <appid>", Short: "Has a running gateway renew the token of an account or a platform now", Args: cobra.ExactArgs(1),
		Long: `Has a running gateway, through Caddy's admin endpoint, renew the access token of an authorizer, an account or a platform now,
whatever is left of the present one. All nodes use the new one. WeChat limits how often a token can be renewed.

The exit code is 1 if the token was not renewed.`,
		Example: "caddy wechat refresh wx3333333333333333",
	}
	p.flags(cmd)
	cmd.Flags().StringVar(&p.platform, "platform", "", "the platform, of an account that authorised several")
	cmd.ValidArgsFunction = p.completeAppID
	_ = cmd.RegisterFlagCompletionFunc("platform", p.completePlatform)
	cmd.RunE = asking(cmd, func(ctx context.Context, args []string) error { return p.refresh(ctx, cmd.OutOrStdout(), args[0]) })
	return cmd
}

func (p *authorizersParams) refresh(ctx context.Context, w io.Writer, appid string) error {
	if !isAppID(appid) {
		return notAppID(appid)
	}
	path := "/wechat/refresh/" + appid
	if p.platform != "" {
		path += "?" + url.Values{"platform": {p.platform}}.Encode()
	}
	body, err := p.ask(ctx, http.MethodPost, path)
	if err != nil {
		return err
	}
	if p.json {
		return printJSON(w, body)
	}
	var done struct {
		Platform string     `json:"platform"`
		AppID    string     `json:"appid"`
		Kind     string     `json:"kind"`
		Expires  *time.Time `json:"expires"`
	}
	if err := json.Unmarshal(body, &done); err != nil {
		return fmt.Errorf(unreadableAnswer, err)
	}
	_, _ = fmt.Fprintf(w, "the %s token of %s was renewed and ends %s\n", shown(done.Kind), shown(done.AppID), ago(done.Expires, time.Now()))
	return nil
}
