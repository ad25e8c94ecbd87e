package tokens

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// spilling is started with a spill folder, an authorizer, refresh tokens that rotate and are void at once, and a store
// that takes no records of tokens any more.
func spilling(t *testing.T) *rig {
	t.Helper()
	r := newRig(t)
	r.env.Spill = filepath.Join(t.TempDir(), "deep", "spill")
	r.wx.rotate, r.wx.strict = true, true
	r.Use(r.env)
	r.ticket(t, testPlatform)
	r.ticket(t, testPlatform2)
	r.authorize(t, testPlatform, testAuthorizer)
	r.store.fail(noAuthorizers)
	return r
}

// TestSpillNames: a file is found by the version after, whose name for it must be the same.
func TestSpillNames(t *testing.T) {
	t.Parallel()
	for k, want := range map[Key]string{
		testAuthKey:                "1f22d7ce6880054e6afeaa963131b884.record",
		AccountKey(testAccount):    "e1811cc60e29d1640d6fbc3ce8689aff.record",
		ComponentKey(testPlatform): "4fcd15c6df106499dd92a55448ffa49d.record",
	} {
		if got := spillName(k); got != want {
			t.Errorf("%v: %s, want %s", k, got, want)
		}
	}
}

// A file is removed once the store has its record, unless another one of the same key has come to wait meanwhile, or the folder is
// another one by now.
func TestSpillFileIsNeededWhileItsKeyWaits(t *testing.T) {
	t.Parallel()
	first, second := &record{Gen: 1}, &record{Gen: 2}
	for name, tt := range map[string]struct {
		meanwhile func(p *pendingRecords)
		unneeded  bool
	}{
		"nothing waits":       {func(*pendingRecords) {}, true},
		"another one waits":   {func(p *pendingRecords) { p.put(testAuthKey, second, time.Time{}) }, false},
		"another folder":      {func(p *pendingRecords) { p.moved("elsewhere") }, false},
		"removed by somebody": {func(p *pendingRecords) { p.unneeded("folder", testAuthKey) }, false},
	} {
		p := new(pendingRecords)
		p.moved("folder")
		p.put(testAuthKey, first, time.Time{})
		p.spilled("folder", testAuthKey, first)
		p.stored(testAuthKey, first)
		if folder, left := p.leftOver(testAuthKey); folder != "folder" || !left {
			t.Fatalf("%s: in %q, left over: %v", name, folder, left)
		}
		tt.meanwhile(p)
		if got := p.unneeded("folder", testAuthKey); got != tt.unneeded {
			t.Errorf("%s: unneeded: %v", name, got)
		}
	}
}

// noAuthorizers is a store without room for the records of authorizers.
func noAuthorizers(op, name string) error {
	if op == "store" && strings.Contains(name, "/authorizer/") {
		return errors.New("disk full")
	}
	return nil
}

// files are the names in the spill folder.
func (r *rig) files(t *testing.T) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(r.env.Spill)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// crash abandons the manager, as kill -9 does: what it would still write, the store does not take.
func (r *rig) crash(t *testing.T, down func(op, name string) error) {
	t.Helper()
	dead := r.Manager
	lost := errors.New("the process is dead")
	r.store.fail(func(string, string) error { return lost })
	dead.Close() // its goroutines have to end with the bubble; its spill file is put back below
	r.store.fail(down)
	r.Manager = NewManager()
	r.Use(r.env)
}

