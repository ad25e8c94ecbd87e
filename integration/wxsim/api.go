package wxsim

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Sent is one customer-service or template message that an API call sent to a user.
type Sent struct {
	AppID, Platform string // whose token the call had; Platform is "" for a plain account
	OpenID          string
	Type            string // msgtype, or "template"
	Content         string // what the user sees, as PushResult.UserSaw has it for replies
	Body            []byte // the whole call's body
	At              time.Time
}

// SentTo returns what was sent to a user so far.
func (s *Server) SentTo(openID string) []Sent {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(s.sent), func(m Sent) bool { return m.OpenID != openID })
}

// WaitSent returns the first message sent to a user, already or later, for which fits is true
// (nil: any), or ctx's error.
func (s *Server) WaitSent(ctx context.Context, openID string, fits func(Sent) bool) (Sent, error) {
	for {
		s.mu.Lock()
		changed := s.sentChanged
		s.mu.Unlock()
		for _, m := range s.SentTo(openID) {
			if fits == nil || fits(m) {
				return m, nil
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Sent{}, ctx.Err()
		}
	}
}

// maxSent bounds what is remembered; the oldest tenth goes first.
const maxSent = 10_000

func (c *call) remember(m Sent) {
	m.AppID, m.Platform, m.Body, m.At = c.cred.appID, c.cred.platform, bytes.Clone(c.body), time.Now()
	s := c.s
	if len(s.sent) >= maxSent {
		s.sent = slices.Delete(s.sent, 0, maxSent/10)
	}
	s.sent = append(s.sent, m)
	close(s.sentChanged)
	s.sentChanged = make(chan struct{})
}

// recipient checks that an openid belongs to the account whose token the call has.
func (c *call) recipient(openID string) (User, int64) {
	if openID == "" {
		return User{}, 41009
	}
	u, known := c.s.users[openID]
	if !known {
		return User{}, 40003
	}
	if u.AppID != c.cred.appID {
		c.violate(RuleTokenOwner, "token of %s in a call about a user of %s", c.cred.appID, u.AppID)
		return User{}, 40003
	}
	return u, 0
}

func (c *call) userInfo() answer {
	u, code := c.recipient(c.query.Get("openid"))
	if code != 0 {
		return c.fail(code)
	}
	info := map[string]any{
		"subscribe": 1, "openid": u.OpenID, "language": "zh_CN", "subscribe_time": 1382694957, "remark": "",
		"groupid": 0, "tagid_list": []int{}, "subscribe_scene": "ADD_SCENE_QR_CODE", "qr_scene": 0, "qr_scene_str": "",
	}
	if u.UnionID != "" {
		info["unionid"] = u.UnionID
	}
	return c.ok(info)
}

const maxUserList = 10_000

func (c *call) userList() answer {
	ids := []string{}
	for _, u := range c.s.users {
		if u.AppID == c.cred.appID {
			ids = append(ids, u.OpenID)
		}
	}
	slices.Sort(ids)
	total, next := len(ids), c.query.Get("next_openid")
	if at, found := slices.BinarySearch(ids, next); next != "" {
		if found {
			at++
		}
		ids = ids[at:]
	}
	ids = ids[:min(len(ids), maxUserList)]
	last := ""
	if len(ids) > 0 {
		last = ids[len(ids)-1]
	}
	return c.ok(map[string]any{"total": total, "count": len(ids), "data": map[string]any{"openid": ids}, "next_openid": last})
}

func (c *call) templateSend() answer {
	u, code := c.recipient(c.text("touser"))
	if code != 0 {
		return c.fail(code)
	}
	if c.text("template_id") == "" {
		return c.fail(40037)
	}
	c.remember(Sent{OpenID: u.OpenID, Type: "template"})
	return c.ok(map[string]any{"errcode": 0, "errmsg": "ok", "msgid": len(c.s.sent)})
}

func (c *call) menuCreate() answer {
	if _, ok := c.fields["button"].([]any); !ok {
		return c.fail(40097)
	}
	// Menus are kept as the bytes that came: an escaped or re-encoded name would show.
	c.s.menus[c.cred.appID] = bytes.Clone(c.body)
	return c.done()
}

func (c *call) menuGet() answer {
	menu := c.s.menus[c.cred.appID]
	if menu == nil {
		return c.fail(46003)
	}
	return answer{body: slices.Concat([]byte(`{"menu":`), menu, []byte("}"))}
}

func (c *call) menuDelete() answer {
	delete(c.s.menus, c.cred.appID)
	return c.done()
}

func (c *call) qrcodeCreate() answer {
	if c.text("action_name") == "" {
		return c.fail(40097)
	}
	ticket := base64.StdEncoding.EncodeToString([]byte("qr " + c.cred.appID + c.text("action_name")))
	return c.ok(map[string]any{"ticket": ticket, "expire_seconds": 60, "url": "http://weixin.qq.com/q/kZgfwMTm72WWPkovabbI"})
}

// medium is an uploaded file.
type medium struct {
	appID, kind, name, contentType string
	data                           []byte
}

// maxMedia bounds the number of files kept; later uploads are answered but cannot be fetched.
const maxMedia = 1000

func (c *call) mediaUpload() answer {
	kind := c.query.Get("type")
	if !slices.Contains([]string{"image", "voice", "video", "thumb"}, kind) {
		return c.fail(40004)
	}
	file, code := c.uploaded("media")
	if code != 0 {
		return c.fail(code)
	}
	file.appID, file.kind = c.cred.appID, kind
	id := c.s.addMedia(file)
	return c.ok(map[string]any{"type": kind, "media_id": id, "created_at": time.Now().Unix()})
}

// addMedia keeps a file, for callers that hold mu.
func (s *Server) addMedia(file medium) (id string) {
	id = newValue(KindJSTicket)[:64] // a media_id has the alphabet of a ticket
	if len(s.media) < maxMedia {
		s.media[id] = file
	}
	return id
}

// NewMedia is the media_id of a file that an account has uploaded: an image, voice, video or thumb.
func (s *Server) NewMedia(appID, kind string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.addMedia(medium{appID: appID, kind: kind, name: kind, contentType: "application/octet-stream", data: []byte(kind)})
}

// uploaded reads the file part of a multipart body as strictly as WeChat does: it wants a plain filename, and knows none that is encoded by RFC
// 2231 alone. Without a Content-Type of the part, as Python's requests sends it, WeChat goes by the file.
func (c *call) uploaded(field string) (medium, int64) {
	contentType, params, err := mime.ParseMediaType(c.r.Header.Get("Content-Type"))
	if err != nil || !strings.HasPrefix(contentType, "multipart/") || params["boundary"] == "" {
		return medium{}, 41005
	}
	parts := multipart.NewReader(bytes.NewReader(c.body), params["boundary"])
	for {
		part, err := parts.NextRawPart()
		if err != nil {
			return medium{}, 41005 // no such part, or a body cut short
		}
		if part.FormName() != field {
			continue
		}
		data, err := io.ReadAll(part)
		named := strings.Contains(strings.ToLower(part.Header.Get("Content-Disposition")), "filename=")
		if err != nil || len(data) == 0 || part.FileName() == "" || !named {
			return medium{}, 41005
		}
		file := medium{name: part.FileName(), contentType: part.Header.Get("Content-Type"), data: data}
		if file.contentType == "" {
			file.contentType = http.DetectContentType(data)
		}
		return file, 0
	}
}

func (c *call) mediaGet() answer {
	id := c.query.Get("media_id")
	if id == "" {
		return c.fail(41006)
	}
	file, known := c.s.media[id]
	if !known {
		return c.fail(40007)
	}
	if file.appID != c.cred.appID {
		c.violate(RuleTokenOwner, "token of %s in a call for media of %s", c.cred.appID, file.appID)
		return c.fail(40007)
	}
	if file.kind == "video" {
		return c.ok(map[string]string{"video_url": "http://mmbiz.qpic.cn/" + id})
	}
	return answer{
		contentType: file.contentType, body: file.data,
		disposition: "attachment; filename=" + strconv.Quote(file.name),
	}
}

// jpeg is the smallest thing with a JPEG's first and last bytes; filler makes it longer than
// what a gateway would buffer.
func jpeg(text string) []byte {
	filler := bytes.Repeat([]byte(text+"\x00\xff"), 8<<10/(len(text)+2)+1)
	return slices.Concat([]byte("\xff\xd8\xff\xe0\x00\x10JFIF\x00"), filler, []byte("\xff\xd9"))
}

func (c *call) wxaCode() answer {
	scene := c.text("scene")
	if scene == "" {
		return c.fail(40097)
	}
	return answer{contentType: "image/jpeg", body: jpeg(scene), disposition: `attachment; filename="QRCode.jpg"`}
}

// codeFlow is where a mini program is in 代小程序开发.
type codeFlow struct {
	templates []int // of a platform
	committed bool
	audits    int

	version  string   // that was committed
	versions []string // released, the one online last
	reverted bool     // the version online is one that was gone back to
}

func (c *call) flow() *codeFlow {
	f := c.s.wxa[c.cred.appID]
	if f == nil {
		f = &codeFlow{}
		c.s.wxa[c.cred.appID] = f
	}
	return f
}

func (c *call) draftList() answer {
	return c.ok(map[string]any{"errcode": 0, "errmsg": "ok", "draft_list": []any{
		map[string]any{"draft_id": 0, "user_version": "1.0.0", "user_desc": "draft", "create_time": 1488965944},
	}})
}

func (c *call) templateList() answer {
	list := []any{}
	for _, id := range c.flow().templates {
		list = append(list, map[string]any{"template_id": id, "user_version": "1.0.0", "user_desc": "draft", "create_time": 1488965944})
	}
	return c.ok(map[string]any{"errcode": 0, "errmsg": "ok", "template_list": list})
}

func (c *call) addToTemplate() answer {
	if c.text("draft_id") != "0" {
		return c.fail(85064)
	}
	f := c.flow()
	f.templates = append(f.templates, len(f.templates)+1)
	return c.done()
}

func (c *call) deleteTemplate() answer {
	f := c.flow()
	i := slices.IndexFunc(f.templates, func(id int) bool { return strconv.Itoa(id) == c.text("template_id") })
	if i < 0 {
		return c.fail(85064)
	}
	f.templates = slices.Delete(f.templates, i, i+1)
	return c.done()
}

// commit takes a template of the platform whose token the call has.
func (c *call) commit() answer {
	library := c.s.wxa[c.cred.platform]
	if id, err := strconv.Atoi(c.text("template_id")); err != nil || library == nil || !slices.Contains(library.templates, id) {
		return c.fail(85014)
	}
	var ext map[string]any
	if json.Unmarshal([]byte(c.text("ext_json")), &ext) != nil {
		return c.fail(85013)
	}
	f := c.flow()
	f.committed, f.version = true, c.text("user_version")
	return c.done()
}

func (c *call) submitAudit() answer {
	f := c.flow()
	if !f.committed {
		return c.fail(85086)
	}
	f.audits++
	return c.ok(map[string]any{"errcode": 0, "errmsg": "ok", "auditid": f.audits})
}

func (c *call) auditStatus() answer {
	f := c.flow()
	if n, err := strconv.Atoi(c.text("auditid")); err != nil || n < 1 || n > f.audits {
		return c.fail(40097)
	}
	return c.ok(map[string]any{"errcode": 0, "errmsg": "ok", "status": 0})
}

func (c *call) release() answer {
	f := c.flow()
	if f.audits == 0 {
		return c.fail(85019)
	}
	f.versions, f.reverted, f.committed, f.audits = append(f.versions, f.version), false, false, 0
	return c.done()
}

// revert goes back to the version before. Each call goes back, so no program may repeat one.
func (c *call) revert() answer {
	f := c.flow()
	if c.query.Get("action") == "get_history_version" {
		list := []any{}
		for i := len(f.versions) - 2; i >= 0; i-- {
			list = append(list, map[string]any{"app_version": i + 1, "user_version": f.versions[i], "commit_time": 1488965944})
		}
		return c.ok(map[string]any{"errcode": 0, "errmsg": "ok", "version_list": list})
	}
	if len(f.versions) < 2 || f.reverted {
		return c.fail(87012)
	}
	f.versions, f.reverted = f.versions[:len(f.versions)-1], true
	return c.done()
}

// undoAudit takes a version back that is being audited.
func (c *call) undoAudit() answer {
	f := c.flow()
	if f.audits == 0 {
		return c.fail(85019)
	}
	f.audits = 0
	return c.done()
}

// versionInfo says which version is online.
func (c *call) versionInfo() answer {
	info := map[string]any{"errcode": 0, "errmsg": "ok"}
	if f := c.flow(); len(f.versions) > 0 {
		info["release_info"] = map[string]any{"release_version": f.versions[len(f.versions)-1], "release_desc": "", "release_time": 1488965944}
	}
	return c.ok(info)
}
