package tokens

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/caddy-wechat/caddy-wechat/crypto"
)

const (
	testFile    = "MP_verify_a1B2c3D4e5F6g7H8.txt"
	testContent = "a1B2c3D4e5F6g7H8"
)

func (r *rig) put(t *testing.T, name, content string) {
	t.Helper()
	if _, err := r.PutVerifyFile(t.Context(), name, []byte(content)); err != nil {
		t.Fatalf("PutVerifyFile: %v", err)
	}
}

// served is the content of a file as m serves it; "" if it does not.
func served(t *testing.T, m *Manager, name string) string {
	t.Helper()
	content, found, err := m.VerifyFile(t.Context(), name)
	if err != nil {
		t.Fatalf("VerifyFile(%s): %v", name, err)
	}
	if found != (content != nil) {
		t.Errorf("found %v, content %q", found, content)
	}
	return string(content)
}

func TestVerifyFileLasts(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		if got := served(t, r.Manager, testFile); got != "" {
			t.Fatalf("served %q before there was anything", got)
		}
		added, err := r.PutVerifyFile(t.Context(), testFile, []byte("\ufeffexact\r\n"))
		if err != nil || !added {
			t.Fatalf("added %v, %v", added, err)
		}
		if got := served(t, r.Manager, testFile); got != "\ufeffexact\r\n" {
			t.Errorf("served %q at once", got)
		}
		if added, err := r.PutVerifyFile(t.Context(), testFile, []byte(testContent)); err != nil || added {
			t.Errorf("a second time: added %v, %v", added, err)
		}
		r.restart()
		if got := served(t, r.Manager, testFile); got != testContent {
			t.Errorf("served %q after a restart", got)
		}
		if got := served(t, r.Manager, strings.ToUpper(testFile[:len(testFile)-4])+".txt"); got != "" {
			t.Errorf("served %q under a name of other case", got)
		}
		r.put(t, "87PweoaRBw.txt", "x")
		all, err := r.VerifyFiles(t.Context())
		if err != nil || len(all) != 2 || all[0].Name != "87PweoaRBw.txt" || string(all[1].Content) != testContent || all[1].AddedAt.IsZero() {
			t.Errorf("files %v, %v", all, err)
		}
		for _, want := range []bool{true, false} {
			if found, err := r.DeleteVerifyFile(t.Context(), testFile); err != nil || found != want {
				t.Errorf("deleted: found %v, %v", found, err)
			}
		}
		r.restart()
		if got := served(t, r.Manager, testFile); got != "" {
			t.Errorf("served %q although it was deleted", got)
		}
	})
}

// What one node adds, changes or deletes, another one on the same store shows a second later, also to those who asked for
// the name before.
func TestVerifyFileOnAnotherNode(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		other := NewManager()
		defer other.Close()
		other.Use(r.env)
		for _, want := range []string{"first", "second", ""} {
			_ = served(t, other, testFile)
			var err error
			if want != "" {
				_, err = r.PutVerifyFile(t.Context(), testFile, []byte(want))
			} else {
				_, err = r.DeleteVerifyFile(t.Context(), testFile)
			}
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(verifyFresh)
			if got := served(t, other, testFile); got != want {
				t.Errorf("the other node serves %q, want %q", got, want)
			}
		}
	})
}

// Who listens again has missed what another node did meanwhile, and does not go on believing what it read a moment before.
func TestVerifyFileChangedUnheard(t *testing.T) {
	inCluster(t, func(t *testing.T, a, b *rig, h *hub) {
		for _, want := range []string{"first", "second", ""} {
			_ = served(t, b.Manager, testFile)
			h.set(true)
			if want != "" {
				a.put(t, testFile, want)
			} else if _, err := a.DeleteVerifyFile(t.Context(), testFile); err != nil {
				t.Fatal(err)
			}
			h.set(false)
			atOnce(t, func() {
				if got := served(t, b.Manager, testFile); got != want {
					t.Errorf("serves %q, want %q", got, want)
				}
			})
			time.Sleep(verifyFresh)
		}
	})
}

// Two nodes that add files at the same time lose none.
func TestVerifyFilesAddedAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		other := NewManager()
		defer other.Close()
		other.Use(r.env)
		var wg sync.WaitGroup
		for i := range 40 {
			m := []*Manager{r.Manager, other}[i%2]
			wg.Go(func() {
				if _, err := m.PutVerifyFile(t.Context(), fmt.Sprintf("file%06d.txt", i), []byte("x")); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if all, err := r.VerifyFiles(t.Context()); err != nil || len(all) != 40 {
			t.Errorf("%d files, %v", len(all), err)
		}
	})
}

// Names that nobody registered cost the store a read of each record a second, however many come.
func TestVerifyFileFlood(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.put(t, testFile, testContent)
		reads, started := r.store.count("load"), time.Now()
		for second := range 5 {
			var wg sync.WaitGroup
			for i := range 100 {
				wg.Go(func() {
					for n := range 50 {
						if got := served(t, r.Manager, fmt.Sprintf("MP_verify_%d_%08d_%04d.txt", second, i, n)); got != "" {
							t.Errorf("served %q", got)
						}
					}
				})
			}
			wg.Wait()
			if got := served(t, r.Manager, testFile); got != testContent {
				t.Errorf("served %q during a flood", got)
			}
			time.Sleep(time.Second)
		}
		bound := verifyShards * (int(time.Since(started)/verifyFresh) + 1)
		if n := r.store.count("load") - reads; n > bound {
			t.Errorf("%d reads, the bound is %d", n, bound)
		}
	})
}

