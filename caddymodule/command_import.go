package caddymodule

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// importCommand is `caddy wechat import`.
func importCommand() *cobra.Command {
	p := &moveParams{}
	cmd := &cobra.Command{
		Use:   "import [--config <file>] [--adapter <name>] [--key @<file>] [--format archive|csv|json] [--dry-run] [<file>]",
		Short: "Puts an archive, or refresh tokens of another system, into the store", Args: cobra.MaximumNArgs(1),
		Long: `Puts what caddy wechat export has written into the store of the config, which is read as by caddy run, and says what became of
it. Without a file, or with -, it comes from standard input. A file is looked through before anything is written.

Gateways may be running on the store: a record takes the place of an older one only, and they hear of it. It may be done
again, also when it broke off.

With --format csv or json it takes refresh tokens of another system, which become authorizers: a CSV file with a header line,
or a JSON array of objects, or one object a line, with platform, appid, refresh_token and, if there is one, access_token
with expires_at (Unix seconds or RFC 3339). An authorizer that the store has already stays as it is. Of two rows of one account
that differ the first counts.

The exit code is 1 if a record was refused; all others are written then.`,
		Example: "caddy wechat import --config /etc/caddy/Caddyfile gateway.archive\ncaddy wechat import --format csv --dry-run accounts.csv",
	}
	p.flags(cmd)
	cmd.Flags().StringVar(&p.format, "format", formatArchive, "what it is: archive, csv or json")
	cmd.Flags().BoolVar(&p.dry, "dry-run", false, "write nothing, and say what would be")
	cmd.RunE = caddycmd.WrapCommandFuncForCobra(func(fl caddycmd.Flags) (int, error) {
		ctx, cancel := interruptible()
		defer cancel()
		if err := p.importInto(ctx, fl.Args(), cmd.InOrStdin(), cmd.OutOrStdout()); err != nil {
			return caddy.ExitCodeFailedStartup, interrupted(ctx, err)
		}
		return caddy.ExitCodeSuccess, nil
	})
	return cmd
}

// importInto reads the file or in, and says on out what became of it.
func (p *moveParams) importInto(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	if err := p.check(args); err != nil {
		return err
	}
	if p.file == "-" && isTerminal(in) {
		return errors.New("standard input is a terminal: name a file, or direct one here")
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
	var keys []crypto.ArchiveKey
	if given {
		keys = append(keys, key)
	}
	for _, k := range store.sealKeys {
		keys = append(keys, crypto.NewArchiveKey(k))
	}
	if p.file != "-" {
		f, err := await(ctx, func() (*os.File, error) { return os.Open(p.file) }) // of a named pipe, once somebody writes there
		if err != nil {
			return err
		}
		defer func() { _ = f.Close() }()
		in = f
	}
	in = readable(ctx, in)
	var moved tokens.Moved
	switch p.format {
	case formatCSV:
		moved, err = store.mover.ImportCSV(ctx, in, p.dry)
	case formatJSON:
		moved, err = store.mover.ImportJSON(ctx, in, p.dry)
	default:
		moved, err = importArchive(ctx, store.mover, in, p.dry, keys)
	}
	sum := moved.Total()
	done := "written"
	if p.dry {
		done = "would be written"
	}
	if err == nil || len(moved.Classes) > 0 {
		p.report(out, moved, done)
	}
	switch {
	case err != nil && sum.Written > 0 && !p.dry:
		return fmt.Errorf("%w; %d records were written before: import it again, they do no harm", err, sum.Written)
	case err != nil:
		return err
	case sum.Refused > 0:
		return fmt.Errorf("%d were refused", sum.Refused)
	}
	return nil
}

// importArchive imports an archive. One that can be read twice is checked to its end first.
func importArchive(ctx context.Context, mover *tokens.Mover, in io.Reader, dry bool, keys []crypto.ArchiveKey) (tokens.Moved, error) {
	if f, ok := in.(*os.File); ok {
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
			start, err := f.Seek(0, io.SeekCurrent)
			if err == nil {
				err = checkArchive(ctx, f, keys)
			}
			if err == nil {
				_, err = f.Seek(start, io.SeekStart)
			}
			if err != nil {
				return tokens.Moved{}, err
			}
		}
	}
	archive, err := openArchive(in, keys)
	if err != nil {
		return tokens.Moved{}, err
	}
	return mover.Import(ctx, archive.Next, dry)
}

func checkArchive(ctx context.Context, r io.Reader, keys []crypto.ArchiveKey) error {
	archive, err := openArchive(r, keys)
	for err == nil && ctx.Err() == nil {
		_, err = archive.Next()
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return errors.Join(err, ctx.Err())
}

// openArchive is crypto.NewArchiveReader with what to do about its errors.
func openArchive(r io.Reader, keys []crypto.ArchiveKey) (*crypto.ArchiveReader, error) {
	archive, err := crypto.NewArchiveReader(r, keys...)
	switch {
	case errors.Is(err, crypto.ErrNoArchive):
		return nil, fmt.Errorf("%w: a list of refresh tokens needs --format csv or json, and after `export |` see what that said", err)
	case errors.Is(err, crypto.ErrArchivePassphrase):
		return nil, fmt.Errorf("%w: give it with --key @file or in %s", err, exportKeyEnv)
	case errors.Is(err, crypto.ErrArchiveKey):
		return nil, fmt.Errorf("%w: give the one that it was exported with by --key @file or in %s; without that it is the seal_key of the exporting config", err, exportKeyEnv)
	}
	return archive, err
}
