package caddymodule

import (
	"bytes"
	"context"
	"io"
	"log"
	"time"
)

// unsolicited is how net/http begins a line about bytes that a server sent behind an answer, in the log of package log, which Caddy puts
// into its own. It quotes the bytes, and they may repeat the request that they follow on, with a token in its URL.
const unsolicited = "Unsolicited response received on idle HTTP channel"

// unquotedLog is the writer of package log without what such lines quote.
type unquotedLog struct{ to io.Writer }

func (l unquotedLog) Write(line []byte) (int, error) {
	kept := line
	if i := bytes.Index(line, []byte(unsolicited)); i >= 0 {
		kept = append(bytes.Clone(line[:i+len(unsolicited)]), '\n')
	}
	if _, err := l.to.Write(kept); err != nil {
		return 0, err
	}
	return len(line), nil
}

// unquoteEvery is how often it is looked whether package log writes such quotes again.
const unquoteEvery = time.Second

// unquoteLog has package log write no such quotes. Caddy sets its writer anew with each configuration, before the apps are provisioned.
func unquoteLog() {
	if to := log.Writer(); !isUnquoted(to) {
		log.SetOutput(unquotedLog{to})
	}
}

func isUnquoted(to io.Writer) bool { _, is := to.(unquotedLog); return is }

// keepLogUnquoted does that until ctx ends: after a configuration that failed before the app was reached, the one before goes on with
// the writer that Caddy had set for it.
func keepLogUnquoted(ctx context.Context) {
	look := time.NewTicker(unquoteEvery)
	defer look.Stop()
	for {
		select {
		case <-look.C:
			unquoteLog()
		case <-ctx.Done():
			return
		}
	}
}
