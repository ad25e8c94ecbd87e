package caddymodule

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/dustin/go-humanize"

	"github.com/caddy-wechat/caddy-wechat/tokens"
	"github.com/caddy-wechat/caddy-wechat/tokens/redisstore"
)

// optionParsers are the functions that parse a block of the Caddyfile: what the block is, and of which type's options.
// Each path begins with what the doc comment of that type's UnmarshalCaddyfile and the documents show it under.
var optionParsers = map[string]struct{ of, path string }{
	"App.UnmarshalCaddyfile":        {"App", "wechat"},
	"App.unmarshalPlatform":         {"App", "wechat platform"},
	"App.unmarshalAccount":          {"App", "wechat account"},
	"App.unmarshalClient":           {"App", "wechat client"},
	"RedisStore.UnmarshalCaddyfile": {"RedisStore", "store"},
	"RedisStore.unmarshalTLS":       {"RedisStore", "store tls"},
	"RedisStore.unmarshalSentinel":  {"RedisStore", "store sentinel"},
	"Verify.UnmarshalCaddyfile":     {"Verify", "wechat_verify"},
	"Event.UnmarshalCaddyfile":      {"Event", "wechat_event"},
	"Event.unmarshalForward":        {"Event", "wechat_event forward"},
	"Message.unmarshalOption":       {"Message", "wechat_message"},
	"API.UnmarshalCaddyfile":        {"API", "wechat_api"},
	"OAuth.UnmarshalCaddyfile":      {"OAuth", "wechat_oauth"},
	"Func.unmarshalOption":          {"OAuth", "wechat_oauth func"},
	"Authorize.UnmarshalCaddyfile":  {"Authorize", "wechat_authorize"},
	"JSSDK.UnmarshalCaddyfile":      {"JSSDK", "wechat_jssdk"},
}

// source is what the package's files say, the tests aside.
type source struct {
	functions map[string]*ast.FuncDecl // by "Type.method"
	types     map[string]*ast.StructType
	comments  map[string]string // of types
}

func parseSource(t *testing.T) source {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	s := source{make(map[string]*ast.FuncDecl), make(map[string]*ast.StructType), make(map[string]string)}
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Recv != nil {
					receiver := d.Recv.List[0].Type
					if star, ok := receiver.(*ast.StarExpr); ok {
						receiver = star.X
					}
					if ident, ok := receiver.(*ast.Ident); ok {
						s.functions[ident.Name+"."+d.Name.Name] = d
					}
				}
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					if spec, ok := spec.(*ast.TypeSpec); ok {
						if structure, ok := spec.Type.(*ast.StructType); ok {
							s.types[spec.Name.Name], s.comments[spec.Name.Name] = structure, d.Doc.Text()
						}
					}
				}
			}
		}
	}
	return s
}

var (
	wantShape   = regexp.MustCompile(`want ([a-z0-9_, ]+)$`)
	blockArgs   = regexp.MustCompile("\"[^\"]*\"|`[^`]*`")
	codeCell    = regexp.MustCompile("`([^`]+)`")
	numberShape = regexp.MustCompile(`^-?[0-9][0-9,_]*$`)
	sizeShape   = regexp.MustCompile(`^[0-9]+ ?[KM]iB$`)
	timeShape   = regexp.MustCompile(`^[0-9.]+ ?(?:ms|s|m|h)$`)
	defaultSaid = regexp.MustCompile(`Default: (.+?)\.(?: |$)`)
)

// namesIn are the names of a list such as "a, b or c".
func namesIn(list string) []string {
	return strings.FieldsFunc(strings.ReplaceAll(list, " or ", ","), func(r rune) bool { return r == ',' || r == ' ' })
}

