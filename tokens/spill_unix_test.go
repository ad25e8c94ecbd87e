//go:build unix

package tokens

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
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
		time.Sleep(100 * time.Millisecond)
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
