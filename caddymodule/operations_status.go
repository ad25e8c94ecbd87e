package caddymodule

import "net/http"

// status shows the state of everything, and what is wrong.
func (o *operations) status(w http.ResponseWriter, r *http.Request) error {
	if o.app == nil {
		return errNoApp
	}
	return answerJSON(w, http.StatusOK, o.app.status(r.Context()))
}

// ready says whether the gateway can serve, and why not.
func (o *operations) ready(w http.ResponseWriter, r *http.Request) error {
	if o.app == nil {
		return errNoApp
	}
	answer := struct {
		Ready    bool      `json:"ready"`
		Findings []Finding `json:"findings,omitempty"`
	}{Findings: o.app.ready(r.Context())}
	status := http.StatusServiceUnavailable
	if answer.Ready = len(answer.Findings) == 0; answer.Ready {
		status = http.StatusOK
	}
	return answerJSON(w, status, answer)
}
