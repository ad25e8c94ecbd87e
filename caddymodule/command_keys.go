package caddymodule

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/caddyserver/caddy/v2"
	caddycmd "github.com/caddyserver/caddy/v2/cmd"
	"github.com/spf13/cobra"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// exitFailed is the exit code of status, decrypt, send and doctor when what was asked about is not well; 1 is for what cannot be
// asked at all.
const exitFailed = 2

// pushKeys are what the pushes for one receive id are made with.
type pushKeys struct {
	what    string // platform or account
	appid   string
	mode    string // of an account
	codec   *crypto.Codec
	tokens  int
	aesKeys int
}

func (k *pushKeys) String() string { return k.what + " " + k.appid }

// The kinds of pushKeys.
const (
	ofPlatform = "platform"
	ofAccount  = "account"
)

// keyParams say where the keys of pushes are.
type keyParams struct {
	config, adapter string
	tokens, aesKeys []string // @file each
	appid           string
}

func (p *keyParams) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVarP(&p.config, "config", "c", "", "the config with the platforms and accounts (default: Caddyfile in this folder, if there is one)")
	f.StringVarP(&p.adapter, "adapter", "a", "", "name of the config adapter to apply")
	f.StringArrayVar(&p.tokens, "token", nil, "@file with the token (消息校验Token), instead of the config; again for an older one")
	f.StringArrayVar(&p.aesKeys, "aes-key", nil, "@file with the EncodingAESKey (消息加解密Key); again for an older one")
	f.StringVar(&p.appid, "appid", "", "the platform's or account's appid: with --token the receive id, else which of the config's")
	_ = cmd.MarkFlagFilename("config")
	completeConfigFlags(cmd, p)
}

// load reads the keys: those of the files, or else of the config. What of the config cannot be used is said to talk.
func (p *keyParams) load(talk io.Writer) ([]*pushKeys, error) {
	switch {
	case p.appid != "" && !isAppID(p.appid):
		return nil, fmt.Errorf("--appid: %w", notAppID(p.appid))
	case len(p.tokens) == 0 && len(p.aesKeys) > 0:
		return nil, errors.New("--aes-key needs --token @file, the token of the same page of WeChat's console")
	case len(p.tokens) > 0 && p.config != "":
		return nil, errors.New("--token and --config are two sources of keys: give one of them")
	case len(p.tokens) > 0 && p.appid == "":
		return nil, errors.New("--token needs --appid, the appid of the platform or account whose token it is")
	case len(p.tokens) > 0:
		return p.fromFiles()
	}
	return p.fromConfig(talk)
}

func (p *keyParams) fromFiles() ([]*pushKeys, error) {
	read := func(flag string, files []string) ([]string, error) {
		texts := make([]string, len(files))
		for i, file := range files {
			var err error
			if texts[i], err = readSecretFile(flag, file); err != nil {
				return nil, err
			}
		}
		return texts, nil
	}
	tokenTexts, err := read("--token", p.tokens)
	if err != nil {
		return nil, err
	}
	keyTexts, err := read("--aes-key", p.aesKeys)
	if err != nil {
		return nil, err
	}
	k := &pushKeys{what: ofAccount, appid: p.appid, mode: modeSafe, tokens: len(tokenTexts), aesKeys: len(keyTexts)}
	secrets := make([]secret.String, len(tokenTexts))
	for i, t := range tokenTexts {
		secrets[i] = secret.New(t)
	}
	keys := make([]crypto.Key, len(keyTexts))
	for i, text := range keyTexts {
		if keys[i], err = crypto.ParseKey(text); err != nil {
			return nil, fmt.Errorf("--aes-key %s: %w", p.aesKeys[i], err)
		}
	}
	if k.codec, err = crypto.NewCodec(p.appid, secrets, keys); err != nil {
		return nil, fmt.Errorf("--token: %w", err)
	}
	return []*pushKeys{k}, nil
}

