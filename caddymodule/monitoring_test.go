package caddymodule

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v3"

	"github.com/caddy-wechat/caddy-wechat/internal/secret"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

var descShape = regexp.MustCompile(`fqName: "([a-z_]+)".*variableLabels: \{([a-z_,]*)\}`)

// exposed are the gateway's metrics and their labels, as its collectors describe them.
func exposed(t *testing.T) map[string][]string {
	t.Helper()
	app, _ := newTestApp(t, testConfig(""))
	metrics := make(map[string][]string)
	descs := make(chan *prometheus.Desc, 100)
	for _, c := range append(app.metrics().collectors(), usersCollector{app.users()}) {
		c.Describe(descs)
	}
	close(descs)
	for d := range descs {
		m := descShape.FindStringSubmatch(d.String())
		if m == nil {
			t.Fatalf("what is %s", d)
		}
		metrics[m[1]] = strings.FieldsFunc(m[2], func(r rune) bool { return r == ',' })
	}
	return metrics
}

// In architecture's table of names each of these is there; more may be.
func TestMetricNames(t *testing.T) {
	t.Parallel()
	metrics := exposed(t)
	for name, labels := range map[string]string{
		"pushes_total": "endpoint,result", "push_duration_seconds": "endpoint", "push_retries_joined_total": "", "replies_total": "outcome",
		"token_refreshes_total": "kind,result", "token_refresh_duration_seconds": "kind", "token_waiters": "", "tokens_cached": "kind",
		"ticket_age_seconds": "platform", "api_requests_total": "client,result", "api_credential_retries_total": "kind", "api_errors_total": "errcode",
		"oauth_total": "step,result", "store_operation_duration_seconds": "store,op", "store_errors_total": "store,op", "lock_wait_seconds": "",
	} {
		if got, ok := metrics["caddy_wechat_"+name]; !ok || strings.Join(got, ",") != labels {
			t.Errorf("%s has the labels %q, want %q", name, got, labels)
		}
	}
}

var (
	metricShape   = regexp.MustCompile(`\b(caddy_[a-z_]+)(?:\{([^}]*)\})?`)
	selectorShape = regexp.MustCompile(`([a-z_]+)\s*(?:=~|!~|!=|=)\s*"[^"]*"`)
	groupShape    = regexp.MustCompile(`\b(?:by|without|on|ignoring)\s*\(([^)]*)\)`)
	legendShape   = regexp.MustCompile(`\{\{\s*(?:\$labels\.)?([a-z_]+)\s*\}\}`)
)

// checkExpr compares the names in an expression, and in the texts that are made of its result, with what there is.
func checkExpr(t *testing.T, metrics map[string][]string, expr string, texts ...string) {
	t.Helper()
	if strings.Count(expr, "(") != strings.Count(expr, ")") || strings.Count(expr, "{") != strings.Count(expr, "}") {
		t.Errorf("%s: its parentheses do not match", expr)
	}
	labels := []string{"instance", "job"}
	found := metricShape.FindAllStringSubmatch(expr, -1)
	if len(found) == 0 {
		t.Errorf("%s: no metric of the gateway's", expr)
	}
	for _, m := range found {
		name := m[1]
		own, ok := metrics[name]
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if base, cut := strings.CutSuffix(name, suffix); cut && !ok {
				if own, ok = metrics[base]; ok {
					own = append(slices.Clone(own), "le")
				}
			}
		}
		if !ok {
			t.Errorf("%s: there is no metric %s", expr, name)
		}
		for _, s := range selectorShape.FindAllStringSubmatch(m[2], -1) {
			if s[1] != "instance" && !slices.Contains(own, s[1]) {
				t.Errorf("%s: %s has no label %s", expr, name, s[1])
			}
		}
		labels = append(labels, own...)
	}
	grouped := labels
	for _, g := range groupShape.FindAllStringSubmatch(expr, -1) {
		grouped = nil
		for l := range strings.SplitSeq(g[1], ",") {
			if l = strings.TrimSpace(l); !slices.Contains(labels, l) {
				t.Errorf("%s: no label %s", expr, l)
			}
			grouped = append(grouped, l)
		}
	}
	for _, text := range texts {
		for _, l := range legendShape.FindAllStringSubmatch(text, -1) {
			if !slices.Contains(grouped, l[1]) {
				t.Errorf("%s: %q has a label that the result lacks", expr, text)
			}
		}
	}
}

