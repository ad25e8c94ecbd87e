package main

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// TestTakeRunFolderAtOnce: of demos that start in the same instant in one folder one gets it, and the others say why they do not.
func TestTakeRunFolderAtOnce(t *testing.T) {
	t.Parallel()
	for _, earlier := range []bool{false, true} {
		dir := filepath.Join(t.TempDir(), "demo")
		if earlier { // one has ended there
			release, err := takeRunFolder(dir)
			if err != nil {
				t.Fatal(err)
			}
			release()
			if err := os.MkdirAll(filepath.Join(dir, "data", "caddy"), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		const demos = 16
		var all sync.WaitGroup
		start := make(chan struct{})
		releases, errs := make([]func(), demos), make([]error, demos)
		for i := range demos {
			all.Go(func() {
				<-start
				releases[i], errs[i] = takeRunFolder(dir)
			})
		}
		close(start)
		all.Wait()
		won := 0
		for i, err := range errs {
			switch {
			case err == nil:
				won++
				defer releases[i]()
			case !strings.Contains(err.Error(), "another demonstration runs in "+dir):
				t.Error(err)
			}
		}
		if entries, _ := os.ReadDir(dir); won != 1 || len(entries) != 1 || !runs(filepath.Join(dir, markFile)) {
			t.Errorf("an earlier one %t: %d of %d run, the folder has %v", earlier, won, demos, entries)
		}
	}
}

func TestTakeRunFolderOfOthers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "letter.txt")
	if err := os.WriteFile(file, []byte("dear"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := takeRunFolder(dir); err == nil || !strings.Contains(err.Error(), "holds something else") {
		t.Error(err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	for range 2 { // free again after the first
		release, err := takeRunFolder(dir)
		if err != nil {
			t.Fatal(err)
		}
		release()
	}
}
