package caddymodule

import (
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// TestMessageForNobody: a route whose pushes would all be refused, for want of a token, is told of when the config is loaded.
func TestMessageForNobody(t *testing.T) {
	t.Parallel()
	const silent = `{"accounts": [{"appid": "wx2222222222222222", "secret": "s"}, {"appid": "wx3333333333333333", "secret": "s", "tokens": ["t"]}]}`
	const none = `{"accounts": [{"appid": "wx2222222222222222", "secret": "s"}]}`
	for _, tt := range []struct {
		config, appid string
		warned        bool
	}{
		{none, "", true},
		{none, "wx2222222222222222", true},
		{none, "wx9999999999999999", true},
		{silent, "", false},
		{silent, "wx2222222222222222", true},
		{silent, "wx3333333333333333", false},
		{testConfig(""), "wx9999999999999999", false}, // an account of the platform's
	} {
		app, ctx := newTestApp(t, tt.config)
		core, logs := observer.New(zapcore.WarnLevel)
		app.logger = zap.New(core)
		if err := (&Message{AppID: tt.appid}).Provision(ctx); err != nil {
			t.Fatal(err)
		}
		if got := logs.FilterMessageSnippet("wechat_message can take no push here").Len() == 1; got != tt.warned {
			t.Errorf("%s, %q: warned %v, want %v", tt.config, tt.appid, got, tt.warned)
		}
	}
}