// readSecretFile reads the secret in @file.
func readSecretFile(flag, value string) (string, error) {
	if !strings.HasPrefix(value, "@") || value == "@" {
		return "", fmt.Errorf("%s: a secret on the command line is seen by others and stays in the shell's history: write it into a file and give %s @file", flag, flag)
	}
	f, err := os.Open(value[1:])
	if err != nil {
		return "", fmt.Errorf("%s: %w", flag, err)
	}
	defer func() { _ = f.Close() }()
	content, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	if err != nil {
		return "", fmt.Errorf("%s: %w", flag, err)
	}
	text := strings.TrimRight(string(content), "\r\n")
	switch {
	case len(content) > maxKeyFile:
		return "", fmt.Errorf("%s: %s has more than %d bytes: this is no file with a secret", flag, value, maxKeyFile)
	case text == "":
		return "", fmt.Errorf("%s: %s is empty", flag, value)
	}
	return text, nil
}

// adaptedApp reads the global option wechat of a config; config is the whole of it, as JSON. Nothing is resolved.
func adaptedApp(config, adapter string) (app *App, adapted []byte, file string, err error) {
	adapted, file, _, err = caddycmd.LoadConfig(config, adapter)
	if err != nil {
		return nil, nil, "", err
	}
	if len(adapted) == 0 {
		return nil, nil, "", errors.New("no config: give the gateway's with --config")
	}
	adapted = caddy.RemoveMetaFields(adapted)
	var parts struct {
		Apps map[string]json.RawMessage `json:"apps"`
	}
	if err := json.Unmarshal(adapted, &parts); err != nil {
		return nil, nil, file, fmt.Errorf("%s: %w", file, err)
	}
	if parts.Apps["wechat"] == nil {
		return nil, adapted, file, fmt.Errorf("%s: it has no global option wechat { … }", file)
	}
	app = new(App)
	if err := caddy.StrictUnmarshalJSON(parts.Apps["wechat"], app); err != nil {
		return nil, adapted, file, fmt.Errorf("%s: wechat: %w", file, err)
	}
	if err := app.refuseNull(); err != nil {
		return nil, adapted, file, fmt.Errorf("%s: wechat: %w", file, err)
	}
	return app, adapted, file, nil
}

// fromConfig reads the tokens and keys of a config's platforms and accounts, and nothing else of it: secrets and clients
// may be absent where this runs.
func (p *keyParams) fromConfig(talk io.Writer) ([]*pushKeys, error) {
	app, _, file, err := adaptedApp(p.config, p.adapter)
	if err != nil {
		return nil, err
	}
	all, problems := app.pushKeys()
	var known []string
	for _, k := range all {
		known = append(known, k.appid)
	}
	if p.appid != "" {
		all = slices.DeleteFunc(all, func(k *pushKeys) bool { return k.appid != p.appid })
		problems = slices.DeleteFunc(problems, func(problem keyProblem) bool { return problem.appid != p.appid })
	}
	for _, problem := range problems {
		_, _ = fmt.Fprintf(talk, "left out: %s %s: %v\n", problem.what, problem.appid, problem.err)
	}
	switch {
	case len(all) > 0:
		return all, nil
	case len(problems) > 0:
		return nil, fmt.Errorf("%s: %s %s: %w", file, problems[0].what, problems[0].appid, problems[0].err)
	case p.appid != "" && len(known) > 0:
		return nil, fmt.Errorf("--appid: %s has no push keys in %s: want one of %s", p.appid, file, strings.Join(known, " "))
	}
	return nil, fmt.Errorf("%s: no platform or account in it has a token", file)
}

// keyProblem is why the keys of a platform or account cannot be used.
type keyProblem struct {
	what, appid string
	err         error
}

