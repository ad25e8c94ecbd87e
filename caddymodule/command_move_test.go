package caddymodule

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/caddy-wechat/caddy-wechat/internal/redistest"
)

const (
	moveSealKey  = "0101010101010101010101010101010101010101010101010101010101010101"
	moveOtherKey = "0202020202020202020202020202020202020202020202020202020202020202"
	moveKey      = "0303030303030303030303030303030303030303030303030303030303030303"
	moveRefresh  = "refreshtoken@@@hidden"
	moveAccounts = 100
)

// moveStore is a config with a store, as a file.
type moveStore struct{ config, folder string }

// newMoveStore makes a config. Its secrets are not set: they are not needed. Redis is the address of one, or nothing for
// Caddy's file storage.
func newMoveStore(t *testing.T, redis string, sealKeys ...string) moveStore {
	t.Helper()
	s := moveStore{filepath.Join(t.TempDir(), "caddy.json"), filepath.Join(t.TempDir(), "storage")}
	app := map[string]any{
		"spill":     filepath.Join(s.folder, "spill"),
		"platforms": []any{map[string]any{"appid": "wx1111111111111111", "secret": "{env.NO_SUCH_SECRET}", "tokens": []string{"{env.NO_SUCH_TOKEN}"}}},
	}
	if len(sealKeys) > 0 {
		app["seal_keys"] = sealKeys
	}
	if redis != "" {
		app["store"] = map[string]any{"module": "redis", "addresses": []string{redis}}
	}
	text, err := json.Marshal(map[string]any{
		// Neither may be touched: a gateway may be running with the same config.
		"admin":   map[string]any{"listen": "an admin endpoint that nobody starts"},
		"logging": map[string]any{"logs": map[string]any{"default": map[string]any{"writer": map[string]any{"output": "file", "filename": filepath.Join(s.folder, "log")}}}},
		"storage": map[string]any{"module": "file_system", "root": s.folder},
		"apps":    map[string]any{"@id": "apps", "wechat": app},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.config, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

// moveRun runs a command and returns what it said, after looking for secrets in it.
func moveRun(t *testing.T, cmd *cobra.Command, in []byte, args ...string) (out, talk string, err error) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.SetIn(bytes.NewReader(in))
	cmd.SetOut(&stdout)
	cmd.SetErr(&stderr)
	cmd.SetArgs(args)
	cmd.SilenceUsage = true
	provisioning.Lock()
	err = cmd.Execute()
	provisioning.Unlock()
	for _, text := range []string{stdout.String(), stderr.String(), fmt.Sprint(err)} {
		for _, hidden := range []string{"hidden", moveSealKey, moveOtherKey, moveKey} {
			if strings.Contains(text, hidden) {
				t.Errorf("%q shows a secret", args)
			}
		}
	}
	return stdout.String(), stderr.String(), err
}

// moveList is a list of accounts in CSV.
func moveList(accounts int) []byte {
	var list bytes.Buffer
	list.WriteString("platform,appid,refresh_token\n")
	for i := range accounts {
		_, _ = fmt.Fprintf(&list, "wx1111111111111111,wx%016x,%s-%d\n", i, moveRefresh, i)
	}
	return list.Bytes()
}

// fill puts accounts into a store.
func (s moveStore) fill(t *testing.T, accounts int) moveStore {
	t.Helper()
	out, _, err := moveRun(t, importCommand(), moveList(accounts), "--config", s.config, "--format", "csv")
	if err != nil || !strings.Contains(out, fmt.Sprintf("authorizers: %d written\n", accounts)) {
		t.Fatalf("%s %v", out, err)
	}
	return s
}

// exports writes the archive of a store.
func (s moveStore) exports(t *testing.T, args ...string) (archive string) {
	t.Helper()
	archive = filepath.Join(t.TempDir(), "gateway.archive")
	_, talk, err := moveRun(t, exportCommand(), nil, append([]string{"--config", s.config, archive}, args...)...)
	if err != nil || !strings.Contains(talk, "all: ") {
		t.Fatalf("%s %v", talk, err)
	}
	return archive
}

func moveKeyFile(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return "@" + file
}

// TestMoveBetweenStores: there and back, whatever the stores are and however they are sealed.
func TestMoveBetweenStores(t *testing.T) {
	t.Parallel()
	server := redistest.Start(t)
	for name, tt := range map[string]struct{ from, to moveStore }{
		"file to Redis":      {newMoveStore(t, "", moveSealKey), newMoveStore(t, server.Addr, moveOtherKey)},
		"sealed to unsealed": {newMoveStore(t, "", moveSealKey), newMoveStore(t, "")},
		"unsealed to sealed": {newMoveStore(t, ""), newMoveStore(t, "", moveSealKey)},
		"Redis to file":      {newMoveStore(t, redistest.Start(t).Addr, moveSealKey), newMoveStore(t, "", moveOtherKey)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			key := moveKeyFile(t, moveKey)
			archive := tt.from.fill(t, moveAccounts).exports(t, "--key", key)
			info, err := os.Stat(archive)
			if err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("the archive: %v %v", info, err)
			}
			for _, want := range []string{"would be written", "written", "0 written, 100 already there"} {
				args := []string{"--config", tt.to.config, "--key", key, archive}
				if strings.HasPrefix(want, "would") {
					args = append(args, "--dry-run")
				}
				out, _, err := moveRun(t, importCommand(), nil, args...)
				if err != nil || !strings.Contains(out, want) || !strings.Contains(out, "100") {
					t.Fatalf("%s: %s %v", want, out, err)
				}
			}
			// What came out of the second store is what went into the first.
			back := newMoveStore(t, "")
			out, _, err := moveRun(t, importCommand(), mustRead(t, tt.to.exports(t, "--key", key)), "--config", back.config, "--key", key)
			if err != nil || !strings.Contains(out, "all: 100 written") {
				t.Fatalf("%s %v", out, err)
			}
			out, _, err = moveRun(t, importCommand(), moveList(moveAccounts), "--config", back.config, "--format", "csv")
			if err != nil || !strings.Contains(out, "all: 0 written, 100 already there") {
				t.Errorf("%s %v", out, err)
			}
			for _, s := range []moveStore{tt.from, tt.to} {
				if _, err := os.Stat(filepath.Join(s.folder, "log")); err == nil {
					t.Error("the config's log was opened")
				}
			}
		})
	}
}

