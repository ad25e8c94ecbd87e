package http1

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httputil"
	"net/textproto"
	"strconv"
	"strings"

	"golang.org/x/net/http/httpguts"
)

// malformedError is an answer that is not to the letter of RFC 9112, and not odd in one of the ways that are taken.
type malformedError struct{ text string }

func (e *malformedError) Error() string { return "malformed answer of the backend: " + e.text }

func malformed(format string, args ...any) error {
	return &malformedError{fmt.Sprintf(format, args...)}
}

// quotable is the beginning of what a backend sent, short enough for a log.
func quotable(b []byte) []byte { return b[:min(len(b), 40)] }

// readBlock reads lines up to the first empty one, and counts them without it. Its error is a noAnswerError when not a byte came. A head begins
// with a status line, and it may have lines that end in LF alone, of which odd tells.
func readBlock(br *bufio.Reader, limit int, head bool) (block string, lines int, odd bool, err error) {
	var long []byte // what br has no room for
	done := 0       // bytes of complete lines in br
	for {
		b, _ := br.Peek(br.Buffered())
		for {
			i := bytes.IndexByte(b[done:], '\n')
			if i < 0 {
				break
			}
			end := done + i
			if !endsInCR(long, b[:end]) {
				if !head {
					return "", 0, false, malformed("a line ends in LF alone")
				}
				odd = true
			}
			if lines == 0 && head && !bytes.HasPrefix(joined(long, b[:end]), []byte("HTTP/1.")) {
				return "", 0, false, malformed("it begins with %q", quotable(joined(long, b[:end])))
			}
			empty := isEmpty(long, b[done:end], done > 0)
			done = end + 1
			if len(long)+done > limit {
				return "", 0, false, ErrHeaderTooLong
			}
			if empty {
				block = string(joined(long, b[:done]))
				_, _ = br.Discard(done)
				return block, lines, odd, nil
			}
			if lines++; lines > maxHeaderFields+1 {
				return "", 0, false, ErrTooManyFields
			}
		}
		if len(long)+len(b) > limit {
			return "", 0, false, ErrHeaderTooLong
		}
		if len(b) == br.Size() {
			long = append(long, b...)
			_, _ = br.Discard(len(b))
			b, done = nil, 0
		}
		if _, err := br.Peek(len(b) + 1); err != nil {
			if len(long)+len(b) == 0 {
				err = &noAnswerError{err}
			}
			return "", 0, false, unexpected(err)
		}
	}
}

// noAnswerError is an end of the connection before the first byte.
type noAnswerError struct{ err error }

func (e *noAnswerError) Error() string { return e.err.Error() }
func (e *noAnswerError) Unwrap() error { return e.err }

// unanswered is the error of a connection that ended where more had to come.
func unanswered(err error) error {
	if none, ok := errors.AsType[*noAnswerError](err); ok {
		err = none.err
	}
	return unexpected(err)
}

