package caddymodule

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// statusCommand is `caddy wechat status`.
func statusCommand() *cobra.Command {
	p := &statusParams{}
	cmd := &cobra.Command{
		Use: "status [--json] [--lang en|zh] [--address <admin>] [--config <file>]", Short: "Shows how a running gateway is, what is wrong and what to do", Args: cobra.NoArgs,
		Long: `Asks a running gateway, through Caddy's admin endpoint, how it is: what is wrong, the worst first, each with its remedy;
platforms with their tickets and tokens, accounts, the store, WeChat's hosts, and backends.

The exit code is 0 if nothing is red, 2 if something is, and 1 if the gateway could not be asked.`,
		Example: "caddy wechat status\ncaddy wechat status --json --address unix//run/caddy-admin.sock",
	}
	p.flags(cmd)
	cmd.Flags().StringVar(&p.lang, "lang", "", "language of findings, en or zh (default: by LC_ALL, LC_MESSAGES or LANG)")
	_ = cmd.RegisterFlagCompletionFunc("lang", cobra.FixedCompletions([]string{"en", "zh"}, cobra.ShellCompDirectiveNoFileComp))
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(func(caddycmd.Flags) (int, error) {
		ctx, cancel := interruptible()
		defer cancel()
		level, err := p.run(ctx, cmd.OutOrStdout())
		switch {
		case err != nil:
			return caddy.ExitCodeFailedStartup, err
		case level == Red:
			cmd.SilenceErrors, cmd.SilenceUsage = true, true // the code says it
			return exitFailed, nil
		}
		return caddy.ExitCodeSuccess, nil
	})
	return cmd
}

type statusParams struct {
	askParams
	lang string
}

// run prints the status and returns the level of the whole.
func (p *statusParams) run(ctx context.Context, w io.Writer) (Level, error) {
	zh := inChinese()
	switch p.lang {
	case "":
	case "en", "zh":
		zh = p.lang == "zh"
	default:
		return "", fmt.Errorf("--lang: '%s' is none: want en or zh", p.lang)
	}
	body, err := p.ask(ctx, http.MethodGet, "/wechat/status")
	if err != nil {
		return "", err
	}
	var s Status
	if err := json.Unmarshal(body, &s); err != nil {
		return "", fmt.Errorf("the gateway's answer cannot be read: is it of another version? %w", err)
	}
	if p.json {
		return s.Level, printJSON(w, body)
	}
	s.print(w, zh)
	return s.Level, nil
}

// print writes a status for people.
func (s *Status) print(w io.Writer, zh bool) {
	say := func(t tokens.Text) string {
		if zh {
			return shown(t.ZH)
		}
		return shown(t.EN)
	}
	_, _ = fmt.Fprintf(w, "%s  %s  version %s, up %s\n", strings.ToUpper(string(s.Level)), orDash(s.Node), orDash(s.Version), inWords(s.Time.Sub(s.Started)))
	for _, f := range s.Findings {
		_, _ = fmt.Fprintf(w, "\n%-6s  %s  [%s]\n        %s\n        -> %s\n", f.Level, shown(subjectIn(zh, f.Subject)), f.Code, say(f.Text), say(f.Remedy))
	}
	section := func(t table) {
		if len(t) > 1 {
			_, _ = fmt.Fprintln(w)
			t.write(w)
		}
	}
	tokenCell := func(t TokenStatus) string {
		switch {
		case t.Expires != nil:
			return "ends " + ago(t.Expires, s.Time)
		case t.Error != nil:
			return "failing"
		}
		return "-"
	}
	platforms := table{{"PLATFORM", "LEVEL", "TICKET", "TOKEN", "LAST PUSH", "UNEXCHANGED", "LOST", "KEYS USED"}}
	for _, p := range s.Platforms {
		ticket := "none"
		if p.Ticket != nil {
			ticket = ago(&p.Ticket.Received, s.Time)
		}
		platforms = append(platforms, []string{shown(p.AppID), string(p.Level), ticket, tokenCell(p.Token), ago(p.LastPush, s.Time), strconv.Itoa(p.Unexchanged), strconv.Itoa(p.Lost), keysUsed(p.Keys)})
	}
	section(platforms)
	accounts := table{{"ACCOUNT", "LEVEL", "MODE", "TOKEN", "LAST PUSH", "KEYS USED"}}
	for _, a := range s.Accounts {
		accounts = append(accounts, []string{shown(a.AppID), string(a.Level), orDash(a.Mode), tokenCell(a.Token), ago(a.LastPush, s.Time), keysUsed(a.Keys)})
	}
	section(accounts)
	section(table{
		{"STORE", "LEVEL", "WAITING", "UNSAVED", "LAST ERROR", "PUSHES IN FLIGHT"},
		{orDash(s.Store.Module), string(s.Store.Level), strconv.Itoa(s.Store.Waiting), strconv.Itoa(s.Store.Unsaved), ago(s.Store.LastError, s.Time), strconv.Itoa(s.Pushes.InFlight)},
	})
	hosts := table{{"HOST", "LEVEL", "LAST OK", "LAST ERROR", "EGRESS IP"}}
	for _, h := range s.Hosts {
		hosts = append(hosts, []string{shown(h.Host), string(h.Level), ago(h.LastOK, s.Time), ago(h.LastError, s.Time), orDash(h.EgressIP)})
	}
	section(hosts)
	backends := table{{"BACKEND", "LEVEL", "IN FLIGHT", "FAILS"}}
	for _, b := range s.Backends {
		backends = append(backends, []string{shown(b.Address), string(b.Level), strconv.Itoa(b.InFlight), strconv.Itoa(b.Fails)})
	}
	section(backends)
	clients := table{{"CLIENT", "APPIDS", "PATHS"}}
	for _, c := range s.Clients {
		paths := "all that are not dangerous"
		if len(c.Paths) > 0 {
			paths = strings.Join(c.Paths, " ")
		}
		clients = append(clients, []string{shown(c.Name), shown(strings.Join(c.AppIDs, " ")), shown(paths)})
	}
	section(clients)
}

// subjectWords are the kinds of subjects that findings have, in Chinese. The console has them too.
var subjectWords = map[string]string{"platform": "第三方平台", "account": "账号", "store": "存储", "host": "微信服务器", "backend": "后端", "file": "校验文件"}

// subjectIn is what a finding is about, in one of the two languages.
func subjectIn(zh bool, subject string) string {
	switch kind, name, _ := strings.Cut(subject, " "); {
	case !zh:
	case subject == thisMachine:
		return "本机"
	case subjectWords[kind] != "":
		return subjectWords[kind] + " " + name
	}
	return subject
}

// keysUsed names the keys and tokens that opened pushes last, where there are several.
func keysUsed(keys []KeyStatus) string {
	several := map[string]int{}
	latest := map[string]KeyStatus{}
	for _, k := range keys {
		several[k.What]++
		if k.LastUsed != nil && (latest[k.What].LastUsed == nil || k.LastUsed.After(*latest[k.What].LastUsed)) {
			latest[k.What] = k
		}
	}
	var used []string
	for _, what := range []string{"aes_key", "token"} {
		if k := latest[what]; several[what] > 1 && k.LastUsed != nil {
			used = append(used, fmt.Sprintf("%s %d of %d", what, k.Index+1, several[what]))
		}
	}
	return orDash(strings.Join(used, ", "))
}
