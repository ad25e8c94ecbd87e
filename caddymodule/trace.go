package caddymodule

import (
	"context"
	"net/http"
	"strconv"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
)

// The gateway adds to the spans that Caddy's handler tracing begins, and begins one for each call to WeChat below that. Where
// nothing is traced this costs a look into the request's context. Attributes say what the feed says, and nothing more.

// tracerName is who begins the spans of calls to WeChat.
const tracerName = "github.com/caddy-wechat/caddy-wechat"

// spanOf returns the span of a request, or nil if that is not traced.
func spanOf(ctx context.Context) trace.Span {
	if span := trace.SpanFromContext(ctx); span.IsRecording() {
		return span
	}
	return nil
}

// traceEntry puts into the span of a request, if there is one, what the feed says of it.
func traceEntry(span trace.Span, e *Entry) {
	if span == nil {
		return
	}
	for _, a := range [...]struct{ name, value string }{
		{"wechat.kind", e.Kind}, {"wechat.appid", e.AppID}, {"wechat.platform", e.Platform}, {"wechat.client", e.Client},
		{"wechat.what", e.What}, {"wechat.outcome", e.Outcome}, {"wechat.rid", e.RID},
	} {
		if a.value != "" {
			span.SetAttributes(attribute.String(a.name, a.value))
		}
	}
	if e.ErrCode != 0 {
		span.SetAttributes(attribute.Int64("wechat.errcode", e.ErrCode))
	}
}

// traceCall begins the span of a call to WeChat, if the request is traced. End takes what came of it.
func traceCall(ctx context.Context, call *apiCall, method string) (inner context.Context, end func(*http.Response)) {
	if call.span == nil {
		return ctx, func(*http.Response) {}
	}
	inner, span := call.span.TracerProvider().Tracer(tracerName).Start(ctx, "wechat "+call.path, trace.WithSpanKind(trace.SpanKindClient),
		trace.WithAttributes(attribute.String("http.request.method", method), attribute.String("wechat.appid", call.appid)))
	return inner, func(res *http.Response) {
		if res != nil {
			span.SetAttributes(attribute.Int("http.response.status_code", res.StatusCode))
		}
		if call.errcode != 0 {
			span.SetAttributes(attribute.Int64("wechat.errcode", call.errcode), attribute.String("wechat.rid", call.rid))
			span.SetStatus(codes.Error, "errcode "+strconv.FormatInt(call.errcode, 10))
		} else if call.outcome == outcomeUnreachable || res == nil {
			span.SetStatus(codes.Error, "WeChat gave no answer")
		}
		span.End()
	}
}
