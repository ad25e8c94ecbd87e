package tokens

import (
	"bufio"
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
)

// Lists of refresh tokens, of other systems. What is said of a list never quotes it: it is full of secrets, and a column
// may be another one than its header says.

const (
	// maxListToken bounds a token in a list, in bytes. WeChat's have less than 200; it reserves 512 for an access token.
	maxListToken = 1024
	// listLife is the life of an access token in a list when it was issued: WeChat's two hours.
	listLife = 2 * time.Hour
)

// listFields are the columns of a list. The first three are required.
var listFields = []string{"platform", "appid", "refresh_token", "access_token", "expires_at"}

const listRequired = 3

// ImportCSV puts the authorizers of a list in CSV, with a header line, into the store: platform, appid, refresh_token and,
// if they are there, access_token and expires_at (Unix seconds, or as in RFC 3339). Without an access token the account's
// first use fetches one. A row that is not in order is counted as refused, and the others are written.
//
// An authorizer that the store has already stays as it is, unless the row dates it later, or it was never used since an
// earlier list.
func (mv *Mover) ImportCSV(ctx context.Context, r io.Reader, dry bool) (Moved, error) {
	in := csv.NewReader(skipBOM(r))
	in.FieldsPerRecord, in.ReuseRecord = -1, true
	header, err := in.Read()
	if err != nil {
		return Moved{}, noHeader(err)
	}
	columns, err := csvColumns(header)
	if err != nil {
		return Moved{}, err
	}
	return mv.importList(ctx, dry, func() (row listRow, err error) {
		cells, err := in.Read()
		if bad, ok := errors.AsType[*csv.ParseError](err); ok {
			return listRow{where: "line " + strconv.Itoa(bad.StartLine), wrong: "the quotes are not in order"}, nil
		}
		if err != nil {
			return listRow{}, err
		}
		line, _ := in.FieldPos(0)
		row.where = "line " + strconv.Itoa(line)
		if len(cells) != len(columns) {
			row.wrong = fmt.Sprintf("%d fields, and the header has %d", len(cells), len(columns))
			return row, nil
		}
		for i, cell := range cells {
			row.fields[columns[i]] = strings.TrimSpace(cell)
		}
		return row, nil
	})
}

func noHeader(err error) error {
	if _, bad := errors.AsType[*csv.ParseError](err); bad || errors.Is(err, io.EOF) {
		return fmt.Errorf("line 1: no header: it must name the columns, such as: %s", strings.Join(listFields, ","))
	}
	return err
}

// csvColumns says which field each column is.
func csvColumns(header []string) ([]int, error) {
	columns := make([]int, len(header))
	for i, name := range header {
		columns[i] = slices.Index(listFields, strings.ToLower(strings.TrimSpace(name)))
		switch {
		case columns[i] < 0: // not shown: without a header this is a row
			return nil, fmt.Errorf("line 1: column %d is none of %s: the first line must be a header", i+1, strings.Join(listFields, ", "))
		case slices.Contains(columns[:i], columns[i]):
			return nil, fmt.Errorf("line 1: the column %s comes twice", listFields[columns[i]])
		}
	}
	for i, field := range listFields[:listRequired] {
		if !slices.Contains(columns, i) {
			return nil, fmt.Errorf("line 1: the column %s is missing", field)
		}
	}
	return columns, nil
}

// skipBOM leaves out the byte order mark that spreadsheets write.
func skipBOM(r io.Reader) *bufio.Reader {
	b := bufio.NewReader(r)
	if mark, err := b.Peek(3); err == nil && string(mark) == "\xef\xbb\xbf" {
		_, _ = b.Discard(len(mark))
	}
	return b
}