// What the store does not take survives the process in the spill folder, sealed, and moves to the store when it can.
func TestSpillSurvivesACrash(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := spilling(t)
		r.wx.kill(r.get(t, testAuthKey))
		token, err := r.Renew(t.Context(), testAuthKey, secret.String{})
		if err != nil {
			t.Fatalf("Renew: %v", err)
		}
		if r.Unsaved() != 0 || r.Waiting() != 1 {
			t.Errorf("%d unsaved, %d waiting", r.Unsaved(), r.Waiting())
		}
		if n := r.log.count("waits in this node's spill folder"); n != 1 {
			t.Errorf("said %d times", n)
		}
		files := r.files(t)
		if len(files) != 1 {
			t.Fatalf("spilled: %v", files)
		}
		full := filepath.Join(r.env.Spill, files[0])
		info, err := os.Stat(full)
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, %v", info.Mode(), err)
		}
		if dir, err := os.Stat(r.env.Spill); err != nil || dir.Mode().Perm() != 0o700 {
			t.Errorf("folder's mode %v, %v", dir.Mode(), err)
		}
		data, err := os.ReadFile(full)
		if err != nil || bytes.Contains(data, []byte("token")) || bytes.Contains(data, []byte(testAuthorizer)) {
			t.Errorf("not sealed: %v", err)
		}
		r.crash(t, noAuthorizers)
		if got := r.get(t, testAuthKey); !got.Value.Same(token.Value) {
			t.Error("another token after the crash")
		}
		if r.Unsaved() != 0 || r.Waiting() != 1 {
			t.Errorf("after the crash: %d unsaved, %d waiting", r.Unsaved(), r.Waiting())
		}
		r.store.fail(nil)
		time.Sleep(2 * time.Minute)
		if files := r.files(t); len(files) != 0 || r.Waiting() != 0 {
			t.Errorf("still spilled: %v, %d waiting", files, r.Waiting())
		}
		r.wx.set(func(f *fakeWeChat) {
			if r.stored(t, testAuthKey).RefreshToken.Reveal() != f.refresh[testAuthorizer] {
				t.Error("the store does not have WeChat's refresh token")
			}
		})
		// The next one replaces it in the same way.
		r.restart()
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Errorf("Renew: %v", err)
		}
	})
}

// A renewal that began before the folder was changed does not leave its record in the old one.
func TestSpillFolderChangesDuringARenewal(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := spilling(t)
		r.wx.kill(r.get(t, testAuthKey))
		r.wx.set(func(f *fakeWeChat) { f.latency = 5 * time.Second })
		renewed := make(chan error, 1)
		go func() {
			_, err := r.Renew(t.Context(), testAuthKey, secret.String{})
			renewed <- err
		}()
		time.Sleep(time.Second)
		env := *r.env
		old := env.Spill
		env.Spill = filepath.Join(t.TempDir(), "another")
		r.env = &env
		r.Use(r.env)
		if err := <-renewed; err != nil {
			t.Fatal(err)
		}
		left, err := os.ReadDir(old)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if files := r.files(t); len(files) != 1 || len(left) != 0 || r.Unsaved() != 0 {
			t.Errorf("%d files in the new folder, %d in the old one, %d unsaved", len(files), len(left), r.Unsaved())
		}
	})
}

// Where the folder cannot be written either, the log shouts and the record counts as unsaved, until one of them can.
func TestSpillFolderFails(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := spilling(t)
		if err := os.WriteFile(filepath.Dir(filepath.Dir(r.env.Spill))+"/deep", nil, 0o600); err != nil { // in the folder's place
			t.Fatal(err)
		}
		r.wx.kill(r.get(t, testAuthKey))
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Fatalf("Renew: %v", err)
		}
		if r.Unsaved() != 1 || r.log.count("neither to the store nor to the spill folder") != 1 {
			t.Errorf("%d unsaved: %s", r.Unsaved(), r.log)
		}
		if err := os.Remove(filepath.Dir(r.env.Spill)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		if r.Unsaved() != 0 || len(r.files(t)) != 1 {
			t.Errorf("%d unsaved, spilled: %v", r.Unsaved(), r.files(t))
		}
	})
}

