//go:build unix

package tokens

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// A spill folder on a disk that hangs, like the store, keeps no renewed token from serving from memory.
func TestSpillFolderHangs(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	r.env.Spill = filepath.Join(t.TempDir(), "spill")
	r.wx.rotate = true
	r.Use(r.env)
	r.ticket(t, testPlatform)
	keys := []Key{testAuthKey, AuthorizerKey(testPlatform, appidOf(1))}
	for _, k := range keys {
		r.authorize(t, testPlatform, k.AppID)
	}
	r.store.fail(noAuthorizers)
	if err := os.MkdirAll(r.env.Spill, 0o700); err != nil {
		t.Fatal(err)
	}
	var fifos []string
	for _, k := range keys {
		fifo := filepath.Join(r.env.Spill, spillName(k)+".tmp")
		if err := syscall.Mkfifo(fifo, 0o600); err != nil {
			t.Fatal(err)
		}
		fifos = append(fifos, fifo)
	}
	defer func() { // the disk answers again, before the manager closes
		for _, fifo := range fifos {
			if fd, err := syscall.Open(fifo, syscall.O_RDONLY|syscall.O_NONBLOCK, 0); err == nil {
				defer func() { _ = syscall.Close(fd) }()
			}
			if err := os.Remove(fifo); err != nil && !errors.Is(err, fs.ErrNotExist) { // the writer may have been faster
				t.Error(err)
			}
		}
		r.store.fail(nil)
		r.Close() // before the folder is removed: the disk has more to do now
		waitUntil(t, "the disk is still at work", func() bool { return !r.locks.taken(spillLock(r.env.Spill)) })
	}()
	for _, k := range keys {
		ctx, cancel := context.WithTimeout(t.Context(), 12*time.Second)
		if _, err := r.Renew(ctx, k, secret.String{}); err != nil {
			t.Errorf("%s: %v", k.AppID, err)
		}
		cancel()
	}
	if r.Unsaved() != 2 {
		t.Errorf("%d unsaved", r.Unsaved())
	}
}

// hangingSpill makes a spill folder on a disk that hangs when it is read. Answer lets the disk answer.
func hangingSpill(t *testing.T, folder string) (answer func()) {
	t.Helper()
	if err := os.MkdirAll(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(folder, "0"+spillSuffix) // read first
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	return sync.OnceFunc(func() {
		for end := time.Now().Add(20 * time.Second); ; { // a writer that comes before the reader is not let in
			fd, err := syscall.Open(fifo, syscall.O_WRONLY|syscall.O_NONBLOCK, 0)
			if err == nil {
				_ = syscall.Close(fd)
				return
			}
			if !errors.Is(err, syscall.ENXIO) || time.Now().After(end) {
				t.Error(err)
				return
			}
			runtime.Gosched()
		}
	})
}

// waitUntil waits for what happens outside a bubble.
func waitUntil(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal(what)
		}
	}
}

// A reload that changes the spill folder to one on a disk that hangs ends, and stops nothing meanwhile. What the disk has
// counts once it answers, although an older record has been read from the store.
func TestReloadWithASpillFolderThatHangs(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	first, second := t.TempDir(), filepath.Join(t.TempDir(), "spill")
	r.env.Spill = second
	r.wx.rotate, r.wx.strict = true, true
	r.Use(r.env)
	r.ticket(t, testPlatform)
	r.authorize(t, testPlatform, testAuthorizer)
	r.store.fail(noAuthorizers)
	spilled, err := r.Renew(t.Context(), testAuthKey, secret.String{})
	if err != nil {
		t.Fatal(err)
	}
	if files := r.files(t); len(files) != 1 || r.Unsaved() != 0 {
		t.Fatalf("spilled: %v, %d unsaved", files, r.Unsaved())
	}
	env := *r.env
	env.Spill = first
	r.env = &env
	r.crash(t, nil) // the next process has another folder at first, and does not know of the record
	before := r.get(t, testAuthKey)
	if before.Value.Same(spilled.Value) {
		t.Fatal("the record is known")
	}
	answer := hangingSpill(t, second)
	defer answer()
	other := AuthorizerKey(testPlatform, appidOf(1))
	next := env
	next.Spill = second
	reloaded := make(chan struct{})
	start := time.Now()
	go func() {
		defer close(reloaded)
		r.Use(&next)
	}()
	waitUntil(t, "the reload does not read the folder", func() bool { return r.locks.taken(spillLock(second)) })
	ctx, cancel := context.WithTimeout(t.Context(), storeTimeout/2)
	defer cancel()
	if _, err := r.ExchangeAuthCode(ctx, testPlatform, other.AppID, r.newCode(other.AppID)); err != nil {
		t.Errorf("while the reload goes on: %v", err)
	}
	if _, err := r.Renew(ctx, other, secret.String{}); err != nil {
		t.Errorf("while the reload goes on: %v", err)
	}
	select {
	case <-reloaded:
		t.Fatal("the disk did not hang")
	default:
	}
	<-reloaded
	if took := time.Since(start); took > 4*storeTimeout {
		t.Errorf("the reload took %v", took)
	}
	if got := r.get(t, testAuthKey); !got.Value.Same(before.Value) || r.log.count("disk of the spill folder does not answer") != 1 {
		t.Errorf("the log: %s", r.log)
	}
	if n := r.Waiting(); n != 0 {
		t.Fatalf("%d records wait", n)
	}
	answer()
	waitUntil(t, "the record that was spilled is not written", func() bool { return r.stored(t, testAuthKey).AccessToken.Same(spilled.Value) })
	waitUntil(t, "it waits still", func() bool { return r.Waiting() == 0 })
	waitUntil(t, "the older token is served", func() bool { return r.get(t, testAuthKey).Value.Same(spilled.Value) })
	r.wantInStep(t)
}

// A spill folder whose disk hangs is mended by another one.
func TestSpillFolderThatHangsIsReplaced(t *testing.T) {
	t.Parallel()
	r := newRig(t)
	hung := t.TempDir()
	answer := hangingSpill(t, hung)
	defer answer()
	r.env.Spill = hung
	r.Use(r.env)
	r.ticket(t, testPlatform)
	r.authorize(t, testPlatform, testAuthorizer)
	r.store.fail(noAuthorizers)
	if _, err := r.Renew(t.Context(), testAuthKey, secret.String{}); err != nil {
		t.Fatal(err)
	}
	if r.Unsaved() != 1 {
		t.Errorf("%d unsaved", r.Unsaved())
	}
	env := *r.env
	env.Spill = t.TempDir()
	r.env = &env
	r.Use(r.env)
	if files := r.files(t); len(files) != 1 || r.Unsaved() != 0 {
		t.Errorf("spilled: %v, %d unsaved", files, r.Unsaved())
	}
	r.store.fail(nil)
}
