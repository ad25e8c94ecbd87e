package caddymodule

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// TestCommandUnknown: a slip in a script must not look like success, nor leave an empty archive that does.
func TestCommandUnknown(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"wechat", "statu"}, {"wechat", "exprot", "--config", "Caddyfile"}, {"wechat"}} {
		root, cmd := &cobra.Command{Use: "caddy", SilenceUsage: true, SilenceErrors: true}, &cobra.Command{Use: "wechat <command>"}
		wechatCommand().CobraFunc(cmd)
		root.AddCommand(cmd)
		var out strings.Builder
		root.SetOut(&out)
		root.SetErr(&out)
		root.SetArgs(args)
		err := root.Execute()
		if len(args) > 1 && err == nil {
			t.Errorf("%q ended well:\n%s", args, &out)
		}
		if len(args) == 1 && (err != nil || !strings.Contains(out.String(), "doctor")) {
			t.Errorf("%q: %v\n%s", args, err, &out)
		}
	}
}

// TestCommandHelp: help is no unknown command.
func TestCommandHelp(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]string{"help": "Commands of the WeChat gateway", "help doctor": "caddy wechat doctor [flags]", "help statu": ""} {
		root, cmd := &cobra.Command{Use: "caddy", SilenceUsage: true, SilenceErrors: true}, &cobra.Command{Use: "wechat <command>", Short: "Commands of the WeChat gateway"}
		wechatCommand().CobraFunc(cmd)
		root.AddCommand(cmd)
		var out strings.Builder
		root.SetOut(&out)
		root.SetErr(&out)
		root.SetArgs(append([]string{"wechat"}, strings.Fields(line)...))
		err := root.Execute()
		if (err == nil) != (want != "") || !strings.Contains(out.String(), want) {
			t.Errorf("%q: %v\n%s", line, err, &out)
		}
	}
}

func TestExplainCommand(t *testing.T) {
	t.Parallel()
	known, _ := tokens.Explain(61004)
	for _, tt := range []struct {
		args string
		says []string
		err  string
	}{
		{"61004 40164", []string{"61004  (operator)\n", known.Meaning.EN, known.Remedy.ZH, "40164  ("}, ""},
		{"--json 61004", []string{`{"errcode":61004,"known":true,"class":"operator","meaning":{"en":`}, ""},
		{"61004 123456789", []string{"61004", "123456789"}, "not known: 123456789"},
		{"-1", []string{"-1  ("}, ""},
		{"--json -1 61004", []string{`{"errcode":-1,"known":true`, `{"errcode":61004`}, ""},
		{"-- -1", []string{"-1  ("}, ""},
		{"-2", []string{"-2  ("}, "not known: -2"},
		{"-x", nil, "unknown shorthand flag"},
		{"--jsn 61004", nil, "unknown flag: --jsn"},
		{"-40001", []string{"-40001  ("}, "not known: -40001 (40001 is)"},
		{"-40001 --json", []string{`{"errcode":-40001,"known":false`}, "not known: -40001"},
		{"errcode: 40001", []string{"40001  ("}, ""},
		{"errcode:40001 errcode=61004", []string{"40001  (", "61004  ("}, ""},
		{`{"errmsg":"61004","errcode":40001}`, []string{"40001  ("}, ""},
		{`errcode="-1"`, []string{"-1  ("}, ""},
		{`--json {\"errcode\":-1,`, []string{`{"errcode":-1,`}, ""},
		{"errcode:", nil, "'errcode:' is not an errcode"},
		{"errcode: x", nil, "'x' is not an errcode"},
		{"--help", []string{"explain <errcode>...", "--json"}, ""},
		{"--json", nil, "requires at least 1 arg"},
		{"99999999999999999999", nil, "'99999999999999999999' is not an errcode"},
		{"x", nil, "'x' is not an errcode"},
		{"", nil, "requires at least 1 arg"},
	} {
		var out strings.Builder
		cmd := explainCommand()
		cmd.SetOut(&out)
		cmd.SetErr(&strings.Builder{})
		cmd.SetArgs(strings.Fields(tt.args))
		err := cmd.Execute()
		if tt.err == "" && err != nil || tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%q: %v, want %q", tt.args, err, tt.err)
		}
		for _, text := range tt.says {
			if !strings.Contains(out.String(), text) {
				t.Errorf("%q: does not say %q:\n%s", tt.args, text, out.String())
			}
		}
		if strings.HasPrefix(tt.args, "--json 6") && !json.Valid([]byte(out.String())) {
			t.Errorf("%q: no JSON: %s", tt.args, out.String())
		}
	}
}