// Scripts read what became of the records from one JSON object.
func TestMoveSaysItInJSON(t *testing.T) {
	t.Parallel()
	from, to := newMoveStore(t, "", moveSealKey).fill(t, 3), newMoveStore(t, "", moveSealKey)
	archive := filepath.Join(t.TempDir(), "archive")
	_, talk, err := moveRun(t, exportCommand(), nil, "--config", from.config, "--json", archive)
	if err != nil || !strings.HasPrefix(talk, `{"all":{"written":3,"same":0,"newer":0,"refused":0},"kinds":[{"name":`) {
		t.Errorf("%v: %s", err, talk)
	}
	for _, written := range []int{3, 0} {
		out, _, err := moveRun(t, importCommand(), nil, "--config", to.config, "--json", archive)
		var answer struct {
			All      struct{ Written, Same int }
			Refusals []string
		}
		if err != nil || json.Unmarshal([]byte(out), &answer) != nil || answer.All.Written != written || answer.All.Same != 3-written || answer.Refusals == nil {
			t.Errorf("%v: %s", err, out)
		}
	}
}

func mustRead(t *testing.T, file string) []byte {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestExportKeys: what seals an archive, and what opens it.
func TestExportKeys(t *testing.T) {
	sealed, unsealed := newMoveStore(t, "", moveSealKey).fill(t, 3), newMoveStore(t, "").fill(t, 3)
	rotated := newMoveStore(t, "", moveOtherKey, moveSealKey)
	archive := sealed.exports(t)
	into := func(to moveStore, archive string, args ...string) error {
		_, _, err := moveRun(t, importCommand(), nil, append([]string{"--config", to.config, archive}, args...)...)
		return err
	}
	wants := func(what string, err error, want string) {
		t.Helper()
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", what, err, want)
		}
	}
	wants("with the seal_key of before", into(rotated, archive), "")
	wants("without a key", into(newMoveStore(t, ""), archive), "sealed with another key: give the one that it was exported with by --key @file or in WECHAT_EXPORT_KEY")
	wants("with another key", into(newMoveStore(t, "", moveOtherKey), archive), "sealed with another key")
	wants("by the seal_key as a key", into(newMoveStore(t, ""), archive, "--key", moveKeyFile(t, moveSealKey)), "")

	none := filepath.Join(t.TempDir(), "none")
	export := func(from moveStore, args ...string) error {
		_, _, err := moveRun(t, exportCommand(), nil, append([]string{"--config", from.config, none}, args...)...)
		return err
	}
	wants("nothing to seal with", export(unsealed), "since the config has no seal_key: keep a key such as `openssl rand -hex 32` prints in a file and give --key @file, or set WECHAT_EXPORT_KEY")
	wants("a key on the command line", export(sealed, "--key", moveKey), "write it into a file and give --key @file")
	wants("no such file", export(sealed, "--key", "@/nonexistent/key"), "/nonexistent/key")
	wants("a short passphrase", export(sealed, "--key", moveKeyFile(t, "hidden")), "nor a passphrase of at least 16 characters")
	if _, err := os.Stat(none); err == nil {
		t.Error("a refused export left a file")
	}
	const phrase = "hidden in plain sight"
	t.Setenv(exportKeyEnv, phrase)
	archive = unsealed.exports(t)
	wants("by passphrase", into(newMoveStore(t, "", moveOtherKey), archive), "")
	t.Setenv(exportKeyEnv, phrase+"x")
	wants("by another passphrase", into(newMoveStore(t, "", moveOtherKey), archive), "sealed with another key")
	t.Setenv(exportKeyEnv, "")
	wants("without the passphrase", into(newMoveStore(t, "", moveOtherKey), archive), "sealed with a passphrase, and none is given: give it with --key @file or in WECHAT_EXPORT_KEY")
}