// parsed are the options that a function takes, and those that its error says it wants.
func parsed(d *ast.FuncDecl) (taken, wanted []string) {
	ast.Inspect(d, func(n ast.Node) bool {
		clauses, ok := n.(*ast.SwitchStmt)
		if !ok {
			return true
		}
		var cases, want []string
		for _, c := range clauses.Body.List {
			c := c.(*ast.CaseClause)
			for _, e := range c.List {
				if l, ok := e.(*ast.BasicLit); ok && l.Kind == token.STRING {
					text, _ := strconv.Unquote(l.Value)
					cases = append(cases, text)
				}
			}
			if c.List != nil {
				continue
			}
			ast.Inspect(c, func(n ast.Node) bool {
				if l, ok := n.(*ast.BasicLit); ok && strings.Contains(l.Value, "unknown subdirective") {
					text, _ := strconv.Unquote(l.Value)
					if m := wantShape.FindStringSubmatch(text); m != nil {
						want = namesIn(m[1])
					}
				}
				return true
			})
		}
		if want != nil {
			taken, wanted = cases, want
		}
		return true
	})
	slices.Sort(taken)
	slices.Sort(wanted)
	return taken, wanted
}

// readBlock adds the options of a block that is written as in a Caddyfile, or on one line with semicolons, with what follows each.
func readBlock(into map[string]string, path, text string) {
	text = strings.ReplaceAll(text, `\|`, "|")
	depth, start := 0, 0
	flush := func(end int) {
		piece := strings.TrimSpace(text[start:end])
		start = end + 1
		head, body, nested := strings.Cut(piece, "{")
		words := strings.Fields(head)
		if len(words) == 0 {
			return
		}
		name := path + " " + words[0]
		into[name] = strings.Join(words[1:], " ")
		if nested {
			readBlock(into, name, strings.TrimSuffix(strings.TrimSpace(body), "}"))
		}
	}
	for i, c := range blockArgs.ReplaceAllStringFunc(text, func(q string) string { return strings.Repeat("x", len(q)) }) {
		switch {
		case c == '{':
			depth++
		case c == '}':
			depth--
		case depth == 0 && (c == ';' || c == '\n'):
			flush(i)
		}
	}
	flush(len(text))
}

// inComment are the options that the comment of a type's UnmarshalCaddyfile shows.
func inComment(s source, of string) map[string]string {
	var code strings.Builder
	for line := range strings.Lines(s.functions[of+".UnmarshalCaddyfile"].Doc.Text()) {
		if strings.HasPrefix(line, "\t") {
			code.WriteString(line)
		}
	}
	all := make(map[string]string)
	readBlock(all, "", code.String())
	return trimmed(all)
}

func trimmed(all map[string]string) map[string]string {
	out := make(map[string]string, len(all))
	for name, rest := range all {
		out[strings.TrimSpace(name)] = rest
	}
	return out
}

// redisHeadings are the headings above the options of store redis, by document.
var redisHeadings = map[string]string{"docs/clustering.md": "## What it takes", "docs/clustering.zh-CN.md": "## 需要什么"}

// inDocument are the options that a document shows in the headings of directives, and in the tables of wechat and store redis; and
// the defaults that tables of options below a directive's heading say, by directive and option.
func inDocument(t *testing.T, file string) (options, defaults map[string]string) {
	t.Helper()
	content, err := os.ReadFile("../" + file)
	if err != nil {
		t.Fatal(err)
	}
	options, defaults = make(map[string]string), make(map[string]string)
	under, column := "", 0
	for line := range strings.Lines(string(content)) {
		cells := strings.Split(strings.ReplaceAll(strings.TrimSpace(line), `\|`, "\x00"), "|")
		switch {
		case strings.HasPrefix(line, "#"):
			under = ""
			if m := codeCell.FindStringSubmatch(line); m != nil && strings.HasPrefix(line, "### ") && strings.HasPrefix(m[1], "wechat") {
				under = strings.Fields(m[1])[0]
				readBlock(options, "", m[1])
			} else if redisHeadings[file] != "" && strings.HasPrefix(line, redisHeadings[file]) {
				under = "store"
			}
		case under == "" || len(cells) < 4:
			column = 0
		case column == 0: // a table's head
			column = max(slices.IndexFunc(cells, func(c string) bool { c = strings.TrimSpace(c); return c == "default" || c == "默认" }), 0)
			if column == 0 {
				column = -1
			}
		case column > 0:
			m := codeCell.FindStringSubmatch(cells[1])
			if m == nil {
				continue
			}
			name := strings.ReplaceAll(m[1], "\x00", "|")
			if under == "wechat" || under == "store" {
				readBlock(options, under, name)
			}
			defaults[under+" "+strings.Fields(name)[0]] = strings.Trim(strings.TrimSpace(cells[column]), "`")
		}
	}
	return trimmed(options), defaults
}

