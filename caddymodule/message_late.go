package caddymodule

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/caddy-wechat/caddy-wechat/crypto"
	"github.com/caddy-wechat/caddy-wechat/tokens"
)

// customServiceAPI sends a message of the customer-service API (客服消息) to one user.
const customServiceAPI = "/cgi-bin/message/custom/send"

// transferKind hands a message over to the human agents (多客服): an answer to the push itself, for which the
// customer-service API has no message.
const transferKind = "transfer_customer_service"

// errNotSendable is a reply that no customer-service message can stand for.
var errNotSendable = errors.New("the reply cannot be sent late")

// errNoSender is a push without FromUserName: there is nobody to send anything to.
var errNoSender = errors.New("the push names no sender to whom the late reply could be sent")

// lateField is a value of a customer-service message. It is taken from the first of these elements of the passive reply
// that is there and not empty.
type lateField struct {
	name     string
	required bool // WeChat refuses or swallows the message without it
	from     []string
}

// lateKinds are the kinds of reply that can be sent late, by MsgType, and what their messages hold.
var lateKinds = map[string][]lateField{
	"text":  {{"content", true, []string{"Content"}}},
	"image": {{"media_id", true, []string{"Image/MediaId"}}},
	"voice": {{"media_id", true, []string{"Voice/MediaId"}}},
	"video": {
		{"media_id", true, []string{"Video/MediaId"}},
		{"thumb_media_id", false, []string{"Video/ThumbMediaId"}}, // of the replies of former years
		{"title", false, []string{"Video/Title"}},
		{"description", false, []string{"Video/Description"}},
	},
	// The message wants both addresses, the reply may have one of them. WeChat's page has MusicUrl in its example and
	// MusicURL in its table.
	"music": {
		{"title", false, []string{"Music/Title"}},
		{"description", false, []string{"Music/Description"}},
		{"musicurl", true, []string{"Music/MusicUrl", "Music/MusicURL", "Music/HQMusicUrl"}},
		{"hqmusicurl", true, []string{"Music/HQMusicUrl", "Music/MusicUrl", "Music/MusicURL"}},
		{"thumb_media_id", true, []string{"Music/ThumbMediaId"}},
	},
	// The first article: the message takes one, and 45008 is the answer to more. In JSON the articles may stand in an
	// array with no item around each.
	newsKind: {
		{"title", true, []string{"Articles/item/Title", "Articles/Title"}},
		{"description", false, []string{"Articles/item/Description", "Articles/Description"}},
		{"url", false, []string{"Articles/item/Url", "Articles/Url"}},
		{"picurl", false, []string{"Articles/item/PicUrl", "Articles/PicUrl"}},
	},
}

const newsKind = "news"

// customerMessage makes of a passive reply (被动回复) the body of the customer-service call that delivers the same to openID:
// the sender of the push, whatever the backend wrote into ToUserName. The kind is the reply's MsgType, empty unless it is one
// of WeChat's. Errors hold nothing of the reply.
func customerMessage(format crypto.Format, reply []byte, openID string) (message map[string]any, kind string, err error) {
	if openID == "" {
		return nil, "", errNoSender
	}
	reply = bytes.TrimSpace(bytes.TrimPrefix(reply, byteOrderMark))
	values, err := crypto.ScanElements(reply, format, "MsgType")
	if err != nil {
		return nil, "", fmt.Errorf("the late reply cannot be read: %w", err)
	}
	kind = string(values[0])
	fields, known := lateKinds[kind]
	switch {
	case kind == "":
		return nil, "", errors.New("the late reply has no MsgType")
	case kind == transferKind:
		return nil, kind, fmt.Errorf("%w: %s answers the push itself or nothing", errNotSendable, transferKind)
	case !known:
		return nil, "", fmt.Errorf("%w: its MsgType is none of text, image, voice, video, music, news", errNotSendable)
	}
	part, err := lateValues(format, reply, fields)
	if err != nil {
		return nil, kind, fmt.Errorf("the late reply, of MsgType %s: %w", kind, err)
	}
	message = map[string]any{"touser": openID, "msgtype": kind, kind: part}
	if kind == newsKind {
		message[kind] = map[string]any{"articles": []map[string]string{part}}
	}
	return message, kind, nil
}

// lateValues reads the values of a message from a reply. What is optional and not there is left out.
func lateValues(format crypto.Format, reply []byte, fields []lateField) (map[string]string, error) {
	var paths []string
	for _, f := range fields {
		for _, path := range f.from {
			if !slices.Contains(paths, path) {
				paths = append(paths, path)
			}
		}
	}
	values, err := crypto.ScanElements(reply, format, paths...)
	if err != nil {
		return nil, err
	}
	part := make(map[string]string, len(fields))
	for _, f := range fields {
		for _, path := range f.from {
			if v := values[slices.Index(paths, path)]; len(v) > 0 {
				part[f.name] = string(v)
				break
			}
		}
		if f.required && part[f.name] == "" {
			return nil, fmt.Errorf("%s is missing or empty", f.from[0])
		}
	}
	return part, nil
}

// sendLate delivers a reply that came too late for its push by the customer-service API, with the token of key. It is one
// call: a message that may have arrived is not sent again, and only a refused token, which WeChat refuses before it acts,
// is renewed and the call repeated once. An error names WeChat's errcode but not its text, which may quote the message.
func (a *App) sendLate(ctx context.Context, key tokens.Key, openID string, format crypto.Format, reply []byte) error {
	message, _, err := customerMessage(format, reply, openID)
	if err != nil {
		return err
	}
	err = a.manager().Call(ctx, key, http.MethodPost, customServiceAPI, nil, message, nil)
	if api, ok := err.(*tokens.APIError); ok { //nolint:errorlint // what wraps one is about the token
		return &tokens.APIError{Code: api.Code, RID: api.RID, API: api.API}
	}
	return err
}