// ImportJSON is ImportCSV of a JSON array of objects, or of objects one after the other, with the same fields.
func (mv *Mover) ImportJSON(ctx context.Context, r io.Reader, dry bool) (Moved, error) {
	lines := &lineCounter{r: skipBOM(r)}
	dec := json.NewDecoder(lines)
	where := func(offset int64) string { return "line " + strconv.Itoa(lines.at(offset)) }
	notJSON := func(err error) error {
		offset := lines.read // it ended too early
		if bad, ok := errors.AsType[*json.SyntaxError](err); ok {
			offset = bad.Offset
		} else if err == nil {
			offset = dec.InputOffset()
		}
		return fmt.Errorf("%s: not JSON: want an array of objects, or one object a line, with %s", where(offset), strings.Join(listFields, ", "))
	}
	first, err := lines.r.Peek(1)
	for err == nil && strings.ContainsAny(string(first), " \t\r\n") {
		lines.skip()
		first, err = lines.r.Peek(1)
	}
	array := err == nil && first[0] == '['
	if array {
		if _, err := dec.Token(); err != nil {
			return Moved{}, notJSON(err)
		}
	}
	return mv.importList(ctx, dry, func() (listRow, error) {
		if array && !dec.More() {
			if _, err := dec.Token(); err != nil {
				return listRow{}, notJSON(err)
			}
			if _, err := dec.Token(); !errors.Is(err, io.EOF) {
				return listRow{}, notJSON(err)
			}
			return listRow{}, io.EOF
		}
		var raw json.RawMessage
		err := dec.Decode(&raw)
		switch {
		case err != nil && lines.err != nil && !errors.Is(lines.err, io.EOF):
			return listRow{}, lines.err
		case errors.Is(err, io.EOF) && !array:
			return listRow{}, io.EOF
		case err != nil:
			return listRow{}, notJSON(err)
		}
		row := listRow{where: where(dec.InputOffset())}
		row.wrong = row.parse(raw)
		return row, nil
	})
}

// parse reads an object and says what is wrong with it.
func (row *listRow) parse(raw json.RawMessage) (wrong string) {
	dec := json.NewDecoder(bytes.NewReader(raw))
	if start, err := dec.Token(); err != nil || start != json.Delim('{') {
		return "not an object"
	}
	seen := [5]bool{}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return "not an object"
		}
		name, _ := key.(string)
		i := slices.Index(listFields, name)
		var value json.RawMessage
		switch err := dec.Decode(&value); {
		case err != nil:
			return "not an object"
		case i < 0:
			return "a field is none of " + strings.Join(listFields, ", ")
		case seen[i]:
			return name + ": comes twice"
		}
		seen[i] = true
		text := ""
		switch number := json.Number(""); {
		case string(value) == "null":
		case json.Unmarshal(value, &text) == nil:
		case name == "expires_at" && json.Unmarshal(value, &number) == nil:
			text = number.String()
		default:
			return name + ": not a text"
		}
		row.fields[i] = text
	}
	return ""
}

// lineCounter knows on which line each byte is that was read, as long as it is asked in order.
type lineCounter struct {
	r     *bufio.Reader
	err   error
	read  int64
	lines []int64 // where those begin that are not behind the last place asked for
	line  int     // before the first of them
}

// Read implements io.Reader.
func (c *lineCounter) Read(b []byte) (n int, err error) {
	n, err = c.r.Read(b)
	for i, x := range b[:n] {
		if x == '\n' {
			c.lines = append(c.lines, c.read+int64(i)+1)
		}
	}
	c.read += int64(n)
	c.err = err
	return n, err
}

// skip leaves out one byte, which the decoder does not get.
func (c *lineCounter) skip() {
	if x, err := c.r.ReadByte(); err == nil && x == '\n' {
		c.line++
	}
}

// at is the line of the byte before offset.
func (c *lineCounter) at(offset int64) int {
	i := 0
	for i < len(c.lines) && c.lines[i] < offset {
		i++
	}
	c.line, c.lines = c.line+i, c.lines[i:]
	return c.line + 1
}

// listRow is an entry of a list.
type listRow struct {
	where  string
	fields [5]string // in the order of listFields
	wrong  string    // what is wrong with it
}

// listEntry is what a row says.
type listEntry struct {
	where string
	key   Key
	rec   *record
}

func (mv *Mover) importList(ctx context.Context, dry bool, next func() (listRow, error)) (Moved, error) {
	var t tally
	for {
		var page []listEntry
		var end error
		for len(page) < movePage && end == nil {
			row, err := next()
			if end = err; err != nil {
				break
			}
			if k, rec, wrong := mv.record(&row); wrong != "" {
				t.count(classAuthorizer, moveRefuse, row.where+": "+wrong)
			} else {
				page = append(page, listEntry{row.where, k, rec})
			}
		}
		err := each(ctx, len(page), func(ctx context.Context, i int) error { return mv.putRow(ctx, page[i], dry, &t) })
		switch {
		case err != nil:
			return t.moved(), err
		case errors.Is(end, io.EOF):
			return t.moved(), nil
		case end != nil:
			return t.moved(), end
		}
	}
}