// While the store fails or hangs, a file that is known here is served, one that is not is not, and the store is asked
// once a second.
func TestVerifyFileWithoutTheStore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.put(t, testFile, testContent)
		time.Sleep(verifyFresh)
		r.store.fail(func(op, _ string) error {
			if op == "load" {
				return errors.New("broken")
			}
			return nil
		})
		reads := r.store.count("load")
		for i := range 10 {
			content, found, err := r.VerifyFile(t.Context(), testFile)
			if !found || string(content) != testContent {
				t.Errorf("served %q, %v", content, found)
			}
			if (err != nil) != (i == 0) || err != nil && !errors.Is(err, ErrStore) {
				t.Errorf("request %d: %v", i, err)
			}
		}
		if n := r.store.count("load") - reads; n != 1 {
			t.Errorf("%d reads", n)
		}
		if _, err := r.PutVerifyFile(t.Context(), testFile, []byte("lost")); !errors.Is(err, ErrStore) {
			t.Errorf("put: %v", err)
		}
		r.store.fail(nil)
		hang := make(chan struct{})
		r.store.hold(func(op, _ string) {
			if op == "load" {
				<-hang
			}
		})
		defer close(hang)
		time.Sleep(verifyFresh)
		start := time.Now()
		if content, _, err := r.VerifyFile(t.Context(), testFile); err == nil || string(content) != testContent {
			t.Errorf("a store that hangs: %q, %v", content, err)
		}
		if took := time.Since(start); took > verifyTimeout {
			t.Errorf("took %v", took)
		}
	})
}

func TestVerifyFileRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		for _, tt := range []struct{ name, content string }{
			{"robots.txt", "x"}, {"", "x"}, {"../../../etc/passwd", "x"}, {"a1B2c3D4e5.html", "x"}, {"a1B2c3D4e5.txt\n", "x"},
			{strings.Repeat("a", 41) + ".txt", "x"}, {testFile, ""}, {testFile, strings.Repeat("x", MaxVerifyContent+1)},
		} {
			if _, err := r.PutVerifyFile(t.Context(), tt.name, []byte(tt.content)); !errors.Is(err, ErrVerifyFile) {
				t.Errorf("%q with %d bytes: %v", tt.name, len(tt.content), err)
			}
		}
		r.put(t, testFile, strings.Repeat("x", MaxVerifyContent))
		reads := r.store.count("load")
		if got := served(t, r.Manager, "robots.txt"); got != "" || r.store.count("load") != reads {
			t.Errorf("a name of another shape: %q, or the store was read", got)
		}
	})
}

func TestVerifyFilesAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		shard, files := verifyShardOf(testFile), make(map[string]VerifyFile)
		for i := 0; len(files) < maxShardFiles; i++ {
			if name := fmt.Sprintf("file%06d.txt", i); verifyShardOf(name) == shard {
				files[name] = VerifyFile{Name: name, Content: []byte("x")}
			}
		}
		if err := r.storeRecord(t.Context(), r.Manager.env.Load(), verifyShardName(shard), verifyWireOf(files)); err != nil {
			t.Fatal(err)
		}
		if _, err := r.PutVerifyFile(t.Context(), testFile, []byte("x")); !errors.Is(err, ErrVerifyFull) {
			t.Errorf("one too many: %v", err)
		}
		all, err := r.VerifyFiles(t.Context())
		if err != nil || len(all) != maxShardFiles {
			t.Fatalf("%d files, %v", len(all), err)
		}
		r.put(t, all[0].Name, "replaced")
		if found, err := r.DeleteVerifyFile(t.Context(), all[1].Name); err != nil || !found {
			t.Fatal(err)
		}
		r.put(t, testFile, "x")
	})
}

// A record that nothing can read is set aside when a file is added, and the log says what is lost; one that waits for
// its seal key is left alone.
func TestVerifyFilesUnreadable(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := started(t)
		r.put(t, testFile, testContent)
		name := verifyShardName(verifyShardOf(testFile))
		other, err := crypto.NewSealer(bytes.Repeat([]byte{8}, 32))
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := other.Seal(name, []byte(`{"v":1}`))
		if err == nil {
			err = r.store.MemStore.Store(t.Context(), name, sealed)
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.PutVerifyFile(t.Context(), testFile, []byte("x")); !errors.Is(err, errUnreadable) || errors.Is(err, errDamaged) {
			t.Errorf("a record under another key: %v", err)
		}
		if err := r.store.MemStore.Store(t.Context(), name, []byte(`{"v":99}`)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(verifyFresh)
		if _, found, err := r.VerifyFile(t.Context(), testFile); !errors.Is(err, errDamaged) || !found {
			t.Errorf("a damaged record: found %v, %v", found, err)
		}
		r.put(t, testFile, "again")
		if got := served(t, r.Manager, testFile); got != "again" {
			t.Errorf("served %q", got)
		}
		if r.log.count("have to be added again") != 1 {
			t.Error("the log does not say what is lost")
		}
		r.Close()
		if _, err := r.PutVerifyFile(context.Background(), testFile, []byte("x")); !errors.Is(err, ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	})
}
