package crypto

import "bytes"

const (
	commentOpen = "<!--"
	cdataOpen   = "<![CDATA["
)

var cdataEnd = []byte("]]>")

// beginXML checks the characters of the whole body, which the rest then relies on, and enters the root element.
func (s *scanner) beginXML() error {
	if !validXML(s.src) {
		if !s.written || !isWritten(s.src) {
			return errEncoding
		}
		s.forbidden = true
	}
	if s.has(byteOrderMark) {
		s.pos += len(byteOrderMark)
	}
	if !s.declaration() {
		return errMarkup
	}
	if err := s.skipMisc(); err != nil {
		return err
	}
	name, closed, err := s.startTag()
	if err != nil {
		return err
	}
	if string(name) != "xml" {
		return errRoot
	}
	s.rootClosed = closed
	return nil
}

// markup returns the byte after the '<' that comes next, which tells what it opens, or 0.
func (s *scanner) markup() byte {
	if len(s.src)-s.pos >= 2 && s.src[s.pos] == '<' {
		return s.src[s.pos+1]
	}
	return 0
}

// declaration reads over an XML declaration, if there is one: version 1.0, in no encoding but UTF-8.
func (s *scanner) declaration() bool {
	const open, end = "<?xml", "?>"
	if !s.has(open) {
		return true
	}
	rest := s.src[s.pos:]
	n := bytes.Index(rest, []byte(end))
	if n < 0 {
		return false
	}
	s.pos += n + len(end)
	rest, ok := pseudoAttribute(rest[len(open):n], "version", "1.0")
	if !ok {
		return false
	}
	if after, ok := pseudoAttribute(rest, "encoding", "utf-8"); ok {
		rest = after
	}
	for _, value := range [...]string{"yes", "no"} {
		if after, ok := pseudoAttribute(rest, "standalone", value); ok {
			rest = after
			break
		}
	}
	return len(bytes.TrimLeft(rest, " \t\r\n")) == 0
}

// pseudoAttribute reads ` name="value"`, quoted either way and the value in any case, and returns what follows.
func pseudoAttribute(text []byte, name, value string) (rest []byte, ok bool) {
	trimmed := bytes.TrimLeft(text, " \t\r\n")
	rest, ok = bytes.CutPrefix(trimmed, []byte(name+"="))
	if !ok || len(trimmed) == len(text) || len(rest) < len(value)+2 {
		return nil, false
	}
	quote, end := rest[0], len(value)+1
	if (quote != '"' && quote != '\'') || rest[end] != quote || !bytes.EqualFold(rest[1:end], []byte(value)) {
		return nil, false
	}
	return rest[end+1:], true
}

// skipMisc reads over spaces and comments.
func (s *scanner) skipMisc() error {
	for {
		s.skipSpace()
		if s.markup() != '!' || !s.has(commentOpen) {
			return nil
		}
		if err := s.comment(); err != nil {
			return err
		}
	}
}

// comment reads over a comment; two hyphens end it or break it.
func (s *scanner) comment() error {
	s.pos += len(commentOpen)
	n := bytes.Index(s.src[s.pos:], []byte("--"))
	if n < 0 {
		return errSyntax
	}
	if s.forbidden && !validXML(s.src[s.pos:s.pos+n]) {
		return errEncoding
	}
	s.pos += n + 2
	if s.peek() != '>' {
		return errSyntax
	}
	s.pos++
	return nil
}

// nextXML goes to the next element below the root, or to the end of the body.
func (s *scanner) nextXML() (bool, error) {
	if s.rootClosed {
		return false, s.endXML()
	}
	more, err := s.memberXML([]byte("xml"))
	if err != nil || more {
		return more, err
	}
	return false, s.endXML()
}

