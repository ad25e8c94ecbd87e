package caddymodule

import (
	"bytes"
	"io"
	"log"
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

// unquoteLog has package log write no such quotes. Caddy sets its writer anew with each configuration, before the apps are provisioned.
func unquoteLog() {
	if _, done := log.Writer().(unquotedLog); !done {
		log.SetOutput(unquotedLog{log.Writer()})
	}
}
