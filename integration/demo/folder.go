package main

import (
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// markFile is in each folder that is a demo's: the address at which the demo can be asked whether it still runs, and what it
// says then.
const markFile = ".caddy-wechat-demo"

// markTimeout is how long the question and its answer may take.
const markTimeout = 2 * time.Second

// takeRunFolder empties a folder of what an earlier show left, whose secrets were other ones, and keeps it for this demo until
// release. It refuses a folder that is not ours, and one whose demo runs, or starts at this moment.
func takeRunFolder(dir string) (release func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	unlock, free, err := lockFolder(dir)
	if err != nil {
		return nil, err
	}
	if !free {
		return nil, errTaken(dir)
	}
	unmark, err := emptyRunFolder(dir)
	if err != nil {
		unlock()
		return nil, err
	}
	return func() { unmark(); unlock() }, nil
}

func errTaken(dir string) error {
	return fmt.Errorf("another demonstration runs in %s: end it first, or start this one with bin/demo -dir FOLDER", dir)
}

// emptyRunFolder takes a folder that is locked. The folder itself stays, for so does the lock.
func emptyRunFolder(dir string) (release func(), err error) {
	mark := filepath.Join(dir, markFile)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	if len(entries) > 0 {
		if _, err := os.Stat(mark); err != nil {
			return nil, fmt.Errorf("%s holds something else: name an empty folder with bin/demo -dir FOLDER", dir)
		}
		if runs(mark) {
			return nil, errTaken(dir)
		}
	}
	// The mark goes last: a demo that ends in between leaves a folder that is still known as ours.
	for _, e := range entries {
		if e.Name() == markFile {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") // ends with the process, however that ends
	if err != nil {
		return nil, err
	}
	name := rand.Text()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.SetDeadline(time.Now().Add(markTimeout))
			_, _ = io.WriteString(conn, name)
			_ = conn.Close()
		}
	}()
	release = func() {
		_ = l.Close()
		<-done
	}
	if err := os.WriteFile(mark, []byte(l.Addr().String()+"\n"+name+"\n"), 0o600); err != nil {
		release()
		return nil, err
	}
	return release, nil
}

// runs reports whether the demo that left a mark still runs.
func runs(mark string) bool {
	content, err := os.ReadFile(mark)
	if err != nil {
		return false
	}
	address, name, _ := strings.Cut(strings.TrimSpace(string(content)), "\n")
	conn, err := net.DialTimeout("tcp", address, markTimeout)
	if err != nil {
		return false
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(time.Now().Add(markTimeout))
	said, _ := io.ReadAll(io.LimitReader(conn, int64(len(name))+1))
	return name != "" && string(said) == name // else something else has the port now
}
