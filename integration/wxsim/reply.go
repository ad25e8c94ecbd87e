package wxsim

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// judging is what is needed to read the answer to one push as WeChat does.
type judging struct {
	crypt    *Crypt
	mode     Mode
	format   Format
	user     string // openid that the reply must go to
	account  string // gh_ id that it must come from
	mini     bool
	articles int           // most articles in a news reply
	ownBody  bool          // the event wants a body of its own kind
	ahead    time.Duration // WeChat's clock, see Server.SetClock
}

const answerSuccess = "success"

// verdict reads one answer.
func (j judging) verdict(att Attempt) verdict {
	v, err := j.read(att)
	if err == nil {
		return v
	}
	saw := FaultText
	if j.mini {
		saw = FaultTextMini
	}
	return verdict{kind: ReplyNone, wrong: err.Error(), saw: saw, reply: v.reply}
}

func (j judging) read(att Attempt) (verdict, error) {
	if att.Err != nil {
		return verdict{}, fmt.Errorf("no answer: %w", att.Err)
	}
	if att.Status != http.StatusOK {
		return verdict{}, fmt.Errorf("status %d", att.Status)
	}
	if len(att.Body) == 0 || string(att.Body) == answerSuccess {
		return verdict{kind: ReplySuccess}, nil
	}
	message := att.Body
	sealed := bytes.Contains(message, []byte("Encrypt"))
	switch {
	case j.mode == ModePlain && sealed:
		return verdict{}, errors.New("encrypted reply in plain mode")
	case j.mode == ModeSafe, sealed:
		var err error
		if message, err = j.open(att.Body, time.Now().Add(j.ahead)); err != nil {
			return verdict{}, err
		}
		if string(bytes.TrimSpace(message)) == answerSuccess {
			return verdict{}, errors.New("`success` encrypted")
		}
	}
	return j.message(message)
}

// timestampSlack is how far the TimeStamp of a reply may be from now.
const timestampSlack = 5 * time.Minute

// open reads a reply's envelope: the four elements once each, nothing before, between or
// behind them.
func (j judging) open(body []byte, now time.Time) ([]byte, error) {
	root, err := parse(body, j.format)
	if err != nil {
		return nil, fmt.Errorf("reply envelope: %w", err)
	}
	if first, last := body[0], body[len(body)-1]; j.format == FormatXML && (first != '<' || last != '>') {
		return nil, errors.New("reply envelope: extra bytes around it")
	}
	var value [4]string
	names := []string{"Encrypt", "MsgSignature", "TimeStamp", "Nonce"}
	for i, name := range names {
		n, err := root.only(name)
		if err != nil {
			return nil, fmt.Errorf("reply envelope: %w", err)
		}
		value[i] = n.text
		if i == 2 && n.quoted {
			return nil, errors.New("reply envelope: TimeStamp is not a bare number")
		}
	}
	if len(root.children) != len(names) {
		return nil, errors.New("reply envelope: unknown element")
	}
	seconds, err := strconv.ParseInt(value[2], 10, 64)
	if err != nil {
		return nil, errors.New("reply envelope: TimeStamp is not a number")
	}
	if off := now.Sub(time.Unix(seconds, 0)).Abs(); off > timestampSlack {
		return nil, fmt.Errorf("reply envelope: TimeStamp is off by %s", off.Round(time.Second))
	}
	if value[3] == "" {
		return nil, errors.New("reply envelope: Nonce is empty")
	}
	if value[1] != j.crypt.Sign(value[2], value[3], value[0]) {
		return nil, errors.New("reply envelope: MsgSignature is wrong")
	}
	message, err := j.crypt.Open(value[0])
	if err != nil {
		return nil, fmt.Errorf("reply envelope: %w", err)
	}
	return message, nil
}

// message reads the reply itself.
func (j judging) message(message []byte) (verdict, error) {
	v := verdict{reply: message}
	root, err := parse(message, j.format)
	if err != nil {
		return v, fmt.Errorf("reply: %w", err)
	}
	if j.ownBody {
		v.kind = ReplyRaw
		return v, nil
	}
	for name, want := range map[string]string{"ToUserName": j.user, "FromUserName": j.account} {
		n, err := root.only(name)
		if err != nil {
			return v, fmt.Errorf("reply: %w", err)
		}
		if n.text != want {
			return v, fmt.Errorf("reply: %s is not %s", name, want)
		}
	}
	created, err := root.only("CreateTime")
	if err != nil {
		return v, fmt.Errorf("reply: %w", err)
	}
	if _, err := strconv.ParseInt(created.text, 10, 64); err != nil {
		return v, errors.New("reply: CreateTime is not a number")
	}
	kind, err := root.only("MsgType")
	if err != nil {
		return v, fmt.Errorf("reply: %w", err)
	}
	v.kind = ReplyKind(kind.text)
	if j.mini && kind.text != "transfer_customer_service" {
		return v, fmt.Errorf("reply: %s to a mini program", kind.text)
	}
	v.saw, err = j.shown(kind.text, root)
	return v, err
}