func TestAlertRules(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../docs/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	dec := yaml.NewDecoder(strings.NewReader(string(text)))
	dec.KnownFields(true)
	if err := dec.Decode(&file); err != nil || len(file.Groups) == 0 {
		t.Fatal(err)
	}
	metrics, seen := exposed(t), map[string]bool{}
	for _, g := range file.Groups {
		for _, r := range g.Rules {
			if r.Alert == "" || seen[r.Alert] || r.Labels["severity"] == "" || r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
				t.Errorf("rule %q is not whole, or there twice", r.Alert)
			}
			seen[r.Alert] = true
			if strings.Contains(r.Expr, ") - ") && r.For == "" {
				t.Errorf("%s fires at once on the difference of counters, which do not count in one moment", r.Alert)
			}
			checkExpr(t, metrics, r.Expr, r.Annotations["summary"], r.Annotations["description"])
		}
	}
}

var increaseShape = regexp.MustCompile(`increase\((caddy_[a-z_]+)(?:\{([a-z]+)=~?"([^"]*)"\})?\[`)

// TestAlertsSeeTheFirstTime: what an alert looks for an increase of is there, at zero, before anything has happened. Prometheus takes a
// series that begins with 1 for one that has not increased.
func TestAlertsSeeTheFirstTime(t *testing.T) {
	t.Parallel()
	app, _ := newTestApp(t, testConfig(""))
	registry := prometheus.NewPedanticRegistry()
	if err := app.metrics().register(registry, usersCollector{app.users()}); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	atZero := func(name, label, value string) (n int) {
		for _, f := range families {
			for _, m := range f.GetMetric() {
				labels := make(map[string]string)
				for _, l := range m.GetLabel() {
					labels[l.GetName()] = l.GetValue()
				}
				if f.GetName() == name && labels[label] == value && m.GetCounter().GetValue() == 0 {
					n++
				}
			}
		}
		return n
	}
	text, err := os.ReadFile("../docs/alerts.yml")
	if err != nil {
		t.Fatal(err)
	}
	found := increaseShape.FindAllStringSubmatch(string(text), -1)
	if len(found) != strings.Count(string(text), "increase(") || len(found) == 0 {
		t.Fatalf("%d of the increases in the alert rules are understood", len(found))
	}
	for _, m := range found {
		for value := range strings.SplitSeq(m[3], "|") {
			if atZero(m[1], m[2], value) == 0 {
				t.Errorf("there is no series of %s with %q at the beginning", m[1], value)
			}
		}
	}
	for _, kind := range tokens.Kinds() {
		if atZero("caddy_wechat_rogue_refreshes_total", "kind", string(kind)) != 1 {
			t.Errorf("rogue refreshes of %s are not counted from the beginning", kind)
		}
	}
}

// TestAgeOfATicketThatNeverCame grows, or no alert would ever tell that tickets do not arrive.
func TestAgeOfATicketThatNeverCame(t *testing.T) {
	t.Parallel()
	app, _ := newTestApp(t, testConfig(""))
	app.inForce()
	k := app.metrics().keeping
	age := func() float64 {
		t.Helper()
		registry := prometheus.NewPedanticRegistry()
		registry.MustRegister(k)
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				if f.GetName() == "caddy_wechat_ticket_age_seconds" && m.GetLabel()[0].GetValue() == platformID {
					return m.GetGauge().GetValue()
				}
			}
		}
		t.Fatal("the platform has no age")
		return 0
	}
	if got := age(); got > 60 {
		t.Errorf("it begins with %v s", got)
	}
	k.mu.Lock()
	k.awaited[platformID] = k.awaited[platformID].Add(-time.Hour)
	k.mu.Unlock()
	if got := age(); got < 3600 {
		t.Errorf("an hour later it is %v s", got)
	}
	if err := app.manager().PutTicket(t.Context(), platformID, tokens.Ticket{Value: secret.New("ticket"), CreatedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	if got := age(); got > 60 {
		t.Errorf("with a ticket it is %v s", got)
	}
	if _, waits := k.awaited[platformID]; waits {
		t.Error("it is still remembered that the platform has none")
	}
}

// TestDashboard: it uses nothing that is not there, and shows every metric of the gateway's.
func TestDashboard(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../docs/grafana-dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Title  string
		Panels []struct {
			ID      int
			Title   string
			Targets []struct{ Expr, LegendFormat string }
		}
	}
	if err := json.Unmarshal(text, &board); err != nil || len(board.Panels) == 0 {
		t.Fatal(err)
	}
	metrics, ids := exposed(t), map[int]bool{}
	for _, p := range board.Panels {
		if p.Title == "" || ids[p.ID] || len(p.Targets) == 0 {
			t.Errorf("panel %d %q is not whole, or there twice", p.ID, p.Title)
		}
		ids[p.ID] = true
		for _, target := range p.Targets {
			checkExpr(t, metrics, target.Expr, target.LegendFormat)
		}
	}
	for name := range metrics {
		if !strings.Contains(string(text), name) && !slices.Contains(notOnTheBoard, name) {
			t.Errorf("no panel shows %s", name)
		}
	}
}