// TestImportOfADamagedArchive: of a file nothing is written; of what comes by standard input, what came before.
func TestImportOfADamagedArchive(t *testing.T) {
	t.Parallel()
	data := mustRead(t, newMoveStore(t, "", moveSealKey).fill(t, moveAccounts).exports(t))
	altered := bytes.Clone(data)
	altered[len(data)/2] ^= 1
	for name, tt := range map[string]struct {
		data []byte
		want string
	}{
		"cut":     {data[:len(data)-20], "cut short"},
		"altered": {altered, "was altered"},
		"more":    {append(bytes.Clone(data), 0), "was altered"},
		"empty":   {nil, "not an archive"},
		"a list":  {moveList(3), "needs --format csv or json"},
		"newer":   {append([]byte("caddy-wechat archive\n\x02"), data[22:]...), "newer version"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			to := newMoveStore(t, "", moveSealKey)
			file := filepath.Join(t.TempDir(), "damaged")
			if err := os.WriteFile(file, tt.data, 0o600); err != nil {
				t.Fatal(err)
			}
			out, _, err := moveRun(t, importCommand(), nil, "--config", to.config, file)
			if err == nil || !strings.Contains(err.Error(), tt.want) || out != "" {
				t.Errorf("%q %v, want %q", out, err, tt.want)
			}
			if n := to.records(t); n != 0 {
				t.Errorf("%d records were written", n)
			}
			_, _, err = moveRun(t, importCommand(), tt.data, "--config", to.config)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("by standard input: %v, want %q", err, tt.want)
			}
			if n := to.records(t); n > 0 && !strings.Contains(err.Error(), fmt.Sprintf("%d records were written before", n)) {
				t.Errorf("%d records were written, and it says: %v", n, err)
			}
			out, _, err = moveRun(t, importCommand(), data, "--config", to.config)
			if err != nil || to.records(t) != moveAccounts {
				t.Errorf("the whole archive afterwards: %s %v", out, err)
			}
		})
	}
}

