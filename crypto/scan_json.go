package crypto

import (
	"bytes"
	"encoding/binary"
	"unicode/utf16"
	"unicode/utf8"
)

// beginJSON checks the encoding of the whole body, which the rest then relies on, and enters the object.
func (s *scanner) beginJSON() error {
	if !utf8.Valid(s.src) {
		return errEncoding
	}
	s.skipSpace()
	if s.peek() != '{' { // a byte order mark, which JSON forbids
		return errUnknown
	}
	s.pos++
	return nil
}

func (s *scanner) nextJSON() (bool, error) {
	name, more, err := s.memberJSON(!s.begun)
	if err != nil {
		return false, err
	}
	s.name, s.begun = name, true
	if more {
		return true, nil
	}
	s.skipSpace()
	if s.pos < len(s.src) {
		return false, errTrailing
	}
	return false, nil
}

// memberJSON reads a member of an object up to its value, or the object's end.
func (s *scanner) memberJSON(first bool) (name []byte, more bool, err error) {
	s.skipSpace()
	if s.peek() == '}' {
		s.pos++
		return nil, false, nil
	}
	if !first {
		if s.peek() != ',' {
			return nil, false, errSyntax
		}
		s.pos++
		s.skipSpace()
	}
	if name, err = s.stringJSON(true); err != nil {
		return nil, false, err
	}
	s.skipSpace()
	if s.peek() != ':' {
		return nil, false, errSyntax
	}
	s.pos++
	s.skipSpace()
	return name, true, nil
}

func (s *scanner) valueJSON() ([]byte, error) {
	switch c := s.peek(); c {
	case '"':
		return s.stringJSON(true)
	case '{', '[':
		return nil, errNested
	default:
		start := s.pos
		if err := s.scalarJSON(); err != nil {
			return nil, err
		}
		if c == 'n' {
			return s.empty(), nil
		}
		return s.src[start:s.pos:s.pos], nil
	}
}

// skipJSON reads over a value; depth is how many objects and arrays it lies in.
func (s *scanner) skipJSON(depth int) error {
	if depth > maxDepth {
		return errDeep
	}
	switch s.peek() {
	case '"':
		_, err := s.stringJSON(false)
		return err
	case '{':
		return s.skipObject(depth)
	case '[':
		return s.skipArray(depth)
	}
	return s.scalarJSON()
}

func (s *scanner) skipObject(depth int) error {
	s.pos++
	for first := true; ; first = false {
		name, more, err := s.memberJSON(first)
		if err != nil || !more {
			return err
		}
		if s.isEncrypt(name) {
			return errNestedEncrypt
		}
		if err := s.skipJSON(depth + 1); err != nil {
			return err
		}
	}
}

func (s *scanner) skipArray(depth int) error {
	s.pos++
	for first := true; ; first = false {
		more, err := s.itemJSON(first)
		if err != nil || !more {
			return err
		}
		if err := s.skipJSON(depth + 1); err != nil {
			return err
		}
	}
}

// itemJSON goes to the next item of an array, or reads the array's end.
func (s *scanner) itemJSON(first bool) (more bool, err error) {
	s.skipSpace()
	switch c := s.peek(); {
	case c == ']':
		s.pos++
		return false, nil
	case first:
		return true, nil
	case c != ',':
		return false, errSyntax
	}
	s.pos++
	s.skipSpace()
	return true, nil
}

// scalarJSON reads over true, false, null or a number.
func (s *scanner) scalarJSON() error {
	rest := s.src[s.pos:]
	for _, word := range [...]string{"true", "false", "null"} {
		if len(rest) >= len(word) && string(rest[:len(word)]) == word {
			s.pos += len(word)
			return nil
		}
	}
	if s.peek() == '-' {
		s.pos++
	}
	if s.peek() == '0' {
		s.pos++
	} else if !s.digits() {
		return errSyntax
	}
	if s.peek() == '.' {
		s.pos++
		if !s.digits() {
			return errSyntax
		}
	}
	if c := s.peek(); c == 'e' || c == 'E' {
		s.pos++
		if c := s.peek(); c == '+' || c == '-' {
			s.pos++
		}
		if !s.digits() {
			return errSyntax
		}
	}
	return nil
}

