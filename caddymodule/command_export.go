package caddymodule

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

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
with -, it goes to standard output, which must not be a terminal.

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
			return caddy.ExitCodeFailedStartup, err
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
		return errors.New("the archive is not text: name a file for it, or direct it somewhere")
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
	if p.file == "-" {
		err = write(out)
	} else {
		err = writeWhole(p.file, write)
	}
	switch {
	case errors.Is(err, tokens.ErrNothingToMove):
		return fmt.Errorf("%w: is it the gateway's config, and are you the gateway's user?", err)
	case err != nil:
		return err
	}
	p.report(talk, moved, "exported")
	if n := moved.Total().Refused; n > 0 {
		return fmt.Errorf("%d records could not be read and are not in the archive", n)
	}
	return nil
}

// writeWhole writes a file that only its owner can read, and that is there whole, and stays, once nil is returned.
func writeWhole(file string, write func(io.Writer) error) (err error) {
	folder := filepath.Dir(file)
	f, err := os.CreateTemp(folder, tempPattern(file)) // with mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	w := bufio.NewWriterSize(f, 1<<16)
	if err := write(w); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return err
	}
	d, err := os.Open(folder)
	if err != nil {
		return err
	}
	err = d.Sync()
	return errors.Join(err, d.Close())
}