// below are the options right below a path.
func below(all map[string]string, path string) (names []string) {
	for name := range all {
		if rest, ok := strings.CutPrefix(name, path+" "); ok && !strings.Contains(rest, " ") {
			names = append(names, rest)
		}
	}
	slices.Sort(names)
	return names
}

// TestOptionsAreDocumented: what a parser takes is what its error wants, what the doc comment shows, and what the documents show in
// both languages; no more and no less.
func TestOptionsAreDocumented(t *testing.T) {
	t.Parallel()
	s := parseSource(t)
	for name, d := range s.functions {
		if _, listed := optionParsers[name]; !listed {
			if taken, _ := parsed(d); taken != nil {
				t.Errorf("%s parses options and is not in optionParsers", name)
			}
		}
	}
	documents := make(map[string]map[string]string)
	for _, file := range []string{"README.md", "README.zh-CN.md", "docs/clustering.md", "docs/clustering.zh-CN.md"} {
		documents[file], _ = inDocument(t, file)
	}
	for _, name := range slices.Sorted(maps.Keys(optionParsers)) {
		p := optionParsers[name]
		if s.functions[name] == nil {
			t.Errorf("there is no %s", name)
			continue
		}
		taken, wanted := parsed(s.functions[name])
		if len(taken) == 0 || !slices.Equal(taken, wanted) {
			t.Errorf("%s takes %q, and its error wants %q", name, taken, wanted)
		}
		if got := below(inComment(s, p.of), p.path); !slices.Equal(got, taken) {
			t.Errorf("%s takes %q, and the comment of %s.UnmarshalCaddyfile shows %q", name, taken, p.of, got)
		}
		files := []string{"README.md", "README.zh-CN.md"}
		if p.of == "RedisStore" {
			files = slices.Sorted(maps.Keys(redisHeadings))
		}
		for _, file := range files {
			if got := below(documents[file], p.path); !slices.Equal(got, taken) {
				t.Errorf("%s takes %q, and %s shows %q", name, taken, file, got)
			}
		}
	}
	// The matcher's fields are a table, not a switch.
	var fields []string
	for _, f := range new(MessageMatcher).fields() {
		fields = append(fields, f.name)
	}
	if got := namesIn(matchFieldNames); !slices.Equal(got, fields) {
		t.Errorf("the matcher has the fields %q, and its error wants %q", fields, got)
	}
	for file, comma := range map[string]string{"README.md": ", ", "README.zh-CN.md": "、"} {
		content, err := os.ReadFile("../" + file)
		if err != nil {
			t.Fatal(err)
		}
		if list := "`" + strings.Join(fields, "`"+comma+"`") + "`"; !strings.Contains(strings.ReplaceAll(string(content), "\n", " "), list) {
			t.Errorf("%s does not list the matcher's fields as %s", file, list)
		}
	}
}

// provisioned are modules that were given nothing but what they must have, by type, and what takes the place of a field that stays
// empty, by type and field.
func provisioned(t *testing.T) (modules map[string]any, standsFor map[string]any) {
	t.Helper()
	app, ctx := newTestApp(t, `{"platforms": [{"appid": "`+platformID+`", "secret": "s", "tokens": ["t"], "aes_keys": ["`+platformKey+`"]}]}`)
	f := &Func{Key: "scan", Prefix: "https://shop.example.com/"}
	o := &OAuth{Base: "/wx/thirdParty", Funcs: []*Func{f}}
	modules = map[string]any{
		"App": app, "Platform": app.Platforms[0], "Account": new(Account), "Client": new(Client),
		"Verify": new(Verify), "Event": new(Event), "Message": new(Message),
		"API": new(API), "OAuth": o, "Func": f, "Authorize": &Authorize{Base: "/wx/authorize"}, "JSSDK": new(JSSDK), "Permission": new(Permission),
		"RedisStore": new(RedisStore), "RedisTLS": new(RedisTLS), "RedisSentinel": new(RedisSentinel),
		"MessageMatcher": new(MessageMatcher), "ForwardLimits": new(ForwardLimits),
	}
	modules["ForwardLimits"].(*ForwardLimits).provision()
	for _, name := range []string{"Event", "Message", "API", "OAuth", "Authorize"} {
		provisioning.Lock()
		err := modules[name].(caddy.Provisioner).Provision(ctx)
		provisioning.Unlock()
		if err != nil {
			t.Fatal(err)
		}
	}
	return modules, map[string]any{
		"App api": tokens.DefaultOrigin, "App open": defaultOpen, "Platform release_check": app.Platforms[0].releaseCheck(),
		"RedisStore prefix": redisstore.DefaultPrefix, "RedisStore dial_timeout": redisstore.DefaultDialTimeout,
		"RedisStore timeout": redisstore.DefaultTimeout, "RedisStore pool_size": int64(redisstore.DefaultPoolSize),
	}
}