// digits reads over decimal digits and reports whether there was one.
func (s *scanner) digits() bool {
	start := s.pos
	for c := s.peek(); '0' <= c && c <= '9'; c = s.peek() {
		s.pos++
	}
	return s.pos > start
}

// stringJSON reads a string. Its value, not made up unless wanted, aliases the body if there is no escape in it.
func (s *scanner) stringJSON(want bool) ([]byte, error) {
	if s.peek() != '"' {
		return nil, errSyntax
	}
	s.pos++
	rest := s.src[s.pos:]
	n := bytes.IndexByte(rest, '"')
	if n < 0 {
		return nil, errSyntax
	}
	if bytes.IndexByte(rest[:n], '\\') >= 0 {
		return s.escapedJSON(want)
	}
	if hasControl(rest[:n]) {
		return nil, errEncoding
	}
	s.pos += n + 1
	return rest[:n:n], nil
}

// escapedJSON reads the rest of a string that has escapes. Half a surrogate pair becomes U+FFFD, as in encoding/json.
func (s *scanner) escapedJSON(want bool) ([]byte, error) {
	out := s.empty()
	for {
		c := s.peek()
		switch {
		case c == '"':
			s.pos++
			return out, nil
		case c < ' ': // the end of the body, too
			return nil, errSyntax
		case c != '\\':
			s.pos++
			if want {
				out = append(out, c)
			}
			continue
		}
		r, ok := s.escapeJSON()
		if !ok {
			return nil, errSyntax
		}
		if want {
			out = utf8.AppendRune(out, r)
		}
	}
}

// escapeJSON reads one escape, or two that are a surrogate pair.
func (s *scanner) escapeJSON() (rune, bool) {
	s.pos++
	c := s.peek()
	s.pos++
	switch c {
	case '"', '\\', '/':
		return rune(c), true
	case 'b':
		return '\b', true
	case 'f':
		return '\f', true
	case 'n':
		return '\n', true
	case 'r':
		return '\r', true
	case 't':
		return '\t', true
	case 'u':
	default:
		return 0, false
	}
	r, ok := s.hex4()
	if !ok || !utf16.IsSurrogate(r) {
		return r, ok
	}
	if bytes.HasPrefix(s.src[s.pos:], []byte(`\u`)) {
		back := s.pos
		s.pos += 2
		low, ok := s.hex4()
		if !ok {
			return 0, false
		}
		if pair := utf16.DecodeRune(r, low); pair != utf8.RuneError {
			return pair, true
		}
		s.pos = back // an escape of its own
	}
	return utf8.RuneError, true
}

// hex4 reads the four hex digits of an escape.
func (s *scanner) hex4() (rune, bool) {
	if len(s.src)-s.pos < 4 {
		return 0, false
	}
	var r rune
	for range 4 {
		c := s.src[s.pos]
		if 'A' <= c && c <= 'F' {
			c += 'a' - 'A'
		}
		d := hexDigit(c)
		if d > 15 {
			return 0, false
		}
		r = r<<4 | rune(d)
		s.pos++
	}
	return r, true
}

const (
	eachByte = 0x0101010101010101
	highBits = 0x80 * eachByte
)

// controls has one of the highBits set if one of the eight bytes in w is below the space.
func controls(w uint64) uint64 { return (w - ' '*eachByte) &^ w }

// hasControl reports whether text has a byte below the space.
func hasControl(text []byte) bool {
	for len(text) >= 16 {
		if (controls(binary.LittleEndian.Uint64(text))|controls(binary.LittleEndian.Uint64(text[8:])))&highBits != 0 {
			return true
		}
		text = text[16:]
	}
	for _, c := range text {
		if c < ' ' {
			return true
		}
	}
	return false
}
