package caddymodule

import (
	"encoding/json"
	"fmt"
	"io"
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
	asJSON, busy := false, false
	cmd := &cobra.Command{
		Use: "explain <errcode>...", Short: "Says what errcodes of WeChat's mean and what to do about them",
		Long:    "Says, in English and Chinese, what errcodes of WeChat's mean and what to do about them. The exit code is 1 if one is not known.",
		Example: "caddy wechat explain 61004 40164",
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON object for each code, one a line")
	// The commonest of all is -1, which would be taken for a flag.
	cmd.Flags().BoolVarP(&busy, "busy", "1", false, "")
	_ = cmd.Flags().MarkHidden("busy")
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if busy {
			return nil
		}
		return cobra.MinimumNArgs(1)(cmd, args)
	}
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(func(fl caddycmd.Flags) (int, error) {
		codes := fl.Args()
		if busy {
			codes = append([]string{"-1"}, codes...)
		}
		if err := explain(cmd.OutOrStdout(), codes, asJSON); err != nil {
			return caddy.ExitCodeFailedStartup, err
		}
		return caddy.ExitCodeSuccess, nil
	})
	return cmd
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