// A spill file that is older than the store is dropped; one that is damaged, or not its own, is left for people.
func TestSpillFilesAreNotBelievedBlindly(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := spilling(t)
		r.wx.kill(r.get(t, testAuthKey))
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Fatalf("Renew: %v", err)
		}
		name := r.files(t)[0]
		old, err := os.ReadFile(filepath.Join(r.env.Spill, name))
		if err != nil {
			t.Fatal(err)
		}
		r.store.fail(nil)
		time.Sleep(2 * time.Minute)
		current, err := r.Renew(t.Context(), testAuthKey, secret.String{})
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		put := func(name string, data []byte) {
			if err := os.WriteFile(filepath.Join(r.env.Spill, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		put(name, old)
		put(name+".tmp", []byte("half of a fi"))
		put("notes.txt", []byte("kept by a person"))
		put(strings.Repeat("0", 32)+spillSuffix, old)
		put(strings.Repeat("1", 32)+spillSuffix, nil)
		r.Manager = NewManager()
		r.Use(r.env)
		if got := r.get(t, testAuthKey); !got.Value.Same(current.Value) {
			t.Error("an old record came back")
		}
		time.Sleep(2 * time.Minute)
		want := strings.Repeat("0", 32) + spillSuffix + spillBroken + " " + strings.Repeat("1", 32) + spillSuffix + spillBroken + " " + name + ".tmp notes.txt"
		if got := strings.Join(r.files(t), " "); got != want {
			t.Errorf("left: %s\nwant: %s", got, want)
		}
		if n := r.log.count("a spill file cannot be read"); n != 2 {
			t.Errorf("%d files were complained of", n)
		}
	})
}

// Spill files open with an old seal key, and without one they are as unsealed as the store.
func TestSpillFilesFollowTheSealKeys(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := spilling(t)
		r.wx.kill(r.get(t, testAuthKey))
		token, err := r.Renew(t.Context(), testAuthKey, secret.String{})
		if err != nil {
			t.Fatalf("Renew: %v", err)
		}
		r.env.Sealer, _ = crypto.NewSealer(bytes.Repeat([]byte{8}, 32), bytes.Repeat([]byte{7}, 32))
		r.crash(t, noAuthorizers)
		if got := r.get(t, testAuthKey); !got.Value.Same(token.Value) {
			t.Error("another token after the crash")
		}
	})
}

// Tokens that are replaceable are spilled like the others, and a node without a folder says what that means.
func TestNoSpillFolder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.authorize(t, testPlatform, testAuthorizer)
		r.store.fail(noAuthorizers)
		r.wx.kill(r.get(t, testAuthKey))
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Fatalf("Renew: %v", err)
		}
		if r.Unsaved() != 1 || r.log.count("serves from memory and would be lost with the process") != 1 {
			t.Errorf("%d unsaved: %s", r.Unsaved(), r.log)
		}
	})
}

// What waits in the spill folder is written at the end if the store takes it by then: this node may not come back.
func TestCloseWritesWhatIsSpilled(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := spilling(t)
		if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
			t.Fatal(err)
		}
		r.store.fail(nil)
		r.Close()
		if n := len(r.files(t)); n != 0 {
			t.Errorf("%d files are left although the store could be written", n)
		}
	})
}

// Files that the seal key of the start does not open are read once a reload brings the right one.
func TestSpillIsReadWithTheRightKey(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := spilling(t)
		token, err := r.Renew(t.Context(), testAuthKey, secret.String{})
		if err != nil {
			t.Fatal(err)
		}
		right := r.env.Sealer
		r.env.Sealer, _ = crypto.NewSealer(bytes.Repeat([]byte{9}, 32))
		r.crash(t, nil)
		time.Sleep(time.Minute)
		next := *r.env
		next.Sealer = right
		r.env = &next
		r.Use(r.env)
		if got := r.get(t, testAuthKey); !got.Value.Same(token.Value) {
			t.Error("the spilled record is not used")
		}
		time.Sleep(2 * time.Minute)
		if n := len(r.files(t)); n != 0 {
			t.Errorf("%d files are left", n)
		}
	})
}