// records are those in Caddy's file storage.
func (s moveStore) records(t *testing.T) (n int) {
	t.Helper()
	err := filepath.WalkDir(filepath.Join(s.folder, "wechat"), func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			n++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestMoveRefusals: what cannot be meant is said, and an archive that is there stays.
func TestMoveRefusals(t *testing.T) {
	t.Parallel()
	s := newMoveStore(t, "", moveSealKey)
	kept := filepath.Join(t.TempDir(), "kept")
	if err := os.WriteFile(kept, []byte("kept"), 0o600); err != nil {
		t.Fatal(err)
	}
	plain := filepath.Join(t.TempDir(), "plain.json")
	if err := os.WriteFile(plain, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	null := filepath.Join(t.TempDir(), "null.json")
	writeFile(t, null, `{"apps":{"wechat":{"platforms":[null]}}}`)
	down := newMoveStore(t, deadAddress(t), moveSealKey)
	for _, tt := range []struct {
		cmd  *cobra.Command
		args []string
		want string
	}{
		{exportCommand(), []string{"--config", s.config, kept}, "the store holds no records: is it the gateway's config, and are you the gateway's user?"},
		{exportCommand(), []string{"--config", down.config, kept}, "redis"},
		{exportCommand(), []string{"--config", "/nonexistent/Caddyfile", kept}, "/nonexistent/Caddyfile"},
		{exportCommand(), []string{"--config", plain, kept}, "plain.json: it has no global option wechat { … }"},
		{exportCommand(), []string{"--config", null, kept}, "null.json: wechat: platforms: entry 1 is null"},
		{importCommand(), []string{"--config", null, kept}, "null.json: wechat: platforms: entry 1 is null"},
		{exportCommand(), []string{"--config", s.config, "/nonexistent/a"}, "/nonexistent"},
		{exportCommand(), []string{"a", "b"}, "at most 1 arg"},
		{importCommand(), []string{"--config", s.config, "/nonexistent/a"}, "/nonexistent/a"},
		{importCommand(), []string{"--config", s.config, "--format", "xml"}, "--format: 'xml' is none: want archive, csv or json"},
		{importCommand(), []string{"--config", "-"}, "cannot both come from standard input"},
	} {
		_, _, err := moveRun(t, tt.cmd, nil, tt.args...)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s %q: %v, want %q", tt.cmd.Name(), tt.args, err, tt.want)
		}
	}
	if got := string(mustRead(t, kept)); got != "kept" {
		t.Errorf("the archive of before is now %q", got)
	}
	if files, err := os.ReadDir(filepath.Dir(kept)); err != nil || len(files) != 1 {
		t.Errorf("left behind: %v %v", files, err)
	}
	out, _, err := moveRun(t, importCommand(), []byte("platform,appid,refresh_token\nwx1111111111111111,wx1,hidden\n"), "--config", s.config, "--format", "csv")
	if err == nil || err.Error() != "1 were refused" || !strings.Contains(out, "refused: line 2: appid: not an appid") {
		t.Errorf("%s %v", out, err)
	}
}

// TestExportWithoutADamagedRecord: what cannot be read is said, and all else is in the archive.
func TestExportWithoutADamagedRecord(t *testing.T) {
	t.Parallel()
	s := newMoveStore(t, "", moveSealKey).fill(t, 2)
	damaged := 0
	err := filepath.WalkDir(s.folder, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.Contains(path, "wx0000000000000001") && !strings.Contains(path, "lock") {
			damaged++
			return os.WriteFile(path, []byte("damaged"), 0o600)
		}
		return err
	})
	if err != nil || damaged != 1 {
		t.Fatalf("%v, %d records", err, damaged)
	}
	_, talk, err := moveRun(t, exportCommand(), nil, "--config", s.config, filepath.Join(t.TempDir(), "gateway.archive"))
	if err == nil || err.Error() != "1 record could not be read and is not in the archive" || !strings.Contains(talk, "authorizers: 1 exported, 1 refused") {
		t.Errorf("%v\n%s", err, talk)
	}
}
