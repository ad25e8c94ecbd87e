package caddymodule

import (
	"strings"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// explain tells the log what an errcode means and what to do, where that is for who runs the gateway. The answer is
// looked through for a request id and an address, and nothing else of it is logged.
func (t *Transport) explain(call *apiCall, code int64, answer []byte) {
	key := call.key
	switch {
	case key.Kind == "": // the call went with the account's secret
		key = tokens.AccountKey(call.appid)
	case key.Kind == tokens.KindComponent && call.appid != key.Platform && strings.HasPrefix(call.path, "/sns/"):
		key = tokens.AuthorizerKey(key.Platform, call.appid) // a login is the account's, whoever's token exchanges the code
	}
	known, _ := tokens.Explain(code)
	if !known.Reported() { // before the answer is copied
		return
	}
	t.sawRefusal(call, key, known, answer)
	r, say := t.app.manager().ExplainRefusal(key, call.path, code, string(answer))
	if !say {
		return
	}
	level := zapcore.WarnLevel
	if r.NamesEgressIP() {
		level = zapcore.ErrorLevel // no call of the account gets through
	}
	if c := t.logger.Check(level, "WeChat refused a call"); c != nil {
		fields := []zap.Field{
			zap.String("client", call.client), zap.String("appid", call.appid), zap.String("platform", key.Platform), zap.String("meaning", r.Meaning.EN),
		}
		c.Write(append(fields, refusalFields(r)...)...)
	}
}

// refusalFields are the log fields of a refusal.
func refusalFields(r tokens.Refusal) (fields []zap.Field) {
	args := r.Args()
	for i := 0; i+1 < len(args); i += 2 {
		fields = append(fields, zap.Any(args[i].(string), args[i+1]))
	}
	return fields
}

// withRemedy adds to WeChat's text, where the gateway answers in its place, what would mend it.
func withRemedy(refusal *tokens.APIError) string {
	known, _ := tokens.Explain(refusal.Code)
	switch {
	case known.Class != tokens.ClassOperator:
		return refusal.Msg
	case refusal.Msg == "":
		return known.Meaning.EN + ": " + known.Remedy.EN
	}
	return refusal.Msg + " [gateway: " + known.Remedy.EN + "]"
}

// explanation is what is known of an errcode, as JSON.
type explanation struct {
	Code    int64        `json:"errcode"`
	Known   bool         `json:"known"`
	Class   tokens.Class `json:"class"`
	Meaning *tokens.Text `json:"meaning"`
	Remedy  *tokens.Text `json:"remedy"`
}

func newExplanation(code int64) explanation {
	e, known := tokens.Explain(code)
	return explanation{code, known, e.Class, &e.Meaning, &e.Remedy}
}