// fieldsOf are the fields of a configuration's type, by their names in JSON.
func fieldsOf(v any) map[string]reflect.Value {
	fields := make(map[string]reflect.Value)
	value := reflect.ValueOf(v).Elem()
	for i := range value.NumField() {
		if name, _, _ := strings.Cut(value.Type().Field(i).Tag.Get("json"), ","); name != "" {
			fields[name] = value.Field(i)
		}
	}
	return fields
}

// inForce is the value of a field in the form in which meant returns what is said of it; nil: there is none.
func inForce(field reflect.Value, standsFor any) any {
	switch v := field.Interface().(type) {
	case caddy.Duration:
		if v != 0 {
			return time.Duration(v)
		}
	case int, int64:
		if !field.IsZero() {
			return field.Int()
		}
	case bool:
		return v
	case string:
		if v != "" {
			return v
		}
	}
	if standsFor != nil {
		return standsFor
	}
	if field.CanInt() {
		return field.Int()
	}
	return nil
}

// meant is the value that a text says: a duration, a size in bytes, a number, a bool, or a word.
func meant(text string) any {
	text = strings.Trim(strings.TrimSpace(text), "`\"")
	switch {
	case timeShape.MatchString(text):
		if d, err := caddy.ParseDuration(strings.ReplaceAll(text, " ", "")); err == nil {
			return d
		}
	case sizeShape.MatchString(text):
		if n, err := humanize.ParseBytes(text); err == nil {
			return int64(n) //nolint:gosec // of a document of ours
		}
	case numberShape.MatchString(text):
		if n, err := strconv.ParseInt(strings.NewReplacer(",", "", "_", "").Replace(text), 10, 64); err == nil {
			return n
		}
	case text == "true", text == "on":
		return true
	case text == "false", text == "off", text == "关":
		return false
	}
	return text
}

// agree reports whether what is said of a default is so. Words may say more than the value: "local" is in "cluster with …, else local".
func agree(said string, actual any) bool {
	first, _, _ := strings.Cut(said, " for each ") // of a number of something
	first, _, _ = strings.Cut(first, "（每个")
	first, _, _ = strings.Cut(first, ",")
	if m := meant(first); reflect.TypeOf(m).Kind() != reflect.String {
		return m == actual
	}
	word, isWord := actual.(string)
	return actual == nil || isWord && strings.Contains(said, word) || reflect.ValueOf(actual).IsZero()
}

