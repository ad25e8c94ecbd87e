package caddymodule

import (
	"net/http"
	"net/url"
	"strconv"
)

// How many entries one request gets.
const (
	defaultEntries = 100
	maxEntries     = 500
)

// entriesQuery is what a request for entries may say.
type entriesQuery struct {
	values url.Values
	appid  string
	limit  int
}

func readEntriesQuery(r *http.Request, also ...string) (q entriesQuery, err error) {
	q.limit = defaultEntries
	if q.values, err = operationQuery(r, append(also, "appid", "limit")...); err != nil {
		return q, err
	}
	if q.appid = q.values.Get("appid"); q.appid != "" && !isAppID(q.appid) {
		return q, badRequest("appid: want %s", appIDShape)
	}
	if text := q.values.Get("limit"); text != "" {
		if q.limit, err = strconv.Atoi(text); err != nil || q.limit < 1 || q.limit > maxEntries {
			return q, badRequest("limit: want a number from 1 to %d", maxEntries)
		}
	}
	return q, nil
}

// number reads a parameter that is a number; 0 if it is not there.
func (q *entriesQuery) number(name string) (int64, error) {
	text := q.values.Get(name)
	if text == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return 0, badRequest("%s: want a number", name)
	}
	return n, nil
}

// liveFeed tells what happened on this node since the caller asked last.
func (o *operations) liveFeed(w http.ResponseWriter, r *http.Request) error {
	if o.app == nil {
		return errNoApp
	}
	q, err := readEntriesQuery(r, "after")
	if err != nil {
		return err
	}
	after, err := q.number("after")
	if err != nil {
		return err
	}
	if after < 0 {
		return badRequest("after: want the next of an earlier answer")
	}
	entries, next, missed := o.app.shared.feed.after(uint64(after), q.appid, q.limit)
	if entries == nil {
		entries = []Entry{}
	}
	return answerJSON(w, http.StatusOK, map[string]any{"entries": entries, "next": next, "missed": missed})
}

// refusals lists what was refused or failed on this node, newest first.
func (o *operations) refusals(w http.ResponseWriter, r *http.Request) error {
	if o.app == nil {
		return errNoApp
	}
	q, err := readEntriesQuery(r, "code", "rid")
	if err != nil {
		return err
	}
	code, err := q.number("code")
	if err != nil {
		return err
	}
	rid := q.values.Get("rid")
	entries := o.app.shared.feed.refused(q.limit, func(e *Entry) bool {
		return (q.appid == "" || e.AppID == q.appid || e.Platform == q.appid) && (code == 0 || e.ErrCode == code) && (rid == "" || e.RID == rid)
	})
	if entries == nil {
		entries = []Entry{}
	}
	return answerJSON(w, http.StatusOK, map[string]any{"refusals": entries})
}

// explainCode says what an errcode of WeChat's means and what to do about it.
func (*operations) explainCode(w http.ResponseWriter, r *http.Request) error {
	code, err := strconv.ParseInt(r.URL.Query().Get("code"), 10, 64)
	if err != nil {
		return badRequest("code: want an errcode, a number such as 61004")
	}
	return answerJSON(w, http.StatusOK, newExplanation(code))
}
