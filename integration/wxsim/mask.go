package wxsim

import (
	"net/http"
	"net/url"
	"strings"
)

// mask replaces every known secret value in text by its kind. It looks at whole runs of the
// characters that values are made of, so its cost does not grow with what was issued. The
// caller holds mu.
func (s *Server) mask(text string) string {
	var out strings.Builder
	for len(text) > 0 {
		end := strings.IndexFunc(text, func(r rune) bool { return !isValueRune(r) })
		if end < 0 {
			end = len(text)
		}
		if end == 0 {
			end = strings.IndexFunc(text, isValueRune)
			if end < 0 {
				end = len(text)
			}
			out.WriteString(text[:end])
			text = text[end:]
			continue
		}
		run, tail := strings.CutSuffix(text[:end], apiSuffix)
		out.WriteString(s.nameOf(run))
		if tail {
			out.WriteString(apiSuffix)
		}
		text = text[end:]
	}
	return out.String()
}

// nameOf returns what stands for a value in the journal. The caller holds mu.
func (s *Server) nameOf(value string) string {
	if c := s.creds[value]; c != nil {
		return "<" + string(c.kind) + ">"
	}
	if s.configured[value] {
		return "<secret>"
	}
	return value
}

func isValueRune(r rune) bool {
	return r == '_' || r == '-' || r == '@' || '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z'
}

// maskQuery replaces the secret values of a raw query. The caller holds mu.
func (s *Server) maskQuery(raw string) string {
	if raw == "" {
		return ""
	}
	parts := strings.Split(raw, "&")
	for i, part := range parts {
		key, value, ok := strings.Cut(part, "=")
		if !ok {
			continue
		}
		if plain, err := url.QueryUnescape(value); err == nil && s.nameOf(plain) != plain {
			parts[i] = key + "=" + s.nameOf(plain)
		}
	}
	return strings.Join(parts, "&")
}

// journalHeader is a copy of h without the values that would be secrets.
func journalHeader(h http.Header) http.Header {
	h = h.Clone()
	for _, name := range []string{"Authorization", "Proxy-Authorization", "Cookie"} {
		if h.Get(name) != "" {
			h.Set(name, "<present>")
		}
	}
	return h
}
