package crypto

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"unicode/utf8"
)

// appendCDATA adds the text of a CDATA section to a value. The first piece is not copied: its capacity is cut, so that a
// second one does not write into the body.
func appendCDATA(value, text []byte) []byte {
	if bytes.IndexByte(text, '\r') >= 0 {
		return appendLines(value, text)
	}
	if len(value) == 0 {
		return text
	}
	return append(value, text...)
}

// appendText adds plain text, with its references resolved, to a value, or only checks it.
func appendText(value, text []byte, want bool) ([]byte, error) {
	if !isSpecial(text) {
		if want {
			value = appendCDATA(value, text)
		}
		return value, nil
	}
	for len(text) > 0 {
		n := bytes.IndexByte(text, '&')
		if n < 0 {
			n = len(text)
		}
		if bytes.Contains(text[:n], cdataEnd) {
			return nil, errSyntax
		}
		if want {
			value = appendLines(value, text[:n])
		}
		if text = text[n:]; len(text) == 0 {
			break
		}
		r, size := reference(text)
		if size == 0 {
			return nil, errEntity
		}
		if want {
			value = utf8.AppendRune(value, r)
		}
		text = text[size:]
	}
	return value, nil
}

// isSpecial reports whether plain text is not what a CDATA section would make of it: references, or an end of CDATA, which
// is an error.
func isSpecial(text []byte) bool {
	const short = 16 // below that a plain loop beats two searches
	if len(text) >= short {
		return bytes.IndexByte(text, '&') >= 0 || bytes.IndexByte(text, ']') >= 0
	}
	for _, c := range text {
		if c == '&' || c == ']' {
			return true
		}
	}
	return false
}

// appendLines appends text with its line ends made "\n", as XML demands of every parser.
func appendLines(value, text []byte) []byte {
	for i, c := range text {
		switch {
		case c == '\r':
			value = append(value, '\n')
		case c == '\n' && i > 0 && text[i-1] == '\r':
		default:
			value = append(value, c)
		}
	}
	return value
}

// reference reads an entity or character reference at the start of text, which begins with '&'. The size is 0 if it is
// none of the five entities that need no declaration, nor a character that XML allows.
func reference(text []byte) (r rune, size int) {
	const longest = len("&#x0010ffff;")
	n := bytes.IndexByte(text[:min(len(text), longest)], ';')
	if n < 0 {
		return 0, 0
	}
	switch string(text[1:n]) {
	case "lt":
		r = '<'
	case "gt":
		r = '>'
	case "amp":
		r = '&'
	case "apos":
		r = '\''
	case "quot":
		r = '"'
	default:
		if text[1] != '#' {
			return 0, 0
		}
		r = character(text[2:n])
	}
	if !isXML(r) {
		return 0, 0
	}
	return r, n + 1
}

// character reads the number of a character reference, "65" or "x41"; 0, which XML does not allow, if there is none.
func character(digits []byte) rune {
	base := rune(10)
	if len(digits) > 0 && digits[0] == 'x' {
		base, digits = 16, digits[1:]
	}
	var r rune
	for _, c := range digits {
		if 'A' <= c && c <= 'F' {
			c += 'a' - 'A'
		}
		d := rune(hexDigit(c))
		if d >= base || r > utf8.MaxRune {
			return 0
		}
		r = r*base + d
	}
	return r
}

// isXML reports whether XML allows a character.
func isXML(r rune) bool {
	switch {
	case r < ' ':
		return r == '\t' || r == '\n' || r == '\r'
	case r < 0xd800:
		return true
	case r < 0x10000:
		return 0xe000 <= r && r <= 0xfffd
	}
	return r <= utf8.MaxRune
}

// validXML reports whether text is UTF-8 of characters that XML allows. A first pass looks for control characters, 32
// bytes at a time because Encrypt is most of an envelope, and for anything beyond ASCII, of which alone a second one is made.
func validXML(text []byte) bool {
	var high uint64
	rest := text
	for len(rest) >= 32 {
		a, b := binary.LittleEndian.Uint64(rest), binary.LittleEndian.Uint64(rest[8:])
		c, d := binary.LittleEndian.Uint64(rest[16:]), binary.LittleEndian.Uint64(rest[24:])
		high |= a | b | c | d
		if (controls(a)|controls(b)|controls(c)|controls(d))&highBits != 0 && !onlySpaces(rest[:32]) {
			return false
		}
		rest = rest[32:]
	}
	if !onlySpaces(rest) {
		return false
	}
	for _, c := range rest {
		high |= uint64(c)
	}
	if high&highBits == 0 {
		return true
	}
	return validHigh(text)
}

// isWritten reports whether text is what may have been typed: any characters, also those that XML forbids, but for NUL. Readers in C take that
// for the end.
func isWritten(text []byte) bool { return utf8.Valid(text) && bytes.IndexByte(text, 0) < 0 }

// validHigh is validXML of text whose control characters have been looked at. Chinese is three bytes a character, nearly always of a
// kind that has no exceptions, and is taken two characters at a time.
func validHigh(text []byte) bool {
	const (
		forms = 0xc0c0f0c0c0f0 // the bits that tell a first byte of three from a further one, of six bytes
		two   = 0x8080e08080e0 // two characters of three bytes
		whole = 0x5ffe         // by the low half of a first byte: no further byte makes the character a wrong one
	)
	for len(text) >= 8 {
		w := binary.LittleEndian.Uint64(text)
		switch {
		case w&highBits == 0:
			text = text[8:]
		case w&forms == two && whole>>(w&15)&(whole>>(w>>24&15))&1 == 1:
			text = text[6:]
		case w&0x80 == 0: // ASCII up to the first byte that is not
			text = text[bits.TrailingZeros64(w&highBits)/8:]
		default:
			r, size := utf8.DecodeRune(text)
			if r == utf8.RuneError && size < 2 || !isXML(r) {
				return false
			}
			text = text[size:]
		}
	}
	for len(text) > 0 {
		r, size := utf8.DecodeRune(text)
		if r == utf8.RuneError && size < 2 || !isXML(r) {
			return false
		}
		text = text[size:]
	}
	return true
}

// onlySpaces reports whether the only control characters in text are the three spaces that XML allows.
func onlySpaces(text []byte) bool {
	for _, c := range text {
		if c < ' ' && c != '\t' && c != '\n' && c != '\r' {
			return false
		}
	}
	return true
}
