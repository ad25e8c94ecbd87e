package wxsim

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptrace"
)

// Step is how far an API call or a push has come.
type Step string

// The steps: the first three are of API calls, the others of each attempt of a push.
const (
	StepArrived  Step = "arrived"  // the call was read, and nothing came of it yet
	StepActed    Step = "acted"    // it was carried out or refused; the answer is not sent
	StepAnswered Step = "answered" // the answer is on the connection, as far as the kernel is concerned
	StepPushed   Step = "pushed"   // the push is on the connection; it is not answered
	StepReplied  Step = "replied"  // its answer was read
)

// Progress is one step of one call or push. A call that is lost does not come to all of its steps. StepAnswered and
// StepPushed are told once the bytes are gone, so that the other side may be ahead of them.
type Progress struct {
	Step  Step
	Path  string // of the API call; "" for a push
	AppID string // the account that it is about; the platform's for its own token and tickets
	// Errcode is what the call is answered with, from StepActed on.
	Errcode int64
}

// Watch has f told of each step of what begins from now on; nil ends that. The call or push waits until f returns, and
// no lock is held meanwhile: f may hold it up, end the other side's process, or prepare a fault, which in StepArrived
// strikes this call.
func (s *Server) Watch(f func(Progress)) {
	if f == nil {
		f = func(Progress) {}
	}
	s.watcher.Store(&f)
}

func (s *Server) progress(p Progress) {
	if f := s.watcher.Load(); f != nil {
		(*f)(p)
	}
}

// progress tells of a step of the call.
func (c *call) progress(step Step, errcode int64) {
	if c.s.watcher.Load() == nil {
		return
	}
	c.s.progress(Progress{Step: step, Path: c.r.URL.Path, AppID: c.about(), Errcode: errcode})
}

// about is the appid of the account that the call is about, by what the call says; "" if it does not say.
func (c *call) about() string {
	if h, renews := c.renewalOf(); renews {
		return h.appID
	}
	var body struct {
		Authorizer string `json:"authorizer_appid"`
		Code       string `json:"authorization_code"`
	}
	_ = json.Unmarshal(c.body, &body) // a broken body says nothing
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	known := []string{body.Code}
	for _, parameter := range tokenParameters {
		known = append(known, c.query.Get(parameter))
	}
	if body.Authorizer != "" {
		return body.Authorizer
	}
	for _, value := range known {
		if cred := c.s.creds[value]; cred != nil {
			return cred.appID
		}
	}
	return ""
}

// flush brings the answer to the kernel before anybody hears that it was sent.
func (c *call) flush(w http.ResponseWriter) {
	if c.s.watcher.Load() != nil {
		_ = http.NewResponseController(w).Flush() // the client may be gone
	}
}

// watched is ctx for an attempt of the push that tells when it was sent.
func (d *delivery) watched(ctx context.Context) context.Context {
	if d.s.watcher.Load() == nil {
		return ctx
	}
	return httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{WroteRequest: func(sent httptrace.WroteRequestInfo) {
		if sent.Err == nil {
			d.s.progress(Progress{Step: StepPushed, AppID: d.appID})
		}
	}})
}