// pushKeys resolves the tokens and keys of an app that is not provisioned, in the order in which pushes are tried.
func (a *App) pushKeys() (all []*pushKeys, problems []keyProblem) {
	r := resolver{repl: caddy.NewReplacer()}
	add := func(k *pushKeys, tokenTexts, keyTexts []string) {
		err := literalAppID(k.appid)
		if err == nil {
			k.codec, _, err = r.codec(k.appid, tokenTexts, keyTexts)
		}
		if err != nil {
			problems = append(problems, keyProblem{k.what, k.appid, err})
			return
		}
		tokens, _ := r.secrets("token", tokenTexts, ofWeChat) // it went well before, as does what follows
		keys, _ := r.newestFirst("aes_key", keyTexts)
		k.tokens, k.aesKeys = len(tokens), len(keys)
		all = append(all, k)
	}
	for _, p := range a.Platforms {
		if p != nil {
			add(&pushKeys{what: ofPlatform, appid: p.AppID}, p.Tokens, p.AESKeys)
		}
	}
	for _, acc := range a.Accounts {
		if acc == nil || len(acc.Tokens) == 0 {
			continue
		}
		mode := acc.Mode
		if mode == "" {
			if mode = modeSafe; len(acc.AESKeys) == 0 {
				mode = modePlain
			}
		}
		add(&pushKeys{what: ofAccount, appid: acc.AppID, mode: mode}, acc.Tokens, acc.AESKeys)
	}
	return all, problems
}

// keyProblems is all that is wrong with appids, tokens and keys, where pushKeys says of each entry what it met with first.
func (a *App) keyProblems() (list []keyProblem) {
	r := resolver{repl: caddy.NewReplacer()}
	look := func(what, appid string, tokenTexts, keyTexts []string) {
		say := func(err error) {
			if err != nil {
				list = append(list, keyProblem{what, appid, err})
			}
		}
		say(literalAppID(appid))
		texts, err := r.secrets("token", tokenTexts, ofWeChat)
		if err == nil && len(texts) == 0 && (what == ofPlatform || len(keyTexts) > 0) {
			err = errNoToken
		}
		say(err)
		values := 0
		for i, text := range keyTexts {
			v, err := r.nth("aes_key", i, text)
			if err == nil && v == "" {
				continue
			}
			if values++; err == nil {
				if _, err = crypto.ParseKey(v); err != nil {
					err = fmt.Errorf("aes_key %d: %w", values, err)
				}
			}
			say(err)
		}
	}
	for _, p := range a.Platforms {
		if p != nil {
			look(ofPlatform, p.AppID, p.Tokens, p.AESKeys)
		}
	}
	for _, acc := range a.Accounts {
		if acc != nil {
			look(ofAccount, acc.AppID, acc.Tokens, acc.AESKeys)
		}
	}
	return list
}

// completeConfigFlags completes --appid with the appids of the config that was given before it, or of the one in this
// folder, and the files of secrets behind their @.
func completeConfigFlags(cmd *cobra.Command, p *keyParams) {
	_ = cmd.RegisterFlagCompletionFunc("appid", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return configAppIDs(p.config, p.adapter), cobra.ShellCompDirectiveNoFileComp
	})
	secretFile := func(_ *cobra.Command, _ []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		return secretFiles(toComplete), cobra.ShellCompDirectiveNoSpace | cobra.ShellCompDirectiveNoFileComp
	}
	_ = cmd.RegisterFlagCompletionFunc("token", secretFile)
	_ = cmd.RegisterFlagCompletionFunc("aes-key", secretFile)
}

// configAppIDs are the appids of a config's platforms and accounts, as completions with a word on each.
func configAppIDs(config, adapter string) (list []string) {
	app, _, _, err := adaptedApp(config, adapter)
	if err != nil {
		return nil
	}
	for _, p := range app.Platforms {
		list = append(list, p.AppID+"\t"+ofPlatform)
	}
	for _, a := range app.Accounts {
		list = append(list, a.AppID+"\t"+ofAccount)
	}
	return list
}

// maxCompletions bounds the files that a completion looks at.
const maxCompletions = 500

// secretFiles completes @file.
func secretFiles(toComplete string) (list []string) {
	path := strings.TrimPrefix(toComplete, "@")
	folder, name := ".", path
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		folder, name = path[:i+1], path[i+1:]
	}
	dir, err := os.Open(folder)
	if err != nil {
		return nil
	}
	defer func() { _ = dir.Close() }()
	entries, _ := dir.ReadDir(maxCompletions)
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), name) {
			full := "@" + strings.TrimSuffix(path, name) + e.Name()
			if e.IsDir() {
				full += "/"
			}
			list = append(list, full)
		}
	}
	slices.Sort(list)
	return list
}
