package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// exportCommand is `caddy wechat export`.
func exportCommand() *cobra.Command {
	p := &moveParams{}
	cmd := &cobra.Command{
		Use: "export [--config <file>] [--adapter <name>] [--key @<file>] [<file>]", Short: "Writes all that lasts into a sealed archive", Args: cobra.MaximumNArgs(1),
		Long: `Writes what the gateway must not lose into a sealed archive: tickets, the records of platforms, authorizers and accounts with
their refresh tokens, accepted authorizations, the keys of the SDKs' tokens, and verification files. Without a file, or
with -, it goes to standard output, which must not be a terminal. A file is there whole or as it was, and behind a symbolic
link it is the one that the link names. Into a named pipe or a character device it is written as it comes.

The store is that of the config, which is read as by caddy run. Nothing is started, locked or changed, so that it works
while the gateway runs. Run it as the gateway's user: Caddy's own storage is in the home folder of who runs it.

The archive is sealed with the key or passphrase in the file of --key or in ` + exportKeyEnv + `, else with the config's seal_key.
The exit code is 1 if a record could not be read; all others are in the archive then.`,
		Example: "caddy wechat export --config /etc/caddy/Caddyfile gateway.archive\ncaddy wechat export --config old.Caddyfile | caddy wechat import --config new.Caddyfile",
	}
	p.flags(cmd)
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(func(fl caddycmd.Flags) (int, error) {
		ctx, cancel := interruptible()
		defer cancel()
		if err := p.export(ctx, fl.Args(), cmd.OutOrStdout(), cmd.ErrOrStderr()); err != nil {
			return caddy.ExitCodeFailedStartup, interrupted(ctx, err)
		}
		return caddy.ExitCodeSuccess, nil
	})
	return cmd
}

// export writes the archive to the file or to out, and what became of it to talk.
func (p *moveParams) export(ctx context.Context, args []string, out, talk io.Writer) error {
	if err := p.check(args); err != nil {
		return err
	}
	if p.file == "-" && isTerminal(out) {
		return errTerminal
	}
	key, given, err := p.archiveKey()
	if err != nil {
		return err
	}
	store, err := p.open()
	if err != nil {
		return err
	}
	defer store.close()
	switch {
	case given:
	case len(store.sealKeys) > 0:
		key = crypto.NewArchiveKey(store.sealKeys[0])
	default:
		return fmt.Errorf("there is nothing to seal the archive with, since the config has no seal_key: "+
			"keep a key such as `openssl rand -hex 32` prints in a file and give --key @file, or set %s", exportKeyEnv)
	}
	var moved tokens.Moved
	write := func(w io.Writer) (err error) {
		archive, err := crypto.NewArchiveWriter(w, key)
		if err != nil {
			return err
		}
		if moved, err = store.mover.Export(ctx, archive.Write); err != nil {
			return err
		}
		return archive.Close()
	}
	switch err = writeTo(ctx, p.file, out, write); {
	case errors.Is(err, tokens.ErrNothingToMove):
		return fmt.Errorf("%w: is it the gateway's config, and are you the gateway's user?", err)
	case err != nil:
		return err
	}
	p.report(talk, moved, "exported")
	if n := moved.Total().Refused; n > 0 {
		what := "could not be read and are not in the archive"
		if n == 1 {
			what = "could not be read and is not in the archive"
		}
		return fmt.Errorf("%s %s", countOf(n, "record"), what)
	}
	return nil
}
