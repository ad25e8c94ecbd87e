package caddymodule

import (
	"bufio"
	"bytes"
	"compress/flate"
	"compress/gzip"
	"errors"
	"io"
	"net/http"
	"strings"
)

// decode takes a gzip coding off an answer. Nobody has asked for one, since a caller's Accept-Encoding stays here; but programs on the way
// compress unasked. Callers could not read it, and here neither a refusal of the token nor a repetition of it would be seen. It returns
// the coding that is on the answer and cannot be taken off, which for a call with a secret is none to pass on unread.
func decode(res *http.Response, live *liveBody) (left string) {
	values := res.Header["Content-Encoding"]
	if len(values) == 0 {
		return ""
	}
	coding := contentCoding(values)
	if coding != "gzip" || res.StatusCode == http.StatusPartialContent {
		return coding
	}
	res.Header.Del("Content-Encoding")
	res.Header.Del("Content-Length")
	res.ContentLength, res.Uncompressed = -1, true
	res.Body = &gunzippedBody{liveBody: live}
	return ""
}

// contentCoding is what a Content-Encoding says: a coding's name, several of them, or empty if it names none. Some servers put a charset or
// a media type there, which hides nothing; a parameter does not make a coding another. Whatever else is there is taken for a coding, registered
// or not.
func contentCoding(values []string) string {
	var codings []string
	for one := range strings.SplitSeq(strings.Join(values, ","), ",") {
		one, _, _ = strings.Cut(one, ";")
		switch one = strings.ToLower(strings.TrimSpace(one)); {
		case one == "x-gzip":
			codings = append(codings, "gzip")
		case !isNoCoding(one):
			codings = append(codings, codingName(one))
		}
	}
	if len(codings) > maxCodings {
		return "several"
	}
	return strings.Join(codings, ", ")
}

// maxCodings and maxCodingName bound what logs and errors quote of a Content-Encoding.
const (
	maxCodings    = 4
	maxCodingName = 16
)

// codingName is the name of a coding as it may be quoted.
func codingName(word string) string {
	odd := func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '.' && r != '_'
	}
	if len(word) > maxCodingName || strings.ContainsFunc(word, odd) {
		return "unknown"
	}
	return word
}

// isNoCoding reports whether a word of a Content-Encoding, in lower case, leaves the text as it is.
func isNoCoding(word string) bool {
	switch word {
	case "", "identity", "none", "binary", "7bit", "8bit", "chunked", "ascii", "us-ascii", "big5", "latin1":
		return true
	}
	for _, charset := range []string{"utf-8", "utf8", "gb2312", "gbk", "gb18030", "iso-8859-", "windows-", "charset="} {
		if strings.HasPrefix(word, charset) {
			return true
		}
	}
	return strings.Contains(word, "/")
}

// gunzippedBody is what an answer's gzip body holds.
type gunzippedBody struct {
	*liveBody

	text *gzip.Reader // nil before the first Read, which has to wait for the body
	err  error        // that it ended with
}

// Read implements io.Reader.
func (b *gunzippedBody) Read(p []byte) (n int, err error) {
	if b.err != nil {
		return 0, b.err
	}
	if b.text == nil {
		packed := bufio.NewReader(b.liveBody) // as gzip would make it
		if start, _ := packed.Peek(len(gzipStart)); !bytes.HasPrefix(gzipStart, start) && !bytes.HasPrefix(start, gzipStart) {
			start, _ = packed.Peek(packed.Buffered())
			b.err = badGzipError("it says that it is gzip (Content-Encoding), and is " + kindOfAnswer(start))
		} else {
			b.text, b.err = gzip.NewReader(packed)
		}
	}
	if b.err == nil {
		n, b.err = b.text.Read(p)
	}
	if isGzipDamage(b.err) {
		b.err = badGzipError("its gzip is damaged")
	}
	if b.err != nil && b.err != io.EOF && b.call.outcome != outcomeCanceled {
		b.call.outcome = outcomeUnreachable // Caddy breaks the answer off
	}
	return n, b.err
}

// badGzipError is what reading an answer ends with that says it is gzip and cannot be unpacked.
type badGzipError string

func (e badGzipError) Error() string { return string(e) }

// isGzipDamage reports whether an error is gzip's own, and not one of the connection that it came by.
func isGzipDamage(err error) bool {
	_, corrupt := errors.AsType[flate.CorruptInputError](err)
	return corrupt || errors.Is(err, gzip.ErrHeader) || errors.Is(err, gzip.ErrChecksum)
}

// kindOfAnswer tells the operator what came in the place of gzip, without showing it.
func kindOfAnswer(start []byte) string {
	switch first, known := jsonStart(start); {
	case known && (first == '{' || first == '['):
		return "JSON"
	case known && first == '<':
		return "a web page or XML"
	case bytes.HasPrefix(start, []byte("\x28\xb5\x2f\xfd")):
		return "zstd"
	case len(start) > 1 && start[0] == 0x78 && (int(start[0])<<8|int(start[1]))%31 == 0:
		return "deflate"
	}
	return "none"
}