// shown is what the user sees of a reply.
func (j judging) shown(kind string, root *node) (string, error) {
	switch kind {
	case "text":
		content, err := root.only("Content")
		if err == nil && content.text == "" {
			err = errors.New("empty Content")
		}
		if err != nil {
			return "", fmt.Errorf("reply: %w", err)
		}
		return content.text, nil
	case "image", "voice", "video":
		part, err := root.only(strings.ToUpper(kind[:1]) + kind[1:])
		if err != nil {
			return "", fmt.Errorf("reply: %w", err)
		}
		id, err := part.only("MediaId")
		if err != nil {
			return "", fmt.Errorf("reply: %w", err)
		}
		return "[" + kind + " " + id.text + "]", nil
	case "music":
		if _, err := root.only("Music"); err != nil {
			return "", fmt.Errorf("reply: %w", err)
		}
		return "[music]", nil
	case "news":
		return j.news(root)
	case "transfer_customer_service":
		return "", nil
	default:
		return "", fmt.Errorf("reply: unknown MsgType %q", kind)
	}
}

func (j judging) news(root *node) (string, error) {
	count, err := root.only("ArticleCount")
	if err != nil {
		return "", fmt.Errorf("reply: %w", err)
	}
	var titles []string
	for _, list := range root.all("Articles") {
		items := list.all("item")
		if len(items) == 0 {
			items = []*node{list} // JSON: an array of articles
		}
		for _, item := range items {
			title, err := item.only("Title")
			if err != nil {
				return "", fmt.Errorf("reply: article: %w", err)
			}
			titles = append(titles, title.text)
		}
	}
	if n, err := strconv.Atoi(count.text); err != nil || n != len(titles) || n < 1 || n > j.articles {
		return "", fmt.Errorf("reply: ArticleCount %s with %d articles, at most %d are allowed", count.text, len(titles), j.articles)
	}
	return strings.Join(titles, "\n"), nil
}

// node is an element of a reply, in either format.
type node struct {
	name, text string
	quoted     bool // CDATA or a JSON string
	children   []*node
}

func (n *node) all(name string) []*node {
	return slices.DeleteFunc(slices.Clone(n.children), func(c *node) bool { return c.name != name })
}

func (n *node) only(name string) (*node, error) {
	switch found := n.all(name); len(found) {
	case 0:
		return nil, fmt.Errorf("%s is missing", name)
	case 1:
		return found[0], nil
	default:
		return nil, fmt.Errorf("%s more than once", name)
	}
}

func parse(data []byte, format Format) (*node, error) {
	if format == FormatJSON {
		return parseJSONNode(data)
	}
	return parseXMLNode(data)
}

// parseXMLNode reads one <xml> element: no BOM, DOCTYPE, comment or second root. White space and an
// XML declaration before it are let pass here; the envelope is held to the first byte.
func parseXMLNode(data []byte) (*node, error) {
	if bytes.HasPrefix(data, []byte("\xef\xbb\xbf")) {
		return nil, errors.New("byte order mark")
	}
	d := xml.NewDecoder(bytes.NewReader(data))
	root := &node{}
	stack := []*node{root}
	for {
		start := d.InputOffset()
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, errors.New("not XML")
		}
		top := stack[len(stack)-1]
		switch t := token.(type) {
		case xml.StartElement:
			child := &node{name: t.Name.Local}
			top.children = append(top.children, child)
			stack = append(stack, child)
		case xml.EndElement:
			stack = stack[:len(stack)-1]
		case xml.CharData:
			top.quoted = top.quoted || bytes.HasPrefix(data[start:], []byte("<![CDATA["))
			top.text += string(t)
		case xml.ProcInst:
			if t.Target != "xml" || len(root.children) > 0 {
				return nil, errors.New("processing instruction")
			}
		default:
			return nil, errors.New("comment or DOCTYPE")
		}
	}
	if len(root.children) != 1 || root.children[0].name != "xml" || strings.TrimSpace(root.text) != "" {
		return nil, errors.New("not exactly one <xml> element")
	}
	return root.children[0], nil
}

// parseJSONNode reads one JSON object without repeated names on its top level.
func parseJSONNode(data []byte) (*node, error) {
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	root := &node{}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, errors.New("not JSON")
		}
		key, _ := name.(string) // names are strings
		if len(root.all(key)) > 0 {
			return nil, fmt.Errorf("%s more than once", key)
		}
		var v any
		if d.Decode(&v) != nil {
			return nil, errors.New("not JSON")
		}
		root.children = append(root.children, jsonNodes(key, v)...)
	}
	if _, err := d.Token(); err != nil {
		return nil, errors.New("not JSON")
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("bytes after the JSON object")
	}
	return root, nil
}

// jsonNodes turns a value into the nodes that XML would have for it.
func jsonNodes(name string, v any) []*node {
	n := &node{name: name}
	switch v := v.(type) {
	case string:
		n.text, n.quoted = v, true
	case json.Number:
		n.text = v.String()
	case map[string]any:
		for key, child := range v {
			n.children = append(n.children, jsonNodes(key, child)...)
		}
	case []any:
		var list []*node
		for _, child := range v {
			list = append(list, jsonNodes(name, child)...)
		}
		return list
	}
	return []*node{n}
}