// monitoringDocs are the documents of metrics and events.
var monitoringDocs = []string{"monitoring.md", "monitoring.zh-CN.md"}

// TestMonitoringNamesEverything: each metric with its labels, and each event, is in the documentation, in both languages.
func TestMonitoringNamesEverything(t *testing.T) {
	t.Parallel()
	metrics := exposed(t)
	for _, file := range monitoringDocs {
		content, err := os.ReadFile("../docs/" + file)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(string(content), "`、`", "`, `")
		for name, labels := range metrics {
			row := "| `" + name + "` | "
			if len(labels) > 0 {
				row += "`" + strings.Join(labels, "`, `") + "`"
			}
			if !strings.Contains(text, row+" | ") {
				t.Errorf("%s: not there: %s", file, row)
			}
		}
		for _, m := range regexp.MustCompile("\\| `(caddy_[a-z_]+)`").FindAllStringSubmatch(text, -1) {
			if _, ok := metrics[m[1]]; !ok {
				t.Errorf("%s: there is no metric %s", file, m[1])
			}
		}
		for _, event := range append(slices.Collect(maps.Values(eventNames)), eventReleaseCheck) {
			if !strings.Contains(text, "| `"+event+"` | ") {
				t.Errorf("%s: not there: %s", file, event)
			}
		}
	}
}

// notOnTheBoard are metrics that alerts are for.
var notOnTheBoard = []string{"caddy_wechat_events_dropped_total"}

// TestLabelsAreBounded: whatever callers, forgers and WeChat send, there is no more of labels than at first.
func TestLabelsAreBounded(t *testing.T) {
	wechat := newFakeWeChat(t)
	wechat.answer(func(w http.ResponseWriter, r *http.Request) {
		_, _ = fmt.Fprintf(w, `{"errcode":%s,"errmsg":"hostile"}`, r.URL.Query().Get("n"))
	})
	g := newGateway(t, wechat, "", "")
	_, ctx := newTestApp(t, testConfig(""))
	m := new(Message)
	if err := m.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	m.app = g.app
	registry := prometheus.NewPedanticRegistry()
	if err := g.app.metrics().register(registry); err != nil {
		t.Fatal(err)
	}
	series := func() (n int) {
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			n += len(f.GetMetric())
		}
		return n
	}
	hostile := func(i int) {
		for _, key := range []string{crmKey, fmt.Sprintf("no-such-key-%012d", i)} {
			r := httptest.NewRequest(http.MethodGet, fmt.Sprintf("/%s/cgi-bin/path%d?n=%d", accountID, i, 987_000_000+i), nil)
			r.Header.Set("Authorization", "Bearer "+key)
			serve(t, g.api, r, nil)
		}
		stranger := fmt.Sprintf("wx%016x", i)
		r := httptest.NewRequest(http.MethodGet, "/"+stranger+"/cgi-bin/user/info", nil)
		r.Header.Set("Authorization", "Bearer "+crmKey)
		serve(t, g.api, r, nil)
		push := httptest.NewRequest(http.MethodPost, fmt.Sprintf("/wx/message/%s?signature=%d&timestamp=1&nonce=%d&msg_signature=x", stranger, i, i), strings.NewReader("<xml/>"))
		serve(t, m, push, nil)
		s := platformSender(t)
		event := strings.Replace(strings.Replace(textMessage("x"), "<![CDATA[text]]>", fmt.Sprintf("<![CDATA[kind%d]]>", i), 1), "<xml>", fmt.Sprintf("<xml><Event>e%d</Event>", i), 1)
		serve(t, m, s.push("/wx/message/"+stranger, event), caddyhttp.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) error {
			_, err := io.WriteString(w, replyXML)
			return err
		}))
	}
	for i := range 3 {
		hostile(i)
	}
	before := series()
	for i := range 30 {
		hostile(100 + i)
	}
	if after := series(); after != before {
		t.Errorf("%d series became %d", before, after)
	}
}
