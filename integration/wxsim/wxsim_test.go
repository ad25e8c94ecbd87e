package wxsim

import (
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"net/textproto"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

const (
	testPlatform = "wx1111111111111111"
	testAccount  = "wx2222222222222222"
	testShop     = "wx3333333333333333"
	testMini     = "wx4444444444444444"
	testKey      = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG"
	testSecret   = "0123456789abcdef0123456789abcdef"
	testToken    = "push-token"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newSim starts a simulator with one platform, one plain account and two authorizers.
func newSim(t *testing.T, change func(*Config)) *Server {
	t.Helper()
	cfg := Config{
		Platforms: []Platform{{AppID: testPlatform, Secret: testSecret, Token: testToken, AESKey: testKey}},
		Accounts:  []Account{{AppID: testAccount, Secret: "account-" + testSecret, Token: testToken, AESKey: testKey}},
		Authorizers: []Authorizer{
			{AppID: testShop, OriginalID: "gh_333333333333", NickName: "shop"}, {AppID: testMini, MiniProgram: true},
		},
		Faults: Faults{Polite: true},
	}
	if change != nil {
		change(&cfg)
	}
	s := New(cfg)
	if err := s.Start("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// caller makes API calls as a gateway would.
type caller struct {
	t *testing.T
	s *Server
}

// result is an API answer.
type result struct {
	status int
	header http.Header
	body   []byte
	fields map[string]any
}

func (r result) errcode() int64 {
	code, _ := r.fields["errcode"].(float64)
	return int64(code)
}

func (r result) text(name string) string {
	text, _ := r.fields[name].(string)
	return text
}

func (c caller) do(req *http.Request) (result, error) {
	c.t.Helper()
	client := &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true, DisableCompression: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	resp, err := client.Do(req)
	if err != nil {
		return result{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	r := result{status: resp.StatusCode, header: resp.Header}
	r.body, err = io.ReadAll(resp.Body)
	_ = json.Unmarshal(r.body, &r.fields) // files have no fields
	return r, err
}

func (c caller) request(method, path, query string, body any) *http.Request {
	c.t.Helper()
	var reader io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		reader = strings.NewReader(b)
	default:
		data, err := json.Marshal(b)
		if err != nil {
			c.t.Fatal(err)
		}
		reader = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(c.t.Context(), method, c.s.URL()+path+"?"+query, reader)
	if err != nil {
		c.t.Fatal(err)
	}
	return req
}

func (c caller) get(path, query string) result {
	c.t.Helper()
	r, err := c.do(c.request(http.MethodGet, path, query, nil))
	if err != nil {
		c.t.Fatal(err)
	}
	return r
}

func (c caller) post(path, query string, body any) result {
	c.t.Helper()
	r, err := c.do(c.request(http.MethodPost, path, query, body))
	if err != nil {
		c.t.Fatal(err)
	}
	return r
}

// componentToken brings the platform a ticket and gets its token.
func (c caller) componentToken() string {
	c.t.Helper()
	c.s.SetURLs(testPlatform, c.sink().URL, "")
	if r, err := c.s.PushTicket(c.t.Context(), testPlatform); err != nil || !r.OK() {
		c.t.Fatalf("push ticket: %v %+v", err, r)
	}
	r := c.post("/cgi-bin/component/api_component_token", "", c.tokenBody(nil))
	if r.text("component_access_token") == "" {
		c.t.Fatalf("no component token: %s", r.body)
	}
	return r.text("component_access_token")
}

// tokenBody is a good body of api_component_token with changes; an empty value removes a field.
func (c caller) tokenBody(changes map[string]string) map[string]string {
	ticket, _ := c.s.Current(KindTicket, testPlatform, testPlatform)
	body := map[string]string{"component_appid": testPlatform, "component_appsecret": testSecret, "component_verify_ticket": ticket}
	maps.Copy(body, changes)
	maps.DeleteFunc(body, func(_, v string) bool { return v == "" })
	return body
}

// sink answers every push with success.
func (c caller) sink() *httptest.Server {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "success")
	}))
	c.t.Cleanup(srv.Close)
	return srv
}

// authorized authorizes an account and exchanges the code; it returns component, access and refresh token.
func (c caller) authorized(appID string) (component, access, refresh string) {
	c.t.Helper()
	component = c.componentToken()
	a, err := c.s.Authorize(c.t.Context(), testPlatform, appID)
	if err != nil || !a.Push.OK() {
		c.t.Fatalf("authorize: %v %+v", err, a)
	}
	info := c.exchange(component, a.Code)
	access, _ = info["authorizer_access_token"].(string)
	refresh, _ = info["authorizer_refresh_token"].(string)
	return component, access, refresh
}

func (c caller) exchange(component, code string) map[string]any {
	c.t.Helper()
	r := c.post("/cgi-bin/component/api_query_auth", "component_access_token="+component,
		map[string]string{"component_appid": testPlatform, "authorization_code": code})
	info, ok := r.fields["authorization_info"].(map[string]any)
	if !ok {
		c.t.Fatalf("no authorization_info: %s", r.body)
	}
	return info
}

func (c caller) refresh(component, appID, refresh string) result {
	c.t.Helper()
	return c.post("/cgi-bin/component/api_authorizer_token", "component_access_token="+component,
		map[string]string{"component_appid": testPlatform, "authorizer_appid": appID, "authorizer_refresh_token": refresh})
}

func (c caller) stable(force bool) result {
	c.t.Helper()
	return c.post("/cgi-bin/stable_token", "", map[string]any{
		"grant_type": "client_credential", "appid": testAccount, "secret": "account-" + testSecret, "force_refresh": force,
	})
}

// upload is a multipart body of one file.
func (c caller) upload(contentType string, data []byte) (body *bytes.Buffer, mediaType string) {
	c.t.Helper()
	body = &bytes.Buffer{}
	w := multipart.NewWriter(body)
	part, err := w.CreatePart(textproto.MIMEHeader{
		"Content-Disposition": {`form-data; name="media"; filename="a.jpg"`}, "Content-Type": {contentType},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	_, _ = part.Write(data)
	_ = w.Close()
	return body, w.FormDataContentType()
}

func wantCode(t *testing.T, r result, code int64) {
	t.Helper()
	if r.errcode() != code || r.status != http.StatusOK {
		t.Errorf("status %d, body %s: want 200 and errcode %d", r.status, r.body, code)
	}
}

func rules(s *Server) map[Rule]int {
	found := map[Rule]int{}
	for _, e := range s.Journal().Violations() {
		for _, v := range e.Violations {
			found[v.Rule]++
		}
	}
	return found
}

func wantNoViolations(t *testing.T, s *Server) {
	t.Helper()
	for _, e := range s.Journal().Violations() {
		t.Errorf("%s %s: %v", e.Direction, e.Path, e.Violations)
	}
}
