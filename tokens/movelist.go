package tokens

import (
	"bufio"
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
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
	// maxListLine bounds a line of a list in CSV, in bytes.
	maxListLine = 16 << 10
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
// first use fetches one. A row that is not in order is counted as refused, and the others are written. So is a second row of
// an account, unless it says what the first one says.
//
// An authorizer that the store has already stays as it is, unless the row dates it later, or it was never used since an
// earlier list.
func (mv *Mover) ImportCSV(ctx context.Context, r io.Reader, dry bool) (Moved, error) {
	in := &csvLines{r: bufio.NewReaderSize(skipBOM(r), maxListLine)}
	header, wrong, err := in.next()
	switch {
	case wrong != "" || errors.Is(err, io.EOF):
		return Moved{}, fmt.Errorf("line 1: no header: it must name the columns, such as: %s", strings.Join(listFields, ","))
	case err != nil:
		return Moved{}, err
	}
	columns, err := csvColumns(header)
	if err != nil {
		return Moved{}, err
	}
	return mv.importList(ctx, dry, func() (row listRow, err error) {
		cells, wrong, err := in.next()
		row = listRow{line: in.line, wrong: wrong}
		switch {
		case err != nil || wrong != "":
			return row, err
		case len(cells) != len(columns):
			row.wrong = fmt.Sprintf("%d fields, and the header has %d", len(cells), len(columns))
			return row, nil
		}
		for i, cell := range cells {
			row.fields[columns[i]] = strings.TrimSpace(cell)
		}
		return row, nil
	})
}

// csvLines reads CSV line by line. No field of a list goes on on another line: a quote that is not closed spoils the line that
// it is on, and not all that follow.
type csvLines struct {
	r      *bufio.Reader
	line   int
	quoted bufio.Reader // for a line with quotes
}

// next is the next line that is not empty, or what is wrong with it.
func (c *csvLines) next() (cells []string, wrong string, err error) {
	for {
		text, err := c.r.ReadSlice('\n')
		c.line++
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = c.r.ReadSlice('\n')
			}
			if err != nil && !errors.Is(err, io.EOF) {
				return nil, "", err
			}
			return nil, fmt.Sprintf("longer than %d bytes", maxListLine), nil
		case err != nil && (!errors.Is(err, io.EOF) || len(text) == 0):
			return nil, "", err
		}
		text = bytes.TrimSuffix(bytes.TrimSuffix(text, []byte("\n")), []byte("\r"))
		switch {
		case len(text) == 0:
			continue
		case bytes.IndexByte(text, '"') < 0:
			return strings.Split(string(text), ","), "", nil
		}
		c.quoted.Reset(bytes.NewReader(text))
		in := csv.NewReader(&c.quoted)
		if cells, err = in.Read(); err != nil {
			return nil, "the quotes are not in order", nil
		}
		return cells, "", nil
	}
}

// csvColumns says which field each column is.
func csvColumns(header []string) ([]int, error) {
	columns := make([]int, len(header))
	for i, name := range header {
		columns[i] = slices.Index(listFields, strings.ToLower(strings.TrimSpace(name)))
		switch {
		case columns[i] < 0: // not shown: without a header this is a row
			hint := ""
			switch {
			case strings.Contains(name, "\x00"):
				hint = ", and the file saved as UTF-8"
			case strings.ContainsAny(name, ";\t"):
				hint = ", with commas between columns"
			}
			return nil, fmt.Errorf("line 1: column %d is none of %s: the first line must be a header%s", i+1, strings.Join(listFields, ", "), hint)
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
	notJSON := func(err error) error {
		offset := lines.read // it ended too early
		if bad, ok := errors.AsType[*json.SyntaxError](err); ok {
			offset = bad.Offset
		} else if err == nil {
			offset = dec.InputOffset()
		}
		return fmt.Errorf("line %d: not JSON: want an array of objects, or one object a line, with %s", lines.at(offset), strings.Join(listFields, ", "))
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
		row := listRow{line: lines.at(dec.InputOffset())}
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
	line   int
	fields [5]string // in the order of listFields
	wrong  string    // what is wrong with it
}

// where is how a refusal begins.
func (row *listRow) where() string { return "line " + strconv.Itoa(row.line) }

// listEntry is what a row says.
type listEntry struct {
	where string
	key   Key
	rec   *record
}

// listSeen knows the accounts of a list that were read, so that it is not left to chance which of two rows of one stays: the first
// does. A million accounts take some 80 MB.
type listSeen struct {
	seed      maphash.Seed
	platforms []string
	rows      map[listAccount]listFirst
}

// listAccount is an account of a list without pointers, which a million of them would cost the garbage collector.
type listAccount struct {
	platform int // of platforms
	digits   uint64
}

// listFirst is the first row of an account that was in order.
type listFirst struct {
	line   int
	tokens uint64 // a hash of all but the first two fields
}

// before reports whether an earlier row says the same of the account, and what is wrong if it says something else.
func (s *listSeen) before(k Key, row *listRow) (same bool, wrong string) {
	var h maphash.Hash
	h.SetSeed(s.seed)
	for _, field := range row.fields[2:] {
		_, _ = h.WriteString(field)
		_ = h.WriteByte(0) // which no field in order has
	}
	a := listAccount{platform: slices.Index(s.platforms, k.Platform)}
	if a.platform < 0 {
		a.platform, s.platforms = len(s.platforms), append(s.platforms, strings.Clone(k.Platform))
	}
	a.digits, _ = strconv.ParseUint(k.AppID[2:], 16, 64) // isAppID
	first, found := s.rows[a]
	switch {
	case !found:
		s.rows[a] = listFirst{row.line, h.Sum64()}
		return false, ""
	case first.tokens == h.Sum64():
		return true, ""
	default:
		return false, fmt.Sprintf("the account is on line %d too, with other tokens: line %d counts", first.line, first.line)
	}
}

func (mv *Mover) importList(ctx context.Context, dry bool, next func() (listRow, error)) (Moved, error) {
	var t tally
	seen := listSeen{seed: maphash.MakeSeed(), rows: make(map[listAccount]listFirst)}
	for {
		var page []listEntry
		var end error
		for len(page) < movePage && end == nil {
			row, err := next()
			if end = err; err != nil {
				break
			}
			k, rec, wrong := mv.record(&row)
			same := false
			if wrong == "" {
				same, wrong = seen.before(k, &row)
			}
			switch {
			case wrong != "":
				t.count(classAuthorizer, moveRefuse, row.where()+": "+wrong)
			case same:
				t.count(classAuthorizer, moveSame, "")
			default:
				page = append(page, listEntry{row.where(), k, rec})
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
