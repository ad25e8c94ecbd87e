package wxsim

import "slices"

// maxCustomText is the longest text of a customer-service message, in bytes.
const maxCustomText = 2048

// otherCustomKinds are the kinds of message that are not read any further: a gateway makes none of them.
var otherCustomKinds = []string{"mpnews", "mpnewsarticle", "msgmenu", "wxcard", "miniprogrampage", "link"}

func (c *call) customSend() answer {
	u, code := c.recipient(c.text("touser"))
	if code != 0 {
		return c.fail(code)
	}
	kind := c.text("msgtype")
	content, code := c.customContent(kind)
	if code != 0 {
		return c.fail(code)
	}
	c.remember(Sent{OpenID: u.OpenID, Type: kind, Content: content})
	return c.done()
}

// customContent is what the user sees of a message.
func (c *call) customContent(kind string) (string, int64) {
	object, _ := c.fields[kind].(map[string]any)
	part := customPart{c, object}
	switch kind {
	case "text":
		return part.words()
	case "image", "voice":
		return "[" + kind + " " + part.text("media_id") + "]", part.media("media_id", kind)
	case "video":
		code := part.media("media_id", kind)
		if code == 0 && part.object["thumb_media_id"] != nil { // a passive reply has none, so it cannot be demanded
			code = part.media("thumb_media_id", "thumb", "image")
		}
		return "[" + kind + " " + part.text("media_id") + "]", code
	case "music":
		if part.text("musicurl") == "" || part.text("hqmusicurl") == "" {
			return "", 40097
		}
		return "[music]", part.media("thumb_media_id", "thumb", "image")
	case "news":
		return part.article()
	}
	switch {
	case !slices.Contains(otherCustomKinds, kind):
		return "", 40008
	case object == nil:
		return "", 40097
	}
	return "[" + kind + "]", 0
}

// customPart is the object of a message that is named for its kind.
type customPart struct {
	c      *call
	object map[string]any
}

func (p customPart) text(name string) string {
	text, _ := p.object[name].(string)
	return text
}

func (p customPart) words() (string, int64) {
	content := p.text("content")
	switch {
	case content == "":
		return "", 44004
	case len(content) > maxCustomText:
		return "", 45002
	}
	return content, 0
}

// media checks that a field names a file of one of these kinds that the account itself has uploaded.
func (p customPart) media(name string, kinds ...string) int64 {
	id := p.text(name)
	if id == "" {
		return 41006
	}
	file, known := p.c.s.media[id]
	switch {
	case !known:
		return 40007
	case file.appID != p.c.cred.appID:
		p.c.violate(RuleTokenOwner, "token of %s in a call about media of %s", p.c.cred.appID, file.appID)
		return 40007
	case !slices.Contains(kinds, file.kind):
		return 40007
	}
	return 0
}

// article is the title of the one article of a news.
func (p customPart) article() (string, int64) {
	articles, _ := p.object["articles"].([]any)
	switch len(articles) {
	case 0:
		return "", 44003
	case 1:
	default:
		return "", 45008
	}
	object, _ := articles[0].(map[string]any)
	article := customPart{p.c, object}
	if article.text("title") == "" {
		return "", 44003
	}
	for _, name := range []string{"description", "url", "picurl"} {
		if value := object[name]; value != nil && article.text(name) == "" && value != "" {
			return "", 47001 // not a text
		}
	}
	return article.text("title"), 0
}
