package http1

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// answers are what backends may say. An answer is served as it is; the connection is closed after it if it ends in «EOF».
var answers = []struct {
	name, method, answer string
	refused              bool // by us, whatever net/http does
	odd                  bool // taken, but nobody else is served on its connection
}{
	{name: "length", answer: okAnswer},
	{name: "empty", answer: "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"},
	{name: "no reason", answer: "HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok"},
	{name: "empty reason", answer: "HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\nok"},
	{name: "odd reason", answer: "HTTP/1.1 404 N\xf6t   F\tound \r\nContent-Length: 2\r\n\r\nok"},
	{name: "odd status", answer: "HTTP/1.1 999 X\r\nContent-Length: 2\r\n\r\nok"},
	{name: "names", answer: "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nX-ABC-def: 1\r\nx_y: 2\r\netag: \"x\"\r\nX-Empty:\r\nX-Space: \t a b \t\r\n\r\nok"},
	{name: "repeated", answer: "HTTP/1.1 200 OK\r\nSet-Cookie: a\r\nContent-Length: 2\r\nset-cookie: b\r\nSET-COOKIE: c\r\n\r\nok"},
	{name: "pragma", answer: "HTTP/1.1 200 OK\r\nPragma: no-cache\r\nContent-Length: 2\r\n\r\nok"},
	{name: "no header", answer: "HTTP/1.1 200 OK\r\n\r\nokEOF"},
	{name: "until close", answer: "HTTP/1.1 200 OK\r\nX: 1\r\n\r\nsome textEOF"},
	{name: "connection close", answer: "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"},
	{name: "http/1.0", answer: "HTTP/1.0 200 OK\r\nX: 1\r\n\r\nsome textEOF"},
	{name: "http/1.0 with length", answer: "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok"},
	{name: "http/1.0 keep-alive", answer: "HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok"},
	{name: "chunked", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n3\r\nfoo\r\n0\r\n\r\n"},
	{name: "chunked in capitals", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"},
	{name: "chunk extension", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;a=b;c=\"d\"\r\nok\r\n0;x\r\n\r\n"},
	{name: "trailer", answer: "HTTP/1.1 200 OK\r\nTrailer: x-sum, X-More\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 1\r\nx-more: 2\r\nX-Unannounced: 3\r\n\r\n"},
	{name: "trailer that does not come", answer: "HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"},
	{name: "trailer without chunks", answer: "HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nContent-Length: 2\r\n\r\nok"},
	{name: "same length twice", answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok"},
	{name: "length broken off", answer: "HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nokEOF"},
	{name: "chunks broken off", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\nEOF"},
	{name: "chunk broken off", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\nokEOF"},
	{name: "trailer broken off", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX: 1\r\nEOF"},
	{name: "last line broken off", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nEOF"},
	{name: "head", method: "HEAD", answer: "HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n"},
	{name: "head, chunked", method: "HEAD", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"},
	{name: "head, no length", method: "HEAD", answer: "HTTP/1.1 200 OK\r\n\r\n"},
	{name: "204", answer: "HTTP/1.1 204 No Content\r\n\r\n"},
	{name: "204 with length 0", answer: "HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n"},
	{name: "204 with length", answer: "HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n", odd: true},
	{name: "204 chunked", answer: "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n", odd: true},
	{name: "204 with length, head", method: "HEAD", answer: "HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n"},
	{name: "304 with length", answer: "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\nEtag: x\r\n\r\n"},
	{name: "1xx", answer: "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + okAnswer},
	{name: "large header", answer: "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 60_000) + "\r\nContent-Length: 2\r\n\r\nok"},
	{name: "many fields", answer: "HTTP/1.1 200 OK\r\n" + strings.Repeat("X: y\r\n", 990) + "Content-Length: 2\r\n\r\nok"},
	{name: "large body", answer: "HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n" + strings.Repeat("x", 300_000)},
	{name: "gzip as it is", answer: "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nok"},

	{name: "bare LF", answer: "HTTP/1.1 200 OK\nContent-Length: 2\n\nok", odd: true},
	{name: "bare LF, one line", answer: "HTTP/1.1 200 OK\nContent-Length: 2\r\n\r\nok", odd: true},
	{name: "bare LF, no header", answer: "HTTP/1.1 200 OK\n\nokEOF", odd: true},
	{name: "bare LF before CRLF", answer: "HTTP/1.1 200 OK\nX: 1\nContent-Length: 2\n\r\nok", odd: true},
	{name: "bare LF, odd reason", answer: "HTTP/1.1 200 O  K \nContent-Length: 2\n\nok", odd: true},
	{name: "bare LF, spaces", answer: "HTTP/1.1 200 OK\nX: \t a b \t\nx-empty:\nContent-Length: 2\n\nok", odd: true},
	{name: "bare LF, chunked", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\nTrailer: X-Sum\n\n2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n", odd: true},
	{name: "bare LF, bad chunk", answer: "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\nok\n0\n\n", odd: true},
	{name: "bare LF, until close", answer: "HTTP/1.1 200 OK\nX: 1\n\nsome textEOF", odd: true},
	{name: "bare LF, http/1.0", answer: "HTTP/1.0 200 OK\nConnection: keep-alive\nContent-Length: 2\n\nok", odd: true},
	{name: "bare LF, 204", answer: "HTTP/1.1 204 No Content\n\n", odd: true},
	{name: "bare LF, no body", answer: "HTTP/1.1 200 OK\nContent-Length: 0\n\n", odd: true},
	{name: "bare LF, large header", answer: "HTTP/1.1 200 OK\nX: " + strings.Repeat("x", 60_000) + "\nContent-Length: 2\n\nok", odd: true},
	{name: "bare LF, large body", answer: "HTTP/1.1 200 OK\nContent-Length: 300000\n\n" + strings.Repeat("x", 300_000), odd: true},
	{name: "bare LF in a 1xx", answer: "HTTP/1.1 103 Early Hints\nLink: </x>\n\n" + okAnswer, odd: true},
	{name: "bare LF after a 1xx", answer: "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\nContent-Length: 2\n\nok", odd: true},
	{name: "bare LF in the header", answer: "HTTP/1.1 200 OK\r\nX: 1\nContent-Length: 2\r\n\r\nok", odd: true},
	{name: "bare LF at the end", answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\nok", odd: true},
	{name: "folded", answer: "HTTP/1.1 200 OK\r\nX: 1\r\n 2\r\nContent-Length: 2\r\n\r\nok", odd: true},
	{name: "folded with tabs", answer: "HTTP/1.1 200 OK\r\nX: 1 \t\r\n\t\t2\t \r\n \t 3\r\nContent-Length: 2\r\n\r\nok", odd: true},
	{name: "folded, LF alone", answer: "HTTP/1.1 200 OK\nX: 1\n 2\n\t3\nContent-Length: 2\n\nok", odd: true},
	{name: "folded last", answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: 1\r\n 2\r\n\r\nok", odd: true},
	{name: "folded like a field", answer: "HTTP/1.1 200 OK\r\nX: 1\r\n Content-Length: 1\r\nContent-Length: 2\r\n\r\nok", odd: true},
	{name: "folded, twice", answer: "HTTP/1.1 200 OK\r\nSet-Cookie: a;\r\n b\r\nset-cookie: c;\r\n d\r\nContent-Length: 2\r\n\r\nok", odd: true},
	{name: "folded with nothing", answer: "HTTP/1.1 200 OK\r\nX: 1\r\n \r\n\t\r\n 2\r\nY: 1\r\n \r\nContent-Length: 2\r\n \r\n\r\nok", odd: true},
	{name: "folded coding", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding:\r\n chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", odd: true},
	{name: "folded in a 1xx", answer: "HTTP/1.1 103 Early Hints\r\nLink: </x>;\r\n rel=preload\r\n\r\n" + okAnswer, odd: true},
	{name: "folded after a 1xx", answer: "HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nX: 1\r\n 2\r\nContent-Length: 2\r\n\r\nok", odd: true},
	{name: "folded length", answer: "HTTP/1.1 200 OK\r\nContent-Length:\r\n 2\r\n\r\nok", odd: true},
	{name: "length and chunks", answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", odd: true},
	{name: "chunks and length", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\nok\r\n0\r\n\r\n", odd: true},
	{name: "length and chunks, head", method: "HEAD", answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n", odd: true},
	{name: "length and chunks, 304", answer: "HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n", odd: true},
	{name: "length and chunks, same length twice", answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", odd: true},
	{name: "length 0 and chunks", answer: "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX: 1\r\n\r\n", odd: true},
	{name: "length and chunks, LF alone", answer: "HTTP/1.1 200 OK\nContent-Length: 2\nTransfer-Encoding: chunked\n\n2\r\nok\r\n0\r\n\r\n", odd: true},
	{name: "length and no chunks", answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok\r\n", odd: true},

	{name: "nothing", answer: "EOF", refused: true},
	{name: "head broken off", answer: "HTTP/1.1 200 OK\r\nContent-LengthEOF", refused: true},
	{name: "no HTTP", answer: "220 smtp.example ESMTP\r\n", refused: true},
	{name: "SSH", answer: "SSH-2.0-OpenSSH\r\nEOF", refused: true},
	{name: "HTTP/2", answer: "HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "HTTP/1.2", answer: "HTTP/1.2 200 OK\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "lower case", answer: "http/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "two spaces", answer: "HTTP/1.1  200 OK\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "status of two digits", answer: "HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "status of four digits", answer: "HTTP/1.1 2000 OK\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "signed status", answer: "HTTP/1.1 +20 OK\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "small status", answer: "HTTP/1.1 099 OK\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "empty line first", answer: "\r\n" + okAnswer, refused: true},
	{name: "NUL in the reason", answer: "HTTP/1.1 200 O\x00K\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "bare CR", answer: "HTTP/1.1 200 OK\r\nX: 1\rContent-Length: 2\r\n\r\nok", refused: true},
	{name: "CR CR LF", answer: "HTTP/1.1 200 OK\r\nX: 1\r\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "folded first", answer: "HTTP/1.1 200 OK\r\n X: 1\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "space before the colon", answer: "HTTP/1.1 200 OK\r\nContent-Length : 2\r\n\r\nok", refused: true},
	{name: "tab before the colon", answer: "HTTP/1.1 200 OK\r\nContent-Length\t: 2\r\n\r\nok", refused: true},
	{name: "space in a name", answer: "HTTP/1.1 200 OK\r\nX Y: 2\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "no colon", answer: "HTTP/1.1 200 OK\r\nContent-Length\r\n\r\nok", refused: true},
	{name: "no name", answer: "HTTP/1.1 200 OK\r\n: x\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "NUL in a value", answer: "HTTP/1.1 200 OK\r\nX: a\x00b\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "NUL in a name", answer: "HTTP/1.1 200 OK\r\nX\x00: a\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "DEL in a value", answer: "HTTP/1.1 200 OK\r\nX: a\x7fb\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "name that is not ASCII", answer: "HTTP/1.1 200 OK\r\nX\xc3\xa4: a\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "two lengths", answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok", refused: true},
	{name: "list of lengths", answer: "HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok", refused: true},
	{name: "negative length", answer: "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nok", refused: true},
	{name: "signed length", answer: "HTTP/1.1 200 OK\r\nContent-Length: +2\r\n\r\nok", refused: true},
	{name: "length in hex", answer: "HTTP/1.1 200 OK\r\nContent-Length: 0x2\r\n\r\nok", refused: true},
	{name: "empty length", answer: "HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nok", refused: true},
	{name: "overlong length", answer: "HTTP/1.1 200 OK\r\nContent-Length: 9223372036854775808\r\n\r\nok", refused: true},
	{name: "longer length", answer: "HTTP/1.1 200 OK\r\nContent-Length: 18446744073709551618\r\n\r\nok", refused: true},
	{name: "two codings", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", refused: true},
	{name: "list of codings", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", refused: true},
	{name: "identity", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\nokEOF", refused: true},
	{name: "odd coding", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: xchunked\r\n\r\nokEOF", refused: true},
	{name: "empty coding", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding:\r\n\r\nokEOF", refused: true},
	{name: "http/1.0 chunked", answer: "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nEOF", refused: true},
	{name: "forbidden trailer", answer: "HTTP/1.1 200 OK\r\nTrailer: Content-Length\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", refused: true},
	{name: "LF first", answer: "\n" + okAnswer, refused: true},
	{name: "no HTTP, LF alone", answer: "220 smtp.example ESMTP\n", refused: true},
	{name: "folded first, LF alone", answer: "HTTP/1.1 200 OK\n X: 1\nContent-Length: 2\n\nok", refused: true},
	{name: "folded name", answer: "HTTP/1.1 200 OK\r\nX\r\n : 1\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "folded status line", answer: "HTTP/1.1 200\r\n OK\r\nContent-Length: 2\r\n\r\nok", refused: true},
	{name: "folded digits", answer: "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n 2\r\n\r\nok", refused: true},
	{name: "folded coding and nothing", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n \r\n\r\n0\r\n\r\n", refused: true},
	{name: "folded codings", answer: "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip,\r\n chunked\r\n\r\n0\r\n\r\n", refused: true},
	{name: "folded in a refused 1xx", answer: "HTTP/1.1 103 Early Hints\r\n X: 1\r\n\r\n" + okAnswer, refused: true},
	{name: "LF alone, two spaces", answer: "HTTP/1.1  200 OK\nContent-Length: 2\n\nok", refused: true},
	{name: "LF alone, space before the colon", answer: "HTTP/1.1 200 OK\nX : 1\nContent-Length: 2\n\nok", refused: true},
	{name: "LF alone, bare CR", answer: "HTTP/1.1 200 OK\nX: 1\rContent-Length: 2\n\nok", refused: true},
	{name: "LF alone, NUL in a value", answer: "HTTP/1.1 200 OK\nX: a\x00b\nContent-Length: 2\n\nok", refused: true},
	{name: "LF alone, NUL in the reason", answer: "HTTP/1.1 200 O\x00K\nContent-Length: 2\n\nok", refused: true},
	{name: "LF alone, no colon", answer: "HTTP/1.1 200 OK\nX\nContent-Length: 2\n\nok", refused: true},
	{name: "LF alone, CR CR LF", answer: "HTTP/1.1 200 OK\nX: 1\r\r\nContent-Length: 2\n\nok", refused: true},
	{name: "LF alone, CR CR LF at the end", answer: "HTTP/1.1 200 OK\nContent-Length: 2\n\r\r\nokEOF", refused: true},
	{name: "LF alone, two lengths", answer: "HTTP/1.1 200 OK\nContent-Length: 2\nContent-Length: 3\n\nok", refused: true},
	{name: "LF alone, http/1.0 chunked", answer: "HTTP/1.0 200 OK\nTransfer-Encoding: chunked\n\n0\r\n\r\nEOF", refused: true},
	{name: "LF alone, broken off", answer: "HTTP/1.1 200 OK\nContent-Length: 2\nEOF", refused: true},
	{name: "LF alone, too many fields", answer: "HTTP/1.1 200 OK\n" + strings.Repeat("X: y\n", 1001) + "Content-Length: 2\n\nok", refused: true},
	{name: "LF alone, too large header", answer: "HTTP/1.1 200 OK\nX: " + strings.Repeat("x", 10<<20) + "\nContent-Length: 2\n\nok", refused: true},
	{name: "two lengths and chunks", answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", refused: true},
	{name: "malformed length and chunks", answer: "HTTP/1.1 200 OK\r\nContent-Length: +2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", refused: true},
	{name: "empty length and chunks", answer: "HTTP/1.1 200 OK\r\nContent-Length:\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", refused: true},
	{name: "malformed length and chunks, head", method: "HEAD", answer: "HTTP/1.1 200 OK\r\nContent-Length: x\r\nTransfer-Encoding: chunked\r\n\r\n", refused: true},
	{name: "length and two codings", answer: "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", refused: true},
	{name: "length and http/1.0 chunked", answer: "HTTP/1.0 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok", refused: true},
	{name: "empty Content-Length in a 1xx", answer: "HTTP/1.1 103 Early Hints\r\nContent-Length:\r\n\r\n" + okAnswer, refused: true},
	{name: "Content-Length in a 1xx that is no number", answer: "HTTP/1.1 100 Continue\r\nContent-Length: -1\r\n\r\n" + okAnswer, refused: true},
	{name: "two Content-Lengths in a 1xx", answer: "HTTP/1.1 103 Early Hints\r\nContent-Length: 0\r\nContent-Length: 1\r\n\r\n" + okAnswer, refused: true},
	{name: "another coding in a 1xx", answer: "HTTP/1.1 103 Early Hints\r\nTransfer-Encoding: gzip\r\n\r\n" + okAnswer, refused: true},
	{name: "lengths and the end in a 1xx", answer: "HTTP/1.1 103 Early Hints\r\nConnection: close\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\nContent-Length: 0\r\n\r\n" + okAnswer, odd: true},
	{name: "length in a 1xx", answer: "HTTP/1.1 103 Early Hints\r\nContent-Length: 5\r\n\r\n" + okAnswer, odd: true},
	{name: "length in a 1xx, head", method: "HEAD", answer: "HTTP/1.1 103 Early Hints\r\nContent-Length: 5\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", odd: true},
	{name: "length 0 in a 1xx", answer: "HTTP/1.1 103 Early Hints\r\nContent-Length: 0\r\n\r\n" + okAnswer},
	{name: "malformed 1xx", answer: "HTTP/1.1 103 Early Hints\r\nX : 1\r\n\r\n" + okAnswer, refused: true},
	{name: "too many fields", answer: "HTTP/1.1 200 OK\r\n" + strings.Repeat("X: y\r\n", 1001) + "Content-Length: 2\r\n\r\nok", refused: true},
	{name: "too large header", answer: "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 10<<20) + "\r\nContent-Length: 2\r\n\r\nok", refused: true},
}

// TestAnswers: what net/http makes of an answer we make of it too, unless it is one to refuse.
func TestAnswers(t *testing.T) {
	t.Parallel()
	for _, a := range answers {
		t.Run(a.name, func(t *testing.T) {
			t.Parallel()
			text, eof := strings.CutSuffix(a.answer, "EOF")
			b := newBackend(t, func(w *wire) {
				if _, _, err := w.request(); err != nil {
					return
				}
				w.say(text)
				if !eof {
					w.untilClosed()
				}
			})
			stock := &http.Transport{DisableCompression: true}
			defer stock.CloseIdleConnections()
			method := cmp.Or(a.method, http.MethodGet)
			want := "error"
			if !a.refused {
				if want = roundTrip(stock, newRequest(t, method, b.url(), nil)); want == "error" {
					t.Fatal("net/http refuses that")
				}
			}
			within(t, a.name, func() {
				if got := roundTrip(newLean(t), newRequest(t, method, b.url(), nil)); got != want {
					t.Errorf("got  %.600s\nwant %.600s", got, want)
				}
			})
		})
	}
}

// TestOddAnswers: the connection of an answer that is taken although it is odd is closed after it, and what waits behind it is nobody's answer.
func TestOddAnswers(t *testing.T) {
	t.Parallel()
	const forged = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
	for _, a := range answers {
		if !a.odd {
			continue
		}
		t.Run(a.name, func(t *testing.T) {
			t.Parallel()
			text, eof := strings.CutSuffix(a.answer, "EOF")
			for _, behind := range []string{"", forged} {
				closed := make(chan struct{})
				b := newBackend(t, func(w *wire) {
					if w.nth > 0 {
						if _, _, err := w.request(); err == nil {
							w.say("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond")
						}
						w.untilClosed()
						return
					}
					defer close(closed)
					if _, _, err := w.request(); err != nil {
						return
					}
					if eof {
						w.say(text)
						return
					}
					w.say(text + behind)
					w.untilClosed()
				})
				c := newLean(t)
				method := cmp.Or(a.method, http.MethodGet)
				within(t, a.name, func() {
					if got := roundTrip(c, newRequest(t, method, b.url(), nil)); got == "error" || strings.Contains(got, "forged") {
						t.Errorf("got %.600s", got)
					}
				})
				if n := c.idleCount(); n != 0 {
					t.Errorf("%d connections are idle", n)
				}
				hasClosed(t, closed)
				if got := roundTrip(c, newRequest(t, "GET", b.url(), nil)); !strings.Contains(got, "second") {
					t.Errorf("then got %s", got)
				}
			}
		})
	}
}

// TestOddWhileSending: a connection is closed after an odd answer also when a sender has it.
func TestOddWhileSending(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"LF alone":       "HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
		"LF in a 1xx":    "HTTP/1.1 103 Early Hints\nX: 1\n\n" + okAnswer,
		"LF in the 100":  "HTTP/1.1 100 Continue\n\n",
		"folded":         "HTTP/1.1 200 OK\r\nX: 1\r\n 2\r\nContent-Length: 2\r\n\r\nok",
		"both lengths":   "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
		"nothing to say": "HTTP/1.1 204 No Content\n\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			closed := make(chan struct{})
			b := newBackend(t, func(w *wire) {
				defer close(closed)
				req, err := http.ReadRequest(w.Reader)
				if err != nil {
					return
				}
				early := strings.HasPrefix(answer, "HTTP/1.1 100")
				if early {
					w.say(answer)
				}
				if body, err := io.ReadAll(req.Body); err != nil || len(body) != 3*inlineMax {
					t.Errorf("%d bytes of the body came: %v", len(body), err)
				}
				if early {
					w.say(okAnswer)
				} else {
					w.say(answer)
				}
				w.untilClosed()
			})
			c := newLean(t, func(c *Client) { c.ContinueTimeout = patience })
			req := newRequest(t, "POST", b.url(), strings.NewReader(strings.Repeat("x", 3*inlineMax)))
			if strings.HasPrefix(answer, "HTTP/1.1 100") {
				req.Header.Set("Expect", "100-continue")
			}
			within(t, name, func() {
				if got := roundTrip(c, req); got == "error" || strings.Contains(got, "broken off") {
					t.Errorf("got %s", got)
				}
			})
			hasClosed(t, closed)
			if n := c.idleCount(); n != 0 {
				t.Errorf("%d connections are idle", n)
			}
		})
	}
}

// TestOddInPieces: where the reader's buffer ends, and where a read does, is nothing to an odd head.
func TestOddInPieces(t *testing.T) {
	t.Parallel()
	for _, tail := range []string{
		"X-A: 1\nX-B: 2\r\nX-C: 3\nContent-Length: 2\n\nok", "X-A: 1\r\n 2\r\n\t3\r\nContent-Length:\r\n 2\r\n\r\nok",
		"X-A: 1\n 2\n\tthree\r\n \nContent-Length: 2\n\r\nok", "Content-Length: 2\r\n\nok", "X-A: 1\n 2\nTransfer-Encoding: chunked\nContent-Length: 2\n\n2\r\nok\r\n0\r\n\r\n",
	} {
		for pad := defaultReadBuffer - 120; pad < defaultReadBuffer; pad++ {
			data := []byte("HTTP/1.1 200 OK\nX-Pad: " + strings.Repeat("p", pad) + "\n" + tail)
			want, _ := stockAnswer(data, http.MethodGet)
			if want == "error" {
				t.Fatalf("net/http refuses %q", tail)
			}
			if got, idle := cannedAnswer(t, bytes.NewReader(data), http.MethodGet, 0); got != want || idle {
				t.Fatalf("%q after %d bytes: idle %t\ngot  %.300s\nwant %.300s", tail, pad, idle, got, want)
			}
		}
	}
	for _, a := range answers {
		if !a.odd || len(a.answer) > 4<<10 {
			continue
		}
		data := []byte(strings.TrimSuffix(a.answer, "EOF"))
		method := cmp.Or(a.method, http.MethodGet)
		want, _ := stockAnswer(data, method)
		for size := 16; size < 64; size++ {
			if got, idle := cannedAnswer(t, bytes.NewReader(data), method, size); got != want || idle {
				t.Errorf("%s with a buffer of %d: idle %t\ngot  %s\nwant %s", a.name, size, idle, got, want)
			}
		}
		if got, idle := cannedAnswer(t, iotest.OneByteReader(bytes.NewReader(data)), method, 16); got != want || idle {
			t.Errorf("%s byte by byte: idle %t\ngot  %s\nwant %s", a.name, idle, got, want)
		}
	}
}

// TestBadChunks: a body that is not to the letter breaks off, and its connection serves nobody else.
func TestBadChunks(t *testing.T) {
	t.Parallel()
	for name, body := range map[string]string{
		"no size":           "\r\nok\r\n0\r\n\r\n",
		"no hex":            "z\r\nok\r\n0\r\n\r\n",
		"signed":            "+2\r\nok\r\n0\r\n\r\n",
		"0x":                "0x2\r\nok\r\n0\r\n\r\n",
		"space first":       " 2\r\nok\r\n0\r\n\r\n",
		"overlong":          "10000000000000002\r\nok\r\n0\r\n\r\n",
		"bare LF":           "2\nok\r\n0\r\n\r\n",
		"bare CR":           "2\rok\r\n0\r\n\r\n",
		"short":             "1\r\nok\r\n0\r\n\r\n",
		"long":              "3\r\nok\r\n0\r\n\r\n",
		"LF after the data": "2\r\nok\n0\r\n\r\n",
		"long extension":    "2;" + strings.Repeat("x", 5000) + "\r\nok\r\n0\r\n\r\n",
		"many extensions":   strings.Repeat("1;"+strings.Repeat("x", 1000)+"\r\nx\r\n", 30) + "0\r\n\r\n",
		"folded trailer":    "2\r\nok\r\n0\r\nX: 1\r\n 2\r\n\r\n",
		"bare LF in it":     "2\r\nok\r\n0\r\nX: 1\n\r\n",
		"length in it":      "2\r\nok\r\n0\r\nContent-Length: 1\r\n\r\n",
		"coding in it":      "2\r\nok\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
		"long trailer":      "2\r\nok\r\n0\r\nX: " + strings.Repeat("x", 5000) + "\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			closed := make(chan struct{})
			b := newBackend(t, func(w *wire) {
				defer close(closed)
				if _, _, err := w.request(); err == nil {
					w.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + strings.Repeat(okAnswer, 3))
				}
				w.untilClosed()
			})
			c := newLean(t)
			within(t, name, func() {
				if got := roundTrip(c, newRequest(t, "GET", b.url(), nil)); !strings.HasSuffix(got, "broken off") {
					t.Errorf("got %s", got)
				}
			})
			hasClosed(t, closed)
		})
	}
}

// TestExtraBytes: what comes after an answer is nobody's answer.
func TestExtraBytes(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]string{
		"after a length":   okAnswer + "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged",
		"after chunks":     "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n" + okAnswer,
		"after HEAD":       "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
		"after 204":        "HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nok",
		"after 204 chunks": "HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"after 304":        "HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\n\r\nok",
		"after nothing":    "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n" + okAnswer,
		"one byte":         okAnswer + "\n",
		"CRLF":             okAnswer + "\r\n",
		"later":            okAnswer + "LATER" + okAnswer,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			said := make(chan struct{}, 2)
			first, later, _ := strings.Cut(answer, "LATER")
			b := newBackend(t, func(w *wire) {
				for {
					if _, _, err := w.request(); err != nil {
						return
					}
					if w.nth > 0 {
						w.say("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond")
						continue
					}
					w.say(first)
					if later != "" {
						w.say(later)
					}
					said <- struct{}{}
				}
			})
			c := newLean(t)
			method := "GET"
			if name == "after HEAD" {
				method = "HEAD"
			}
			roundTrip(c, newRequest(t, method, b.url(), nil))
			<-said
			eventually(t, "the second answer", func() bool {
				got := roundTrip(c, newRequest(t, "GET", b.url(), nil))
				if strings.Contains(got, "forged") || !strings.Contains(got, "second") {
					t.Errorf("got %s", got)
				}
				return true
			})
			if n := b.conns.Load(); n != 2 {
				t.Errorf("%d connections, want 2", n)
			}
		})
	}
}

// canned is a connection on which a backend has said something and closed.
type canned struct {
	net.Conn
	r io.Reader
}

func (c *canned) Read(p []byte) (int, error)     { return c.r.Read(p) }
func (*canned) Write(p []byte) (int, error)      { return len(p), nil }
func (*canned) Close() error                     { return nil }
func (*canned) SetReadDeadline(time.Time) error  { return nil }
func (*canned) SetWriteDeadline(time.Time) error { return nil }

// cannedAnswer is what we make of what a backend says, and whether its connection waits for another request then.
func cannedAnswer(t *testing.T, r io.Reader, method string, buffer int) (got string, idle bool) {
	t.Helper()
	c := &Client{ReadBuffer: buffer, Dial: func(context.Context, string, string) (net.Conn, error) { return &canned{r: r}, nil }}
	defer c.Close()
	got = outcome(c.RoundTrip(newRequest(t, method, "http://backend/", nil), Target{}))
	return got, c.idleCount() > 0
}

// stockAnswer is what net/http makes of the same, and the heads that it has read. It makes nothing of a 101, whose body is the connection.
func stockAnswer(data []byte, method string) (want string, heads [][]byte) {
	req := &http.Request{Method: method}
	r := bytes.NewReader(data)
	br := bufio.NewReader(r)
	for {
		start := len(data) - r.Len() - br.Buffered()
		res, err := http.ReadResponse(br, req)
		if err == nil {
			heads = append(heads, data[start:len(data)-r.Len()-br.Buffered()])
			if res.StatusCode == http.StatusSwitchingProtocols {
				return "", heads
			}
			if res.StatusCode < 200 {
				continue
			}
		}
		return outcome(res, err), heads
	}
}

// straighten writes a head as it should have been, by what textproto says of folds. even tells that it was so already.
func straighten(head []byte) (straight []byte, even bool) {
	even = true
	for i, line := range bytes.Split(bytes.TrimSuffix(head, []byte("\n")), []byte("\n")) {
		line, crlf := bytes.CutSuffix(line, []byte("\r"))
		even = even && crlf
		switch {
		case i == 0: // its spaces count
		case len(line) > 0 && (line[0] == ' ' || line[0] == '\t'):
			even = false
			straight = append(bytes.TrimSuffix(straight, []byte("\r\n")), ' ')
			fallthrough
		default:
			line = bytes.Trim(line, " \t")
		}
		straight = append(append(straight, line...), "\r\n"...)
	}
	return straight, even
}

// FuzzAnswer holds our reader against net/http's: what that refuses we refuse, and what we accept we understand as it does. We accept heads with bare LFs
// and folds if we do without these, and then their connection serves nobody else, and neither does that of an answer with two kinds of length.
func FuzzAnswer(f *testing.F) {
	for _, a := range answers {
		if len(a.answer) < 4<<10 {
			f.Add([]byte(strings.TrimSuffix(a.answer, "EOF")), a.method == "HEAD")
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, head bool) {
		method := http.MethodGet
		if head {
			method = http.MethodHead
		}
		want, heads := stockAnswer(data, method)
		if want == "" {
			return
		}
		got, idle := cannedAnswer(t, bytes.NewReader(data), method, 0)
		switch {
		case got == want, got == "error":
		case strings.HasSuffix(got, " broken off") && !strings.HasSuffix(want, " broken off"):
			// A trailer that we refuse comes after the body.
			if !strings.HasPrefix(want, got[:strings.LastIndex(got, " trailer ")]) {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		default:
			t.Errorf("%q\ngot  %s\nwant %s", data, got, want)
		}
		if want == "error" {
			return
		}
		read, even := 0, true
		var plain []byte
		for _, h := range heads {
			straight, e := straighten(h)
			plain = append(plain, straight...)
			read, even = read+len(h), even && e
		}
		last := bytes.ToLower(heads[len(heads)-1])
		both := bytes.Contains(last, []byte("\ncontent-length:")) && strings.Contains(want, "[chunked]")
		if idle && (!even || both) {
			t.Errorf("%q is odd, and its connection serves others", data)
		}
		if bytes.Contains(plain, []byte(" \r\n")) || bytes.Count(data, []byte("\n")) > maxHeaderFields {
			return // at a value's end net/http leaves the space of a fold with nothing in it; lines are counted before they are joined
		}
		if same, _ := cannedAnswer(t, bytes.NewReader(append(plain, data[read:]...)), method, 0); same != got {
			t.Errorf("%q\ngot %s\nand of %q\n%s", data, got, plain, same)
		}
	})
}
