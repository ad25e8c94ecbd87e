package caddymodule

import (
	"encoding/json"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// wechatCommand is `caddy wechat`.
func wechatCommand() caddycmd.Command {
	return caddycmd.Command{
		Name: "wechat", Usage: "<command>", Short: "Commands of the WeChat gateway",
		CobraFunc: func(cmd *cobra.Command) {
			cmd.AddCommand(statusCommand(), authorizersCommand(), refreshCommand(), exportCommand(), importCommand())
			cmd.AddCommand(decryptCommand(), sendCommand(), explainCommand(), doctorCommand())
			// Cobra would show the help and end with 0: a script with a slip in it would take that for all being well.
			cmd.Args = func(cmd *cobra.Command, args []string) error {
				if len(args) > 0 && args[0] == "help" {
					args = args[1:] // caddy wechat help doctor
					if known, _, err := cmd.Find(args); err == nil && known != cmd {
						return nil
					}
				}
				if len(args) == 0 {
					return nil
				}
				var names []string
				for _, known := range cmd.Commands() {
					names = append(names, known.Name())
				}
				return fmt.Errorf("'%s' is not a command of caddy wechat: want one of %s", args[0], strings.Join(names, ", "))
			}
			cmd.RunE = func(cmd *cobra.Command, args []string) error {
				if len(args) > 0 { // help
					if about, _, err := cmd.Find(args[1:]); err == nil {
						return about.Help()
					}
				}
				return cmd.Help()
			}
		},
	}
}

// explainCommand is `caddy wechat explain`.
func explainCommand() *cobra.Command {
	asJSON := false
	cmd := &cobra.Command{
		Use: "explain <errcode>...", Short: "Says what errcodes of WeChat's mean and what to do about them",
		Long: `Says, in English and Chinese, what errcodes of WeChat's mean and what to do about them. An answer of WeChat's, or a log line with an
errcode in it, will do in place of the number. The exit code is 1 if one is not known.`,
		Example: "caddy wechat explain 61004 40164\ncaddy wechat explain '{\"errcode\":40001,\"errmsg\":\"invalid credential\"}'",
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON object for each code, one a line")
	cmd.DisableFlagParsing = true // of cobra's, which takes -1, the commonest code of all, for a flag
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		flags, texts := splitErrcodes(args)
		cmd.DisableFlagParsing = false
		if err := cmd.ParseFlags(flags); err != nil {
			return cmd.FlagErrorFunc()(cmd, err)
		}
		if help, err := cmd.Flags().GetBool("help"); err == nil && help {
			return cmd.Help()
		}
		if err := cobra.MinimumNArgs(1)(cmd, texts); err != nil {
			return err
		}
		return caddycmd.WrapCommandFuncForCobra(func(caddycmd.Flags) (int, error) {
			codes, err := errcodesIn(texts)
			if err == nil {
				err = explain(cmd.OutOrStdout(), codes, asJSON)
			}
			if err != nil {
				return caddy.ExitCodeFailedStartup, err
			}
			return caddy.ExitCodeSuccess, nil
		})(cmd, texts)
	}
	return cmd
}

var (
	bareErrcode = regexp.MustCompile(`^([-+]?[0-9]+)[,.;:，。；：]?$`)
	// namedErrcode is an errcode in an answer of WeChat's, in a log line or in a metric's labels.
	namedErrcode = regexp.MustCompile(`(?i)errcode["'\\]*\s*[:=：]?\s*["'\\]*([-+]?[0-9]+)`)
	errcodeName  = regexp.MustCompile(`(?i)^["'{]*errcode["']?\s*[:=：]?$`)
)

// splitErrcodes tells flags from what is to be explained, which may begin with a minus.
func splitErrcodes(args []string) (flags, texts []string) {
	for i, arg := range args {
		switch {
		case arg == "--":
			return flags, append(texts, args[i+1:]...)
		case strings.HasPrefix(arg, "-") && !bareErrcode.MatchString(arg):
			flags = append(flags, arg)
		default:
			texts = append(texts, arg)
		}
	}
	return flags, texts
}

// errcodesIn finds the errcodes in what somebody has typed or pasted.
func errcodesIn(texts []string) (codes []string, err error) {
	for i, text := range texts {
		trimmed := strings.TrimSpace(text)
		found := namedErrcode.FindAllStringSubmatch(trimmed, -1)
		if m := bareErrcode.FindStringSubmatch(trimmed); m != nil {
			found = [][]string{m}
		}
		if errcodeName.MatchString(trimmed) && i < len(texts)-1 {
			continue // the number follows, after a blank
		}
		if len(found) == 0 {
			return nil, fmt.Errorf("'%s' is not an errcode: write a number such as 61004, or a text with errcode and a number in it", shown(text))
		}
		for _, m := range found {
			codes = append(codes, strings.TrimPrefix(m[1], "+"))
		}
	}
	return codes, nil
}

// explain prints what is known of each code.
func explain(w io.Writer, codes []string, asJSON bool) error {
	var unknown []string
	for _, text := range codes {
		code, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return fmt.Errorf("'%s' is not an errcode: write a number such as 61004", text)
		}
		e, known := tokens.Explain(code)
		if !known {
			if _, without := tokens.Explain(-code); without {
				text += fmt.Sprintf(" (%d is)", -code)
			}
			unknown = append(unknown, text)
		}
		if !asJSON {
			_, _ = fmt.Fprintf(w, "%d  (%s)\n  %s\n  %s\n  remedy: %s\n  处理: %s\n", e.Code, e.Class, e.Meaning.EN, e.Meaning.ZH, e.Remedy.EN, e.Remedy.ZH)
			continue
		}
		line, err := json.Marshal(newExplanation(code))
		if err != nil {
			return err
		}
		_, _ = fmt.Fprintf(w, "%s\n", line)
	}
	if len(unknown) > 0 {
		return fmt.Errorf("not known: %s", strings.Join(unknown, " "))
	}
	return nil
}