// TestDefaultsAreAsDocumented: each field of the configuration has a comment that says what it is without a value, and the defaults
// that comments, headings and tables say are those of the code.
func TestDefaultsAreAsDocumented(t *testing.T) {
	t.Parallel()
	s := parseSource(t)
	modules, standsFor := provisioned(t)
	checked := 0
	check := func(where, of, name, said string) {
		t.Helper()
		field, ok := fieldsOf(modules[of])[name]
		if !ok {
			return // it is written otherwise in JSON, and has no default of its own
		}
		if _, word := meant(said).(string); !word {
			checked++
		}
		if actual := inForce(field, standsFor[of+" "+name]); !agree(said, actual) {
			t.Errorf("%s: the default of %s.%s is said to be %s, and is %v", where, of, name, said, actual)
		}
	}
	for of := range modules {
		for _, field := range s.types[of].Fields.List {
			if field.Tag == nil {
				continue
			}
			tag, _ := strconv.Unquote(field.Tag.Value)
			name, _, _ := strings.Cut(reflect.StructTag(tag).Get("json"), ",")
			text := strings.Join(strings.Fields(field.Doc.Text()), " ")
			said := defaultSaid.FindStringSubmatch(text)
			switch {
			case said != nil:
				check("its comment", of, name, said[1])
			case !strings.Contains(text, "Required") && !strings.Contains(text, "At least one"):
				t.Errorf("%s.%s: its comment says neither a default nor that it is required: %q", of, field.Names[0], text)
			}
		}
	}
	owners := make(map[string]string) // path -> type of the fields
	for name, p := range optionParsers {
		owners[p.path], _, _ = strings.Cut(name, ".")
	}
	owners["wechat_event forward"] = "ForwardLimits"
	owners["wechat platform"], owners["wechat account"], owners["wechat client"] = "Platform", "Account", "Client"
	for _, file := range []string{"README.md", "README.zh-CN.md", "docs/clustering.md", "docs/clustering.zh-CN.md"} {
		options, tables := inDocument(t, file)
		for option, said := range options {
			path, name := option[:max(strings.LastIndex(option, " "), 0)], option[strings.LastIndex(option, " ")+1:]
			if _, word := meant(said).(string); owners[path] != "" && !word {
				check(file+", heading", owners[path], name, said)
			}
		}
		for option, said := range tables {
			directive, name, _ := strings.Cut(option, " ")
			check(file+", table", owners[directive], name, said)
			if directive == "wechat_oauth" {
				check(file+", table", "Func", name, said)
			}
		}
	}
	if checked < 40 {
		t.Errorf("only %d defaults are numbers, sizes, durations or switches", checked)
	}
}

// TestCommentNamesMetrics: the app's comment, which is what Caddy's documentation shows, names each metric and event.
func TestCommentNamesMetrics(t *testing.T) {
	t.Parallel()
	text := parseSource(t).comments["App"]
	named := regexp.MustCompile(`\bcaddy_wechat_[a-z_]+`).FindAllString(text, -1)
	slices.Sort(named)
	if want := slices.Sorted(maps.Keys(exposed(t))); !slices.Equal(named, want) {
		t.Errorf("the comment names %q, and there are %q", named, want)
	}
	for _, event := range append(slices.Collect(maps.Values(eventNames)), eventReleaseCheck) {
		if !strings.Contains(text, event) {
			t.Errorf("the comment does not name %s", event)
		}
	}
}

// sourceOf is the text of the package's files that begin with prefix, the tests aside.
func sourceOf(t *testing.T, prefix string) string {
	t.Helper()
	files, err := filepath.Glob(prefix + "*.go")
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		text.Write(content)
	}
	return text.String()
}

// found are the first groups of what an expression finds.
func found(text, expression string) (all []string) {
	for _, m := range regexp.MustCompile(expression).FindAllStringSubmatch(text, -1) {
		all = append(all, m[1])
	}
	return all
}

