package main

import (
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"unicode/utf8"
)

// clip shortens what is too long for a screen.
func clip(b []byte) string {
	const most = 150
	text := strings.NewReplacer("\n", "", "\r", "").Replace(string(b))
	if len(text) <= most {
		return text
	}
	cut := most
	for !utf8.RuneStart(text[cut]) {
		cut--
	}
	return fmt.Sprintf("%s… (%d bytes)", text[:cut], len(b))
}

// jsonField reads one text of a JSON answer.
func jsonField(body []byte, name string) (string, error) {
	var m map[string]any
	if err := json.Unmarshal(body, &m); err != nil {
		return "", fmt.Errorf("%s: %w", body, err)
	}
	text, ok := m[name].(string)
	if !ok {
		return "", fmt.Errorf("no %s in %s", name, body)
	}
	return text, nil
}

// hideCode keeps a code, which is used up anyway, off the screen.
func hideCode(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return address
	}
	return strings.ReplaceAll(address, u.Query().Get("code"), "<code>")
}

func tlsVersion(v uint16) string { return tls.VersionName(v) }

// tail is the last lines of a log.
func tail(text string, lines int) string {
	all := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