func (mv *Mover) putRow(ctx context.Context, row listEntry, dry bool, t *tally) error {
	v, err := edit(ctx, mv, row.key.recordName(), dry, func(there *recordWire) (*recordWire, verdict, error) {
		comes := row.rec.wire()
		if there == nil {
			return &comes, moveWrite, nil
		}
		held := there.record()
		switch same := held.RefreshToken.Same(row.rec.RefreshToken); {
		case same && !row.rec.after(held):
			return nil, moveSame, nil
		case !same && held.fromList():
			comes.Gen = held.Gen + 1
			return &comes, moveWrite, nil // the list was mended
		}
		return mergeToken(there, &comes)
	})
	if refused(err) {
		t.count(classAuthorizer, moveRefuse, row.where+": "+err.Error())
		return nil
	}
	if err == nil {
		t.count(classAuthorizer, v, "")
	}
	return err
}

// fromList reports whether the record came from a list, and was never used.
func (r *record) fromList() bool {
	return r.Gen > 0 && !r.revoked() && r.AuthorizedAt.IsZero() && r.ObtainedAt.IsZero() && r.CodeHash == "" && r.UserName == ""
}

// record makes a record of an entry and says what is wrong with it.
func (mv *Mover) record(row *listRow) (k Key, rec *record, wrong string) {
	if row.wrong != "" {
		return Key{}, nil, row.wrong
	}
	platform, appid, refresh, access, expires := row.fields[0], row.fields[1], row.fields[2], row.fields[3], row.fields[4]
	switch _, known := mv.env.platform(platform); {
	case !isAppID(platform):
		return Key{}, nil, "platform: not an appid: want wx and 16 lower-case hexadecimal digits"
	case !known:
		return Key{}, nil, "platform: the config has no such platform"
	case !isAppID(appid):
		return Key{}, nil, "appid: not an appid: want wx and 16 lower-case hexadecimal digits"
	case appid == platform:
		return Key{}, nil, "appid: it is the platform's own"
	}
	for i, token := range []string{refresh, access} {
		if wrong := checkListToken(token); wrong != "" {
			return Key{}, nil, listFields[2+i] + ": " + wrong
		}
	}
	rec = &record{Gen: 1, RefreshToken: secret.New(refresh)}
	switch {
	case refresh == "":
		return Key{}, nil, "refresh_token: missing"
	case access == "" && expires == "":
		return AuthorizerKey(platform, appid), rec, ""
	case expires == "":
		return Key{}, nil, "expires_at: missing, and there is an access_token"
	}
	at, ok := listTime(expires)
	if !ok {
		return Key{}, nil, "expires_at: want Unix seconds, or a time like 2026-01-02T15:04:05+08:00"
	}
	if access != "" && time.Now().Before(at) {
		if time.Until(at) > longestLife {
			return Key{}, nil, "expires_at: later than any access token of WeChat's lives; it is in seconds"
		}
		rec.AccessToken, rec.ExpiresAt, rec.ObtainedAt = secret.New(access), at, at.Add(-listLife)
	}
	return AuthorizerKey(platform, appid), rec, ""
}

// isAppID reports whether s has the shape of an appid.
func isAppID(s string) bool {
	digits, ok := strings.CutPrefix(s, "wx")
	return ok && len(digits) == 16 && strings.Trim(digits, "0123456789abcdef") == ""
}

func checkListToken(s string) (wrong string) {
	switch {
	case len(s) > maxListToken:
		return fmt.Sprintf("longer than %d bytes", maxListToken)
	case strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }):
		return "has a character that no token of WeChat's has"
	}
	return ""
}

func listTime(s string) (time.Time, bool) {
	if seconds, err := strconv.ParseInt(s, 10, 64); err == nil && seconds > 0 {
		return time.Unix(seconds, 0), true
	}
	at, err := time.Parse(time.RFC3339, s)
	return at.Truncate(time.Second), err == nil
}
