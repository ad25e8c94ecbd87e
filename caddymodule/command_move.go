package caddymodule

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

const (
	// exportKeyEnv names the variable with the key of an archive.
	exportKeyEnv = "WECHAT_EXPORT_KEY"
	// maxKeyFile bounds a file with a key, in bytes.
	maxKeyFile = 4 << 10

	formatArchive = "archive"
	formatCSV     = "csv"
	formatJSON    = "json"
)

// moveParams are what export and import are told.
type moveParams struct {
	config, adapter string
	key             string // @file, or nothing
	file            string // or -
	format          string // of import
	dry             bool   // likewise
	json            bool
}

func (p *moveParams) flags(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&p.config, "config", "c", "", "the config with the store (default: Caddyfile in this folder, if there is one)")
	cmd.Flags().StringVarP(&p.adapter, "adapter", "a", "", "name of the config adapter to apply")
	cmd.Flags().BoolVar(&p.json, "json", false, "say what became of the records as a JSON object")
	cmd.Flags().StringVar(&p.key, "key", "", "@file with the key or passphrase of the archive (default: $"+exportKeyEnv+", else the config's seal_key)")
}

// check refuses what cannot be meant.
func (p *moveParams) check(args []string) error {
	if p.file = "-"; len(args) > 0 {
		p.file = args[0]
	}
	switch {
	case p.key != "" && (!strings.HasPrefix(p.key, "@") || p.key == "@"):
		return fmt.Errorf("--key: a key on the command line is seen by others and stays in the shell's history: write it into a file and give --key @file, or set %s", exportKeyEnv)
	case p.format != "" && p.format != formatArchive && p.format != formatCSV && p.format != formatJSON:
		return fmt.Errorf("--format: '%s' is none: want %s, %s or %s", p.format, formatArchive, formatCSV, formatJSON)
	case p.config == "-" && p.file == "-" && p.format != "":
		return errors.New("--config - and the archive cannot both come from standard input")
	}
	return nil
}

// archiveKey is the key that was given, if one was.
func (p *moveParams) archiveKey() (key crypto.ArchiveKey, given bool, err error) {
	text, from := os.Getenv(exportKeyEnv), exportKeyEnv
	if p.key != "" {
		from = "--key " + p.key
		f, err := os.Open(p.key[1:])
		if err != nil {
			return key, false, fmt.Errorf("--key: %w", err)
		}
		defer func() { _ = f.Close() }()
		content, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
		if err != nil {
			return key, false, fmt.Errorf("--key: %w", err)
		}
		if len(content) > maxKeyFile {
			return key, false, fmt.Errorf("%s: more than %d bytes: this is no file with a key", from, maxKeyFile)
		}
		text = strings.TrimRight(string(content), "\r\n")
	} else if text == "" {
		return key, false, nil
	}
	if key, err = crypto.ParseArchiveKey(text); err != nil {
		return key, false, fmt.Errorf("%s: %w", from, err)
	}
	return key, true, nil
}

// openedStore is the store of a config, with nothing started.
type openedStore struct {
	mover    *tokens.Mover
	sealKeys [][]byte // newest first
	close    func()
}

