package caddymodule

import (
	"context"
	"encoding/hex"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp"
	"github.com/caddyserver/caddy/v2/modules/caddyhttp/tracing"
	"go.opentelemetry.io/otel/trace"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// spanReceiver is what spans are exported to, by OTLP over HTTP.
type spanReceiver struct {
	*httptest.Server
	mu    sync.Mutex
	spans []*otlp.Span
}

func newSpanReceiver(t *testing.T) *spanReceiver {
	t.Helper()
	s := new(spanReceiver)
	s.Server = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		var export collector.ExportTraceServiceRequest
		if err != nil || proto.Unmarshal(body, &export) != nil {
			t.Error("no OTLP")
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, resource := range export.GetResourceSpans() {
			for _, scope := range resource.GetScopeSpans() {
				s.spans = append(s.spans, scope.GetSpans()...)
			}
		}
	}))
	t.Cleanup(s.Close)
	return s
}

// span returns the only span of that name, and its attributes as texts.
func (s *spanReceiver) span(t *testing.T, name string) (*otlp.Span, map[string]string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	var found *otlp.Span
	for _, span := range s.spans {
		if span.GetName() == name {
			if found != nil {
				t.Fatalf("two spans %q", name)
			}
			found = span
		}
	}
	if found == nil {
		t.Fatalf("no span %q", name)
	}
	attributes := make(map[string]string)
	for _, a := range found.GetAttributes() {
		attributes[a.GetKey()] = strings.Trim(strings.TrimPrefix(a.GetValue().String(), "string_value:"), `" `)
	}
	return found, attributes
}

// traced runs a handler behind Caddy's handler tracing.
func traced(t *testing.T, name string, r *http.Request, h caddyhttp.HandlerFunc) *httptest.ResponseRecorder {
	t.Helper()
	provisioning.Lock()
	ctx, err := caddy.ProvisionContext(&caddy.Config{Admin: &caddy.AdminConfig{Disabled: true}})
	provisioning.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	tracer := &tracing.Tracing{SpanName: name}
	if err := tracer.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	rec := httptest.NewRecorder()
	r = caddyhttp.PrepareRequest(r, caddy.NewReplacer(), rec, &caddyhttp.Server{})
	if err := tracer.ServeHTTP(rec, r, h); err != nil {
		t.Error(err)
	}
	if err := tracer.Cleanup(); err != nil { // exports what there is
		t.Error(err)
	}
	return rec
}

// traceHeaders are what tracing systems put into a request.
var traceHeaders = map[string]string{
	"Traceparent": "00-" + traceID + "-00f067aa0ba902b7-01", "Tracestate": "a=b", "Baggage": "user=alice",
	"B3": traceID + "-00f067aa0ba902b7-1", "X-B3-Traceid": traceID, "X-B3-Sampled": "1", "Uber-Trace-Id": traceID + ":1:0:1", "Uberctx-User": "alice",
	"X-Amzn-Trace-Id": "Root=1-5759e988-bd862e3fe1be46a994272793", "Ot-Tracer-Traceid": traceID, "Ot-Baggage-User": "alice",
	"X-Cloud-Trace-Context": traceID + "/1;o=1", "X-Datadog-Trace-Id": "1", "Sentry-Trace": traceID + "-1-1",
}

const traceID = "4bf92f3577b34da6a3ce929d0e0e4736"

// A push is traced to the backend, a call to WeChat, and WeChat sees nothing of either.
func TestTraces(t *testing.T) {
	receiver := newSpanReceiver(t)
	t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.URL)
	t.Setenv("OTEL_PROPAGATORS", "tracecontext,baggage,b3,b3multi,jaeger,ottrace,xray")

	_, ctx := newTestApp(t, testConfig(""))
	m := new(Message)
	if err := m.Provision(ctx); err != nil {
		t.Fatal(err)
	}
	r := platformSender(t).push("/wx/message/"+authorizerID, textMessage("hidden"))
	r.Header.Set("Traceparent", traceHeaders["Traceparent"])
	backend := caddyhttp.HandlerFunc(func(w http.ResponseWriter, r *http.Request) error {
		if got := r.Header.Get("Traceparent"); !strings.Contains(got, traceID) || got == traceHeaders["Traceparent"] {
			t.Errorf("the backend gets the trace %q", got)
		}
		if got := trace.SpanContextFromContext(r.Context()); got.TraceID().String() != traceID {
			t.Errorf("the backend's handler is in the trace %s", got.TraceID())
		}
		_, err := io.WriteString(w, replyXML)
		return err
	})
	if rec := traced(t, "push", r, func(w http.ResponseWriter, r *http.Request) error { return m.ServeHTTP(w, r, backend) }); rec.Code != http.StatusOK {
		t.Fatal(rec.Code)
	}
	span, attributes := receiver.span(t, "push")
	if hex.EncodeToString(span.GetTraceId()) != traceID {
		t.Errorf("trace %x", span.GetTraceId())
	}
	wantAttributes(t, attributes, map[string]string{
		"wechat.kind": "push", "wechat.appid": authorizerID, "wechat.platform": platformID, "wechat.what": "text", "wechat.outcome": "ok",
	})

	wechat := newFakeWeChat(t)
	wechat.answer(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, `{"errcode":48001,"errmsg":"api unauthorized rid: 64f1e2d3-0a1b2c3d-4e5f6071"}`)
	})
	g := newGateway(t, wechat, "", "")
	call := httptest.NewRequest(http.MethodGet, "/"+accountID+"/cgi-bin/user/info?openid=hidden", nil)
	call.Header.Set("Authorization", "Bearer "+crmKey)
	for name, value := range traceHeaders {
		call.Header.Set(name, value)
	}
	call = call.WithContext(context.WithValue(t.Context(), http.ServerContextKey, new(http.Server)))
	traced(t, "call", call, func(w http.ResponseWriter, r *http.Request) error { return g.api.ServeHTTP(w, r, nil) })
	for name := range wechat.one(t).Header {
		if _, ours := traceHeaders[name]; ours {
			t.Errorf("WeChat gets %s", name)
		}
	}
	outer, attributes := receiver.span(t, "call")
	wantAttributes(t, attributes, map[string]string{"wechat.kind": "call", "wechat.client": "crm", "wechat.what": "/cgi-bin/user/info", "wechat.outcome": "refused"})
	inner, attributes := receiver.span(t, "wechat /cgi-bin/user/info")
	wantAttributes(t, attributes, map[string]string{"wechat.rid": "64f1e2d3-0a1b2c3d-4e5f6071", "wechat.errcode": "int_value:48001"})
	if string(inner.GetParentSpanId()) != string(outer.GetSpanId()) || hex.EncodeToString(inner.GetTraceId()) != traceID {
		t.Errorf("the call to WeChat is not below the call to the gateway")
	}
	receiver.mu.Lock()
	defer receiver.mu.Unlock()
	for _, span := range receiver.spans {
		for _, hidden := range []string{"hidden", "REALTOKEN", crmKey, openID} {
			for _, a := range span.GetAttributes() {
				if strings.Contains(a.String(), hidden) {
					t.Errorf("%s of %s shows %s", a.GetKey(), span.GetName(), hidden)
				}
			}
		}
	}
}

func wantAttributes(t *testing.T, got, want map[string]string) {
	t.Helper()
	for name, value := range want {
		if got[name] != value {
			t.Errorf("%s is %q, want %q", name, got[name], value)
		}
	}
}
