package caddymodule

import (
	"fmt"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"
)

// maxPageURL bounds the address of a page, in bytes.
const maxPageURL = 4096

// pageShape is an address as a browser shows it. Nothing in it can be read in two ways: the authority holds a name and
// a port alone, and all of it is printable ASCII.
var pageShape = regexp.MustCompile(`^(https?)://([A-Za-z0-9._-]+)(?::([0-9]{1,5}))?([/?][!-\[\]-~]*)?$`)

// pageParts is an address taken apart.
type pageParts struct{ scheme, host, port, rest string }

// parsePage takes the address of a page, or an origin, apart. It has no fragment.
func parsePage(address string) (pageParts, bool) {
	m := pageShape.FindStringSubmatch(address)
	if m == nil {
		return pageParts{}, false
	}
	return pageParts{m[1], m[2], m[3], m[4]}, true
}

// hostPort names the host in a log.
func (p pageParts) hostPort() string {
	if p.port == "" {
		return p.host
	}
	return p.host + ":" + p.port
}

// pageAddress reads the address to sign from a raw query: decoded once, and without its fragment.
func pageAddress(raw string) (string, *jssdkFailure) {
	value, found := "", 0
	for segment := range strings.SplitSeq(raw, "&") {
		if found == 1 && strings.Contains(value, "?") {
			return "", jssdkNotEncoded // or the page's own query goes on here
		}
		if name, v, _ := strings.Cut(segment, "="); queryUnescape(name) == "url" {
			value, found = v, found+1
		}
	}
	switch {
	case value == "":
		return "", jssdkNoURL
	case found > 1:
		return "", jssdkTwoURLs
	case len(value) > 3*maxPageURL: // percent-encoded throughout
		return "", jssdkLongURL
	}
	address, err := url.QueryUnescape(value)
	if err != nil {
		return "", jssdkNotPage
	}
	address, _, _ = strings.Cut(address, "#")
	if len(address) > maxPageURL {
		return "", jssdkLongURL
	}
	return address, nil
}

// hostPattern is a host whose pages are signed.
type hostPattern struct {
	labels []string // in lower case; * is any one
	port   string   // empty: the port of the scheme
}

var hostLabelShape = regexp.MustCompile(`^[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?$`)

// hostMistakes are what an input method writes between names or around them. Other characters may be in a name.
const hostMistakes = "，、。；：．｡“”‘’„‚«»‹›「」『』＂＇"

// parseHostPattern reads a host as it is configured. A wildcard stands for one whole label, as in Caddy's own host
// matcher, but for none of the last two: pages of half the world would be signed.
func parseHostPattern(s string) (hostPattern, error) {
	if strings.Contains(s, "/") {
		return hostPattern{}, fmt.Errorf("'%s' is not a host: leave out scheme and path, as in shop.example.com", s)
	}
	host, port, hasPort := strings.Cut(s, ":")
	if n, err := strconv.Atoi(port); hasPort && (err != nil || n < 1 || n > 65535 || strconv.Itoa(n) != port) {
		return hostPattern{}, fmt.Errorf("'%s' has no port after its colon: want a number up to 65535, as in localhost:8080", s)
	}
	if i := strings.IndexAny(host, hostMistakes); i >= 0 {
		c, _ := utf8.DecodeRuneInString(host[i:])
		return hostPattern{}, fmt.Errorf("'%s' is not a host: it has '%c' in it; write dots as '.', and put blanks between hosts", s, c)
	}
	ascii, err := idna.ToASCII(host) // browsers show a page the ASCII form of its host
	if err != nil {
		return hostPattern{}, fmt.Errorf("'%s' is not a host", s)
	}
	p := hostPattern{labels: strings.Split(strings.ToLower(ascii), "."), port: port}
	for i, label := range p.labels {
		switch {
		case label == "*" && i >= len(p.labels)-2:
			return hostPattern{}, fmt.Errorf("'%s' would take in everybody's domains: a '*' needs two labels after it, as in *.example.com", s)
		case label == "*", hostLabelShape.MatchString(label):
		case strings.Contains(label, "*"):
			return hostPattern{}, fmt.Errorf("'%s': a '*' stands for one whole label, as in *.example.com", s)
		default:
			return hostPattern{}, fmt.Errorf("'%s' is not a host: want a name such as shop.example.com or *.example.com", s)
		}
	}
	return p, nil
}

// literalHostPattern judges a host that no placeholder hides.
func literalHostPattern(s string) error {
	_, err := parseHostPattern(s)
	return err
}

// schemePorts are the ports that an address need not name.
var schemePorts = map[string]string{"http": "80", "https": "443"}

// covers reports whether a page is on the host.
func (p hostPattern) covers(page pageParts) bool {
	want, got := p.port, page.port
	if want == "" {
		want = schemePorts[page.scheme]
	}
	if got == "" {
		got = schemePorts[page.scheme]
	}
	labels := strings.Split(strings.ToLower(page.host), ".")
	if want != got || len(labels) != len(p.labels) {
		return false
	}
	for i, label := range labels {
		if label == "" || p.labels[i] != "*" && p.labels[i] != label {
			return false
		}
	}
	return true
}