func unexpected(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

// joined is one after the other, without a copy where there is but one.
func joined(a, b []byte) []byte {
	if len(a) == 0 {
		return b
	}
	return append(a[:len(a):len(a)], b...)
}

// isEmpty reports whether a line has nothing before its LF, or a CR. rest is what of it is in the reader: all, if it is not the first there.
func isEmpty(long, rest []byte, all bool) bool {
	if all || len(long) == 0 || long[len(long)-1] == '\n' {
		return len(rest) == 0 || len(rest) == 1 && rest[0] == '\r'
	}
	return len(rest) == 0 && bytes.HasSuffix(long, []byte("\n\r"))
}

func endsInCR(long, b []byte) bool {
	if len(b) == 0 {
		b = long
	}
	return len(b) > 0 && b[len(b)-1] == '\r'
}

// parseHead reads a status line and a header, and reports whether they are odd: with lines that end in LF alone, which the caller has seen,
// or with folded fields.
func parseHead(res *http.Response, block string, lines int, odd bool) (bool, error) {
	if odd {
		return true, parseOdd(res, block)
	}
	line, rest, _ := strings.Cut(block, "\r\n")
	if err := parseStatus(res, line); err != nil {
		return false, err
	}
	header, err := parseFields(rest, lines-1)
	if err == errFolded { //nolint:errorlint // it is not wrapped
		return true, parseOdd(res, block)
	}
	res.Header = header
	return false, err
}

// parseOdd is parseHead for heads that are not to the letter. They are read by what net/http reads them with, and then held to what holds for others.
func parseOdd(res *http.Response, block string) error {
	br := bufio.NewReader(strings.NewReader(block))
	r := textproto.NewReader(br)
	line, err := r.ReadLine()
	if err != nil {
		return err
	}
	if err := parseStatus(res, line); err != nil {
		return err
	}
	header, err := r.ReadMIMEHeader()
	if err != nil {
		return malformed("a line of its header is no field") // err would have all of the line
	}
	if _, err := br.Peek(1); err != io.EOF {
		return malformed("its header ends in more than one place")
	}
	for name, values := range header {
		if !httpguts.ValidHeaderFieldName(name) {
			return malformed("%q is no field name", quotable([]byte(name)))
		}
		for _, v := range values {
			if !validText(v) {
				return malformed("the value of its field %q has control characters", name)
			}
		}
	}
	res.Header = http.Header(header)
	return nil
}

// parseStatus reads «HTTP/1.1 200 OK».
func parseStatus(res *http.Response, line string) error {
	switch {
	case strings.HasPrefix(line, "HTTP/1.1 "):
		res.Proto, res.ProtoMajor, res.ProtoMinor = "HTTP/1.1", 1, 1
	case strings.HasPrefix(line, "HTTP/1.0 "):
		res.Proto, res.ProtoMajor, res.ProtoMinor = "HTTP/1.0", 1, 0
	default:
		return malformed("its version is neither HTTP/1.1 nor HTTP/1.0")
	}
	status := line[len("HTTP/1.1 "):]
	if len(status) < 3 || len(status) > 3 && status[3] != ' ' {
		return malformed("its status line has no status of three digits")
	}
	code := 0
	for i := range 3 {
		if status[i] < '0' || status[i] > '9' {
			return malformed("its status line has no status of three digits")
		}
		code = 10*code + int(status[i]-'0')
	}
	if code < 100 {
		return malformed("its status is %03d", code)
	}
	if !validText(status) {
		return malformed("its status line has control characters")
	}
	res.Status, res.StatusCode = status, code
	return nil
}

// validText reports whether s has no control characters but tabs.
func validText(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// parseFields reads field lines, the last of which is empty. The strings are parts of block.
func parseFields(block string, lines int) (http.Header, error) {
	header := make(http.Header, lines)
	values := make([]string, lines)
	for {
		line, rest, _ := strings.Cut(block, "\r\n")
		if line == "" {
			return header, nil
		}
		block = rest
		colon, canonical := scanName(line)
		if colon <= 0 {
			return nil, malformedField(line)
		}
		name, value := line[:colon], trimOWS(line[colon+1:])
		if !validText(value) {
			return nil, malformed("the value of its field %q has control characters", name)
		}
		if !canonical {
			name = textproto.CanonicalMIMEHeaderKey(name)
		}
		if had := header[name]; had != nil {
			header[name] = append(had, value)
			continue
		}
		values[0] = value
		header[name] = values[:1:1]
		values = values[1:]
	}
}

// errFolded is a field that goes on in the next line. In a head that is odd, elsewhere it is an error.
var errFolded = malformed("a field goes on in the next line")

func malformedField(line string) error {
	if line[0] == ' ' || line[0] == '\t' {
		return errFolded
	}
	name, _, found := strings.Cut(line, ":")
	if !found {
		return malformed("a line of its header has no colon")
	}
	return malformed("%q is no field name", quotable([]byte(name)))
}

// scanName finds the colon after a field's name, and reports whether the name is spelt as Go's maps have it. It returns -1 for what is
// no name.
func scanName(line string) (colon int, canonical bool) {
	canonical = true
	upper := true
	for i := range len(line) {
		c := line[i]
		switch {
		case 'a' <= c && c <= 'z':
			canonical = canonical && !upper
		case 'A' <= c && c <= 'Z':
			canonical = canonical && upper
		case c == ':':
			return i, canonical
		case !httpguts.IsTokenRune(rune(c)):
			return -1, false
		}
		upper = c == '-'
	}
	return -1, false
}

// bodyKind is where an answer's body ends.
type bodyKind int

const (
	bodyNone    bodyKind = iota
	bodyLength           // after so many bytes
	bodyChunked          // after the last chunk
	bodyClose            // with the connection
	bodyUpgrade          // it is the connection
)

// frame finds where the body ends, and tidies the header as net/http does. More than one way to see it is what smuggling is made of: an error,
// or, where chunks and a Content-Length are one too many, the connection's end.
func frame(res *http.Response, method string) (bodyKind, error) {
	h := res.Header
	if h["Pragma"] != nil && h["Pragma"][0] == "no-cache" && h["Cache-Control"] == nil {
		h["Cache-Control"] = []string{"no-cache"}
	}
	res.Close = closes(res)
	coding, chunked := h["Transfer-Encoding"]
	length, err := contentLength(h)
	switch {
	case err != nil:
		return bodyNone, err
	case chunked && res.ProtoMinor == 0:
		return bodyNone, malformed("it is HTTP/1.0 with Transfer-Encoding")
	case chunked && (len(coding) != 1 || !strings.EqualFold(coding[0], "chunked")):
		return bodyNone, malformed("its Transfer-Encoding is not chunked alone")
	}
	res.ContentLength = length
	if chunked {
		res.Close = res.Close || length >= 0
		delete(h, "Transfer-Encoding")
		res.TransferEncoding = []string{"chunked"}
		if err := announceTrailer(res); err != nil {
			return bodyNone, err
		}
	}
	switch {
	case res.StatusCode == http.StatusSwitchingProtocols:
		res.ContentLength = 0
		if httpguts.HeaderValuesContainsToken(h["Connection"], "Upgrade") {
			return bodyUpgrade, nil
		}
		return bodyNone, nil
	case res.StatusCode == http.StatusNoContent, res.StatusCode == http.StatusNotModified:
		if method != http.MethodHead {
			res.ContentLength = 0
		}
		// A backend that announces a body where there can be none might send one. The length of a 304 is that of another answer.
		res.Close = res.Close || chunked || length > 0 && res.StatusCode == http.StatusNoContent && method != http.MethodHead
		return bodyNone, nil
	case method == http.MethodHead:
		return bodyNone, nil
	case chunked:
		res.ContentLength = -1
		delete(h, "Content-Length")
		return bodyChunked, nil
	case length == 0:
		return bodyNone, nil
	case length > 0:
		return bodyLength, nil
	}
	res.Close = true
	return bodyClose, nil
}

// closes reports whether the backend ends the connection after its answer.
func closes(res *http.Response) bool {
	connection := res.Header["Connection"]
	hasClose := len(connection) > 0 && httpguts.HeaderValuesContainsToken(connection, "close")
	if res.ProtoMinor == 0 {
		return hasClose || !httpguts.HeaderValuesContainsToken(connection, "keep-alive")
	}
	if hasClose {
		delete(res.Header, "Connection")
	}
	return hasClose
}

// contentLength is the answer's Content-Length, -1 without. The same one twice is one.
func contentLength(h http.Header) (int64, error) {
	values := h["Content-Length"]
	if len(values) == 0 {
		return -1, nil
	}
	first := trimOWS(values[0]) // a fold with nothing in it leaves a space at the end
	if len(values) > 1 {
		for _, v := range values[1:] {
			if trimOWS(v) != first {
				return -1, malformed("it has more than one Content-Length")
			}
		}
		h["Content-Length"] = []string{first}
	}
	n, err := strconv.ParseUint(first, 10, 63)
	if err != nil {
		return -1, malformed("its Content-Length is no number")
	}
	return int64(n), nil
}

// announceTrailer moves the names in the field Trailer to where net/http has them.
func announceTrailer(res *http.Response) error {
	names := res.Header["Trailer"]
	if names == nil {
		return nil
	}
	delete(res.Header, "Trailer")
	trailer := make(http.Header)
	for _, list := range names {
		for name := range strings.SplitSeq(list, ",") {
			if name = textproto.TrimString(name); name == "" {
				continue
			}
			if name = http.CanonicalHeaderKey(name); framing(name) && name != "Host" {
				return malformed("its trailer is to have the field %q", name)
			}
			trailer[name] = nil
		}
	}
	if len(trailer) > 0 {
		res.Trailer = trailer
	}
	return nil
}

// readTrailer reads what follows the last chunk.
func readTrailer(res *http.Response, br *bufio.Reader) error {
	block, lines, _, err := readBlock(br, maxTrailer, false)
	switch {
	case errors.Is(err, ErrHeaderTooLong):
		return malformed("its trailer is longer than %d bytes", maxTrailer)
	case err != nil:
		return unanswered(err)
	case lines == 0:
		return nil
	}
	fields, err := parseFields(block, lines)
	if err != nil {
		return err
	}
	if res.Trailer == nil {
		res.Trailer = make(http.Header, len(fields))
	}
	for name, values := range fields {
		if framing(name) {
			return malformed("its trailer has the field %q", name)
		}
		res.Trailer[name] = values
	}
	return nil
}

func newChunkedReader(br *bufio.Reader) io.Reader { return httputil.NewChunkedReader(br) }