// open adapts the config and opens the store in it. Of the config nothing else is resolved: secrets of platforms and
// clients may be absent.
func (p *moveParams) open() (*openedStore, error) {
	config, file, _, err := caddycmd.LoadConfig(p.config, p.adapter)
	if err != nil {
		return nil, err
	}
	if len(config) == 0 {
		return nil, errors.New("no config: give the gateway's with --config")
	}
	var parts struct {
		Storage json.RawMessage            `json:"storage"`
		Apps    map[string]json.RawMessage `json:"apps"`
	}
	if err := json.Unmarshal(caddy.RemoveMetaFields(config), &parts); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if parts.Apps["wechat"] == nil {
		return nil, fmt.Errorf("%s: it has no global option wechat { … }", file)
	}
	app := new(App)
	if err := caddy.StrictUnmarshalJSON(parts.Apps["wechat"], app); err != nil {
		return nil, fmt.Errorf("%s: wechat: %w", file, err)
	}
	if err := app.refuseNull(); err != nil {
		return nil, fmt.Errorf("%s: wechat: %w", file, err)
	}
	// Neither the log nor the admin endpoint of the config: a gateway may be using both.
	base, err := caddy.ProvisionContext(&caddy.Config{
		StorageRaw: parts.Storage,
		Logging:    &caddy.Logging{Logs: map[string]*caddy.CustomLog{caddy.DefaultLoggerName: {BaseLog: caddy.BaseLog{Level: "WARN"}}}},
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	ctx, cancel := caddy.NewContext(base)
	store, err := app.openStore(ctx)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("%s: wechat: %w", file, err)
	}
	store.close = cancel
	return store, nil
}

// openStore makes a mover of what the app is configured with.
func (a *App) openStore(ctx caddy.Context) (*openedStore, error) {
	r := resolver{repl: caddy.NewReplacer()}
	keys, err := a.resolveSealKeys(r)
	if err != nil {
		return nil, err
	}
	env := &tokens.Environment{Log: ctx.Slogger()}
	if len(keys) > 0 {
		if env.Sealer, err = crypto.NewSealer(keys...); err != nil {
			return nil, err
		}
	}
	store, err := a.provisionStore(ctx)
	if err != nil {
		return nil, err
	}
	env.Store = store.Store()
	if env.Spill, err = a.spillFolder(r, store.Identity()); err != nil {
		return nil, err
	}
	for _, p := range a.Platforms {
		env.Platforms = append(env.Platforms, tokens.PlatformCredentials{AppID: p.AppID})
	}
	return &openedStore{mover: tokens.NewMover(env), sealKeys: keys}, nil
}

// interruptible ends with the process's first signal, so that a file that is not whole is removed. A second one ends the
// process, wherever that waits.
func interruptible() (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// interrupted says of an error that it came of a signal. What was under way may not know that.
func interrupted(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(err, cause) {
		return fmt.Errorf("%w: %w", cause, err)
	}
	return err
}

// isTerminal reports whether a stream of a command's is one.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// movedCounts is what became of records, as JSON.
type movedCounts struct {
	Name    string `json:"name,omitempty"` // of their kind; absent: all
	Written int    `json:"written"`
	Same    int    `json:"same"`
	Newer   int    `json:"newer"`
	Refused int    `json:"refused"`
}

// report says what became of records. Done is the word for those that were written.
func (p *moveParams) report(w io.Writer, moved tokens.Moved, done string) {
	if p.json {
		answer := struct {
			All      movedCounts   `json:"all"`
			Kinds    []movedCounts `json:"kinds"`
			Refusals []string      `json:"refusals"`
		}{movedCounts(moved.Total()), []movedCounts{}, append([]string{}, moved.Refusals...)}
		for _, c := range moved.Classes {
			answer.Kinds = append(answer.Kinds, movedCounts(c))
		}
		_ = json.NewEncoder(w).Encode(answer) // to the terminal, or to a pipe that may be closed
		return
	}
	for _, c := range moved.Classes {
		_, _ = fmt.Fprintf(w, "%s: %s\n", c.Name, counts(c, done))
	}
	_, _ = fmt.Fprintf(w, "all: %s\n", counts(moved.Total(), done))
	for _, refusal := range moved.Refusals {
		_, _ = fmt.Fprintf(w, "refused: %s\n", refusal)
	}
	if more := moved.Total().Refused - len(moved.Refusals); more > 0 {
		_, _ = fmt.Fprintf(w, "refused: and %d more\n", more)
	}
}

func counts(c tokens.MovedClass, done string) string {
	text := fmt.Sprintf("%d %s", c.Written, done)
	if c.Same > 0 {
		text += fmt.Sprintf(", %d already there", c.Same)
	}
	if c.Newer > 0 {
		text += fmt.Sprintf(", %d already newer", c.Newer)
	}
	if c.Refused > 0 {
		text += fmt.Sprintf(", %d refused", c.Refused)
	}
	return text
}
