package caddymodule

import (
	"compress/gzip"
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

// contentCoding is what a Content-Encoding says: a coding's name, several of them, or empty if it names none. Some servers put a charset there,
// so what counts are the names that are registered; a parameter, which none may have, does not make it another.
func contentCoding(values []string) string {
	var codings []string
	for one := range strings.SplitSeq(strings.Join(values, ","), ",") {
		one, _, _ = strings.Cut(one, ";")
		switch one = strings.ToLower(strings.TrimSpace(one)); one {
		case "x-gzip":
			codings = append(codings, "gzip")
		case "gzip", "deflate", "br", "zstd", "compress", "x-compress", "dcb", "dcz", "aes128gcm", "exi", "pack200-gzip":
			codings = append(codings, one)
		}
	}
	return strings.Join(codings, ", ")
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
		b.text, b.err = gzip.NewReader(b.liveBody)
	}
	if b.err == nil {
		n, b.err = b.text.Read(p)
	}
	if b.err != nil && b.err != io.EOF && b.call.outcome != outcomeCanceled {
		b.call.outcome = outcomeUnreachable // Caddy breaks the answer off
	}
	return n, b.err
}