// memberXML goes to the next element within parent and sets s.name, or reads parent's end tag.
func (s *scanner) memberXML(parent []byte) (bool, error) {
	if err := s.skipMisc(); err != nil {
		return false, err
	}
	if s.markup() == '/' {
		return false, s.endTag(parent)
	}
	if s.peek() != '<' || s.markup() == '!' && s.has(cdataOpen) {
		if s.pos == len(s.src) {
			return false, errSyntax
		}
		return false, errNestedText
	}
	name, closed, err := s.startTag()
	if err != nil {
		return false, err
	}
	s.name, s.closed = name, closed
	return true, nil
}

// endXML checks that nothing but spaces and comments follows the root.
func (s *scanner) endXML() error {
	if err := s.skipMisc(); err != nil {
		return err
	}
	if s.pos < len(s.src) {
		return errTrailing
	}
	return nil
}

// startTag reads a start tag. It has a plain ASCII name and nothing else: WeChat writes no attributes, and without
// them there are no namespaces that could make a name mean something else.
func (s *scanner) startTag() (name []byte, closed bool, err error) {
	if s.peek() != '<' {
		return nil, false, errSyntax
	}
	s.pos++
	switch s.peek() {
	case '!', '?':
		return nil, false, errMarkup
	}
	start := s.pos
	for isNameByte(s.peek(), s.pos == start) {
		s.pos++
	}
	name = s.src[start:s.pos]
	if len(name) == 0 {
		return nil, false, errSyntax
	}
	s.skipSpace()
	if s.peek() == '/' {
		closed = true
		s.pos++
	}
	if s.peek() == '>' {
		s.pos++
		return name, closed, nil
	}
	if closed || s.pos >= len(s.src) {
		return nil, false, errSyntax
	}
	return nil, false, errAttribute
}

// endTag reads the end tag of name.
func (s *scanner) endTag(name []byte) error {
	s.pos += len("</")
	if !bytes.HasPrefix(s.src[s.pos:], name) {
		return errSyntax
	}
	s.pos += len(name)
	s.skipSpace()
	if s.peek() != '>' {
		return errSyntax
	}
	s.pos++
	return nil
}

func isNameByte(c byte, first bool) bool {
	switch {
	case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', c == '_':
		return true
	case '0' <= c && c <= '9', c == '-', c == '.':
		return !first
	}
	return false
}

// contentXML reads the content of the element name up to and with its end tag; depth is how many elements lie around
// it. The value, not made up unless wanted, is all text in it, CDATA or plain; it aliases the body if that is one piece
// without escapes. An element in it is an error if the value is wanted, and read over otherwise.
func (s *scanner) contentXML(name []byte, depth int, want bool) ([]byte, error) {
	value := s.empty()
	for {
		n := bytes.IndexByte(s.src[s.pos:], '<')
		if n < 0 {
			return nil, errSyntax
		}
		if n > 0 {
			if s.forbidden && !validXML(s.src[s.pos:s.pos+n]) {
				return nil, errEncoding
			}
			var err error
			if value, err = appendText(value, s.src[s.pos:s.pos+n:s.pos+n], want); err != nil {
				return nil, err
			}
			s.pos += n
		}
		m := s.markup()
		switch {
		case m == '/':
			return value, s.endTag(name)
		case m == '!' && s.has(cdataOpen):
			s.pos += len(cdataOpen)
			n := bytes.Index(s.src[s.pos:], cdataEnd)
			if n < 0 {
				return nil, errSyntax
			}
			if want {
				value = appendCDATA(value, s.src[s.pos:s.pos+n:s.pos+n])
			}
			s.pos += n + len(cdataEnd)
		case m == '!' && s.has(commentOpen):
			if err := s.comment(); err != nil {
				return nil, err
			}
		default:
			if err := s.childXML(depth, want); err != nil {
				return nil, err
			}
		}
	}
}

// childXML reads over an element within a field.
func (s *scanner) childXML(depth int, wanted bool) error {
	name, closed, err := s.startTag()
	switch {
	case err != nil:
		return err
	case wanted:
		return errNested
	case s.isEncrypt(name):
		return errNestedEncrypt
	case depth >= maxDepth:
		return errDeep
	case closed:
		return nil
	}
	_, err = s.contentXML(name, depth+1, false)
	return err
}