// TestLabelValuesAreDocumented: the values of labels in monitoring.md are those of the source, no more and no less, in both languages.
func TestLabelValuesAreDocumented(t *testing.T) {
	t.Parallel()
	said := make(map[string]map[string][]string) // by document, then by metric and label
	for _, file := range monitoringDocs {
		document, err := os.ReadFile("../docs/" + file)
		if err != nil {
			t.Fatal(err)
		}
		said[file] = make(map[string][]string)
		for _, m := range regexp.MustCompile("(?m)^\\| `(\\w+)` \\| (.+?) \\| (.+) \\|$").FindAllStringSubmatch(string(document), -1) {
			for metric := range strings.SplitSeq(strings.NewReplacer("`", "", "、", ", ", "令牌", "tokens").Replace(m[2]), ", ") {
				said[file][metric+" "+m[1]] = found(m[3], "`([a-z_]+)`")
			}
		}
	}
	all := sourceOf(t, "")
	// What an oauthFailure's result is, in its declaration or where it is set.
	set := func(text string) []string {
		return found(text, `(?:\bresult: |\bf\.result\b[^=\n]*= [^"\n]*)"([a-z_]+)"`)
	}
	authorize := set(sourceOf(t, "authorize"))
	for _, name := range found(sourceOf(t, "authorize"), `\b(fail[A-Z]\w+)`) { // one of the logins'
		authorize = append(authorize, found(all, name+` += &oauthFailure\{[^\n]*result: "([a-z_]+)"`)...)
	}
	user := sourceOf(t, "oauth_user")
	oauth := append(found(user, `a\.told\(w, step, "([a-z_]+)"`), found(user, `(?m)^\t+return "([a-z_]+)"$`)...)
	oauth = append(oauth, set(sourceOf(t, "oauth"))...)
	pushes := append(found(all, `pushes\.WithLabelValues\("[a-z_]+", "([a-z_]+)"`), found(sourceOf(t, "push"), `&refusal\{http\.\w+, "([a-z_]+)"`)...)
	var kinds []string
	for _, kind := range tokens.Kinds() {
		kinds = append(kinds, string(kind))
	}
	for label, want := range map[string][]string{
		"pushes_total endpoint":          found(all, `pushes\.WithLabelValues\("([a-z_]+)"`),
		"pushes_total result":            pushes,
		"replies_total outcome":          found(sourceOf(t, "message_reply"), `(?m)^\toutcome\w+ += "([a-z_]+)"`),
		"late_replies_total result":      {resultOK, resultError},
		"token_refreshes_total result":   {resultOK, resultError},
		"forwards_total outcome":         found(sourceOf(t, "../tokens/forward"), `ForwardEnd = "([a-z_]+)"`),
		"mirrors_total result":           found(all, `(?m)^\tmirror[A-Z]\w+ += "([a-z_]+)"`),
		"pushes_forgotten_total what":    {droppedAnswer, droppedIdentity},
		"api_requests_total result":      found(sourceOf(t, "api_transport"), `(?m)^\toutcome\w+ += "([a-z_]+)"`),
		"oauth_total step":               found(all, `oauthStep = "([a-z_]+)"`),
		"oauth_total result":             oauth,
		"oauth_forgotten_total what":     found(sourceOf(t, "oauth_metrics"), `"([a-z_]+)": +forgotten\.`),
		"authorize_total step":           found(all, `authorizeStep = "([a-z_]+)"`),
		"authorize_total result":         append(authorize, found(sourceOf(t, "authorize"), `return "([a-z_]+)", nil`)...),
		"jssdk_total result":             append(set(sourceOf(t, "jssdk")), found(sourceOf(t, "jssdk"), `j\.count\("([a-z_]+)"`)...),
		"tokens kind":                    kinds,
		"push_duration_seconds endpoint": found(all, `pushDuration\.WithLabelValues\("([a-z_]+)"`),
	} {
		slices.Sort(want)
		want = slices.Compact(want)
		for _, file := range monitoringDocs {
			got := slices.Sorted(slices.Values(said[file][label]))
			if !slices.Equal(got, want) || len(want) < 2 {
				t.Errorf("%s: %s has the values %q, the source %q", label, file, got, want)
			}
		}
	}
}

// TestSelectedLabelValues: the values that alert rules and the dashboard select are ones that the source has.
func TestSelectedLabelValues(t *testing.T) {
	t.Parallel()
	text := sourceOf(t, "") + sourceOf(t, "../tokens/forward")
	selector := regexp.MustCompile(`[a-z_]+(?:=~|!~|!=|=)"([a-z_|]+)"`)
	selected := 0
	for _, file := range []string{"../docs/alerts.yml", "../docs/grafana-dashboard.json"} {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range selector.FindAllStringSubmatch(strings.ReplaceAll(string(content), `\"`, `"`), -1) {
			for value := range strings.SplitSeq(m[1], "|") {
				selected++
				if !strings.Contains(text, `"`+value+`"`) {
					t.Errorf("%s: nothing has the label value %s", file, value)
				}
			}
		}
	}
	if selected < 10 {
		t.Errorf("only %d values are selected", selected)
	}
}
