package caddymodule

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
)

// benchMessages is how many different pushes the benchmark has at hand: what the gateway remembers of them is thrown
// away before they come again.
const benchMessages = 20_000

// BenchmarkMessage is the gateway's own part of a push: everything but the network and reverse_proxy. The request and
// the table of variables that Caddy makes for each request are outside of the measured part, in "caddy". Every message is
// another one in "gateway"; in "again" one that was answered comes again.
func BenchmarkMessage(b *testing.B) {
	p := newPushBench(b, benchMessages)
	for _, part := range []struct {
		name      string
		different int
		h         caddyhttp.Handler
	}{{"caddy", benchMessages, p.backend()}, {"gateway", benchMessages, p.gateway()}, {"again", 1, p.gateway()}} {
		b.Run(part.name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if i%part.different == 0 && part.different > 1 {
					p.app.shared.calls = newCallTable(nil)
				}
				p.push(b, part.h, i%part.different)
			}
		})
	}
}

// pushBench has pushes at hand that go through wechat_message to a backend in this process.
type pushBench struct {
	app     *App
	message *Message
	request *http.Request
	pushes  []sealedPush
}

type sealedPush struct {
	url  url.URL
	body []byte
}

func newPushBench(tb testing.TB, messages int) *pushBench {
	app, ctx := newTestApp(tb, testConfig(""))
	p := &pushBench{app: app, message: new(Message), pushes: make([]sealedPush, messages)}
	if err := p.message.Provision(ctx); err != nil {
		tb.Fatal(err)
	}
	_ = app.manager()
	s := platformSender(tb)
	for i := range p.pushes {
		p.request = s.push("/wx/message/"+authorizerID, textMessage(strings.Repeat("长", 60)))
		body, _ := io.ReadAll(p.request.Body)
		p.pushes[i] = sealedPush{*p.request.URL, body}
	}
	// As WeChat sends them: with ours they are eight, beyond which a map is another.
	for name, value := range map[string]string{"User-Agent": "Mozilla/4.0", "Accept": "*/*", "Pragma": "no-cache"} {
		p.request.Header.Set(name, value)
	}
	return p
}

func (p *pushBench) backend() caddyhttp.Handler {
	reply := []byte(replyXML)
	return caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = w.Write(reply)
		return nil
	})
}

func (p *pushBench) gateway() caddyhttp.Handler {
	backend := p.backend()
	return caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error { return p.message.ServeHTTP(w, r, backend) })
}

// push has a handler answer the i-th push.
func (p *pushBench) push(tb testing.TB, h caddyhttp.Handler, i int) {
	push := &p.pushes[i]
	req := *p.request
	req.URL = &push.url
	req.Body, req.ContentLength = &lengthBody{*bytes.NewReader(push.body)}, int64(len(push.body))
	rec := &discardWriter{header: make(http.Header)}
	if err := h.ServeHTTP(rec, caddyhttp.PrepareRequest(&req, caddy.NewReplacer(), rec, &caddyhttp.Server{})); err != nil || rec.status != http.StatusOK {
		tb.Fatal(rec.status, err)
	}
}

// lengthBody is a body as net/http's server has one with a Content-Length: the last bytes come with its end.
type lengthBody struct{ bytes.Reader }

func (b *lengthBody) Read(p []byte) (n int, err error) {
	if n, err = b.Reader.Read(p); err == nil && b.Len() == 0 {
		err = io.EOF
	}
	return n, err
}

func (*lengthBody) Close() error { return nil }

// BenchmarkMatcher is one matcher that looks at a push, by the kinds of values that it may have.
func BenchmarkMatcher(b *testing.B) {
	for name, m := range benchMatchers() {
		match := matching(b, m)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				match()
			}
		})
	}
}

func benchMatchers() map[string]MessageMatcher {
	return map[string]MessageMatcher{
		"exact":  {Type: []string{"event"}, Event: []string{"VIEW", "LOCATION"}},
		"glob":   {EventKey: []string{"menu_*_buy"}},
		"regexp": {EventKey: []string{"~^menu_[0-9]+_"}},
	}
}

// matching has a matcher look at a location event.
func matching(tb testing.TB, m MessageMatcher) func() {
	if err := m.compile(); err != nil {
		tb.Fatal(err)
	}
	r := caddyhttp.PrepareRequest(httptest.NewRequest(http.MethodPost, "/", nil), caddy.NewReplacer(), nil, &caddyhttp.Server{})
	caddyhttp.SetVar(r.Context(), factsVar, &facts{appid: authorizerID, msgType: "event", event: "LOCATION", eventKey: "menu_12_buy"})
	return func() {
		if ok, err := m.MatchWithError(r); !ok || err != nil {
			tb.Fatal(ok, err)
		}
	}
}

// discardWriter is a response that nobody reads.
type discardWriter struct {
	header http.Header
	status int
}

func (w *discardWriter) Header() http.Header    { return w.header }
func (w *discardWriter) WriteHeader(status int) { w.status = status }
func (w *discardWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return len(b), nil
}
